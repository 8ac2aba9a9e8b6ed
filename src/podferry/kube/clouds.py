"""What clouds say of a machine that they are about to take away: the metadata services of EC2, Compute Engine and Azure.

Which cloud it is, the machine's firmware says. Here, beside the API server's client, since this is the one place that speaks HTTP
with what stands around a cluster.
"""

from __future__ import annotations

import datetime
import email.utils
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2

from podferry.errors import Failed

Json = dict[str, Any]

ADDRESS = "http://169.254.169.254"
VENDOR = Path("/sys/class/dmi/id/sys_vendor")
PATIENCE, LARGEST = 5.0, 1 << 20
AHEAD = datetime.timedelta(hours=1)
"""Maintenance is told weeks before: a node is drained so long before it begins."""
PREEMPTED, TERMINATED = datetime.timedelta(seconds=25), datetime.timedelta(seconds=60)
"""What GCP leaves to pods of a preempted machine, and to a machine that ends for maintenance of its host."""
TOKEN_SECONDS = 21600
ENDS_ON_AZURE = frozenset({"Reboot", "Redeploy", "Preempt", "Terminate"})

Ask = Callable[[httpx2.AsyncClient, datetime.datetime], Awaitable[datetime.datetime | None]]


async def ec2(http: httpx2.AsyncClient, now: datetime.datetime) -> datetime.datetime | None:
    """When EC2 takes the instance away: a spot interruption (IMDSv2), or a scheduled event that stops or restarts it."""
    lasts = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    token = await _text(http, "/latest/api/token", lasts, method="PUT")
    if token is None:
        return None
    shown = {"X-aws-ec2-metadata-token": token}
    spot = _object(await _text(http, "/latest/meta-data/spot/instance-action", shown))
    events = _parsed(await _text(http, "/latest/meta-data/events/maintenance/scheduled", shown))
    active = (
        [one for one in events if isinstance(one, dict) and one.get("State") == "active"]
        if isinstance(events, list)
        else []
    )
    planned = [time_of(one.get("NotBefore")) for one in active]
    return min(filter(None, [time_of(spot.get("time")), *map(_soon(now), planned)]), default=None)


async def gcp(http: httpx2.AsyncClient, now: datetime.datetime) -> datetime.datetime | None:
    """When Compute Engine takes the machine away: it was preempted, or ends for maintenance of its host."""
    flavour = {"Metadata-Flavor": "Google"}
    if (await _text(http, "/computeMetadata/v1/instance/preempted", flavour) or "").strip().upper() == "TRUE":
        return now + PREEMPTED
    event = (await _text(http, "/computeMetadata/v1/instance/maintenance-event", flavour) or "").strip()
    return now + TERMINATED if event == "TERMINATE_ON_HOST_MAINTENANCE" else None


async def azure(http: httpx2.AsyncClient, now: datetime.datetime) -> datetime.datetime | None:
    """When Azure stops or restarts this machine, by its Scheduled Events. A freeze of some seconds is none."""
    metadata = {"Metadata": "true"}
    told = _object(await _text(http, "/metadata/scheduledevents?api-version=2020-07-01", metadata)).get("Events")
    events = [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []
    events = [one for one in events if one.get("EventType") in ENDS_ON_AZURE and one.get("EventStatus") != "Completed"]
    if not events:
        return None
    name = await _text(http, "/metadata/instance/compute/name?api-version=2021-02-01&format=text", metadata)
    mine = [one for one in events if name and name.strip() in (one.get("Resources") or [])]
    times = [time_of(one.get("NotBefore")) or (now if one.get("EventStatus") == "Started" else None) for one in mine]
    return min(filter(None, map(_soon(now), times)), default=None)


CLOUDS: Mapping[str, Ask] = {
    "Amazon EC2": ec2,
    "Google": gcp,
    "Google Compute Engine": gcp,
    "Microsoft Corporation": azure,
}
"""By what the firmware calls the machine's maker."""


def cloud(vendor: Path = VENDOR) -> Ask | None:
    """How this machine's cloud is asked; None where it is none that podferry knows."""
    try:
        return CLOUDS.get(vendor.read_text().strip())
    except OSError:
        return None


@asynccontextmanager
async def metadata(address: str = ADDRESS) -> AsyncIterator[httpx2.AsyncClient]:
    """The metadata service. Never through a proxy: the address is the machine's own."""
    async with httpx2.AsyncClient(base_url=address, timeout=PATIENCE, trust_env=False) as http:
        yield http


async def _text(http: httpx2.AsyncClient, path: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """What is at a path; None where there is nothing. Raises `Failed` where nobody answers, or not so."""
    try:
        answer = await http.request(method, path, headers=dict(headers))
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
    except (httpx2.HTTPError, OSError) as silent:
        raise Failed.because("the cloud's metadata service does not answer", silent) from silent
    return answer.text[:LARGEST]


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


def _object(text: str | None) -> Json:
    found = _parsed(text)
    return found if isinstance(found, dict) else {}


def time_of(text: Any) -> datetime.datetime | None:
    """2017-09-18T08:22:00Z (EC2), 21 Jan 2019 09:00:43 GMT (EC2) or Mon, 19 Sep 2016 18:29:47 GMT (Azure)."""
    if not isinstance(text, str) or not text:
        return None
    found = None
    with suppress(ValueError):
        found = datetime.datetime.fromisoformat(text)
    if found is None:
        with suppress(ValueError):
            found = email.utils.parsedate_to_datetime(text)
    return found.replace(tzinfo=datetime.UTC) if found is not None and found.tzinfo is None else found


def _soon(now: datetime.datetime) -> Callable[[datetime.datetime | None], datetime.datetime | None]:
    """What begins within `AHEAD`."""
    return lambda when: when if when is not None and when - now <= AHEAD else None

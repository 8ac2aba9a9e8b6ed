"""The source's half of a rehearsal: a move up to the target's verdict on CRIU's images, and then taken back.

The job is dumped as for a move, by the same steps, and goes on as soon as the images are written: it stands still for as long as
a freeze, a dump and a rollback take. Only then the images travel. Memory and files do not: the target has nothing that could run,
and never takes a rehearsal's GO. Whatever fails on the way is what a move would fail of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from podferry.core.limits import STREAMED_IMAGES, of_image
from podferry.engine.inbox import Inbox
from podferry.engine.order import Order
from podferry.engine.ports import Images
from podferry.engine.sending import size_of
from podferry.engine.source import Source
from podferry.errors import Failed, PodferryError
from podferry.model import Mode, Outcome
from podferry.wire.messages import Ready

REHEARSAL = Order(Mode.STOP, timeout=120.0, max_freeze=5.3)
"""Nothing is copied while the job runs, and it may stand still for as many seconds as in a live move that aims at 0.3 s."""
SMALL = 1 << 20
"""Bytes up to which an image that holds memory or a file travels like any other."""


class Rehearsed(PodferryError):
    """The rehearsal has come to its end, and nothing speaks against a move."""

    code = "PF245"


class Rehearsal(Source):
    """A container of this node that is rehearsed, by the order `REHEARSAL`."""

    _images: Images
    _looked = 0.0

    async def _cut_over(self, inbox: Inbox) -> None:
        await self._rounds.scan_dirty()
        self._looked = self.record.now()
        await super()._cut_over(inbox)
        await self._have_judged(inbox)
        raise Rehearsed("the job was rehearsed, and can move")

    async def _stop_and_copy(self, inbox: Inbox) -> None:
        """From the freeze to the job's going on, with the images in memory: they go with the dump that is taken back."""
        start = self.record.now()
        with self.record.span("freeze"):
            await self.job.freeze()
        with self.record.span("final scan"):
            change = await self.job.final_scan()
        images = await self._sender.dump(self.job)
        image_bytes = sum(map(size_of, images.values()))
        self._images = without_memory(images)
        with self.record.span("go on"):
            leftovers = await self.take_back()
        if leftovers:
            raise Failed(
                "the rehearsed job may still be frozen", why="; ".join(f"{one.kind}: {one.why}" for one in leftovers)
            )
        self.record.extra["rehearsal"] = {
            "stood_still_ms": round(self.record.now() - start, 3),
            "written_bytes": change.bytes,
            "written_in_ms": round(start - self._looked, 3),
            "image_bytes": image_bytes,
        }

    async def _have_judged(self, inbox: Inbox) -> None:
        """Let the target read the images, and say what it would say before GO. The job runs meanwhile."""
        await self._sender.send_images(self.job, self._images)
        with self.record.span("check what arrived", "target"):
            await self._sender.state_end(self.job, (), trees=False)
            await inbox.expect(Ready)
        self.record.extra["rehearsal"]["forecast_ms"] = round(forecast(self._took()), 1)

    def _took(self) -> dict[str, float]:
        return {one["name"]: one["end_ms"] - one["start_ms"] for one in self.record.spans}

    def _end(self, outcome: Outcome, reason: str, error: PodferryError | None = None) -> None:
        """The engine's way back ends a rehearsal well, too."""
        if outcome is Outcome.ROLLED_BACK and isinstance(error, Rehearsed):
            outcome, error = Outcome.REHEARSED, None
        super()._end(outcome, reason, error)


class RehearsalAlone(Rehearsal):
    """The rehearsal of a pod. Its containers are the kubelet's to make, after the target pod's own object, which no
    rehearsal has made: the target says whether it would take the pod, and CRIU whether it can be dumped."""

    async def _have_target_prepared(self, inbox: Inbox) -> None:
        """Nothing waits for the state."""

    async def _have_judged(self, inbox: Inbox) -> None:
        self.record.extra["rehearsal"]["forecast_ms"] = round(forecast(self._took()), 1)


def forecast(took: Mapping[str, float]) -> float:
    """The downtime of a move, in milliseconds, by what the steps of its rehearsal took: a restore takes about as long as the dump.
    What the job has written since the last round comes on top, as does memory that it shares: those go over the link."""
    steps = ("freeze", "final scan", "dump", "send images", "check what arrived")
    return sum(took.get(step, 0.0) for step in steps) + took.get("dump", 0.0)


def without_memory(images: Images) -> Images:
    """The images that say what the job is, read: not those of the memory that it shares, or of large files. Raises `TooMuch`."""
    told: dict[tuple[int, str], bytes | Path] = {}
    for (directory, name), data in images.items():
        size = size_of(data)
        of_image(name).demand(size, f"the job, in its image {name}")
        if size <= SMALL or not name.startswith(STREAMED_IMAGES):
            told[directory, name] = data.read_bytes() if isinstance(data, Path) else data
    return told


def told(record: dict[str, Any]) -> dict[str, Any]:
    """The answer of `check` about a rehearsal that has ended, from its record: figures, and the reason where a move would fail."""
    answer: dict[str, Any] = {
        "rehearsal": {"id": record["id"], "outcome": record["outcome"], **record.get("rehearsal", {})}
    }
    if record["outcome"] != Outcome.REHEARSED:
        answer |= {"movable": False, "refusals": [record["error"]]}
    return answer

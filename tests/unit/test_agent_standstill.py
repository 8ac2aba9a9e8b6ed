"""How long a job stands still before GO, on the rig's clock: whatever is slow there, it is given back in time, and told why."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from agent_fakes import SourceNode
from agent_rig import Fault, LeapingLoop, Rig, order

from podferry.core.phases import SourcePhase
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.standstill import BEYOND_DOWNTIME, GRACE, STALLED, Standstill
from podferry.errors import PodferryError, TimedOut, leaves
from podferry.model import Mode

pytestmark = pytest.mark.unit

SLOW = [
    ("source", "freeze", "freeze"),
    ("source", "final_scan", "final scan"),
    ("source", "read", "last pages"),
    ("source", "dump", "dump"),
    ("source", "trees", "upper layer, last pass"),
    ("source", "logs", "upper layer, last pass"),
    ("target", "verify", "check what arrived"),
]
"""Where a migration may be slow while the job stands still, and the step that the error must name."""


class Timed(SourceNode):
    """Notes for how long it was frozen."""

    def __init__(self) -> None:
        self.since, self.stood_still = -1.0, 0.0
        super().__init__()

    def __setattr__(self, name: str, value: object) -> None:
        if name == "frozen" and value != getattr(self, "frozen", False):
            now = asyncio.get_running_loop().time()
            if value:
                self.since = now
            else:
                self.stood_still = max(self.stood_still, now - self.since)
        super().__setattr__(name, value)


async def hang(rig: Rig) -> None:
    """For ever, if the job stands still."""
    if rig.source.frozen:
        await anyio.sleep_forever()


def slow_rig(tmp_path: Path, side: str, name: str, **more: Any) -> tuple[Rig, Timed]:
    when = "after" if name == "freeze" else "before"
    rig = Rig(tmp_path, [Fault(side, name, hang, when, nth) for nth in range(1, 20)], **more)
    rig.source = timed = Timed()
    return rig, timed


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.POSTCOPY])
@pytest.mark.parametrize(("side", "name", "step"), [one for one in SLOW if one[1] != "read"])
def test_whatever_hangs_the_job_is_given_back_in_time(
    side: str, name: str, step: str, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, timed = slow_rig(tmp_path, side, name, order=order(max_downtime=0.5))
    rig.move(mode, monkeypatch)
    assert rig.phase("a") == SourcePhase.ROLLED_BACK
    assert not rig.passed_the_right
    assert 0.5 + BEYOND_DOWNTIME <= timed.stood_still <= 0.5 + BEYOND_DOWNTIME + 2 * GRACE
    error = rig.records["a"]["error"]
    assert error["code"] == TimedOut.code
    assert step in error["why"], error
    assert "--max-freeze" in error["remedy"]


@pytest.mark.parametrize(("side", "name", "step"), [one for one in SLOW if one[1] != "read"])
def test_in_mode_stop_the_job_is_given_back_when_nothing_is_sent_any_more(
    side: str, name: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, timed = slow_rig(tmp_path, side, name, order=type(order())(timeout=2 * STALLED))
    rig.move(Mode.STOP, monkeypatch)
    assert rig.phase("a") == SourcePhase.ROLLED_BACK
    assert timed.stood_still <= STALLED + 2.0
    assert "sent nothing for" in rig.records["a"]["reason"]
    assert step in rig.records["a"]["reason"]


def test_the_users_own_limit_holds_in_every_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in Mode:
        own = order(max_downtime=20.0)
        rig, timed = slow_rig(tmp_path / mode, "target", "verify", order=type(own)(timeout=60.0, max_freeze=1.5))
        rig.move(mode, monkeypatch)
        assert rig.phase("a") == SourcePhase.ROLLED_BACK
        assert timed.stood_still <= 1.5 + 2 * GRACE


# The limit alone.


def bounded(
    limit: Standstill, work: Callable[[MigrationRecord, list[PodferryError]], Awaitable[None]], sent: Any = None
) -> float:
    """Run `work` under the limit; returns when it ended on the loop's clock."""

    async def go() -> float:
        record, severed = MigrationRecord("1", "job", "a", "b", Mode.LIVE), list[PodferryError]()
        try:
            await limit.bound(lambda: work(record, severed), record, sent=sent or (lambda: 0), sever=severed.append)
        except (TimedOut, BaseExceptionGroup) as error:
            assert {type(one) for one in leaves(error)} == {TimedOut}
            return anyio.current_time()
        raise AssertionError("it was not broken off")

    return anyio.run(go, backend_options={"loop_factory": LeapingLoop})


def test_a_send_that_cannot_be_cancelled_is_ended_by_breaking_the_link() -> None:
    async def work(record: MigrationRecord, severed: list[PodferryError]) -> None:
        with record.span("last pages"), anyio.CancelScope(shield=True):
            while not severed:
                await anyio.sleep(0.01)
            raise severed[0]

    assert bounded(Standstill(Mode.LIVE, 2.0, 0.1), work) == pytest.approx(2.0 + GRACE, abs=0.05)


def test_in_mode_stop_a_slow_link_is_no_reason_as_long_as_it_carries_anything() -> None:
    count = [0]

    async def work(record: MigrationRecord, severed: list[PodferryError]) -> None:
        for _ in range(10):
            await anyio.sleep(STALLED - 1)
            count[0] += 1
        await anyio.sleep_forever()

    ended = bounded(Standstill(Mode.STOP, None, 0.1), work, sent=lambda: count[0])
    assert ended == pytest.approx(10 * (STALLED - 1) + STALLED, abs=2.0)


def test_what_is_done_in_time_is_not_touched() -> None:
    async def go() -> None:
        record = MigrationRecord("1", "job", "a", "b", Mode.LIVE)

        async def work() -> None:
            await anyio.sleep(2.9)

        await Standstill(Mode.LIVE, 3.0, 0.1).bound(
            work, record, sent=lambda: 0, sever=lambda _: pytest.fail("severed")
        )

    anyio.run(go, backend_options={"loop_factory": LeapingLoop})

"""What a workload asks of a container on the source, running or frozen (`podferry.workload.source_container`)."""

from __future__ import annotations

from typing import Any, Protocol

import anyio
import pytest

from podferry.engine.ports import DirtySet, OriginalGone
from podferry.errors import PodferryError

from . import Contract

PATIENCE = 60.0


class SourceContainerCase(Protocol):
    """A container that runs, writes memory and prints."""

    container: Any

    async def works(self) -> None:
        """Return once it has computed and printed more. Fails where it never does."""
        ...

    async def stands_still(self) -> None:
        """Fail if it computes."""
        ...

    async def take_back(self) -> None:
        """What an agent does with all that the ledger holds. Fails where something is left."""
        ...

    async def end(self) -> None:
        """Its first process ends, although nobody of ours asked for it."""
        ...

    def spoil_the_dump(self) -> None:
        """The next dump fails."""
        ...

    def residue(self) -> list[str]:
        """What a migration holds of it or for it."""
        ...

    def printed(self) -> bytes:
        """All that it has printed."""
        ...

    def found_by_another_agent(self) -> Any:
        """The frozen container as a restarted agent sees it: by the journal alone."""
        ...


class SourceContainerContract(Contract):
    """The fixture `case` is a `SourceContainerCase`."""

    async def goes_on(self, case: SourceContainerCase) -> None:
        await case.take_back()
        assert case.residue() == []
        assert await case.container.runs()
        await case.works()

    # Memory.

    async def test_the_first_scan_finds_all_and_the_next_what_changed(self, case: SourceContainerCase) -> None:
        first: DirtySet = await case.container.scan_dirty()
        assert first.bytes > 0
        await case.works()
        second: DirtySet = await case.container.scan_dirty()
        assert 0 < second.bytes < first.bytes

    async def test_nothing_is_left_for_later_that_nobody_left(self, case: SourceContainerCase) -> None:
        with pytest.raises(PodferryError):
            case.container.left()

    async def test_what_is_left_for_later_is_what_was_found(self, case: SourceContainerCase) -> None:
        await case.container.freeze()
        found = await case.container.final_scan()
        list(case.container.memory.leave(found))
        assert sum(runs.size for runs in case.container.left().runs.values()) == found.bytes
        await self.goes_on(case)

    async def test_what_was_sent_and_is_left_for_later_is_taken_from_the_target(
        self, case: SourceContainerCase
    ) -> None:
        first = await case.container.scan_dirty()
        list(case.container.memory.read(first, 1))
        assert sum(one.pages for one in case.container.memory.totals()) > 0
        await case.container.freeze()
        found = first | await case.container.final_scan()
        assert list(case.container.memory.leave(found))
        assert sum(one.pages for one in case.container.memory.totals()) == 0
        await self.goes_on(case)

    # Output.

    async def test_what_it_prints_is_told_once_and_in_order(self, case: SourceContainerCase) -> None:
        told = b""
        for last in (False, False, True):
            await case.works()
            if last:
                await case.container.freeze()
            async for _, offset, data in case.container.logs(last=last):
                assert offset == len(told)
                told += data
        assert told == case.printed()
        await self.goes_on(case)

    # The freeze.

    async def test_it_stands_still_and_goes_on(self, case: SourceContainerCase) -> None:
        assert case.container.executing()
        await case.container.freeze()
        assert not case.container.executing()
        assert await case.container.runs()
        await case.stands_still()
        await self.goes_on(case)
        assert case.container.executing()

    async def test_a_second_freeze_and_a_second_thaw_change_nothing(self, case: SourceContainerCase) -> None:
        await case.container.freeze()
        await case.container.freeze()
        await case.stands_still()
        await self.goes_on(case)
        await self.goes_on(case)

    async def test_the_way_back_from_before_the_freeze(self, case: SourceContainerCase) -> None:
        await case.container.stand_by()
        assert case.residue()
        await case.works()
        await self.goes_on(case)

    async def test_the_door_is_shut_twice_and_opened_once(self, case: SourceContainerCase) -> None:
        await case.container.lock_exec()
        await case.container.lock_exec()
        assert case.residue()
        await self.goes_on(case)

    async def test_a_slowed_job_gets_its_time_back_at_the_freeze(self, case: SourceContainerCase) -> None:
        await case.container.scan_dirty()
        await case.works()
        await case.container.scan_dirty()
        await case.container.throttle(0.5)
        await case.container.throttle(0.3)
        assert case.residue()
        await case.container.freeze()
        assert "quota" not in case.residue()
        await self.goes_on(case)

    async def test_a_slowed_job_gets_its_time_back_on_the_way_back(self, case: SourceContainerCase) -> None:
        await case.container.scan_dirty()
        await case.works()
        await case.container.scan_dirty()
        await case.container.throttle(0.5)
        await self.goes_on(case)

    # The dump.

    @pytest.mark.parametrize("prepared", [False, True])
    async def test_a_dump_holds_it_and_is_taken_back(self, case: SourceContainerCase, prepared: bool) -> None:
        if prepared:
            await case.container.stand_by()
        await case.container.freeze()
        images = await case.container.dump()
        assert any(name.startswith("pagemap") for _, name in images)
        await case.stands_still()
        assert not case.container.executing()
        await self.goes_on(case)

    async def test_it_may_be_dumped_again(self, case: SourceContainerCase) -> None:
        for _ in range(2):
            await case.container.freeze()
            assert await case.container.dump()
            await self.goes_on(case)

    async def test_after_a_failed_dump_it_goes_on(self, case: SourceContainerCase) -> None:
        await case.container.freeze()
        case.spoil_the_dump()
        with pytest.raises((PodferryError, OSError)):
            await case.container.dump()
        await case.stands_still()
        await self.goes_on(case)

    # The end.

    async def test_it_is_killed_once_it_is_held(self, case: SourceContainerCase) -> None:
        await case.container.freeze()
        await case.container.dump()
        await case.container.kill()
        await has_ended(case.container)
        assert not case.container.executing()
        await case.container.kill()
        await case.take_back()
        assert case.residue() == []
        with anyio.fail_after(PATIENCE):
            assert await case.container.ended()

    async def test_a_restarted_agent_finds_it_and_kills_it(self, case: SourceContainerCase) -> None:
        await case.container.freeze()
        found = await case.container.final_scan()
        await case.container.dump()
        frozen = case.found_by_another_agent()
        assert await frozen.runs()
        assert not frozen.executing()
        assert sum(runs.size for runs in frozen.left().runs.values()) >= found.bytes
        await frozen.kill()
        await has_ended(frozen)
        assert not frozen.executing()
        with pytest.raises(OriginalGone):
            frozen.left()

    async def test_its_own_end_is_told(self, case: SourceContainerCase) -> None:
        with anyio.move_on_after(0.1) as waiting:
            await case.container.ended()
        assert waiting.cancelled_caught
        await case.end()
        with anyio.fail_after(PATIENCE):
            assert "exit status" in await case.container.ended()
        await has_ended(case.container)
        assert not case.container.executing()

    async def test_what_has_ended_by_itself_is_taken_back(self, case: SourceContainerCase) -> None:
        """The end comes between any two steps: nothing of the way back may need the job."""
        await case.container.scan_dirty()
        await case.container.stand_by()
        await case.container.lock_exec()
        await case.end()
        await case.take_back()
        assert case.residue() == []

    async def test_what_has_ended_cannot_be_dumped(self, case: SourceContainerCase) -> None:
        await case.end()
        with pytest.raises(PodferryError):
            await case.container.freeze()
            await case.container.dump()
        await case.take_back()
        assert case.residue() == []

    async def test_it_is_closed_twice_and_taken_back_after_that(self, case: SourceContainerCase) -> None:
        await case.container.scan_dirty()
        await case.container.freeze()
        await case.container.dump()
        await case.container.close()
        await case.container.close()
        await self.goes_on(case)


async def has_ended(container: Any) -> None:
    """Wait until it does not run: who keeps account of containers hears of a killed one a moment later."""
    with anyio.fail_after(PATIENCE):
        while await container.runs():
            await anyio.sleep(0.01)

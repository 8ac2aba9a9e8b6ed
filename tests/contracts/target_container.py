"""What a workload asks of a container on the target (`podferry.workload.target_container`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import anyio
import pytest
import xxhash

from podferry.engine.ports import LOG, PageChannel, RemotePages
from podferry.errors import PodferryError, Refused
from podferry.wire.frames import PAGE, Drop, Pages
from podferry.wire.messages import FileSum, StateEnd
from podferry.workload.numbers import container_of_address_space, directory_of

from . import Contract

MAKE_PATIENCE, PATIENCE = 60.0, 100.0


@dataclass(frozen=True)
class State:
    """All of a container that is frozen and held, as it travels, and what it amounts to."""

    memory: tuple[Pages | Drop, ...]
    records: tuple[bytes, ...]
    log: bytes
    images: dict[tuple[int, str], bytes]
    end: StateEnd

    @classmethod
    async def of(cls, source: Any, *, postcopy: bool = False) -> State:
        """Freeze and dump a container of the contract in `source_container.py`, and read it. In post-copy its memory stays."""
        first = await source.scan_dirty()
        await source.freeze()
        found = first | await source.final_scan()
        memory = [] if postcopy else [_kept(frame) for frame in source.memory.read(found, 1)]
        if postcopy:
            list(source.memory.leave(found))
        dumped = await source.dump()
        records = [record async for record in source.tree.changes(last=True)]
        log = b"".join([data async for _, _, data in source.logs(last=True)])
        images = {name: data.read_bytes() if isinstance(data, Path) else data for name, data in dumped.items()}
        files = [FileSum(at, name, len(data), xxhash.xxh3_128_hexdigest(data)) for (at, name), data in images.items()]
        files.append(FileSum(directory_of(0, LOG), "log", len(log), ""))
        address_spaces = () if postcopy else source.memory.totals()
        end = StateEnd("contract", tuple(files), address_spaces, (source.tree.total(0),))
        return cls(tuple(memory), tuple(records), log, images, end)

    def arrive(self, container: Any) -> None:
        """Hand it to the container on the target, as the engine does."""
        for frame in self.memory:
            pid = container_of_address_space(frame.address_space)[1]
            if isinstance(frame, Pages):
                for address, data in frame.pieces():
                    container.pages(frame.round, pid, address, data)
            else:
                for start, end in frame.runs:
                    container.drop(pid, start, end)
        for record in self.records:
            container.tree(memoryview(record))
        if self.log:
            container.log(0, memoryview(self.log))
        for (_, name), data in self.images.items():
            container.image(name, 0, memoryview(data), last=True)


def _kept(frame: Pages | Drop) -> Pages | Drop:
    """A frame whose bytes stay when the next one is read."""
    return replace(frame, payload=bytes(frame.payload)) if isinstance(frame, Pages) else frame


class TargetContainerCase(Protocol):
    """A container that is to run here, and the one, of the other contract, that it comes from."""

    source: Any
    container: Any
    journal: Any
    """The container's share of it."""

    async def take_back(self) -> None:
        """What an agent does with all that the ledger holds. Fails where something is left."""
        ...

    def residue(self) -> list[str]:
        """What there is of it here."""
        ...

    async def works(self) -> None:
        """Return once it has computed here."""
        ...

    def take_the_name(self) -> Callable[[], bool]:
        """Another container has its name; says whether it is there still."""
        ...

    def kill_wrapper(self) -> None:
        """podferry-runc, which waits for the state, is killed."""
        ...

    def kill_feeder(self) -> None:
        """The lazy-pages daemon is killed."""
        ...

    def found_by_another_agent(self) -> Any:
        """The container as a restarted agent has it: by the journal."""
        ...

    def channel(self) -> PageChannel: ...

    def remote_pages(self) -> RemotePages: ...


class TargetContainerContract(Contract):
    """The fixture `case` is a `TargetContainerCase`."""

    async def make_ready(self, case: TargetContainerCase, *, postcopy: bool = False) -> None:
        await case.container.prepare()
        case.journal.note(postcopy=postcopy)
        await case.container.start_lazypages(postcopy=postcopy)
        await case.container.make(MAKE_PATIENCE)

    async def release(self, case: TargetContainerCase) -> float:
        with anyio.fail_after(PATIENCE):
            return float(await case.container.release())

    async def goes(self, case: TargetContainerCase) -> None:
        """All of it is taken back, however often. Processes that were killed may take a moment."""
        for _ in range(2):
            await case.container.close()
            await case.take_back()
            with anyio.move_on_after(PATIENCE):
                while case.residue():
                    await anyio.sleep(0.02)
            assert case.residue() == []

    # The way back from every step.

    async def test_nothing_of_what_is_prepared_is_left(self, case: TargetContainerCase) -> None:
        await case.container.prepare()
        assert case.residue()
        await self.goes(case)

    async def test_nothing_of_what_waits_is_left(self, case: TargetContainerCase) -> None:
        await self.make_ready(case)
        await self.goes(case)

    async def test_nothing_is_left_where_making_it_is_broken_off(self, case: TargetContainerCase) -> None:
        await case.container.prepare()
        case.journal.note(postcopy=False)
        await case.container.start_lazypages(postcopy=False)
        with anyio.move_on_after(0.02):
            await case.container.make(MAKE_PATIENCE)
        await self.goes(case)

    async def test_nothing_is_left_of_what_arrived(self, case: TargetContainerCase) -> None:
        state = await State.of(case.source)
        await self.make_ready(case)
        state.arrive(case.container)
        await case.container.verify(state.end)
        await self.goes(case)

    async def test_nothing_is_left_of_what_runs_but_was_not_kept(self, case: TargetContainerCase) -> None:
        state = await State.of(case.source)
        await self.make_ready(case)
        state.arrive(case.container)
        await case.container.verify(state.end)
        await self.release(case)
        await case.works()
        await self.goes(case)

    async def test_a_name_that_is_taken_is_refused_and_stays(self, case: TargetContainerCase) -> None:
        is_there = case.take_the_name()
        with pytest.raises(Refused):
            await case.container.prepare()
        await case.container.close()
        await case.take_back()
        assert is_there()

    # Waiting for the state.

    async def test_it_is_made_once(self, case: TargetContainerCase) -> None:
        await self.make_ready(case)
        before = case.residue()
        await case.container.make(MAKE_PATIENCE)
        assert case.residue() == before
        await self.goes(case)

    async def test_live_that_turns_to_postcopy_has_another_page_daemon(self, case: TargetContainerCase) -> None:
        """The target is ready, and one task waits for its end: all of that holds for the second time, too."""
        state = await State.of(case.source, postcopy=True)
        await self.make_ready(case)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(case.container.lost)
            await anyio.sleep(0.05)
            case.journal.note(postcopy=True)
            await case.container.start_lazypages(postcopy=True)
            await case.container.make(MAKE_PATIENCE)
            state.arrive(case.container)
            await case.container.verify(state.end)
            tasks.cancel_scope.cancel()
        await self.run_on_remote_pages(case)

    async def test_that_nobody_waits_any_more_is_told(self, case: TargetContainerCase) -> None:
        await self.make_ready(case)
        with anyio.move_on_after(0.1) as waiting:
            await case.container.lost()
        assert waiting.cancelled_caught, "it waits, and a wait that was broken off may be begun again"
        case.kill_wrapper()
        with anyio.fail_after(PATIENCE):
            assert isinstance(await case.container.lost(), PodferryError)
        await self.goes(case)

    async def test_one_task_waits_for_its_end(self, case: TargetContainerCase) -> None:
        """A second one would wait for one descriptor with the first: it hears so at once."""
        await self.make_ready(case)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(case.container.lost)
            await anyio.sleep(0.05)
            with anyio.fail_after(PATIENCE), pytest.raises(Exception, match=r"\S"):
                await case.container.lost()
            tasks.cancel_scope.cancel()
        await self.goes(case)

    # What arrives.

    async def test_what_comes_before_it_is_prepared_is_an_error(self, case: TargetContainerCase) -> None:
        with pytest.raises(PodferryError):
            case.container.pages(1, 1, 0x7000_0000_0000, memoryview(bytes(PAGE)))
        with pytest.raises(PodferryError):
            case.container.tree(memoryview(b"record"))
        with pytest.raises(PodferryError):
            case.container.log(0, memoryview(b"line\n"))

    async def test_what_comes_after_the_end_is_an_error(self, case: TargetContainerCase) -> None:
        await case.container.prepare()
        await case.container.close()
        with pytest.raises(PodferryError):
            case.container.pages(1, 1, 0x7000_0000_0000, memoryview(bytes(PAGE)))
        await case.take_back()

    async def test_a_log_with_a_gap_is_an_error(self, case: TargetContainerCase) -> None:
        await case.container.prepare()
        case.container.log(0, memoryview(b"one\n"))
        for offset in (0, 5):
            with pytest.raises(PodferryError):
                case.container.log(offset, memoryview(b"two\n"))
        await self.goes(case)

    @pytest.mark.parametrize("lacking", ["an image", "half an image", "a page", "a record", "output"])
    async def test_what_did_not_arrive_whole_is_not_taken(self, case: TargetContainerCase, lacking: str) -> None:
        state = await State.of(case.source)
        name = next(name for name, data in state.images.items() if len(data) > 1)
        match lacking:
            case "an image":
                part = replace(state, images={one: data for one, data in state.images.items() if one != name})
            case "half an image":
                part = replace(state, images={**state.images, name: state.images[name][:-1]})
            case "a page":
                *_, last = (number for number, one in enumerate(state.memory) if isinstance(one, Pages))
                part = replace(state, memory=(*state.memory[:last], *state.memory[last + 1 :]))
            case "a record":
                part = replace(state, records=state.records[:-1])
            case _:
                part = replace(state, log=state.log[:-1])
        await self.make_ready(case)
        with pytest.raises(PodferryError):
            part.arrive(case.container)
            await case.container.verify(state.end)
        await self.goes(case)

    # The resume.

    async def test_it_runs_and_stays_once_it_is_entrusted(self, case: TargetContainerCase) -> None:
        state = await State.of(case.source)
        await self.make_ready(case)
        state.arrive(case.container)
        await case.container.verify(state.end)
        await self.release(case)
        assert await case.container.maker.is_here()
        assert not await case.container.maker.has_ended()
        with anyio.fail_after(PATIENCE):
            figures = await case.container.filled()
            assert await case.container.filled() == figures, "it may be asked again"
        case.container.entrust()
        await case.container.close()
        await case.take_back()
        await case.works()

    async def test_what_lost_its_wrapper_does_not_run_and_never_will(self, case: TargetContainerCase) -> None:
        state = await State.of(case.source)
        await self.make_ready(case)
        state.arrive(case.container)
        await case.container.verify(state.end)
        case.kill_wrapper()
        with pytest.raises(PodferryError):
            await self.release(case)
        await self.goes(case)
        assert not await case.container.maker.is_here()

    async def test_a_restarted_agent_finds_what_runs(self, case: TargetContainerCase) -> None:
        state = await State.of(case.source)
        await self.make_ready(case)
        state.arrive(case.container)
        await case.container.verify(state.end)
        since = await self.release(case)
        await case.container.close()
        again = case.found_by_another_agent()
        with anyio.fail_after(PATIENCE):
            assert await again.resumed() == pytest.approx(since, abs=1.0)
            assert await again.filled()
        assert await again.maker.is_here()
        again.entrust()
        await again.close()
        await case.works()

    async def test_a_restarted_agent_is_told_of_what_does_not_run(self, case: TargetContainerCase) -> None:
        await self.make_ready(case)
        await case.container.close()
        case.kill_feeder()
        again = case.found_by_another_agent()
        with pytest.raises(PodferryError), anyio.fail_after(PATIENCE):
            await again.resumed()
        await again.close()
        await self.goes(case)

    # Post-copy.

    async def run_on_remote_pages(self, case: TargetContainerCase) -> None:
        channel, remote = case.channel(), case.remote_pages()

        def put(frame: Pages | Drop) -> None:
            pid = container_of_address_space(frame.address_space)[1]
            if isinstance(frame, Pages):
                for address, data in frame.pieces():
                    case.container.pages(0, pid, address, data)
                    channel.arrived(frame.address_space, address, address + len(data))
            else:
                for start, end in frame.runs:
                    channel.zero(frame.address_space, start, end)

        async def serve() -> None:
            with suppress(PodferryError):
                while (want := await channel.next_request()) is not None:
                    for frame in remote.answer(want.address_space, want.start):
                        put(frame)
                    await channel.flush()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            await self.release(case)
            for frame in remote.rest():
                put(frame)
                await channel.flush()
            case.container.remote_pages_complete(channel)
            await channel.flush()
            with anyio.fail_after(PATIENCE):
                assert await case.container.filled()
            tasks.cancel_scope.cancel()
        channel.close()
        remote.close()
        await case.works()
        await self.goes(case)

    async def test_it_runs_on_pages_that_come_afterwards(self, case: TargetContainerCase) -> None:
        state = await State.of(case.source, postcopy=True)
        await self.make_ready(case, postcopy=True)
        state.arrive(case.container)
        await case.container.verify(state.end)
        await self.run_on_remote_pages(case)

    async def test_a_page_daemon_that_dies_before_the_resume_is_told(self, case: TargetContainerCase) -> None:
        state = await State.of(case.source, postcopy=True)
        await self.make_ready(case, postcopy=True)
        state.arrive(case.container)
        await case.container.verify(state.end)
        case.kill_feeder()
        with pytest.raises(PodferryError):
            await self.release(case)
        await self.goes(case)

"""`podferry.engine.ports.PageChannel`: the agent's end of the lazy-pages daemons' sockets, in post-copy on the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import anyio
import pytest

from podferry.engine.ports import PageChannel
from podferry.errors import Failed, PeerMisbehaved
from podferry.wire.frames import PAGE
from podferry.workload.numbers import address_space_of

from . import Contract

BASE, PID = 0x7000_0000_0000, 7


class PageChannelCase(Protocol):
    """Two lazy-pages daemons, of the containers 0 and 1, which the test plays."""

    connect: Callable[[], PageChannel]
    """Raises `Failed` where one of them is not there."""

    def want(self, container: int, pid: int, at: int) -> None:
        """A thread of the container waits for a page."""
        ...

    def end(self, container: int) -> None:
        """The lazy-pages daemon ends."""
        ...

    def heard(self, container: int) -> list[tuple[str, int, int, int]]:
        """What it was told: (arrived or zero, pid, start, end)."""
        ...


class PageChannelContract(Contract):
    """The fixture `case` is a `PageChannelCase`."""

    async def test_a_want_is_told_once_and_whose_it_is(self, case: PageChannelCase) -> None:
        channel = case.connect()
        for container in (0, 1):
            case.want(container, PID, BASE)
            want = await channel.next_request()
            assert want is not None
            assert (want.address_space, want.start, want.end) == (address_space_of(container, PID), BASE, BASE + PAGE)
        with anyio.move_on_after(0.05) as waiting:
            await channel.next_request()
        assert waiting.cancelled_caught
        channel.close()

    async def test_a_wait_that_was_cancelled_loses_nothing(self, case: PageChannelCase) -> None:
        channel = case.connect()
        with anyio.move_on_after(0.01):
            await channel.next_request()
        case.want(1, PID, BASE)
        want = await channel.next_request()
        assert want is not None and want.address_space == address_space_of(1, PID)
        channel.close()

    async def test_nothing_is_wanted_once_every_daemon_has_ended(self, case: PageChannelCase) -> None:
        channel = case.connect()
        case.end(0)
        case.want(1, PID, BASE)
        assert await channel.next_request() is not None
        case.end(1)
        assert await channel.next_request() is None
        channel.close()

    async def test_who_waits_hears_of_the_last_daemons_end(self, case: PageChannelCase) -> None:
        channel = case.connect()
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                assert await channel.next_request() is None

            tasks.start_soon(wait)
            await anyio.sleep(0.01)
            case.end(1)
            case.end(0)
        channel.close()

    async def test_each_daemon_hears_of_its_own_container_in_order(self, case: PageChannelCase) -> None:
        channel = case.connect()
        channel.arrived(address_space_of(0, PID), BASE, BASE + 2 * PAGE)
        channel.zero(address_space_of(1, PID), BASE, BASE + PAGE)
        channel.zero(address_space_of(0, PID), BASE + 2 * PAGE, BASE + 3 * PAGE)
        await channel.flush()
        assert case.heard(0) == [
            ("arrived", PID, BASE, BASE + 2 * PAGE),
            ("zero", PID, BASE + 2 * PAGE, BASE + 3 * PAGE),
        ]
        assert case.heard(1) == [("zero", PID, BASE, BASE + PAGE)]
        channel.close()

    async def test_a_container_that_is_not_there_is_the_peers_fault(self, case: PageChannelCase) -> None:
        channel = case.connect()
        with pytest.raises(PeerMisbehaved, match="container 2"):
            channel.arrived(address_space_of(2, PID), BASE, BASE + PAGE)
        with pytest.raises(PeerMisbehaved, match="container 2"):
            channel.zero(address_space_of(2, PID), BASE, BASE + PAGE)
        channel.close()

    async def test_a_daemon_that_has_ended_need_hear_nothing(self, case: PageChannelCase) -> None:
        channel = case.connect()
        case.end(0)
        channel.arrived(address_space_of(0, PID), BASE, BASE + PAGE)
        channel.arrived(address_space_of(1, PID), BASE, BASE + PAGE)
        await channel.flush()
        assert case.heard(1) == [("arrived", PID, BASE, BASE + PAGE)]
        channel.close()

    async def test_a_daemon_that_is_not_there_is_told(self, case: PageChannelCase) -> None:
        case.end(1)
        with pytest.raises(Failed, match="page"):
            case.connect()

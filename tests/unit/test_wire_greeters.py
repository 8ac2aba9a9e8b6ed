"""Who is heard while many knock: slots by address, and real connections that say nothing."""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.errors import PeerLost, PodferryError
from podferry.wire import transport
from podferry.wire.channel import Channel, Timing
from podferry.wire.greeters import Greeters, group_of, plain
from podferry.wire.pki import Authority
from podferry.wire.tls import Credentials
from podferry.wire.transport import dial, listen, parse_address, serve

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

KNOWN = "10.0.0.1"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def greeters(most: int = 4, of_one: int = 2) -> Greeters:
    return Greeters(lambda host: host == KNOWN, most, of_one)


def test_one_address_has_its_share_and_the_newest_of_it_counts() -> None:
    some = greeters()
    first, second, third = (some.enter("192.0.2.1") for _ in range(3))
    assert first is not None
    assert first.lost
    assert second is not None
    assert third is not None
    assert not (second.lost or third.lost)
    assert len(some) == 2


def test_where_all_slots_are_taken_a_known_peer_takes_one_of_a_strangers() -> None:
    some = greeters()
    strangers = [some.enter(f"192.0.2.{n}") for n in range(4)]
    assert some.enter(KNOWN) is not None
    assert [one.lost for one in strangers if one] == [True, False, False, False]


def test_a_stranger_never_takes_a_known_peers_slot() -> None:
    some = Greeters(lambda host: host.startswith("10."), 2, 2)
    known = [some.enter(f"10.0.0.{n}") for n in range(2)]
    assert some.enter("192.0.2.1") is None
    assert not any(one.lost for one in known if one)


def test_among_strangers_whoever_holds_most_gives_up_one() -> None:
    some = greeters(most=3)
    single = some.enter("192.0.2.1")
    many = [some.enter("192.0.2.2") for _ in range(2)]
    assert some.enter("192.0.2.3") is not None
    assert single is not None
    assert not single.lost
    assert [one.lost for one in many if one] == [True, False]


def test_a_host_of_ipv6_has_its_whole_network_to_itself() -> None:
    assert group_of("2001:db8::1") == group_of("2001:db8::ffff:2") != group_of("2001:db8:0:1::1")
    assert plain("::ffff:10.0.0.1") == KNOWN
    assert group_of("::ffff:10.0.0.1") == group_of(KNOWN)
    assert group_of("fe80::1%eth0") == group_of("fe80::2")


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=200))
def test_bounds_hold_whoever_comes_and_goes(steps: list[tuple[int, bool]]) -> None:
    some = greeters()
    held = []
    for number, goes in steps:
        if goes and held:
            some.leave(held.pop(0))
        elif (slot := some.enter(KNOWN if number == 0 else f"192.0.2.{number}")) is not None:
            held.append(slot)
        held = [one for one in held if not one.lost]
        assert len(some) == len(held) <= 4
        assert max(Counter(one.group for one in held).values(), default=0) <= 2


async def test_a_hundred_silent_connections_keep_no_peer_out(tmp_path: Path) -> None:
    """With deadlines that never come: what lets the peer in is the slots, not the clock."""
    authority = Authority.create(tmp_path / "ca")
    for name in ("a", "b"):
        authority.issue(f"node-{name}", ["127.0.0.1"], tmp_path / name)
    heard: list[str] = []
    reports: list[PodferryError] = []

    async def handler(channel: Channel) -> None:
        heard.append(channel.peer)

    listener = listen("127.0.0.1:0")
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    endless = Timing(opening=1e6, handshake=1e6)
    with ExitStack() as stack:
        for _ in range(100):
            silent = stack.enter_context(socket.socket())
            silent.setblocking(False)
            silent.connect_ex(parse_address(address))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                lambda: serve(listener, Credentials.load(tmp_path / "b"), handler, reports.append, timing=endless)
            )
            with anyio.fail_after(30):
                async with dial("node-b", address, Credentials.load(tmp_path / "a")):
                    while not heard:
                        await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    assert heard == ["node-a"]


async def test_who_says_nothing_is_dropped_at_the_opening(tmp_path: Path) -> None:
    Authority.create(tmp_path / "ca").issue("node-b", ["127.0.0.1"], tmp_path / "b")
    reports: list[PodferryError] = []
    listener = listen("127.0.0.1:0")
    with socket.create_connection(listener.getsockname()[:2]) as silent:
        silent.setblocking(False)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                lambda: serve(
                    listener,
                    Credentials.load(tmp_path / "b"),
                    lambda _: anyio.sleep(0),
                    reports.append,
                    timing=Timing(opening=0.05, handshake=1e6),
                )
            )
            with anyio.fail_after(30):
                await anyio.wait_readable(silent)
            tasks.cancel_scope.cancel()
        assert silent.recv(1) == b""
    assert "sent nothing" in str(reports[0])


async def test_one_node_holds_no_more_conversations_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "OF_ONE_PEER", 2)
    authority = Authority.create(tmp_path / "ca")
    for name in ("a", "b"):
        authority.issue(f"node-{name}", ["127.0.0.1"], tmp_path / name)
    reports: list[PodferryError] = []
    listener = listen("127.0.0.1:0")
    address = f"127.0.0.1:{listener.getsockname()[1]}"

    async def handler(channel: Channel) -> None:
        await channel.receive()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: serve(listener, Credentials.load(tmp_path / "b"), handler, reports.append))
        mine = Credentials.load(tmp_path / "a")
        with anyio.fail_after(30):
            async with dial("node-b", address, mine), dial("node-b", address, mine):
                with pytest.raises(PeerLost, match="holds 2 connections"):
                    async with dial("node-b", address, mine) as third:
                        await third.receive()
            async with dial("node-b", address, mine):
                pass
        tasks.cancel_scope.cancel()

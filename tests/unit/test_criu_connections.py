"""Which connections of a workload live on: images of sockets, as CRIU writes them, in and out."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from podferry.core.connections import CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, SYN_SENT, End
from podferry.criu.connections import close, settle
from podferry.criu.dump_images import FILES_MAGIC, encode_entries, entries_of
from podferry.errors import PeerMisbehaved
from podferry.node.network_namespace import DEFAULT, Network
from podferry.protos.pagemap_pb2 import FileEntry, InetSkEntry, TimerfdEntry

pytestmark = pytest.mark.unit

ESTABLISHED, FIN_WAIT2 = 1, 5
POD, OTHER = "10.0.0.5", "10.0.0.9"


def words(address: str) -> list[int]:
    packed = ipaddress.ip_address(address).packed
    return [one[0] for one in struct.iter_unpack("=I", packed)]


def tcp(
    local: tuple[str, int], remote: tuple[str, int] | None = None, state: int = ESTABLISHED, ino: int = 7
) -> InetSkEntry:
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    remote = remote or ("::" if ":" in local[0] else "0.0.0.0", 0)
    return InetSkEntry(
        ino=ino,
        family=family,
        type=socket.SOCK_STREAM,
        proto=socket.IPPROTO_TCP,
        state=state,
        src_port=local[1],
        dst_port=remote[1],
        src_addr=words(local[0]),
        dst_addr=words(remote[0]),
    )


def udp(local: tuple[str, int], remote: tuple[str, int] | None = None) -> InetSkEntry:
    one = tcp(local, remote, state=ESTABLISHED if remote else CLOSE)
    one.type, one.proto = socket.SOCK_DGRAM, socket.IPPROTO_UDP
    return one


def images(
    *containers: list[InetSkEntry], more: Mapping[tuple[int, str], bytes] | None = None
) -> dict[tuple[int, str], bytes]:
    found = dict(more or {})
    for number, sockets in enumerate(containers):
        entries = [FileEntry(type=4, id=id, isk=one) for id, one in enumerate(sockets, 1)]
        found[2 * number, "files.img"] = encode_entries(FILES_MAGIC, entries)
        for one in sockets:
            if one.dst_port and one.proto == socket.IPPROTO_TCP:
                found[2 * number, f"tcp-stream-{one.ino:x}.img"] = b"queues"
    return found


def sockets(images: Mapping[tuple[int, str], bytes], directory: int = 0) -> list[InetSkEntry]:
    return [one.isk for one in entries_of(images[directory, "files.img"], "files.img", FILES_MAGIC, FileEntry)]


def addresses(images: Mapping[tuple[int, str], bytes], directory: int = 0) -> tuple[str, ...]:
    described = images.get((directory, "network.json"))
    return Network.decode(described).addresses if described else ()


def is_closed(one: InetSkEntry) -> bool:
    return (one.state, one.src_port, one.dst_port, one.shutdown, sum(one.src_addr), sum(one.dst_addr)) == (
        (CLOSE, 0, 0, 3, 0, 0)
    )


def test_a_connection_that_is_kept_lives_on_and_the_target_lends_its_address() -> None:
    kept = (End(ipaddress.ip_address(POD), 40000), End(ipaddress.ip_address(OTHER), 80))
    found = settle(images([tcp((POD, 40000), (OTHER, 80), ino=0xAB), tcp((POD, 40001), (OTHER, 80))]), {kept})
    assert found.closed == (f"{POD}:40001 -> {OTHER}:80",)
    one, other = sockets(found.images)
    assert (one.src_port, is_closed(other)) == (40000, True)
    assert addresses(found.images) == (f"{POD}/32",)


def test_what_has_ended_at_its_other_end_is_closed_where_it_is_restored(tmp_path: Path) -> None:
    kept = (End(ipaddress.ip_address(POD), 40000), End(ipaddress.ip_address(OTHER), 80))
    found = settle(images([tcp((POD, 40000), (OTHER, 80), ino=0xAB)]), {kept}).images
    for (_, name), data in found.items():
        (tmp_path / name).write_bytes(bytes(data))
    (tmp_path / "tcp-stream-ab.img").write_bytes(b"queues")
    assert close(tmp_path, ()) == ()
    assert (tmp_path / "tcp-stream-ab.img").exists()
    assert close(tmp_path, {kept}) == (f"{POD}:40000 -> {OTHER}:80",)
    assert not (tmp_path / "tcp-stream-ab.img").exists()
    (one,) = sockets({(0, "files.img"): (tmp_path / "files.img").read_bytes()})
    assert is_closed(one)
    assert close(tmp_path / "none", {kept}) == ()


def test_a_pair_within_a_container_is_left_as_it_is() -> None:
    given = images(
        [
            tcp(("127.0.0.1", 1), ("127.0.0.1", 2)),
            tcp(("127.0.0.1", 2), ("127.0.0.1", 1)),
            tcp(("127.0.0.1", 2), state=LISTEN),
        ]
    )
    found = settle(given)
    assert dict(found.images) == given
    assert found.closed == ()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", POD, "fd00::5"])
def test_a_pair_of_two_containers_is_one_of_the_workload(address: str) -> None:
    found = settle(images([tcp((address, 1), (address, 2))], [tcp((address, 2), (address, 1))]))
    assert [sockets(found.images, at)[0].state for at in (0, 2)] == [ESTABLISHED] * 2
    assert found.closed == ()


def test_a_pair_by_the_pods_own_address_has_that_address_on_the_target() -> None:
    found = settle(images([tcp((POD, 1), (POD, 2))], [tcp((POD, 2), (POD, 1))]))
    assert addresses(found.images, 0) == addresses(found.images, 2) == (f"{POD}/32",)
    assert sockets(found.images)[0].src_addr == words(POD)


def test_a_client_of_ipv4_and_a_server_of_ipv6_are_a_pair() -> None:
    found = settle(
        images([tcp(("127.0.0.1", 1), ("127.0.0.1", 2)), tcp(("::ffff:127.0.0.1", 2), ("::ffff:127.0.0.1", 1), ino=8)])
    )
    assert found.closed == ()


def test_a_connection_to_the_outside_is_closed_as_if_the_other_end_had() -> None:
    found = settle(images([tcp((POD, 40000), (OTHER, 80), ino=0xAB), tcp(("127.0.0.1", 1), ("127.0.0.1", 2))]))
    assert all(map(is_closed, sockets(found.images)))
    assert found.closed == (f"{POD}:40000 -> {OTHER}:80", "127.0.0.1:1 -> 127.0.0.1:2")
    assert (0, "tcp-stream-ab.img") not in found.images
    assert addresses(found.images) == ()


def test_what_is_not_connected_yet_begins_anew() -> None:
    (one,) = sockets(settle(images([tcp((POD, 40000), (OTHER, 80), state=SYN_SENT)])).images)
    assert (one.state, one.src_port, one.dst_port) == (CLOSE, 0, 0)
    assert not one.HasField("shutdown")


@pytest.mark.parametrize("state", [CLOSE_WAIT, LAST_ACK, CLOSE])
def test_what_the_other_end_said_before_it_closed_can_still_be_read(state: int) -> None:
    """The other end is gone: in CLOSE both have closed, and this one has still to read."""
    found = settle(images([tcp(("127.0.0.1", 1), ("127.0.0.1", 2), state), tcp((POD, 1), (OTHER, 2), state, ino=8)]))
    kept, closed = sockets(found.images)
    assert kept.state == state
    assert (kept.src_port, kept.dst_port) == (1, 2)
    assert is_closed(closed)


def test_who_listens_at_the_pods_address_can_be_reached_by_the_new_one() -> None:
    found = settle(images([tcp((POD, 80), state=LISTEN), udp((POD, 53)), tcp(("fd00::5", 81), state=LISTEN)]))
    assert all(sum(one.src_addr) == 0 for one in sockets(found.images))
    assert [one.v6only for one in sockets(found.images)] == [False, False, True]
    assert addresses(found.images) == (f"{POD}/32", "fd00::5/128")


def test_a_port_with_another_listener_is_not_taken_at_every_address() -> None:
    found = settle(images([tcp((POD, 80), state=LISTEN)], [tcp(("127.0.0.1", 80), state=LISTEN)]))
    assert sockets(found.images)[0].src_addr == words(POD)
    assert addresses(found.images) == (f"{POD}/32",)


def test_who_listens_at_every_address_or_at_loopback_needs_none() -> None:
    given = images(
        [tcp(("0.0.0.0", 80), state=LISTEN), tcp(("::", 81), state=LISTEN), tcp(("127.0.0.1", 82), state=LISTEN)]
    )
    assert dict(settle(given).images) == given


def test_datagrams_to_the_outside_go_out_from_the_new_address() -> None:
    (one,) = sockets(settle(images([udp((POD, 50000), (OTHER, 53))])).images)
    assert sum(one.src_addr) == 0
    assert (one.src_port, one.dst_port) == (50000, 53)
    found = settle(images([udp((POD, 50000), (POD, 53)), udp((POD, 53))]))
    assert sockets(found.images)[0].src_addr == words(POD)


def test_addresses_that_the_namespace_has_anyway_are_not_given_twice() -> None:
    described = Network(addresses=(f"{POD}/24",)).encode()
    pair = [tcp((POD, 1), (POD, 2)), tcp((POD, 2), (POD, 1))]
    found = settle(images(pair, more={(0, "network.json"): described}))
    assert addresses(found.images) == (f"{POD}/24",)


def test_everything_else_in_the_images_stays() -> None:
    timer = FileEntry(
        type=7, id=9, tfd=TimerfdEntry(clockid=1, ticks=0, settime_flags=0, vsec=1, vnsec=0, isec=1, insec=0)
    )
    entries = [timer, FileEntry(type=4, id=1, isk=tcp((POD, 1), (OTHER, 2)))]
    given = {(0, "files.img"): encode_entries(FILES_MAGIC, entries), (0, "core-1.img"): b"core"}
    found = settle(given).images
    assert entries_of(found[0, "files.img"], "", FILES_MAGIC, FileEntry)[0] == timer
    assert found[0, "core-1.img"] == b"core"


def test_fields_that_are_not_known_here_come_out_again() -> None:
    unknown = FileEntry.FromString(
        FileEntry(type=4, id=1, isk=tcp((POD, 1), (OTHER, 2))).SerializeToString() + b"\xfa\x06\x03abc"
    )
    found = settle({(0, "files.img"): encode_entries(FILES_MAGIC, [unknown])}).images
    assert b"\xfa\x06\x03abc" in found[0, "files.img"]


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(PeerMisbehaved):
        settle({(0, "files.img"): b"nonsense"})


def test_a_workload_without_sockets_is_not_touched() -> None:
    given = images([], more={(0, "network.json"): DEFAULT.encode()})
    assert settle(given).images is given

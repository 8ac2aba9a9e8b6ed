"""A connection whose ends get other addresses, one after the other, in network namespaces of the test's own."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from podferry.core.connections import TCP, End
from podferry.core.translation import Translation
from podferry.node import address_rewriting, netlink
from podferry.node.address_rewriting import establish
from podferry.node.netlock import Namespace
from podferry.node.netns import in_network_of

pytestmark = pytest.mark.node

OLD, NEW, PEER, PEER_NEW = 0, 1, 2, 3
ADDRESSES = [
    ("10.99.0.5", "10.99.0.6", "10.99.0.1", "10.99.0.2"),
    ("fd99::5", "fd99::6", "fd99::1", "fd99::2"),
]


class Pod:
    """A network namespace with one interface."""

    def __init__(self, pid: int, device: str) -> None:
        self.pid, self._device = pid, device
        self._ip("link", "set", "lo", "up")
        self._ip("link", "set", device, "up")

    def _ip(self, *words: str) -> None:
        subprocess.run(["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", *words], check=True)

    def has(self, address: str) -> None:
        prefix, more = ("/64", ["nodad"]) if ":" in address else ("/24", [])
        self._ip("addr", "add", address + prefix, "dev", self._device, *more)

    def moves(self, before: str, after: str) -> None:
        """What a move makes of it: another address, and the old one on loopback."""
        self._ip("addr", "del", before + ("/64" if ":" in before else "/24"), "dev", self._device)
        self.has(after)
        in_network_of(self.pid, lambda: netlink.add_address(ipaddress.ip_interface(before)))

    def rewrites(self, *translations: Translation) -> None:
        in_network_of(self.pid, lambda: establish(translations))


@pytest.fixture
def pods() -> Iterator[tuple[Pod, Pod]]:
    """Two, joined."""
    with ExitStack() as stack:
        pids = []
        for _ in range(2):
            process = stack.enter_context(subprocess.Popen(["unshare", "--net", "sleep", "infinity"]))
            stack.callback(process.kill)
            while Path(f"/proc/{process.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
                pass
            pids.append(process.pid)
        names = [f"t{pid}" for pid in pids]
        made = ["ip", "link", "add", names[0], "netns", str(pids[0]), "type", "veth", "peer", "name", names[1]]
        subprocess.run([*made, "netns", str(pids[1])], check=True)
        one, other = (Pod(pid, name) for pid, name in zip(pids, names, strict=True))
        yield one, other


@pytest.mark.parametrize("addresses", ADDRESSES)
def test_a_connection_goes_on_when_one_end_moves_and_then_the_other(
    pods: tuple[Pod, Pod], addresses: tuple[str, str, str, str]
) -> None:
    old, new, peer, peer_new = addresses
    job, other = pods
    job.has(old)
    other.has(peer)
    family = socket.AF_INET6 if ":" in old else socket.AF_INET
    with (
        in_network_of(other.pid, lambda: socket.create_server((peer, 0), family=family)) as server,
        in_network_of(job.pid, lambda: socket.create_connection(server.getsockname()[:2], 10)) as ours,
    ):
        theirs, _ = server.accept()
        threading.Thread(target=echo, args=(theirs,), daemon=True).start()
        here, there = (End(ipaddress.ip_address(one[0]), one[1]) for one in (ours.getsockname(), ours.getpeername()))
        talk(ours)
        job.moves(old, new)
        now = Translation(TCP, here, there, ipaddress.ip_address(new), ipaddress.ip_address(peer))
        others = [
            Translation(TCP, End(here.address, port), there, now.local_now, now.remote_now) for port in range(1, 1000)
        ]
        job.rewrites(now, *others)
        other.rewrites(now.other, *(one.other for one in others))
        talk(ours)
        other.moves(peer, peer_new)
        both = Translation(TCP, here, there, ipaddress.ip_address(new), ipaddress.ip_address(peer_new))
        job.rewrites(both)
        other.rewrites(both.other)
        talk(ours)
        for pod in pods:
            assert in_network_of(pod.pid, rewritten)
            pod.rewrites()
            assert not in_network_of(pod.pid, rewritten)


@pytest.mark.parametrize("addresses", ADDRESSES)
def test_a_silent_connection_neither_sends_nor_gets_until_it_may_again(
    pods: tuple[Pod, Pod], addresses: tuple[str, str, str, str]
) -> None:
    old, _, peer, _ = addresses
    job, other = pods
    job.has(old)
    other.has(peer)
    family = socket.AF_INET6 if ":" in old else socket.AF_INET
    namespace = Namespace.of({}, job.pid)
    with (
        in_network_of(other.pid, lambda: socket.create_server((peer, 0), family=family)) as server,
        in_network_of(job.pid, lambda: socket.create_connection(server.getsockname()[:2], 10)) as ours,
        server.accept()[0] as theirs,
        in_network_of(job.pid, lambda: socket.create_connection(server.getsockname()[:2], 10)) as another,
    ):
        threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
        here, there = (End(ipaddress.ip_address(one[0]), one[1]) for one in (ours.getsockname(), ours.getpeername()))
        for both_ways in (True, False):
            namespace.lock({(here, there)}, both_ways)
            ours.sendall(b"from the job")
            theirs.sendall(b"to the job")
            talk(another)
            assert not heard_by(ours)
            assert not both_ways or not heard_by(theirs)
            namespace.unlock()
            for one, said in ((theirs, b"from the job"), (ours, b"to the job")):
                one.settimeout(100)
                assert one.recv(100) == said, "TCP sends again what was dropped"


def heard_by(one: socket.socket) -> bytes:
    """What has come, without a wait."""
    one.setblocking(False)
    try:
        return one.recv(100, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
    finally:
        one.setblocking(True)


def rewritten() -> bool:
    """Whether anything is rewritten in the network namespace of this thread: whether the table is there."""
    for family in (socket.AF_INET, socket.AF_INET6):
        body = bytes([family, 0, 0, 0]) + netlink.attribute(1, address_rewriting.TABLE)
        if netlink.get(netlink.NETFILTER, 10 << 8 | 1, body) is not None:
            return True
    return False


def echo(one: socket.socket) -> None:
    with one:
        while said := one.recv(1 << 16):
            one.sendall(said)


def talk(one: socket.socket) -> None:
    for _ in range(20):
        said = os.urandom(40_000)
        one.sendall(said)
        heard = b""
        while len(heard) < len(said):
            heard += one.recv(1 << 16)
        assert heard == said

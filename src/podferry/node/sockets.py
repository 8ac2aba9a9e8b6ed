"""The sockets that processes have open, by protocol, and what CRIU can make of them on this kernel."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from podferry.core.connections import LISTEN, TCP, UDP, End, KernelSocket
from podferry.core.preflight import CORKED, SOCKETS
from podferry.fs.libc import second_descriptor

INTERNET = frozenset({"TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6", "PING", "PINGv6"})
DATAGRAMS = frozenset({"UDP", "UDPv6", "UDP-Lite", "UDPLITEv6"})
OTHERS = frozenset({"UNIX", "UNIX-STREAM", "NETLINK", "PACKET"})
"""What CRIU saves (`can_dump_ipproto` in its criu/sk-inet.c, and criu/sockets.c), as the kernel names it (`struct proto`)."""


LOOKS = 5
_CONNECTING = "02"  # SS_CONNECTING of linux/net.h
LISTED = 32  # at most: facts travel
_WAITS_TO_BE_ACCEPTED = frozenset({"01", "03", "08"})
"""ESTABLISHED; SYN_RECV: the queue is full, or the listener defers; CLOSE_WAIT: the client has said all it had to say."""
_CLOSED_TOO_EARLY = frozenset({"04", "09", "0B"})
"""FIN_WAIT1, LAST_ACK, CLOSING of what nobody has open: its end has not arrived, and so not all that was said before."""
_NO_CONNECTION = frozenset({"06", "07", "0A"})  # TIME_WAIT, CLOSE, LISTEN
_MAPPED = "0000000000000000FFFF0000" if sys.byteorder == "little" else "00000000000000000000FFFF"
_TCP_REPAIR, _REPAIR_OFF_SILENTLY = 19, -1  # linux/tcp.h
_UDP_CORK = 1  # linux/udp.h


def protocols(pids: Iterable[int]) -> set[str]:
    """The protocols of the sockets that these processes have open. What ends or vanishes meanwhile is left out."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    found.add(os.getxattr(descriptor, "system.sockprotoname").rstrip(b"\0").decode(errors="replace"))
    return found


def unsaved_sockets(pids: Iterable[int]) -> Iterable[str]:
    """Of the sockets that these processes have open what CRIU may not be able to save, as `ContainerFacts.unsaved` names it."""
    pids = tuple(pids)
    there = protocols(pids)
    if there & DATAGRAMS and any(map(_has_corked, pids)):
        yield CORKED
    for protocol in sorted({one.removesuffix("v6") for one in there - INTERNET - OTHERS}):
        yield f"{protocol} socket"
    if there & INTERNET and not credentials_may_be_asked():
        yield SOCKETS


def _has_corked(pid: int) -> bool:
    """Whether a process has a datagram socket with a datagram under way (UDP_CORK)."""
    for descriptor in _open_in(pid).values():
        with suppress(OSError):
            if os.getxattr(f"/proc/{pid}/fd/{descriptor}", "system.sockprotoname").rstrip(b"\0").decode() in DATAGRAMS:
                with _second(pid, descriptor) as one:
                    if one.getsockopt(socket.IPPROTO_UDP, _UDP_CORK):
                        return True
    return False


class Connection(NamedTuple):
    """A socket as the kernel lists it: both ends, in its own notation, and its inode. 0: nobody has it open."""

    local: str
    remote: str
    family: socket.AddressFamily
    inode: int
    state: str = ""

    def __str__(self) -> str:
        return f"{_end(self.family, self.local)} -> {_end(self.family, self.remote)}"


def connections(pid: int) -> Iterator[Connection]:
    """The TCP connections in the network namespace of a process that are not over yet."""
    return (one for one in _listed(pid, TCP) if one.state not in _NO_CONNECTION)


def open_here() -> set[tuple[End, End]]:
    """The ends of the TCP connections in the network namespace of this thread that are not over yet."""
    found = (one for one in _listed("thread-self", TCP) if one.state not in _NO_CONNECTION)
    return {_ends(one) for one in found}


def _ends(one: Connection) -> tuple[End, End]:
    return _end(one.family, one.local), _end(one.family, one.remote)


def _listed(pid: int | str, protocol: str) -> Iterator[Connection]:
    """All sockets of a protocol in the network namespace of a process or thread, as /proc names it."""
    for family, name in ((socket.AF_INET, protocol), (socket.AF_INET6, f"{protocol}6")):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                yield Connection(words[1], words[2], family, int(words[9]), words[3])


def kernel_sockets(pid: int, pids: Iterable[int]) -> list[KernelSocket]:
    """The TCP and UDP sockets of the processes `pids`, in the network namespace of `pid`, and what waits there to be accepted."""
    inodes = {inode for owner in pids for inode in _open_in(owner)}
    found = []
    for protocol in (TCP, UDP):
        for one in _listed(pid, protocol):
            held = one.inode in inodes
            if held or (protocol == TCP and not one.inode and one.state in _WAITS_TO_BE_ACCEPTED):
                local, remote, state = _end(one.family, one.local), _end(one.family, one.remote), int(one.state, 16)
                peer = remote if remote.port and state != LISTEN else None
                found.append(KernelSocket(protocol, local, peer, state, held))
    return found


def has_connections(pid: int) -> bool:
    """Whether there is any TCP connection in the network namespace of a process."""
    return next(connections(pid), None) is not None


def to_others(pid: int, pids: Iterable[int]) -> tuple[str, ...]:
    """Connections of the processes `pids`, in the network namespace of `pid`, whose other end is not theirs: `LOCAL -> REMOTE`."""
    return tuple(sorted({str(one) for one, _, _ in _to_others(pid, pids)}))[:LISTED]


def _to_others(pid: int, pids: Iterable[int]) -> Iterator[tuple[Connection, int, int]]:
    """The same, with a process that has each open, and by which descriptor."""
    if there := list(connections(pid)):
        holders = {inode: (owner, at) for owner in pids for inode, at in _open_in(owner).items()}
        own = [one for one in there if one.inode in holders]
        inside = {(_plain(one.local), _plain(one.remote)) for one in there if one.inode in holders or _is_gone(one)}
        for one in own:
            if (_plain(one.remote), _plain(one.local)) not in inside:
                yield one, *holders[one.inode]


def unaccepted(pid: int, pids: Iterable[int]) -> tuple[str, ...]:
    """Connections of the processes `pids`, in the network namespace of `pid`, that another end there has not accepted yet."""
    pids = tuple(pids)
    return (*_unaccepted_tcp(pid, pids), *_unaccepted_unix(pid, pids))


def _is_gone(one: Connection) -> bool:
    """Whether it was open and is closed: what waits to be accepted was not open yet."""
    return not one.inode and one.state not in _WAITS_TO_BE_ACCEPTED


def unsent(pid: int, pids: Iterable[int]) -> tuple[str, ...]:
    """Connections in the network namespace of `pid` that were closed before all that was said had arrived at the processes `pids`.

    Nobody has such an end open, so CRIU does not save it, and the rest of what it has to send is nowhere else.
    """
    facing = _facing(pid, pids, _CLOSED_TOO_EARLY)
    return tuple(f"{one}, whose other end is closed and has data left" for one in facing)


Look = Callable[[int, Collection[int]], tuple[str, ...]]


def waits_for(seconds: float, look: Look, pid: int, pids: Iterable[int]) -> tuple[str, ...]:
    """What is there for so long of what `look` sees: nobody is about to accept or to read it."""
    pids = tuple(pids)
    found = look(pid, pids)
    for _ in range(LOOKS):
        if not found:
            break
        time.sleep(seconds / LOOKS)
        there = look(pid, pids)
        found = tuple(one for one in found if one in there)
    return found


def _unaccepted_unix(pid: int, pids: Iterable[int]) -> tuple[str, ...]:
    """The names of unix sockets of these processes at which somebody waits. CRIU dumps no such connection with data in it. What
    waits has no inode yet, and the name of its listener (`unix_seq_show` in the kernel's net/unix/af_unix.c)."""
    lines: list[list[str]] = []
    with suppress(OSError):
        lines = [
            line.split(maxsplit=7)
            for line in Path(f"/proc/{pid}/net/unix").read_text(errors="replace").splitlines()[1:]
        ]
    named = [words for words in lines if len(words) == 8]
    waiting = {name for *_, state, inode, name in named if (state, inode) == (_CONNECTING, "0")}
    if not waiting:
        return ()
    inodes = {inode for owner in pids for inode in _open_in(owner)}
    return tuple(
        sorted({f"unix socket {name}" for *_, inode, name in named if name in waiting and int(inode) in inodes})
    )


def _unaccepted_tcp(pid: int, pids: Iterable[int]) -> tuple[str, ...]:
    return tuple(map(str, _facing(pid, pids, _WAITS_TO_BE_ACCEPTED)))


def _facing(pid: int, pids: Iterable[int], states: Collection[str]) -> list[Connection]:
    """Connections of the processes `pids`, in the network namespace of `pid`, whose other end is there as well, in one of these
    states, and nobody has it open."""
    there = list(connections(pid))
    nobodys = {(_plain(one.remote), _plain(one.local)) for one in there if not one.inode and one.state in states}
    if not nobodys:
        return []
    inodes = {inode for owner in pids for inode in _open_in(owner)}
    return [one for one in there if one.inode in inodes and (_plain(one.local), _plain(one.remote)) in nobodys]


class Peers:
    """Who is at the other end of a container's connections to the outside: told by a reset when the container has left.

    CRIU leaves connections that it has dumped in repair mode, in which their end is silent: a second descriptor of each is taken.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def take(self, pid: int, pids: Iterable[int], kept: Collection[tuple[End, End]] = ()) -> None:
        """Take those of the processes `pids`, which are in the network namespace of `pid` and stand still, but for those `kept`,
        which go on.

        Whoever shares the namespace and is not among them, another container of the pod, is gone when `reset` is called, too.
        """
        for one, owner, descriptor in _to_others(pid, pids):
            if _ends(one) in kept:
                continue
            with suppress(OSError):
                self._sockets.append(_second(owner, descriptor))

    def reset(self) -> None:
        """Reset them: their owners are gone."""
        for one in self._sockets:
            with suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                one.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF_SILENTLY)
        self.close()

    def close(self) -> None:
        """Let go of them; their owners, where they live, still have them."""
        for one in self._sockets:
            one.close()
        self._sockets.clear()


def _open_in(pid: int) -> dict[int, int]:
    """The sockets that a process has open: inode to descriptor."""
    found = {}
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                kind, _, rest = str(link.readlink()).partition(":[")
                if kind == "socket":
                    found[int(rest.rstrip("]"))] = int(link.name)
    return found


def reusing(pids: Iterable[int]) -> tuple[int, ...]:
    """Which connections of these processes have SO_REUSEADDR: the repair mode takes it from them."""
    found = []
    for inode, one in _connected(pids):
        with one, suppress(OSError):
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR):
                found.append(inode)
    return tuple(found)


def end_repair(pids: Iterable[int], reusing: Collection[int]) -> None:
    """Have connections of these processes go on that CRIU has left in repair mode; those `reusing` have SO_REUSEADDR again.

    CRIU does so itself where a dump fails, but not where it fails after its images were whole, as every dump here that is undone
    (`cr_dump_finish` in its criu/cr-dump.c). In repair mode a socket answers its owner with EPERM.
    """
    for inode, one in _connected(pids):
        with one, suppress(OSError):
            if one.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR):
                one.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 0)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, inode in reusing)


def _connected(pids: Iterable[int]) -> Iterator[tuple[int, socket.socket]]:
    """The connections of these processes, which share a network namespace: inode, and a descriptor of our own."""
    pids = tuple(pids)
    wanted = {one.inode for one in connections(pids[0])} - {0} if pids else set()
    for owner in pids if wanted else ():
        for inode, descriptor in _open_in(owner).items():
            if inode in wanted:
                wanted.discard(inode)
                with suppress(OSError):
                    yield inode, _second(owner, descriptor)


def _second(owner: int, descriptor: int) -> socket.socket:
    """A descriptor of our own for what a process has open."""
    pidfd = os.pidfd_open(owner)
    try:
        return socket.socket(fileno=second_descriptor(pidfd, descriptor))
    finally:
        os.close(pidfd)


def _plain(end: str) -> str:
    """An end without the notation of IPv4 within IPv6."""
    return end.removeprefix(_MAPPED)


def _end(family: socket.AddressFamily, text: str) -> End:
    """An end in /proc/net: words of 32 bits as the processor orders them, and the port, in hexadecimal."""
    host, port = text.split(":")
    words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return End(mapped or address, int(port, 16))


@cache
def credentials_may_be_asked() -> bool:
    """Whether internet sockets have SO_PASSCRED, as they had before Linux 6.16. CRIU up to 4.1 asks for it, and fails without."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError:
            return False
        return True

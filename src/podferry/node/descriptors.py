"""The open descriptors of a frozen process, for its inventory (`node/inventory.py`): taken by copies of its descriptors.

A copy (pidfd_getfd(2)) is of the same open file, socket or pipe, so that what the kernel tells of it here is what it tells the
process, and an option that is set here is set there. CRIU saves few of a socket's options; seen with 4.1.1 and 4.2.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from podferry.fs.libc import second_descriptor

_LARGE_FILE = 0o100000
"""Says how a descriptor was opened; of what is opened again for a restored job, another program did it."""
_DIRECTORY, _NAMELESS = 0o200000, 0o20000000  # O_TMPFILE without O_DIRECTORY, which it contains
if os.uname().machine == "aarch64":
    _DIRECTORY = 0o40000
_REMADE = ".cr_link"
"""What CRIU adds to the name of a deleted file while it makes it anew, where its name is another's by now."""
_GET_PIPE_SIZE, _SET_PIPE_SIZE, _GET_SEALS = 1032, 1031, 1034
PLAIN_PIPE = 1 << 20
"""Bytes that a pipe of anybody may have, by the kernel's own setting."""
_SOCKET, _IP, _TCP, _UDP, _IPV6 = 1, 0, 6, 17, 41
_ACCEPTS_CONNECTIONS = 30  # SO_ACCEPTCONN

# Whole numbers that whoever owns the socket may set, by the kernel headers (asm-generic/socket.h, linux/tcp.h, in.h, in6.h, udp.h).
# Not those that need a capability, such as SO_MARK, SO_PRIORITY, IP_TRANSPARENT: nobody is given them for a peer's word. Of time
# stamps the older ones alone: the kernel shows each as both.
OPTIONS: Mapping[int, tuple[int, ...]] = {
    _SOCKET: (2, 6, 9, 10, 15, 16, 18, 29, 34, 35, 40, 41, 42, 43, 45, 60, 75),
    _TCP: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 23, 25, 27, 30, 34, 36),
    _UDP: (1, 101, 102, 103, 104),
    _IP: (1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 20, 21, 24, 25, 33, 34, 49),
    _IPV6: (16, 18, 19, 23, 25, 29, 33, 49, 51, 53, 56, 58, 60, 62, 66, 67, 70, 72, 73, 74, 77, 78),
}
_CONGESTION = (_TCP, 13)
"""TCP_CONGESTION, whose value is a name: here a number of its bytes, the first the lowest."""
_NAME = 16  # bytes, TCP_CA_NAME_MAX in the kernel's include/net/tcp.h
_ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
"""The names that a program without rights may choose."""
OF_CONNECTIONS = ((_TCP, 18), (_TCP, 25), _CONGESTION)
"""TCP_USER_TIMEOUT, TCP_NOTSENT_LOWAT, TCP_CONGESTION: what CRIU leaves out of a connection (criu/sk-inet.c and sk-tcp.c, 4.1.1 and
4.2). The rest is CRIU's, or says how the connection fares."""
_LEVELS = {socket.AF_INET: (_SOCKET, _IP), socket.AF_INET6: (_SOCKET, _IPV6, _IP), socket.AF_UNIX: (_SOCKET,)}
_PROTOCOLS = {socket.IPPROTO_TCP: (_TCP,), socket.IPPROTO_UDP: (_UDP,)}
Options = dict[tuple[int, int], int]


def take(pid: int) -> dict[str, str]:
    """Attributes of what process `pid` has open. What is closed or ends meanwhile is left out. Raises `OSError`."""
    found: dict[str, str] = {}
    with _pidfd(pid) as pidfd:
        for number in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):  # noqa: PTH208 - quick
            with suppress(OSError, ValueError, IndexError):
                found |= dict(_descriptor(pid, pidfd, number))
    return found


def beginning(path: str, size: int = 8192) -> bytes:
    """The beginning of a file of /proc. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, size)
    finally:
        os.close(fd)


def plain(link: str) -> str:
    """The name of a file as the job knows it."""
    return link.replace(f"{_REMADE} (deleted)", " (deleted)")


def chosen_flags(flags: int) -> int:
    """The flags of a descriptor but for those that say how it was opened and nothing of what can be done with it: O_LARGEFILE,
    O_DIRECTORY, and O_TMPFILE, of which the kernel does not tell whether the file may be given a name later (O_EXCL)."""
    return flags & ~(_LARGE_FILE | _DIRECTORY | _NAMELESS)


def give(pid: int, attribute: str, had: str, has: str) -> bool:
    """Set what `take` told of a descriptor to what it was; whether anything was set. Raises `OSError`, `ValueError`."""
    number, _, what = attribute.removeprefix("descriptor ").partition(" ")
    with _pidfd(pid) as pidfd, _copy(pidfd, int(number)) as fd:
        if what == "pipe" and int(had) <= PLAIN_PIPE:
            return fcntl.fcntl(fd, _SET_PIPE_SIZE, int(had)) >= int(had)
        if what == "options":
            return _give_options(fd, _parsed(had), _parsed(has))
    return False


def may_be_set(attribute: str) -> bool:
    """Whether it is an attribute that `give` knows."""
    return attribute.startswith("descriptor ") and attribute.endswith((" pipe", " options"))


def _descriptor(pid: int, pidfd: int, number: int) -> Iterator[tuple[str, str]]:
    """What it is, without the number that each node gives it, and its flags; and what a copy tells."""
    # The job stands still, and may have thousands: os instead of Path takes half the time.
    link = os.readlink(f"/proc/{pid}/fd/{number}")  # noqa: PTH115
    kind = link.partition(":[")[0] if link.startswith(("socket:[", "pipe:[")) else ""
    told = beginning(f"/proc/{pid}/fdinfo/{number}", 2048)
    flags = int(told.partition(b"flags:")[2].split(maxsplit=1)[0], 8)
    yield f"descriptor {number}", f"{kind or plain(link)} {chosen_flags(flags):#o}"
    if locks := sorted(
        " ".join(_lock(line)) for line in told.decode(errors="replace").splitlines() if line.startswith("lock:")
    ):
        yield f"descriptor {number} locks", ", ".join(locks)
    # Not of files: to close a copy of one is to have a network file system write back what is dirty, and to wait for its server.
    if kind == "socket":
        with _copy(pidfd, number) as fd:
            if chosen := _chosen(fd):
                yield (
                    f"descriptor {number} options",
                    " ".join(f"{level}:{name}={chosen[level, name]}" for level, name in chosen),
                )
    elif kind == "pipe":
        with _copy(pidfd, number) as fd:
            yield f"descriptor {number} pipe", str(fcntl.fcntl(fd, _GET_PIPE_SIZE))
    elif link.startswith("/memfd:"):
        with _copy(pidfd, number) as fd:
            yield f"descriptor {number} seals", str(fcntl.fcntl(fd, _GET_SEALS))


def _lock(line: str) -> list[str]:
    """Kind, mode and range of a lock or lease, without what a node numbers (`lock: 1: POSIX ADVISORY WRITE 7 fe:00:9 0 EOF`)."""
    words = line.split()
    return [*words[2:5], *words[-2:]]


def _chosen(fd: int) -> Options:
    """The options of a socket that are not as a new one has them; of a TCP socket that does not listen those `OF_CONNECTIONS`."""
    with socket.socket(fileno=os.dup(fd)) as one:
        plain = _defaults(one.family, one.type, one.proto)
        chosen = {option: value for option, value in _options(one).items() if value != plain.get(option, value)}
        if one.proto == socket.IPPROTO_TCP and not one.getsockopt(_SOCKET, _ACCEPTS_CONNECTIONS):
            return {option: value for option, value in chosen.items() if option in OF_CONNECTIONS}
        return chosen


@cache
def _defaults(family: int, kind: int, protocol: int) -> Options:
    try:
        with socket.socket(family, kind, protocol) as new:
            return _options(new)
    except OSError:
        return {}


def _options(one: socket.socket) -> Options:
    found = {}
    for level in (*_LEVELS.get(one.family, ()), *_PROTOCOLS.get(one.proto, ())):
        for name in OPTIONS[level]:
            with suppress(OSError):
                found[level, name] = one.getsockopt(level, name)
    if one.proto == socket.IPPROTO_TCP:
        with suppress(OSError):
            found[_CONGESTION] = int.from_bytes(one.getsockopt(*_CONGESTION, _NAME), "little")
    return found


def _give_options(fd: int, had: Options, has: Options) -> bool:
    done = False
    with socket.socket(fileno=os.dup(fd)) as one:
        for (level, name), value in had.items():
            if (level, name) == _CONGESTION and value != has.get(_CONGESTION):
                done = _give_congestion_control(one, value) or done
            elif value != has.get((level, name)) and name in OPTIONS.get(level, ()):
                with suppress(OSError):
                    one.setsockopt(level, name, value)
                    done = True
    return done


def _give_congestion_control(one: socket.socket, value: int) -> bool:
    if not 0 <= value < 1 << 8 * _NAME:
        return False
    name = value.to_bytes(_NAME, "little").rstrip(b"\0")
    if name not in _ALLOWED.read_bytes().split():
        return False
    with suppress(OSError):
        one.setsockopt(*_CONGESTION, name)
        return True
    return False


def _parsed(text: str) -> Options:
    """The inverse of what `take` writes. Raises `ValueError`."""
    found = {}
    for word in text.split():
        option, _, value = word.partition("=")
        level, _, name = option.partition(":")
        found[int(level), int(name)] = int(value)
    return found


@contextmanager
def second(pid: int, number: int) -> Iterator[int]:
    """A descriptor of our own for what a process has open. Raises `OSError` where it has not."""
    with _pidfd(pid) as pidfd, _copy(pidfd, number) as fd:
        yield fd


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


@contextmanager
def _copy(pidfd: int, number: int) -> Iterator[int]:
    fd = second_descriptor(pidfd, number)
    try:
        yield fd
    finally:
        os.close(fd)

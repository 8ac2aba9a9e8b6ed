"""userfaultfd as typed functions: one per ioctl, and the events that a descriptor reports.

Constants and layouts are those of the kernel's `include/uapi/linux/userfaultfd.h`; behaviour is that of
`fs/userfaultfd.c` and `mm/userfaultfd.c`; see also userfaultfd(2) and ioctl_userfaultfd(2). Addresses and lengths are
bytes and multiples of the page size. A failed call raises `OSError`, except where an error is an everyday answer
(`copy`, `zeropage`): these return an `CopyOutcome`. The GIL is not held during an ioctl.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

from podferry.fs.libc import system_call

API_VERSION = 0xAA
USER_MODE_ONLY = 1

_API = 0xC018AA3F
_REGISTER = 0xC020AA00
_UNREGISTER = 0x8010AA01
_WAKE = 0x8010AA02
_COPY = 0xC028AA03
_ZEROPAGE = 0xC020AA04

_SYSCALL = {"x86_64": 323, "aarch64": 282}  # arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h

_MESSAGE = struct.Struct("=BBHIQQQ")  # struct uffd_msg: event, reserved, and a union of up to three words
_MESSAGES_AT_ONCE = 64


class Feature(IntFlag):
    """`UFFD_FEATURE_*`: what `api` may ask for."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


class RegisterMode(IntFlag):
    """`UFFDIO_REGISTER_MODE_*`: which faults of a range are reported."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class Event(IntEnum):
    """`UFFD_EVENT_*`: what happened in the address space."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits for the page at `address` (rounded down unless EXACT_ADDRESS was asked for)."""

    address: int
    flags: int


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked; `uffd` is the child's descriptor, which the reader now owns."""

    uffd: int


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap moved `length` bytes from `start` to `to`; the process waited for this event to be read."""

    start: int
    to: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """madvise emptied `start` up to `end` (DONTNEED, FREE, REMOVE): what is there now reads as zeroes."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """The range `start` up to `end` was unmapped, by munmap or by a mapping put over it."""

    start: int
    end: int


Message = PageFault | Fork | Remap | Remove | Unmap


class CopyOutcome(NamedTuple):
    """How far a copy came: `done` bytes, then `error` (an errno; 0 if nothing stopped it).

    The kernel does not say why it stopped in the middle of a copy: `error` is then 0 with `done` short of the length,
    and asking again from there tells. EAGAIN: an event must be read first. EEXIST: the page is there already. ENOENT:
    nothing registered is mapped there. ESRCH (ENOSPC before Linux 4.17): the process is gone. ENOMEM: no memory left.
    """

    done: int
    error: int


def create(flags: int = os.O_CLOEXEC | os.O_NONBLOCK) -> int:
    """Open a userfaultfd for the calling process. Without CAP_SYS_PTRACE add `USER_MODE_ONLY`. Raises OSError."""
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"userfaultfd has no known number on {platform.machine()}")
    return system_call(number, ctypes.c_int(flags), of="userfaultfd")


def api(fd: int, features: int = 0) -> Feature:
    """Shake hands, once per descriptor, asking for exactly `features`; returns all that the kernel has.

    Raises OSError EINVAL where the kernel lacks one of them, EPERM for EVENT_FORK without CAP_SYS_PTRACE.
    """
    argument = bytearray(struct.pack("=QQQ", API_VERSION, int(features), 0))
    fcntl.ioctl(fd, _API, argument)
    return Feature(struct.unpack("=QQQ", argument)[1])


def register(fd: int, start: int, length: int, mode: RegisterMode) -> int:
    """Watch a range for `mode`; returns the ioctls it allows as a mask. EBUSY: another descriptor watches it."""
    argument = bytearray(struct.pack("=QQQQ", start, length, int(mode), 0))
    fcntl.ioctl(fd, _REGISTER, argument)
    return int(struct.unpack("=QQQQ", argument)[3])


def unregister(fd: int, start: int, length: int) -> None:
    """Watch a range no longer; faults there are the kernel's again."""
    fcntl.ioctl(fd, _UNREGISTER, bytearray(struct.pack("=QQ", start, length)))


def wake(fd: int, start: int, length: int) -> None:
    """Let the threads go on that wait for a fault in the range."""
    fcntl.ioctl(fd, _WAKE, bytearray(struct.pack("=QQ", start, length)))


def copy(fd: int, to: int, source: int, length: int) -> CopyOutcome:
    """Fill `length` missing bytes at `to` from our own memory at `source`, each page whole, and wake waiters."""
    argument = bytearray(struct.pack("=QQQQq", to, source, length, 0, 0))
    return _fill(fd, _COPY, argument)


def zeropage(fd: int, start: int, length: int) -> CopyOutcome:
    """Fill missing bytes with the zero page and wake waiters."""
    return _fill(fd, _ZEROPAGE, bytearray(struct.pack("=QQQq", start, length, 0, 0)))


def changing(fd: int) -> bool:
    """Whether a change of the address space is under way: its event is unread, or its thread has not gone on yet.

    It asks for nothing to be done, which the kernel refuses with EINVAL, unless it refuses with EAGAIN before.
    """
    return zeropage(fd, 0, 0).error == errno.EAGAIN


def read(fd: int) -> list[Message]:
    """The events that wait, oldest first; an empty list if there are none (the descriptor must be non-blocking).

    Raises OSError EINVAL before `api` was called. A descriptor in a `Fork` belongs to the caller.
    """
    try:
        data = os.read(fd, _MESSAGE.size * _MESSAGES_AT_ONCE)
    except BlockingIOError:
        return []
    return [_decode(fields) for fields in _MESSAGE.iter_unpack(data)]


def _fill(fd: int, request: int, argument: bytearray) -> CopyOutcome:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        done = _last_word(argument)
        return CopyOutcome(done, 0) if done > 0 else CopyOutcome(0, error.errno or errno.EIO)
    return CopyOutcome(_last_word(argument), 0)


def _last_word(argument: bytearray) -> int:
    return int(struct.unpack_from("=q", argument, len(argument) - 8)[0])


def _decode(fields: tuple[int, ...]) -> Message:
    event, _, _, _, first, second, third = fields
    match event:
        case Event.PAGEFAULT:
            return PageFault(address=second, flags=first)
        case Event.FORK:
            return Fork(uffd=first & 0xFFFFFFFF)
        case Event.REMAP:
            return Remap(start=first, to=second, length=third)
        case Event.REMOVE:
            return Remove(start=first, end=second)
        case Event.UNMAP:
            return Unmap(start=first, end=second)
    raise OSError(errno.EPROTO, f"userfaultfd sent the unknown event {event:#x}")

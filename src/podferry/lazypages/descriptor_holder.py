"""The lazy-pages daemon's second process: it holds a copy of every descriptor, so that a crash of the first corrupts nothing.

The kernel hands out zero pages for what is missing once the last copy of a userfaultfd is closed. If the process that feeds
is killed, the descriptor holder still has them all: whoever touches a missing page waits, and the status says why, until SIGTERM.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import struct
from contextlib import suppress
from typing import NoReturn

from podferry.errors import Failed
from podferry.fs.libc import libc
from podferry.lazypages.daemon_status import DaemonState, StatusFile
from podferry.node.process import ending

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_KEY = struct.Struct("=i")

TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class DescriptorHolder:
    """The feeding process's end: whatever is `hold` stays open until it is `release`d."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def hold(self, fd: int) -> None:
        """Keep a copy of `fd`."""
        self._connection.sendmsg([_KEY.pack(fd)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])

    def release(self, fd: int) -> None:
        """Close the copy of `fd`: the task has everything."""
        self._connection.send(_KEY.pack(fd))


def fork_holder(report: StatusFile) -> DescriptorHolder:
    """Go on in a child process; the parent becomes its descriptor holder, and ends as the child ends.

    The parent's death takes the child along. A signal to end that the parent gets goes to the child while there is one. The
    child takes none of `TO_END` until it unblocks them, when it knows what to do.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, TO_END)  # in both, or one that comes now ends the parent without a word
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent, child = os.getpid(), os.fork()
    if child:
        theirs.close()
        _keep(child, ours, report)
    ours.close()
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    return DescriptorHolder(theirs)


def _keep(child: int, connection: socket.socket, report: StatusFile) -> NoReturn:
    def told(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in TO_END:
        signal.signal(number, told)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_END)
    held = _collect(connection)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        error = Failed(
            "the lazy-pages daemon died", why=ending(code), remedy="kill the restored tasks: their memory is incomplete"
        )
        report.status.error = error.to_dict()
        report.enter(DaemonState.FAILED)
        for number in TO_END:
            signal.signal(number, signal.SIG_DFL)
        report.insist()
        while held:
            signal.pause()
    os._exit(code if code >= 0 else 1)


def _collect(connection: socket.socket) -> dict[int, int]:
    """Hold and release until the feeding process ends; returns what it had not released."""
    held: dict[int, int] = {}
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, _KEY.size, 1)
        if not data:
            return held
        (key,) = _KEY.unpack(data)
        if descriptors:
            held[key] = descriptors[0]
        else:
            os.close(held.pop(key))

"""The agent's side of `inject.py`: get a userfaultfd of another process."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from podferry.errors import Failed
from podferry.memory.tracking.inject import ANSWER, MAX_ANSWER, REQUEST, InjectionOutcome
from podferry.node import outside
from podferry.node.process import spawn

PROGRAM = Path(__file__).with_name("inject.py")
STOP_TIMEOUT = 3.0  # seconds for a thread to come to a stop; a running or sleeping one takes microseconds


@dataclass(frozen=True, slots=True)
class Opened:
    """A userfaultfd of another process, ours to close, and the seconds for which one thread of it stood still."""

    uffd: int
    stopped: float


class NotInjected(Failed):
    """A process could not be given a userfaultfd; it goes on unharmed. `outcome` says which kind of reason."""

    code = "PF265"
    outcome = InjectionOutcome.REFUSED


class Injector:
    """Keeps one `inject.py` started and waiting. A context manager; not for several threads at once."""

    def __init__(self) -> None:
        self._start()

    def __enter__(self) -> Injector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_userfaultfd(self, pid: int, *, timeout: float = STOP_TIMEOUT) -> Opened:
        """Make `pid` open a userfaultfd, take it and close it there; one of its threads stands still meanwhile.

        The descriptor is close-on-exec, non-blocking and has had no UFFDIO_API yet. Raises `NotInjected`.
        """
        try:
            self._socket.sendall(REQUEST.pack(pid, timeout))
            _, fds, _, _ = socket.recv_fds(self._socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
            answer = self._socket.recv(MAX_ANSWER)
        except ConnectionError as lost:
            self._restart(pid, str(lost))
        if not answer:
            for fd in fds:
                os.close(fd)
            self._restart(pid, "the injector ended")
        outcome, stopped = ANSWER.unpack_from(answer)
        if fds:
            return Opened(fds[0], stopped / 1e9)
        if outcome == InjectionOutcome.STUCK:
            self.close()
            self._start()
        raise _not_injected(pid, InjectionOutcome(outcome), answer[ANSWER.size :].decode())

    def close(self) -> None:
        """Have the program end, after what it is about to do, and wait for that."""
        self._socket.close()
        self._program.wait()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv: list[str | Path] = [sys.executable, "-S", "-I", PROGRAM, str(theirs.fileno())]
            self._program = spawn(outside.surviving(argv), pass_fds=[theirs.fileno()])

    def _restart(self, pid: int, why: str) -> NoReturn:
        with contextlib.suppress(OSError):
            self.close()
        self._start()
        raise _not_injected(pid, InjectionOutcome.REFUSED, why)


def _not_injected(pid: int, outcome: InjectionOutcome, why: str) -> NotInjected:
    error = NotInjected(f"process {pid} cannot be given a userfaultfd", why=why)
    error.outcome = outcome
    return error

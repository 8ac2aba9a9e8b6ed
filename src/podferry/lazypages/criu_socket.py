"""The socket on which `criu restore --lazy-pages` hands over the tasks it restores.

The protocol is that of `criu/uffd.c` (the same from 3.x to 4.2): in its work directory CRIU connects to
`lazy-pages.socket` once, and every task sends over this one connection its pid as an int32, then one byte that carries its
userfaultfd (a zombie sends its pid negated, and no descriptor). When all tasks are restored, before they run, CRIU sends
the uint32 0x52535446.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from podferry.errors import Failed

SOCKET = "lazy-pages.socket"
FINISHED = 0x52535446
_LARGEST_PID = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h


@dataclass(frozen=True)
class Restored:
    """A task's pid inside the container, and its userfaultfd, which the reader now owns."""

    pid: int
    uffd: int


class RestoreFinished:
    """Every task is restored; they are about to run."""


class CriuSocket:
    """The listening end. Poll `fileno()`; read with `events()`."""

    def __init__(self, work: Path) -> None:
        """Listen in `work`, whose path may be longer than a socket's name can be."""
        self._directory = os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        with suppress(FileNotFoundError):
            os.unlink(SOCKET, dir_fd=self._directory)
        self._socket.bind(f"/proc/self/fd/{self._directory}/{SOCKET}")
        os.chmod(SOCKET, 0o600, dir_fd=self._directory)
        self._socket.listen(1)
        self.connected = False
        self._pid = b""

    def fileno(self) -> int:
        """The descriptor to poll; another one once CRIU has connected."""
        return self._socket.fileno()

    def accept(self) -> None:
        """Take CRIU's connection. Nobody else can connect from then on."""
        connection, _ = self._socket.accept()
        connection.setblocking(False)
        self.close()
        self._socket, self.connected = connection, True

    def events(self) -> Iterator[Restored | RestoreFinished]:
        """What has come. Raises `Failed` if CRIU goes away before it has finished."""
        while True:
            try:
                if len(self._pid) < 4:
                    data = self._socket.recv(4 - len(self._pid))
                    if not data:
                        raise Failed("the restore ended before its tasks could run", remedy="see CRIU's restore.log")
                    self._pid += data
                    continue
                (number,) = struct.unpack("=i", self._pid)
                if number == FINISHED:
                    self._pid = b""
                    yield RestoreFinished()
                    return
                if not -_LARGEST_PID <= number <= _LARGEST_PID or not number:
                    raise Failed(
                        f"CRIU sent {number:#x} where podferry expects a pid",
                        why="this CRIU speaks another lazy-pages protocol",
                    )
                uffd = self._receive_descriptor() if number > 0 else -1
                self._pid = b""
                if number > 0:
                    yield Restored(number, uffd)
            except BlockingIOError:
                return

    def refuse(self) -> bool:
        """Have CRIU fail from now on. Returns whether it had said before that the tasks are about to run.

        The descriptors that were still on the way are lost to the caller; they stay open.
        """
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
            return any(isinstance(event, RestoreFinished) for event in self.events())
        except (OSError, Failed):
            return False

    def close(self) -> None:
        """Stop listening, or end the connection; the socket's name goes too."""
        self._socket.close()
        if self._directory >= 0:
            with suppress(FileNotFoundError):
                os.unlink(SOCKET, dir_fd=self._directory)
            os.close(self._directory)
            self._directory = -1

    def _receive_descriptor(self) -> int:
        data, ancillary, _, _ = self._socket.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) // 4 * 4])
        if not data or len(descriptors) != 1:
            for fd in descriptors:
                os.close(fd)
            raise Failed("CRIU sent a task without its userfaultfd", remedy="see CRIU's restore.log")
        return descriptors[0]

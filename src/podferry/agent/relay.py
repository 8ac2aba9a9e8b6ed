"""Post-copy on the target: the agent's end of the page feeder's socket, between the feeder and the source."""

from __future__ import annotations

import socket
from collections import deque
from pathlib import Path

import anyio

from podferry.errors import Failed
from podferry.memory.feeder_source import Frame, Word

PACKET = 64


class Relay:
    """A connection to a page feeder that was started with `--source PATH`."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise Failed.because("the page feeder takes no connection", error) from error
        self._socket.setblocking(False)
        self._unsent: deque[bytes] = deque()

    def arrived(self, space: int, start: int, end: int) -> None:
        """The store has these pages now."""
        self._unsent.append(Frame(Word.ARRIVED, space, start, end).encode())

    def zero(self, space: int, start: int, end: int) -> None:
        """These pages hold only zeros, and will not come."""
        self._unsent.append(Frame(Word.ZERO, space, start, end).encode())

    async def flush(self) -> None:
        """Send what was said. A feeder that has ended needs to hear nothing more."""
        while self._unsent:
            try:
                self._socket.send(self._unsent[0])
                self._unsent.popleft()
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError:
                self._unsent.clear()

    async def wanted(self) -> Frame | None:
        """The next pages that a thread of the job waits for; None once the feeder has ended."""
        while True:
            try:
                packet = self._socket.recv(PACKET)
                return Frame.decode(packet) if packet else None
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
            except OSError:
                return None

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

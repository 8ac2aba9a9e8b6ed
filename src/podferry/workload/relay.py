"""Post-copy on the target: the agent's end of the page feeder's socket, between the feeder and the source."""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import anyio

from podferry.errors import Failed
from podferry.lazypages.page_source import Frame, Word
from podferry.workload.pod.parts import container_of_space, space_of

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
                return self.heard()
            except BlockingIOError:
                await anyio.wait_readable(self._socket)

    def fileno(self) -> int:
        """What to poll before `heard`."""
        return self._socket.fileno()

    def heard(self) -> Frame | None:
        """What the feeder has said already. Raises `BlockingIOError` where that is nothing yet; None once it has ended."""
        try:
            packet = self._socket.recv(PACKET)
        except BlockingIOError:
            raise
        except OSError:
            return None
        return Frame.decode(packet) if packet else None

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class PodRelay:
    """The page feeders of a pod's containers, as one. `parts` are their relays, by the container's number."""

    def __init__(self, parts: Sequence[Relay]) -> None:
        self.parts = parts
        self._open = dict(enumerate(parts))
        self._poll = select.epoll()
        for part in parts:
            self._poll.register(part, select.EPOLLIN)

    def arrived(self, space: int, start: int, end: int) -> None:
        """The store has these pages now."""
        number, pid = container_of_space(space)
        self.parts[number].arrived(pid, start, end)

    def zero(self, space: int, start: int, end: int) -> None:
        """These pages hold only zeros, and will not come."""
        number, pid = container_of_space(space)
        self.parts[number].zero(pid, start, end)

    async def flush(self) -> None:
        """Send what was said."""
        for part in self.parts:
            await part.flush()

    async def wanted(self) -> Frame | None:
        """The next pages that a thread of the pod waits for; None once every feeder has ended."""
        while self._open:
            for number, part in list(self._open.items()):
                try:
                    frame = part.heard()
                except BlockingIOError:
                    continue
                if frame is not None:
                    return Frame(frame.word, space_of(number, frame.space), frame.start, frame.end)
                self._poll.unregister(part)
                del self._open[number]
            if self._open:
                await anyio.wait_readable(self._poll)
        return None

    def close(self) -> None:
        """Hang up."""
        self._poll.close()
        for part in self.parts:
            part.close()

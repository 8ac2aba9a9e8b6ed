"""Post-copy on the target: the agent's end of the lazy-pages daemons' sockets, between them and the source."""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import anyio

from podferry.errors import Failed, PeerMisbehaved
from podferry.lazypages.page_source import Frame, Word
from podferry.workload.numbers import address_space_of, container_of_address_space

PACKET = 64


class DaemonPageChannel:
    """Connections to lazy-pages daemons that were started with `--source PATH`, one a container, in the containers' order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._sockets: list[socket.socket] = []
        try:
            for path in paths:
                self._sockets.append(_connected(path))
        except OSError as error:
            for one in self._sockets:
                one.close()
            raise Failed.because("the lazy-pages daemon takes no connection", error) from error
        self._open = dict(enumerate(self._sockets))
        self._unsent: deque[tuple[int, bytes]] = deque()
        self._poll = select.epoll()
        for one in self._sockets:
            self._poll.register(one, select.EPOLLIN)

    def arrived(self, address_space: int, start: int, end: int) -> None:
        """The store has these pages now."""
        self._queue(Word.ARRIVED, address_space, start, end)

    def zero(self, address_space: int, start: int, end: int) -> None:
        """These pages hold only zeros, and will not come."""
        self._queue(Word.ZERO, address_space, start, end)

    def _queue(self, word: Word, address_space: int, start: int, end: int) -> None:
        number, pid = container_of_address_space(address_space)
        if number >= len(self._sockets):
            raise PeerMisbehaved(f"memory of container {number}, which the workload does not have")
        self._unsent.append((number, Frame(word, pid, start, end).encode()))

    async def flush(self) -> None:
        """Send what was said. A lazy-pages daemon that has ended needs to hear nothing more."""
        while self._unsent:
            number, packet = self._unsent[0]
            try:
                self._sockets[number].send(packet)
            except BlockingIOError:
                await anyio.wait_writable(self._sockets[number])
                continue
            except OSError:
                pass
            self._unsent.popleft()

    async def next_request(self) -> Frame | None:
        """The next pages that a thread of the workload waits for; None once every lazy-pages daemon has ended."""
        while self._open:
            for number, one in list(self._open.items()):
                try:
                    packet = one.recv(PACKET)
                except BlockingIOError:
                    continue
                except OSError:
                    packet = b""
                if packet:
                    frame = Frame.decode(packet)
                    return Frame(frame.word, address_space_of(number, frame.address_space), frame.start, frame.end)
                self._poll.unregister(one)
                del self._open[number]
            if self._open:
                await anyio.wait_readable(self._poll)
        return None

    def close(self) -> None:
        """Hang up."""
        self._poll.close()
        for one in self._sockets:
            one.close()


def _connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        made.connect(str(path))
    except OSError:
        made.close()
        raise
    made.setblocking(False)
    return made

"""The source of pages that the page store lacks: none in a pre-copy migration, the agent in post-copy.

The agent connects to a unix socket of the lazy-pages daemon's (SOCK_SEQPACKET, one frame a packet), so that an agent that was
restarted can connect again: it is told anew what is wanted. The agent writes pages into the store's files first and says so
afterwards; the bytes never pass through the socket.
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Protocol

from podferry.errors import Bug, PeerMisbehaved
from podferry.memory.kernel.page_size import PAGE

_FRAME = struct.Struct("=B7xQQQ")


class Word(IntEnum):
    """What a frame says."""

    WANT = 1
    """Feeder to agent: a thread waits for these pages; send them next."""
    ARRIVED = 2
    """Agent to daemon: the store has these pages now."""
    ZERO = 3
    """Agent to daemon: these pages are all zero; the store will not get them."""


class Frame(NamedTuple):
    """One word about the addresses `start` up to `end` of a space."""

    word: Word
    address_space: int
    start: int
    end: int

    def encode(self) -> bytes:
        """The frame as a packet."""
        return _FRAME.pack(self.word, self.address_space, self.start, self.end)

    @classmethod
    def decode(cls, packet: bytes) -> Frame:
        """The frame in a packet. Raises `PeerMisbehaved`."""
        try:
            word, address_space, start, end = _FRAME.unpack(packet)
            frame = cls(Word(word), address_space, start, end)
        except (struct.error, ValueError) as error:
            raise PeerMisbehaved.because("the lazy-pages daemon's socket carried an invalid frame", error) from error
        if start % PAGE or end % PAGE or start >= end:
            raise PeerMisbehaved(f"the lazy-pages daemon's socket carried the range {start:#x}-{end:#x}")
        return frame


class PageSource(Protocol):
    """Where missing pages come from."""

    endless: bool
    """Whether more pages may come: what the store lacks is then unknown, not zero."""

    def fileno(self) -> int | None:
        """What to poll for reading before `news`."""

    def want(self, address_space: int, origin: int) -> None:
        """Ask for the page at `origin`; asking twice is free."""

    def news(self) -> Iterator[Frame]:
        """What has been said since: `ARRIVED` and `ZERO`."""

    def close(self) -> None:
        """Nothing is wanted any more."""


class NoSource:
    """The store is complete."""

    endless = False

    def fileno(self) -> int | None:
        """Nothing to poll."""
        return None

    def want(self, address_space: int, origin: int) -> None:
        """A complete store lacks nothing: raises `Bug`."""
        raise Bug(f"the page {origin:#x} of space {address_space} is requested although the page store is complete")

    def news(self) -> Iterator[Frame]:
        """Nothing, ever."""
        return iter(())

    def close(self) -> None:
        """Nothing to close."""


class AgentSource:
    """Listens for the agent at `path`. Without an agent the wanted pages wait: nothing is lost, nothing goes on."""

    endless = True

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._path = path
        self._listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(1)
        self._agent: socket.socket | None = None
        self._poll = select.epoll()
        self._poll.register(self._listener, select.EPOLLIN)
        self._wanted: dict[tuple[int, int], None] = {}
        self._unsent: deque[Frame] = deque()

    def fileno(self) -> int | None:
        """One descriptor for the listener and the agent's connection."""
        return self._poll.fileno()

    def want(self, address_space: int, origin: int) -> None:
        """Ask the agent once, and again whenever it connects anew."""
        if (address_space, origin) not in self._wanted:
            self._wanted[address_space, origin] = None
            self._unsent.append(Frame(Word.WANT, address_space, origin, origin + PAGE))
            self._send()

    def news(self) -> Iterator[Frame]:
        """Accept an agent, and read what it says. Raises `PeerMisbehaved`."""
        with suppress(BlockingIOError):
            agent, _ = self._listener.accept()
            agent.setblocking(False)
            self._part()
            self._agent = agent
            self._poll.register(agent, select.EPOLLIN)
            self._unsent = deque(
                Frame(Word.WANT, address_space, origin, origin + PAGE) for address_space, origin in self._wanted
            )
        self._send()
        while self._agent:
            try:
                packet = self._agent.recv(_FRAME.size + 1)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._part()
                return
            frame = Frame.decode(packet)
            if frame.word is Word.WANT:
                raise PeerMisbehaved(
                    "the agent sent a page request to the lazy-pages daemon, which only answers with pages"
                )
            for key in [
                key for key in self._wanted if key[0] == frame.address_space and frame.start <= key[1] < frame.end
            ]:
                del self._wanted[key]
            yield frame

    def close(self) -> None:
        """Close the socket; the agent reads an end of file: it is no longer needed."""
        self._part()
        self._listener.close()
        self._poll.close()
        self._path.unlink(missing_ok=True)

    def _send(self) -> None:
        """Send what fits, and have the rest sent when there is room."""
        try:
            while self._agent and self._unsent:
                self._agent.send(self._unsent[0].encode())
                self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._part()
        if self._agent:
            self._poll.modify(self._agent, select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0))

    def _part(self) -> None:
        if self._agent:
            self._poll.unregister(self._agent)
            self._agent.close()
            self._agent = None

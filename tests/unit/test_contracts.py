"""The ports' contracts over the fakes of the unit tests, and over what is real without root."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_fakes import FakeChannel, FakePages, SourceNode, TargetNode, page
from contracts.page_channel import PageChannelCase, PageChannelContract
from contracts.remote_pages import ADDRESS_SPACE, ALL, OWED, WRITTEN, RemotePagesCase, RemotePagesContract

from podferry.engine.ports import PageChannel
from podferry.lazypages.page_source import Frame, Word
from podferry.memory.ranges import Runs
from podferry.wire.frames import PAGE
from podferry.workload.page_channel import PACKET, DaemonPageChannel
from podferry.workload.remote_pages import FrozenPages

pytestmark = pytest.mark.unit

# Remote pages.

PROGRAM = f"""
import ctypes, mmap, sys
memory = mmap.mmap(-1, {ALL * PAGE})
for number in [*range({WRITTEN}), *range({OWED}, {ALL})]:
    memory[number * {PAGE}:(number + 1) * {PAGE}] = bytes([number + 1]) * {PAGE}
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


class FakeRemotePages:
    base = 0x7000_0000_0000

    def __init__(self) -> None:
        self.node = SourceNode()
        self.node.memory = {ADDRESS_SPACE: {self.base + number * PAGE: self.content(number) for number in range(ALL)}}
        self.pages = FakePages({ADDRESS_SPACE: self.node}, {ADDRESS_SPACE: Runs.of(self.base, self.base + OWED * PAGE)})

    def content(self, number: int) -> bytes:
        return bytes(PAGE) if WRITTEN <= number < OWED else page(number)

    def end(self) -> None:
        self.node.crash()


class RealRemotePages:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        assert process.stdout is not None
        self.base = int(process.stdout.readline())
        process.send_signal(signal.SIGSTOP)
        self.pages = FrozenPages(
            {ADDRESS_SPACE: process.pid}, {ADDRESS_SPACE: Runs.of(self.base, self.base + OWED * PAGE)}
        )

    def content(self, number: int) -> bytes:
        return bytes(PAGE) if WRITTEN <= number < OWED else bytes([number + 1]) * PAGE

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class TestFakePages(RemotePagesContract):
    @pytest.fixture
    def case(self) -> RemotePagesCase:
        return FakeRemotePages()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the pagemap of another process")
class TestFrozenPages(RemotePagesContract):
    @pytest.fixture
    def case(self) -> Iterator[RemotePagesCase]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", PROGRAM], **pipes) as process:  # type: ignore[call-overload]
            case = RealRemotePages(process)
            yield case
            case.pages.close()
            process.kill()


# Page channels.


class FakeDaemons:
    def __init__(self) -> None:
        self.nodes = [HearingNode(number) for number in (0, 1)]

    def connect(self) -> PageChannel:
        return FakeChannel(self.nodes)

    def want(self, container: int, pid: int, at: int) -> None:
        self.nodes[container].absent.add((pid, at))
        self.nodes[container].wants.append((pid, at))
        self.nodes[container].tell()

    def end(self, container: int) -> None:
        self.nodes[container].daemon = False
        self.nodes[container].tell()

    def heard(self, container: int) -> list[tuple[str, int, int, int]]:
        return self.nodes[container].heard


class HearingNode(TargetNode):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.daemon = True
        self.heard: list[tuple[str, int, int, int]] = []

    def arrived(self, space: int, start: int, end: int, *, zero: bool = False) -> None:
        self.heard.append(("zero" if zero else "arrived", space, start, end))


class RealDaemons:
    def __init__(self, directory: Path) -> None:
        self.paths = [directory / f"{number}.sock" for number in (0, 1)]
        self.listening = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in self.paths]
        self.ends: list[socket.socket | None] = [None, None]
        for one, path in zip(self.listening, self.paths, strict=True):
            one.bind(str(path))
            one.listen()

    def connect(self) -> PageChannel:
        channel = DaemonPageChannel(self.paths)
        self.ends = [one.accept()[0] for one in self.listening]
        return channel

    def want(self, container: int, pid: int, at: int) -> None:
        end = self.ends[container]
        assert end is not None
        end.send(Frame(Word.WANT, pid, at, at + PAGE).encode())

    def end(self, container: int) -> None:
        self.listening[container].close()
        if (end := self.ends[container]) is not None:
            end.close()

    def heard(self, container: int) -> list[tuple[str, int, int, int]]:
        end, found = self.ends[container], []
        assert end is not None
        end.setblocking(False)
        try:
            while packet := end.recv(PACKET):
                frame = Frame.decode(packet)
                found.append((frame.word.name.lower(), frame.address_space, frame.start, frame.end))
        except BlockingIOError:
            pass
        return found

    def close(self) -> None:
        for one in [*self.listening, *self.ends]:
            if one is not None:
                one.close()


class TestFakeChannel(PageChannelContract):
    @pytest.fixture
    def case(self) -> PageChannelCase:
        return FakeDaemons()


class TestFeederChannel(PageChannelContract):
    @pytest.fixture
    def case(self, tmp_path: Path) -> Iterator[PageChannelCase]:
        daemons = RealDaemons(tmp_path)
        yield daemons
        daemons.close()

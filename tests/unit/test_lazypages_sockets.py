"""The lazy-pages daemon's two sockets and its status file, without a kernel's userfaultfd."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from podferry.errors import Bug, Failed, PeerMisbehaved
from podferry.lazypages import daemon_status
from podferry.lazypages.copying import PageIndex
from podferry.lazypages.criu_socket import FINISHED, SOCKET, CriuSocket, Restored, RestoreFinished
from podferry.lazypages.daemon_status import DaemonState, DaemonStatus, StatusFile, read_status
from podferry.lazypages.page_source import AgentSource, Frame, NoSource, Word
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.ranges import Runs

pytestmark = pytest.mark.unit


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A directory whose path is longer than a socket's name may be."""
    path = tmp_path / ("long-" * 30)
    path.mkdir()
    return path


@pytest.fixture
def listening(work: Path) -> Iterator[CriuSocket]:
    criu = CriuSocket(work)
    yield criu
    criu.close()


def connect(criu: CriuSocket, work: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    here = os.open(work, os.O_PATH)
    connection.connect(f"/proc/self/fd/{here}/{SOCKET}")
    os.close(here)
    criu.accept()
    return connection


def send_descriptor(connection: socket.socket, *descriptors: int) -> None:
    connection.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def test_tasks_zombies_and_the_end_are_told_apart(listening: CriuSocket, work: Path) -> None:
    reader, writer = os.pipe()
    with connect(listening, work) as criu:
        assert not (work / SOCKET).exists()
        pid = struct.pack("=i", 71)
        criu.send(struct.pack("=i", -70) + pid[:1])
        assert list(listening.events()) == []
        criu.send(pid[1:])
        assert list(listening.events()) == []
        send_descriptor(criu, writer)
        criu.send(struct.pack("=I", FINISHED))
        restored, finished = listening.events()
    assert isinstance(restored, Restored)
    assert isinstance(finished, RestoreFinished)
    assert restored.pid == 71
    os.write(restored.uffd, b"x")
    assert os.read(reader, 1) == b"x"
    for fd in (reader, writer, restored.uffd):
        os.close(fd)


@pytest.mark.parametrize("word", [b"", struct.pack("=i", 0), struct.pack("=i", 1 << 23), struct.pack("=i", 5) + b"\0"])
def test_a_restore_that_goes_wrong_is_a_failure(listening: CriuSocket, work: Path, word: bytes) -> None:
    with connect(listening, work) as criu:
        criu.send(word)
        criu.shutdown(socket.SHUT_WR)
        with pytest.raises(Failed):
            list(listening.events())


def test_a_task_has_one_descriptor(listening: CriuSocket, work: Path) -> None:
    with connect(listening, work) as criu:
        criu.send(struct.pack("=i", 5))
        send_descriptor(criu, 0, 1)
        before = set(Path("/proc/self/fd").iterdir())
        with pytest.raises(Failed, match="without its userfaultfd"):
            list(listening.events())
        assert set(Path("/proc/self/fd").iterdir()) == before


def agent_of(path: Path) -> socket.socket:
    agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.connect(str(path))
    return agent


def test_an_agent_hears_what_is_wanted_also_when_it_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "source"
    source = AgentSource(path)
    source.want(7, PAGE)
    for _ in range(2):
        with agent_of(path) as agent:
            assert list(source.news()) == []
            assert Frame.decode(agent.recv(64)) == (Word.WANT, 7, PAGE, 2 * PAGE)
            source.want(7, PAGE)
            source.want(8, PAGE)
            assert Frame.decode(agent.recv(64)) == (Word.WANT, 8, PAGE, 2 * PAGE)
            arrived = Frame(Word.ARRIVED, 8, 0, 4 * PAGE)
            agent.send(arrived.encode())
            assert list(source.news()) == [arrived]
        assert list(source.news()) == []
    with agent_of(path) as agent:
        list(source.news())
        source.close()
        assert Frame.decode(agent.recv(64)).word is Word.WANT
        assert agent.recv(64) == b""
    assert not path.exists()


def test_more_is_wanted_than_the_socket_takes_at_once(tmp_path: Path) -> None:
    source = AgentSource(tmp_path / "source")
    for page in range(2000):
        source.want(7, page * PAGE)
    with agent_of(tmp_path / "source") as agent:
        list(source.news())
        wanted = []
        while len(wanted) < 2000:
            wanted.append(Frame.decode(agent.recv(64)).start // PAGE)
            list(source.news())
    assert wanted == list(range(2000))
    source.close()


@pytest.mark.parametrize(
    "packet",
    [
        b"short",
        Frame(Word.ARRIVED, 1, 0, PAGE).encode() + b"\0",
        bytes([9]) + Frame(Word.ARRIVED, 1, 0, PAGE).encode()[1:],
        Frame(Word.ARRIVED, 1, 1, PAGE).encode(),
        Frame(Word.ZERO, 1, PAGE, PAGE).encode(),
        Frame(Word.WANT, 1, 0, PAGE).encode(),
    ],
)
def test_an_agent_that_talks_nonsense_is_refused(tmp_path: Path, packet: bytes) -> None:
    source = AgentSource(tmp_path / "source")
    with agent_of(tmp_path / "source") as agent:
        agent.send(packet)
        with pytest.raises(PeerMisbehaved):
            list(source.news())
    source.close()


def test_a_complete_store_is_asked_for_nothing() -> None:
    with pytest.raises(Bug):
        NoSource().want(7, PAGE)


def test_a_status_survives_the_file(tmp_path: Path) -> None:
    report = StatusFile(tmp_path / "status")
    report.status.bytes_fed = 4096
    report.enter(DaemonState.FILLING)
    assert read_status(tmp_path / "status") == DaemonStatus(state=DaemonState.FILLING, bytes_fed=4096)
    assert [path.name for path in tmp_path.iterdir()] == ["status"]
    (tmp_path / "status").write_text('{"state": "odd"}')
    with pytest.raises(ValueError, match="odd"):
        read_status(tmp_path / "status")


def test_a_status_without_room_ends_nobody_and_is_written_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's memory depends on the daemon, which would end with the error."""
    report, full, slept = StatusFile(tmp_path / "status"), [True], []
    replace_file = daemon_status.replace_file

    def no_room(path: Path, content: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(path, content)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        full.clear()

    monkeypatch.setattr(daemon_status, "replace_file", no_room)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(OSError, match="No space"):
        report.enter(DaemonState.LISTENING)  # nothing depends on it yet
    report.enter(DaemonState.FILLING)
    report.tick()
    report.enter(DaemonState.DONE)
    assert not (tmp_path / "status").exists()
    report.insist()
    assert slept
    assert read_status(tmp_path / "status").state is DaemonState.DONE


def test_pages_are_numbered_in_order_of_address() -> None:
    runs = Runs([(2 * PAGE, 4 * PAGE), (8 * PAGE, 9 * PAGE), (10 * PAGE, 13 * PAGE)])
    index = PageIndex(runs)
    addresses = [address for start, end in runs for address in range(start, end, PAGE)]
    assert index.count == len(addresses)
    assert [index.number(address) for address in addresses] == list(range(6))
    assert [index.place(number) for number in range(6)] == list(zip(addresses, [2, 1, 1, 3, 2, 1], strict=True))
    for start in range(15):
        for end in range(start, 15):
            numbers = [n for first, last in index.numbers(start * PAGE, end * PAGE) for n in range(first, last)]
            assert [addresses[n] for n in numbers] == [a for a in addresses if start * PAGE <= a < end * PAGE]
    for page in (0, 4, 9, 13):
        with pytest.raises(KeyError):
            index.number(page * PAGE)

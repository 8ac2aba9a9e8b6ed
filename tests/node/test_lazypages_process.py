"""The lazy-pages daemon as a process: what it prints, when it ends, what it holds on to, and what a job sees when it fails."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lazypages_job import (
    EVENTS,
    MADV_DONTFORK,
    MADV_WIPEONFORK,
    MOVED,
    PAGE,
    check,
    content,
    finish,
    hand_over,
    libc,
    map_at,
    write_images,
)

from podferry.lazypages.daemon_status import DaemonState, DaemonStatus, read_status
from podferry.lazypages.page_source import Frame, Word
from podferry.memory.kernel import uffd
from podferry.memory.store.page_store import PageStore
from podferry.node.process import spawn

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: userfaultfd with fork events"),
]

PID, SEED, PAGES = 42, 7, 64
SIZE = PAGES * PAGE


class Daemon:
    """A lazy-pages daemon in a process of its own, over the store of one process."""

    def __init__(self, place: Path, *options: str) -> None:
        self.place = place
        argv = [sys.executable, "-m", "podferry.lazypages.daemon", "--work", place, "--images", place]
        argv += ["--store", place / "store", "--status", place / "status", *options]
        environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
        self.process = spawn(argv, env=environment, stdout=subprocess.PIPE, stderr=(place / "stderr").open("wb"))
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60)[0], (place / "stderr").read_text()
        assert self.process.stdout.readline() == b"ready\n", (place / "stderr").read_text()

    @property
    def status(self) -> DaemonStatus:
        return read_status(self.place / "status")

    def child(self) -> int:
        """The process that feeds; the one we have started is its descriptor holder."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def wait(self, *states: DaemonState) -> None:
        """Until the status shows one of these states."""
        for _ in range(1000):
            if self.status.state in states:
                return
            threading.Event().wait(0.01)
        raise AssertionError(f"never {states}: {self.status}")

    def end(self) -> int:
        return self.process.wait(30)


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="feeder-"))
    write_images(path, {PID: [(MOVED, MOVED + SIZE)]})
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def begin(*options: str) -> Daemon:
        started.append(Daemon(place, *options))
        return started[-1]

    yield begin
    for daemon in started:
        daemon.process.kill()
        daemon.process.wait()
        if daemon.process.stdout:
            daemon.process.stdout.close()


def make_store(place: Path, pages: range = range(PAGES), *, complete: bool = True) -> None:
    store = PageStore.create(place / "store")
    for page in pages:
        store.write(PID, MOVED + page * PAGE, content(SEED, page), 0)
    if complete:
        store.complete(PID)
    store.sync()
    store.close()


class Job:
    """A forked process that does what it is told, by numbers of pages: it answers with the first bytes, once it has them."""

    def __init__(self, place: Path, setup: Callable[[], None] = lambda: None) -> None:
        self._mine, theirs = socket.socketpair()
        self._mine.settimeout(60)
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            self.handed_over = self._mine.recv(1) == b"!"
            return
        ended = 1
        try:
            self._mine.close()
            map_at(MOVED, SIZE)
            setup()
            connection = hand_over(place, PID, MOVED, SIZE)
            theirs.send(b"!")
            while order := theirs.recv(1):
                if order == b"f":
                    finish(connection)
                elif order == b"k":
                    if (child := os.fork()) == 0:
                        continue
                    os.waitpid(child, 0)
                    continue
                else:
                    theirs.send(ctypes.string_at(MOVED + order[0] % PAGES * PAGE, 8))
                    continue
                theirs.send(b"!")
            ended = 0
        except BrokenPipeError:
            pass  # the lazy-pages daemon refused: a restore ends then
        finally:
            os._exit(ended)

    def finish(self) -> None:
        self._mine.send(b"f")
        assert self._mine.recv(1) == b"!"

    def ask(self, page: int) -> None:
        self._mine.send(bytes([128 + page]))

    def answers(self, within: float = 10) -> bytes | None:
        """The answer to `ask`, or None: it waits for the page."""
        ready, _, _ = select.select([self._mine], [], [], within)
        return self._mine.recv(8) if ready else None

    def fork(self) -> None:
        """What follows is done by a forked child."""
        self._mine.send(b"k")

    def kill(self) -> None:
        """End it, and wait for that; a second time nothing happens."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._mine.close()
            self.pid = 0


@contextmanager
def job(place: Path, setup: Callable[[], None] = lambda: None) -> Iterator[Job]:
    one = Job(place, setup)
    try:
        yield one
    finally:
        one.kill()


def test_it_feeds_and_ends(place: Path, start: Callable[..., Daemon]) -> None:
    make_store(place)
    daemon = start()
    assert daemon.status.state is DaemonState.LISTENING
    with job(place) as one:
        one.ask(5)
        assert one.answers() == content(SEED, 5)[:8]
        daemon.wait(DaemonState.RESTORING)
        assert daemon.status.bytes_left == 0 or daemon.status.bytes_fed > 0
        one.finish()
        assert daemon.end() == 0
        one.ask(63)
        assert one.answers() == content(SEED, 63)[:8]
    assert (daemon.status.state, daemon.status.bytes_fed, daemon.status.bytes_left) == (DaemonState.DONE, SIZE, 0)


def test_it_ends_when_told_before_anything_depends_on_it(place: Path, start: Callable[..., Daemon]) -> None:
    make_store(place)
    daemon = start()
    daemon.process.terminate()
    assert daemon.end() == 1


def test_a_restore_that_fails_ends_it(place: Path, start: Callable[..., Daemon]) -> None:
    make_store(place)
    daemon = start()
    with job(place) as one:
        daemon.wait(DaemonState.RESTORING)
        one.kill()
        assert daemon.end() == 1
    assert daemon.status.state is DaemonState.FAILED
    assert "the restore ended" in json.dumps(daemon.status.error)


@pytest.mark.parametrize("flaw", ["no store", "incomplete", "no images"])
def test_what_it_cannot_feed_it_refuses_before_the_task_runs(
    place: Path, start: Callable[..., Daemon], flaw: str
) -> None:
    if flaw != "no store":
        make_store(place, range(1, PAGES), complete=flaw != "incomplete")
    if flaw == "no images":
        (place / f"pagemap-{PID}.img").unlink()
    daemon = start()
    with job(place):
        assert daemon.end() == 1
    assert daemon.status.state is DaemonState.FAILED
    assert daemon.status.error


def test_a_failure_while_filling_never_shows_as_zeroes(place: Path, start: Callable[..., Daemon]) -> None:
    """A store whose file was cut short: the job waits for its page, the lazy-pages daemon for SIGTERM."""
    make_store(place)
    daemon = start()
    with job(place) as one:
        daemon.wait(DaemonState.RESTORING)
        os.truncate(place / "store" / f"space-{PID}", 0)
        one.finish()
        daemon.wait(DaemonState.FAILED)
        assert "should hold" in json.dumps(daemon.status.error)
        one.ask(9)
        assert one.answers(0.5) is None
        assert daemon.process.poll() is None
        one.kill()
        daemon.process.terminate()
        assert daemon.end() == 1


def test_a_feeder_that_is_killed_leaves_no_zeroes_behind(place: Path, start: Callable[..., Daemon]) -> None:
    make_store(place, range(32), complete=False)
    daemon = start("--source", str(place / "source"))
    with job(place) as one:
        one.finish()
        one.ask(3)
        assert one.answers() == content(SEED, 3)[:8]
        os.kill(daemon.child(), signal.SIGKILL)
        daemon.wait(DaemonState.FAILED)
        assert "SIGKILL" in json.dumps(daemon.status.error)
        one.ask(40)
        assert one.answers(0.5) is None
        one.kill()
        daemon.process.terminate()
        assert daemon.end() in (1, -signal.SIGTERM)


def test_it_does_not_end_while_a_task_is_owed_pages(place: Path, start: Callable[..., Daemon]) -> None:
    make_store(place, range(32), complete=False)
    daemon = start("--source", str(place / "source"))
    with job(place) as one:
        one.finish()
        daemon.wait(DaemonState.FILLING)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            daemon.process.send_signal(number)
        one.ask(3)
        assert one.answers() == content(SEED, 3)[:8]
        one.kill()
        agent = connect(place / "source")
        agent.send(Frame(Word.ZERO, PID, 0, MOVED + SIZE).encode())
        assert daemon.end() == 0
        agent.close()


def connect(path: Path) -> socket.socket:
    agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.settimeout(10)
    agent.connect(str(path))
    return agent


def test_pages_that_arrive_later_are_asked_for_and_fed(place: Path, start: Callable[..., Daemon]) -> None:
    make_store(place, range(16), complete=False)
    daemon = start("--source", str(place / "source"))
    store = PageStore.open(place / "store")
    with job(place) as one:
        one.finish()
        one.ask(50)
        agent = connect(place / "source")
        wanted = Frame.decode(agent.recv(64))
        assert wanted == (Word.WANT, PID, MOVED + 50 * PAGE, MOVED + 51 * PAGE)
        agent.close()
        assert one.answers(0.2) is None
        agent = connect(place / "source")
        assert Frame.decode(agent.recv(64)) == wanted
        store.write(PID, wanted.start, content(SEED, 50), 1)
        agent.send(Frame(Word.ARRIVED, PID, wanted.start, wanted.end).encode())
        assert one.answers() == content(SEED, 50)[:8]
        one.ask(20)
        assert Frame.decode(agent.recv(64)).start == MOVED + 20 * PAGE
        one.fork()
        for page in [*range(16, 20), *range(21, 50)]:
            store.write(PID, MOVED + page * PAGE, content(SEED, page), 1)
            agent.send(Frame(Word.ARRIVED, PID, MOVED + page * PAGE, MOVED + (page + 1) * PAGE).encode())
        agent.send(Frame(Word.ZERO, PID, 0, MOVED + SIZE).encode())
        assert one.answers() == bytes(8)
        for page in (30, 50, 51):
            one.ask(page)
            assert one.answers() == (content(SEED, page)[:8] if page < 51 else bytes(8))
        assert daemon.end() == 0
        assert agent.recv(64) == b""
        agent.close()
    store.close()


def test_a_task_that_ends_meanwhile_is_let_go(place: Path, start: Callable[..., Daemon]) -> None:
    make_store(place)
    daemon = start()
    with job(place) as one:
        daemon.wait(DaemonState.RESTORING)
        os.kill(daemon.child(), signal.SIGSTOP)
        one.finish()
        one.kill()
        os.kill(daemon.child(), signal.SIGCONT)
        assert daemon.end() == 0
    assert (daemon.status.bytes_left, daemon.status.tasks) == (0, 0)


@pytest.mark.parametrize("advice", [MADV_WIPEONFORK, MADV_DONTFORK])
def test_what_a_child_does_not_inherit_it_is_not_fed(place: Path, start: Callable[..., Daemon], advice: int) -> None:
    """As the images say: page 0 to 7 have this advice. They are still missing in the parent when it forks."""
    make_store(place, range(8, PAGES), complete=False)
    areas = [(MOVED, MOVED + 8 * PAGE, 1 << advice), (MOVED + 8 * PAGE, MOVED + SIZE, 0)]
    write_images(place, {PID: [(MOVED, MOVED + SIZE)]}, {PID: areas})
    daemon = start("--source", str(place / "source"))
    with job(place, lambda: check(libc.madvise(MOVED, 8 * PAGE, advice))) as one:
        one.finish()
        one.fork()
        one.ask(20)
        assert one.answers() == content(SEED, 20)[:8]
        if advice == MADV_WIPEONFORK:
            one.ask(3)
            assert one.answers() == bytes(8)
        store = PageStore.open(place / "store")
        store.write(PID, MOVED, b"".join(content(SEED, page) for page in range(8)), 1)
        agent = connect(place / "source")
        agent.send(Frame(Word.ARRIVED, PID, MOVED, MOVED + 8 * PAGE).encode())
        assert daemon.end() == 0
        agent.close()
        store.close()
        if advice == MADV_WIPEONFORK:
            one.ask(4)
            assert one.answers() == bytes(8)


def test_the_kernel_has_what_the_lazy_pages_daemon_needs() -> None:
    fd = uffd.create()
    assert uffd.api(fd, EVENTS) & EVENTS == EVENTS
    assert not uffd.changing(fd)
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert uffd.copy(fd, MOVED, ctypes.addressof(ctypes.c_char.from_buffer(memory)), PAGE).done == 0
    os.close(fd)

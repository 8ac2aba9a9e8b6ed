"""What a node promises to migrations on their way: never more than there is, whoever asks in whatever order, and over a restart."""

from __future__ import annotations

import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Fault, Rig, die
from hypothesis import given
from hypothesis import strategies as st

from podferry.core.phases import SourcePhase, TargetPhase
from podferry.core.preflight import NoRoom
from podferry.errors import Failed
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.store.page_store import PageStore
from podferry.model import Mode
from podferry.node import own_tmpfs
from podferry.node.process import Completed
from podferry.snapshotter.program import listen
from podferry.wire.messages import Offer
from podferry.workload.account import RESERVE, STEP, Account, Room, needed

pytestmark = pytest.mark.unit

MIB = 1 << 20
GIB = 1 << 30


def account(**free: int) -> Account:
    room = Room(**{"memory": 64 * GIB, "run": 64 * GIB, "disk": 64 * GIB} | free)
    return Account(lambda: room)


@pytest.mark.parametrize("kind", ["memory", "run", "disk"])
def test_what_is_promised_to_one_is_not_promised_to_another(kind: str) -> None:
    writer = account(**{kind: 10 * GIB})
    writer.promise("first", Room(**{kind: 6 * GIB}))
    with pytest.raises(NoRoom) as refused:
        writer.promise("second", Room(**{kind: 5 * GIB}))
    asked = 5 * GIB + getattr(RESERVE, kind)
    assert str(asked >> 20) in refused.value.why
    assert f"{10 * 1024} MiB are free" in refused.value.why
    assert f"{6 * 1024} MiB of that are promised to 1 other" in refused.value.why
    assert refused.value.remedy
    writer.release("first")
    writer.promise("second", Room(**{kind: 5 * GIB}))


def test_what_has_arrived_is_not_counted_twice() -> None:
    free = [Room(10 * GIB, 10 * GIB, 10 * GIB)]
    writer = Account(lambda: free[0])
    first = writer.promise("first", Room(6 * GIB, 6 * GIB, 0))
    first.take(run=6 * GIB)
    free[0] = Room(4 * GIB, 4 * GIB, 10 * GIB)  # it is here now
    writer.promise("second", Room(3 * GIB, 3 * GIB, 0))


def test_a_job_that_grows_asks_for_more_and_is_refused_what_belongs_to_others() -> None:
    writer = account(run=3 * GIB)
    growing, other = writer.promise("growing", Room(run=GIB)), writer.promise("other", Room(run=GIB))
    growing.take(run=GIB)
    growing.take(run=PAGE)
    assert growing.room.run == GIB + PAGE + STEP
    other.take(run=GIB)
    free = [Room(64 * GIB, 3 * GIB, 64 * GIB)]
    writer = Account(lambda: free[0])
    growing, other = writer.promise("growing", Room(run=GIB)), writer.promise("other", Room(run=2 * GIB))
    growing.take(run=GIB)
    other.take(run=GIB)
    free[0] = Room(64 * GIB, GIB, 64 * GIB)  # all of it is the other's
    with pytest.raises(NoRoom, match="too little room"):
        growing.take(run=PAGE)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.booleans()), max_size=60))
def test_never_is_more_promised_than_there_is(steps: list[tuple[int, int, bool]]) -> None:
    """Whatever is promised, used and given back: what the promises may still use is free."""
    total, used = 100 * MIB, dict[str, int]()
    writer = Account(lambda: Room(1 << 50, total - sum(used.values()), 1 << 50))
    for number, size, use in steps:
        id = str(number)
        try:
            if use and id in writer._promises:
                promise = writer._promises[id]
                more = min(size * MIB, promise.open.run)
                promise.take(run=more)
                used[id] = used.get(id, 0) + more
            elif id in writer._promises:
                writer.release(id)
                used.pop(id, None)
            else:
                writer.promise(id, Room(run=size * MIB))
        except NoRoom:
            continue
        assert sum(one.open.run for one in writer._promises.values()) <= total - sum(used.values())


def test_a_store_says_how_it_grows_before_it_does(tmp_path: Path) -> None:
    said: list[int] = []
    store = PageStore.create(tmp_path / "store", said.append)
    store.write(1, 0, bytes(4 * PAGE), 1)
    store.write(1, 2 * PAGE, bytes(4 * PAGE), 2)
    store.write(1, 0, bytes(PAGE), 3)
    store.drop(1, 0, 3 * PAGE)
    assert said == [4 * PAGE, 2 * PAGE, -3 * PAGE]

    def full(size: int) -> None:
        raise Failed("no more")

    store.grows = full
    with pytest.raises(Failed):
        store.write(2, 0, bytes(PAGE), 1)
    assert store.totals(1).pages == 3
    store.close()


def test_post_copy_needs_room_for_what_waits_only() -> None:
    facts = {
        "container": {
            "id": "job",
            "image": "i",
            "binary": "runc",
            "pids": [],
            "host_namespaces": [],
            "devices": [],
            "unsaved": [],
            "binds": [],
            "connections": [],
            "stdio": [],
            "memory": None,
            "anonymous": 5,
            "shared": 2,
            "tmpfs": 1,
            "upper": 7,
        }
    }
    offer = Offer("m", "job", Mode.LIVE, {}, facts, 5, 7)
    assert needed(offer) == Room(8, 8, 7)
    assert needed(Offer("m", "job", Mode.POSTCOPY, {}, facts, 5, 7)) == Room(8, 3, 7)


# In the agent.


def test_an_offer_for_which_there_is_no_room_is_refused_with_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    rig.free = Room(0, 0, 0)
    rig.move(Mode.LIVE, monkeypatch)
    assert (rig.phases("a"), rig.phases("b")) == (["check", "refused"], [])
    error = rig.records["a"]["error"]
    assert error["code"] == NoRoom.code
    assert "0 MiB are free" in error["why"]


@pytest.mark.parametrize(
    "faults", [[], [Fault("target", "breakpoint prepared", die)], [Fault("target", "breakpoint fill", die)]]
)
def test_a_promise_is_held_from_the_accept_to_the_end(
    faults: list[Fault], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by an agent that was restarted; and nothing stays promised when all has ended."""
    held: list[tuple[str, bool]] = []

    def look(rig: Rig) -> None:
        agent = rig.agents["b"]
        held.append(
            (rig.phase("b"), agent.migrations.account.to_dict() == {rig.id: {"memory": 1, "run": 1, "disk": 1}})
        )

    gates = [
        Fault("target", f"breakpoint {phase}", look, nth=n)
        for phase in ("prepared", "ready", "resume", "fill")
        for n in (1, 2)
    ]
    rig = Rig(tmp_path, [*gates, *faults]).move(Mode.LIVE, monkeypatch)
    assert held and all(ok for _, ok in held), held
    assert rig.agents["b"].migrations.account.to_dict() == {}
    assert rig.phase("a") in (SourcePhase.COMPLETED, SourcePhase.ROLLED_BACK)
    assert rig.phase("b") in (TargetPhase.DONE, TargetPhase.GAVE_UP)
    assert rig.restarts == len(faults)


# The tmpfs.


def test_memory_on_its_way_has_a_tmpfs_of_its_own_without_swap_where_the_kernel_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def mount(argv: list[Any], **_: Any) -> Completed:
        words = [str(word) for word in argv]
        asked.append(words)
        new = "noswap" not in words[words.index("-o") + 1]
        return Completed(words, 0 if new else 32, "", "" if new else "tmpfs: Unknown parameter 'noswap'")

    monkeypatch.setattr(own_tmpfs, "run", mount)
    run = tmp_path / "run"
    assert own_tmpfs.ensure(run, "75%") == ""
    assert [words[words.index("-o") + 1] for words in asked] == ["mode=700,size=75%,noswap", "mode=700,size=75%"]
    (run / "agent.sock").touch()
    (run / "incoming").mkdir()
    assert own_tmpfs.ensure(run) == ""
    (run / "incoming" / "job").mkdir()
    before = len(asked)
    assert "incoming" in own_tmpfs.ensure(run), "a job may wait there: it must not be hidden"
    assert len(asked) == before
    assert own_tmpfs.ensure(Path("/dev/shm")) == "", "it is a file system of its own"


def test_a_tmpfs_that_two_programs_ask_for_at_once_is_mounted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent and podferry-snapshotter start together: what the second one mounted would hide what the first has put there."""
    run, together = tmp_path / "run", threading.Barrier(2)
    mounted: list[Path] = []

    def mount(argv: list[Any], **_: Any) -> Completed:
        with suppress(threading.BrokenBarrierError):
            together.wait(0.5)
        mounted.append(run)
        return Completed([], 0, "", "")

    monkeypatch.setattr(own_tmpfs, "run", mount)
    monkeypatch.setattr(own_tmpfs, "_is_own", lambda seen: bool(mounted))
    with ThreadPoolExecutor(2) as both:
        assert list(both.map(own_tmpfs.ensure, [run, run])) == ["", ""]
    assert mounted == [run]


def test_the_snapshotters_socket_is_made_in_the_tmpfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket beneath it would keep the tmpfs away for good: what is there must not be hidden."""
    there: list[bool] = []

    def ensure(directory: Path) -> str:
        there.append((directory / "snapshotter.sock").exists())
        return ""

    class Server:
        def add_insecure_port(self, address: str) -> None:
            Path(address.removeprefix("unix://")).touch()

    monkeypatch.setattr(own_tmpfs, "RUN", str(tmp_path))
    monkeypatch.setattr(own_tmpfs, "ensure", ensure)
    listen(Server(), tmp_path / "snapshotter.sock")  # type: ignore[arg-type]
    assert there == [False]
    assert (tmp_path / "snapshotter.sock").exists()


def test_the_tmpfs_stays_under_the_snapshotters_socket(tmp_path: Path) -> None:
    done = ["sh", "-ec", own_tmpfs.UNMOUNT, "sh"]
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(tmp_path / "snapshotter.sock"))
        asked = subprocess.run(["bash", "-x", *done[1:], tmp_path], check=False, capture_output=True, text=True)
    assert asked.returncode != 0
    assert "grep" not in asked.stderr
    (tmp_path / "snapshotter.sock").unlink()
    assert (
        "grep"
        in subprocess.run(["bash", "-x", *done[1:], tmp_path], check=False, capture_output=True, text=True).stderr
    )

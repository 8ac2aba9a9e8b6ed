"""Freeze, hold, commit and roll back real containers, with real CRIU and runc, on the cgroups that a node has."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from node_job import COUNT, Arrival, Job

from podferry.core.facts import NodeFacts
from podferry.criu.checkpoint import CheckpointFailed, HeldDump
from podferry.criu.incoming import Incoming
from podferry.criu.processes import Process, children_of
from podferry.errors import Refused, TimedOut
from podferry.node import terminals
from podferry.node.cgroup import Cgroup, CgroupFailed, Frozen, cgroup_kind
from podferry.node.containerd import Containerd
from podferry.node.containerd_errors import ContainerdFailed
from podferry.node.jobfacts import ContainerFacts, container_facts
from podferry.node.process import run, spawn
from podferry.node.records import Container, TaskStatus, upper_dir
from podferry.node.stdio import drained
from podferry.workload.nodefacts import node_facts

pytestmark = pytest.mark.node

MEMORY = """
import hashlib, time
data = bytearray(range(256)) * 4096 * 32
n = 0
while True:
    data[n * 4096 % len(data)] = n % 251
    if n % 10 == 0:
        print(n, hashlib.sha256(data).hexdigest(), flush=True)
    n += 1
    time.sleep(0.002)
"""


def stands_still(job: Job) -> None:
    """Two looks with a wait between that lets a running job print."""
    before = job.lines()
    signal.sigtimedwait([], 0.1)
    assert job.lines() == before


@pytest.mark.smoke
def test_freeze_and_thaw(job: Job) -> None:
    job.start()
    job.wait_lines()
    cgroup = job.cgroup
    assert Cgroup.of(job.task.pid) == cgroup
    assert job.task.pid in cgroup.pids()
    for _ in range(20):
        cgroup.freeze()
        assert cgroup.state() is Frozen.FROZEN
        cgroup.thaw()
        assert cgroup.state() is Frozen.THAWED
    cgroup.freeze()
    drained(job.task.pid)
    stands_still(job)
    cgroup.thaw()
    job.wait_lines()
    assert (cgroup.memory_usage() or 1) > 0


def test_throttling_gives_the_quota_back(job: Job) -> None:
    job.start()
    cgroup = job.cgroup
    before = cgroup.cpu_quota()
    cgroup.set_cpu_quota(before.scaled(0.1, 1.0))
    assert cgroup.cpu_quota().quota == before.period // 10
    cgroup.set_cpu_quota(before)
    assert cgroup.cpu_quota() == before


def test_a_slowed_job_gets_its_share_of_what_it_used_not_of_all_processors(job: Job) -> None:
    job.start("while True: pass")
    cgroup = job.cgroup

    def stopped() -> int:
        assert cgroup.cpu is not None
        return int(dict(line.split() for line in (cgroup.cpu / "cpu.stat").read_text().splitlines())["nr_throttled"])

    since, before = time.monotonic(), cgroup.cpu_seconds()
    time.sleep(1)
    used = (cgroup.cpu_seconds() - before) / (time.monotonic() - since)
    assert 0 < used < 1.5, "one thread"
    whole = cgroup.cpu_quota()
    slowed = whole.scaled(0.25, used)
    assert slowed.quota == pytest.approx(0.25 * used * slowed.period, abs=1000)
    never, deadline = stopped(), time.monotonic() + 30
    cgroup.set_cpu_quota(slowed)
    while stopped() < never + 3:
        assert time.monotonic() < deadline, "the quota stops it never"
        time.sleep(0.1)
    cgroup.set_cpu_quota(whole)


def test_a_kill_leaves_nothing(job: Job) -> None:
    job.start("import os, time\nfor _ in range(5): os.fork()\nprint(1, flush=True)\ntime.sleep(1000)")
    job.wait_lines(32)  # until then it may wait for its program, uninterruptibly, on the share
    cgroup = job.cgroup
    cgroup.kill()
    assert job.client.wait_task(job.id, 20) == 137
    assert cgroup.pids() == ()
    cgroup.kill()


@pytest.mark.parametrize("after", ["ready", "restart of the agent", "death of CRIU", "restart and death of CRIU"])
def test_rollback(job: Job, after: str) -> None:
    job.start()
    job.wait_lines()
    held = job.held()
    stands_still(job)
    assert held.alive()
    if "restart" in after:
        held = HeldDump.from_dict(held.to_dict())
    if "death" in after:
        assert held.criu is not None
        held.criu.kill()
        assert held.criu.wait(10)
        stands_still(job)
    before = job.lines()
    held.rollback()
    job.wait_lines()
    lines = job.lines()
    assert [int(line) for line in lines] == list(range(len(lines))), "it went on where it was"
    assert len(before) < len(job.lines())
    assert job.cgroup.state() is Frozen.THAWED
    assert job.task.status is TaskStatus.RUNNING
    held.rollback()
    job.wait_lines()
    again = job.held()
    again.rollback()
    job.wait_lines()


def at_the_gate(held: HeldDump, timeout: float = 20.0) -> int:
    """Wait until runc has come to the request to dump; returns the pid of the `criu` that holds it."""
    assert held.runc is not None
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for pid in children_of(held.runc.pid):
            with contextlib.suppress(OSError):
                if str(held.work / "gate") in {str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()}:
                    return pid
        time.sleep(0.01)
    raise AssertionError("runc never came to the gate")


def test_a_dump_that_waits_touches_nothing_until_it_is_let_go_on(job: Job) -> None:
    job.start()
    held = job.start_dump_early()
    at_the_gate(held)
    before = job.lines()
    job.wait_lines()
    assert len(job.lines()) > len(before), "it runs on"
    job.cgroup.freeze()
    held.go_on()
    held.wait_ready()
    stands_still(job)
    held = HeldDump.from_dict(held.to_dict())
    held.rollback()
    job.wait_lines()
    lines = job.lines()
    assert [int(line) for line in lines] == list(range(len(lines)))


@pytest.mark.parametrize("by", ["rollback", "restart", "restart before it was journalled", "death", "early"])
def test_a_dump_that_waits_is_called_off(job: Job, by: str) -> None:
    """By the agent, by the next agent, or since the agent died: the job has noticed nothing."""
    job.start()
    held = job.start_dump_early()
    runc = held.runc
    assert runc is not None
    shim = None if by == "early" else Process.of(at_the_gate(held))
    match by:
        case "death":
            held.let_go()
        case "restart":
            HeldDump.from_dict(held.to_dict()).rollback()
        case "restart before it was journalled":
            HeldDump.from_dict({"work": str(held.work), "cgroup": job.cgroup.to_dict(), "waits": True}).rollback()
        case _:
            held.rollback()
    assert runc.wait(10)
    assert shim is None or shim.wait(10)
    job.wait_lines()
    assert job.cgroup.state() is Frozen.THAWED
    assert not (held.work / "dump.log").exists(), "CRIU was never asked"
    if by == "death":
        with pytest.raises(CheckpointFailed):
            held.wait_ready()
    again = job.held()
    again.rollback()
    job.wait_lines()


@pytest.mark.parametrize("after", ["ready", "restart of the agent", "death of CRIU"])
def test_commit(job: Job, after: str) -> None:
    job.start()
    job.wait_lines()
    held = job.held()
    before = job.lines()
    if "restart" in after:
        held = HeldDump.from_dict(held.to_dict())
    if "death" in after:
        assert held.criu is not None
        held.criu.kill()
    held.commit()
    assert job.client.wait_task(job.id, 20) == 137
    assert job.lines() == before, "not one instruction more"
    assert not held.alive()
    held.commit()
    job.client.delete_task(job.id)
    with pytest.raises(CgroupFailed):
        held.rollback()


SHARED = """
import mmap, time
data = mmap.mmap(-1, 256 << 20)
data.write(bytes(range(256)) * (1 << 20))
n = 0
while True:
    assert data[n * 4096 % len(data) + 7] == 7
    print(n, flush=True)
    n += 1
    time.sleep(0.01)
"""


@contextlib.contextmanager
def in_the_middle_of_the_dump(held: HeldDump) -> Iterator[None]:
    """CRIU has written its first images, of a job with much to write, and is stopped there. Afterwards it goes on."""
    assert held.images is not None
    deadline = time.monotonic() + 30
    while not ((criu := held._find_criu()) and any(held.images.glob("core-*"))):
        assert time.monotonic() < deadline
    criu.send(signal.SIGSTOP)
    assert not held.images.joinpath("inventory.img").exists(), "it is written last"
    try:
        yield
    finally:
        criu.send(signal.SIGCONT)


def test_a_dump_that_takes_too_long_is_broken_off_and_the_job_is_whole(job: Job) -> None:
    """CRIU's code is in the job's processes at that moment: CRIU has to take it out again, so it must not be killed."""
    job.start(SHARED)
    job.wait_lines()
    job.cgroup.freeze()
    held = job._start_held_dump()
    stop = os.eventfd(0)
    with ThreadPoolExecutor(1) as pool:
        with in_the_middle_of_the_dump(held):
            waiting = pool.submit(held.wait_ready, stop=stop)
            os.eventfd_write(stop, 1)
            while held.images is not None and held.images.exists():
                assert not waiting.done(), waiting.exception()
        assert isinstance(waiting.exception(60), TimedOut)
    os.close(stop)
    job.wait_lines()
    lines = job.lines()
    assert [int(line) for line in lines] == list(range(len(lines))), "it went on where it was"
    again = job.held()
    again.rollback()
    job.wait_lines()


@pytest.mark.parametrize("knows", ["images", "nothing more"])
def test_an_agent_that_died_in_the_middle_of_the_dump(job: Job, place: Path, knows: str) -> None:
    job.start()
    job.wait_lines()
    cgroup, root = job.cgroup, job.client.runc_root(job.record)
    cgroup.freeze()
    planned = {"cgroup": cgroup.to_dict(), "work": str(place / "work")}  # all that the journal had
    if knows == "images":
        planned |= {"images": str(place / "images")}
    held = HeldDump.start(job.id, cgroup, runc_root=root, images=place / "images", work=place / "work")
    assert held._status is not None
    os.close(held._status)
    again = HeldDump.from_dict(planned)
    again.rollback()
    job.wait_lines()
    assert again._find_criu() is None
    assert held._child is not None and held._child.wait(20) is not None


def test_a_criu_that_dies_before_the_freezer_holds_spoils_the_dump(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.start()
    job.wait_lines()
    freeze, frozen = Cgroup.freeze, []

    def freeze_late(cgroup: Cgroup) -> None:
        if frozen:  # the second time is under CRIU's hold
            criu = job._held and job._held.criu
            assert criu
            criu.kill()
            assert criu.wait(10)
        frozen.append(cgroup)
        freeze(cgroup)

    monkeypatch.setattr(Cgroup, "freeze", freeze_late)
    with pytest.raises(CheckpointFailed, match="died"):
        job.held()
    job.wait_lines()


def test_nobody_else_reaches_the_page_server(job: Job) -> None:
    job.start()
    job.wait_lines()
    held = job.held()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", 7117), timeout=5)
    assert held.alive()
    held.rollback()


def test_a_dump_that_fails_leaves_the_job_running_and_says_why(job: Job) -> None:
    job.start(
        "import os, time\n"
        "packets = os.pipe2(os.O_DIRECT)\n"
        "n = 0\nwhile True:\n    print(n, flush=True); n += 1; time.sleep(0.01)"
    )
    job.wait_lines()
    with pytest.raises(CheckpointFailed) as failed:
        job.held()
    assert "packet" in failed.value.why, failed.value.report()
    assert failed.value.evidence
    job.wait_lines()
    assert job.cgroup.state() is Frozen.THAWED


DIALOGUE = """import os, pty, sys, time
child, master = pty.fork()
if child == 0:
    for line in sys.stdin:
        print("heard", line.strip(), flush=True)
    raise SystemExit("its terminal said nothing")
n, heard = 0, b""
while True:
    os.write(master, b"%d\\n" % n)
    while b"heard %d\\r\\n" % n not in heard:
        heard += os.read(master, 1024)
    print(n, flush=True)
    time.sleep(0.02)
    n, heard = n + 1, b""
"""


def test_a_dialogue_over_a_terminal_goes_on_after_a_dump_that_is_undone(job: Job) -> None:
    """To read what is in a terminal CRIU has its ends wait for nothing, and leaves them so."""
    job.start(DIALOGUE)
    for _ in range(3):
        job.wait_lines()
        job.cgroup.freeze()
        while terminals.unread(
            job.task.pid, job.cgroup.pids()
        ):  # as an agent does: CRIU loses it in a dump that is undone
            job.cgroup.thaw()
            time.sleep(0.01)
            job.cgroup.freeze()
        job.held().rollback()
    job.wait_lines()


SYSCALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
UNSAVABLE = {
    "io_uring": SYSCALL
    + "fd = libc.syscall(425, 8, ctypes.create_string_buffer(120))\nassert fd > 0, ctypes.get_errno()",
    "userfaultfd": SYSCALL + "fd = libc.syscall(323, 1)\nassert fd > 0, ctypes.get_errno()",
    "unix socket": "import socket\na = socket.socket(socket.AF_UNIX)\na.connect('/peer/socket')",
    "file locks": "import fcntl\na = open('/home/x', 'w')\nfcntl.flock(a, fcntl.LOCK_EX)",
    "deleted file": "import os\na = open('/home/x', 'wb')\na.write(bytes(80 << 20))\na.flush()\nos.unlink('/home/x')",
}


@pytest.mark.parametrize("what", UNSAVABLE)
def test_what_criu_cannot_save_is_named(job: Job, place: Path, what: str) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.bind(str(place / "socket"))
        peer.listen()
        mount = f"--mount=type=bind,src={place},dst=/peer,options=rbind"
        job.start(f"{UNSAVABLE[what]}\n{COUNT}", mount)
        job.wait_lines()
        if what in ("io_uring", "userfaultfd"):
            assert what in facts_of(job).unsaved
        with pytest.raises(CheckpointFailed) as failed:
            job.held(flags=[] if what == "file locks" else ["--file-locks"])
        assert what in failed.value.why, failed.value.report()
        assert failed.value.remedy
        job.wait_lines()


def facts_of(job: Job) -> ContainerFacts:
    record = job.record
    mounts = job.client.mounts(record.snapshotter, record.snapshot_key)
    return container_facts(record, job.task, job.cgroup, upper_dir(mounts))


def test_facts(job: Job) -> None:
    job.start(
        "import mmap, os, time\n"
        "keep = mmap.mmap(-1, 1 << 22); keep[0] = 1\n"
        "open('/dev/shm/x', 'wb').write(bytes(1 << 20))\nopen('/home/x', 'wb').write(bytes(1 << 20))\n"
        "while True:\n    print('ready', flush=True)\n    time.sleep(0.1)"
    )
    job.wait_lines(1)
    facts = facts_of(job)
    assert facts.pids == (job.task.pid,)
    assert facts.stdio == ("null", "pipe", "pipe")
    assert not {"pid", "mnt", "net", "ipc", "uts"} & set(facts.host_namespaces)
    assert (facts.unsaved, facts.connections, facts.devices) == ((), (), ())
    assert Path(facts.binary).name == "podferry-runc"
    assert facts.tmpfs >= 1 << 20 and facts.upper >= 1 << 20 and facts.anonymous > 1 << 20
    assert ContainerFacts.from_dict(facts.to_dict()) == facts
    node = node_facts(Path("/var/lib/containerd"), Path("/run"), job.client.kind, job.client.version())
    assert NodeFacts.from_dict(node.to_dict()) == node
    assert node.criu and node.runc and node.cgroup is cgroup_kind()
    assert node.lazy_pages


def test_the_whole_way_to_another_container(job: Job, client: Containerd) -> None:
    """TargetReady, frozen, held, restored from the pages of the frozen source, running; then the source is killed."""
    job.start(MEMORY)
    job.wait_lines()
    assert Container.from_bytes(job.record.to_bytes()) == job.record
    arrival = Arrival(job, "hold-target")
    try:
        arrival.make_ready()
        assert arrival.incoming.alive()
        held = job.held()
        with arrival.fed(held.work.parent / "images"):
            arrival.incoming.restore()
            assert arrival.created is not None
            pid = arrival.created.result(60)
            assert client.start_task("hold-target") == pid
            arrival.job.wait_lines()
        held.commit()
        assert client.wait_task(job.id, 20) == 137
        arrival.job.wait_lines(10)
        assert expected(job.lines() + arrival.job.lines())
        assert client.task("hold-target").status is TaskStatus.RUNNING
        assert arrival.job.cgroup != held.cgroup
        again = arrival.job.held()
        again.rollback()
        arrival.job.wait_lines()
        assert expected(job.lines() + arrival.job.lines())
        client.kill_task("hold-target", signal.SIGKILL)
        assert client.wait_task("hold-target", 20) == 137
        client.delete_task("hold-target")
        assert not Path("/run/podferry/restored/hold-target").exists()
    finally:
        arrival.close()
    assert "hold-target" not in Incoming.left()


def expected(lines: list[str]) -> bool:
    """Whether these are the numbers and sums that MEMORY prints when nothing disturbs it."""
    import hashlib

    data, printed = bytearray(range(256)) * 4096 * 32, []
    for n in range(len(lines) * 10):
        data[n * 4096 % len(data)] = n % 251
        if n % 10 == 0:
            printed.append(f"{n} {hashlib.sha256(data).hexdigest()}")
    return lines == printed


def test_refused_and_cold(job: Job, client: Containerd) -> None:
    job.start()
    job.wait_lines()
    for verdict in ("refuse", "cold"):
        arrival = Arrival(job, "hold-target")
        try:
            arrival.make_ready()
            assert arrival.created is not None
            if verdict == "cold":
                arrival.incoming.cold()
                arrival.created.result(60)
                client.start_task("hold-target")
                arrival.job.wait_lines()
                assert arrival.job.lines()[0] == "0"
            else:
                arrival.incoming.refuse("the store is incomplete")
                with pytest.raises(ContainerdFailed, match="podferry-runc: the store is incomplete"):
                    arrival.created.result(60)
        finally:
            arrival.close()
    job.wait_lines()


def test_an_agent_that_dies_ends_the_poised_task(job: Job) -> None:
    job.start()
    arrival = Arrival(job, "hold-target")
    try:
        arrival.make_ready()
        arrival.incoming.close()
        assert arrival.created is not None
        with pytest.raises(ContainerdFailed, match="the agent went away"):
            arrival.created.result(60)
    finally:
        arrival.close()


def test_an_image_that_is_not_here(job: Job, client: Containerd) -> None:
    job.start()
    with pytest.raises(Refused, match="not on node-x"):
        client.prepare(job.record.snapshotter, "hold-none", ["sha256:none"], image=job.record.image, node="node-x")


def test_the_v2_freezer(place: Path) -> None:
    """On its own v2 tree, whatever the node's controllers are on: freezing needs none."""
    mount = place / "unified"
    mount.mkdir()
    run(["mount", "-t", "cgroup2", "cgroup2", mount])
    group = mount / f"podferry-test-{os.getpid()}"
    child = None
    try:
        (group / "nested").mkdir(parents=True)
        child = spawn(["sh", "-c", "while :; do :; done"])
        (group / "nested/cgroup.procs").write_text(str(child.pid))
        cgroup = Cgroup(group)
        assert cgroup.pids() == (child.pid,)
        for _ in range(20):
            cgroup.freeze()
            assert cgroup.state() is Frozen.FROZEN
            cgroup.thaw()
            assert cgroup.state() is Frozen.THAWED
        cgroup.freeze()
        cgroup.kill()
        assert child.wait(20) == -signal.SIGKILL
    finally:
        if child is not None:
            child.kill()
            child.wait()
        for directory in (group / "nested", group):
            if directory.exists():
                directory.rmdir()
        run(["umount", mount])

"""Holds as the journal keeps them, processes by more than their pid, and CRIU's log as a person reads it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from podferry.criu.causes import CAUSES, Cause
from podferry.criu.checkpoint import CheckpointFailed, HeldDump
from podferry.criu.log import error_lines, explained
from podferry.criu.processes import Process
from podferry.errors import EVIDENCE_LINES, UNEXPLAINED, PeerMisbehaved, TimedOut
from podferry.node.cgroup import Cgroup
from podferry.node.process import spawn

pytestmark = pytest.mark.unit


@pytest.fixture
def sleeper() -> subprocess.Popen[bytes]:
    return spawn(["sleep", "60"])


def test_a_process_is_itself_only(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None and process.alive()
    another = Process(process.pid, process.started + 1)
    assert not another.alive()
    another.kill()
    assert another.wait(0)
    assert not process.wait(0)
    process.kill()
    assert process.wait(10)
    assert not process.alive(), "a zombie does nothing"
    assert sleeper.wait() == -9
    assert Process.of(sleeper.pid) is None
    process.kill()


def test_the_journal_keeps_a_hold(tmp_path: Path) -> None:
    held = HeldDump("job", Cgroup(tmp_path), tmp_path / "work")
    for runc, criu in ((None, None), (Process(12, 34), None), (Process(12, 34), Process(56, 78))):
        held.runc, held.criu = runc, criu
        again = HeldDump.from_dict(json.loads(json.dumps(held.to_dict())))
        assert again.to_dict() == held.to_dict()
        assert (again.runc, again.criu) == (runc, criu)
    assert HeldDump.from_dict({"cgroup": held.cgroup.to_dict(), "work": "/w"}).runc is None
    for wrong in (
        {},
        {"id": "x", "cgroup": {}, "work": "/"},
        {**held.to_dict(), "runc": [1]},
        {**held.to_dict(), "criu": 3},
    ):
        with pytest.raises(PeerMisbehaved):
            HeldDump.from_dict(wrong)


def test_dump_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFailed, match="leave-running"):
        HeldDump.start(
            "job",
            Cgroup(tmp_path),
            runc_root=tmp_path,
            images=tmp_path / "i",
            work=tmp_path / "w",
            flags=["--leave-running"],
        )


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            "Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (unknown anon_inode:[io_uring])",
            "io_uring",
        ),
        ("Error (criu/files-ext.c:94): Can't dump file 5 of that type [20666] (chr 195:255)", "195:255"),
        (
            "Error (criu/files-ext.c:94): Can't dump file 4 of that type [600] (unknown anon_inode:kvm-vcpu:0)",
            "kvm-vcpu",
        ),
        ("Error (criu/sockets.c:628): sockets: Can't get 1:16 opt: Operation not supported", "CRIU before 4.2"),
        ("Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.", "TCP"),
        ("Error (criu/fsnotify.c:284): fsnotify: \tCan't dump that handle", "inotify"),
        ("Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try --file-locks", "locks"),
        (
            "Error (criu/files-reg.c:1031): Can't dump ghost file /data/x of 99 size, increase limit",
            "/data/x of 99 bytes",
        ),
        (
            "Error (criu/seize.c:635): Unable to freeze cgroup /sys/fs/cgroup/freezer/x (100 x 100ms attempts)",
            "did not stop",
        ),
        ("Error (criu/page-pipe.c:418): page-pipe: tee: 65536: Operation not permitted", "pipes"),
        ("Error (criu/page-pipe.c:203): page-pipe: create_page_pipe: Can't allocate 343 bytes", "would take 343 bytes"),
        ("Error (criu/cr-dump.c:389): Can't get rlimit 0: Operation not permitted", "not root's"),
    ],
)
def test_known_causes_are_named(tmp_path: Path, line: str, why: str) -> None:
    log = tmp_path / "dump.log"
    log.write_text(
        "(00.000001) Version: 4.1.1\n(00.001000) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE\n"
        f"(00.010000) {line}\n(00.020000) Error (criu/cr-dump.c:2111): Dumping FAILED.\n"
    )
    error = explained(CheckpointFailed, "cannot dump job", log)
    assert why in error.why
    assert error.remedy
    assert any(line in shown for shown in error.evidence)
    assert "Version" not in "".join(error.evidence)


@pytest.mark.parametrize("cause", CAUSES, ids=[one.like[:40] for one in CAUSES])
def test_each_message_of_the_list_has_its_own_reason_and_remedy(cause: Cause, tmp_path: Path) -> None:
    log = tmp_path / "dump.log"
    log.write_text(
        f"(00.010000) Error (criu/some.c:7): {cause.like}\n(00.02) Error (criu/cr-dump.c:2): Dumping FAILED.\n"
    )
    found = cause.pattern.search(cause.like)
    assert found
    groups = ["", *(group or "" for group in found.groups())]
    error = explained(CheckpointFailed, "cannot dump job", log)
    assert (error.why, error.remedy) == (cause.why.format(*groups), cause.remedy.format(*groups))


def test_an_unknown_cause_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "dump.log"
    log.write_text("".join(f"(00.00000{n}) Error (criu/new.c:{n}): something new {n}\n" for n in range(40)))
    error = explained(TimedOut, "no dump", log)
    assert isinstance(error, TimedOut)
    assert len(error_lines(log)) == EVIDENCE_LINES
    assert error.why.startswith(UNEXPLAINED)
    assert "something new" in error.why
    assert str(tmp_path) not in error.remedy, "the log is gone when somebody reads this"


def test_a_criu_that_died_left_no_error_but_its_last_lines(tmp_path: Path) -> None:
    """As one does that reads a mapped file of a share that has gone."""
    log = tmp_path / "dump.log"
    log.write_text(
        "(00.002645) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE\n(00.010) Dumping path for 3\n"
    )
    error = explained(CheckpointFailed, "cannot dump", log, said=['level=error msg="read unixpacket @->@: EOF"'])
    assert "CRIU died" in error.why
    assert "share" in error.remedy
    assert any("Dumping path" in line for line in error.evidence)


@pytest.mark.parametrize("more", ["", "(00.039) Error (criu/new.c:1): something new\n"])
def test_a_kernel_without_udp_lite_is_the_reason_where_criu_tells_no_other(tmp_path: Path, more: str) -> None:
    """The end of a log of CRIU 4.1.1 on Linux 7.1."""
    log = tmp_path / "dump.log"
    log.write_text(
        "(00.035655) sockets: Sockects collect procedure family AF_INET proto IPPROTO_UDPLITE: -2\n"
        f"(00.037576) netlink: Collect netlink sock 0x3549\n(00.038016) net: Unlock network\n{more}"
        "(00.040840) Error (criu/cr-dump.c:2111): Dumping FAILED.\n"
    )
    error = explained(CheckpointFailed, "cannot dump", log, said=["criu failed: type NOTIFY errno 0"])
    assert ("UDP-Lite" in error.why) is (not more)
    assert ("CRIU 4.3" in error.remedy) is (not more)


def test_no_log_at_all(tmp_path: Path) -> None:
    error = explained(CheckpointFailed, "cannot dump", tmp_path / "none", said=["runc: exit status 1"])
    assert error.why == "runc: exit status 1"
    assert explained(CheckpointFailed, "cannot dump", tmp_path / "none").why == "it left no log"


def test_a_process_that_was_never_there() -> None:
    assert Process.of(2**22 + 1) is None
    assert os.getpid() == Process(os.getpid(), Process.of(os.getpid()).started).pid  # type: ignore[union-attr]

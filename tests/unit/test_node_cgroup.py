"""Control groups, as far as files can play them; the node tier does the same with the kernel's."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from podferry.errors import PeerMisbehaved, Refused, TimedOut
from podferry.node.cgroup import Cgroup, CgroupFailed, CpuQuota, Frozen, trees

pytestmark = pytest.mark.unit


def v1(path: Path) -> Cgroup:
    for name, text in {
        "freezer.state": "THAWED\n",
        "cpu.cfs_quota_us": "-1\n",
        "cpu.cfs_period_us": "100000\n",
        "memory.usage_in_bytes": "4096\n",
        "cgroup.procs": "",
    }.items():
        (path / name).write_text(text)
    return Cgroup(path, path, path)


def v2(path: Path) -> Cgroup:
    for name, text in {
        "cgroup.freeze": "0\n",
        "cgroup.events": "populated 1\nfrozen 0\n",
        "cpu.max": "50000 100000\n",
        "memory.current": "8192\n",
        "cgroup.procs": "0\n",
    }.items():
        (path / name).write_text(text)
    return Cgroup(path, path, path)


def test_trees_of_a_hybrid_host(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "30 23 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
        "31 23 0:27 /pod /sys/fs/cgroup/with\\040blank rw - cgroup cgroup rw,freezer\n"
        "32 23 0:28 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
        "33 23 0:29 / /proc rw - proc proc rw\n"
    )
    cpu, freezer, unified = trees(table)
    assert {"cpu", "cpuacct"} <= cpu.controllers
    assert (freezer.mountpoint, freezer.root) == (Path("/sys/fs/cgroup/with blank"), "/pod")
    assert unified.controllers == frozenset()


def test_runcs_state_names_the_groups(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    paths = {"freezer": "/f/job", "cpu": "/c/job", "memory": "/m/job", "": "/u/job", "name=systemd": "/s/job"}
    (tmp_path / "job/state.json").write_text(json.dumps({"cgroup_paths": paths}))
    assert Cgroup.of_container(tmp_path, "job") == Cgroup(Path("/f/job"), Path("/c/job"), Path("/m/job"))
    (tmp_path / "job/state.json").write_text(json.dumps({"cgroup_paths": {"": "/u/job"}}))
    assert Cgroup.of_container(tmp_path, "job") == Cgroup(Path("/u/job"), Path("/u/job"), Path("/u/job"))
    with pytest.raises(CgroupFailed):
        Cgroup.of_container(tmp_path, "other")
    with pytest.raises(Refused):
        Cgroup.from_paths({"cpu": Path("/c/job")})


def test_a_freezer_that_does_not_freeze_is_thawed_again(tmp_path: Path) -> None:
    cgroup = v2(tmp_path)
    with pytest.raises(TimedOut):
        cgroup.freeze(timeout=0)
    assert (tmp_path / "cgroup.freeze").read_text() == "0"


def test_a_v1_freezer_is_waited_for(tmp_path: Path) -> None:
    cgroup = v1(tmp_path)
    assert cgroup.state() is Frozen.THAWED
    state = tmp_path / "freezer.state"
    state.unlink()
    os.mkfifo(state)  # whoever reads it decides what it says

    def kernel() -> None:
        for answer in ("FREEZING\n", "FROZEN\n"):
            assert state.read_text() == "FROZEN"
            state.write_text(answer)

    thread = threading.Thread(target=kernel)
    thread.start()
    cgroup.freeze()
    thread.join()


def test_what_has_gone_is_said_so(tmp_path: Path) -> None:
    cgroup = Cgroup(tmp_path / "gone")
    for action in (cgroup.thaw, cgroup.state, cgroup.freeze):
        with pytest.raises(CgroupFailed, match="gone"):
            action()
    assert cgroup.pids() == ()
    cgroup.kill()


@pytest.mark.parametrize("kind", [v1, v2])
def test_the_quota_is_given_back(tmp_path: Path, kind: type) -> None:
    cgroup: Cgroup = kind(tmp_path)
    before = cgroup.cpu_quota()
    cgroup.set_cpu_quota(before.scaled(0.25, 1.0))
    assert cgroup.cpu_quota() == before.scaled(0.25, 1.0) != before
    cgroup.set_cpu_quota(before)
    assert cgroup.cpu_quota() == before
    assert CpuQuota.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def test_quotas() -> None:
    assert CpuQuota(None, 100_000).scaled(0.5, used=4) == CpuQuota(200_000, 100_000)
    assert CpuQuota(None, 100_000).scaled(0.5, used=0.8) == CpuQuota(40_000, 100_000)
    assert CpuQuota(50_000, 100_000).scaled(0.5, used=4) == CpuQuota(25_000, 100_000)
    assert CpuQuota(50_000, 100_000).scaled(0, used=4).quota == 1000


def test_used_processor_time_is_found_wherever_it_is_counted(tmp_path: Path) -> None:
    assert Cgroup(tmp_path).cpu_seconds() == 0
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    assert Cgroup(tmp_path).cpu_seconds() > 0
    (tmp_path / "cpu.stat").write_text("nr_periods 0\n")
    assert Cgroup(tmp_path, tmp_path).cpu_seconds() > 0
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    assert Cgroup(tmp_path, tmp_path).cpu_seconds() == 2.5
    (tmp_path / "cpuacct.usage").write_text("1500000000\n")
    assert Cgroup(tmp_path, tmp_path).cpu_seconds() == 1.5


def test_memory_and_processes(tmp_path: Path) -> None:
    assert (v1(tmp_path).memory_usage(), v1(tmp_path).pids()) == (4096, ())
    nested = tmp_path / "system.slice"
    nested.mkdir()
    (nested / "cgroup.procs").write_text("17\n18\n")
    (tmp_path / "cgroup.procs").write_text("0\n16\n")
    assert Cgroup(tmp_path).pids() == (16, 17, 18)
    assert Cgroup(tmp_path).memory_usage() is None
    with pytest.raises(Refused):
        Cgroup(tmp_path).cpu_quota()
    assert Cgroup(tmp_path).why_no_quota().startswith("the container has no cpu controller")
    assert not v1(tmp_path).why_no_quota()


def test_the_journal_keeps_a_cgroup(tmp_path: Path) -> None:
    for cgroup in (Cgroup(tmp_path), Cgroup(tmp_path, tmp_path / "cpu", tmp_path / "memory")):
        assert Cgroup.from_dict(json.loads(json.dumps(cgroup.to_dict()))) == cgroup
    for wrong in ({}, {"freezer": 1}, {"freezer": "/f", "cpu": 3}):
        with pytest.raises(PeerMisbehaved):
            Cgroup.from_dict(wrong)


def test_a_group_is_removed_once_it_is_empty(tmp_path: Path) -> None:
    group = tmp_path / "group"
    (group / "dying").mkdir(parents=True)
    with pytest.raises(CgroupFailed):
        Cgroup(group).remove(timeout=0.0)
    end = threading.Timer(0.1, (group / "dying").rmdir)
    end.start()
    Cgroup(group).remove()
    end.join()
    assert not group.exists()
    Cgroup(group).remove()


def test_what_does_not_freeze_is_killed_all_the_same(
    tmp_path: Path, process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that waits for a file server, say: it cannot be frozen, and runs nothing of its own before its SIGKILL."""

    def never(self: Cgroup, timeout: float = 0.0) -> None:
        raise TimedOut("the container does not freeze")

    monkeypatch.setattr(Cgroup, "freeze", never)
    cgroup = v1(tmp_path)
    (tmp_path / "cgroup.procs").write_text(f"{process}\n")
    cgroup.kill()
    assert os.waitpid(process, 0)[1] == signal.SIGKILL


def test_memory_that_the_kernel_cannot_drop(tmp_path: Path) -> None:
    assert Cgroup(tmp_path).memory_held() is None
    assert v1(tmp_path).memory_held() is None, "no statistics"
    stat = tmp_path / "memory.stat"
    stat.write_text("cache 900\nrss 7\ntotal_cache 1000\ntotal_rss 70\ntotal_shmem 5\ntotal_swap 2\n")
    assert v1(tmp_path).memory_held() == 77
    stat.write_text("anon 70\nfile 1000\nshmem 5\n")
    assert v2(tmp_path).memory_held() == 75
    (tmp_path / "memory.swap.current").write_text("2\n")
    assert v2(tmp_path).memory_held() == 77

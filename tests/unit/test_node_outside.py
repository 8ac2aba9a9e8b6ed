"""What an agent in a pod runs outside its container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podferry.node import outside
from podferry.node.process import run, spawn

pytestmark = pytest.mark.unit


def test_on_a_host_everything_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(outside.IN_POD, raising=False)
    assert outside.on_node(["runc", "--version"]) == ["runc", "--version"]
    assert outside.surviving(["helper"]) == ["helper"]
    assert outside.root() == Path("/")


def test_in_a_pod_it_joins_the_nodes_cgroup_and_keeps_its_pid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hierarchies(tmp_path, "memory", "cpuset")
    monkeypatch.setenv(outside.IN_POD, "1")
    monkeypatch.setattr(outside, "make_cgroups", lambda: [tmp_path / "memory", tmp_path / "cpuset"])
    child = spawn(outside.surviving(["sh", "-c", f"echo $$ > {tmp_path}/pid; exit 3"]))
    assert child.wait() == 3
    assert (tmp_path / "pid").read_text().strip() == str(child.pid)
    for name in ("memory", "cpuset"):
        assert (tmp_path / name / "cgroup.procs").read_text() == "0\n"


def test_a_program_of_the_node_finds_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(outside.IN_POD, raising=False)
    assert outside.from_node(["python3", "x.py"]) == ["python3", "x.py"]
    monkeypatch.setenv(outside.IN_POD, "1")
    assert outside.from_node(["python3", "x.py"]) == ["chroot", f"/proc/{os.getpid()}/root", "python3", "x.py"]


def may_enter_process_1() -> bool:
    try:
        os.close(os.open("/proc/1/ns/mnt", os.O_RDONLY))
    except OSError:
        return False
    return os.geteuid() == 0


@pytest.mark.skipif(not may_enter_process_1(), reason="process 1's mount namespace may not be entered here")
def test_a_program_of_the_node_sees_the_nodes_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(outside.IN_POD, "1")
    monkeypatch.setattr(outside, "make_cgroups", lambda: [])
    seen = run(outside.on_node(["readlink", "/proc/self/ns/mnt"])).stdout.strip()
    assert seen == os.readlink("/proc/1/ns/mnt")  # noqa: PTH115
    assert outside.root() == Path("/proc/1/root")


def test_a_cgroup_in_every_hierarchy_of_v1(tmp_path: Path) -> None:
    hierarchies(tmp_path, "memory", "cpuset")
    (tmp_path / "cpu,cpuacct").mkdir()  # what is no hierarchy is left alone
    (tmp_path / "cpuset" / "cpuset.cpus").write_text("0-1\n")
    (tmp_path / "cpuset" / "cpuset.mems").write_text("0\n")
    inside = tmp_path / "cpuset" / "podferry"
    inside.mkdir()
    for setting in ("cpuset.cpus", "cpuset.mems"):
        (inside / setting).write_text("\n")
    assert outside.make_cgroups(tmp_path) == [inside, tmp_path / "memory" / "podferry"]
    assert (inside / "cpuset.cpus").read_text() == "0-1\n"
    assert outside.make_cgroups(tmp_path) == [inside, tmp_path / "memory" / "podferry"]


def test_a_cgroup_of_v2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").touch()
    (tmp_path / "system.slice").mkdir()
    (tmp_path / "system.slice" / "cgroup.procs").touch()
    assert outside.make_cgroups(tmp_path) == [tmp_path / "podferry"]


def hierarchies(top: Path, *names: str) -> None:
    for name in names:
        (top / name).mkdir()
        (top / name / "cgroup.procs").touch()

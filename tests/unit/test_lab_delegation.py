"""Controllers of cgroup v2 are handed down to machines in the order that the kernel takes, and given back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from podferry.lab import cgroups, delegation, machine
from podferry.lab.cgroups import Hierarchy
from podferry.lab.delegation import CgroupUnusable

pytestmark = pytest.mark.unit
ALL = "cpu cpuset hugetlb io memory misc pids"


class Kernel:
    """A tree of cgroup v2 that lies in plain files, and what Linux answers to a write in it (kernel/cgroup/cgroup.c)."""

    def __init__(self, top: Path, passed_on: str, *, root: bool = True, rw: bool = True) -> None:
        self.top, self.root, self.rw = top, root, rw
        self.procs: dict[Path, list[str]] = {top: []}
        self.passed_on: dict[Path, set[str]] = {top: set(passed_on.split())}
        self.controllers: dict[Path, set[str]] = {top: set(ALL.split())}
        self.writes: list[tuple[str, str]] = []
        self.refused: dict[str, int] = {}

    def _sync(self) -> None:
        for directory in (self.top, *(path for path in self.top.rglob("*") if path.is_dir())):
            if directory != self.top:
                self.controllers[directory] = set(self.passed_on[directory.parent])
            self.procs.setdefault(directory, [])
            self.passed_on.setdefault(directory, set())

    def read(self, path: Path) -> str:
        self._sync()
        lines = {
            "cgroup.procs": "\n".join(self.procs[path.parent]),
            "cgroup.controllers": " ".join(sorted(self.controllers[path.parent])),
            "cgroup.subtree_control": " ".join(sorted(self.passed_on[path.parent])),
        }
        return lines[path.name]

    def write(self, path: Path, text: str) -> None:
        self._sync()
        directory = path.parent
        self.writes.append((str(path.relative_to(self.top)), text))
        exempt = self.root and directory == self.top
        if not self.rw:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if path.name == "cgroup.procs":
            if self.passed_on[directory] and not exempt:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            for procs in self.procs.values():
                if text in procs:
                    procs.remove(text)
            self.procs[directory].append(text)
            return
        sign, controller = text[0], text[1:]
        if number := self.refused.get(controller):
            raise OSError(number, os.strerror(number))
        if sign == "-":
            if any(controller in passed for at, passed in self.passed_on.items() if at.parent == directory):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            self.passed_on[directory].discard(controller)
            return
        if self.procs[directory] and not exempt:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if controller not in self.controllers[directory]:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self.passed_on[directory].add(controller)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The root of a stock machine with systemd, which passes on what its units need."""
    top = tmp_path / "cgroup"
    top.mkdir()
    made = Kernel(top, "memory pids")
    (tmp_path / "boot").write_text("this start")
    monkeypatch.setattr(delegation, "_GIVEN", tmp_path / "given")
    monkeypatch.setattr(delegation, "_LOCK", tmp_path / "lock")
    monkeypatch.setattr(delegation, "_BOOT", tmp_path / "boot")
    monkeypatch.setattr(delegation, "read", made.read)
    monkeypatch.setattr(delegation, "write", made.write)
    monkeypatch.setattr(delegation, "is_root", lambda directory: made.root and directory == made.top)
    yield made


def start(kernel: Kernel, name: str, pid: int) -> Path:
    """What `machine.start` does to cgroups, with a process that is `pid`."""
    mounted = [Hierarchy(2, kernel.top, "", kernel.top)]
    made = cgroups.create("lab", name, mounted)
    seen: list[list[str]] = []
    cgroups.settle(pid, mounted, made, lambda: seen.append(kernel.procs[made[0]][:]))
    assert seen == [[str(pid)]], "its cgroup namespace would not begin at the machine's cgroup"
    return made[0]


def test_a_machine_gets_its_controllers_once_its_process_is_in_the_leaf(kernel: Kernel) -> None:
    delegation.prepare(kernel.top)
    directory = start(kernel, "node-a", 7)
    assert kernel.procs[directory / "init"] == ["7"]
    assert kernel.passed_on[directory] == delegation.WANTED
    own = [(path.removeprefix("podferry.lab.node-a/"), text) for path, text in kernel.writes if "node-a" in path]
    assert own[:2] == [("cgroup.procs", "7"), ("init/cgroup.procs", "7")]
    assert {path for path, _ in own[2:]} == {"cgroup.subtree_control"}


def test_what_the_root_did_not_pass_on_is_given_back_and_nothing_else(kernel: Kernel) -> None:
    said: list[str] = []
    delegation.prepare(kernel.top, said.append)
    assert [line for line in said if "cpu cpuset hugetlb io added" in line]
    directory = start(kernel, "node-a", 7)
    kernel.passed_on[directory].clear()
    delegation.give_back()
    assert kernel.passed_on[kernel.top] == {"memory", "pids"}
    delegation.give_back()
    assert not delegation._GIVEN.exists()


def test_systemd_may_take_a_controller_back_until_a_machine_passes_it_on(kernel: Kernel) -> None:
    delegation.prepare(kernel.top)
    kernel.write(kernel.top / "cgroup.subtree_control", "-cpu")
    directory = start(kernel, "node-a", 7)
    assert kernel.passed_on[directory] == delegation.WANTED
    with pytest.raises(OSError, match="busy"):
        kernel.write(kernel.top / "cgroup.subtree_control", "-cpu")
    kernel.passed_on[directory].clear()
    delegation.give_back()
    assert kernel.passed_on[kernel.top] == {"memory", "pids"}


def test_what_another_uses_by_then_stays(kernel: Kernel) -> None:
    delegation.prepare(kernel.top)
    (kernel.top / "system.slice").mkdir()
    kernel.write(kernel.top / "system.slice" / "cgroup.subtree_control", "+cpu")
    delegation.give_back()
    assert kernel.passed_on[kernel.top] == {"cpu", "memory", "pids"}


def test_the_record_of_an_earlier_start_says_nothing(kernel: Kernel, tmp_path: Path) -> None:
    delegation.prepare(kernel.top)
    (tmp_path / "boot").write_text("another start")
    delegation.give_back()
    assert "cpu" in kernel.passed_on[kernel.top]


def test_in_a_container_its_processes_make_room_and_come_back(kernel: Kernel) -> None:
    """With a cgroup namespace of its own the container's cgroup looks like the root, and has its processes."""
    kernel.root = False
    kernel.passed_on[kernel.top].clear()
    kernel.procs[kernel.top] = ["1", "20"]
    delegation.prepare(kernel.top)
    start(kernel, "node-a", 7)
    assert kernel.procs[kernel.top / "podferry-others"] == ["1", "20"]
    kernel.passed_on[kernel.top / "podferry.lab.node-a"].clear()
    delegation.give_back()
    assert not (kernel.top / "podferry-others").exists()
    assert (kernel.procs[kernel.top], kernel.passed_on[kernel.top]) == (["1", "20"], set())


def test_processes_that_cannot_be_seen_are_named_as_the_cause(kernel: Kernel) -> None:
    kernel.root = False
    kernel.procs[kernel.top] = ["0"]
    with pytest.raises(CgroupUnusable, match=r"cgroup\.procs lists processes of another process namespace"):
        delegation.prepare(kernel.top)


def test_a_controller_that_the_kernel_refuses_is_told_and_the_others_go_on(kernel: Kernel) -> None:
    kernel.refused = {"cpu": errno.EINVAL}
    said: list[str] = []
    delegation.prepare(kernel.top, said.append)
    directory = start(kernel, "node-a", 7)
    assert kernel.passed_on[directory] == delegation.WANTED - {"cpu"}
    assert any("nodes have no cpu controller" in line and "Invalid argument" in line for line in said)


@pytest.mark.parametrize(("number", "remedy"), [(errno.EBUSY, "move its processes"), (errno.EROFS, "--privileged")])
def test_an_error_names_the_file_the_errno_and_what_to_do(
    number: int, remedy: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = [Hierarchy(2, kernel.top, "", kernel.top)]
    made = cgroups.create("lab", "node-a", mounted)

    def refuse(path: Path, text: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(delegation, "write", refuse)
    with pytest.raises(CgroupUnusable) as told:
        cgroups.settle(7, mounted, made, lambda: None)
    assert f"{made[0] / 'cgroup.procs'}: {os.strerror(number)} ({errno.errorcode[number]})" in told.value.why
    assert remedy in told.value.remedy


def test_a_cgroup_file_system_that_is_mounted_read_only_is_refused_in_words(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CgroupUnusable, match="EROFS") as told:
        cgroups.create("lab", "node-a", [Hierarchy(2, kernel.top, "", kernel.top)])
    assert "ProtectControlGroups" in told.value.remedy


def test_a_start_that_failed_is_not_put_down_to_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, every failure was called one of capabilities, whatever the kernel had said."""
    status = "CapEff:\t{:016x}\n"
    monkeypatch.setattr(Path, "read_text", lambda _: status.format((1 << 41) - 1))
    assert "capabilities" not in machine._remedy("mount: Operation not permitted")
    monkeypatch.setattr(Path, "read_text", lambda _: status.format(((1 << 41) - 1) & ~(1 << 21)))
    assert "CAP_SYS_ADMIN" in machine._remedy("unshare: Operation not permitted")
    assert "CAP_SYS_ADMIN" not in machine._remedy("echo: Input/output error")

"""`down` leaves nothing, whatever happened in the lab before."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from podferry.errors import PodferryError
from podferry.lab import Lab, cgroups, containers, kernel, list_labs, state
from podferry.node.process import run

pytestmark = pytest.mark.lab


@dataclass(frozen=True)
class Traces:
    """What a lab could leave on a machine. Of cgroups, processes and loop devices only what is the lab's."""

    mounts: list[str]
    interfaces: list[str]
    cgroups: list[str]
    processes: list[int]
    loops: list[str]
    home: bool


def traces(lab: Lab) -> Traces:
    here = [line.split(" - ")[0].split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    listed = run(["find", *(h.mount for h in cgroups.hierarchies()), "-name", f"podferry.{lab.name}.*"])
    loops = run(["losetup", "--noheadings", "--output", "BACK-FILE"], check=False).stdout.splitlines()
    return Traces(
        mounts=here,
        interfaces=sorted(path.name for path in Path("/sys/class/net").iterdir()),
        cgroups=listed.stdout.splitlines(),
        processes=[one.pid for one in cgroups.processes(lab.name)],
        loops=[file for file in loops if f"/labs/{lab.name}/" in file],
        home=lab.home.exists(),
    )


KINDS = ("pid", "net", "uts", "ipc", "cgroup")


@contextlib.contextmanager
def held_namespaces(lab: Lab) -> Iterator[set[tuple[int, int]]]:
    """The identities of the lab's own namespaces, held open: the kernel gives a number that is free to the next one.

    Mount namespaces are left out, since holding one holds its mounts.
    """
    with contextlib.ExitStack() as stack:
        identities = set()
        for one in filter(lambda one: one.first, cgroups.processes(lab.name)):
            for kind in KINDS:
                file = stack.enter_context(Path(f"/proc/{one.pid}/ns/{kind}").open("rb"))
                identities.add((os.fstat(file.fileno()).st_dev, os.fstat(file.fileno()).st_ino))
        yield identities - {identity(os.getpid(), kind) for kind in KINDS}


def identity(pid: int, kind: str) -> tuple[int, int] | None:
    try:
        seen = Path(f"/proc/{pid}/ns/{kind}").stat()
    except OSError:  # it has ended, or has more capabilities than we have
        return None
    return seen.st_dev, seen.st_ino


def everybody() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def kill(lab: Lab, machine: str, command: str) -> None:
    """kill -9 one program of a machine, found by its name among the machine's processes."""
    pids = [one.pid for one in cgroups.processes(lab.name, machine) if comm(one.pid) == command]
    assert pids, f"no {command} on {machine}"
    os.kill(pids[0], signal.SIGKILL)


def comm(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def nothing(lab: Lab) -> None:
    """No disaster at all."""


def init_of_a_node(lab: Lab) -> None:
    kill(lab, "node-a", "tini")


def a_nodes_containerd(lab: Lab) -> None:
    kill(lab, "node-a", "containerd")


def the_brick(lab: Lab) -> None:
    kill(lab, "storage", "glusterfsd")


def a_nodes_share_with_a_file_open(lab: Lab) -> None:
    lab.exec("node-a", ["sh", "-c", "exec 3> /share/open; setsid -f sleep 1000 <&- >&- 2>&-"])
    kill(lab, "node-a", "glusterfs")


def the_switch(lab: Lab) -> None:
    kill(lab, "switch", "sleep")


def a_frozen_container(lab: Lab) -> None:
    containers.start(lab, "node-a", "frozen", ["sleep", "1000"], image=containers.JOB_IMAGE)
    lab.exec("node-a", ["ctr", "task", "pause", "frozen"])


def its_settings_lost(lab: Lab) -> None:
    (lab.home / "lab.json").unlink()


DISASTERS = [
    nothing,
    init_of_a_node,
    a_nodes_containerd,
    the_brick,
    a_nodes_share_with_a_file_open,
    the_switch,
    a_frozen_container,
    its_settings_lost,
]


@pytest.mark.parametrize("disaster", DISASTERS, ids=lambda disaster: disaster.__name__)
def test_down_leaves_the_machine_as_it_was(own_lab: Lab, disaster: Callable[[Lab], None]) -> None:
    before = traces(own_lab)
    own_lab.up(1, agent=False)
    during = traces(own_lab)
    assert (during.mounts, during.interfaces) == (before.mounts, before.interfaces), "the lab shows outside itself"

    with held_namespaces(own_lab) as namespaces:
        assert len(namespaces) == 3 * len(KINDS), "switch, storage and node"
        disaster(own_lab)
        own_lab.down()
        assert not namespaces & {identity(pid, kind) for pid in everybody() for kind in KINDS}

    assert traces(own_lab) == before
    assert own_lab.name not in list_labs()


def test_down_of_a_lab_that_is_not_there(own_lab: Lab) -> None:
    before = traces(own_lab)
    own_lab.down()
    own_lab.down()
    assert traces(own_lab) == before


def test_up_that_was_interrupted_can_be_taken_down(own_lab: Lab) -> None:
    before = traces(own_lab)

    def stop_half_way(step: str) -> None:
        if "ready" in step:
            raise InterruptedError(step)

    with pytest.raises(InterruptedError):
        own_lab.up(1, agent=False, progress=stop_half_way)
    assert traces(own_lab).processes
    own_lab.down()
    assert traces(own_lab) == before


def test_up_and_down_at_once_take_turns(own_lab: Lab) -> None:
    before = traces(own_lab)
    failures: list[PodferryError] = []

    def repeat(what: Callable[[], object]) -> None:
        try:
            what()
        except PodferryError as error:
            failures.append(error)

    threads = [
        threading.Thread(target=repeat, args=(what,))
        for what in (lambda: own_lab.up(1, agent=False), own_lab.down, lambda: own_lab.up(1, agent=False))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    own_lab.down()
    assert traces(own_lab) == before


def test_pipes_are_as_large_as_before_once_the_last_lab_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = tmp_path / "pipe-max-size"
    setting.write_text("1048576\n")
    monkeypatch.setattr(kernel, "PIPE_MAX_SIZE", setting)
    monkeypatch.setattr(kernel, "_BEFORE", tmp_path / "before")
    monkeypatch.setattr(kernel, "_LOCK", tmp_path / "lock")
    said: list[str] = []
    kernel.raise_pipe_size(said.append)
    kernel.raise_pipe_size(said.append)
    assert setting.read_text() == f"{kernel.NEEDED}\n"
    assert len(said) == 1
    kernel.restore_pipe_size()
    assert setting.read_text() == "1048576\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe-max-size"]


def test_only_root_may(monkeypatch: pytest.MonkeyPatch, own_lab: Lab) -> None:
    monkeypatch.setattr(state.os, "geteuid", lambda: 1000)
    for what in (own_lab.up, own_lab.down):
        with pytest.raises(PodferryError, match="needs root") as refused:
            what()
        assert "sudo" in refused.value.remedy
    monkeypatch.undo()

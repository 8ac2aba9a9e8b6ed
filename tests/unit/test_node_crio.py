"""CRI-O's containers, read from a storage directory as CRI-O 1.34 writes it, beside a conmon that was started as it starts one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from podferry.core.facts import RuntimeKind
from podferry.errors import Failed, Refused, TimedOut, UsageError
from podferry.node import cri, outside
from podferry.node import crio as module
from podferry.node.crio import Crio, CrioFailed, Monitor
from podferry.node.process import spawn
from podferry.node.records import TaskStatus
from podferry.node.runtime import ContainerNotFound

pytestmark = pytest.mark.unit
UID = "30b967b4-92d8-46da-a797-2c9e668a6197"
WRAPPER = "/opt/podferry/bin/podferry-runc"
SANDBOX, OLD, NEW = "5a" * 32, "01" * 32, "0e" * 32


class Storage:
    """containers/storage's directories, a runtime's state, and conmons."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.children: list[Popen[bytes]] = []
        self.crio = Crio(root / "nobody.sock", root / "graph")

    def container(self, id: str, name: str, attempt: int = 0, kind: str = "container", **more: str) -> dict[str, Any]:
        layer = self.root / "graph/overlay" / f"layer-{id[:4]}"
        (layer / "diff").mkdir(parents=True)
        (layer / "merged").mkdir()
        sandbox = f"/run/containers/storage/overlay-containers/{SANDBOX}/userdata"
        told = {
            "io.kubernetes.container.name": name,
            "io.kubernetes.pod.uid": UID,
            "io.kubernetes.cri-o.ContainerType": kind,
            "io.kubernetes.cri-o.ImageName": "registry.example/job:1",
            "io.kubernetes.cri-o.Labels": json.dumps({"io.kubernetes.container.name": "not this"}),
            "io.kubernetes.cri-o.LogPath": f"/var/log/pods/x/{name}/{attempt}.log",
            "io.kubernetes.cri-o.Metadata": json.dumps({"name": name} | ({"attempt": attempt} if attempt else {})),
            "io.kubernetes.cri-o.ResolvPath": f"{sandbox}/resolv.conf",
            "io.kubernetes.cri-o.RuntimeHandler": "podferry",
            "io.kubernetes.cri-o.SandboxID": SANDBOX,
            **more,
        }
        spec = {
            "annotations": told,
            "root": {"path": str(layer / "merged")},
            "mounts": [{"source": f"{sandbox}/shm", "destination": "/dev/shm", "type": "bind", "options": ["rbind"]}],
        }
        userdata = self.root / "graph/overlay-containers" / id / "userdata"
        userdata.mkdir(parents=True)
        (userdata / "config.json").write_text(json.dumps(spec, indent=2))
        return spec

    def conmon(self, id: str, runtime: str) -> None:
        """A process with the command line of a conmon."""
        words = ["-c", id, "-l", "log", "-r", runtime, "--runtime-arg", f"--root={self.root}/runc", "-u", id]
        program = "import sys; print('here', flush=True); sys.stdin.read()"
        child = spawn([sys.executable, "-c", program, *words], stdin=PIPE, stdout=PIPE)
        self.children.append(child)
        assert child.stdout and child.stdout.readline() == b"here\n", "until then it may have no command line yet"
        bundle = self.root / f"run/containers/storage/overlay-containers/{id}/userdata"
        bundle.mkdir(parents=True)
        (bundle / "conmon-pidfile").write_text(str(self.children[-1].pid))

    def state(self, id: str, pid: int, started: int) -> Path:
        directory = self.root / "runc" / id
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "state.json").write_text(json.dumps({"init_process_pid": pid, "init_process_start": started}))
        return directory


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    monkeypatch.setattr(outside, "root", lambda: tmp_path)
    found = Storage(tmp_path)
    yield found
    for child in found.children:
        child.kill()
        child.communicate()


def started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_a_pods_containers_of_each_the_latest_attempt_and_not_the_sandbox(storage: Storage) -> None:
    storage.container(SANDBOX, "POD", kind="sandbox")
    storage.container(OLD, "main")
    storage.container(NEW, "main", attempt=1)
    storage.container("cc" * 32, "main", **{"io.kubernetes.pod.uid": "another"})
    found = storage.crio.pod(UID)
    assert {name: one.record.id for name, one in found.items()} == {"main": NEW}
    assert found["main"].log == Path("/var/log/pods/x/main/1.log")
    assert found["main"].record.image == "registry.example/job:1"
    assert storage.crio.kind is RuntimeKind.CRIO
    assert storage.crio.holds_pod(UID)
    assert not storage.crio.holds_pod("gone")
    assert storage.crio.pod("gone") == {}
    with pytest.raises(UsageError):
        storage.crio.pod("../..")


def test_by_which_program_a_container_was_made_is_what_its_conmon_was_told(storage: Storage) -> None:
    storage.container(NEW, "main")
    storage.container(OLD, "side")
    storage.conmon(NEW, WRAPPER)
    record = storage.crio.container(NEW)
    assert record.runc_options().binary_name == WRAPPER
    assert storage.crio.runc_root(record) == storage.root / "runc"
    assert storage.crio.container(OLD).runc_options().binary_name == "", "its conmon is gone: nobody can tell"
    # a pid that is another process' now says nothing
    stale = storage.root / f"run/containers/storage/overlay-containers/{OLD}/userdata"
    stale.mkdir(parents=True)
    (stale / "conmon-pidfile").write_text(str(storage.children[0].pid))
    assert storage.crio.container(OLD).runc_options().binary_name == ""


@pytest.mark.parametrize(
    "words",
    [
        ["conmon", "-r", "/bin/x", "--runtime-arg", "--root=/run/x"],
        ["conmon", "--runtime", "/bin/x", "--runtime-arg=--root=/run/x"],
    ],
)
def test_conmons_command_line(words: list[str]) -> None:
    assert Monitor.of(words) == Monitor("/bin/x", "/run/x")
    assert Monitor.of(["conmon", "-c", "id"]) == Monitor("", "/run/runc")


def test_where_a_container_has_its_files(storage: Storage) -> None:
    storage.container(NEW, "main")
    record = storage.crio.container(NEW)
    merged = storage.root / f"graph/overlay/layer-{NEW[:4]}/merged"
    assert storage.crio.upper(record) == merged.with_name("diff")
    assert storage.crio.root(record) == storage.root / str(merged).lstrip("/"), "as the node mounts it"
    merged.with_name("diff").rmdir()
    with pytest.raises(Refused, match="no upper directory"):
        storage.crio.upper(record)


def test_whether_it_runs_is_what_runcs_state_and_the_kernel_say(storage: Storage) -> None:
    storage.container(NEW, "main")
    storage.conmon(NEW, WRAPPER)
    with pytest.raises(ContainerNotFound, match="no state"):
        storage.crio.task(NEW)
    pid = os.getpid()
    directory = storage.state(NEW, pid, started(pid))
    assert (storage.crio.task(NEW).status, storage.crio.task(NEW).pid) == (TaskStatus.RUNNING, pid)
    (directory / "exec.fifo").touch()
    assert storage.crio.task(NEW).status is TaskStatus.CREATED
    (directory / "exec.fifo").unlink()
    storage.state(NEW, pid, started(pid) + 1)
    assert storage.crio.task(NEW).status is TaskStatus.STOPPED, "the pid is another process' now"


def test_what_is_being_written_or_no_container_is_said(storage: Storage) -> None:
    with pytest.raises(ContainerNotFound):
        storage.crio.container(NEW)
    with pytest.raises(ContainerNotFound):
        storage.crio.container("../../etc")
    storage.container(NEW, "main")
    storage.container(OLD, "side")
    (storage.root / f"graph/overlay-containers/{OLD}/userdata/config.json").write_text(f'{{"{UID}')
    with pytest.raises(CrioFailed, match="not JSON"):
        storage.crio.container(OLD)
    assert set(storage.crio.pod(UID)) == {"main"}


def test_how_a_container_ended_is_what_conmon_wrote(storage: Storage) -> None:
    exits = storage.root / str(module.EXITS).lstrip("/")
    exits.mkdir(parents=True)
    (exits / NEW).write_text("137")
    assert storage.crio.wait_task(NEW, 1.0) == 137
    with pytest.raises(TimedOut, match="how 01"):
        storage.crio.wait_task(OLD, 0.0)


def test_where_nobody_answers_that_is_said(storage: Storage) -> None:
    with pytest.raises(Failed, match="CRI-O cannot ask its version"):
        storage.crio.version()


def test_what_crio_mounts_of_a_sandbox_is_the_pods_own(tmp_path: Path, storage: Storage) -> None:
    spec = storage.container(NEW, "main")
    assert list(cri.foreign_binds(spec, UID, tmp_path)) == []
    spec["mounts"].append({"source": "/etc/other", "destination": "/other", "type": "bind", "options": ["rbind"]})
    spec["mounts"].append(
        {"source": "/srv/overlay-containers/x/y", "destination": "/z", "type": "bind", "options": ["rbind"]}
    )
    assert [one.source for one in cri.foreign_binds(spec, UID, tmp_path)] == [
        "/etc/other",
        "/srv/overlay-containers/x/y",
    ]
    found = cri.shared_memory([spec])
    assert found is not None
    assert found.name == "shm"

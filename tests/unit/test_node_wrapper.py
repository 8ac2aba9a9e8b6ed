"""podferry-runc and the agent's side of its hand-shake, with a scripted runc that writes down how it was called."""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import podferry.node
from podferry.criu.incoming import PARENT, Incoming, WrapperGone, pod_key, remove
from podferry.criu.waiting import wake
from podferry.errors import Bug, TimedOut, UsageError
from podferry.lab.state import CACHE
from podferry.node.process import spawn
from podferry.workload.frozen import unlock_exec

pytestmark = pytest.mark.unit

WRAPPER = Path(podferry.node.__file__).with_name("podferry-runc")
FAKE_RUNC = """#!/bin/sh
for word; do printf '%s\\n' "$word"; done >"$FAKE_RUNC_CALL"
ls /proc/self/fd >"$FAKE_RUNC_CALL.fds"
printf '%s' "${CRIU_CONFIG_FILE:-none}" >"$FAKE_RUNC_CALL.criu"
exit "${FAKE_RUNC_STATUS:-0}"
"""
# As containerd's shim calls its runtime.
GLOBALS = ["--root", "/run/containerd/runc/k8s.io", "--log", "LOG", "--log-format", "json", "--systemd-cgroup"]
CREATE = ["create", "--bundle", "/bundle", "--pid-file", "/bundle/init.pid"]
# The lab's node image has a static busybox; elsewhere it is rarely installed.
OF_THE_LAB = next((str(one) for one in CACHE.glob("node-*/usr/bin/busybox")), "busybox")
SHELLS = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": [shutil.which("busybox") or OF_THE_LAB, "sh"]}


class Bench:
    """A run directory, a fake runc, and the wrapper under one shell."""

    def __init__(self, shell: list[str], path: Path) -> None:
        self.shell = shell
        self.path = path
        self.run, self.state = path / "run", path / "state"
        self.log = path / "log.json"
        self.call = path / "call"
        (path / "bin").mkdir()
        (path / "bin/runc").write_text(FAKE_RUNC)
        (path / "bin/runc").chmod(0o755)
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, **env: str) -> subprocess.Popen[bytes]:
        path = f"{self.path / 'bin'}:{os.environ['PATH']}"
        places = {"PODFERRY_RUN": str(self.run), "PODFERRY_STATE": str(self.state)}
        env = {"PATH": path, **places, "FAKE_RUNC_CALL": str(self.call), **env}
        words = tuple(str(self.log) if word == "LOG" else word for word in words)
        self.children.append(spawn([*self.shell, WRAPPER, *words], env=env, stderr=subprocess.PIPE))
        return self.children[-1]

    def end(self, *words: str, **env: str) -> tuple[int, str]:
        return self.ended(self.start(*words, **env))

    @staticmethod
    def ended(child: subprocess.Popen[bytes]) -> tuple[int, str]:
        stderr = child.communicate(timeout=20)[1]
        return child.returncode, stderr.decode()

    def called(self) -> list[str]:
        return self.call.read_text().splitlines()

    def logged(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(params=SHELLS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    shell = SHELLS[request.param]
    if shutil.which(shell[0]) is None:
        pytest.skip(f"no {request.param} here, and no node image of the lab that has one")
    bench = Bench(shell, tmp_path)
    yield bench
    for child in bench.children:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["--root", "create", "list"],
        ["--root=/r", "state", "job"],
        [*GLOBALS, *CREATE, "job"],
        [*GLOBALS, *CREATE, "--console-socket", "/tmp/a b", "job"],
        [*GLOBALS, "start", "job"],
        [*GLOBALS, "delete", "--force", "job"],
        [*GLOBALS, "kill", "--all", "job", "9"],
        [*GLOBALS, "exec", "--process", "/tmp/p", "--detach", "job"],
        ["create", "a/../b"],
        ["create"],
        [],
    ],
)
@pytest.mark.parametrize("agent", ["never here", "here"])
def test_what_is_not_ours_reaches_runc_as_it_came(bench: Bench, words: list[str], agent: str) -> None:
    if agent == "here":
        Incoming.prepare("another", run=bench.run).close()
    status, said = bench.end(*words, FAKE_RUNC_STATUS="7")
    assert (status, said) == (7, "")
    assert bench.called() == [str(bench.log) if word == "LOG" else word for word in words]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([*GLOBALS, *CREATE, "job"], None),
        (["--root=/r", "--log=LOG", "create", "--bundle=/bundle", "--pid-file=/pid", "job"], None),
        (["--root", "create", "create", "-b", "/bundle", "job"], None),
        (
            [*GLOBALS, *CREATE, "--no-pivot", "--console-socket", "/run/a socket", "job"],
            None,
        ),
        (
            ["create", "--no-new-keyring", "--preserve-fds", "2", "--pidfd-socket=/s", "-b", "/b", "job"],
            ["create", "-b", "/b", "job"],
        ),
        (["create", "--pid-file", "create", "job"], None),
    ],
)
def test_create_becomes_restore(bench: Bench, given: list[str], kept: list[str] | None) -> None:
    with Incoming.prepare("job", flags=["--lazy-pages", "--file-locks"], run=bench.run) as incoming:
        child = bench.start(*given)
        incoming.wait_prepared(20)
        assert incoming.alive()
        assert not bench.call.exists(), "it did not wait"
        incoming.restore()
        assert bench.ended(child) == (0, "")
        restore = ["restore", "--detach", "--lazy-pages", "--file-locks"]
        restore += ["--image-path", str(incoming.images), "--work-path", str(incoming.work)]
    words = [str(bench.log) if word == "LOG" else word for word in kept or given]
    at = max(i for i, word in enumerate(words) if word == "create" and words[i - 1] not in ("--root", "--pid-file"))
    assert bench.called() == words[:at] + restore + words[at + 1 :]
    assert set(Path(f"{bench.call}.fds").read_text().split()) <= {"0", "1", "2", "3"}, "our FIFOs leak into runc"


def test_start_of_a_restored_container_does_nothing_and_delete_forgets(bench: Bench) -> None:
    with Incoming.prepare("job", run=bench.run) as incoming:
        child = bench.start(*GLOBALS, *CREATE, "job")
        incoming.wait_prepared(20)
        incoming.restore()
        bench.ended(child)
    bench.call.unlink()
    assert bench.end(*GLOBALS, "start", "job") == (0, "")
    assert not bench.call.exists()
    assert bench.end(*GLOBALS, "delete", "job") == (0, "")
    assert bench.called()[-2:] == ["delete", "job"]
    assert bench.end(*GLOBALS, "start", "job") == (0, "")
    assert bench.called()[-2:] == ["start", "job"]


def test_a_cold_start_after_a_restore_is_started(bench: Bench) -> None:
    (bench.run / "restored").mkdir(parents=True)
    (bench.run / "restored/job").touch()
    assert bench.end(*GLOBALS, *CREATE, "job")[0] == 0
    bench.end(*GLOBALS, "start", "job")
    assert bench.called()[-2:] == ["start", "job"]


def test_cold_when_told_so(bench: Bench) -> None:
    words = [*GLOBALS, *CREATE, "--no-new-keyring", "job"]
    with Incoming.prepare("job", run=bench.run) as incoming:
        child = bench.start(*words)
        incoming.wait_prepared(20)
        incoming.cold()
        assert bench.ended(child) == (0, "")
    assert bench.called() == [str(bench.log) if word == "LOG" else word for word in words]
    assert bench.end("start", "job") == (0, "")
    assert bench.called() == ["start", "job"]


def test_a_refusal_reaches_containerd(bench: Bench) -> None:
    with Incoming.prepare("job", run=bench.run) as incoming:
        child = bench.start(*GLOBALS, *CREATE, "job")
        incoming.wait_prepared(20)
        incoming.refuse('the store is "incomplete"\n\\ 5 pages')
        status, said = bench.ended(child)
    assert status == 1
    assert "the store is" in said and "5 pages" in said
    [entry] = bench.logged()
    assert entry["level"] == "error" and "5 pages" in entry["msg"] and entry["time"].endswith("Z")
    assert not bench.call.exists()


def test_the_agents_death_while_the_wrapper_waits_ends_it_without_a_start(bench: Bench) -> None:
    incoming = Incoming.prepare("job", run=bench.run)
    child = bench.start(*GLOBALS, *CREATE, "job")
    incoming.wait_prepared(20)
    incoming.close()
    status, said = bench.ended(child)
    assert status == 1 and "the agent went away" in said
    assert bench.logged()[-1]["msg"] == "podferry-runc: the agent went away"
    assert not bench.call.exists()


def test_a_directory_of_a_dead_agent_does_not_hang_the_wrapper(bench: Bench) -> None:
    incoming = Incoming.prepare("job", run=bench.run)
    kept = bench.path / "kept"
    shutil.copytree(incoming.path / "images", kept)
    os.close(incoming._poised)
    os.close(incoming._verdict)
    incoming._poised = incoming._verdict = -1  # as a killed agent leaves it: the directory, and nobody there
    status, said = bench.end(*GLOBALS, *CREATE, "job")
    assert status == 1 and "the agent went away" in said
    with Incoming.adopt("job", run=bench.run) as again:
        child = bench.start(*GLOBALS, *CREATE, "job")
        again.wait_prepared(20)
        again.restore()
        assert bench.ended(child) == (0, "")
    assert "restore" in bench.called()


def test_the_wrappers_death_is_noticed(bench: Bench) -> None:
    with Incoming.prepare("job", run=bench.run) as incoming:
        child = bench.start(*GLOBALS, *CREATE, "job")
        incoming.wait_prepared(20)
        death = select.poll()
        death.register(incoming, select.POLLIN)
        assert death.poll(0) == []
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert [fd for fd, _ in death.poll(20_000)] == [incoming.fileno()]
        assert not incoming.alive()
        with pytest.raises(WrapperGone):
            incoming.restore()


def test_a_half_made_directory_is_not_taken_for_whole(bench: Bench) -> None:
    (bench.run / "incoming/job/images").mkdir(parents=True)
    status, said = bench.end(*GLOBALS, *CREATE, "job")
    assert status == 1 and "not whole" in said
    assert not bench.call.exists()


def test_what_was_prepared_in_part_is_not_listed_and_goes_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node had no room when the directory was made, or the agent was killed."""

    def no_room(path: Path, mode: int = 0o666) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as full:
        full.setattr(os, "mkfifo", no_room)
        with pytest.raises(OSError, match="No space"):
            Incoming.prepare("job", run=tmp_path)
    incoming = tmp_path / "incoming"
    assert list(incoming.iterdir()), "nothing was prepared in part: this test shows nothing"
    assert Incoming.left(tmp_path) == ()
    remove(incoming, "job")
    assert not list(incoming.iterdir())


def test_a_container_of_kubernetes_is_found_by_its_pod(bench: Bench) -> None:
    bundle = bench.path / "bundle"
    bundle.mkdir()
    uid = "0f8a1c9e-1111-4222-8333-444455556666"
    spec: dict[str, Any] = {
        "process": {
            "env": ['X="io.kubernetes.cri.sandbox-uid":"elsewhere","io.kubernetes.cri.container-name":"other"']
        },
        "annotations": {
            "io.kubernetes.cri.container-name": "train",
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-uid": uid,
        },
    }
    (bundle / "config.json").write_text(json.dumps(spec, separators=(",", ":")))
    with Incoming.prepare(pod_key(uid, "train"), run=bench.run) as incoming:
        child = bench.start(*GLOBALS, "create", "--bundle", str(bundle), "c0ffee")
        incoming.wait_prepared(20)
        incoming.restore()
        assert bench.ended(child) == (0, "")
    assert bench.called()[-1] == "c0ffee"
    assert "restore" in bench.called()
    assert (bench.run / "restored/c0ffee").exists()
    del spec["annotations"]["io.kubernetes.cri.container-name"]  # the pod's sandbox
    (bundle / "config.json").write_text(json.dumps(spec, separators=(",", ":")))
    with Incoming.prepare(pod_key(uid, "train"), run=bench.run):
        assert bench.end("create", "--bundle", str(bundle), "pause") == (0, "")
    assert "create" in bench.called()


UID = "0f8a1c9e-1111-4222-8333-444455556666"


def create_of(bench: Bench, name: str = "train", **annotations: str) -> list[str]:
    """How containerd creates a container of a pod with these annotations; without a `name` its sandbox."""
    bundle = bench.path / "bundle"
    bundle.mkdir(exist_ok=True)
    said = {
        "io.kubernetes.cri.sandbox-uid": UID,
        **{f"podferry.dev/{key}": value for key, value in annotations.items()},
    }
    if name:
        said["io.kubernetes.cri.container-name"] = name
    (bundle / "config.json").write_text(json.dumps({"annotations": said}, separators=(",", ":")))
    return [*GLOBALS, "create", "--bundle", str(bundle), "c0ffee"]


def mark(bench: Bench, kind: str, name: str) -> Path:
    (bench.state / kind).mkdir(parents=True, exist_ok=True)
    (bench.state / kind / name).touch()
    return bench.state / kind / name


def test_a_container_of_an_arriving_pod_waits_for_the_agent(bench: Bench) -> None:
    child = bench.start(*create_of(bench, migration="move-1"))
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    with Incoming.prepare(pod_key(UID, "train"), criu_conf="tcp-close\n", run=bench.run) as incoming:
        incoming.wait_prepared(20)
        assert (incoming.container, incoming.wrapper) == ("c0ffee", child.pid)
        incoming.restore()
        assert bench.ended(child) == (0, "")
        assert "restore" in bench.called()
        assert Path(f"{bench.call}.criu").read_text() == str(incoming.path / "criu.conf")


def test_who_waits_does_not_look_again_and_again(bench: Bench) -> None:
    """Its one call of sleep is its clock. What wakes it is the agent, and nothing of it is left afterwards."""
    clock = bench.path / "bin/sleep"
    clock.write_text(f'#!/bin/sh\necho "$1" >>{bench.path}/slept\nexec {shutil.which("sleep")} "$1"\n')
    clock.chmod(0o755)

    def slept() -> list[str]:
        if bench.shell[-1] == "sh":  # busybox' own sleep is no program that could be another
            return ["10", "59"]
        return sorted((bench.path / "slept").read_text().split())

    arrives = bench.start(*create_of(bench, migration="move-1"), PODFERRY_PATIENCE="59")
    guarded = bench.run / "leaving/c0ffee"
    guarded.parent.mkdir(parents=True)
    guarded.touch()
    enters = bench.start(*GLOBALS, "exec", "--process", "/tmp/p", "c0ffee")
    with pytest.raises(subprocess.TimeoutExpired):
        arrives.wait(1.0)
    assert slept() == ["10", "59"]
    unlock_exec({"path": str(guarded)})
    assert bench.ended(enters) == (0, "")
    with Incoming.prepare(pod_key(UID, "train"), run=bench.run) as incoming:
        incoming.wait_prepared(20)
        assert not list((bench.run / "waiting").iterdir())
        incoming.restore()
        assert bench.ended(arrives) == (0, "")
    assert slept() == ["10", "59"]


def test_the_agent_does_not_wait_for_those_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "waiting").mkdir()
    for name in ("job.17", "job.x.17", "other.17"):
        os.mkfifo(tmp_path / "waiting" / name)
    (tmp_path / "waiting" / "job.18").symlink_to(tmp_path / "waiting" / "other.17")
    wake(tmp_path, "job")
    assert sorted(path.name for path in (tmp_path / "waiting").iterdir()) == ["job.18", "job.x.17", "other.17"]
    wake(tmp_path / "nowhere", "job")


def test_a_container_of_an_arriving_pod_never_starts_cold(bench: Bench) -> None:
    status, said = bench.end(*create_of(bench, migration="move-1"), PODFERRY_PATIENCE="0")
    assert status == 1 and "does not start anew" in said
    assert "its state does not come" in bench.logged()[-1]["msg"]
    assert not bench.call.exists()


def test_a_container_that_has_arrived_restarts_as_any_other(bench: Bench) -> None:
    mark(bench, "arrived", pod_key(UID, "train"))
    assert bench.end(*create_of(bench, migration="move-1"), PODFERRY_PATIENCE="0") == (0, "")
    assert "create" in bench.called()
    assert bench.end(*create_of(bench, "other", migration="move-1"), PODFERRY_PATIENCE="0")[0] == 1


def test_nothing_of_a_pod_that_leaves_starts_here_again(bench: Bench) -> None:
    there = mark(bench, "departed", UID)
    status, said = bench.end(*create_of(bench))
    assert status == 1 and "on its way to another node" in said
    assert not bench.call.exists()
    there.unlink()
    assert bench.end(*create_of(bench)) == (0, "")


def test_nobody_comes_in_while_a_container_leaves(bench: Bench) -> None:
    exec_lock = bench.run / "leaving/c0ffee"
    exec_lock.parent.mkdir(parents=True)
    exec_lock.touch()
    child = bench.start(*GLOBALS, "exec", "--process", "/tmp/p", "--detach", "--pid-file", "/p", "c0ffee")
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    assert not bench.call.exists()
    unlock_exec({"path": str(exec_lock)})
    assert bench.ended(child) == (0, "")
    assert bench.called()[-1] == "c0ffee"


def guard(bench: Bench) -> Path:
    """The container c0ffee of a pod stands still to be moved."""
    exec_lock = bench.run / "leaving/c0ffee"
    exec_lock.parent.mkdir(parents=True)
    exec_lock.write_text("guarded\n")
    return exec_lock


def test_a_probe_that_comes_in_while_a_pod_stands_still_has_no_result(bench: Bench) -> None:
    """The kubelet counts a command that fails or takes too long against the container; that there can be none it throws away."""
    guard(bench)
    status, said = bench.end(*GLOBALS, "exec", "--process", "/tmp/p", "--detach", "--pid-file", "/p", "c0ffee")
    assert (status, bench.call.exists()) == (1, False)
    assert "is frozen for a migration" in said
    assert "is frozen" in bench.logged()[-1]["msg"]


@pytest.mark.parametrize("words", [["15"], ["--all", "SIGHUP"], ["9"], [], ["KILL"]])
def test_a_container_of_a_pod_that_stands_still_is_not_killed(bench: Bench, words: list[str]) -> None:
    exec_lock = guard(bench)
    options, signals = [one for one in words if one.startswith("-")], [one for one in words if not one.startswith("-")]
    kill = [*GLOBALS, "kill", *options, "c0ffee", *signals]
    status, said = bench.end(*kill)
    assert (status, bench.call.exists()) == (1, False)
    assert "not killed before that has ended" in said
    assert not {"not running", "no such process", "already finished"} & {said}, "containerd would take that for its end"
    kept = exec_lock.with_name("c0ffee.signal")
    first = None if signals in (["9"], ["KILL"]) else (signals or ["15"])[0]
    assert (kept.read_text().strip() if kept.exists() else None) == first
    bench.end(*GLOBALS, "kill", "c0ffee", "9")
    bench.end(*GLOBALS, "kill", "c0ffee", "2")
    assert kept.read_text().strip() == (first or "2"), "the first one counts"
    assert bench.end(*GLOBALS, "kill", "another", "9") == (0, "")
    exec_lock.unlink()
    assert bench.end(*kill) == (0, "")
    assert bench.called()[-len(words) - 2 :] == kill[-len(words) - 2 :]


def test_the_sandbox_of_a_pod_is_never_touched(bench: Bench) -> None:
    mark(bench, "departed", UID)
    assert bench.end(*create_of(bench, "", migration="move-1"), PODFERRY_PATIENCE="0") == (0, "")
    assert "create" in bench.called()


def test_no_wrapper_comes(tmp_path: Path) -> None:
    with Incoming.prepare("job", run=tmp_path) as incoming:
        assert incoming.left(tmp_path) == ("job",)
        with pytest.raises(TimedOut):
            incoming.wait_prepared(0)
        incoming.abandon()
        with pytest.raises(WrapperGone):
            incoming.wait_prepared(20)
    assert Incoming.left(tmp_path) == ()


@pytest.mark.parametrize("key", ["", "..", "a/b", ".draft", "-x", "a\n", "x" * 300])
def test_keys_are_checked(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError):
        Incoming.prepare(key, run=tmp_path)


def test_flags_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Incoming.prepare("job", flags=["--lazy-pages; reboot"], run=tmp_path)


def test_there_is_one_verdict(bench: Bench) -> None:
    with Incoming.prepare("job", run=bench.run) as incoming:
        child = bench.start(*CREATE, "job")
        incoming.wait_prepared(20)
        incoming.refuse("no")
        with pytest.raises(Bug):
            incoming.restore()
        assert bench.ended(child)[0] == 1


def test_nothing_to_adopt(tmp_path: Path) -> None:
    with pytest.raises(WrapperGone):
        Incoming.adopt("job", run=tmp_path)


def of_crio(bench: Bench, kind: str, name: str) -> list[str]:
    """How conmon creates a container of CRI-O's: its spec has line breaks, and labels within annotations."""
    bundle = bench.path / "bundle"
    bundle.mkdir(exist_ok=True)
    labels = {"io.kubernetes.container.name": "other", "io.kubernetes.pod.uid": "elsewhere"}
    said = {
        "io.kubernetes.container.name": name,
        "io.kubernetes.cri-o.ContainerType": kind,
        "io.kubernetes.cri-o.Labels": json.dumps(labels, separators=(",", ":")),
        "io.kubernetes.pod.uid": UID,
    }
    (bundle / "config.json").write_text(json.dumps({"annotations": said}, indent=2))
    return ["--root=/run/runc", "create", "--bundle", str(bundle), "--pid-file", "/p", "c0ffee"]


def test_a_container_of_crio_is_found_by_its_pod_and_its_sandbox_is_not(bench: Bench) -> None:
    with Incoming.prepare(pod_key(UID, "train"), run=bench.run) as incoming:
        child = bench.start(*of_crio(bench, "container", "train"))
        incoming.wait_prepared(20)
        incoming.restore()
        assert bench.ended(child) == (0, "")
        assert "restore" in bench.called()
    with Incoming.prepare(pod_key(UID, "POD"), run=bench.run):
        assert bench.end(*of_crio(bench, "sandbox", "POD")) == (0, "")
    assert "create" in bench.called()


def test_crio_is_told_that_what_was_restored_is_created_until_it_has_started_it(bench: Bench) -> None:
    """It starts nothing else (server/container_start.go), and asks for the state right after `create`."""

    def state() -> str:
        asked = subprocess.run(
            [*bench.shell, WRAPPER, "--root=/run/runc", "state", "job"],
            env={"PATH": f"{bench.path / 'bin'}:{os.environ['PATH']}", "PODFERRY_RUN": str(bench.run)},
            capture_output=True,
            text=True,
            check=True,
        )
        status = json.loads(asked.stdout)["status"]
        assert isinstance(status, str)
        return status

    (bench.path / "bin/runc").write_text('#!/bin/sh\nprintf \'{\\n  "id": "job",\\n  "status": "running"\\n}\'\n')
    assert state() == "running"
    (bench.run / "restored").mkdir(parents=True)
    (bench.run / "restored/job").touch()
    assert state() == "created"
    assert bench.end("--root=/run/runc", "start", "job") == (0, "")
    assert state() == "running"
    (bench.run / "restored/job").write_text("")
    (bench.path / "bin/runc").write_text("#!/bin/sh\nexit 5\n")
    assert bench.end("--root=/run/runc", "state", "job")[0] == 5


CRIU = """#!{python}
# As runc asks it: makes, in a restore, a job beside itself as CRIU does, that has ended before it answers.
import ctypes, os, pathlib, signal, socket
CLONE_PARENT, CLONE = 0x8000, {{"x86_64": 56, "aarch64": 220}}[os.uname().machine]
with socket.socket(fileno=3) as runc:
    answer = runc.recv(64)
    if answer == b"restore":
        assert sorted(os.listdir("/proc/self/fd")) == ["0", "1", "2", "3", "4", "8"]  # 4 is the listing's
        assert os.readlink("/proc/self/fd/0") == os.environ["STDIN"]
        pid = ctypes.CDLL(None).syscall(CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os.closerange(0, 64)
            os._exit(7)
        pathlib.Path(os.environ["PODFERRY_RUN"], "incoming/job/whole").touch()  # by the action script
        while pathlib.Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        answer = str(pid).encode()
    runc.send(answer)
"""
RUNC = """#!{python}
import os, socket, subprocess, sys
for question in (b"version", b"restore") if "restore" in sys.argv else ():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    criu = subprocess.Popen(["criu", "swrk", "3"], pass_fds=[3], preexec_fn=lambda: os.dup2(theirs.fileno(), 3))
    theirs.close()
    ours.send(question)
    answer = ours.recv(64)
    assert ours.recv(64) == b"", "nobody else has its end"
    assert criu.wait() == 0
    ours.close()
    print(answer.decode(), flush=True)
"""
SHIM = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
word, wrapper = sys.argv[1], sys.argv[2:]
made = subprocess.run([*wrapper, "create", "job"], stdout=subprocess.PIPE, check=True, text=True)
version, pid = made.stdout.split()
def reaped(pid):
    try:
        return os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return (0, 0)
print(reaped(int(pid)), flush=True)
subprocess.run([*wrapper, word, "job"], check=True)
while (found := reaped(int(pid))) == (0, 0):
    pass
print(os.waitstatus_to_exitcode(found[1]), flush=True)
try:
    while True:
        os.wait()
except ChildProcessError:
    print("nobody is left")
"""


@pytest.mark.parametrize("word", ["start", "kill", "delete"])
def test_an_end_before_the_start_is_not_seen_until_then(bench: Bench, word: str) -> None:
    """containerd's shim refuses to start what it has seen end."""
    for name, program in (("criu", CRIU), ("runc", RUNC)):
        (bench.path / "bin" / name).write_text(program.format(python=sys.executable))
        (bench.path / "bin" / name).chmod(0o755)
    with Incoming.prepare("job", run=bench.run) as incoming, (bench.path / "stdin").open("w+") as stdin:
        criu = incoming.path / "bin/criu"
        script = PARENT.read_text().removeprefix("#!/bin/sh\n")
        criu.unlink()
        criu.write_text(f"#!{' '.join([shutil.which(bench.shell[0]) or '', *bench.shell[1:]])}\n{script}")
        criu.chmod(0o755)
        places = {"PODFERRY_RUN": str(bench.run), "PODFERRY_STATE": str(bench.state), "STDIN": stdin.name}
        env = {"PATH": f"{bench.path / 'bin'}:{os.environ['PATH']}", **places}
        shim = [sys.executable, "-c", SHIM, word, *bench.shell, str(WRAPPER)]
        bench.children.append(
            child := spawn(shim, env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        incoming.wait_prepared(20)
        incoming.restore()
        said, complained = child.communicate(timeout=120)
    assert not complained, complained.decode()
    assert said.decode().splitlines() == ["(0, 0)", "7", "nobody is left"]

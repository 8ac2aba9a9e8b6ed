"""The `criu` that holds a request to dump, run as runc runs it, before a `criu` that only says that it was called."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from podferry.criu.dump_gate import ON_NODE, SHIM, DumpGate
from podferry.criu.gatekeeper import DUMP
from podferry.node import outside

pytestmark = pytest.mark.unit
FEATURE_CHECK = b"\x08\x09"
REST = b"\x12\x04opts"
NODE = """
for shared in proc "$2"; do mkdir -p "$1/$shared"; mount --rbind "/$shared" "$1/$shared"; done
node=$1
shift 2
exec chroot "$node" "$@"
"""


class Where:
    """The files that runc is among. On a host they are the agent's."""

    def words(self, *words: str) -> list[str]:
        return list(words)

    def close(self) -> None:
        """Nothing was made."""


class Node(Where):
    """A node without a Python, for an agent in a pod; `shared` is the same directory on it and in the pod."""

    def __init__(self, top: Path, shared: Path) -> None:
        self.top = top
        (top / "bin").mkdir(parents=True)
        for name in ("sh", "chroot", "sleep"):
            program = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
            assert program
            shutil.copy(program, top / "bin" / name)
            libraries = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout.split()
            for library in map(Path, filter(lambda word: word.startswith("/"), libraries)):
                self.path(library).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, self.path(library))
        self.path(ON_NODE).parent.mkdir(parents=True)
        shutil.copy(SHIM, self.path(ON_NODE))
        self.init = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "sh",
                "-ec",
                NODE,
                "sh",
                str(top),
                str(shared),
                "/bin/sh",
                "-c",
                "echo; exec sleep 1000",
            ],
            stdout=subprocess.PIPE,
        )
        assert self.init.stdout is not None
        assert self.init.stdout.readline() == b"\n"

    def path(self, path: Path) -> Path:
        return self.top / path.relative_to("/")

    def words(self, *words: str) -> list[str]:
        return ["nsenter", f"--target={self.init.pid}", "--mount", "chroot", str(self.top), *words]

    def close(self) -> None:
        assert self.init.stdout is not None
        self.init.stdout.close()
        self.init.kill()
        self.init.wait()


def may_make_nodes() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0


@pytest.fixture(params=["host", "pod"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Where]:
    """An agent's node."""
    if request.param == "host":
        monkeypatch.delenv(outside.IN_POD, raising=False)
        yield Where()
        return
    if not may_make_nodes():
        pytest.skip("no mount namespaces here: root makes them")
    shared = tmp_path / "shared"
    shared.mkdir()
    node = Node(tmp_path / "node", shared)
    monkeypatch.setenv(outside.IN_POD, "1")
    monkeypatch.setattr(outside, "root", lambda: Path(f"/proc/{node.init.pid}/root"))
    monkeypatch.setattr(outside, "on_node", lambda argv: node.words(*map(str, argv)))
    yield node
    node.close()


@dataclass
class Held:
    gate: DumpGate
    runc: socket.socket
    shim: subprocess.Popen[bytes]
    called: Path

    def still_waits(self) -> bool:
        try:
            self.shim.wait(0.3)
        except subprocess.TimeoutExpired:
            return not self.called.exists()
        return False


@pytest.fixture
def held(tmp_path: Path, where: Where, request: pytest.FixtureRequest) -> Iterator[Held]:
    """The shim, asked for what the parameter says. `real` is a file of which it may be shown another, as its second word says."""
    programs, called = tmp_path / "shared/bin", tmp_path / "shared/called"
    programs.mkdir(parents=True)
    for name in ("real", "other"):
        (tmp_path / "shared" / name).write_text(name)
    seen = f'read line <{tmp_path}/shared/real; echo "$line" >{called}.seen'
    (programs / "criu").write_text(f'#!/bin/sh\necho "$@ $PATH" >{called}\n{seen}\n')
    (programs / "criu").chmod(0o755)
    gate = DumpGate(tmp_path / "shared/gate")
    runc, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kind, _, how = request.param.partition(b" ")
    environment = gate.environment(f"{programs}:/usr/sbin:/usr/bin:/bin")
    if how:
        listed = tmp_path / "shared/listed"
        environment["PODFERRY_SHOWN"] = str(listed)
        if how != b"unlisted":
            listed.write_text(
                "".join(f"{tmp_path}/shared/{name} {tmp_path}/shared/real\n" for name in how.decode().split())
            )
    with runc, theirs:
        runc.send(kind + REST)
        # As Go does it: the socket is the child's descriptor 3.
        argv = ["/bin/bash", "-c", f'exec 3<&{theirs.fileno()}; exec "$@"', "sh", *where.words("criu", "swrk", "3")]
        shim = subprocess.Popen(argv, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        yield Held(gate, runc, shim, called)
        gate.close()
        shim.wait(10)


def test_the_shim_is_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(outside.IN_POD, raising=False)
    assert DumpGate.usable()
    assert SHIM.name == ON_NODE.name == "criu"


@pytest.mark.parametrize("where", ["pod"], indirect=True)
def test_a_pod_tries_whether_its_node_can_come_to_its_python(where: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("podferry.criu.dump_gate.PATH", "/usr/sbin:/bin:/usr/bin")
    assert not DumpGate.usable(), "there is no criu"
    criu = where.top / "bin" / "criu"
    criu.write_text('#!/bin/sh\n[ "$*" = --version ]\n')
    criu.chmod(0o755)
    assert DumpGate.usable()
    for lost in (where.top / "bin" / "chroot", where.path(ON_NODE)):
        lost.rename(where.top / "lost")
        assert not DumpGate.usable()
        (where.top / "lost").rename(lost)
    where.path(ON_NODE).write_text("#!/bin/sh\nexit 1\n")
    assert not DumpGate.usable()
    shutil.copy(SHIM, where.path(ON_NODE))
    assert DumpGate.usable()
    where.close()
    assert not DumpGate.usable(), "there is no way back"


@pytest.mark.parametrize("held", [DUMP], indirect=True)
def test_a_dump_waits_until_the_gate_opens(held: Held) -> None:
    assert held.still_waits()
    held.gate.open()
    assert held.shim.wait(10) == 0
    arguments, path = held.called.read_text().split(" /", 1)
    assert arguments == "swrk 3"
    assert str(SHIM.parent) not in path
    assert str(ON_NODE.parent) not in path


@pytest.mark.parametrize(
    ("held", "seen"),
    [
        (DUMP, "real"),
        (DUMP + b" other", "other"),
        (DUMP + b" other other", "other"),
        (DUMP + b" missing", "real"),
        (DUMP + b" unlisted", "real"),
        (FEATURE_CHECK + b" other", "real"),
    ],
    indirect=["held"],
)
def test_a_dump_finds_what_it_is_to_find_where_that_can_be_had(held: Held, seen: str) -> None:
    if seen == "other" and not may_make_nodes():
        pytest.skip("no mount namespaces here: root makes them")
    held.gate.open()
    assert held.shim.wait(10) == 0
    assert held.called.with_name("called.seen").read_text().strip() == seen
    assert held.called.with_name("real").read_text() == "real", "nobody else finds another"


@pytest.mark.parametrize("held", [DUMP], indirect=True)
def test_a_gate_may_be_open_before_anybody_comes(held: Held) -> None:
    held.gate.open()
    assert held.shim.wait(10) == 0
    assert held.called.exists()


@pytest.mark.parametrize("held", [FEATURE_CHECK], indirect=True)
def test_questions_pass(held: Held) -> None:
    assert held.shim.wait(10) == 0
    assert held.called.exists()


@pytest.mark.parametrize("held", [DUMP], indirect=True)
@pytest.mark.parametrize("gone", ["agent", "agent, long ago", "runc", "directory"])
def test_a_dump_that_is_called_off_does_not_take_place(held: Held, gone: str) -> None:
    if gone == "directory":
        held.gate.path.unlink()
    elif gone == "agent, long ago":
        held.gate.close()
    assert gone not in ("agent", "runc") or held.still_waits()
    match gone:
        case "agent":
            held.gate.close()
        case "runc":
            held.runc.close()
        case "directory":
            held.gate.close()
    assert held.shim.wait(10) != 0
    assert not held.called.exists()


def test_only_requests_are_held(tmp_path: Path) -> None:
    (tmp_path / "criu").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "criu").chmod(0o755)
    for words in (["swrk", "8"], ["--version"], []):
        done = subprocess.run(
            [SHIM, *words], check=False, env={"PODFERRY_PATH": f"{tmp_path}:{os.defpath}", "PATH": os.defpath}
        )
        assert done.returncode == 7

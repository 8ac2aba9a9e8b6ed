"""The `criu` that holds a request to dump, run as runc runs it, before a `criu` that only says that it was called."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from podferry.node.gate import DUMP, SHIM, Gate

pytestmark = pytest.mark.unit
FEATURE_CHECK = b"\x08\x09"
REST = b"\x12\x04opts"
THIN: dict[str, dict[str, str]] = {
    "": {},
    "thin": {"PODFERRY_THIN": "thin"},
    "cannot": {"PODFERRY_THIN": "thin", "PODFERRY_SHOWN": "/nonexistent", "PODFERRY_INSTEAD_OF": "/nonexistent/file"},
}


@dataclass
class Held:
    gate: Gate
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
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Held]:
    """The shim, asked for what the parameter says."""
    programs, called = tmp_path / "bin", tmp_path / "called"
    programs.mkdir()
    (programs / "criu").write_text(f'#!/bin/sh\necho "$@ $PATH" >{called}\necho "$CRIU_CONFIG_FILE" >{called}.conf\n')
    (programs / "criu").chmod(0o755)
    gate = Gate(tmp_path / "gate")
    runc, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kind, _, how = request.param.partition(b" ")
    environment = gate.environment(f"{programs}:/usr/bin:/bin") | {"CRIU_CONFIG_FILE": "ordinary", **THIN[how.decode()]}
    with runc, theirs:
        runc.send(kind + REST)
        # As Go does it: the socket is the child's descriptor 3.
        argv = ["/bin/bash", "-c", f'exec 3<&{theirs.fileno()}; exec criu "$@"', "sh", "swrk", "3"]
        shim = subprocess.Popen(argv, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        yield Held(gate, runc, shim, called)
        gate.close()
        shim.wait(10)


def test_the_shim_is_a_program() -> None:
    assert Gate.usable()
    assert SHIM.name == "criu"


@pytest.mark.parametrize("held", [DUMP], indirect=True)
def test_a_dump_waits_until_the_gate_opens(held: Held) -> None:
    assert held.still_waits()
    held.gate.open()
    assert held.shim.wait(10) == 0
    arguments, path = held.called.read_text().split(" /", 1)
    assert arguments == "swrk 3"
    assert str(SHIM.parent) not in path


@pytest.mark.parametrize(
    ("held", "settings"),
    [
        (DUMP, "ordinary"),
        (DUMP + b" thin", "thin"),
        (DUMP + b" cannot", "ordinary"),
        (FEATURE_CHECK + b" thin", "ordinary"),
    ],
    indirect=["held"],
)
def test_a_dump_is_thin_where_that_can_be_had(held: Held, settings: str) -> None:
    held.gate.open()
    assert held.shim.wait(10) == 0
    assert held.called.with_name("called.conf").read_text().strip() == settings


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

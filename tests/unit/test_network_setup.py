"""The script that CRIU runs, and the agent that answers it; and what travels of a network namespace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from podferry.criu import network_setup
from podferry.criu.incoming import Incoming
from podferry.errors import Failed, PeerMisbehaved, Refused
from podferry.lab.state import CACHE
from podferry.node import netns, network_namespace
from podferry.node.netlock import Namespace
from podferry.node.network_namespace import DEFAULT, Network
from podferry.node.process import spawn

pytestmark = pytest.mark.unit

OF_THE_LAB = next((str(one) for one in CACHE.glob("node-*/usr/bin/busybox")), "busybox")
SHELLS = {"dash": ["dash"], "busybox": [shutil.which("busybox") or OF_THE_LAB, "sh"]}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> list[str]:
    argv = SHELLS[request.param]
    if shutil.which(argv[0]) is None:
        pytest.skip(f"needs {request.param}")
    return argv


def script(
    shell: list[str], images: Path, action: str = "post-setup-namespaces", pid: int = 7
) -> subprocess.Popen[bytes]:
    """CRIU's call of the script. CRIU names the directory of images by a descriptor of its own."""
    directory = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    shown = f"/proc/{os.getpid()}/fd/{directory}"
    env = {"CRTOOLS_SCRIPT_ACTION": action, "CRTOOLS_INIT_PID": str(pid), "CRTOOLS_IMAGE_DIR": shown}
    return spawn([*shell, network_setup.SCRIPT], env=env)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Network, int]]:
    """What the agent would have made, in place of namespaces."""
    calls: list[tuple[Network, int]] = []
    monkeypatch.setattr(network_namespace, "make", lambda what, pid: calls.append((what, pid)))
    return calls


def test_criu_goes_on_when_the_agent_has_arranged_the_namespace(
    tmp_path: Path, shell: list[str], made: list[tuple[Network, int]]
) -> None:
    with Incoming.prepare("job", network=True, run=tmp_path) as incoming:
        assert f"action-script {network_setup.SCRIPT}" in (incoming.path / "criu.conf").read_text()
        wanted = Network(settings={"ipv4/ip_forward": "1"})
        (incoming.images / network_namespace.IMAGE).write_bytes(wanted.encode())
        assert incoming._network is not None
        incoming._network.serve(incoming.images)
        assert script(shell, incoming.images).wait(10) == 0
    assert made == [(wanted, 7)]


def test_where_connections_come_along_loopback_is_held_until_all_sockets_are_there(
    tmp_path: Path, shell: list[str], made: list[tuple[Network, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []
    monkeypatch.setattr(Namespace, "lock", lambda self: did.append(f"lock {self.path}"))
    monkeypatch.setattr(Namespace, "unlock", lambda self: did.append(f"unlock {self.path}"))
    me = os.getpid()
    with Incoming.prepare("job", network=True, run=tmp_path) as incoming:
        (incoming.images / "tcp-stream-a.img").touch()
        assert incoming._network is not None
        incoming._network.serve(incoming.images)
        assert script(shell, incoming.images, pid=me).wait(10) == 0
        assert did == [f"lock /proc/{me}/ns/net"]
        assert script(shell, incoming.images, "post-restore", pid=me).wait(10) == 0
    assert did == [f"lock /proc/{me}/ns/net", f"unlock /proc/{me}/ns/net"]
    assert len(made) == 1


def test_without_connections_nobody_is_asked_after_the_restore(
    tmp_path: Path, shell: list[str], made: list[tuple[Network, int]]
) -> None:
    with Incoming.prepare("job", network=True, run=tmp_path) as incoming:
        assert script(shell, incoming.images, "post-restore").wait(10) == 0
    assert made == []


def test_without_a_description_loopback_is_brought_up(tmp_path: Path, made: list[tuple[Network, int]]) -> None:
    with Incoming.prepare("job", network=True, run=tmp_path) as incoming:
        assert incoming._network is not None
        incoming._network.serve(incoming.images)
        assert script(["sh"], incoming.images).wait(10) == 0
    assert made == [(DEFAULT, 7)]
    assert DEFAULT.up


@pytest.mark.parametrize("action", ["pre-restore", "setup-namespaces", "pre-resume", "post-resume"])
def test_other_steps_of_a_restore_are_no_business_of_the_script(tmp_path: Path, shell: list[str], action: str) -> None:
    assert script(shell, tmp_path, action).wait(10) == 0  # there is nobody to ask


def test_the_restore_fails_with_the_agents_reason(
    tmp_path: Path, shell: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(what: Network, pid: int) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(network_namespace, "make", fail)
    with Incoming.prepare("job", network=True, run=tmp_path) as incoming:
        assert incoming._network is not None
        incoming._network.serve(incoming.images)
        assert script(shell, incoming.images).wait(10) != 0
        failure = incoming.failed("the restore failed")
    assert isinstance(failure, Failed)
    assert "network namespace: PermissionError: no" in failure.why


def test_a_restore_whose_agent_has_gone_fails(tmp_path: Path, shell: list[str]) -> None:
    incoming = Incoming.prepare("job", network=True, run=tmp_path)
    kept = tmp_path / "kept"
    incoming.path.rename(kept)
    asking = script(shell, kept / "images")
    incoming.close()
    assert asking.wait(10) != 0


def test_an_agent_that_takes_over_answers_as_well(tmp_path: Path, made: list[tuple[Network, int]]) -> None:
    left = Incoming.prepare("job", network=True, run=tmp_path)
    incoming = Incoming.adopt("job", run=tmp_path)
    assert incoming._network is not None
    incoming._network.serve(incoming.images)
    assert script(["sh"], incoming.images).wait(10) == 0
    assert made == [(DEFAULT, 7)]
    incoming.close()
    left.close()


def test_a_container_that_joins_a_network_needs_no_script(tmp_path: Path) -> None:
    with Incoming.prepare("job", run=tmp_path) as incoming:
        assert str(network_setup.SCRIPT) not in (incoming.path / "criu.conf").read_text()
    assert netns.is_own({"linux": {"namespaces": [{"type": "network"}]}})
    assert not netns.is_own({"linux": {"namespaces": [{"type": "network", "path": "/proc/1/ns/net"}]}})
    assert not netns.is_own({"linux": {"namespaces": [{"type": "pid"}]}})


def test_a_node_whose_script_cannot_be_run_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network_setup, "SCRIPT", tmp_path / "none")
    with pytest.raises(Refused, match="network namespace") as refused:
        network_setup.settings()
    assert refused.value.remedy


def test_what_travels_comes_back_the_same() -> None:
    network = Network(False, 1500, ("10.0.0.5/32", "fd00::5/128"), {"ipv4/tcp_rmem": "4096\t131072\t6291456"})
    assert Network.decode(network.encode()) == network
    assert Network.decode(DEFAULT.encode()) == DEFAULT


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": {"../kernel/core_pattern": "|/x"}},
        {"settings": {"ipv4/../../kernel/core_pattern": "|/x"}},
        {"settings": {"/proc/sys/kernel/core_pattern": "|/x"}},
        {"settings": {"ipv4/ip_forward": "1\n2"}},
        {"settings": []},
        {"addresses": ["not one"]},
        {"addresses": None},
        {"mtu": "many"},
    ],
)
def test_a_peer_that_describes_something_else_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(PeerMisbehaved):
        Network.decode(json.dumps({**json.loads(DEFAULT.encode()), **changed}).encode())
    with pytest.raises(PeerMisbehaved):
        Network.decode(b"\xff{")

"""Installing on scratch roots, beside a CRI-O that only reads its drop-ins as the real one does."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from podferry.errors import Refused
from podferry.install import containerd_service, crio_service, node
from podferry.install.crio_service import CrioDaemon
from podferry.node import kubelet, outside
from podferry.node.kubelet import Kubelet

pytestmark = pytest.mark.unit

DROP_IN = f"{crio_service.DROP_INS}/{crio_service.NAME}"
MAIN = {
    "crio": {
        "runtime": {
            "default_runtime": "crun",
            "runtimes": {
                "crun": {
                    "runtime_path": "/usr/libexec/crio/crun",
                    "runtime_root": "/run/crun",
                    "monitor_path": "/usr/libexec/crio/conmon",
                    "allowed_annotations": ["io.containers.trace-syscall"],
                },
                "runc": {
                    "runtime_path": "/usr/libexec/crio/runc",
                    "runtime_root": "/run/runc",
                    "monitor_path": "/usr/bin/conmon",
                },
            },
        }
    }
}


@dataclass(frozen=True)
class Crio(CrioDaemon):
    """Reads its files and counts its starts."""

    root: Path = Path("/")
    restarts: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> dict[str, Any]:
        main: dict[str, Any] = tomllib.loads(tomli_w.dumps(MAIN))
        for path in sorted((self.root / self.drop_ins[1:]).glob("*")):
            told = tomllib.loads(path.read_text())["crio"]["runtime"]["runtimes"]
            main["crio"]["runtime"]["runtimes"] |= told
        return main

    def dump(self) -> str:
        return tomli_w.dumps(self.read())

    def restart(self) -> None:
        self.restarts.append(self.read())


@dataclass
class Node:
    root: Path
    crio: Crio

    def install(self) -> node.Installed:
        return node.install(lambda _: None, bundle=self.root, find=lambda: self.crio, memory=lambda _: None)

    def uninstall(self, *, force: bool = False) -> node.Installed:
        return node.uninstall(lambda _: None, force=force, find=lambda: self.crio, memory=lambda _: None)

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        place = self.root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)

    def tree(self) -> dict[str, object]:
        return {str(path): path.read_bytes() if path.is_file() else None for path in self.root.rglob("*")}


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(outside, "root", lambda: tmp_path)
    monkeypatch.setattr(outside, "on_node", lambda argv: [f"{tmp_path}{argv[0]}", *argv[1:]])
    one = Node(tmp_path, Crio(1, "/usr/bin/crio", (), crio_service.DROP_INS, root=tmp_path))
    one.put("/usr/sbin/criu", "#!/bin/sh\necho Version: 4.2.1\n", 0o755)
    one.put("/usr/libexec/crio/runc", "#!/bin/sh\n", 0o755)
    one.put("/etc/crio/crio.conf", "# the node's own\n")
    for directory in ("var/lib/podferry", "opt"):
        (tmp_path / directory).mkdir(parents=True)
    return one


def test_the_runtime_is_the_nodes_runc_by_another_program(on: Node) -> None:
    done = on.install()
    assert done.restarted
    assert DROP_IN in done.changed
    assert on.crio.restarts[-1]["crio"]["runtime"]["runtimes"]["podferry"] == {
        "runtime_path": node.WRAPPER,
        "runtime_type": "oci",
        "runtime_root": "/run/runc",
        "monitor_path": "/usr/bin/conmon",
    }
    assert (on.root / node.WRAPPER[1:]).read_bytes() == node.SOURCE.read_bytes()
    assert on.install() == node.Installed((), False)
    assert len(on.crio.restarts) == 1


def test_uninstalling_restores_the_node(on: Node) -> None:
    before = on.tree()
    on.install()
    assert on.tree() != before
    assert on.uninstall().restarted
    assert on.tree() == before | {f"{on.root}/etc/crio": None}
    assert on.crio.restarts[-1] == MAIN
    assert on.uninstall() == node.Installed((), False)


def test_drop_ins_of_others_stay(on: Node) -> None:
    on.put(f"{crio_service.DROP_INS}/10-kata.conf", tomli_w.dumps({"crio": {"runtime": {"runtimes": {"kata": {}}}}}))
    before = on.tree()
    on.install()
    on.uninstall()
    assert on.tree() == before


def test_settings_that_crio_would_not_take_go_back(on: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crio, "dump", lambda _: tomli_w.dumps(MAIN))
    with pytest.raises(Refused, match="CRI-O would not load podferry's runtime"):
        on.install()
    assert on.crio.restarts == []
    assert not (on.root / DROP_IN[1:]).exists()


def test_a_node_with_crun_alone_is_refused_before_anything_of_crio_is_touched(on: Node) -> None:
    (on.root / "usr/libexec/crio/runc").unlink()
    with pytest.raises(Refused, match="has no runc") as refused:
        on.install()
    assert "install runc" in refused.value.remedy
    assert on.crio.restarts == []
    assert not (on.root / crio_service.DROP_INS[1:]).exists()


def test_what_runc_does_not_say_is_as_with_the_usual_runtime() -> None:
    only_crun = {
        "crio": {
            "runtime": {**MAIN["crio"]["runtime"], "runtimes": {"crun": MAIN["crio"]["runtime"]["runtimes"]["crun"]}}
        }
    }  # type: ignore[index]
    ours = tomllib.loads(crio_service.drop_in(tomli_w.dumps(only_crun), node.WRAPPER))["crio"]["runtime"]["runtimes"]
    assert ours == {
        "podferry": {
            "monitor_path": "/usr/libexec/crio/conmon",
            "runtime_path": node.WRAPPER,
            "runtime_type": "oci",
            "runtime_root": "/run/runc",
        }
    }
    assert "podferry" in crio_service.drop_in("", node.WRAPPER)
    with pytest.raises(Refused, match="not TOML"):
        crio_service.drop_in("[", node.WRAPPER)


def test_a_node_whose_containers_need_the_runtime_keeps_it(on: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    on.install()
    monkeypatch.setattr(crio_service, "users", lambda root, wrapper: ["c0ffee"])
    before = on.tree()
    with pytest.raises(Refused, match="in use") as refused:
        on.uninstall()
    assert "CRI-O's c0ffee" in refused.value.why
    assert on.tree() == before
    assert on.uninstall(force=True).restarted


@pytest.mark.parametrize(
    ("words", "flags", "drop_ins"),
    [
        (["crio"], (), crio_service.DROP_INS),
        (["crio", "--log-level=info"], (), crio_service.DROP_INS),
        (["crio", "--config", "/c", "--config-dir=/d/"], ("--config", "/c", "--config-dir", "/d/"), "/d"),
        (["crio", "-c", "/c", "-d", "/d"], ("-c", "/c", "-d", "/d"), "/d"),
    ],
)
def test_the_configuration_is_the_one_crio_was_started_with(
    words: list[str], flags: tuple[str, ...], drop_ins: str
) -> None:
    assert crio_service.flags_of(words) == (flags, drop_ins)


@pytest.mark.parametrize(
    ("said", "containerd_runs", "crios"),
    [
        (Kubelet(endpoint="/var/run/crio/crio.sock"), True, True),
        (Kubelet(endpoint="/run/containerd/containerd.sock"), False, False),
        (Kubelet(), True, False),
        (None, True, False),
        (None, False, True),
    ],
)
def test_whose_the_pods_are(
    monkeypatch: pytest.MonkeyPatch, said: Kubelet | None, containerd_runs: bool, crios: bool
) -> None:
    monkeypatch.setattr(kubelet, "find", lambda: said)
    monkeypatch.setattr(
        containerd_service, "listener", lambda path: 7 if containerd_runs and "containerd" in str(path) else None
    )
    assert crio_service.makes_the_pods() is crios

"""Where a kubelet keeps its pods, and what makes their containers, by scratch entries of /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from podferry.agent import node_paths
from podferry.node import crio, kubelet, outside
from podferry.node.kubelet import ROOT, Kubelet
from podferry.workload.config import Config

pytestmark = pytest.mark.unit

CONTAINERD = "/run/containerd/containerd.sock"


def process(proc: Path, pid: int, *words: str, exe: str = "/usr/bin/kubelet", **files: str) -> None:
    directory = proc / str(pid)
    (directory / "root/etc").mkdir(parents=True)
    (directory / "cmdline").write_text("\0".join([*words, ""]))
    (directory / "exe").symlink_to(exe)
    for name, text in files.items():
        (directory / "root/etc" / name).write_text(text)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["/usr/bin/kubelet"], Kubelet()),
        (["kubelet", "--root-dir=/data/kubelet"], Kubelet(Path("/data/kubelet"))),
        (["kubelet", "--root-dir", "/data/kubelet", "--v=2"], Kubelet(Path("/data/kubelet"))),
        (
            ["kubelet", "--container-runtime-endpoint=unix:///run/crio/crio.sock"],
            Kubelet(endpoint="/run/crio/crio.sock"),
        ),
        (
            ["k3s", "server", "--kubelet-arg=root-dir=/data/kubelet", "--kubelet-arg", "v=2"],
            Kubelet(Path("/data/kubelet")),
        ),
    ],
)
def test_by_its_command_line(tmp_path: Path, words: list[str], found: Kubelet) -> None:
    process(tmp_path, 7, "/bin/sh", "-c", "kubelet --root-dir=/not/this", exe="/bin/dash")
    process(tmp_path, 12, *words)
    assert kubelet.find(tmp_path) == found


def test_by_its_configuration_file_which_a_flag_overrides(tmp_path: Path) -> None:
    config = (
        "kind: KubeletConfiguration\ncontainerRuntimeEndpoint: unix:///var/run/crio/crio.sock\ncgroupDriver: systemd\n"
    )
    process(tmp_path, 12, "kubelet", "--config=/etc/kubelet.yaml", **{"kubelet.yaml": config})
    found = kubelet.find(tmp_path)
    assert found == Kubelet(ROOT, "/var/run/crio/crio.sock")
    assert found.has_crio
    words = ["kubelet", "--config", "/etc/kubelet.yaml", f"--container-runtime-endpoint={CONTAINERD}"]
    process(tmp_path, 3, *words, **{"kubelet.yaml": config})
    found = kubelet.find(tmp_path)
    assert found == Kubelet(ROOT, CONTAINERD)
    assert not found.has_crio


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "containerRuntimeEndpoint:\n"])
def test_a_configuration_that_says_nothing(tmp_path: Path, text: str) -> None:
    process(tmp_path, 12, "kubelet", "--config=/etc/kubelet.yaml", **{"kubelet.yaml": text})
    assert kubelet.find(tmp_path) == Kubelet()
    process(tmp_path, 13, "kubelet", "--config=/etc/nothing")
    assert kubelet.find(tmp_path) == Kubelet()


def test_microk8s_keeps_its_flags_in_a_file(tmp_path: Path) -> None:
    flags = '--root-dir="/var/snap/kubelet"\n--container-runtime-endpoint=/var/snap/containerd.sock\n'
    process(tmp_path, 12, "/snap/kubelite", "--kubelet-args-file=/etc/kubelet", **{"kubelet": flags})
    assert kubelet.find(tmp_path) == Kubelet(Path("/var/snap/kubelet"), "/var/snap/containerd.sock")


def test_where_none_runs_there_is_none(tmp_path: Path) -> None:
    process(tmp_path, 7, "/bin/sh", "/usr/local/bin/kubelet", exe="/bin/dash")
    process(tmp_path, 8, "kubelet-exporter")
    process(tmp_path, 9, "")
    assert kubelet.find(tmp_path) is None


@pytest.mark.parametrize(
    ("found", "answering", "has_crio"),
    [
        (Kubelet(Path("/data/kubelet"), "/var/run/crio/crio.sock"), {"crio", "containerd"}, True),
        (Kubelet(Path("/data/kubelet"), CONTAINERD), {"crio"}, False),
        (Kubelet(Path("/data/kubelet")), {"crio", "containerd"}, False),
        (Kubelet(Path("/data/kubelet")), {"crio"}, True),
        (None, {"containerd"}, False),
    ],
)
def test_an_agent_in_a_cluster_goes_by_its_nodes_kubelet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: Kubelet | None, answering: set[str], has_crio: bool
) -> None:
    shown: list[Path] = []
    monkeypatch.setattr(outside, "root", lambda: tmp_path)
    monkeypatch.setattr(kubelet, "find", lambda: found)
    monkeypatch.setattr(node_paths.host, "listens", lambda path: Path(path).parent.name in answering)
    monkeypatch.setattr(node_paths, "show", lambda path, **_: shown.append(path))
    monkeypatch.setattr(crio.Crio, "storage", property(lambda one: Path("/data/storage")))
    config = node_paths.of_this_node(Config("a", "a:1", tmp_path))
    root = found.root if found else ROOT
    assert config.kubelet == root
    assert shown[0] == root
    assert bool(config.crio) is has_crio
    assert (Path("/data/storage") in shown) is has_crio
    if has_crio and found:
        assert config.crio == str(tmp_path / (found.endpoint or str(crio.SOCKET)).lstrip("/"))

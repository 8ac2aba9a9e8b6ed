"""The lab's Kubernetes: what a cluster must be able to do, and what is left when it is gone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from podferry.errors import UsageError
from podferry.lab import Lab, cgroups
from podferry.lab.root_images import JOB_IMAGE

pytestmark = pytest.mark.cluster
PATIENCE = 60.0

SERVER = {
    "apiVersion": "apps/v1",
    "kind": "DaemonSet",
    "metadata": {"name": "server"},
    "spec": {
        "selector": {"matchLabels": {"app": "server"}},
        "template": {
            "metadata": {"labels": {"app": "server"}},
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "containers": [
                    {"name": "server", "image": JOB_IMAGE, "command": ["python3", "-m", "http.server", "8000"]}
                ],
            },
        },
    },
}
ASK = """
import ssl, sys, urllib.request
def read(url): return urllib.request.urlopen(url, timeout=10, context=ssl._create_unverified_context()).read().decode()
for address in sys.argv[1:]: print(read(f'http://{address}:8000/etc/hostname').strip())
print(read('https://10.250.0.1/livez'))
"""


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"never: {holds}"
        time.sleep(0.2)


def kill(lab: Lab, machine: str, program: str) -> None:
    """kill -9 one program of a machine."""
    found = [one.pid for one in cgroups.processes(lab.name, machine) if name_of(one.pid) == program]
    assert found, f"no {program} on {machine}"
    for pid in found:
        os.kill(pid, signal.SIGKILL)


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


def test_pods_run_on_every_node_and_reach_each_other_and_the_api_server(cluster: Lab) -> None:
    kubectl = cluster.kubectl()
    kubectl.run("apply", "-f", "-", input=json.dumps(SERVER))
    try:
        kubectl.run("rollout", "status", "daemonset/server", f"--timeout={PATIENCE:.0f}s")
        pods = json.loads(kubectl.run("get", "pods", "-l", "app=server", "-o", "json").stdout)["items"]
        assert {pod["spec"]["nodeName"] for pod in pods} == {"node-a", "node-b"}
        names, addresses = zip(*((pod["metadata"]["name"], pod["status"]["podIP"]) for pod in pods), strict=True)
        for name in names:
            said = kubectl.run("exec", name, "--", "python3", "-c", ASK, *addresses).stdout
            assert said.split() == [*names, "ok"]
            assert "GET /etc/hostname" in kubectl.run("logs", name).stdout
    finally:
        kubectl.run("delete", "daemonset", "server", "--wait")


def test_status_knows_the_control_plane(cluster: Lab) -> None:
    control = cluster.status().control
    assert control is not None
    assert control.alive
    assert cluster.exec("control", ["hostname"]).stdout.strip() == "control"
    assert cluster.kubeconfig.stat().st_mode & 0o077 == 0


def test_up_again_changes_nothing(cluster: Lab) -> None:
    before = cluster.status()
    assert cluster.up() == before
    with pytest.raises(UsageError, match="other settings"):
        cluster.up(kubernetes=False)


@pytest.mark.parametrize(
    ("machine", "program"),
    [("node-a", "kubelet"), ("node-a", "containerd"), ("control", "kube-apiserver"), ("control", "etcd")],
)
def test_what_is_killed_comes_back_and_pods_run_on(cluster: Lab, machine: str, program: str) -> None:
    kubectl = cluster.kubectl()
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"during-{program}"},
        "spec": {
            "nodeName": "node-a",
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": JOB_IMAGE, "command": ["sleep", "inf"]}],
        },
    }
    kubectl.run("apply", "-f", "-", input=json.dumps(pod))
    name = f"pod/during-{program}"
    kubectl.run("wait", "--for=condition=Ready", name, f"--timeout={PATIENCE:.0f}s")
    try:
        kill(cluster, machine, program)
        answers = ["exec", f"during-{program}", "--", "true"]
        eventually(lambda: kubectl.run(*answers, check=False, timeout=PATIENCE).returncode == 0)
        restarts = "jsonpath={.status.containerStatuses[0].restartCount}"
        assert kubectl.run("get", name, "-o", restarts).stdout == "0"
    finally:
        kubectl.run("delete", name, "--wait")


def test_a_killed_node_comes_back_ready(cluster: Lab) -> None:
    cluster.kill_node("node-b")
    assert cluster.start_node("node-b").alive
    cluster.kubectl().run("wait", "--for=condition=Ready", "node/node-b", f"--timeout={PATIENCE:.0f}s")


def test_a_lab_without_kubernetes_has_no_kubectl(own_lab: Lab) -> None:
    own_lab.up(1, agent=False)
    with pytest.raises(UsageError, match="has no Kubernetes"):
        own_lab.kubectl()


def test_down_leaves_nothing_even_after_everything_was_killed(own_lab: Lab) -> None:
    def mounts() -> list[str]:
        return [line.split(" - ")[0].split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]

    before = mounts(), sorted(path.name for path in Path("/sys/class/net").iterdir())
    own_lab.up(1, agent=False, kubernetes=True)
    for machine in ("control", "node-a"):
        first = next(one.pid for one in cgroups.processes(own_lab.name, machine) if one.first)
        os.kill(first, signal.SIGKILL)
    own_lab.down()
    assert (mounts(), sorted(path.name for path in Path("/sys/class/net").iterdir())) == before
    assert not cgroups.processes(own_lab.name)
    left = [hierarchy.home / f"podferry.{own_lab.name}.node-a" for hierarchy in cgroups.hierarchies()]
    assert not [path for path in left if path.exists()]
    assert not own_lab.home.exists()

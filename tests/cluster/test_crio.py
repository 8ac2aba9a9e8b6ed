"""Pods of CRI-O, on a cluster of two nodes with CRI-O and one with containerd."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from podferry.install.crio_service import DROP_INS, NAME
from podferry.lab import Lab
from podferry.lab.kubernetes import crio_package
from podferry.lab.progress import phases
from podferry.lab.root_images import JOB_IMAGE

from .installing import A, B, uninstall
from .moving_pods import until

C = "node-c"
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        bool(crio_package.missing()),
        reason=f"no CRI-O here: {crio_package.DIRECTORY} (PODFERRY_CRIO_BIN) lacks {', '.join(crio_package.missing())}",
    ),
]
COUNTS = """
import os, time
kept = open("/var/tmp/kept", "a")
volume = open("/volume/count", "w")
number = 0
while not os.path.exists("/volume/stop"):
    number += 1
    print(number, flush=True)
    kept.write("x")
    kept.flush()
    volume.seek(0)
    volume.write(str(number))
    volume.flush()
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """With podferry on it, by deploy/."""
    one = Lab(f"test-{os.getpid()}-crio")
    try:
        one.up(3, kubernetes=True, runtime="crio,crio,containerd", progress=phases(print))
        yield one
    finally:
        one.down()


def job(lab: Lab, name: str) -> None:
    container = {
        "name": "main",
        "image": JOB_IMAGE,
        "command": ["python3", "-c", COUNTS],
        "volumeMounts": [{"name": "volume", "mountPath": "/volume"}],
    }
    spec = {
        "runtimeClassName": "podferry",
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
        "affinity": {
            "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": at(A)}]}
        },
        "containers": [container],
        "volumes": [{"name": "volume", "emptyDir": {}}],
    }
    made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"template": {"spec": spec}}}
    lab.kubectl().run("create", "-f", "-", input=json.dumps(made))
    lab.kubectl().run("wait", "--for=jsonpath={.status.ready}=1", f"job/{name}", "--timeout=90s")


def at(node: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}


def pod_of(lab: Lab, name: str) -> dict[str, Any]:
    """The pod of a Job that runs."""
    listed = lab.kubectl().run("get", "pods", "-l", f"job-name={name}", "-o", "json").stdout
    running = [one for one in json.loads(listed)["items"] if one["status"]["phase"] == "Running"]
    assert len(running) == 1
    found: dict[str, Any] = running[0]
    return found


def move(lab: Lab, name: str, pod: str, target: str | None) -> dict[str, Any]:
    """The status of a Migration that has ended; where it names no node, the controller chooses one."""
    spec = {"podName": pod} | ({"targetNode": target} if target else {})
    made = {"apiVersion": "podferry.dev/v1alpha1", "kind": "Migration", "metadata": {"name": name}, "spec": spec}
    lab.kubectl().run("create", "-f", "-", input=json.dumps(made))
    lab.kubectl().run("wait", "--for=jsonpath={.status.completionTime}", f"migration/{name}", "--timeout=180s")
    status: dict[str, Any] = json.loads(lab.kubectl().run("get", "migration", name, "-o", "json").stdout)["status"]
    return status


def printed(lab: Lab, pod: str) -> list[int]:
    return [int(line) for line in lab.kubectl().run("logs", pod).stdout.split()]


def test_a_job_moves_there_and_back_and_ends_as_it_would_have(lab: Lab) -> None:
    job(lab, "counts")
    for number, target in enumerate((B, A)):
        pod = pod_of(lab, "counts")
        assert pod["spec"]["nodeName"] != target
        before = len(printed(lab, pod["metadata"]["name"]))
        # The first is for the controller to choose: of two other nodes one has CRI-O too.
        status = move(lab, f"counts-{number}", pod["metadata"]["name"], target if number else None)
        assert status["phase"] == "Completed", status["message"]
        here = pod_of(lab, "counts")
        assert here["spec"]["nodeName"] == target
        name = here["metadata"]["name"]
        lines = until(lambda name=name, before=before: (found := printed(lab, name))[before + 20 :] and found, "output")
        assert lines == list(range(1, len(lines) + 1)), "the log is whole"
        told = lab.kubectl().run("exec", name, "--", "sh", "-c", "wc -c < /var/tmp/kept; cat /volume/count").stdout
        assert min(map(int, told.split())) >= before
    lab.kubectl().run("exec", pod_of(lab, "counts")["metadata"]["name"], "--", "touch", "/volume/stop")
    lab.kubectl().run("wait", "--for=condition=Complete", "job/counts", "--timeout=60s")
    lab.kubectl().run("delete", "job", "counts", "--wait")


def test_to_a_node_with_containerd_the_move_is_refused_in_words(lab: Lab) -> None:
    job(lab, "stays")
    pod = pod_of(lab, "stays")
    status = move(lab, "stays", pod["metadata"]["name"], C)
    assert status["phase"] != "Completed"
    assert "the nodes have different container runtimes" in status["message"], status["message"]
    here = pod_of(lab, "stays")
    assert (here["metadata"]["uid"], here["spec"]["nodeName"]) == (pod["metadata"]["uid"], pod["spec"]["nodeName"])
    lab.kubectl().run("delete", "job", "stays", "--wait")


def test_uninstalling_takes_the_runtime_away(lab: Lab) -> None:
    asks = ["sh", "-c", f"ls {DROP_INS}; {crio_package.IN_NODES}/crio --config /etc/podferry/crio.conf config"]
    for node in (A, B):
        assert NAME in lab.exec(node, asks).stdout
        assert ".runtimes.podferry]" in lab.exec(node, asks).stdout
    uninstall(lab)
    for node in (A, B):
        said = lab.exec(node, asks, check=False).stdout
        assert NAME not in said
        assert ".runtimes.podferry]" not in said
        assert ".runtimes.runc]" in said
        assert lab.exec(node, ["test", "-e", "/opt/podferry/bin/podferry-runc"], check=False).returncode != 0

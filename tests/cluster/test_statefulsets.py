"""Pods of a StatefulSet move between the nodes of a real cluster: name, hostname, ordinal, memory and owner stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from podferry.lab import Lab
from podferry.lab.kubernetes.cluster import Kubectl
from podferry.lab.root_images import JOB_IMAGE

from .installing import A, B
from .test_jobs import LEFT, move, until

pytestmark = pytest.mark.cluster

NAME = "web"
COUNT = """
import os, pathlib, secrets, socket, time
memory, number = secrets.token_hex(8), 0
pathlib.Path("/scratch/begun").write_text(memory)
while True:
    number += 1
    print(number, memory, socket.gethostname(), os.getpid(), flush=True)
    time.sleep(0.1)
"""
KEPT_LABELS = ("statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index", "controller-revision-hash", "app")

Json = dict[str, Any]


def stateful_set(replicas: int) -> Json:
    """Its pods may be on either node, and count aloud what they keep in memory and in a volume of their own."""
    labels = {"app": NAME}
    main = {
        "name": "main",
        "image": JOB_IMAGE,
        "command": ["python3", "-uc", COUNT],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
    }
    spec = {
        "runtimeClassName": "podferry",
        "terminationGracePeriodSeconds": 1,
        "containers": [main],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": NAME},
        "spec": {
            "replicas": replicas,
            "serviceName": NAME,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def pods(kubectl: Kubectl) -> dict[str, Json]:
    listed = json.loads(kubectl.run("get", "pods", "-l", f"app={NAME}", "-o", "json").stdout)["items"]
    return {one["metadata"]["name"]: one for one in listed}


def counted(kubectl: Kubectl, name: str) -> list[list[str]]:
    """What a pod has printed, whole lines only."""
    text = kubectl.run("logs", name, check=False).stdout
    return [line.split() for line in text.splitlines() if len(line.split()) == 4]


def began(kubectl: Kubectl, replicas: int) -> None:
    kubectl.run("apply", "-f", "-", input=json.dumps(stateful_set(replicas)))
    until(lambda: len(pods(kubectl)) == replicas, "its pods are there")
    for name in pods(kubectl):
        until(lambda name=name: len(counted(kubectl, name)) > 2, f"{name} counts")


def moved(kubectl: Kubectl, name: str) -> Json:
    """Move one of its pods to the other node, and hold all that it is against what it was."""
    before, told = pods(kubectl), counted(kubectl, name)
    old = before[name]
    there = B if old["spec"]["nodeName"] == A else A
    status = move(kubectl, name, there)
    assert status["phase"] == "Completed", json.dumps(status, indent=1)
    after = pods(kubectl)
    new = after[name]
    assert after.keys() == before.keys()
    assert new["metadata"]["uid"] == status["targetPod"]["uid"] != old["metadata"]["uid"]
    assert new["spec"]["nodeName"] == there
    assert new["spec"]["hostname"] == old["spec"]["hostname"] == name
    for label in KEPT_LABELS:
        assert new["metadata"]["labels"][label] == old["metadata"]["labels"][label]
    assert new["metadata"]["ownerReferences"] == old["metadata"]["ownerReferences"]
    for other in before.keys() - {name}:
        assert after[other]["metadata"]["uid"] == before[other]["metadata"]["uid"], f"{other} was made anew"
    until(lambda: int(counted(kubectl, name)[-1][0]) > int(told[-1][0]) + 5, f"{name} counts on")
    lines = counted(kubectl, name)
    assert [int(number) for number, *_ in lines] == list(range(1, len(lines) + 1)), "it began anew, or lost output"
    assert {tuple(rest) for _, *rest in lines} == {tuple(told[0][1:])}, "memory, hostname or pid is another"
    (state,) = pods(kubectl)[name]["status"]["containerStatuses"]
    assert state["restartCount"] == 0
    kept = until(lambda: kubectl.run("exec", name, "--", "cat", "/scratch/begun").stdout, "its volume can be read")
    assert kept == told[0][1], "its volume stayed behind"
    listed = json.loads(kubectl.run("get", "pods", "-o", "json").stdout)["items"]
    ours = {one["metadata"]["name"] for one in listed if one["metadata"]["name"].startswith(f"{NAME}-")}
    assert ours == set(before), "a pod of the move is left"
    return status


@pytest.fixture
def kubectl(installed: Lab) -> Iterator[Kubectl]:
    kubectl = installed.kubectl()
    try:
        yield kubectl
    finally:
        kubectl.run("delete", "statefulset", NAME, "--ignore-not-found", "--wait")
        kubectl.run("delete", "pods", "-l", f"app={NAME}", "--ignore-not-found", "--wait")
        kubectl.run("delete", "migrations", "--all", "--wait")
    for node in (A, B):
        until(lambda node=node: not installed.exec(node, ["sh", "-c", LEFT]).stdout, f"nothing is left on {node}")  # type: ignore[misc]


def test_a_pod_of_a_stateful_set_moves_there_and_back_and_keeps_its_name(kubectl: Kubectl) -> None:
    began(kubectl, 2)
    moved(kubectl, f"{NAME}-0")
    kubectl.run("delete", "migrations", "--all", "--wait")
    status = moved(kubectl, f"{NAME}-0")
    assert status["keepsName"] is True
    assert "keptPlace" not in status
    until(
        lambda: (
            json.loads(kubectl.run("get", "statefulset", NAME, "-o", "json").stdout)["status"].get("readyReplicas") == 2
        ),
        "its owner counts both",
    )


@pytest.mark.slow
def test_three_replicas_are_rolled_over_both_nodes(kubectl: Kubectl) -> None:
    began(kubectl, 3)
    for _ in range(2):
        for ordinal in range(3):
            moved(kubectl, f"{NAME}-{ordinal}")
            kubectl.run("delete", "migrations", "--all", "--wait")

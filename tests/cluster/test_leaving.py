"""Taking podferry off a cluster again. After the last of these tests the cluster is bare."""

from __future__ import annotations

import json

import pytest

from podferry.lab import Lab
from podferry.lab.kubernetes import deploy
from podferry.lab.root_images import JOB_IMAGE

from .installing import NODES, A, agent_on, footprint, uninstall

pytestmark = pytest.mark.cluster


def test_a_node_whose_pods_need_the_runtime_keeps_it(installed: Lab) -> None:
    kubectl = installed.kubectl()
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "opted-in"},
        "spec": {
            "runtimeClassName": "podferry",
            "nodeName": A,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": JOB_IMAGE, "command": ["sleep", "inf"]}],
        },
    }
    kubectl.run("apply", "-f", "-", input=json.dumps(pod))
    try:
        kubectl.run("wait", "--for=condition=Ready", "pod/opted-in", "--timeout=60s")
        words = ["exec", agent_on(installed, A), "-c", "agent", "--", "podferry", "uninstall"]
        refused = kubectl.run("-n", deploy.NAMESPACE, *words, check=False)
        assert refused.returncode != 0
        assert "podferry is in use on this node" in refused.stderr
    finally:
        kubectl.run("delete", "pod", "opted-in", "--wait")


def test_every_node_is_restored_byte_for_byte(installed: Lab, before: dict[str, str]) -> None:
    assert {node: footprint(installed, node) for node in NODES} != before
    uninstall(installed)
    assert {node: footprint(installed, node) for node in NODES} == before

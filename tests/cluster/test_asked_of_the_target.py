"""What a Migration asks of the target: other requests and limits, to which the kernel holds the job, and what must hold of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from podferry.lab import Lab
from podferry.lab.kubernetes.cluster import Kubectl

from .installing import A, B
from .moving_pods import pod
from .test_jobs import logs, move, until

pytestmark = pytest.mark.cluster

Json = dict[str, Any]

COUNT = """
import itertools, time
block = bytearray(64 << 20)
for n in itertools.count():
    block[n * 4096 % len(block)] = n % 256
    print(n, flush=True)
    time.sleep(0.1)
"""
LIMIT = """
for group in $(find /sys/fs/cgroup -type d -name "*$1*")
do cat "$group/memory.max" "$group/memory.limit_in_bytes" 2>/dev/null
done
true
"""


def begin(kubectl: Kubectl, name: str) -> Json:
    body = pod(name, COUNT)
    body["spec"]["containers"][0]["resources"] = {
        "requests": {"cpu": "100m", "memory": "256Mi"},
        "limits": {"memory": "512Mi"},
    }
    wish = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [A]}]}
    rule = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": wish}]}
    body["spec"]["affinity"] = {"nodeAffinity": rule}
    kubectl.run("apply", "-f", "-", input=json.dumps(body))
    until(lambda: len(counted(kubectl, name)) > 2, "it counts")
    found: Json = json.loads(kubectl.run("get", "pod", name, "-o", "json").stdout)
    return found


def limit(lab: Lab, body: Json) -> str:
    """The limit of memory that the kernel holds the pod's container to, as its node says."""
    (state,) = body["status"]["containerStatuses"]
    argv = ["sh", "-c", LIMIT, "sh", state["containerID"].rpartition("/")[2]]
    return lab.exec(body["spec"]["nodeName"], argv).stdout.strip()


def counted(kubectl: Kubectl, name: str) -> list[str]:
    return logs(kubectl, {"metadata": {"name": name}})


def test_a_moved_pod_has_the_requests_and_limits_that_its_migration_asks_for(installed: Lab) -> None:
    kubectl, name = installed.kubectl(), "resized"
    try:
        before = begin(kubectl, name)
        here = before["spec"]["nodeName"]
        there = B if here == A else A
        assert limit(installed, before) == str(512 << 20)
        small = [{"name": "main", "requests": {"memory": "32Mi"}, "limits": {"memory": "48Mi"}}]
        status = move(kubectl, name, there, resources=small)
        assert status["phase"] == "Refused", json.dumps(status, indent=1)
        assert "more memory than it may have" in status["ending"]["message"]

        kubectl.run("delete", "migrations", "--all", "--wait")
        wanted = [{"name": "main", "requests": {"memory": "128Mi"}, "limits": {"memory": "192Mi", "cpu": "1"}}]
        status = move(kubectl, name, there, resources=wanted)
        assert status["phase"] == "Completed", json.dumps(status, indent=1)
        assert {one["type"]: one["status"] for one in status["conditions"]}["Intact"] == "True", status["conditions"]
        name = status["targetPod"]["name"]
        after = json.loads(kubectl.run("get", "pod", name, "-o", "json").stdout)
        assert after["spec"]["nodeName"] == there
        assert after["spec"]["containers"][0]["resources"] == {
            "requests": {"cpu": "100m", "memory": "128Mi"},
            "limits": {"memory": "192Mi", "cpu": "1"},
        }
        assert limit(installed, after) == str(192 << 20)
        until(lambda: len(counted(kubectl, name)) > len(counted(kubectl, name)) // 2 + 5, "it has counted on")
        lines = counted(kubectl, name)
        assert lines == [str(n) for n in range(len(lines))]
    finally:
        kubectl.run("delete", "pod", "resized", name, "--ignore-not-found", "--wait", "--grace-period=0", "--force")
        kubectl.run("delete", "migrations", "--all", "--wait")


def test_what_must_hold_on_the_target_is_asked_of_the_job_there(installed: Lab) -> None:
    """Where it does not hold the move is called failed, and the job has moved all the same."""
    kubectl, name = installed.kubectl(), "verified"
    try:
        here = begin(kubectl, name)["spec"]["nodeName"]
        for command, ends, holds in ((["test", "-d", "/proc/1"], "Completed", "True"), (["false"], "Failed", "False")):
            there = B if here == A else A
            status = move(kubectl, name, there, verify={"exec": {"command": command}, "timeout": "5s"})
            assert status["phase"] == ends, json.dumps(status, indent=1)
            assert {one["type"]: one["status"] for one in status["conditions"]}["Verified"] == holds
            assert status["ending"]["reason"] == ("Moved" if holds == "True" else "NotVerified")
            name, here = status["targetPod"]["name"], there
            after = json.loads(kubectl.run("get", "pod", name, "-o", "json").stdout)
            assert after["spec"]["nodeName"] == there
            assert [one["restartCount"] for one in after["status"]["containerStatuses"]] == [0]
        lines = counted(kubectl, name)
        until(lambda: len(counted(kubectl, name)) > len(lines), "it counts on")
        lines = counted(kubectl, name)
        assert lines == [str(n) for n in range(len(lines))]
        until(lambda: kubectl.run("get", "pods", "-o", "name").stdout.split() == [f"pod/{name}"], "the source has gone")
    finally:
        kubectl.run("delete", "pod", "verified", name, "--ignore-not-found", "--wait", "--grace-period=0", "--force")
        kubectl.run("delete", "migrations", "--all", "--wait")

"""A node full of pods of all the owners that podferry can hand a pod over to, and what became of them after drains."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

from podferry.kube.migration import CAUSE_LABEL, Migration
from podferry.kube.quantities import seconds
from podferry.lab import Lab
from podferry.lab.kubernetes import deploy
from podferry.lab.kubernetes.cluster import Kubectl
from podferry.lab.root_images import JOB_IMAGE

from .installing import A, B

Json = dict[str, Any]

PATIENCE = 600.0
APP = "drained"
STAYS = "stays-0"
"""The pod of the StatefulSet, which cannot move."""
ELIGIBLE = 10
# It counts, five times a second, and touches memory, so that there is something to copy. Jobs end well when they are told to.
COUNT = """
import os, time
data = bytearray(os.urandom(1 << 20) * 16)
n = 0
while not os.path.exists("/var/tmp/finish"):
    n += 1
    data[n * 4096 % len(data)] = n % 256
    print(n, flush=True)
    time.sleep(0.2)
print("end", flush=True)
"""


def until(holds: Any, what: str, patience: float = PATIENCE) -> Any:
    """Wait for what happens elsewhere; returns what `holds` did."""
    deadline = time.monotonic() + patience
    while not (found := holds()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.3)
    return found


def template(restart: str) -> Json:
    """What each of the pods runs."""
    return {
        "metadata": {"labels": {"app": APP}},
        "spec": {
            "runtimeClassName": "podferry",
            "restartPolicy": restart,
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "main",
                    "image": JOB_IMAGE,
                    "command": ["python3", "-uc", COUNT],
                    "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
                }
            ],
        },
    }


def owners() -> Iterator[Json]:
    """Ten pods that can move, of five kinds of owners, and one of a StatefulSet that cannot: it has a directory of its node."""

    def of(api: str, kind: str, name: str, spec: Json) -> Json:
        return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": {"app": APP}}, "spec": spec}

    jobs, always = template("Never"), template("Always")
    always["metadata"]["labels"]["kept-by"] = "owner"
    for name in ("bare-0", "bare-1"):
        yield of("v1", "Pod", name, jobs["spec"])
    for name in ("job-0", "job-1"):
        yield of("batch/v1", "Job", name, {"backoffLimit": 0, "template": jobs})
    several = {"completions": 2, "parallelism": 2, "completionMode": "Indexed"}
    yield of("batch/v1", "Job", "indexed", {"backoffLimit": 0, **several, "template": jobs})
    for kind, name in (("Deployment", "deployment"), ("ReplicaSet", "replicaset")):
        own = {"app": APP, "kept-by": "owner", "name": name}
        body = {**always, "metadata": {"labels": own}}
        yield of("apps/v1", kind, name, {"replicas": 2, "selector": {"matchLabels": own}, "template": body})
    own = {"app": APP, "name": "stays"}
    bound = {**always["spec"], "volumes": [{"name": "own", "hostPath": {"path": "/tmp"}}]}
    body = {"metadata": {"labels": own}, "spec": bound}
    yield of("apps/v1", "StatefulSet", "stays", {"selector": {"matchLabels": own}, "serviceName": "", "template": body})


@dataclass
class Drained:
    """One drain as it was seen: seconds, the pods' downtimes in seconds, and the most moves that were under way at once."""

    way: str
    seconds: float
    downtimes: list[float] = field(default_factory=list)
    most: int = 0

    def row(self) -> str:
        """A line of a Markdown table."""
        stops = sorted(self.downtimes)
        shown = f"{stops[0]:.2f} | {stops[len(stops) // 2]:.2f} | {stops[-1]:.2f}" if stops else "- | - | -"
        return f"| {self.way} | {self.seconds:.0f} | {len(stops)} | {shown} | {self.most} |"


TITLES = "| drain | seconds | moved | least stop (s) | median | longest | at once |\n|---|---|---|---|---|---|---|"


class Node:
    """Node A or B with the pods on it."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.kubectl = lab, lab.kubectl()
        self.begun: dict[str, int] = {}

    def pods(self) -> dict[str, Json]:
        """Those that count: not the ones that are leaving."""
        listed = json.loads(self.kubectl.run("get", "pods", "-l", f"app={APP}", "-o", "json").stdout)["items"]
        return {one["metadata"]["name"]: one for one in listed if "deletionTimestamp" not in one["metadata"]}

    def fill(self) -> None:
        """All of them, on node A, until they count."""
        self.kubectl.run("cordon", B)
        self.kubectl.run(
            "apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": [*owners()]})
        )
        until(lambda: len(self.pods()) == ELIGIBLE + 1, "all pods are there")
        self.kubectl.run("wait", "--for=condition=Ready", "pods", "-l", f"app={APP}", f"--timeout={PATIENCE:.0f}s")
        self.kubectl.run("uncordon", B)
        for name in self.pods():
            until(lambda name=name: len(self.counted(name)) > 2, f"{name} counts")

    def counted(self, name: str) -> list[str]:
        """What a pod has printed."""
        return self.kubectl.run("logs", name, check=False).stdout.splitlines()

    def sound(self, node: str) -> None:
        """All eligible pods are on the node, have counted without a gap since they began and were never restarted."""
        pods = {name: one for name, one in self.pods().items() if name != STAYS}
        assert len(pods) == ELIGIBLE, sorted(pods)
        assert {one["spec"]["nodeName"] for one in pods.values()} == {node}
        for name, one in pods.items():
            assert [state["restartCount"] for state in one["status"]["containerStatuses"]] == [0], name
            said = self.counted(name)
            assert said[:-1] == [str(number + 1) for number in range(len(said) - 1)], f"{name} counts on: {said[-5:]}"
            # Names change and what was counted stays: the shortest of them is longer than the shortest before.
        least = min(len(self.counted(name)) for name in pods)
        assert least > max(self.begun.values(), default=0), "each has counted on"
        self.begun = {node: least}

    def finish(self) -> None:
        """Jobs end, each index once, without a failure."""
        for name, one in self.pods().items():
            if one["spec"]["restartPolicy"] == "Never":
                self.kubectl.run("exec", name, "--", "touch", "/var/tmp/finish")
        for name, times in (("job-0", 1), ("job-1", 1), ("indexed", 2)):
            self.kubectl.run("wait", "--for=condition=Complete", f"job/{name}", f"--timeout={PATIENCE:.0f}s")
            status = json.loads(self.kubectl.run("get", "job", name, "-o", "json").stdout)["status"]
            assert (status["succeeded"], status.get("failed", 0)) == (times, 0), name

    def clear(self) -> None:
        """Nothing of it is left, and both nodes take pods."""
        for node in (A, B):
            self.kubectl.run("uncordon", node, check=False)
        self.kubectl.run("delete", "nodedrains", "--all", "--wait", check=False)
        kinds = "deployments,replicasets,statefulsets,jobs,pods"
        self.kubectl.run("delete", kinds, "-l", f"app={APP}", "--wait", "--ignore-not-found")
        self.kubectl.run("delete", "migrations", "--all", "--wait")

    # Drains.

    def by_podferry(self, node: str) -> Drained:
        """`kubectl podferry drain`; what cannot move is evicted."""
        with self._watching(f"kubectl podferry drain {node}", "") as seen:
            said = self.kubectl.run(
                "podferry", "drain", node, "--evict-others", "--json", check=False, timeout=PATIENCE
            )
        assert said.returncode == 0, (said.stdout.splitlines()[-1:], said.stderr[-3000:])
        end = json.loads(said.stdout.splitlines()[-1])
        assert (end["status"]["phase"], end["status"]["left"]) == ("Completed", 0)
        of_us = {one["name"]: one for one in end["status"]["pods"] if one["namespace"] == "default"}
        assert of_us[STAYS]["state"] == "Gone"
        moved = [one for one in of_us.values() if one["state"] == "Moved"]
        assert len(moved) == ELIGIBLE, of_us
        seen.downtimes = [seconds(one["downtime"]) for one in moved]
        self.kubectl.run("delete", "nodedrain", node, "--wait")
        return self._emptied(node, seen)

    def by_kubectl(self, node: str, way: str = "") -> Drained:
        """Plain `kubectl drain`, which the webhook answers where it is there."""
        with self._watching(way or f"kubectl drain {node}, with deploy/evictions", "eviction") as seen:
            argv = ("drain", node, "--ignore-daemonsets", "--force", "--delete-emptydir-data")
            said = self.kubectl.run(*argv, f"--timeout={PATIENCE:.0f}s", check=False)
        assert said.returncode == 0, said.stderr[-3000:]
        moves = [one for one in self._migrations() if one.metadata.get("labels", {}).get(CAUSE_LABEL) == "eviction"]
        assert {str(one.status.phase) for one in moves} <= {"Completed"}, [one.status.message for one in moves]
        seen.downtimes = [seconds(one.status.downtime or "0s") for one in moves]
        return self._emptied(node, seen)

    def _emptied(self, node: str, seen: Drained) -> Drained:
        assert node not in {one["spec"].get("nodeName") for one in self.pods().values()}
        self.kubectl.run("delete", "migrations", "--all", "--wait")
        self.kubectl.run("uncordon", node)
        return seen

    @contextmanager
    def _watching(self, way: str, cause: str) -> Iterator[Drained]:
        """How long it takes, and how many moves are under way at once."""
        seen, over = Drained(way, 0.0), Event()

        def watch() -> None:
            while not over.wait(1.0):
                begun = [one for one in self._migrations() if not one.ended and one.status.phase != "Pending"]
                seen.most = max(seen.most, len(begun))

        thread = Thread(target=watch)
        thread.start()
        began = time.monotonic()
        try:
            yield seen
            seen.seconds = time.monotonic() - began
        finally:
            over.set()
            thread.join()

    def _migrations(self) -> list[Migration]:
        listed = json.loads(self.kubectl.run("get", "migrations", "-o", "json").stdout)["items"]
        return [Migration.from_json(one) for one in listed]


@contextmanager
def evictions(kubectl: Kubectl) -> Iterator[None]:
    """deploy/evictions as it is: the API server reaches the webhook by its Service."""
    what = deploy.directory() / "evictions"
    kubectl.run("apply", "-k", what)
    path = "jsonpath={.webhooks[0].clientConfig.caBundle}"
    name = "validatingwebhookconfigurations/podferry-evictions"
    try:
        until(lambda: kubectl.run("get", name, "-o", path).stdout, "the controller has written by what it is known")
        yield
    finally:
        kubectl.run("delete", "-k", what, "--wait")

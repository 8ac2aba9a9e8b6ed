"""Jobs whose pods move between the nodes of a real cluster: one success, no restart, the result of a Job that never moved."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import pytest

from podferry.cli import demo_job
from podferry.criu.dump_gate import ON_NODE
from podferry.lab import Lab
from podferry.lab.kubernetes import deploy
from podferry.lab.kubernetes.cluster import Kubectl
from podferry.lab.root_images import JOB_IMAGE

from .installing import A, B

pytestmark = pytest.mark.cluster
PATIENCE = 300.0
SMALL, LARGE = 64, 1024  # MiB
STEPS = {SMALL: 600, LARGE: 6000}  # the large one computes for some minutes
CANDIDATES, EVERY = 2000, 10
INDEXES = 4
FINISH = "/var/tmp/finish"
# It computes; then it waits until it may end, so that moves take as long as they take; what it wrote must come along.
COMMAND = (
    f'python3 -c "$0" "$@" && until [ -e {FINISH} ]; do sleep 0.1; done && echo ledger $(sha256sum < {demo_job.LEDGER})'
)
# But for the marks of pods that have come or gone: they go with the agent's next look.
LEFT = """
for kind in run/podferry/incoming run/podferry/outgoing run/podferry/arriving run/podferry/staging var/lib/podferry/staging
do find "/$kind" -mindepth 1 2>/dev/null; done
true
"""

Json = dict[str, Any]


def until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.2)
    return found


def manifest(name: str, node: str, mebibytes: int = SMALL, **spec: Any) -> Json:
    """A Job that would rather begin on `node`. `spec` goes into the Job's own."""
    source = files("podferry.cli").joinpath("demo_job.py").read_text(encoding="utf-8")
    wish = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "backoffLimit": 0,
            **spec,
            "template": {
                "spec": {
                    "runtimeClassName": "podferry",
                    "restartPolicy": "Never",
                    "affinity": {
                        "nodeAffinity": {
                            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": wish}]
                        }
                    },
                    "containers": [
                        {
                            "name": "main",
                            "image": JOB_IMAGE,
                            "command": [
                                "sh",
                                "-c",
                                COMMAND,
                                source,
                                *map(str, (mebibytes, STEPS[mebibytes], CANDIDATES, EVERY)),
                            ],
                        }
                    ],
                }
            },
        },
    }


def pods(kubectl: Kubectl, name: str) -> list[Json]:
    listed = kubectl.run("get", "pods", "-l", f"batch.kubernetes.io/job-name={name}", "-o", "json").stdout
    found = json.loads(listed)["items"]
    assert isinstance(found, list)
    return found


def lines(kubectl: Kubectl, name: str) -> list[str]:
    (pod,) = pods(kubectl, name)
    return logs(kubectl, pod)


def logs(kubectl: Kubectl, pod: Json) -> list[str]:
    return kubectl.run("logs", pod["metadata"]["name"], check=False).stdout.splitlines()


def move(kubectl: Kubectl, pod: str, to: str, watch: Callable[[Json], None] = lambda _: None, **spec: Any) -> Json:
    """Move a pod by a Migration object, to its end; returns its status. `watch` is shown every status on the way; `spec`
    is what else is asked for. On a machine that is idle otherwise these jobs write as fast as the link carries."""
    name = f"{pod}-to-{to}"
    migration = {
        "apiVersion": "podferry.dev/v1alpha1",
        "kind": "Migration",
        "metadata": {"name": name},
        "spec": {"podName": pod, "targetNode": to, "maxFreeze": "2m", "allowAutoConverge": True, **spec},
    }
    kubectl.run("create", "-f", "-", input=json.dumps(migration))

    def ended() -> Json | None:
        status: Json = json.loads(kubectl.run("get", "migration", name, "-o", "json").stdout).get("status", {})
        watch(status)
        return status if status.get("completionTime") else None

    status: Json = until(ended, f"{name} ends")
    return status


def dump_of(lab: Lab, node: str) -> str:
    """What the last dump on a node skipped, as its agent says."""
    newest = "cd /var/lib/podferry/migrations && cat $(ls -t | head -n 1)/record.json"
    record = json.loads(lab.exec(node, ["sh", "-c", newest]).stdout)
    assert record["source"] == node
    return str(record["dump"])


@pytest.mark.parametrize("mebibytes", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_a_jobs_pod_moves_there_and_back_twice_while_it_computes(installed: Lab, mebibytes: int) -> None:
    kubectl = installed.kubectl()
    try:
        for name in ("moved", "stayed"):
            kubectl.run("apply", "-f", "-", input=json.dumps(manifest(name, A, mebibytes)))
        until(lambda: pods(kubectl, "moved") and len(lines(kubectl, "moved")) > 2, "it computes")
        (pod,) = pods(kubectl, "moved")
        begun, here = pod["metadata"]["name"], pod["spec"]["nodeName"]
        for number in range(4):
            there = B if here == A else A
            status = move(kubectl, begun, there, **({"ttlSecondsAfterFinished": 10} if number == 0 else {}))
            assert status["phase"] == "Completed", json.dumps(status, indent=1)
            (pod,) = until(lambda: pods(kubectl, "moved"), "it has a pod")
            assert pod["metadata"]["name"] == status["targetPod"]["name"] != begun
            assert pod["spec"]["nodeName"] == there
            assert dump_of(installed, here) == "memory-skipping"
            begun, here = pod["metadata"]["name"], there
            if number == 0:
                assert not lines(kubectl, "moved")[-1].startswith(demo_job.FINAL), "it was to compute while it moves"
        asked = ("get", "migrations", "-o", "jsonpath={.items[*].spec.ttlSecondsAfterFinished}")
        until(lambda: not kubectl.run(*asked).stdout, "the Migration with a time of its own has gone")
        assert len(kubectl.run("get", "migrations", "-o", "name").stdout.split()) == 3, "the others stay"
        for name in ("moved", "stayed"):
            (pod,) = pods(kubectl, name)
            kubectl.run("exec", pod["metadata"]["name"], "--", "touch", FINISH)
            kubectl.run("wait", "--for=condition=Complete", f"job/{name}", f"--timeout={PATIENCE:.0f}s")

        assert lines(kubectl, "moved") == lines(kubectl, "stayed")
        assert lines(kubectl, "moved")[-1].startswith("ledger ")
        status = json.loads(kubectl.run("get", "job", "moved", "-o", "json").stdout)["status"]
        assert (status["succeeded"], status.get("failed", 0)) == (1, 0)
        (pod,) = pods(kubectl, "moved")
        assert [one["restartCount"] for one in pod["status"]["containerStatuses"]] == [0]
    finally:
        kubectl.run("delete", "job", "moved", "stayed", "--ignore-not-found", "--wait")
        kubectl.run("delete", "migrations", "--all", "--wait")
    for node in (A, B):
        until(lambda node=node: not installed.exec(node, ["sh", "-c", LEFT]).stdout, f"nothing is left on {node}")  # type: ignore[misc]


# The kubelet writes that file, with the pod's name and address: the first look on the target ends the job.
ENDS_WHEN_IT_HAS_MOVED = """
import time
here = open("/etc/hosts").read()
print("begun", flush=True)
while open("/etc/hosts").read() == here:
    time.sleep(0.001)
print("moved", flush=True)
"""


def test_a_job_that_ends_as_soon_as_it_has_moved_has_succeeded(installed: Lab) -> None:
    """More on this, on agents without a controller: test_brief_pods.py."""
    kubectl, name = installed.kubectl(), "brief"
    wanted = manifest(name, A)
    wanted["spec"]["template"]["spec"]["containers"][0]["command"] = ["python3", "-c", ENDS_WHEN_IT_HAS_MOVED]
    try:
        kubectl.run("apply", "-f", "-", input=json.dumps(wanted))
        until(lambda: pods(kubectl, name) and lines(kubectl, name) == ["begun"], "it runs")
        (pod,) = pods(kubectl, name)
        status = move(kubectl, pod["metadata"]["name"], B if pod["spec"]["nodeName"] == A else A)
        assert status["phase"] == "Completed", json.dumps(status, indent=1)
        kubectl.run("wait", "--for=condition=Complete", f"job/{name}", f"--timeout={PATIENCE:.0f}s")
        status = json.loads(kubectl.run("get", "job", name, "-o", "json").stdout)["status"]
        assert (status["succeeded"], status.get("failed", 0)) == (1, 0)
        assert lines(kubectl, name) == ["begun", "moved"]
    finally:
        kubectl.run("delete", "job", name, "--ignore-not-found", "--wait")
        kubectl.run("delete", "migrations", "--all", "--wait")


WITHOUT = {
    "our criu": "rm {0}",
    "a way to the agent's Python": "printf '#!/bin/sh\\nexit 1\\n' > {0}",
    "a gate that holds": "printf '#!/bin/sh\\n[ \"$*\" = try ]\\n' > {0}",
}


@pytest.mark.parametrize("missing", WITHOUT)
def test_where_the_gate_cannot_be_had_the_dump_is_an_ordinary_one(installed: Lab, missing: str) -> None:
    """The last of these is found out only when runc has ended before its time."""
    kubectl, name = installed.kubectl(), f"without-{list(WITHOUT).index(missing)}"
    try:
        kubectl.run("apply", "-f", "-", input=json.dumps(manifest(name, A)))
        until(lambda: pods(kubectl, name) and len(lines(kubectl, name)) > 2, "it computes")
        (pod,) = pods(kubectl, name)
        here = pod["spec"]["nodeName"]
        installed.exec(here, ["cp", "-p", str(ON_NODE), f"{ON_NODE}.kept"])
        try:
            installed.exec(here, ["sh", "-c", WITHOUT[missing].format(ON_NODE)])
            status = move(kubectl, pod["metadata"]["name"], B if here == A else A)
            assert status["phase"] == "Completed", json.dumps(status, indent=1)
            assert dump_of(installed, here) == "ordinary"
        finally:
            installed.exec(here, ["mv", f"{ON_NODE}.kept", str(ON_NODE)])
    finally:
        kubectl.run("delete", "job", name, "--ignore-not-found", "--wait")
        kubectl.run("delete", "migrations", "--all", "--wait")


@pytest.mark.slow
def test_the_pods_of_an_indexed_job_move_at_once_and_it_completes_with_one_success_for_each(installed: Lab) -> None:
    kubectl = installed.kubectl()
    indexed = {"completions": INDEXES, "parallelism": INDEXES, "completionMode": "Indexed"}

    def by_index(name: str) -> dict[str, Json]:
        return {
            one["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: one for one in pods(kubectl, name)
        }

    def computes() -> bool:
        return len(by_index("moved")) == INDEXES and all(len(logs(kubectl, one)) > 2 for one in pods(kubectl, "moved"))

    def there_and_back(index: str) -> None:
        for _ in range(2):
            pod = by_index("moved")[index]
            there = B if pod["spec"]["nodeName"] == A else A
            status = move(kubectl, pod["metadata"]["name"], there)
            assert status["phase"] == "Completed", (index, json.dumps(status["ending"]))
            until(lambda: index in by_index("moved"), f"index {index} has a pod")
            assert by_index("moved")[index]["metadata"]["name"] == status["targetPod"]["name"]

    try:
        kubectl.run("apply", "-f", "-", input=json.dumps(manifest("moved", A, **indexed)))
        kubectl.run("apply", "-f", "-", input=json.dumps(manifest("stayed", A)))
        until(computes, "all of it computes")
        with ThreadPoolExecutor(INDEXES) as pool:
            list(pool.map(there_and_back, map(str, range(INDEXES))))
        moved = by_index("moved")
        for one in (*moved.values(), *pods(kubectl, "stayed")):
            kubectl.run("exec", one["metadata"]["name"], "--", "touch", FINISH)
        for name in ("moved", "stayed"):
            kubectl.run("wait", "--for=condition=Complete", f"job/{name}", f"--timeout={PATIENCE:.0f}s")

        assert by_index("moved").keys() == {str(index) for index in range(INDEXES)}
        undisturbed = lines(kubectl, "stayed")
        for index, one in by_index("moved").items():
            assert logs(kubectl, one) == undisturbed, index
            assert [state["restartCount"] for state in one["status"]["containerStatuses"]] == [0]
        status = json.loads(kubectl.run("get", "job", "moved", "-o", "json").stdout)["status"]
        assert (status["succeeded"], status.get("failed", 0)) == (INDEXES, 0)
        assert status["completedIndexes"] == f"0-{INDEXES - 1}"
    finally:
        kubectl.run("delete", "job", "moved", "stayed", "--ignore-not-found", "--wait")
        kubectl.run("delete", "migrations", "--all", "--wait")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "phase", "ends"), [("source", "pre-copy", "RolledBack"), ("target", "fill", "Completed")]
)
def test_an_agents_container_is_killed_and_takes_nothing_with_it(
    installed: Lab, role: str, phase: str, ends: str
) -> None:
    kubectl, killed = installed.kubectl(), []
    try:
        kubectl.run("apply", "-f", "-", input=json.dumps(manifest("killed", A)))
        until(lambda: pods(kubectl, "killed") and len(lines(kubectl, "killed")) > 2, "it computes")
        (pod,) = pods(kubectl, "killed")
        source = pod["spec"]["nodeName"]
        target = B if source == A else A

        def kill_agent(status: Json) -> None:
            if not killed and status.get("engine", {}).get(role) == phase:
                killed.append(source if role == "source" else target)
                installed.exec(killed[0], ["pkill", "-KILL", "-f", "bin/podferry-agent --kubernetes"])

        status = move(kubectl, pod["metadata"]["name"], target, kill_agent)
        assert killed, "it was over before anybody was killed"
        assert status["phase"] == ends, status
        until(lambda: len(pods(kubectl, "killed")) == 1, "one pod is left")
        (pod,) = pods(kubectl, "killed")
        assert pod["spec"]["nodeName"] == (target if ends == "Completed" else source)
        kubectl.run("exec", pod["metadata"]["name"], "--", "touch", FINISH)
        kubectl.run("wait", "--for=condition=Complete", "job/killed", f"--timeout={PATIENCE:.0f}s")
        counted = json.loads(kubectl.run("get", "job", "killed", "-o", "json").stdout)["status"]
        assert (counted["succeeded"], counted.get("failed", 0)) == (1, 0)
    finally:
        kubectl.run("delete", "job", "killed", "--ignore-not-found", "--wait")
        kubectl.run("delete", "migrations", "--all", "--wait")
    deploy.wait(kubectl)

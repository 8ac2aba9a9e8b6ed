"""`podferry lab demo --kubernetes`: the pod of a Job moves between two nodes of a real Kubernetes while it computes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from importlib.resources import files
from typing import Any

from podferry.cli import demo_job
from podferry.cli.demo_verdict import (
    CANDIDATES,
    EVERY,
    MEBIBYTES,
    MOVE_AT,
    MOVED,
    SOURCE,
    TARGET,
    TWIN,
    announce,
    compare,
)
from podferry.cli.terminal import stderr, stdout, words
from podferry.errors import Failed, TimedOut
from podferry.lab import Lab
from podferry.lab.kubernetes.cluster import Kubectl
from podferry.lab.root_images import JOB_IMAGE
from podferry.node.process import CLEAN_ENVIRONMENT, Child, spawn

POLL_INTERVAL = 0.5  # seconds
PATIENCE = 600.0  # seconds
LEDGER = "ledger"
# What it wrote to its file must have come along too.
_COMMAND = f'python3 -c "$0" "$@" && echo {LEDGER} $(sha256sum < {demo_job.LEDGER})'

Json = dict[str, Any]


def act(lab: Lab, count: int) -> None:
    """The demo in a lab that is up. Raises `Failed` where the job that moved is not as good as the one that stayed."""
    kubectl = lab.kubectl()
    announce(
        f"2. A Job on {SOURCE} that rewrites {MEBIBYTES} MiB of memory all the time; each value depends on the ones before. "
        f"The same Job on {TARGET}, to compare with: it stays where it is."
    )
    for name, node in ((MOVED, SOURCE), (TWIN, TARGET)):
        kubectl.run("apply", "-f", "-", input=json.dumps(manifest(name, node, count)))
    first = _pod_of(kubectl, MOVED)
    _wait_for(kubectl, MOVED, f"step {MOVE_AT} ")
    announce(f"3. Its pod moves to {TARGET} while it computes: kubectl podferry migrate {first} --to {TARGET}")
    _show(kubectl, "podferry", "migrate", first, "--to", TARGET)
    announce(f"4. {TARGET} takes up the Job where {SOURCE} left it.")
    _wait_for(kubectl, MOVED, LEDGER)
    kubectl.run("wait", "--for=condition=Complete", f"job/{MOVED}", f"--timeout={PATIENCE:.0f}s")
    announce("5. What Kubernetes says of it:")
    _show(kubectl, "get", "job", MOVED)
    _show(kubectl, "get", "pods", "-l", f"batch.kubernetes.io/job-name={MOVED}", "-o", "wide")
    _show(kubectl, "get", "migrations")
    _check(kubectl, first)
    announce("6. Both Jobs are done. Is the result the same?")
    _wait_for(kubectl, TWIN, LEDGER)
    compare(_facts(kubectl, MOVED), _facts(kubectl, TWIN))


def manifest(name: str, node: str, count: int) -> Json:
    """The Job. It would rather be on `node` but need not: a pod that is bound to a node cannot move."""
    source = files("podferry.cli").joinpath("demo_job.py").read_text(encoding="utf-8")
    numbers = [str(number) for number in (MEBIBYTES, count, CANDIDATES, EVERY)]
    wish = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "backoffLimit": 0,
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
                            "command": ["sh", "-c", _COMMAND, source, *numbers],
                            "resources": {"requests": {"memory": f"{MEBIBYTES + 64}Mi"}},
                        }
                    ],
                },
            },
        },
    }


def _pods(kubectl: Kubectl, name: str) -> list[Json]:
    listed = kubectl.run("get", "pods", "-l", f"batch.kubernetes.io/job-name={name}", "-o", "json")
    found = json.loads(listed.stdout)["items"]
    assert isinstance(found, list)
    return found


def _pod_of(kubectl: Kubectl, name: str) -> str:
    """The name of a Job's pod: of the one that counts, where it is moving."""
    deadline = time.monotonic() + PATIENCE
    while not (pods := _pods(kubectl, name)):
        if time.monotonic() > deadline:
            raise TimedOut(f"the Job {name} has no pod")
        time.sleep(POLL_INTERVAL)
    alive = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]] or pods
    return str(alive[0]["metadata"]["name"])


def _lines(kubectl: Kubectl, name: str) -> list[str]:
    return kubectl.run("logs", _pod_of(kubectl, name), check=False).stdout.splitlines()


def _wait_for(kubectl: Kubectl, name: str, start: str) -> None:
    """Until a line of a Job's output begins with `start`; says how far it is."""
    deadline, shown = time.monotonic() + PATIENCE, ""
    while True:
        lines = _lines(kubectl, name)
        if lines and lines[-1] != shown:
            shown = lines[-1]
            stderr().print(words(f"  {name}: {shown}", "dim"))
        if any(line.startswith(start) for line in lines):
            return
        if _failed(kubectl, name) or time.monotonic() > deadline:
            raise Failed(f"the Job {name} makes no progress", evidence=lines[-3:])
        time.sleep(POLL_INTERVAL)


def _failed(kubectl: Kubectl, name: str) -> bool:
    return kubectl.run("get", "job", name, "-o", "jsonpath={.status.failed}").stdout not in ("", "0")


def _check(kubectl: Kubectl, first: str) -> None:
    """One success, no failure, no restart, and on the other node."""
    status = json.loads(kubectl.run("get", "job", MOVED, "-o", "json").stdout)["status"]
    counted = {key: status.get(key, 0) for key in ("succeeded", "failed")}
    pods = [
        (
            pod["metadata"]["name"] == first,
            pod["spec"]["nodeName"],
            sum(one["restartCount"] for one in pod["status"]["containerStatuses"]),
        )
        for pod in _pods(kubectl, MOVED)
    ]
    if counted != {"succeeded": 1, "failed": 0} or pods != [(False, TARGET, 0)]:
        raise Failed("the Job did not end as expected", why=f"it counts {counted}; its pods are {pods}")
    stdout().print(words("Complete: one success, no failure, no restart.", "bold green"))


def _facts(kubectl: Kubectl, name: str) -> dict[str, str]:
    lines = _lines(kubectl, name)
    (result,) = [line.split()[1] for line in lines if line.startswith(demo_job.FINAL)]
    (ledger,) = [line.split()[1] for line in lines if line.startswith(LEDGER)]
    text = "\n".join(lines).encode()
    return {
        "final checksum": result,
        f"{len(lines)} lines of output": hashlib.sha256(text).hexdigest(),
        "what it wrote to its file": ledger,
    }


def _show(kubectl: Kubectl, *arguments: str) -> None:
    """Run kubectl on this terminal. Raises `Failed` unless it ends with 0."""
    environment = {**CLEAN_ENVIRONMENT, **kubectl.environment(), "TERM": os.environ.get("TERM", "dumb")}
    child: Child = spawn(kubectl.command(arguments), env=environment, stdout=1, stderr=2)
    if child.wait():
        raise Failed(f"kubectl {' '.join(arguments)} failed", why=f"exit status {child.returncode}")

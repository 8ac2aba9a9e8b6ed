"""Programs are killed while a pod moves through deploy/'s own agents and controllers: one copy runs, the Migration ends with a true
reason, and nothing is left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from podferry.core.migration import MIGRATION, MigrationPhase
from podferry.core.phases import SOURCE, SourcePhase
from podferry.lab import Lab
from podferry.lab.root_images import JOB_IMAGE

from .installing import A, B

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
PATIENCE = 240.0
CONTROL = "control"
# It counts, four times a second, and touches memory, so that there is something to copy; the last line says that it ended well.
COUNT = """
import os, time
data = bytearray(os.urandom(1 << 20) * 48)
n = 0
while not os.path.exists("/var/tmp/finish"):
    n += 1
    data[n * 4096 % len(data)] = n % 256
    print(n, flush=True)
    time.sleep(0.25)
print("end", flush=True)
"""
# All that could be left of a move on a node, but for the marks that go with the agent's next look.
LEFT = """
for kind in run/podferry/incoming run/podferry/outgoing run/podferry/arriving run/podferry/staging var/lib/podferry/staging
do find "/$kind" -mindepth 1 2>/dev/null; done
true
"""
FIND = """
for process in /proc/[0-9]*; do
  if tr '\\0' ' ' < "$process/cmdline" 2>/dev/null | grep -q -- "$1"; then
    [ "${process#/proc/}" = $$ ] || kill -9 "${process#/proc/}" 2>/dev/null && echo "${process#/proc/}"
  fi
done
true
"""

Json = dict[str, Any]


def way(table: Mapping[Any, Mapping[Any, Any]], phase: Any) -> Iterator[str]:
    """The phases from `phase` on where nothing goes wrong: the first of a phase's moves is that one."""
    yield str(phase)
    for after in list(table[phase].values())[:1]:
        yield from way(table, after)


P, S = MigrationPhase, SourcePhase
PENDING, SCHEDULING, RUNNING, HANDING_OVER, _ = way(MIGRATION, P.PENDING)
ENGINE = list(way(SOURCE, S.CHECK))
PASSED = ENGINE.index(S.RESUME) + 1
WAY = [PENDING, SCHEDULING, *ENGINE[:PASSED], HANDING_OVER, *ENGINE[PASSED:-1]]
"""Every phase of a migration in which nothing goes wrong, of the Migration's table and of the engine's."""
WAY_BACK = [str(S.UNDO), str(P.UNDOING)]
ORDER = [*WAY[:2], RUNNING, *WAY[2:], ENGINE[-1], *WAY_BACK]
VICTIMS = {
    "controllers": ("source target", "bin/podferry-controlle[r]"),
    "source-agent": ("source", "bin/podferry-agen[t]"),
    "target-agent": ("target", "bin/podferry-agen[t]"),
    "source-kubelet": ("source", "kubele[t] "),
    "target-kubelet": ("target", "kubele[t] "),
    "source-containerd": ("source", "containerd --confi[g]"),
    "target-containerd": ("target", "containerd --confi[g]"),
    "api-server": (CONTROL, "kube-apiserve[r]"),
}


def until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)
    return found


def manifest() -> Json:
    wish = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [A]}]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "count"},
        "spec": {
            "backoffLimit": 0,
            "template": {
                "spec": {
                    "runtimeClassName": "podferry",
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 1,
                    "affinity": {
                        "nodeAffinity": {
                            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": wish}]
                        }
                    },
                    "containers": [{"name": "main", "image": JOB_IMAGE, "command": ["python3", "-uc", COUNT]}],
                }
            },
        },
    }


class Move:
    """A Job's pod on its way, slowly enough to meet it in any phase."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.kubectl = lab, lab.kubectl()

    def start(self) -> None:
        """The Job, until its pod counts."""
        self.kubectl.run("create", "-f", "-", input=json.dumps(manifest()))
        self.job = self.kubectl.run("get", "job", "count", "-o", "jsonpath={.metadata.uid}").stdout
        until(lambda: len(self.pods()) == 1 and len(self.numbers()) > 3, "it counts")
        (pod,) = self.pods()
        self.pod, self.source = pod["metadata"]["name"], pod["spec"]["nodeName"]
        self.target = B if self.source == A else A

    def begin(self, bandwidth: str = "8M") -> None:
        spec = {
            "podName": self.pod,
            "targetNode": self.target,
            "bandwidth": bandwidth,
            "timeout": "3m",
            "maxFreeze": "3m",
        }
        body = {"apiVersion": "podferry.dev/v1alpha1", "kind": "Migration", "metadata": {"name": "move"}, "spec": spec}
        self.kubectl.run("create", "-f", "-", input=json.dumps(body))

    def status(self) -> Json:
        done = self.kubectl.run("get", "migration", "move", "-o", "json", check=False)
        return dict(json.loads(done.stdout).get("status", {})) if done.returncode == 0 else {}

    def reach(self, phase: str) -> None:
        """Until the Migration, or the engine inside it, is in `phase` or past it, or has ended."""

        def there() -> bool:
            status = self.status()
            seen = {status.get("phase", ""), status.get("engine", {}).get("source", "")}
            return "completionTime" in status or max(
                (ORDER.index(one) for one in seen if one in ORDER), default=0
            ) >= ORDER.index(phase)

        until(there, f"phase {phase}")

    def ended(self) -> Json:
        def end() -> Json | None:
            status = self.status()
            return status if status.get("completionTime") else None

        status: Json = until(end, "it ends")
        return status

    def pods(self) -> list[Json]:
        mine = f"batch.kubernetes.io/controller-uid={self.job}"
        listed = self.kubectl.run("get", "pods", "-l", mine, "-o", "json", check=False)
        return list(json.loads(listed.stdout)["items"]) if listed.returncode == 0 else []

    def numbers(self) -> list[str]:
        pods = self.pods()
        return self.kubectl.run("logs", pods[0]["metadata"]["name"], check=False).stdout.split() if pods else []

    def kill(self, victim: str) -> None:
        """Kill -9 one of VICTIMS, wherever it runs."""
        places, program = VICTIMS[victim]
        machines = [getattr(self, place, place) for place in places.split()]
        killed = [self.lab.exec(one, ["sh", "-c", FIND, "sh", program]).stdout for one in machines]
        assert "".join(killed).split(), f"nothing on {machines} runs {program}"

    def take_the_api_server_away(self, seconds: float) -> None:
        """Nobody reaches it for so long."""
        service = "/run/service/kube-apiserver"
        self.lab.exec(CONTROL, ["sv", "-w", "5", "force-stop", service], check=False)
        try:
            time.sleep(seconds)
        finally:
            self.lab.exec(CONTROL, ["sv", "up", service])

    def cancel(self) -> None:
        self.kubectl.run("patch", "migration", "move", "--type=merge", "-p", '{"spec": {"cancel": true}}')

    def check(self) -> None:
        """One copy runs, and is the one that always ran; the Job ends well; nothing of the move is left."""
        (pod,) = until(lambda: len(self.pods()) == 1 and self.pods(), "one pod is the Job's")
        before = len(self.numbers())
        until(lambda: len(self.numbers()) > before + 3, "it goes on counting")
        # It may end before `touch` does, which goes with it.
        self.kubectl.run("exec", pod["metadata"]["name"], "--", "touch", "/var/tmp/finish", check=False)
        self.kubectl.run("wait", "--for=condition=Complete", "job/count", f"--timeout={PATIENCE:.0f}s")
        numbers = self.numbers()
        assert numbers == [*map(str, range(1, len(numbers))), "end"], "a number twice or not at all: another copy ran"
        status = json.loads(self.kubectl.run("get", "job", "count", "-o", "json").stdout)["status"]
        assert (status["succeeded"], status.get("failed", 0)) == (1, 0)
        (pod,) = self.pods()
        assert [one["restartCount"] for one in pod["status"]["containerStatuses"]] == [0]
        ours = "podferry.dev/migration-uid"
        until(
            lambda: not json.loads(self.kubectl.run("get", "pods", "-l", ours, "-o", "json").stdout)["items"],
            "no pod of ours",
        )
        for node in (A, B):
            until(
                lambda node=node: not self.lab.exec(node, ["sh", "-c", LEFT]).stdout.split(),
                f"nothing is left on {node}",
            )

    def clean(self) -> None:
        """Nothing of this test is left, and no pod of podferry's is one that the kubelet makes wait for its next start."""
        for what in ("jobs", "pods"):  # what collects garbage may be behind for minutes after the API server's death
            self.kubectl.run("delete", what, "--all", "--wait", "--timeout=60s", check=False)
        self.kubectl.run("delete", "migrations", "--all", "--wait", "--timeout=60s", check=False)
        listed = self.kubectl.run("-n", "podferry-system", "get", "pods", "-o", "json").stdout
        for pod in json.loads(listed)["items"]:
            if any(one["restartCount"] for one in pod["status"].get("containerStatuses", [])):
                self.kubectl.run("-n", "podferry-system", "delete", "pod", pod["metadata"]["name"], "--wait")
        for what in ("daemonset/podferry-agent", "deployment/podferry-controller"):
            self.kubectl.run("-n", "podferry-system", "rollout", "status", what, "--timeout=120s")


@pytest.fixture
def move(installed: Lab) -> Iterator[Move]:
    made = Move(installed)
    try:
        made.start()
        yield made
    finally:
        made.clean()


@pytest.mark.parametrize("phase", WAY)
@pytest.mark.parametrize("victim", VICTIMS)
def test_it_is_killed(move: Move, victim: str, phase: str) -> None:
    """The Migration ends, says why if it did not succeed, and one copy of the job computes on."""
    move.begin()
    move.reach(phase)
    move.kill(victim)
    status = move.ended()
    # The controllers remember nothing, so nothing is lost with them.
    assert status["phase"] in ("Completed", *["RolledBack"] * (victim != "controllers")), status
    assert status["ending"]["message"]
    move.check()


@pytest.mark.parametrize("phase", WAY)
def test_the_api_server_is_away_for_a_minute(move: Move, phase: str) -> None:
    """Nothing is lost, and nothing runs twice: nobody takes its silence for the Migration's or the pod's end."""
    move.begin()
    move.reach(phase)
    move.take_the_api_server_away(60.0)
    status = move.ended()
    assert status["phase"] in ("Completed", "RolledBack"), status
    assert status["ending"]["message"]
    move.check()


@pytest.mark.parametrize("phase", WAY_BACK)
@pytest.mark.parametrize("victim", VICTIMS)
def test_it_is_killed_while_the_move_is_taken_back(move: Move, victim: str, phase: str) -> None:
    move.begin()
    move.reach("pre-copy")
    move.cancel()
    move.reach(phase)
    move.kill(victim)
    status = move.ended()
    assert (status["phase"], status["ending"]["reason"]) == ("Cancelled", "CancelRequested"), status
    assert move.pods()[0]["spec"]["nodeName"] == move.source
    move.check()


@pytest.mark.parametrize("phase", ["pre-copy", "prepare-target"])
def test_it_is_cancelled(move: Move, phase: str) -> None:
    move.begin()
    move.reach(phase)
    move.kubectl.run("podferry", "cancel", "move", check=False)
    status = move.ended()
    assert status["phase"] in ("Cancelled", "Completed"), status
    move.check()


def test_the_targets_node_dies_while_memory_is_copied(move: Move) -> None:
    move.begin()
    move.reach("pre-copy")
    move.lab.kill_node(move.target)
    try:
        status = move.ended()
        assert status["phase"] == "RolledBack", status
        assert status["ending"]["message"]
        assert move.pods()[0]["spec"]["nodeName"] == move.source
    finally:
        move.lab.start_node(move.target)
    move.check()


def test_the_sources_node_dies_once_the_job_runs_on_the_target(move: Move) -> None:
    move.begin()
    move.reach("HandingOver")
    move.lab.kill_node(move.source)
    try:
        status = move.ended()
        assert status["phase"] == "Completed", status
    finally:
        move.lab.start_node(move.source)
    move.check()

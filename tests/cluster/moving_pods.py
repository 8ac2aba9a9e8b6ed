"""Pods moved by agents whose Kubernetes side is the test: what the controller does later, in a few lines."""

from __future__ import annotations

import copy
import json
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from podferry.errors import CommandFailed, PodferryError
from podferry.lab import Lab
from podferry.lab.kubernetes.portable_criu import bundle
from podferry.lab.machine_config import AGENT_PORT
from podferry.lab.root_images import JOB_IMAGE

A, B = NODES = ("node-a", "node-b")
PATIENCE = 120.0
STANDIN = Path(__file__).with_name("standin.py")
DIRECTORY = "run/podferry-standin"
GATES = "run/podferry-gates"
SETTINGS = "etc/podferry/standin.json"
PATHS = "PYTHONPATH=/opt/podferry/src:/opt/podferry/site"
PYTHON = f"PODFERRY_BREAKPOINTS=/{GATES} {PATHS} python3 -P"

RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "podferry"},
    "handler": "podferry",
}

Json = dict[str, Any]


def until(holds: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait for what happens elsewhere and tells nobody; returns what `holds` did."""
    deadline = time.monotonic() + patience
    while not (found := holds()):
        assert time.monotonic() < deadline, f"it never came to be: {what}"
        time.sleep(0.02)
    return found


def pod(name: str, script: str, **more: Any) -> Json:
    """A pod of podferry's runtime whose container `main` runs a Python script. `more` goes into the spec."""
    main = {"name": "main", "image": JOB_IMAGE, "command": ["python3", "-u", "-c", script]}
    spec: Json = {
        "runtimeClassName": "podferry",
        "terminationGracePeriodSeconds": 0,
        "restartPolicy": "Never",
        "containers": [main],
        **more,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def also(script: str, name: str = "other", **more: Any) -> Json:
    """One more container."""
    return {"name": name, "image": JOB_IMAGE, "command": ["python3", "-u", "-c", script], **more}


@dataclass
class Move:
    """A migration under way. What the controller would answer is answered unless a test sets another answer."""

    id: str
    pod: Json
    target: str
    target_pod: Json | None = None
    answers: dict[str, Callable[[], None]] = field(default_factory=dict)


class Movers:
    """The agents of a lab's nodes, each with the test as its Kubernetes side."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.kubectl = lab, lab.kubectl()
        self._pool = ThreadPoolExecutor(16)
        self.under_way: list[Move] = []
        """Moves that outlive the test that began them: what there is of them is not left over."""
        self.kubectl.run("apply", "-f", "-", input=json.dumps(RUNTIME_CLASS))
        criu = bundle(print)
        for node in NODES:
            self._install(node, criu)
            self._configure(node)
            self.start(node)

    def _install(self, node: str, criu: Path) -> None:
        """What the DaemonSet's installer does."""
        shutil.copytree(criu, self.root(node) / "tmp/criu", symlinks=True, dirs_exist_ok=True)
        self._run(node, "from pathlib import Path; install(print, bundle=Path('/tmp/criu'))")

    def _run(self, node: str, program: str) -> None:
        program = f"from podferry.install import install, uninstall; {program}"
        self.lab.exec(node, ["sh", "-c", f'{PYTHON} -c "{program}"'])

    def root(self, node: str) -> Path:
        return self.lab.root(node)

    def _configure(self, node: str) -> None:
        addresses = {one.name: one.address for one in self.lab.status().nodes}
        others = {
            name: f"{address}:{AGENT_PORT}" for name, address in addresses.items() if name in NODES and name != node
        }
        config = {
            "node": node,
            "listen": f"{addresses[node]}:{AGENT_PORT}",
            "certificates": "/etc/podferry/pki",
            "peers": others,
        }
        (self.root(node) / SETTINGS).write_text(json.dumps(config))

    def start(self, node: str) -> None:
        """Start the agent of a node and wait until it answers."""
        shutil.copy(STANDIN, self.root(node) / "tmp/standin.py")
        with suppress(FileNotFoundError):
            (self.root(node) / DIRECTORY / "agent.ready").unlink()
        line = f"{PYTHON} /tmp/standin.py /{SETTINGS} /{DIRECTORY} >> /var/log/podferry/standin.log 2>&1"
        self.lab.exec(node, ["sh", "-c", f"setsid sh -c '{line}' < /dev/null > /dev/null 2>&1 &"])
        self.hear(node, "agent", "ready")

    def close_breakpoint(self, gate: str) -> Path:
        """Close a gate of the agents (`podferry.engine.breakpoints`); removing the file opens it."""
        for node in NODES:
            (self.root(node) / GATES).mkdir(exist_ok=True)
        path = self.root(A) / GATES / gate
        path.with_name(f"{gate}.reached").unlink(missing_ok=True)
        path.touch()
        return path

    def kill(self, node: str) -> None:
        """kill -9 the agent of a node."""
        pid = self.hear(node, "agent", "ready")
        self.lab.exec(node, ["kill", "-9", str(pid)], check=False)

    def stop(self) -> None:
        """End the agents; the nodes are as they were before."""
        for node in NODES:
            self.kill(node)
            self._run(node, "uninstall(print, force=True)")
            (self.root(node) / SETTINGS).unlink()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # What is said through the directory.

    def say(self, node: str, id: str, what: str, value: Any) -> None:
        directory = self.root(node) / DIRECTORY
        (directory / f".{id}.{what}").write_text(json.dumps(value))
        (directory / f".{id}.{what}").rename(directory / f"{id}.{what}")

    def said(self, node: str, id: str, what: str) -> Any:
        with suppress(FileNotFoundError):
            return [json.loads((self.root(node) / DIRECTORY / f"{id}.{what}").read_text())]
        return []

    def hear(self, node: str, id: str, what: str) -> Any:
        return until(lambda: self.said(node, id, what), f"{what} of {id} on {node}")[0]

    # Pods.

    def create(self, manifest: Json, node: str = A) -> Json:
        """Create a pod on a node, wait until it runs."""
        made = copy.deepcopy(manifest)
        made["spec"]["nodeName"] = node
        self.kubectl.run("create", "-f", "-", input=json.dumps(made))
        return self.running(made["metadata"]["name"])

    def running(self, name: str) -> Json:
        try:
            self.kubectl.run("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={PATIENCE:.0f}s")
        except CommandFailed as failed:
            said = self.kubectl.run("logs", name, "--all-containers", "--prefix", "--tail=20", check=False).stdout
            failed.add_note(f"{json.dumps(self.get(name)['status'])}\n{said}")
            raise
        return self.get(name)

    def get(self, name: str) -> Json:
        found: Json = json.loads(self.kubectl.run("get", "pod", name, "-o", "json").stdout)
        return found

    def logs(self, name: str, container: str = "main") -> list[str]:
        return self.kubectl.run("logs", name, "-c", container).stdout.splitlines()

    def delete(self, *names: str) -> None:
        self.kubectl.run("delete", "pod", "--ignore-not-found", "--wait", "--grace-period=1", *names)

    def visit(self, pod: Json) -> None:
        """Have somebody stay inside a pod, as with a shell."""
        self._pool.submit(self.kubectl.run, "exec", pod["metadata"]["name"], "--", "sleep", "600", check=False)
        node, name = pod["spec"]["nodeName"], "sleep 600"
        until(lambda: name in self.lab.exec(node, ["ps", "-eo", "args"]).stdout, "somebody is inside")

    # Moving.

    def order(self, pod: Json, target: str, mode: str = "live", **more: Any) -> Move:
        """Have the agent on the pod's node begin."""
        move = Move(str(uuid.uuid4()), pod, target)
        spec = pod["spec"]
        sidecars = [one["name"] for one in spec.get("initContainers", []) if one.get("restartPolicy") == "Always"]
        said = {
            "pod": name_of(pod),
            "containers": sidecars + [one["name"] for one in spec["containers"]],
            "target": target,
            "mode": mode,
            **more,
        }
        self.say(spec["nodeName"], move.id, "order", said)
        return move

    def answered(self, act: Callable[[Move], None], move: Move) -> Future[None]:
        """Have one thing that a move asks for done meanwhile."""
        return self._pool.submit(act, move)

    def make_target(self, move: Move) -> None:
        """What the controller does at `prepare-target`."""
        self.hear(move.target, move.id, "wants-pod")
        clone = clone_of(move)
        made = self.kubectl.run("create", "-o", "json", "-f", "-", input=json.dumps(clone))
        move.target_pod = json.loads(made.stdout)
        self.say(move.target, move.id, "pod", name_of(move.target_pod))

    def hand_over(self, move: Move) -> None:
        """What the controller does at `commit`."""
        source = move.pod["spec"]["nodeName"]
        self.hear(source, move.id, "wants-hand-over")
        self.kubectl.run("delete", "pod", move.pod["metadata"]["name"], "--wait=false")
        self.say(source, move.id, "handed-over", {})

    def ended(self, node: str, move: Move, role: str = "source") -> Json:
        record: Json = self.hear(node, move.id, role)
        return record

    def move(self, pod: Json, mode: str = "live", **more: Any) -> tuple[Json, Json]:
        """Move a pod to the other node; the target pod, and the source's record."""
        return self.follow(self.order(pod, B if pod["spec"]["nodeName"] == A else A, mode, **more))

    def follow(self, move: Move) -> tuple[Json, Json]:
        """Answer as the controller would until a move has come to its end; the target pod, and the source's record."""
        source = move.pod["spec"]["nodeName"]
        answers = [self._pool.submit(act, move) for act in (self.make_target, self.hand_over)]
        record = self.ended(source, move)
        assert record["outcome"] == "completed", (record, self.evidence(move))
        for answer in answers:
            answer.result(PATIENCE)
        target = move.target_pod
        assert target is not None
        return self.running(target["metadata"]["name"]), record

    def leftovers(self, node: str) -> list[str]:
        """What migrations may have left on a node, but for the marks of pods, which go with the agent's next look."""
        names = [name for move in self.under_way for name in (move.id, uid(move.pod), uid(move.target_pod)) if name]
        root = self.root(node)
        kinds = ("run/podferry/incoming", "run/podferry/outgoing", "run/podferry/arriving", "run/podferry/staging")
        found = [f"{kind}/{one.name}" for kind in (*kinds, "var/lib/podferry/staging") for one in listed(root / kind)]
        ours = [
            one for one in self.lab.exec(node, ["ps", "-eo", "args"]).stdout.splitlines() if "podferry.memory" in one
        ]
        return [one for one in found + ours if not any(name in one for name in names)]

    def evidence(self, move: Move) -> str:
        """What may explain a migration that failed."""
        said = []
        for node in NODES:
            with suppress(PodferryError, OSError):
                log = self.root(node) / "var/log/podferry/standin.log"
                said.append("\n".join(log.read_text().splitlines()[-15:]))
        return "\n".join(said)


def uid(pod: Json | None) -> str:
    return str(pod["metadata"]["uid"]) if pod else ""


def name_of(pod: Json) -> Json:
    metadata = pod["metadata"]
    return {"namespace": metadata["namespace"], "name": metadata["name"], "uid": metadata["uid"]}


def clone_of(move: Move) -> Json:
    """The target pod: the source's spec, pinned to the target, without what has finished."""
    spec = copy.deepcopy(move.pod["spec"])
    spec["nodeName"] = move.target
    spec["initContainers"] = [one for one in spec.get("initContainers", []) if one.get("restartPolicy") == "Always"]
    for container in spec["initContainers"] + spec["containers"]:
        container.pop("startupProbe", None)
    annotations = {"podferry.dev/migration": move.id}
    name = f"{move.pod['metadata']['name'].partition('.')[0]}.{move.id[:5]}"
    metadata = {"name": name, "namespace": move.pod["metadata"]["namespace"], "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []

"""Pods with liveness probes stand still for much longer than their kubelets have patience, and move all the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from podferry.kube.quantities import seconds
from podferry.lab import Lab
from podferry.lab.root_images import JOB_IMAGE

from .installing import A, B

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
PATIENCE = 240.0
PERIOD, THRESHOLD = 1, 3
COUNT = """
import os, sys, threading, time
sys.stderr = open(os.devnull, "w")  # of connections that the move has closed
data = bytearray(os.urandom(1 << 20) * MEBIBYTES)
def count():
    n = 0
    while not os.path.exists("/var/tmp/finish"):
        n += 1
        data[n * 4096 % len(data)] = n % 256
        print(n, flush=True)
        time.sleep(0.25)
    print("end", flush=True)
    os._exit(0)
threading.Thread(target=count).start()
"""
HTTP = """
import http.server
class Alive(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/alive" else 404)
        self.end_headers()
    def log_message(self, *words):
        pass
http.server.HTTPServer(("", 8080), Alive).serve_forever()
"""
TCP = """
import socket
listener = socket.create_server(("", 8081), backlog=2)
while True:
    listener.accept()[0].close()
"""
# As little of HTTP/2 as a health check needs: whatever is asked is answered with SERVING.
GRPC = """
import socket, struct, threading
def frame(kind, flags, stream, body=b""):
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body
def literal(name, value):
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value
def serve(client):
    stream = client.makefile("rb")
    stream.read(24)
    client.sendall(frame(4, 0, 0))
    while head := stream.read(9):
        body, kind, flags = stream.read(int.from_bytes(head[:3], "big")), head[3], head[4]
        number = int.from_bytes(head[5:], "big")
        if kind == 4 and not flags & 1:
            client.sendall(frame(4, 1, 0))
        if kind == 6 and not flags & 1:
            client.sendall(frame(6, 1, 0, body))
        if kind in (0, 1) and flags & 1:
            client.sendall(frame(1, 4, number, bytes([0x88]) + literal(b"content-type", b"application/grpc"))
                + frame(0, 0, number, bytes([0, 0, 0, 0, 2, 8, 1]))
                + frame(1, 5, number, literal(b"grpc-status", b"0")))
listener = socket.create_server(("", 8082))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""
PROBES: dict[str, tuple[str, dict[str, Any]]] = {
    "http": (HTTP, {"httpGet": {"path": "/alive", "port": "web"}}),
    "tcp": (TCP, {"tcpSocket": {"port": 8081}}),
    "grpc": (GRPC, {"grpc": {"port": 8082}}),
    "exec": ("", {"exec": {"command": ["test", "-d", "/var/tmp"]}}),
}

Json = dict[str, Any]


def until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)
    return found


def container(kind: str, mebibytes: int) -> Json:
    script, probe = PROBES[kind]
    return {
        "name": kind,
        "image": JOB_IMAGE,
        "command": ["python3", "-uc", COUNT.replace("MEBIBYTES", str(mebibytes)) + script],
        "ports": [{"name": "web", "containerPort": 8080}] if kind == "http" else [],
        "livenessProbe": {**probe, "periodSeconds": PERIOD, "failureThreshold": THRESHOLD, "timeoutSeconds": 1},
    }


class Probed:
    """A pod of four containers, each of which is probed in another way."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.kubectl, self.name = lab, lab.kubectl(), "probed"

    def start(self) -> None:
        spec = {
            "runtimeClassName": "podferry",
            "terminationGracePeriodSeconds": 2,
            "restartPolicy": "Always",
            "nodeName": A,
            "containers": [container(kind, 96 if kind == "http" else 1) for kind in PROBES],
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": self.name}, "spec": spec}
        self.kubectl.run("create", "-f", "-", input=json.dumps(pod))
        self.kubectl.run("wait", "--for=condition=Ready", f"pod/{self.name}", f"--timeout={PATIENCE:.0f}s")
        self.uid = self.get()["metadata"]["uid"]

    def get(self, name: str = "") -> Json:
        done = self.kubectl.run("get", "pod", name or self.name, "-o", "json", check=False)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def begin(self, mode: str, bandwidth: str = "8M") -> None:
        spec = {
            "podName": self.name,
            "targetNode": B,
            "mode": mode,
            "bandwidth": bandwidth,
            "timeout": "4m",
            "maxFreeze": "4m",
        }
        body = {"apiVersion": "podferry.dev/v1alpha1", "kind": "Migration", "metadata": {"name": "move"}, "spec": spec}
        self.kubectl.run("create", "-f", "-", input=json.dumps(body))

    def status(self) -> Json:
        done = self.kubectl.run("get", "migration", "move", "-o", "json", check=False)
        return dict(json.loads(done.stdout).get("status", {})) if done.returncode == 0 else {}

    def reached(self, phase: str) -> None:
        until(lambda: self.status().get("engine", {}).get("source") == phase, f"the source is in {phase}")

    def ended(self) -> Json:
        status: Json = until(lambda: (found := self.status()).get("completionTime") and found, "the migration ends")
        return status

    def numbers(self, pod: str, kind: str) -> list[int]:
        return [int(one) for one in self.kubectl.run("logs", pod, "-c", kind, check=False).stdout.split()]

    def goes_on(self, pod: str) -> None:
        """Every container counts on where it was, and none was started again."""
        before = {kind: len(self.numbers(pod, kind)) for kind in PROBES}
        for kind, count in before.items():
            until(lambda kind=kind, count=count: len(self.numbers(pod, kind)) > count + 8, f"{kind} goes on counting")
            numbers = self.numbers(pod, kind)
            assert numbers == list(range(1, len(numbers) + 1)), f"{kind}: another copy ran, or was started anew"
        states = self.get(pod)["status"]["containerStatuses"]
        assert {one["name"]: one["restartCount"] for one in states} == dict.fromkeys(PROBES, 0)

    def warnings(self) -> list[str]:
        """What the kubelet said of killing the pod that moves."""
        fields = f"involvedObject.uid={self.uid}"
        events = json.loads(self.kubectl.run("get", "events", "--field-selector", fields, "-o", "json").stdout)["items"]
        return [one["message"] for one in events if "will be restarted" in one["message"]]

    def clean(self) -> None:
        self.kubectl.run("delete", "migrations", "--all", "--wait", "--timeout=60s", check=False)
        self.kubectl.run("delete", "pods", "--all", "--wait", "--timeout=60s", check=False)


@pytest.fixture
def probed(installed: Lab) -> Iterator[Probed]:
    made = Probed(installed)
    try:
        made.start()
        yield made
    finally:
        made.clean()


@pytest.mark.parametrize("mode", ["stop", "postcopy", "live"])
def test_a_pod_moves_whose_probes_have_less_patience_than_it_stands_still(probed: Probed, mode: str) -> None:
    probed.begin(mode)
    status = probed.ended()
    assert status["phase"] == "Completed", status
    assert (status["engine"]["source"], status["engineEnding"]["outcome"]) == ("completed", "completed")
    if mode == "stop":
        assert seconds(status["downtime"]) > PERIOD * THRESHOLD * 2, (
            "it did not stand still for long: this shows nothing"
        )
    probed.goes_on(status["targetPod"]["name"])
    assert not probed.warnings()


def test_a_pod_that_stood_still_for_long_and_stays_is_left_in_peace(probed: Probed) -> None:
    """The kubelet must not have made up its mind meanwhile."""
    probed.begin("stop")
    probed.reached("cut-over")
    time.sleep(PERIOD * THRESHOLD * 2)
    probed.kubectl.run("patch", "migration", "move", "--type=merge", "-p", '{"spec": {"cancel": true}}')
    status = probed.ended()
    assert status["phase"] == "Cancelled", status
    probed.goes_on(probed.name)
    time.sleep(PERIOD * THRESHOLD * 2)
    probed.goes_on(probed.name)
    assert not probed.warnings()


def test_a_source_that_is_deleted_while_the_target_fetches_its_memory_is_kept_until_it_has_it(probed: Probed) -> None:
    """Whoever deletes the source's pod, it is stopped by the kubelet, by SIGTERM and then SIGKILL."""
    probed.begin("postcopy")
    until(
        lambda: any(
            (one["type"], one["status"]) == ("HandedOver", "True") for one in probed.status().get("conditions", [])
        ),
        "the owner has the target",
    )
    assert probed.status()["engine"]["source"] == "serve", "it has all its memory already: this shows nothing"
    probed.kubectl.run("delete", "pod", probed.name, "--wait=false", "--grace-period=1")
    status = probed.ended()
    assert (status["phase"], status["engineEnding"]["outcome"]) == ("Completed", "completed"), status
    probed.goes_on(status["targetPod"]["name"])
    until(lambda: not probed.get(), "the source's pod goes")


def test_a_pod_that_is_deleted_while_it_stands_still_is_asked_to_end_when_it_goes_on(probed: Probed) -> None:
    """Before the right to run has passed its owner's wish goes before the move; it has its grace period, too."""
    log = probed.kubectl.run("get", "pod", probed.name, "-o", "name").stdout.strip()
    assert log
    probed.begin("stop")
    probed.reached("cut-over")
    probed.kubectl.run("delete", "pod", probed.name, "--wait=false")
    status = probed.ended()
    assert (status["phase"], status["ending"]["reason"]) == ("Failed", "PodDeleted"), status
    until(lambda: not probed.get(), "the pod goes")

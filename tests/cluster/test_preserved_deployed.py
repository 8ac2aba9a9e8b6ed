"""Connections between pods go on by `spec.connections: Preserve` of a Migration: with the real controller, rights and status."""

from __future__ import annotations

import json

import pytest

from podferry.lab import Lab

from . import talking
from .installing import A, B
from .moving_pods import pod
from .test_jobs import move, until

pytestmark = pytest.mark.cluster


def test_two_pods_talk_on_while_one_moves_and_then_the_other(installed: Lab) -> None:
    kubectl = installed.kubectl()
    server, client = "server", "client"

    def create(manifest: talking.Json, node: str) -> str:
        manifest["spec"]["nodeName"] = node
        kubectl.run("create", "-f", "-", input=json.dumps(manifest))
        name = manifest["metadata"]["name"]
        kubectl.run("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=120s")
        return kubectl.run("get", "pod", name, "-o", "jsonpath={.status.podIP}").stdout

    def goes_on() -> None:
        def said() -> int:
            return talking.counted(kubectl.run("logs", client).stdout.splitlines())

        before = said()
        until(lambda: said() > before + 50, "they talk")

    def moved(name: str, to: str) -> str:
        status = move(kubectl, name, to, connections="Preserve")
        assert status["phase"] == "Completed", json.dumps(status, indent=1)
        assert not status.get("closedConnections"), json.dumps(status, indent=1)
        assert [(one["fate"], one["peer"]) for one in status["connections"] if one["peer"] != "inside"] == [
            ("preserved", "another")
        ] * 3
        assert [one["agent"] for one in status["peers"]] == [True]
        return str(status["targetPod"]["name"])

    try:
        first, second = talking.pods(pod)
        address = create(first, B)
        create(second(address), A)
        goes_on()
        client = moved(client, B)
        goes_on()
        server = moved(server, A)
        goes_on()
        kubectl.run("exec", client, "--", "touch", "/tmp/end")
        for node in (A, B):
            until(lambda node=node: talking.rules(installed, node) == "0 []", f"no rule is left on {node}")  # type: ignore[misc]
    finally:
        kubectl.run("delete", "pod", "--all", "--wait", "--grace-period=1")
        kubectl.run("delete", "migrations", "--all", "--wait")

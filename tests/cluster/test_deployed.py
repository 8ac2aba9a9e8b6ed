"""deploy/ on a real cluster: what it installs, what it may do, and that nothing is left when it is taken away."""

from __future__ import annotations

import pytest

from podferry.install import criu_bundle
from podferry.install.node import WRAPPER
from podferry.lab import Lab
from podferry.lab.kubernetes import deploy
from podferry.lab.root_images import PAUSE_IMAGE

from .installing import CONFIG, NODES, agent_on

pytestmark = pytest.mark.cluster
SYSTEM = deploy.NAMESPACE
HELPER = """
from podferry.node import outside
from podferry.node.process import run, spawn
print(spawn(outside.surviving(["sleep", "1000"])).pid)
print(run(outside.on_node(["criu", "--version"])).stdout.split()[1])
print(run(outside.on_node(["hostname"])).stdout.strip())
"""


def containerd_pid(lab: Lab, node: str) -> str:
    return lab.exec(node, ["pgrep", "-x", "containerd"]).stdout


def test_nodes_know_the_runtime_and_have_a_criu_that_will_do(installed: Lab) -> None:
    for node in NODES:
        dump = installed.exec(node, ["containerd", "--config", CONFIG, "config", "dump"]).stdout
        quoted = dump.replace("'", '"')  # containerd 2 quotes otherwise
        assert f'BinaryName = "{WRAPPER}"' in quoted
        assert 'snapshotter = "podferry"' in quoted, "the rest of the section is as it was"
        assert f'"{PAUSE_IMAGE}"' in quoted, "and so is the image of sandboxes"
        where = installed.exec(
            node, ["sh", "-c", f"ls {criu_bundle.DIRECTORY}/bin/criu 2>/dev/null || command -v criu"]
        )
        version = installed.exec(node, [where.stdout.strip(), "--version"]).stdout
        assert tuple(map(int, version.split()[1].split(".")))[:2] >= criu_bundle.OLDEST


def test_a_new_agent_leaves_containerd_alone(installed: Lab) -> None:
    pids = {node: containerd_pid(installed, node) for node in NODES}
    kubectl = installed.kubectl()
    kubectl.run("-n", SYSTEM, "rollout", "restart", "daemonset/podferry-agent")
    deploy.wait(kubectl)
    assert {node: containerd_pid(installed, node) for node in NODES} == pids
    said = kubectl.run("-n", SYSTEM, "logs", agent_on(installed, "node-a"), "-c", "install")
    assert "everything is in its place already" in said.stdout


@pytest.mark.parametrize(
    ("who", "verb", "what", "allowed"),
    [
        ("agent", "update", "migrations.podferry.dev --subresource=status", "yes"),
        ("agent", "list", "pods", "no"),
        ("agent", "get", "nodes", "no"),
        ("agent", "get", "secrets", "no"),
        ("agent", "delete", "pods", "no"),
        ("agent", "create", "migrations.podferry.dev", "no"),
        ("controller", "create", "pods", "yes"),
        ("controller", "delete", "migrations.podferry.dev", "yes"),
        ("controller", "update", "jobs.batch --subresource=finalizers", "yes"),
        ("controller", "update", "jobs.batch", "no"),
        ("controller", "list", "secrets", "no"),
        ("controller", "delete", "nodes", "no"),
    ],
)
def test_what_each_may_do(installed: Lab, who: str, verb: str, what: str, allowed: str) -> None:
    account = f"--as=system:serviceaccount:{SYSTEM}:podferry-{who}"
    said = installed.kubectl().run("auth", "can-i", verb, *what.split(), account, "-A", check=False)
    assert said.stdout.strip() == allowed


def test_what_an_agent_starts_on_its_node_outlives_it(installed: Lab) -> None:
    kubectl, agent = installed.kubectl(), agent_on(installed, "node-a")
    said = kubectl.run("-n", SYSTEM, "exec", agent, "-c", "agent", "--", "python3", "-c", HELPER).stdout.split()
    pid, version, hostname = said
    assert tuple(map(int, version.split(".")))[:2] >= criu_bundle.OLDEST
    assert hostname == "node-a"
    try:
        kubectl.run("-n", SYSTEM, "delete", agent, "--wait", "--grace-period=1")
        assert installed.exec("node-a", ["cat", f"/proc/{pid}/comm"]).stdout == "sleep\n"
        places = installed.exec("node-a", ["cat", f"/proc/{pid}/cgroup"]).stdout.split()
        assert any(place.endswith(":/podferry") for place in places)
        assert not any("kubepods" in place for place in places)
    finally:
        installed.exec("node-a", ["kill", pid])
    deploy.wait(kubectl)

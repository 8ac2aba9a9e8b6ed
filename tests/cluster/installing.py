"""What the tests of an installed podferry share."""

from __future__ import annotations

from podferry.lab import Lab
from podferry.lab.kubernetes import deploy, image

NODES = A, B = ("node-a", "node-b")
CONFIG = "/etc/podferry/containerd.toml"
_FOOTPRINT = """
cat "$1"
find /etc/podferry /opt/podferry/bin /opt/podferry/gated /opt/podferry/criu -type f 2>/dev/null | sort | xargs sha256sum
"""


def footprint(lab: Lab, node: str) -> str:
    """A node's files that an installation changes."""
    return lab.exec(node, ["sh", "-c", _FOOTPRINT, "sh", CONFIG]).stdout


def is_installed(lab: Lab) -> bool:
    """Whether deploy/ was applied."""
    return bool(lab.kubectl().run("get", "namespace", deploy.NAMESPACE, "--ignore-not-found", "-o", "name").stdout)


def agent_on(lab: Lab, node: str) -> str:
    """The name of a node's agent's pod."""
    words = ["get", "pods", "-l", "app.kubernetes.io/name=podferry-agent", f"--field-selector=spec.nodeName={node}"]
    return lab.kubectl().run("-n", deploy.NAMESPACE, *words, "-o", "name").stdout.split()[0]


def uninstall(lab: Lab) -> None:
    """Take podferry off the cluster and off its nodes, wherever it still is."""
    kubectl, what = lab.kubectl(), deploy.directory()
    reference = deploy.image(kubectl) or f"{image.NAME}:{image.tag()}"
    kubectl.run("delete", "-k", what, "--ignore-not-found", "--wait", "--timeout=60s")
    deploy.apply(kubectl, reference, what / "uninstall")
    words = ["rollout", "status", "daemonset/podferry-uninstall", "--timeout=60s"]
    kubectl.run("-n", "podferry-uninstall", *words)
    kubectl.run("delete", "-k", what / "uninstall", "--wait", "--timeout=60s")

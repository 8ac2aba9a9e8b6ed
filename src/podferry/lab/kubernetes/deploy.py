"""podferry in a lab's Kubernetes, by the same `deploy/` as in any other."""

from __future__ import annotations

from pathlib import Path

from podferry import __version__
from podferry.errors import CommandFailed, Failed, UsageError
from podferry.lab.kubernetes.cluster import Kubectl
from podferry.lab.kubernetes.image import NAME
from podferry.lab.site import CHECKOUT, PACKAGE
from podferry.node.process import Completed

NAMESPACE = "podferry-system"
ROLLOUTS = ("daemonset/podferry-agent", "deployment/podferry-controller")
SECONDS = 180


def directory() -> Path:
    """`deploy/`: in a checkout at its top, in an installed package beside the modules."""
    for path in (CHECKOUT / "deploy", PACKAGE / "deploy"):
        if (path / "kustomization.yaml").is_file():
            return path
    raise UsageError("deploy/ is missing", why=f"it is neither in {CHECKOUT} nor in {PACKAGE}")


def apply(kubectl: Kubectl, image: str, what: Path | None = None) -> None:
    """`kubectl apply -k` of `deploy/`, or of `what` within it, with `image` in the place of the released one."""
    rendered = kubectl.run("create", "-k", what or directory(), "--dry-run=client", "-o", "yaml").stdout
    kubectl.run("apply", "-f", "-", input=rendered.replace(f"{NAME}:{__version__}", image))


def image(kubectl: Kubectl) -> str:
    """The image of the agents that are installed; nothing where none are."""
    path = "jsonpath={.spec.template.spec.containers[0].image}"
    asked = kubectl.run("-n", NAMESPACE, "get", ROLLOUTS[0], "--ignore-not-found", "-o", path, check=False)
    return asked.stdout


def wait(kubectl: Kubectl) -> None:
    """Until every agent and controller of the present image is ready. Raises `Failed` with what stands in the way."""
    for rollout in ROLLOUTS:
        try:
            kubectl.run("-n", NAMESPACE, "rollout", "status", rollout, f"--timeout={SECONDS}s")
        except CommandFailed as late:
            pods = kubectl.run("-n", NAMESPACE, "get", "pods", "-o", "wide", check=False)
            logs = kubectl.run("-n", NAMESPACE, "logs", rollout, "--all-containers", "--tail=10", check=False)
            raise Failed(
                f"{rollout} of podferry did not become ready", why=str(late), evidence=[*_lines(pods), *_lines(logs)]
            ) from late


def _lines(done: Completed) -> list[str]:
    return (done.stdout or done.stderr).splitlines()

"""kubectl, and waiting until a cluster can be used."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from podferry.errors import TimedOut
from podferry.lab.kubernetes import daemons
from podferry.node.process import PATH, Arg, Completed, run

READY_SECONDS = 120.0


class Kubectl:
    """kubectl on this machine, in the network of the lab's control plane: it reads this machine's files."""

    def __init__(self, pid: int, kubeconfig: Path) -> None:
        self._pid = pid
        self.kubeconfig = kubeconfig

    def command(self, arguments: Sequence[Arg]) -> list[Arg]:
        """The command line, for those who start it themselves with `environment`."""
        return self.beside([daemons.DIRECTORY / "kubectl", *arguments])

    def beside(self, argv: Sequence[Arg]) -> list[Arg]:
        """The command that runs a program of this machine where it reaches the API server."""
        return ["nsenter", f"--target={self._pid}", "--net", "--", *argv]

    def environment(self) -> dict[str, str]:
        """What it needs: the kubeconfig, and a PATH with kubectl and the plugins that were installed with podferry."""
        path = f"{Path(sys.executable).parent}:{daemons.DIRECTORY}:{PATH}"
        return {"KUBECONFIG": str(self.kubeconfig), "PATH": path}

    def run(
        self, *arguments: Arg, check: bool = True, input: str | None = None, timeout: float | None = None
    ) -> Completed:
        """Run it to its end, as `process.run` does; `timeout` in seconds."""
        return run(self.command(arguments), check=check, input=input, timeout=timeout, env=self.environment())

    def wait_until_ready(self, nodes: Sequence[str]) -> None:
        """Until every node is ready for pods, and pods may be made in the namespace `default`. Raises `TimedOut`."""
        deadline = time.monotonic() + READY_SECONDS
        while (asked := self.run("get", "--raw", "/readyz", check=False)).returncode:
            _give_up_after(deadline, "the API server is not ready", asked)
            time.sleep(0.1)
        timeout = f"--timeout={READY_SECONDS:.0f}s"
        for node in nodes:
            self.run("wait", "--for=create", timeout, f"node/{node}")
        self.run("wait", "--for=condition=Ready", timeout, *(f"node/{node}" for node in nodes))
        # A pod needs it, and the controller that makes it begins late.
        self.run("wait", "--for=create", timeout, "serviceaccount/default")


def _give_up_after(deadline: float, what: str, asked: Completed) -> None:
    if time.monotonic() > deadline:
        raise TimedOut(what, why=(asked.stderr.strip() or asked.stdout.strip())[-500:])

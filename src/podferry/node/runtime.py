"""A node's container runtime, as far as podferry asks it for the containers that a kubelet has it make.

One port; `podferry.node.containerd` and `podferry.node.crio` fulfil it. Whatever a runtime knows its containers by becomes a
`Container` here: an id, the OCI spec, and by which program and in which state directory runc was called.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from podferry.core.facts import RuntimeKind
from podferry.errors import Failed
from podferry.node.records import Container, PodContainer, Task


class ContainerNotFound(Failed):
    """The runtime knows no such container, or none that has processes."""

    code = "PF236"


class ContainerRuntime(Protocol):
    """What is asked of it."""

    kind: RuntimeKind

    def version(self) -> str:
        """Its version, such as `1.7.24`."""
        ...

    def pod(self, uid: str) -> Mapping[str, PodContainer]:
        """The containers of a pod by name, of each the latest attempt; its sandbox is not among them."""
        ...

    def holds_pod(self, uid: str) -> bool:
        """Whether anything of a pod is left here."""
        ...

    def container(self, id: str) -> Container:
        """A container that is there, or is being made. Raises `ContainerNotFound`."""
        ...

    def task(self, id: str) -> Task:
        """Its processes. Raises `ContainerNotFound` where it has none."""
        ...

    def wait_task(self, id: str, timeout: float | None = None) -> int:
        """Wait until a container's first process has ended and return its exit status (128 + N for signal N). Raises
        `TimedOut`."""
        ...

    def log(self, record: Container) -> Path | None:
        """The file that its output is written to, in the kubelet's format."""
        ...

    def upper(self, record: Container) -> Path:
        """The directory that takes a container's own changes. Raises `Refused` where it has none."""
        ...

    def root(self, record: Container) -> Path:
        """Where its root file system is mounted."""
        ...

    def runc_root(self, record: Container) -> Path:
        """The `--root` that runc is given for it."""
        ...

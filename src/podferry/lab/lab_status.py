"""A lab and its machines as they are now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A machine of a lab. `pid` is its first process as this machine counts, None where it is not `alive`."""

    name: str
    address: str
    pid: int | None
    cut: bool = False

    @property
    def alive(self) -> bool:
        """Whether the machine runs."""
        return self.pid is not None


@dataclass(frozen=True)
class LabStatus:
    """A lab as it is now. `link` is the rate of every node's link; `nodes` leaves out the storage node and `control`,

    which is there where the lab has Kubernetes.
    """

    name: str
    subnet: str
    link: str
    storage: Node
    nodes: tuple[Node, ...]
    control: Node | None = None

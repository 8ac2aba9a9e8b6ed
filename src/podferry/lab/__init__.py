"""The lab: a small cluster of podferry nodes on one Linux machine, for trying, testing and measuring."""

from __future__ import annotations

from podferry.lab.lab import Lab, LabStatus, Node, list_labs

__all__ = ["Lab", "LabStatus", "Node", "list_labs"]

"""The lab: a small cluster of podferry nodes on one Linux machine, for trying, testing and measuring."""

from __future__ import annotations

from podferry.lab.lab import Lab, list_labs
from podferry.lab.lab_status import LabStatus, Node
from podferry.lab.state import inside

__all__ = ["Lab", "LabStatus", "Node", "inside", "list_labs"]

"""Putting podferry on a node of a cluster, and taking it off again: the OCI runtime, containerd's drop-in, CRIU
and what holds back its dumps.

Needs nothing of the node but containerd and runc: no Python, no package manager. What is written is noted in a ledger on the node
before it is written, with what was there before, so that `uninstall` restores the node byte for byte.
"""

from __future__ import annotations

from podferry.install.node import Installed, install, uninstall

__all__ = ["Installed", "install", "uninstall"]

"""Kubernetes' own programs, which podferry does not bring along."""

from __future__ import annotations

import os
from pathlib import Path

from podferry.errors import Refused

DIRECTORY = Path(os.environ.get("PODFERRY_KUBE_BIN", "/opt/podferry/kube/bin"))
DAEMONS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl")


def directory() -> Path:
    """Where the programs are. Raises `Refused` with what to put where, if any is missing."""
    absent = missing()
    if absent:
        raise Refused(
            "this machine has no Kubernetes to run in the lab",
            why=f"{DIRECTORY} lacks {', '.join(absent)}",
            remedy=f"put {', '.join(DAEMONS)} of one Kubernetes release (1.34 or later, static, for this machine's "
            "architecture) there, or point PODFERRY_KUBE_BIN to where they are",
        )
    return DIRECTORY


def missing() -> list[str]:
    """The programs that are not there, or cannot be run."""
    return [name for name in DAEMONS if not os.access(DIRECTORY / name, os.X_OK)]

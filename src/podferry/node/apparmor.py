"""AppArmor where CRIU looks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from podferry.errors import PodferryError, Refused
from podferry.node.process import run

log = structlog.get_logger()
SYS, CRIU_FACTS = Path("/sys"), Path("/run/criu.kdat")


def show(sys: Path = SYS, criu_facts: Path = CRIU_FACTS) -> None:
    """Mount securityfs, in this mount namespace, where the kernel has AppArmor and nobody has mounted it: so it is in a pod.

    CRIU takes a machine without /sys/kernel/security/apparmor for one without AppArmor and keeps no profile (criu/lsm.c), so that
    a confined container would come back unconfined, which the target refuses. It remembers that, too.
    """
    enabled, mounted = sys / "module/apparmor/parameters/enabled", sys / "kernel/security"
    try:
        if enabled.read_text().strip() != "Y" or (mounted / "apparmor").exists():
            return
    except FileNotFoundError:  # a kernel without it
        return
    try:
        run(["mount", "-t", "securityfs", "securityfs", mounted])
        criu_facts.unlink(missing_ok=True)
    except (PodferryError, OSError) as error:
        log.warning("containers with an AppArmor profile cannot move: securityfs cannot be mounted", why=str(error))


def refusal(spec: Mapping[str, Any], name: str, node: str, sys: Path = SYS) -> Refused | None:
    """What stands against making a container of this spec on this node: it gets the profile that it had, and here must be one."""
    profile = (spec.get("process") or {}).get("apparmorProfile") or "unconfined"
    if profile == "unconfined" or profile in _loaded(sys / "kernel/security/apparmor/profiles"):
        return None
    return Refused(
        f"{node} has no AppArmor profile {str(profile)[:80]!r}, which confines {name}",
        why="it is not among those that the kernel has loaded there",
        remedy="load it there with apparmor_parser; a kubelet's node loads containerd's own with its first pod",
    )


def _loaded(profiles: Path) -> set[str]:
    try:
        return {line.rpartition(" (")[0] for line in profiles.read_text().splitlines()}
    except OSError:  # a kernel without AppArmor
        return set()

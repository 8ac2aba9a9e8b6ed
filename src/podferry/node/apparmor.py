"""AppArmor where CRIU looks for it."""

from __future__ import annotations

from pathlib import Path

import structlog

from podferry.errors import PodferryError
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

"""The agent's own limit of memory, in a cluster: what its manifest says in AGENT_MEMORY.

The manifest cannot use `resources.limits.memory`: what an agent receives of a job lies on a tmpfs, and the kernel charges that to
whoever has written it. A container with a limit would be killed by the first job that is larger. So the agent limits what it has
for itself (RLIMIT_DATA: heaps, stacks and private mappings); beyond that one migration fails with `MemoryError`, and the others
go on. What outlives the agent, CRIU above all, is started without this limit (`podferry.node.outside`).
"""

from __future__ import annotations

import resource
import threading

from podferry.errors import UsageError
from podferry.kube.quantities import quantity

VARIABLE = "AGENT_MEMORY"
STACK = 1 << 20
"""Bytes of a thread's stack: all of it counts, used or not, and there may be more than a hundred threads."""
LEAST = 512 << 20


def limit(memory: str) -> None:
    """Have no more than `memory` (a quantity, as `2Gi`) from now on; nothing where it is empty. Raises `UsageError`."""
    if not memory:
        return
    try:
        most = int(quantity(memory))
    except (ValueError, LookupError, OverflowError):
        most = 0
    if most < LEAST:
        raise UsageError(
            f"{VARIABLE} is {memory!r}", remedy=f"set it to a quantity of bytes of {LEAST >> 20}Mi or more, such as 2Gi"
        )
    threading.stack_size(STACK)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))

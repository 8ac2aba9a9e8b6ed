"""The connections that a workload has, with what a move makes of each."""

from __future__ import annotations

from collections.abc import Iterable

from podferry.core.connections import Backends, OpenConnection, judge, nobody
from podferry.node.conntrack import Translations
from podferry.node.sockets import kernel_sockets


def open_connections(pid: int, pids: Iterable[int], moved: Backends = nobody) -> tuple[OpenConnection, ...]:
    """Those of the processes `pids`, in the network namespace of `pid`: the ones that a move costs come first. What ends or
    vanishes meanwhile is left out. `moved` knows the other ends that have moved."""
    return judge(kernel_sockets(pid, tuple(pids)), Translations(pid).backend, moved)

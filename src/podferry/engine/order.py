"""What a migration is asked to do, and within which bounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from podferry.core.precopy import PreCopyPolicy
from podferry.model import Connections, Mode


@dataclass(frozen=True)
class Order:
    """What was asked for. `timeout` is in seconds and covers everything up to the point of no return; `bandwidth` caps
    what the data may use of the link, in bytes a second; `max_freeze` says for how many seconds the job may stand still before the
    point of no return, where it is not what `podferry.engine.standstill` makes of mode and policy. `connections` says what becomes
    of those whose other end stays: who proposes the job holds it to that."""

    mode: Mode = Mode.STOP
    timeout: float = 3600.0
    bandwidth: float | None = None
    max_freeze: float | None = None
    policy: PreCopyPolicy = field(default_factory=PreCopyPolicy)
    connections: Connections = Connections.CLOSE

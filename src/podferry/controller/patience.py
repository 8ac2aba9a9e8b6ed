"""How patient the controller is, and how much it does at once."""

from __future__ import annotations

from dataclasses import dataclass

from podferry.controller.node_trouble import TRIGGERS, Trigger
from podferry.core.turns import Limits

DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class ControllerSettings:
    """How patient the controller is, in seconds: for the scheduler, for an agent to take an order up, for a target pod
    whose kubelet has warned, for a resumed pod to be called ready, for an owner to let the source go, for the source's
    agent after the hand-over, for pods to be gone. `image` is what placeholders run, `limits` how many moves may be under way at
    once, `workers` how many Migrations are looked at at once, `triggers` what says of a node that it goes away, `movability` how
    often each pod that opted in is looked at."""

    image: str = "podferry"
    scheduling: float = 120.0
    silence: float = 60.0
    starting: float = 30.0
    readiness: float = 30.0
    release: float = 30.0
    farewell: float = 60.0
    removal: float = 30.0
    limits: Limits = DEFAULT_LIMITS
    workers: int = 4
    triggers: tuple[Trigger, ...] = TRIGGERS
    movability: float = 600.0

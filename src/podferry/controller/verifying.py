"""`spec.verify`: does the job on the target do what its Migration says that it must? The target's kubelet asks, by a startup probe.

Asked between the resume and the hand-over. It cannot take the move back: the job has run on the target, and whatever it has done
there would be done again if its frozen original went on. So it decides what the move is called, and nobody is told that all is well
who has no reason to think so.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from podferry.controller import failures
from podferry.controller.eligibility import PodUnfit, containers, unfit
from podferry.kube.migration import RESUMED, Ending, Migration
from podferry.kube.quantities import seconds
from podferry.kube.verify import Verify
from podferry.model import Outcome

Json = dict[str, Any]

PASSED, NOT_VERIFIED = "Passed", "NotVerified"


@dataclass(frozen=True)
class Verification:
    """Whether it holds, and why in words."""

    holds: bool
    words: str

    @property
    def reason(self) -> str:
        """The word for programs."""
        return PASSED if self.holds else NOT_VERIFIED


def container_of(pod: Json, verify: Verify) -> str:
    """The name of the container that is asked."""
    return verify.container or str(pod["spec"]["containers"][0]["name"])


def misfits(pod: Json, verify: Verify | None) -> Iterator[PodUnfit]:
    """What is wrong with what is to be asked."""
    there = [one["name"] for one in containers(pod)]
    if verify is not None and container_of(pod, verify) not in there:
        yield unfit(
            "VerifyInvalid",
            f"the pod has no container {verify.container} that moves",
            why=f"it has {', '.join(there)}",
            remedy="name one of these in spec.verify.container",
        )


def probed(container: Json, pod: Json, verify: Verify | None) -> None:
    """Have the kubelet ask the container of the target pod, where it is the one."""
    if verify is not None and container["name"] == container_of(pod, verify):
        container["startupProbe"] = verify.probe()


def verdict(migration: Migration, target: Json, warnings: list[Json], now: datetime.datetime) -> Verification | None:
    """What the kubelet has found; None while it asks. `warnings` are the events about the pod."""
    verify = migration.spec.verify
    resumed = migration.status.condition(RESUMED)
    if verify is None or resumed is None:
        return Verification(holds=True, words="nothing was asked")
    name, status = container_of(target, verify), target.get("status") or {}
    states = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    state: Json = next((one for one in states if one["name"] == name), {})
    if int(state.get("restartCount") or 0) or "terminated" in (state.get("state") or {}):
        return Verification(holds=False, words=f"container {name} has ended since it was resumed")
    if state.get("started"):
        return Verification(holds=True, words=f"container {name} has answered on {migration.status.target_node}")
    if failures.age(resumed.last_transition_time, now) < seconds(verify.timeout):
        return None
    told = [
        one for one in warnings if one.get("reason") == "Unhealthy" and str(one.get("note", "")).startswith("Startup")
    ]
    last: Json = max(
        told, key=lambda one: str(one.get("deprecatedLastTimestamp") or one.get("eventTime") or ""), default={}
    )
    why = f": {last['note']}" if last else ""
    return Verification(
        holds=False, words=f"container {name} has not answered within {verify.timeout} of its resume{why}"
    )


def ending(migration: Migration, words: str) -> Ending:
    """How the move ends that is not verified: it has been made all the same."""
    return failures.ending(
        Outcome.FAILED,
        NOT_VERIFIED,
        f"the job runs on {migration.status.target_node} and cannot go back, but spec.verify does not hold: {words}",
        remedy="look at the pod; what it did since its resume is done. Its owner makes a new one where you delete it",
    )

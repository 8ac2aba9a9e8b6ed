"""The next step of a node's drain: the pods to move now, to evict and to leave, and whether the drain has ended. Pure.

A pod that can move is moved, and tried again a bounded number of times where a move fails. One that cannot move, or whose moves
failed, stays where it is, unless the drain is told to evict such pods. Pods of DaemonSets and static pods belong to the node and
do not count, as with `kubectl drain --ignore-daemonsets`; neither do pods that have ended. One that is being deleted is waited for.

Without a deadline the pod that has computed longest goes first. With one those go first that save most computed work until then
(`podferry.core.saving`); the others are told that they may be too late, and moved all the same while there is time: what a move
takes is an estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from statistics import mean

from podferry.core.saving import SavableJob, saved

ATTEMPTS = 3
"""Migrations of one pod before a drain leaves the pod. A refusal counts like a failure: what refused it may have ended since."""


class DrainPhase(StrEnum):
    """The progress of a drain; the values are part of the API."""

    DRAINING = "Draining"
    STOPPED = "Stopped"
    COMPLETED = "Completed"
    INCOMPLETE = "Incomplete"


DRAIN_ENDS = frozenset({DrainPhase.COMPLETED, DrainPhase.INCOMPLETE})


class PodState(StrEnum):
    """The action of a drain on a pod; the values are part of the API."""

    WAITING = "Waiting"
    MOVING = "Moving"
    MOVED = "Moved"
    EVICTING = "Evicting"
    GONE = "Gone"
    LEFT = "Left"


@dataclass(frozen=True)
class DrainedPod:
    """A pod on the node. `obstacle` says why it cannot move, empty where it can.

    `moving` is whether a Migration of it is under way; `settling` what happens to it anyhow, so that there is nothing to do now.
    `attempts` counts the drain's Migrations of it that ended without moving it, `failure` says how the last one did. `started` is
    an RFC 3339 time: the earlier, the more computed work the pod holds. `work` is that work, in seconds of a processor.
    `seconds` is how long its move will take, or, of one under way, how long it still will; None where nothing tells.
    """

    uid: str
    started: str = ""
    priority: int = 0
    obstacle: str = ""
    moving: bool = False
    settling: str = ""
    attempts: int = 0
    failure: str = ""
    work: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class DrainPlan:
    """The next actions: the uids of the pods to move and to evict, in this order; the state of each pod with the reason; how far
    the drain is then; and the pods that may be too late for its deadline."""

    move: tuple[str, ...]
    evict: tuple[str, ...]
    states: dict[str, tuple[PodState, str]]
    phase: DrainPhase
    late: frozenset[str] = frozenset()


def plan(
    pods: Iterable[DrainedPod],
    *,
    parallel: int,
    evict_others: bool = False,
    stopped: bool = False,
    left: float | None = None,
) -> DrainPlan:
    """The next step. `parallel` is how many moves of `pods` are asked for at once; when they begin, the queue of all Migrations
    decides (`podferry.core.turns`). `left` are the seconds until the node goes away, None where it does not.

    >>> plan([DrainedPod("a"), DrainedPod("b", obstacle="hostPath")], parallel=2).move
    ('a',)
    """
    ordered = sorted(pods, key=lambda one: (-one.priority, one.started or "9", one.uid))
    states: dict[str, tuple[PodState, str]] = {}
    evict: list[str] = []
    ready: list[DrainedPod] = []
    for pod in ordered:
        why = pod.obstacle or (f"{pod.attempts} moves failed, the last: {pod.failure}" * (pod.attempts >= ATTEMPTS))
        if pod.moving:
            states[pod.uid] = PodState.MOVING, ""
        elif pod.settling:
            states[pod.uid] = PodState.WAITING, pod.settling
        elif not why:
            ready.append(pod)
            states[pod.uid] = PodState.WAITING, pod.failure and f"the last move failed: {pod.failure}"
        elif evict_others:
            states[pod.uid] = PodState.EVICTING, why
            evict.append(pod.uid)
        else:
            states[pod.uid] = PodState.LEFT, why
    moving = [one for one in ordered if states[one.uid][0] is PodState.MOVING]
    late: frozenset[str] = frozenset()
    if left is not None:
        ready, late = _by_deadline(ready, moving, parallel, left)
        for uid in late:
            states[uid] = PodState.WAITING, f"it may be too late: the node goes away in {max(0.0, left):.0f} s"
    room = 0 if stopped else max(0, parallel - len(moving))
    return DrainPlan(
        tuple(pod.uid for pod in ready[:room]),
        () if stopped else tuple(evict),
        states,
        _phase(states, stopped=stopped),
        late,
    )


def _by_deadline(
    ready: list[DrainedPod], moving: list[DrainedPod], parallel: int, left: float
) -> tuple[list[DrainedPod], frozenset[str]]:
    """Those that can move, in the order that saves most until the deadline, and which of them may be too late. A higher priority
    goes before all work of a lower one. Where nothing tells how long a move takes, it is taken for a middling one.
    """
    known = [one.seconds for one in (*ready, *moving) if one.seconds is not None]
    if not known:
        return ready, frozenset()
    middling = mean(known)
    busy = sorted(middling if one.seconds is None else one.seconds for one in moving)[-parallel:]
    busy += [0.0] * (parallel - len(busy))
    first: list[DrainedPod] = []
    for _, alike in groupby(ready, key=lambda one: one.priority):
        of = {one.uid: one for one in alike}
        jobs = [SavableJob(one.uid, one.work, middling if one.seconds is None else one.seconds) for one in of.values()]
        for job in saved(jobs, left, busy):
            first.append(of[job.uid])
            busy[busy.index(min(busy))] += job.seconds
    chosen = {one.uid for one in first}
    rest = [one for one in ready if one.uid not in chosen]
    return first + rest, frozenset(one.uid for one in rest)


def _phase(states: dict[str, tuple[PodState, str]], *, stopped: bool) -> DrainPhase:
    kinds = {state for state, _ in states.values()}
    if not kinds:
        return DrainPhase.COMPLETED
    if kinds == {PodState.LEFT}:
        return DrainPhase.INCOMPLETE
    return DrainPhase.STOPPED if stopped and PodState.MOVING not in kinds else DrainPhase.DRAINING

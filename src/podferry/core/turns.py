"""The queue of Migrations: which of those waiting may begin now, within the limits, and the reason why each other waits. Pure.

The limits are on moves under way at once: in the cluster, in a namespace, out of a node and into one. What leaves a node that goes
away is urgent and comes before all others. Else turns are fair between namespaces: the next place goes to the one that has the
fewest moves under way, and within a namespace to the Migration that was asked for first. One that cannot begin (its node has its
moves already) is passed over and keeps its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Moves that may be under way at once; 0 is no limit. Those of the cluster and out of a node are KubeVirt's defaults
    (`parallelMigrationsPerCluster`, `parallelOutboundMigrationsPerNode`). As many go into a node, whose memory and disk they take.
    A namespace may have all that the cluster has while nobody else asks."""

    cluster: int = 5
    namespace: int = 0
    outbound: int = 2
    inbound: int = 2


@dataclass(frozen=True)
class Group:
    """Moves that have limits of their own, beside those of all: in the cluster and out of each node; 0 is no limit."""

    name: str
    cluster: int = 0
    outbound: int = 0


@dataclass(frozen=True)
class Move:
    """A Migration that is under way or waits: from node `source` to `target` (empty where the scheduler has not chosen yet).
    `created` is an RFC 3339 time; one that is `urgent` goes before all that are not; `group` is what limits it beside all others:
    of one that waits, as it is now."""

    uid: str
    namespace: str
    source: str
    target: str = ""
    created: str = ""
    group: Group | None = None
    urgent: bool = False


@dataclass(frozen=True)
class Wait:
    """Why a Migration waits: the reason of its condition, and a sentence."""

    reason: str
    message: str


Outbound = Callable[[str], int]
"""The limit out of a node of this name."""


def next_turns(
    waiting: Iterable[Move], under_way: Iterable[Move], limits: Limits, outbound: Outbound | None = None
) -> Iterator[Move]:
    """Those of `waiting` that may begin now, in the order of their turns.

    >>> [one.uid for one in next_turns([Move("a", "x", "n"), Move("b", "x", "n"), Move("c", "x", "n")], [], Limits())]
    ['a', 'b']
    """
    left, taken = list(waiting), list(under_way)
    while fitting := [one for one in left if wait(one, taken, limits, outbound) is None]:
        chosen = min(fitting, key=lambda one: (not one.urgent, _count(taken, one), one.created or "9", one.uid))
        yield chosen
        left.remove(chosen)
        taken.append(chosen)


def wait(move: Move, under_way: Collection[Move], limits: Limits, outbound: Outbound | None = None) -> Wait | None:
    """The limit that keeps `move` from beginning beside those under way; None where it may begin."""
    out = limits.outbound if outbound is None else outbound(move.source)
    counted: tuple[tuple[str, str, int, int], ...] = (
        ("ClusterBusy", "the cluster", limits.cluster, len(under_way)),
        ("NamespaceBusy", f"namespace {move.namespace}", limits.namespace, _count(under_way, move)),
        ("SourceNodeBusy", f"node {move.source}", out, sum(one.source == move.source for one in under_way)),
        ("TargetNodeBusy", f"node {move.target}", limits.inbound if move.target else 0, _into(under_way, move.target)),
    )
    if move.group is not None:
        alike = [one for one in under_way if one.group is not None and one.group.name == move.group.name]
        from_here, policy = sum(one.source == move.source for one in alike), f"policy {move.group.name}"
        counted += (
            ("PolicyBusy", policy, move.group.cluster, len(alike)),
            ("PolicyBusy", f"{policy} on node {move.source}", move.group.outbound, from_here),
        )
    directions = {"SourceNodeBusy": " out", "TargetNodeBusy": " in"}
    for reason, where, limit, busy in counted:
        if limit and busy >= limit:
            return Wait(
                reason, f"{where} has {busy} moves{directions.get(reason, '')} under way, and may have {limit} at once"
            )
    return None


def _count(moves: Iterable[Move], like: Move) -> int:
    return sum(one.namespace == like.namespace for one in moves)


def _into(moves: Iterable[Move], node: str) -> int:
    return sum(one.target == node for one in moves)

"""The queue of Migrations: those that may begin and wait for their turn, on top of what the cache knows to be under way.

What waits is known in memory alone. A controller that starts anew looks at each pending Migration once, and knows it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from podferry.core.migration import MIGRATION_ENDS, MigrationPhase
from podferry.core.turns import Group, Limits, Move, Wait, next_turns, wait
from podferry.kube.client import Json
from podferry.kube.migration import Migration

Key = tuple[str, str]

BEGUN = frozenset(str(one) for one in MigrationPhase if one not in MIGRATION_ENDS and one is not MigrationPhase.PENDING)


class Turns:
    """Gives out the places. Nothing here waits or asks the API server, so a place is never given twice."""

    def __init__(
        self, migrations: Callable[[], Iterable[Json]], drains: Callable[[], Iterable[Json]], limits: Limits
    ) -> None:
        """`migrations` and `drains`: all that there are, as they were last seen or written."""
        self._migrations, self._drains, self._limits = migrations, drains, limits
        self._waiting: dict[str, tuple[Move, Key]] = {}
        self._given: dict[str, Move] = {}
        """Places that were given, until the Migration's phase shows it."""
        self._chosen: dict[str, Move] = {}
        """Target nodes that were taken, until the Migration's status shows it."""

    def take(self, migration: Migration, source: str, group: Group | None = None) -> Wait | None:
        """A place for a Migration that may begin, out of node `source`; or what it waits for. Its turn is remembered. `group` is
        what its policy allows.
        """
        if migration.uid in self._given:
            return None
        move = Move(
            migration.uid,
            migration.namespace,
            source,
            migration.spec.target_node or "",
            str(migration.metadata.get("creationTimestamp", "")),
            group,
            urgent=self._urgent(migration),
        )
        self._waiting[migration.uid] = move, (migration.namespace, migration.name)
        if any(one.uid == move.uid for one in self._next()):
            del self._waiting[move.uid]
            self._given[move.uid] = move
            return None
        ahead = (
            "moves off nodes that go away, that were asked for earlier, or by namespaces with fewer moves, come first"
        )
        return wait(move, self._under_way(), self._limits, self._outbound) or Wait("NotItsTurn", ahead)

    def enter(self, migration: Migration, node: str) -> Wait | None:
        """Whether the Migration, which has a place, may go into the node that the scheduler chose for it."""
        source, created = migration.status.source_node or "", str(migration.metadata.get("creationTimestamp", ""))
        move = Move(migration.uid, migration.namespace, source, node, created)
        others = [one for one in self._under_way() if one.uid != move.uid]
        found = wait(move, others, Limits(0, 0, 0, self._limits.inbound))
        if found is None:
            self._chosen[move.uid] = move
        return found

    def leave(self, uid: str) -> None:
        """The Migration neither waits nor needs a place that was given to it."""
        for known in (self._waiting, self._given, self._chosen):
            known.pop(uid, None)

    def see(self, body: Json) -> None:
        """A Migration as it is now: what its status shows need not be remembered, and what has ended waits for nothing."""
        status = body.get("status") or {}
        phase, uid = str(status.get("phase") or MigrationPhase.PENDING), body["metadata"]["uid"]
        if phase != MigrationPhase.PENDING:
            self._waiting.pop(uid, None)
            self._given.pop(uid, None)
        if status.get("targetNode") or phase not in BEGUN | {str(MigrationPhase.PENDING)}:
            self._chosen.pop(uid, None)

    def due(self) -> list[Key]:
        """Those that wait and whose turn has come."""
        return [self._waiting[one.uid][1] for one in self._next()]

    def all_waiting(self) -> list[Key]:
        """All that wait, whether their turn has come or not."""
        return [key for _, key in self._waiting.values()]

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def under_way(self) -> int:
        """How many have begun and not ended."""
        return len(self._under_way())

    def _next(self) -> Iterator[Move]:
        waiting = [move for move, _ in self._waiting.values()]
        return next_turns(waiting, self._under_way(), self._limits, self._outbound)

    def _under_way(self) -> list[Move]:
        found = dict(self._given)
        for body in self._migrations():
            about, status = body["metadata"], body.get("status") or {}
            if status.get("phase") in BEGUN:
                nodes = status.get("sourceNode") or "", status.get("targetNode") or ""
                policy = (status.get("settings") or {}).get("policy") or ""
                of = Group(policy) if policy else None
                found[about["uid"]] = Move(about["uid"], about["namespace"], *nodes, group=of)
        return [*({**found, **self._chosen}).values()]

    def _urgent(self, migration: Migration) -> bool:
        """Whether a drain with a deadline asked for it."""
        owners = {one["uid"] for one in migration.metadata.get("ownerReferences") or []}
        return any(
            one["metadata"]["uid"] in owners and (one.get("spec") or {}).get("deadline") for one in self._drains()
        )

    def _outbound(self, node: str) -> int:
        """Whoever drains a node says how many moves may leave it at once."""
        for one in self._drains():
            if one["metadata"]["name"] == node and "completionTime" not in (one.get("status") or {}):
                return int((one.get("spec") or {}).get("parallel") or self._limits.outbound)
        return self._limits.outbound

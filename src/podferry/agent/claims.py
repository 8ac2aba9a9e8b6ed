"""May a peer's offer of a pod be taken? The Migration object answers, and is marked so that it answers yes once."""

from __future__ import annotations

from collections.abc import Iterator

from podferry.core.migration import MigrationPhase
from podferry.core.phases import TargetPhase
from podferry.errors import Refused
from podferry.kube import status as store
from podferry.kube.migration import EnginePhases, Migration
from podferry.model import Mode
from podferry.workload.pod.cluster_port import PodName


def is_decided(migration: Migration) -> bool:
    """Whether waiting for a later state of the Migration could change nothing: it runs, or never will."""
    return (
        migration.ended
        or migration.status.abort is not None
        or migration.status.phase in (MigrationPhase.RUNNING, MigrationPhase.UNDOING)
    )


def demand_claimable(migration: Migration, *, node: str, peer: str, pod: PodName, mode: Mode) -> None:
    """Raise `Refused`, with every reason, unless `migration` lets `peer` offer `pod` to `node` now."""
    if reasons := list(_against(migration, node, peer, pod, mode)):
        raise Refused(
            f"the Migration {migration.namespace}/{migration.name} does not let {peer} offer {pod} to {node}",
            why="; ".join(reasons),
            remedy="create a new Migration of the pod",
        )


def _against(migration: Migration, node: str, peer: str, pod: PodName, mode: Mode) -> Iterator[str]:
    status = migration.status
    if status.target_node != node:
        yield f"its target is {status.target_node or 'not chosen yet'}"
    if status.source_node != peer:
        yield f"its source is {status.source_node or 'not known yet'}"
    elif status.source_address is None:
        yield f"the cluster has no node {peer}, or none with an address"
    source = status.source_pod
    if source is None or (migration.namespace, source.name, source.uid) != (pod.namespace, pod.name, pod.uid):
        of = f"{migration.namespace}/{source.name} with uid {source.uid}" if source else "none yet"
        yield f"its pod is {of}, the offered one has uid {pod.uid}"
    if Mode(migration.settings.mode) is not mode:
        yield f"its mode is {migration.settings.mode}, not {mode}"
    if status.phase is not MigrationPhase.RUNNING or status.abort is not None or migration.ended:
        yield f"it is {'being undone' if status.abort is not None else status.phase}, not Running"
    if status.engine is not None and status.engine.target:
        yield f"its one offer was made already: the target is in phase {status.engine.target}"


def claim(*, node: str, peer: str, pod: PodName, mode: Mode) -> store.Change:
    """The change of a Migration's status that uses up its one offer. Raises `Refused` where the newest state speaks against it."""

    def claimed(now: Migration) -> bool:
        demand_claimable(now, node=node, peer=peer, pod=pod, mode=mode)
        now.status.engine = now.status.engine or EnginePhases()
        now.status.engine.target = str(TargetPhase.RECEIVE)
        return True

    return claimed

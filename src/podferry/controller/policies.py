"""Which MigrationPolicy applies to a pod, and what it makes of a wish to move the pod."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from podferry.controller.eligibility import PodUnfit, unfit
from podferry.controller.surroundings import Readable
from podferry.core.turns import Group
from podferry.kube.api_errors import Forbidden, NotServed
from podferry.kube.client import MIGRATION_POLICIES, NAMESPACES
from podferry.kube.migration import MigrationSpec
from podferry.kube.policy import MigrationPolicy, MigrationPolicySpec, PodWish, PolicyUnreadable
from podferry.kube.quantities import quantity, seconds
from podferry.kube.settings import DEFAULT_TIMEOUT, MoveSettings
from podferry.model import Connections, Mode

Json = dict[str, Any]
Labels = dict[str, str]


@dataclass(frozen=True)
class AppliedPolicy:
    """The policy that applies to a pod; `name` is empty where none does, or where policies may not be read (`hidden`)."""

    name: str = ""
    spec: MigrationPolicySpec = field(default_factory=MigrationPolicySpec)
    hidden: bool = False

    def heeds(self, wish: PodWish) -> bool:
        """Whether the pod's own annotation counts."""
        return wish in self.spec.pod_annotations


class Policies:
    """Reads the policies; decides by `most_specific`."""

    def __init__(self, api: Readable) -> None:
        self._api = api
        self._log = structlog.get_logger()

    async def of(self, pod: Json) -> AppliedPolicy:
        """The policy that applies to the pod."""
        try:
            found = (await self._api.list(MIGRATION_POLICIES))[0]
            policies = list(self._read(found))
            if not policies:
                return AppliedPolicy()
            namespace = await self._namespace(pod, policies)
        except (
            Forbidden,
            NotServed,
        ):  # who may read one namespace; a cluster that was installed by an earlier podferry
            return AppliedPolicy(hidden=True)
        chosen = most_specific(policies, namespace, pod["metadata"].get("labels") or {})
        return AppliedPolicy() if chosen is None else AppliedPolicy(chosen.name, chosen.spec)

    async def _namespace(self, pod: Json, policies: list[MigrationPolicy]) -> Labels:
        if all(one.spec.namespace_selector is None for one in policies):
            return {}
        found = await self._api.find(NAMESPACES, pod["metadata"]["namespace"])
        return dict(((found or {}).get("metadata") or {}).get("labels") or {})

    def _read(self, bodies: Iterable[Json]) -> Iterator[MigrationPolicy]:
        for body in bodies:
            try:
                yield MigrationPolicy.from_json(body)
            except PolicyUnreadable as wrong:
                self._log.error("a MigrationPolicy is skipped", error=str(wrong), why=wrong.why)


def most_specific(policies: Iterable[MigrationPolicy], namespace: Labels, pod: Labels) -> MigrationPolicy | None:
    """Of the policies that select a pod with these labels, in a namespace with these: the one with most requirements; of several
    the one with more on the pod; of several still, the first by name (KubeVirt's order of its MigrationPolicies).
    """

    def selects(one: MigrationPolicy) -> bool:
        of_namespace, of_pod = one.spec.namespace_selector, one.spec.pod_selector
        return (of_namespace is None or of_namespace.matches(namespace)) and (of_pod is None or of_pod.matches(pod))

    def rank(one: MigrationPolicy) -> tuple[int, int, str]:
        of_pod = len(one.spec.pod_selector or ())
        return -(of_pod + len(one.spec.namespace_selector or ())), -of_pod, one.name

    return min(filter(selects, policies), key=rank, default=None)


def settle(asked: MigrationSpec, policy: AppliedPolicy) -> MoveSettings | PodUnfit:
    """How the move is done that is `asked` for; or what the policy has against it. What is not asked is as the policy says; figures
    beyond the policy's are brought down to them.
    """
    spec = policy.spec
    if against := next(_against(asked, policy), None):
        return against
    modes = spec.modes or [Mode.LIVE]
    mode = asked.mode or next((one for one in modes if _possible(one, spec)), modes[0])
    bandwidth = _least(quantity, asked.bandwidth, spec.bandwidth, _share(spec))
    return MoveSettings(
        policy=policy.name,
        mode=mode,
        allow_post_copy=_chosen(asked.allow_post_copy, spec.allow_post_copy),
        allow_auto_converge=_chosen(asked.allow_auto_converge, spec.allow_auto_converge),
        connections=asked.connections or spec.connections or Connections.CLOSE,
        max_downtime=_least(seconds, asked.max_downtime, spec.max_downtime),
        max_freeze=_least(seconds, asked.max_freeze, spec.max_freeze),
        timeout=_least(seconds, asked.timeout, spec.timeout) or DEFAULT_TIMEOUT,
        bandwidth=bandwidth,
        ttl_seconds_after_finished=spec.ttl_seconds_after_finished,
    )


def known(settled: MoveSettings | PodUnfit, policy: AppliedPolicy) -> MoveSettings:
    """What a Migration's status says: of one that is refused, too, by which policy, and how long it stays."""
    if isinstance(settled, MoveSettings):
        return settled
    return MoveSettings(policy=policy.name, ttl_seconds_after_finished=policy.spec.ttl_seconds_after_finished)


def group(policy: AppliedPolicy) -> Group | None:
    """The policy's limits, for the queue."""
    if not policy.name:
        return None
    return Group(policy.name, policy.spec.parallel or 0, policy.spec.parallel_per_node or 0)


def forbids(policy: AppliedPolicy) -> PodUnfit | None:
    """Whether the policy lets its pods move at all."""
    if policy.spec.movable:
        return None
    return _refusal(
        policy, "does not let this pod move", "movable: false", "ask whoever owns the cluster, or move none of its pods"
    )


def _against(asked: MigrationSpec, policy: AppliedPolicy) -> Iterator[PodUnfit]:
    spec = policy.spec
    if (no := forbids(policy)) is not None:
        yield no
    if asked.mode is not None and spec.modes and asked.mode not in spec.modes:
        allowed = ", ".join(spec.modes)
        yield _refusal(
            policy, f"does not allow mode {asked.mode}", f"modes: {allowed}", f"mode {spec.modes[0]}, or none"
        )
    if spec.allow_post_copy is False and (asked.allow_post_copy or asked.mode is Mode.POSTCOPY):
        yield _refusal(
            policy, "does not allow post-copy", "allowPostCopy: false", "ask for mode live without allowPostCopy"
        )
    if spec.allow_auto_converge is False and asked.allow_auto_converge:
        yield _refusal(
            policy,
            "does not let a migration slow the job down",
            "allowAutoConverge: false",
            "ask without allowAutoConverge",
        )


def _possible(mode: Mode, spec: MigrationPolicySpec) -> bool:
    return mode is not Mode.POSTCOPY or spec.allow_post_copy is not False


def _refusal(policy: AppliedPolicy, what: str, why: str, remedy: str) -> PodUnfit:
    return unfit("ForbiddenByPolicy", f"MigrationPolicy {policy.name} {what}", why=why, remedy=remedy)


def _chosen(asked: bool | None, policy: bool | None) -> bool:
    return bool(policy if asked is None else asked)


def _share(spec: MigrationPolicySpec) -> str | None:
    """One move's part of what a node's moves may use together."""
    if spec.bandwidth_per_node is None:
        return None
    return str(max(1, int(quantity(spec.bandwidth_per_node) / (spec.parallel_per_node or 1))))


def _least(value: Callable[[str], float], *several: str | None) -> str | None:
    """The smallest of those that are given."""
    return min((one for one in several if one is not None), key=value, default=None)

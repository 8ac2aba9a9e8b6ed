"""The MigrationPolicy object as typed classes: what the owner of a cluster says of the moves of some pods.

Names follow KubeVirt's MigrationPolicy where it has them. Its CRD and its part of docs/api.md are generated (`scripts/crds`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, ValidationError

from podferry.errors import Failed
from podferry.kube.migration import API_VERSION
from podferry.kube.objects import DURATION, QUANTITY, ObjectPart, rule
from podferry.model import Connections, Mode

LARGEST = 1000
"""Requirements of a selector, and moves that a limit may allow."""


class PolicyUnreadable(Failed):
    """A MigrationPolicy that does not keep its own schema."""

    code = "PF290"


class Operator(StrEnum):
    """How a selector's requirement compares."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class PodWish(StrEnum):
    """What a pod's annotations may say of its moves."""

    PRIORITY = "priority"
    EVICTION_DEADLINE = "eviction-deadline"


class Requirement(ObjectPart):
    """One requirement of a selector."""

    key: Annotated[str, Field(description="The label.", min_length=1, max_length=317)]
    operator: Annotated[Operator, Field(description="How its value compares.")]
    values: Annotated[
        list[str],
        Field(
            description="What it is compared with, by In and NotIn.",
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = Field(default_factory=list)

    def matches(self, labels: dict[str, str]) -> bool:
        """As the API server's selectors do (metav1.LabelSelectorRequirement)."""
        found = labels.get(self.key)
        match self.operator:
            case Operator.IN:
                return found is not None and found in self.values
            case Operator.NOT_IN:
                return found is None or found not in self.values
            case Operator.EXISTS:
                return found is not None
            case Operator.DOES_NOT_EXIST:
                return found is None


class LabelSelector(ObjectPart):
    """Labels that something must have; an empty one selects everything."""

    match_labels: Annotated[dict[str, str], Field(description="Labels and their values.")] = Field(default_factory=dict)
    match_expressions: Annotated[
        list[Requirement],
        Field(
            description="More requirements, all of which must hold.",
            max_length=LARGEST,
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = Field(default_factory=list)

    def matches(self, labels: dict[str, str]) -> bool:
        """Whether what has these labels is selected."""
        return self.match_labels.items() <= labels.items() and all(
            one.matches(labels) for one in self.match_expressions
        )

    def __len__(self) -> int:
        """How many requirements it has."""
        return len(self.match_labels) + len(self.match_expressions)


class MigrationPolicySpec(ObjectPart):
    """Which pods it is about, and what it says of their moves. What it does not say is as without it."""

    namespace_selector: Annotated[
        LabelSelector | None, Field(description="Labels of the pods' namespaces; without it those of every namespace.")
    ] = None
    pod_selector: Annotated[
        LabelSelector | None, Field(description="Labels of the pods; without it all of these namespaces.")
    ] = None
    movable: Annotated[
        bool, Field(description="Whether the pods may move at all. A Migration of one that may not is refused.")
    ] = True
    modes: Annotated[
        list[Mode],
        Field(
            description="The modes that a Migration may ask for; the first is used where it asks for none. Empty: every mode, "
            "live first.",
            max_length=3,
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ] = Field(default_factory=list)
    allow_post_copy: Annotated[
        bool | None,
        Field(
            description="true: live migrations fall to post-copy unless they say that they must not; false: one that asks for it, "
            "and mode postcopy, is refused. Without it as the Migration says."
        ),
    ] = None
    allow_auto_converge: Annotated[
        bool | None,
        Field(
            description="true: live migrations may slow the job down unless they say that they must not; false: one that asks "
            "for it is refused. Without it as the Migration says."
        ),
    ] = None
    connections: Annotated[
        Connections | None,
        Field(
            description="What holds where a Migration does not say what it may do to connections. Without it: Close."
        ),
    ] = None
    max_downtime: Annotated[
        str | None,
        Field(
            description="The downtime budget: what holds where a Migration says nothing, and the most that it may ask for; more "
            "is brought down to it. So are maxFreeze, timeout and bandwidth.",
            pattern=DURATION,
        ),
    ] = None
    max_freeze: Annotated[
        str | None, Field(description="The longest that a job may stand still on the source.", pattern=DURATION)
    ] = None
    timeout: Annotated[str | None, Field(description="The longest that a move may take.", pattern=DURATION)] = None
    bandwidth: Annotated[
        str | None, Field(description="Bytes a second that one move may use of the link, e.g. 50Mi.", pattern=QUANTITY)
    ] = None
    bandwidth_per_node: Annotated[
        str | None,
        Field(
            description="Bytes a second that all moves of these pods out of one node may use together: each gets its part of "
            "parallelPerNode. Needs that field.",
            pattern=QUANTITY,
        ),
    ] = None
    parallel: Annotated[
        int | None,
        Field(
            description="Moves of these pods that may be under way in the cluster at once. The controller's own limits hold as "
            "well: five in the cluster, two out of a node, two into one, where its options do not say otherwise.",
            ge=1,
            le=LARGEST,
        ),
    ] = None
    parallel_per_node: Annotated[
        int | None,
        Field(description="Moves of these pods out of one node that may be under way at once.", ge=1, le=LARGEST),
    ] = None
    eviction_deadline: Annotated[
        str | None,
        Field(
            description="How long a move may hold an eviction up. A pod's annotation podferry.dev/eviction-deadline may say less.",
            pattern=DURATION,
        ),
    ] = None
    ttl_seconds_after_finished: Annotated[
        int | None,
        Field(
            description="Seconds after its end at which a Migration is deleted that says nothing of it.",
            ge=0,
            le=2**31 - 1,
            json_schema_extra={"format": "int32"},
        ),
    ] = None
    pod_annotations: Annotated[
        list[PodWish],
        Field(
            description="Which of the annotations podferry.dev/priority and podferry.dev/eviction-deadline count on these pods; "
            "the others are as if they were not there.",
            max_length=2,
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ] = Field(default_factory=lambda: list(PodWish))


class MigrationPolicy(ObjectPart):
    """What the owner of the cluster says of the moves of some pods. The most specific one applies."""

    api_version: str = API_VERSION
    kind: str = "MigrationPolicy"
    metadata: dict[str, Any] = Field(default_factory=dict)
    spec: Annotated[
        MigrationPolicySpec,
        Field(
            json_schema_extra=rule(
                "!has(self.bandwidthPerNode) || has(self.parallelPerNode)",
                "bandwidthPerNode is divided by parallelPerNode, which is missing",
            )
        ),
    ] = Field(default_factory=MigrationPolicySpec)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> MigrationPolicy:
        """Read what the API server sent. Raises `PolicyUnreadable`."""
        try:
            return cls.model_validate({**body, "spec": body.get("spec") or {}})
        except ValidationError as wrong:
            name = body.get("metadata", {}).get("name", "?")
            raise PolicyUnreadable(f"the MigrationPolicy {name} cannot be read", why=str(wrong)[:1000]) from wrong

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.metadata["name"])

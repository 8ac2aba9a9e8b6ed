"""The NodeDrain object as typed classes. It is named like the node that it empties, so that a node has one drain at most.

Its CRD and its part of docs/api.md are generated from them (`scripts/crds`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from podferry.core.drain import DRAIN_ENDS, DrainPhase, PodState
from podferry.errors import Failed
from podferry.kube.conditions import Condition, Conditioned
from podferry.kube.migration import API_VERSION, GROUP, REQUESTED_BY
from podferry.kube.objects import DURATION, ObjectPart, fixed
from podferry.model import Mode

PRIORITY_ANNOTATION = f"{GROUP}/priority"
BY_ANNOTATION, CLOUD_ANNOTATION = NODE_ANNOTATIONS = (f"{GROUP}/drain-by", f"{GROUP}/cloud-notice")
"""On a node: when it goes away, as somebody says, or its agent, whom the cloud told. The controller begins to drain it at once."""
TROUBLE_ANNOTATION = f"{GROUP}/trouble"
"""On a NodeDrain: for which trouble of its node the controller made it."""
MOST_PODS = 1000
"""Pods that the status names: a kubelet runs 110 by default and 500 at most as Kubernetes is tested."""


class DrainUnreadable(Failed):
    """A NodeDrain that does not keep its own schema."""

    code = "PF289"


class NodeDrainSpec(ObjectPart):
    """How the node is emptied."""

    model_config = fixed("requestedBy", "mode", "cause")

    evict_others: Annotated[
        bool,
        Field(
            description="Evict the pods that cannot move, or whose moves failed, through the eviction API: their "
            "PodDisruptionBudgets hold, and their computed work is lost. Without it they stay."
        ),
    ] = False
    parallel: Annotated[
        int,
        Field(
            description="Moves out of the node that may be under way at once, in place of the controller's limit "
            "out of a node. Its other limits hold.",
            ge=1,
            le=50,
        ),
    ] = 2
    mode: Annotated[
        Mode | None, Field(description="The mode of each move. Without it as the pods' MigrationPolicies say, or live.")
    ] = None
    allow_post_copy: Annotated[
        bool | None,
        Field(description="Let a live move fall to post-copy where the job writes faster than the link carries."),
    ] = None
    allow_auto_converge: Annotated[
        bool | None, Field(description="Let a live move throttle the job where it writes faster than the link carries.")
    ] = None
    timeout: Annotated[
        str | None,
        Field(
            description="The time that each move may take. Without it as the pods' MigrationPolicies say, or 1h.",
            pattern=DURATION,
        ),
    ] = None
    deadline: Annotated[
        str | None,
        Field(
            description="When the node goes away, where that is known. Then the moves go first that save most computed work until "
            "then, and the pods that may be too late are told.",
            json_schema_extra={"format": "date-time"},
        ),
    ] = None
    cause: Annotated[
        str | None,
        Field(
            description="Why the controller itself asked for it: the trouble of the node, in words.", max_length=1024
        ),
    ] = None
    stop: Annotated[
        bool,
        Field(
            description="Begin no further move. Moves under way go on; set it back to false to resume the drain. The node "
            "stays cordoned."
        ),
    ] = False
    requested_by: Annotated[str | None, REQUESTED_BY] = None


class PodDrain(ObjectPart):
    """One pod of the node, and what the drain does with it."""

    namespace: Annotated[str, Field(description="Its namespace.")]
    name: Annotated[str, Field(description="Its name.")]
    uid: Annotated[str, Field(description="Its uid.")]
    state: Annotated[
        PodState,
        Field(
            description="Waiting for its turn, Moving, Moved, Evicting, Gone (deleted, ended or evicted), or Left: it stays on "
            "the node."
        ),
    ]
    migration: Annotated[str, Field(description="The Migration that moves it, the newest.")] = ""
    node: Annotated[str, Field(description="The node that it moved to.")] = ""
    downtime: Annotated[str, Field(description="How long it stood still, e.g. 212ms.")] = ""
    estimate: Annotated[
        str,
        Field(
            description="How long its move will take, from its memory requests and the moves that the cluster remembers, e.g. 40s. "
            "Empty where nothing tells."
        ),
    ] = ""
    may_be_late: Annotated[
        bool, Field(description="Its move may not be done by the deadline: others save more computed work until then.")
    ] = False
    message: Annotated[str, Field(description="Why, or how far its move is, in words for people.")] = ""


class NodeDrainStatus(Conditioned):
    """How far it is."""

    phase: Annotated[
        DrainPhase,
        Field(description="Draining; Stopped; Completed: no pod is left; Incomplete: what is left cannot move."),
    ] = DrainPhase.DRAINING
    total: Annotated[int, Field(description="Pods that the drain has seen on the node.", ge=0)] = 0
    moved: Annotated[int, Field(description="Pods that moved to another node.", ge=0)] = 0
    left: Annotated[int, Field(description="Pods still on the node.", ge=0)] = 0
    remaining: Annotated[
        str,
        Field(description="How long the moves that are left will take, e.g. 3m, as far as anything tells."),
    ] = ""
    summary: Annotated[str, Field(description="All of it in a few words.")] = ""
    pods: Annotated[
        list[PodDrain],
        Field(
            description="Each pod, in the order in which they move.",
            max_length=MOST_PODS,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["uid"]},
        ),
    ] = Field(default_factory=list)
    conditions: Annotated[
        list[Condition],
        Field(
            description="Cordoned; at the end Completed: True where the node is empty.",
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = Field(default_factory=list)
    start_time: Annotated[
        str | None, Field(description="When the controller took it up.", json_schema_extra={"format": "date-time"})
    ] = None
    completion_time: Annotated[
        str | None, Field(description="When it ended.", json_schema_extra={"format": "date-time"})
    ] = None


class NodeDrain(ObjectPart):
    """Empties the node of its own name: cordons it and moves its pods to other nodes, those with most computed work first."""

    api_version: str = API_VERSION
    kind: str = "NodeDrain"
    metadata: dict[str, Any] = Field(default_factory=dict)
    spec: NodeDrainSpec = Field(default_factory=NodeDrainSpec)
    status: NodeDrainStatus = Field(default_factory=NodeDrainStatus)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> NodeDrain:
        """Read what the API server sent. Raises `DrainUnreadable`."""
        try:
            return cls.model_validate({**body, "spec": body.get("spec") or {}, "status": body.get("status") or {}})
        except ValidationError as wrong:
            name = body.get("metadata", {}).get("name", "?")
            raise DrainUnreadable(f"the NodeDrain {name} cannot be read", why=str(wrong)[:1000]) from wrong

    def to_json(self) -> dict[str, Any]:
        """As the API server takes it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @property
    def name(self) -> str:
        """Its name, and the node's."""
        return str(self.metadata["name"])

    @property
    def uid(self) -> str:
        """Its uid."""
        return str(self.metadata["uid"])

    @property
    def about(self) -> str:
        """The trouble of the node for which the controller made or hurried it; empty where there is none."""
        return str((self.metadata.get("annotations") or {}).get(TROUBLE_ANNOTATION) or "")

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status.phase in DRAIN_ENDS

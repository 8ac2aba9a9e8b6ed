"""The Migration object as typed classes. Its CRD and docs/api.md are generated from them (`scripts/crds`).

Names follow KubeVirt's VirtualMachineInstanceMigration (`sourceNode`, `targetNode`, `allowPostCopy`, `bandwidth...`, `phase`) and
KEP-5823 (`podName`) where they have them.

The file is long because it is the schema of one object, with a description of each field.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from podferry.core.migration import MIGRATION_ENDS, MigrationPhase
from podferry.errors import Failed
from podferry.kube.conditions import Condition, Conditioned
from podferry.kube.connection_status import MOST_CONNECTIONS, ConnectionPeer, ListedConnection
from podferry.kube.objects import DURATION, FIXED, IP_ADDRESS, NAME, QUANTITY, ObjectPart, fixed, named, rule
from podferry.kube.resources import MOST_CONTAINERS, ContainerResources
from podferry.kube.settings import MoveSettings
from podferry.kube.verify import ONE_WAY, Verify
from podferry.model import Connections, Mode

GROUP, VERSION = "podferry.dev", "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

UID_LABEL = f"{GROUP}/migration-uid"
ROLE_LABEL = f"{GROUP}/role"
NAME_ANNOTATION = f"{GROUP}/migration"
ORIGIN_ANNOTATION = f"{GROUP}/origin"
HANDED_OVER_ANNOTATION = f"{GROUP}/handed-over"
LEAVING_ANNOTATION = f"{GROUP}/leaving"
CAUSE_LABEL = f"{GROUP}/cause"
"""On a Migration: why the controller made it."""
DEADLINE_ANNOTATION = f"{GROUP}/eviction-deadline"
FINALIZER = f"{GROUP}/migration"

QUEUED = "Queued"
ELIGIBLE, SCHEDULED, TARGET_REQUESTED, TARGET_CREATED = "Eligible", "Scheduled", "TargetRequested", "TargetCreated"
TARGET_READY, RESUMED, HANDED_OVER = "TargetReady", "Resumed", "HandedOver"
SOURCE_REPLACED = "SourceReplaced"
"""Of a pod that keeps its name: its object may be gone, so that the job cannot go on in it any more."""
TARGET_READY_BEFORE = "Poised"
"""What agents of 0.1 call `TargetReady`: while a cluster is updated, both may be there."""
COMPLETED, FAILED, CANCELLED, REHEARSED = "Completed", "Failed", "Cancelled", "Rehearsed"
READABLE, INTACT, VERIFIED = "Readable", "Intact", "Verified"
MOST_LINES, LONGEST_LINE = 64, 1000
"""Of the lists of text in a status."""
MOST_KEPT = 262144
"""Characters of a pod that a status keeps."""


class MigrationUnreadable(Failed):
    """A Migration that does not keep its own schema."""

    code = "PF287"


REQUESTED_BY = Field(
    description="Who asked for it, by the name that the API server knows him by. An admission policy refuses another's name; "
    "one of Kubernetes 1.36 fills it in (deploy/requested-by), and so does `kubectl podferry`. Without it only the API server's "
    "audit log knows.",
    max_length=1024,
)


class MigrationSpec(ObjectPart):
    """What is asked for."""

    model_config = fixed("targetNode", "requestedBy", "mode", lists=("resources",), objects=("verify",))

    pod_name: Annotated[
        str,
        Field(
            description="The pod to move, in the Migration's own namespace.",
            min_length=1,
            json_schema_extra=NAME | rule(FIXED, "podName cannot be changed"),
        ),
    ]
    target_node: Annotated[
        str | None,
        Field(
            description="The node to move it to. Without it the scheduler chooses, as it would for a new pod.",
            json_schema_extra=NAME,
        ),
    ] = None
    node_selector: Annotated[
        dict[str, str] | None,
        Field(description="Labels that the target node must have, beside what the pod itself asks for."),
    ] = None
    mode: Annotated[
        Mode | None,
        Field(
            description="How memory moves: live copies it while the job runs; stop freezes the job first; postcopy "
            "resumes it at once and fetches pages from the source. Without it as the pod's MigrationPolicy says, or live."
        ),
    ] = None
    allow_post_copy: Annotated[
        bool | None,
        Field(
            description="Let a live migration fall to post-copy where the job writes faster than the link carries. "
            "Then a node that dies in the middle loses the job. Without it as the pod's MigrationPolicy says, or false."
        ),
    ] = None
    allow_auto_converge: Annotated[
        bool | None,
        Field(
            description="Let a live migration slow the job down where it writes faster than the link carries. Without it as the "
            "pod's MigrationPolicy says, or false."
        ),
    ] = None
    connections: Annotated[
        Connections | None,
        Field(
            description="What the move may do to connections whose other end stays, TCP and connected UDP. Close: end them, at "
            "both ends. Preserve: TCP connections to pods on nodes with an agent live on, but for those behind a Service; all "
            "others end. Require: nothing; where there is one, the move is refused before anything is touched, or, where it was "
            "opened since, taken back before the right to run passes. Without it as the pod's MigrationPolicy says, or Close."
        ),
    ] = None
    max_downtime: Annotated[
        str | None,
        Field(description="Stop the job only when that is expected to take no longer, e.g. 300ms.", pattern=DURATION),
    ] = None
    max_freeze: Annotated[
        str | None,
        Field(
            description="Give the job back and fail where it has stood still for so long before the right to run passes to the "
            "target. Without it, in modes live and postcopy, 5s beyond maxDowntime; in mode stop, which copies all memory in that "
            "time, only when nothing could be sent for 2m.",
            pattern=DURATION,
        ),
    ] = None
    timeout: Annotated[
        str | None,
        Field(
            description="Take the migration back unless the job has been resumed on the target by then. Without it as the pod's "
            "MigrationPolicy says, or 1h.",
            pattern=DURATION,
        ),
    ] = None
    bandwidth: Annotated[
        str | None,
        Field(description="Bytes a second that the migration may use of the link, e.g. 50Mi.", pattern=QUANTITY),
    ] = None
    resources: Annotated[
        list[ContainerResources],
        Field(
            description="Other requests and limits for containers of the target pod. What is not said stays as it is.",
            max_length=MOST_CONTAINERS,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = Field(default_factory=list)
    verify: Annotated[
        Verify | None,
        Field(
            description="What must hold of the job on the target before the source's pod is given up. The job has run there by "
            "then and cannot go back: where it does not hold, the move goes on to its end, and ends as Failed with the reason "
            "NotVerified.",
            json_schema_extra=ONE_WAY,
        ),
    ] = None
    dry_run: Annotated[
        bool,
        Field(
            description="Only rehearse it: a node is chosen and asked, CRIU dumps the pod without its memory while it stands still "
            "for about 0.1s, and it goes on. No pod is made on the target. Ends as Rehearsed, or as a move would have ended.",
            json_schema_extra=rule(FIXED, "dryRun cannot be changed"),
        ),
    ] = False
    cancel: Annotated[
        bool,
        Field(
            description="Take the migration back, as long as the right to run has not passed to the target. Deleting the "
            "Migration asks for the same.",
            json_schema_extra=rule("self || !oldSelf", "a cancelled migration stays cancelled"),
        ),
    ] = False
    requested_by: Annotated[str | None, REQUESTED_BY] = None
    ttl_seconds_after_finished: Annotated[
        int | None,
        Field(
            description="Delete the Migration so many seconds after it has ended, however it ended, as a Job's field of this "
            "name does; 0: at once. Without it the Migration stays until somebody deletes it. May be changed at any time.",
            ge=0,
            le=2**31 - 1,
            json_schema_extra={"format": "int32"},
        ),
    ] = None


class PodReference(ObjectPart):
    """A pod."""

    name: Annotated[str, named("Its name.")]
    uid: Annotated[str, Field(description="Its uid: another pod of the same name is not it.")]


class MovedContainer(ObjectPart):
    """A container of the pod that runs as long as the pod does, and the liveness probe that reaches it by the network."""

    name: Annotated[str, Field(description="Its name.")]
    probe_port: Annotated[
        int | None,
        Field(description="The port that its liveness probe asks: an http, tcp or grpc one.", ge=1, le=65535),
    ] = None
    probe_path: Annotated[str, Field(description="What an http probe asks for.")] = ""


class OwnerReference(ObjectPart):
    """What the pod belongs to."""

    kind: Annotated[str, Field(description="Job, ReplicaSet, ... ; empty for a pod of its own.")] = ""
    name: Annotated[str, Field(description="Its name.")] = ""


class EnginePhases(ObjectPart):
    """Where the two halves of the engine are (see ARCHITECTURE.md)."""

    source: Annotated[str, Field(description="The source's phase, as its agent last said.")] = ""
    target: Annotated[str, Field(description="The target's phase, as its agent last said.")] = ""


class MigrationProgress(ObjectPart):
    """How far the engine is. Written by the source's agent, a few times a second at most."""

    summary: Annotated[str, Field(description="All of it in a few words.")] = ""
    rounds: Annotated[int, Field(description="Pre-copy rounds begun.", ge=0)] = 0
    bytes: Annotated[int, Field(description="Bytes on the wire until now.", ge=0)] = 0
    total_bytes: Annotated[int, Field(description="Bytes that there are to send, as far as is known.", ge=0)] = 0
    bytes_per_second: Annotated[int | None, Field(description="The rate of the last two seconds.", ge=0)] = None
    remaining: Annotated[str | None, Field(description="Time left to send what is known, e.g. 12s.")] = None


class Ending(ObjectPart):
    """How the engine or the controller ended it."""

    outcome: Annotated[
        str,
        Field(
            description="completed, refused, rolled-back, cancelled, failed or rehearsed.",
            pattern="^(completed|refused|rolled-back|cancelled|failed|rehearsed)$",
        ),
    ]
    reason: Annotated[str, Field(description="Why, in one word for programs.")]
    message: Annotated[str, Field(description="Why, in words for people.")] = ""
    code: Annotated[str, Field(description="The code of podferry's error, e.g. PF110.")] = ""
    remedy: Annotated[str, Field(description="What to do about it.")] = ""


class MigrationStatus(Conditioned):
    """What has become of it."""

    phase: Annotated[MigrationPhase, Field(description="How far it is.")] = MigrationPhase.PENDING
    observed_generation: Annotated[int | None, Field(description="The spec's generation that this is about.")] = None
    source_node: Annotated[str | None, named("The node that the pod leaves.")] = None
    target_node: Annotated[str | None, named("The node that it goes to.")] = None
    source_address: Annotated[
        str | None,
        Field(
            description="The InternalIP of the node that the pod leaves, where it has one and is there: agents read no nodes.",
            max_length=45,
            pattern=IP_ADDRESS,
        ),
    ] = None
    target_address: Annotated[
        str | None,
        Field(description="The InternalIP of the node that it goes to.", max_length=45, pattern=IP_ADDRESS),
    ] = None
    source_pod: Annotated[PodReference | None, Field(description="The pod that leaves.")] = None
    source_pod_addresses: Annotated[
        list[Annotated[str, Field(max_length=45, pattern=IP_ADDRESS)]],
        Field(
            description="The addresses of the pod that leaves: nodes of other pods that have connections with it hold to them who "
            "tells them that such a connection goes on.",
            max_length=4,
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = Field(default_factory=list)
    target_pod: Annotated[PodReference | None, Field(description="The pod that takes its place.")] = None
    containers: Annotated[
        list[MovedContainer],
        Field(
            description="The containers that move, in the order in which the kubelet starts them: agents read no pods.",
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = Field(default_factory=list)
    owner: Annotated[OwnerReference | None, Field(description="What the pod belongs to.")] = None
    keeps_name: Annotated[
        bool | None,
        Field(
            description="Whether the target pod has the source's name, since the owner finds its pods by their names: "
            "then it is made only after the right to run has passed, once the source's object is gone."
        ),
    ] = None
    kept_place: Annotated[
        str | None,
        Field(
            description="Of a pod that keeps its name, from SourceReplaced to the end: its metadata and the target pod, as JSON.",
            max_length=MOST_KEPT,
        ),
    ] = None
    settings: Annotated[
        MoveSettings | None,
        Field(
            description="What holds for this move: what the spec asks for, within what the pod's MigrationPolicy says when it is "
            "taken up."
        ),
    ] = None
    engine: Annotated[EnginePhases | None, Field(description="The engine's two halves.")] = None
    progress: Annotated[MigrationProgress | None, Field(description="How far the engine is.")] = None
    downtime: Annotated[
        str | None, Field(description="From the freeze on the source to the resume on the target, e.g. 412ms.")
    ] = None
    forecast: Annotated[
        str | None,
        Field(description="Of a rehearsal: the downtime of a move, but for what its last pages take, e.g. 250ms."),
    ] = None
    warnings: Annotated[
        list[Annotated[str, Field(max_length=LONGEST_LINE)]],
        Field(
            description="What is worth knowing of the move although it does not stand in the way. "
            "The source's agent looks for it before anything is touched.",
            max_length=MOST_LINES,
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = Field(default_factory=list)
    connections: Annotated[
        list[ListedConnection],
        Field(
            description="The pod's connections before anything is touched, TCP and connected UDP, with what a move makes of each; "
            "those that it costs come first.",
            max_length=MOST_CONNECTIONS,
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = Field(default_factory=list)
    peers: Annotated[
        list[ConnectionPeer],
        Field(
            description="Whose the addresses are at the other ends of these connections: agents read neither pods nor nodes.",
            max_length=MOST_CONNECTIONS,
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = Field(default_factory=list)
    closed_connections: Annotated[
        list[Annotated[str, Field(max_length=LONGEST_LINE)]],
        Field(
            description="TCP connections to others than the pod itself, LOCAL -> REMOTE, which the move closes at both ends.",
            max_length=MOST_LINES,
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = Field(default_factory=list)
    conditions: Annotated[
        list[Condition],
        Field(
            description="Queued (while others have their turn), "
            "Eligible, Scheduled, TargetRequested, SourceReplaced (where the pod keeps its name), TargetCreated, TargetReady, "
            "Resumed, Verified (where the spec asks for it), HandedOver; at the end "
            "Completed, Failed and Cancelled (of a rehearsal Rehearsed, too), and Intact, which is False where the job has not all "
            "that it had. Readable is False where this podferry does not understand it and leaves it alone.",
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = Field(default_factory=list)
    abort: Annotated[
        Ending | None, Field(description="Set by the controller: the agents shall take the migration back if they can.")
    ] = None
    engine_ending: Annotated[Ending | None, Field(description="Set by the source's agent: how the engine ended.")] = (
        None
    )
    ending: Annotated[Ending | None, Field(description="How it ended.")] = None
    arbiter: Annotated[
        str | None,
        Field(
            description="Set once, where the nodes lost each other after the right to run had passed and one of them is "
            "gone or fenced: who runs the job.",
            pattern="^(source|target)$",
        ),
    ] = None
    message: Annotated[str | None, Field(description="The latest in words.")] = None
    start_time: Annotated[
        str | None, Field(description="When the controller took it up.", json_schema_extra={"format": "date-time"})
    ] = None
    completion_time: Annotated[
        str | None, Field(description="When it ended.", json_schema_extra={"format": "date-time"})
    ] = None

    @property
    def target_is_ready(self) -> bool:
        """Whether the target's agent has said so, whichever version of podferry it is."""
        return any(self.condition(one) is not None for one in (TARGET_READY, TARGET_READY_BEFORE))


class Migration(ObjectPart):
    """Moves one running pod to another node: its memory, its files and its place in the cluster."""

    api_version: str = API_VERSION
    kind: str = "Migration"
    metadata: dict[str, Any] = Field(default_factory=dict)
    spec: MigrationSpec
    status: MigrationStatus = Field(default_factory=MigrationStatus)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Migration:
        """Read what the API server sent. Raises `MigrationUnreadable`."""
        try:
            return cls.model_validate({**body, "status": body.get("status") or {}})
        except ValidationError as wrong:
            name = body.get("metadata", {}).get("name", "?")
            raise MigrationUnreadable(f"the Migration {name} cannot be read", why=str(wrong)[:1000]) from wrong

    def to_json(self) -> dict[str, Any]:
        """As the API server takes it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.metadata["name"])

    @property
    def namespace(self) -> str:
        """Its namespace, and its pods'."""
        return str(self.metadata["namespace"])

    @property
    def uid(self) -> str:
        """Its uid, which is the engine's name of the migration too."""
        return str(self.metadata["uid"])

    @property
    def settings(self) -> MoveSettings:
        """How it is done: as was decided when it was taken up; before that, as its spec asks."""
        if self.status.settings is not None:
            return self.status.settings
        asked = self.spec.model_dump(include=set(MoveSettings.model_fields), exclude_none=True)
        return MoveSettings.model_validate(asked)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status.phase in MIGRATION_ENDS

    @property
    def cancel_wanted(self) -> bool:
        """Whether somebody asked for it to be taken back, by the field or by deleting it."""
        return self.spec.cancel or "deletionTimestamp" in self.metadata

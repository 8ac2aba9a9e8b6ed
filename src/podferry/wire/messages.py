"""The control messages, as frozen dataclasses, and their form on the wire.

A message travels as `{"type": NAME, FIELD: VALUE, ...}` with every field present and no other. Who may send which when
is `podferry.wire.session`'s business. The file is long, and stays whole: it is one list. Sizes are in bytes,
memory in pages of 4096 bytes unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from podferry import __version__
from podferry.core.strict import AllowedRange, JsonObject, NotStrict, dump, from_json, parse, to_json
from podferry.errors import Bug, PeerMisbehaved, PodferryError, Refused
from podferry.model import Mode
from podferry.wire.frames import MAX_ADDRESS

PROTOCOL = 8
"""The number both ends must share. Messages are taken only with all of their fields and no other, so it is raised with every change
of what may travel (`podferry.wire.document.shape`). 2: the offer says how long the source is patient; `PagesLost`.
3: `StatePart`. 4: `Filled.differences`. 5: `Offer.rehearsal`. 6: the names of messages and fields
(`PrepareTarget`, `TargetPrepared`, `PageRequest`, `PeerFailure`, `AddressSpaceSum`). 8: `Translate`, `Translated`."""

Id = Annotated[str, AllowedRange(1, 128)]
Name = Annotated[str, AllowedRange(1, 317)]
"""A node's or a container's name, or a pod's with its namespace's."""
TrackedAddressSpace = Annotated[int, AllowedRange(0, 0xFFFFFFFF)]
Round = Annotated[int, AllowedRange(0, 0xFFFF)]
Small = Annotated[int, AllowedRange(0, 0xFF)]

MOST_DIFFERENCES = 64
MOST_TRANSLATED = 2000
"""Connections in one `Translate`."""
MOST_SUMS, MOST_PARTS = 2000, 512
"""Files and spaces in one `StatePart`, which stays below the largest frame with names of 255 bytes; and parts in a migration."""


@dataclass(frozen=True)
class ErrorReport:
    """A `PodferryError` on its way; its parts are those of `PodferryError.to_dict`."""

    code: Annotated[str, AllowedRange(1, 16)]
    what: str
    why: Annotated[str, AllowedRange(0, 16384)]
    remedy: str
    evidence: Annotated[tuple[str, ...], AllowedRange(0, 64)]

    @classmethod
    def of(cls, error: PodferryError) -> ErrorReport:
        """`error`, its texts cut to what may travel."""
        evidence = tuple(line[:4096] for line in error.evidence)
        return cls(error.code, error.what[:4096], error.why[:16384], error.remedy[:4096], evidence)

    def error(self) -> PodferryError:
        """The error that the peer meant."""
        return PodferryError.from_dict(to_json(self))


@dataclass(frozen=True)
class FileSum:
    """A file of a flat directory as it must have arrived."""

    directory: Small
    name: Annotated[str, AllowedRange(1, 255)]
    size: int
    digest: Annotated[str, AllowedRange(0, 128)]


@dataclass(frozen=True)
class AddressSpaceSum:
    """How many pages of an address space the target must hold when all has arrived."""

    address_space: TrackedAddressSpace
    pages: int


@dataclass(frozen=True)
class TreeSum:
    """What a directory tree must amount to when all has arrived."""

    tree: Small
    entries: int
    bytes: int
    digest: Annotated[str, AllowedRange(0, 128)]


@dataclass(frozen=True)
class Hello:
    """First of all, both ways: who speaks, and which protocol."""

    protocol: int
    version: Annotated[str, AllowedRange(1, 64)]
    node: Name


@dataclass(frozen=True)
class PeerFailure:
    """The last thing either end says before it hangs up because of an error."""

    error: ErrorReport


@dataclass(frozen=True)
class Offer:
    """The source wants to move a container, and gives up what has not reached GO within `timeout_s` seconds; `container` and
    `facts` are decoded by whoever uses them. In a `rehearsal` CRIU's images come alone: the target judges them; there is no GO."""

    migration: Id
    name: Name
    mode: Mode
    container: JsonObject
    facts: JsonObject
    memory_bytes: int
    upper_bytes: int
    timeout_s: int = 3600
    rehearsal: bool = False


@dataclass(frozen=True)
class Accept:
    """The target can take it; state may flow."""

    migration: Id
    facts: JsonObject


@dataclass(frozen=True)
class Refuse:
    """The target cannot take it, and why."""

    migration: Id
    refusals: Annotated[tuple[ErrorReport, ...], AllowedRange(1, 64)]


@dataclass(frozen=True)
class RoundEnd:
    """All of a round has been sent: this many pages, in this many bytes of frames. Rounds count from 1."""

    round: Round
    pages: int
    bytes: int


@dataclass(frozen=True)
class RoundAck:
    """All of a round is in the target's page store."""

    round: Round


@dataclass(frozen=True)
class PrepareTarget:
    """The source is near to convergence: make the target's container and let it wait for state.

    With `postcopy`, pages go on coming after the resume. May be said a second time, with `postcopy`, where the job turns out to
    write too fast once all is ready.
    """

    migration: Id
    postcopy: bool


@dataclass(frozen=True)
class TargetPrepared:
    """The target's container exists and waits."""

    migration: Id


@dataclass(frozen=True)
class StatePart:
    """More of what `StateEnd` says that the target must hold: a message is bounded, a job's files and processes are not."""

    migration: Id
    files: Annotated[tuple[FileSum, ...], AllowedRange(0, MOST_SUMS)]
    address_spaces: Annotated[tuple[AddressSpaceSum, ...], AllowedRange(0, MOST_SUMS)]


@dataclass(frozen=True)
class StateEnd:
    """Everything has been sent; this is what the target must hold, with what was said in `StatePart`s. In `postcopy`, `spaces` may
    be empty."""

    migration: Id
    files: tuple[FileSum, ...]
    address_spaces: tuple[AddressSpaceSum, ...]
    trees: Annotated[tuple[TreeSum, ...], AllowedRange(0, 256)]


@dataclass(frozen=True)
class Ready:
    """Everything has arrived and was checked; the target can run it and waits for the word."""

    migration: Id


@dataclass(frozen=True)
class Go:
    """The right to run passes to the target. The point of no return."""

    migration: Id


@dataclass(frozen=True)
class Restoring:
    """The answer to `Query` while the target is between `Go` and `Running`."""

    migration: Id


@dataclass(frozen=True)
class Running:
    """The container runs on the target; when this was said it had run for so many nanoseconds.

    A duration, so that the nodes' clocks need not agree.
    """

    migration: Id
    ran_ns: int


@dataclass(frozen=True)
class PageRequest:
    """Post-copy: the container waits for this page. The source answers with Pages, or Drop if it has none."""

    address_space: TrackedAddressSpace
    address: Annotated[int, AllowedRange(0, MAX_ADDRESS - 1)]


@dataclass(frozen=True)
class PagesEnd:
    """Post-copy: every page has been sent; this is what there was."""

    migration: Id
    address_spaces: tuple[AddressSpaceSum, ...]


@dataclass(frozen=True)
class Progress:
    """How far the target is; for people, never for decisions."""

    phase: Annotated[str, AllowedRange(1, 64)]
    bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Filled:
    """Every page is in the container's memory, so many milliseconds after it resumed; the source is not needed.
    `differences` is what the job has not on the target as it had it on the source."""

    migration: Id
    ms: int
    differences: Annotated[tuple[Annotated[str, AllowedRange(1, 512)], ...], AllowedRange(0, MOST_DIFFERENCES)] = ()


@dataclass(frozen=True)
class Crashed:
    """The container ran on the target and died before it had all its memory."""

    migration: Id
    error: ErrorReport


@dataclass(frozen=True)
class GaveUp:
    """The target will never run this container. Only this lets the source run it again after `Go`."""

    migration: Id
    error: ErrorReport


@dataclass(frozen=True)
class PagesLost:
    """Post-copy: the frozen original has ended, and with it what the target has not got. The container can never have all its
    memory: the target ends it, and answers with `Crashed`."""

    migration: Id


@dataclass(frozen=True)
class Abort:
    """The source takes its offer back; only before `Go`. The target answers with `GaveUp`."""

    migration: Id
    reason: str


@dataclass(frozen=True)
class Done:
    """The source has drawn its conclusions; both may forget the migration."""

    migration: Id


@dataclass(frozen=True)
class Query:
    """After a connection was lost: what became of this migration?"""

    migration: Id


@dataclass(frozen=True)
class MovedConnection:
    """A connection of the pod with the uid `pod`, on the node that is told: both ends as that pod's socket has them, ADDRESS:PORT,
    and the address that the other end, which moves, is going to have."""

    pod: Annotated[str, AllowedRange(1, 64)]
    local: Annotated[str, AllowedRange(1, 64)]
    remote: Annotated[str, AllowedRange(1, 64)]
    remote_now: Annotated[str, AllowedRange(1, 64)]


@dataclass(frozen=True)
class Translate:
    """First of a conversation, from the target of the Migration `namespace`/`name` to a node that is another pod's: have these
    connections go on although the pod at their other ends gets another address."""

    migration: Id
    namespace: Annotated[str, AllowedRange(1, 63)]
    name: Annotated[str, AllowedRange(1, 253)]
    connections: Annotated[tuple[MovedConnection, ...], AllowedRange(1, MOST_TRANSLATED)]


@dataclass(frozen=True)
class Translated:
    """The answer to `Translate`: they do, but for those `missing`, by their place in the list: the pod has none such any more."""

    migration: Id
    missing: Annotated[tuple[int, ...], AllowedRange(0, MOST_TRANSLATED)]


@dataclass(frozen=True)
class Unknown:
    """The answer to `Query`: the target has no record of it, and will never run it."""

    migration: Id


# fmt: off
SOURCE_MESSAGES = (Offer, RoundEnd, PrepareTarget, StatePart, StateEnd, Go, PagesEnd, PagesLost, Abort, Done, Query,
                   Translate)
TARGET_MESSAGES = (Accept, Refuse, RoundAck, TargetPrepared, Ready, Restoring, Running, PageRequest, Progress, Filled, Crashed,
                   GaveUp, Unknown, Translated)
# fmt: on
Message = (
    Hello
    | PeerFailure
    | Offer
    | RoundEnd
    | PrepareTarget
    | StatePart
    | StateEnd
    | Go
    | PagesEnd
    | PagesLost
    | Abort
    | Done
    | Query
    | Translate
    | Accept
    | Refuse
    | RoundAck
    | TargetPrepared
    | Ready
    | Restoring
    | Running
    | PageRequest
    | Progress
    | Filled
    | Crashed
    | GaveUp
    | Unknown
    | Translated
)  # fmt: skip

MESSAGES: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Hello, PeerFailure, *SOURCE_MESSAGES, *TARGET_MESSAGES)
}


def whole_end(parts: list[StatePart], end: StateEnd) -> StateEnd:
    """All that `end` and the parts before it say."""
    files = (*(file for part in parts for file in part.files), *end.files)
    address_spaces = (*(address_space for part in parts for address_space in part.address_spaces), *end.address_spaces)
    return replace(end, files=files, address_spaces=address_spaces)


def encode(message: Message) -> bytes:
    """The message as it travels. Raises `Bug` for a message that its own receiver would refuse."""
    try:
        fields = to_json(message)
        from_json(type(message), fields)
        return dump({"type": type(message).__name__, **fields})
    except NotStrict as cause:
        raise Bug.because(f"illegal message {type(message).__name__}", cause) from cause


def decode(payload: bytes | bytearray | memoryview) -> Message:
    """The message in `payload`. Raises `PeerMisbehaved` unless it is exactly one message, `Refused` for a
    `Hello` of another protocol."""
    try:
        fields = parse(payload)
        name = fields.pop("type", None)
        kind = MESSAGES.get(name) if isinstance(name, str) else None
        if kind is None:
            raise NotStrict(f"unknown type {str(name)[:100]!r}")
        if kind is Hello:
            _check_protocol(fields)
        return from_json(kind, fields)
    except NotStrict as cause:
        raise PeerMisbehaved("illegal message", why=str(cause)) from cause


def _check_protocol(hello: JsonObject) -> None:
    """Refuse another protocol before its `Hello`, which may have fields that we do not know, is looked at closely."""
    theirs = hello.get("protocol")
    if type(theirs) is int and theirs != PROTOCOL:
        version = str(hello.get("version"))[:64]
        raise Refused(
            f"the peer runs podferry {version!r} with protocol {theirs}, this node {__version__!r} with {PROTOCOL}",
            remedy="run the same version of podferry on both nodes",
        )

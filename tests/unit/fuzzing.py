"""What is fuzzed, and how inputs are made: real ones of each kind, damaged as by somebody who knows the format a little.

A target takes bytes and either reads them or raises its own error. Everything else that leaves it is a fault, as is memory beyond
what a small input may cost, or a file that it touches beside its own.
"""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import zstandard
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from podferry.controller.signer import NODE_EXTRA, Signer
from podferry.core import allowed_spec
from podferry.core.allowed_rights import rights_of
from podferry.core.facts import CgroupKind, ContainerFacts, NodeFacts, RuntimeKind
from podferry.core.strict import NotStrict, parse
from podferry.criu import dump_images as criu_images
from podferry.criu import seccomp_programs, timers
from podferry.criu.rights import MAGIC, against
from podferry.criu.seccomp import reason_against
from podferry.engine.journal import Journal
from podferry.errors import Failed, PeerMisbehaved, PodferryError, Refused, UsageError
from podferry.kube.migration import Migration, MigrationUnreadable
from podferry.model import Mode
from podferry.node.records import Container, Opaque
from podferry.node.upper import tree_records as records
from podferry.snapshotter import filters, layout
from podferry.snapshotter.faults import LayerDamaged, ShareRefused
from podferry.wire import compression, frames, messages
from podferry.workload.offered import OfferedContainer

HERE = Path(__file__).parent
IMAGES = HERE / "criu_images"
SPEC: dict[str, Any] = json.loads((IMAGES / "spec.json").read_text())
SECCOMP: dict[str, Any] = json.loads((HERE / "seccomp/containerd.json").read_text())
SPEC_WITH_PROFILE = {**SPEC, "linux": {**SPEC["linux"], "seccomp": SECCOMP}}


@dataclass(frozen=True)
class Target:
    """`run` reads bytes in a directory of its own; `seeds` are real ones, `words` what often stands in them."""

    name: str
    run: Callable[[bytes, Path], object]
    seeds: tuple[bytes, ...]
    allowed: tuple[type[Exception], ...]
    words: tuple[bytes, ...] = ()
    share: int = 1
    """Of all inputs of a long run, in parts: what is slow gets fewer."""
    files: tuple[str, ...] = field(default=())
    """What it may leave in its directory."""


def damaged(seed: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    """The seed, changed in a few places: bits, numbers at their limits, pieces lost, doubled or moved, words of the format."""
    data = bytearray(seed)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[at % len(data)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 2:
                size = chance.choice((1, 2, 4, 8))
                number = chance.choice((0, 1, (1 << 8 * size) - 1, 1 << 8 * size - 1, chance.randrange(1 << 8 * size)))
                data[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))
            case 3:
                del data[at : at + chance.choice((1, 2, 4, 16, len(data)))]
            case 4:
                data[at:at] = data[at : at + chance.choice((1, 4, 16, 64))]
            case 5:
                data[at:at] = chance.randbytes(chance.choice((1, 2, 8, 40)))
            case 6 if words:
                data[at : at + chance.choice((0, 1, 8))] = chance.choice(words)
            case 7:
                other = chance.randrange(len(data) + 1)
                data[at:at] = data[other : other + chance.randrange(40)]
    return bytes(data[: 1 << 20])


# How each is read.


def _frames(data: bytes, _: Path) -> None:
    reader, zstd = frames.FrameReader(), zstandard.ZstdDecompressor()
    for frame in reader.receive_data(data):
        if isinstance(frame, frames.Pages):
            whole = compression.inflate(frame, zstd) if frame.zstd else frame
            list(whole.pieces())


def _records(data: bytes, _: Path) -> None:
    readers = {
        records.Verb.BEGIN: records.Body.begin,
        records.Verb.PARK: records.Body.slot_and_path,
        records.Verb.UNPARK: records.Body.slot_and_path,
        records.Verb.REMOVE: records.Body.path,
        records.Verb.MAKE: records.Body.make,
        records.Verb.LINK: records.Body.link,
        records.Verb.FILE: records.Body.file,
        records.Verb.DATA: records.Body.data,
        records.Verb.HOLE: records.Body.hole,
        records.Verb.ATTRIBUTES: records.Body.attributes,
        records.Verb.END: records.Body.end,
    }
    for verb, body in records.parse(memoryview(data)):
        readers[verb](body)


def _journal(data: bytes, directory: Path) -> None:
    (directory / "journal.jsonl").write_bytes(data)
    Journal(directory).close()


def _image(name: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, directory: Path) -> None:
        if not (directory / "inventory.img").exists():
            for path in IMAGES.glob("*"):
                (directory / path.name).write_bytes(path.read_bytes())
            (directory / "spec.json").unlink()
        (directory / name).write_bytes(data)
        try:
            against(directory, _rights())
        finally:
            (directory / name).write_bytes((IMAGES / name).read_bytes())

    return read


def _page_maps(data: bytes, directory: Path) -> None:
    for name in ("pstree.img", "mm-1.img", "pagemap-1.img"):
        (directory / name).write_bytes(data)
    for read in (
        lambda: criu_images.tasks(directory),
        lambda: criu_images.page_map(directory, 1).encode(),
        lambda: criu_images.lazy_pages(directory, 1),
        lambda: criu_images.anonymous_areas(directory, 1),
        lambda: criu_images.dumped_areas(directory, 1),
        lambda: criu_images.without_deleted_sources(data),
    ):
        try:
            read()
        except PeerMisbehaved:
            continue


def _timers(data: bytes, directory: Path) -> None:
    (directory / "files.img").write_bytes(data)
    timers.put_right(directory)


def _filter(data: bytes, _: Path) -> None:
    assert isinstance(reason_against(data, _profile()), str)


def _spec(data: bytes, _: Path) -> None:
    """A spec that passes is one whose rights can be told."""
    try:
        spec = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotStrict("no JSON") from error
    if not allowed_spec.against(
        spec, id="job", namespace="default", capabilities=allowed_spec.DEFAULT_CAPABILITIES | {"CAP_SYS_PTRACE"}
    ):
        rights_of(spec, lambda path: True, "x86_64")


def _offer(data: bytes, _: Path) -> None:
    offered = OfferedContainer.from_dict(parse(data), "job")
    offered.against(namespace="default", capabilities=allowed_spec.DEFAULT_CAPABILITIES)


def _facts(data: bytes, _: Path) -> None:
    fields = parse(data)
    (ContainerFacts if "image" in fields else NodeFacts).from_dict(fields)


def _migration(data: bytes, _: Path) -> None:
    body = _json_object(data)
    found = Migration.from_json(body)
    assert Migration.from_json(found.to_json()).to_json() == found.to_json()


def _filters(data: bytes, _: Path) -> None:
    filters.parse([data.decode("utf-8", "surrogateescape")])(lambda path: "x" if path else None)


def _share(data: bytes, _: Path) -> None:
    """Every kind of record on the share."""
    chain = "sha256:" + "e" * 64
    readers: list[tuple[Callable[[], object], type[Exception]]] = [
        (lambda: layout.decode_layer(chain, data), LayerDamaged),
        (lambda: layout.decode_lease(data), ShareRefused),
        (lambda: layout.decode_node("node-a", data), ShareRefused),
        (lambda: layout.decode_read(data), ValueError),
        (lambda: layout.decode_marker(data), ShareRefused),
        (lambda: layout.decode_unused(data), ValueError),
    ]
    for read, error in readers:
        with suppress(error):
            read()


def _request(data: bytes, _: Path) -> None:
    account = "system:serviceaccount:podferry-system:podferry-agent"
    spec = {
        "username": account,
        "extra": {NODE_EXTRA: ["node-a"]},
        "request": base64.b64encode(data).decode(),
    }
    Signer(None, "podferry-system", None).judge(spec)  # type: ignore[arg-type]


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise NotStrict("no JSON") from error
    if not isinstance(body, dict) or not isinstance(body.get("metadata", {}), dict):
        raise NotStrict("the API server sends objects that have metadata")
    return body


@cache
def _rights() -> Any:
    return rights_of(SPEC_WITH_PROFILE, lambda path: path != "/proc/kcore", "x86_64")


def _profile() -> Any:
    return _rights().seccomp


# What real ones look like.


def _frame_seeds() -> tuple[bytes, ...]:
    page = bytes(range(256)) * 16
    squeezed = zstandard.ZstdCompressor().compress(page * 2)
    made: list[Any] = [
        frames.Beat(),
        frames.Control(messages.encode(messages.Go("m-1"))),
        frames.Pages(1, 2, ((4096, 1),), page),
        frames.Pages(1, 2, ((4096, 2),), squeezed, True),
        frames.Drop(1, ((4096, 8192),)),
        frames.Tree(0, b"".join(records.chunks([records.begin(fresh=True)]))),
        frames.File(0, "core-1.img", 0, b"content", True),
    ]
    each = [b"".join(map(bytes, frames.encode(one))) for one in made]
    return (*each, b"".join(each))


def _message_seeds() -> tuple[bytes, ...]:
    report = messages.ErrorReport("PF200", "it broke", "because", "mend it", ("line",))
    sums = (messages.FileSum(0, "core-1.img", 5, "ab"),), (messages.AddressSpaceSum(1, 2),)
    made: list[Any] = [
        messages.Hello(messages.PROTOCOL, "0.1.0", "node-a"),
        messages.PeerFailure(report),
        messages.Offer("m-1", "job", Mode.LIVE, {"image": "x", "n": [1, 2.5, None, True]}, {}, 1 << 40, 0),
        messages.Accept("m-1", {"cpu": {"flags": ["a"]}}),
        messages.Refuse("m-1", (report,)),
        messages.StatePart("m-1", *sums),
        messages.StateEnd("m-1", *sums, (messages.TreeSum(0, 1, 2, "cd"),)),
        messages.Running("m-1", 1_790_000_000_000_000_000),
        messages.GaveUp("m-1", report),
    ]
    return tuple(messages.encode(one) for one in made)


def _record_seeds() -> tuple[bytes, ...]:
    made = [
        records.begin(fresh=True),
        records.park(b"a/b", 3),
        records.unpark(3, b"a/c"),
        records.remove(b"a/d"),
        records.link(b"a/e", b"a/f"),
        records.file(b"a/g", records.How(1), 4096),
        records.data(0, b"content"),
        records.hole(0, 4096),
        records.end(records.Summary(1, 7, "00" * 16)),
    ]
    each = [b"".join(records.chunks([one])) for one in made]
    return (*each, b"".join(records.chunks(made)))


def _journal_seed() -> bytes:
    lines = [
        {"format": 2},
        {"phase": "agree", "t": 1.0},
        {"facts": {"role": "source", "name": "job"}, "t": 2.0},
        {"acquire": "scratch", "with": {"directory": "/run/podferry/outgoing/1"}, "t": 3.0},
        {"release": "scratch", "t": 4.0},
    ]
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def _fact_seeds() -> tuple[bytes, ...]:
    node = NodeFacts(
        *("6.18.0", "x86_64", 4096, "b", 2, "m", ("avx",), "4.1.1", "1.1.15"),
        *(RuntimeKind.CONTAINERD, "1.7.0", CgroupKind.V2),
        *(1 << 30, 1 << 30, 1 << 30, True, True, True, False, True, 4 << 20, 1000.0, False),
    )
    return (json.dumps(node.to_dict()).encode(), json.dumps({"image": "i", "id": "job", "pids": [1]}).encode())


def _offer_seed() -> bytes:
    spec = Opaque("types.containerd.io/opencontainers/runtime-spec/1/Spec", json.dumps(SPEC).encode())
    record = Container("job", "registry.example/job:1", "overlayfs", "key", spec).to_bytes()
    offer = {
        "record": base64.b64encode(record).decode(),
        "stdio": {"stdin": "", "stdout": "", "stderr": "", "terminal": False},
        "layers": ["sha256:" + "e" * 64],
        "flags": ["--tcp-established"],
        "staying": {},
    }
    return json.dumps(offer).encode()


def _migration_seed() -> bytes:
    body = {
        "apiVersion": "podferry.dev/v1alpha1",
        "kind": "Migration",
        "metadata": {"name": "m", "namespace": "default", "uid": "u"},
        "spec": {"podName": "job-0", "targetNode": "node-b", "mode": "live", "timeout": "10m", "maxDowntime": "1s"},
        "status": {
            "phase": "Running",
            "conditions": [
                {"type": "Completed", "status": "False", "reason": "x", "lastTransitionTime": "2026-01-02T00:00:00Z"}
            ],
        },
    }
    return json.dumps(body).encode()


def _request_seed() -> bytes:
    key = ec.derive_private_key(7, ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node-a")])
    )
    names = x509.SubjectAlternativeName([x509.DNSName("node-a")])
    request = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def _share_seeds() -> tuple[bytes, ...]:
    chain = "sha256:" + "e" * 64
    made: list[Any] = [
        layout.LayerRecord(
            chain=chain,
            form=next(iter(layout.FormName)),
            digest="d",
            bytes=1,
            inodes=1,
            node="n",
            token="t",
            created=1.0,
        ),
        layout.LeaseRecord("n", "t", 1),
        layout.NodeRecord("n", "i", frozenset({chain}), 1, 1.0),
        {"format": layout.FORMAT, "id": "x"},
        {"read": [[0, 5], [7, 9]]},
        {"since": 1.5},
    ]
    return tuple(layout.encode(one) for one in made)


_JSON = (
    b"null",
    b"{}",
    b"[]",
    b'""',
    b"1e999",
    b"-1",
    b"true",
    b"NaN",
    b'"\\ud800"',
    b"[" * 40,
    b'{"a":' * 40,
    b"[" * 3000,
)
_CAPS = (b'"CAP_SYS_ADMIN"', b'"hooks"', b'"bind"', b'"/proc"', b'"SCMP_ACT_ALLOW"', b'"path"', *_JSON)
_IMAGE_NAMES = ("inventory", "core-1", "ids-1", "mountpoints-13", "files", "cgroup", "ghost-file-1")


def _image_targets() -> list[Target]:
    magic = tuple(struct.pack("<I", one) for one in MAGIC.values())
    return [
        Target(
            f"CRIU's image {name}",
            _image(f"{name}.img"),
            ((IMAGES / f"{name}.img").read_bytes(),),
            (PeerMisbehaved,),
            magic,
        )
        for name in _IMAGE_NAMES
    ]


TARGETS: list[Target] = [
    Target("frames", _frames, _frame_seeds(), (PeerMisbehaved,), share=12),
    Target(
        "messages", lambda data, _: messages.decode(data), _message_seeds(), (PeerMisbehaved, Refused), _JSON, share=12
    ),
    Target("records of the upper layer", _records, _record_seeds(), (PeerMisbehaved,), (b"..", b"/", b"\0"), share=12),
    Target("journal", _journal, (_journal_seed(),), (Failed,), _JSON, share=2, files=("journal.jsonl",)),
    Target(
        "page maps", _page_maps, tuple((IMAGES / f"{one}.img").read_bytes() for one in ("pstree", "mm-1")), (), share=4
    ),
    Target("timers", _timers, ((IMAGES / "files.img").read_bytes(),), (PeerMisbehaved,), share=2, files=("files.img",)),
    Target("seccomp filters", _filter, ((HERE / "seccomp/containerd.filter").read_bytes(),), ()),
    Target(
        "seccomp programs",
        lambda data, _: seccomp_programs.program(data),
        ((HERE / "seccomp/containerd.filter").read_bytes(),),
        (PeerMisbehaved,),
        share=2,
    ),
    *_image_targets(),
    Target("OCI spec", _spec, (json.dumps(SPEC_WITH_PROFILE).encode(),), (NotStrict, Refused), _CAPS, share=4),
    Target("offer", _offer, (_offer_seed(),), (NotStrict, PeerMisbehaved, Refused), _JSON, share=4),
    Target("facts", _facts, _fact_seeds(), (NotStrict, PeerMisbehaved), _JSON, share=6),
    Target("Migration", _migration, (_migration_seed(),), (NotStrict, MigrationUnreadable), _JSON, share=4),
    Target("certificate request", _request, (_request_seed(),), (Refused,)),
    Target("records on the share", _share, _share_seeds(), (), _JSON, share=6),
    Target(
        "filter of snapshots", _filters, (b'name==x,labels."a/b"~=^y',), (UsageError,), (b'"', b"\\", b"~="), share=6
    ),
]
"""Everything that faces a peer, CRIU's images, the share or the API server, and reads bytes."""


def run(target: Target, data: bytes, directory: Path) -> None:
    """Read one input; an error of the target's own is an answer."""
    try:
        target.run(data, directory)
    except target.allowed as error:
        assert isinstance(error, PodferryError | NotStrict)

"""Files that the kubelet writes into a pod: ConfigMaps, Secrets, tokens, the downward API. What a job has open of them moves.

The kubelet writes each version of such a volume, its payload, into a directory named by the time, and turns the link `..data`
to it (pkg/volume/util/atomic_writer.go). Who reads `/scripts/run.sh` has `/scripts/..2026_11_28_01_45_00.1234/run.sh` open: a
shell as long as the script runs. The target's kubelet gives its own payload another name, and CRIU would look in vain. So what
is open is put beside it, under the source's name; the kubelet looks only after the payload that `..data` names.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from podferry.core.limits import OPEN_PAYLOADS
from podferry.errors import Failed, PeerMisbehaved
from podferry.node.cri import KUBELET, pod_directory
from podferry.node.upper import Receiver, TreePolicy, TreeSource

OPEN_FILES = "files.img"
"""CRIU's image that names every file that a process has open, mapped, or as its directory."""
MOST = OPEN_PAYLOADS.most
"""Bytes of content in one payload; the API server takes objects of up to 1 MiB, and a projected volume may join some."""

_PLUGINS = ("configmap", "secret", "projected", "downward-api")
_PLACE = re.compile(
    rf"kubernetes\.io~(?:{'|'.join(_PLUGINS)})/[a-z0-9](?:[-a-z0-9]{{0,61}}[a-z0-9])?/\.\.\d{{4}}(?:_\d\d){{5}}\.\d{{1,20}}"
)
_NAME = struct.Struct("<H")
_CHUNK = struct.Struct("<I")


def open_in(images: Iterable[bytes], uid: str, kubelet: Path = KUBELET) -> list[Path]:
    """The payloads of a pod in which anything is open, by CRIU's images OPEN_FILES of its containers."""
    there, found = list(_payloads(uid, kubelet)), set[Path]()
    for image in images:  # one at a time: each may be large
        found.update(one for one in there if one.name.encode() in image)
    return [one for one in there if one in found]


def _payloads(uid: str, kubelet: Path) -> Iterator[Path]:
    volumes = pod_directory(uid, kubelet) / "volumes"
    for plugin in _PLUGINS:
        with suppress(FileNotFoundError):
            for volume in sorted((volumes / f"kubernetes.io~{plugin}").iterdir()):
                yield from (one for one in sorted(volume.iterdir()) if _PLACE.fullmatch(_place(one)))


def _place(payload: Path) -> str:
    return "/".join(payload.parts[-3:])


def pack(payloads: Iterable[Path]) -> bytes:
    """These payloads as they travel. Raises `Failed` where one cannot be read."""
    parts, total = [], 0
    for one in payloads:
        name = _place(one).encode()
        parts += [_NAME.pack(len(name)), name]
        with TreeSource(one, TreePolicy(max_bytes=MOST)) as source:
            for chunk in source.send(source.plan(frozen=True)):
                total += len(chunk)
                OPEN_PAYLOADS.demand(total, "the pod")
                parts += [_CHUNK.pack(len(chunk)), chunk]
        parts.append(_CHUNK.pack(0))
    return b"".join(parts)


def unpack(data: bytes, uid: str, kubelet: Path = KUBELET) -> None:
    """Put payloads beside those of the pod `uid`, which its kubelet has written. What is there already stays as it is.

    Raises `PeerMisbehaved` for what no source sends, and `Failed` where the pod has no such volume.
    """
    volumes, rest = pod_directory(uid, kubelet) / "volumes", memoryview(data)
    while rest:
        name, rest = _taken(rest, _NAME)
        place = bytes(name).decode("ascii", "replace")
        if not _PLACE.fullmatch(place):
            raise PeerMisbehaved(f"{place[:200]!r} cannot be a payload of a volume")
        target = volumes / place
        if not target.parent.is_dir():
            raise Failed(f"the pod has no volume {target.parent.name} here", why=f"{target.parent} is not there")
        rest = _skipped(rest) if target.exists() else _received(rest, target)


def _received(rest: memoryview, target: Path) -> memoryview:
    target.mkdir(mode=0o700)
    with Receiver(target, TreePolicy(max_bytes=MOST)) as receiver:
        while True:
            chunk, rest = _taken(rest, _CHUNK)
            if not chunk:
                receiver.finish()
                return rest
            receiver.feed(chunk)


def _skipped(rest: memoryview) -> memoryview:
    while True:
        chunk, rest = _taken(rest, _CHUNK)
        if not chunk:
            return rest


def _taken(rest: memoryview, length: struct.Struct) -> tuple[memoryview, memoryview]:
    """What `length` announces, and what follows it."""
    if len(rest) >= length.size:
        end = length.size + length.unpack_from(rest)[0]
        if len(rest) >= end:
            return rest[length.size : end], rest[end:]
    raise PeerMisbehaved("payloads of volumes that end too early")

"""Do the mounts in CRIU's images show a container more than its spec does?

What somebody else mounts (`ext_key`) runc takes from the spec, by the key; CRIU fails for a key that runc did not name. The rest
CRIU mounts itself, as root: only file systems without a device, and, for who may not mount, only where the spec has a mount.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from podferry.core.allowed_rights import Rights
from podferry.protos import rights_pb2 as pb

_PROC, _SYSFS, _TMPFS, _DEVPTS, _CGROUP, _MQUEUE, _CGROUP2 = 1, 2, 5, 6, 12, 14, 23  # enum fstype of CRIU's mnt.proto
_OWN = frozenset({_PROC, _SYSFS, _TMPFS, _DEVPTS, _CGROUP, _MQUEUE, _CGROUP2})


def mounts_against(entries: Iterable[pb.MountEntry], rights: Rights) -> Iterator[str]:
    """Every reason against the mounts of one mount namespace."""
    seen = set()
    may_mount = rights.has("CAP_SYS_ADMIN")
    for one in entries:
        place = text(one.mountpoint)
        seen.add(place)
        where = f"the mount at {place[:80]!r}"
        for path in (place, text(one.root)):
            if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
                yield f"{where} has the path {path[:80]!r}"
        if one.with_plugin or one.fsname:
            yield f"{where} is of a kind that only plugins of CRIU's know"
        external = one.ext_mount or bool(one.ext_key)
        if place != "/" and not external:
            if one.fstype not in _OWN:
                yield f"{where} is of the kind {one.fstype}, which CRIU may not mount"
            if place not in rights.mounts and not may_mount:
                yield f"{where} is not in the spec"
        demanded = rights.mount_flags(place, of_a_group=one.fstype in (_CGROUP, _CGROUP2))
        if (lacking := demanded & ~(one.flags | one.sb_flags)) and not may_mount:
            yield f"{where} lacks the flags {lacking:#x} that the spec has"
    if (lost := sorted(rights.demanded - seen)) and not may_mount:
        yield f"nothing covers {', '.join(lost)}"


def text(value: bytes) -> str:
    """A name as the kernel has it: bytes, mostly UTF-8."""
    return value.decode("utf-8", "surrogateescape")

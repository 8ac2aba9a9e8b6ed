"""Do CRIU's images give a container more than its spec does? Read from what a peer sent, judged before the right to run passes.

Whatever is not known is refused: an image of another name, a field that CRIU up to 4.3 does not write in a message that decides.
What takes its time is done once: most threads have the same credentials, so these are judged by their bytes.
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from podferry.core.allowed_rights import NAMESPACES, Rights, bit
from podferry.core.allowed_spec import is_plain_device
from podferry.criu.dump_images import COMMON_MAGIC, messages_of, read_image
from podferry.criu.mount_images import mounts_against, text
from podferry.criu.seccomp import Filters
from podferry.errors import PeerMisbehaved
from podferry.protos import rights_pb2 as pb

Decoded = TypeVar("Decoded", bound=Message)

MAGIC: Final = {
    "inventory": 0x58313116,
    "core": 0x55053847,
    "ids": 0x54432030,
    "mountpoints": 0x55563928,
    "files": 0x56303138,
    "seccomp": 0x64413049,
    "cgroup": 0x59383330,
    "ghost-file": 0x52583605,
}
MOST_REASONS = 16

_NUMBERED = (
    "core|ids|mm|fdinfo|fs|pagemap|pagemap-shmem|pages|utsns|ipcns-var|ipcns-shm|ipcns-msg|ipcns-sem|timens|pidns|userns"
    "|mountpoints|netns"
)
_OF_A_NETWORK = "netdev|ifaddr|route|route6|rule|iptables|ip6tables|nftables|netns-ct|netns-exp"
_SINGLE = (
    "inventory|pstree|seccomp|cgroup|files|remap-fpath|pipes-data|fifo-data|sk-queues|eventpoll-tfd|tty-info|tty-data|filelocks"
    "|memfd"
)
_NAMES = re.compile(
    rf"({_NUMBERED}|{_OF_A_NETWORK})-[0-9]{{1,20}}\.img|(tmpfs|tmpfs-dev)-[0-9]{{1,20}}\.tar\.gz\.img"
    rf"|(ghost-file|tcp-stream)-[0-9a-f]{{1,16}}\.img|({_SINGLE})\.img|stats-dump|descriptors\.json|network\.json"
)
_NETWORK = re.compile(rf"({_OF_A_NETWORK})-[0-9]+\.img")
_PROPERTY = re.compile(rb"[a-z0-9_]+(\.[a-zA-Z0-9_]+)+|notify_on_release")
_SECURE_BITS, _KEEP_CAPS = 0xFF, 0x10
_REAL_TIME = frozenset({1, 2, 6})  # SCHED_FIFO, SCHED_RR, SCHED_DEADLINE
_SOCK_RAW = 3
_FILTERED = 2  # SECCOMP_MODE_FILTER
# By fd_types in CRIU's fdinfo.proto.
_REG, _INET, _PACKET, _FANOTIFY, _NS, _TUN, _BPF = 1, 4, 10, 12, 14, 15, 19
_KINDS = frozenset(range(1, 21)) - {16}  # without what a plugin of CRIU's restores
_NEEDED = {_PACKET: "CAP_NET_RAW", _FANOTIFY: "CAP_SYS_ADMIN", _TUN: "CAP_NET_ADMIN", _BPF: "CAP_SYS_ADMIN"}


def demand_no_more(images: Path, rights: Rights, *, also: Iterable[str] = ()) -> None:
    """Raise `PeerMisbehaved` where the images in `images` give more than `rights`. `also` are names of files that are no images."""
    if found := against(images, rights, also=frozenset(also)):
        raise PeerMisbehaved("CRIU's images give the container more than its spec", why="; ".join(found[:MOST_REASONS]))


def against(images: Path, rights: Rights, *, also: frozenset[str] = frozenset()) -> list[str]:
    """Every reason against these images. Raises `PeerMisbehaved` for what cannot be read."""
    names = sorted(path.name for path in images.iterdir())
    reasons = [
        f"there is no image called {name[:80]}" for name in names if name not in also and not _NAMES.fullmatch(name)
    ]
    if rights.namespaces.get("network"):  # the sandbox's; CRIU has nothing to make there
        reasons += [f"{name} would make a network" for name in names if _NETWORK.fullmatch(name)]
    inventory = _one(images / "inventory.img", pb.Inventory(), "inventory")
    host = inventory.root_ids
    if not inventory.HasField("root_ids"):
        reasons.append("the inventory does not say which namespaces are the node's")
    if inventory.compress:
        reasons.append("the memory in them is compressed, which podferry does not read")
    filters = Filters(_seccomp(images) if "seccomp.img" in names else pb.Seccomp(), rights.seccomp)
    reasons += filters.odd()
    judge = cache(lambda creds: tuple(creds_against(_parsed(pb.Creds(), creds, "credentials"), rights)))
    for name in filter(_NAMES.fullmatch, names):
        path, kind = images / name, name.partition("-")[0].removesuffix(".img")
        if name.startswith("core-"):
            core = _one(path, pb.Core(), "core")
            reasons += core_against(core, rights, filters)
            if core.thread_core.HasField("creds"):
                reasons += judge(core.thread_core.creds)
            if core.HasField("ids"):
                reasons += ids_against(core.ids, host, rights)
        elif kind == "ids":
            reasons += ids_against(_one(path, pb.KobjIds(), "ids"), host, rights)
        elif kind == "mountpoints":
            reasons += mounts_against((_parsed(pb.MountEntry(), one, name) for one in _all(path, kind)), rights)
        elif name == "files.img":
            reasons += files_against((_parsed(pb.FileEntry(), one, name) for one in _all(path, kind)), host, rights)
        elif name.startswith("ghost-file-"):
            reasons += ghost_against(_parsed(pb.GhostFile(), next(_all(path, "ghost-file"), b""), name))
        elif name == "cgroup.img":
            reasons += cgroup_against(_one(path, pb.Cgroup(), kind))
    return list(dict.fromkeys(reasons))


def core_against(core: pb.Core, rights: Rights, filters: Filters) -> Iterator[str]:
    """What a thread, and for the first of a process the process, has beside its credentials."""
    task, thread = core.tc, core.thread_core
    if core.HasField("tc"):
        if task.old_seccomp_mode or task.HasField("old_seccomp_filter"):
            yield "a process has a seccomp filter where CRIU 4 does not write it"
        least = rights.oom_score_adj
        if least is not None and task.oom_score_adj < least and not rights.has("CAP_SYS_RESOURCE"):
            yield f"a process has the oom_score_adj {task.oom_score_adj}, the spec {least}"
    if not core.HasField("thread_core"):
        return  # a zombie
    if not thread.HasField("creds"):
        yield "a thread has no credentials"
    if rights.seccomp and thread.seccomp_mode != _FILTERED:
        yield "a thread has no seccomp filter, which the spec demands"
    if thread.seccomp_mode == _FILTERED and (reason := filters.against_last(thread.seccomp_filter)):
        yield reason
    if thread.sched_policy in _REAL_TIME and not rights.has("CAP_SYS_NICE"):
        yield "a thread has real-time priority"


def creds_against(creds: pb.Creds, rights: Rights) -> Iterator[str]:
    """Ids, capabilities, secure bits and the security module's profile."""
    # Without no_new_privs a program with the set-uid bit may have given root's id, and what the bounding set leaves.
    gained = rights.permitted if rights.no_new_privileges else rights.bounding
    if not gained & bit("CAP_SETUID"):
        allowed = {rights.uid} if rights.no_new_privileges else {rights.uid, 0}
        if more := sorted({creds.uid, creds.euid, creds.suid, creds.fsuid} - allowed):
            yield f"a thread has the user ids {more}, and the container may not change its own"
    if not gained & bit("CAP_SETGID"):
        groups = {creds.gid, creds.egid, creds.sgid, creds.fsgid, *creds.groups}
        if more := sorted(groups - rights.gids - (set() if rights.no_new_privileges else {0})):
            yield f"a thread has the group ids {more[:8]}, and the container may not change its own"
    for what, words, most in (
        ("bounding", creds.cap_bnd, rights.bounding),
        ("inheritable", creds.cap_inh, rights.bounding),
        ("permitted", creds.cap_prm, gained),
        ("effective", creds.cap_eff, gained),
        ("ambient", creds.cap_amb, gained),
    ):
        if more_bits := _joined(words) & ~most:
            yield f"a thread has {what} capabilities beyond the spec's: {more_bits:#x}"
    if creds.secbits & ~(_SECURE_BITS if gained & bit("CAP_SETPCAP") else _KEEP_CAPS):
        yield f"a thread has the secure bits {creds.secbits:#x}"
    if rights.no_new_privileges and creds.no_new_privs != 1:
        yield "a thread may gain privileges, which the spec forbids"
    profile = text(creds.lsm_profile)
    if rights.apparmor and not (profile == rights.apparmor or profile.startswith(f"{rights.apparmor}//")):
        yield f"a thread has the profile {profile[:80] or 'unconfined'}, the spec {rights.apparmor}"
    if rights.selinux and profile != rights.selinux:
        yield f"a thread has the label {profile[:80] or 'none'}, the spec {rights.selinux}"
    if creds.lsm_sockcreate and text(creds.lsm_sockcreate) != rights.selinux:
        yield "a thread labels its sockets otherwise than the spec"
    if creds.apparmor_data:
        yield "a thread brings a policy of AppArmor's along"


def ids_against(ids: pb.KobjIds, host: pb.KobjIds, rights: Rights) -> Iterator[str]:
    """CRIU makes a namespace where a process' is not the node's; where it is, the process would be in this node's."""
    for kind, field in NAMESPACES.items():
        own = getattr(ids, field)
        if kind in rights.namespaces and (not own or own == getattr(host, field)):
            yield f"a process is in the node's {kind} namespace"
    if ids.files_id == host.files_id and host.files_id:
        yield "a process shares the descriptors of CRIU itself"


def files_against(files: Iterable[pb.FileEntry], host: pb.KobjIds, rights: Rights) -> Iterator[str]:
    """What is open. CRIU opens it as root, below the container's root; the group of the container bounds devices."""
    nodes_own = {getattr(host, field.name) for field in host.DESCRIPTOR.fields if field.name.endswith("_ns_id")} - {0}
    for one in files:
        if one.type not in _KINDS:
            yield f"a descriptor is of the kind {one.type}"
        if (needed := _NEEDED.get(one.type)) and not rights.has(needed):
            yield f"a descriptor of the kind {one.type} needs {needed}"
        if one.type == _INET and _is_raw(one.isk) and not rights.has("CAP_NET_RAW"):
            yield "a raw socket needs CAP_NET_RAW"
        if one.type == _NS and one.nsf.ns_id in nodes_own:
            yield "a descriptor is of the node's namespace"
        if one.type == _REG:
            path = text(one.reg.name)
            if "\0" in path or ".." in path.split("/"):
                yield f"an open file has the path {path[:80]!r}"
            if stat.S_ISBLK(one.reg.mode):
                yield f"{path[:80]!r} is a disk"


def ghost_against(ghost: pb.GhostFile) -> Iterator[str]:
    """A file that is open and has no name: CRIU makes it anew."""
    if stat.S_ISBLK(ghost.mode) or stat.S_ISCHR(ghost.mode):
        major, minor = (ghost.rdev & 0xFFF00) >> 8, ghost.rdev & 0xFF | ghost.rdev >> 12 & 0xFFF00
        if stat.S_ISBLK(ghost.mode) or not is_plain_device(major, minor):
            yield f"a deleted file is the device {major}:{minor}"


def cgroup_against(cgroup: pb.Cgroup) -> Iterator[str]:
    """CRIU moves processes into the groups that sets name; runc turns the roots of the controllers into the container's own."""
    roots: dict[bytes, list[str]] = {}
    for controller in cgroup.controllers:
        for name in controller.cnames:
            roots.setdefault(name, []).extend(text(one.dir_name).strip("/") for one in controller.dirs)
        for directory in controller.dirs:
            yield from _directory_against(directory, top=True)
    for each in cgroup.sets:
        for member in each.ctls:
            path = text(member.path).strip("/")
            inside = any(path == root or path.startswith(f"{root}/") for root in roots.get(member.name, []))
            if ".." in path.split("/") or not inside:
                yield f"a process belongs to the group {path[:80]!r}, which is not below the container's"


def _directory_against(directory: pb.CgroupDirectory, *, top: bool) -> Iterator[str]:
    waiting = [(directory, top)]
    while waiting:
        one, is_top = waiting.pop()
        name = text(one.dir_name)
        if ".." in name.split("/") or (not is_top and "/" in name.strip("/")):
            yield f"a group is called {name[:80]!r}"
        for own in one.properties:
            members = own.name in (b"tasks", b"cgroup.procs", b"cgroup.threads")  # listed for their owners' sake
            if own.value if members else not _PROPERTY.fullmatch(own.name):
                yield f"a group has the property {text(own.name)[:80]!r}"
        waiting += [(child, False) for child in one.children]


def _seccomp(images: Path) -> pb.Seccomp:
    return _one(images / "seccomp.img", pb.Seccomp(), "seccomp")


def _joined(words: Iterable[int]) -> int:
    return sum(word << 32 * number for number, word in enumerate(words))


def _one(path: Path, into: Decoded, kind: str) -> Decoded:
    found = list(_all(path, kind))
    if len(found) != 1:
        raise PeerMisbehaved(f"{path.name} has {len(found)} entries", why="CRIU writes exactly one")
    return _parsed(into, found[0], path.name)


def _all(path: Path, kind: str) -> Iterator[bytes]:
    data = read_image(path)
    if kind == "inventory":  # which alone has no common magic number before its own
        data = struct.pack("<I", COMMON_MAGIC) + data
    return messages_of(data, path.name, MAGIC[kind], first_alone=kind == "ghost-file")


def _parsed(into: Decoded, data: bytes, where: str) -> Decoded:
    """A message without fields, in it or in one within it, that this CRIU does not write."""
    try:
        into.ParseFromString(data)
    except DecodeError as error:
        raise PeerMisbehaved.because(f"{where} holds an invalid message", error) from error
    if not into.IsInitialized():
        raise PeerMisbehaved(f"{where} holds an invalid message", why="it lacks a field that CRIU always writes")
    size = into.ByteSize()
    into.DiscardUnknownFields()
    if into.ByteSize() != size:
        what = into.DESCRIPTOR.name
        raise PeerMisbehaved(f"{where} has fields that are not known", why=f"in a {what}, as a later CRIU may write")
    return into


def _is_raw(socket: bytes) -> bool:
    found = pb.InetSocket()
    try:
        found.ParseFromString(socket)
    except DecodeError as error:
        raise PeerMisbehaved.because("CRIU's image of a socket is invalid", error) from error
    return found.type == _SOCK_RAW

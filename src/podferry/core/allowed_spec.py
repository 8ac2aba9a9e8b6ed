"""The parts that an OCI runtime spec from a peer may have, as a list of allowed ones; the agent refuses all others with the reason.

Stand-alone, the target makes the container from the source's spec, as root. So a spec must not reach further than a container that
an ordinary `ctr run` makes: file systems of its own only, namespaces of its own, bounded capabilities and devices, and nothing by
which a program of this node is run or another's group, namespace or directory is entered. What `runc` (libcontainer/specconv) and
containerd's shim read of a spec was gone through for this; a field that is not known here is refused.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from podferry.core.allowed_syscalls import ACTIONS, OPERATORS

DEFAULT_CAPABILITIES = frozenset(
    {
        "CAP_AUDIT_WRITE",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    }
)
"""The capabilities that containerd gives every container (its oci/spec.go, defaultUnixCaps)."""

PLAIN_DEVICES = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)})
"""null, zero, full, random, urandom, tty, console, ptmx."""
PTS_MAJOR = 136
TUN = (10, 200)
"""containerd lets every container use it; whoever has no CAP_NET_ADMIN can do nothing with it."""

Json = Mapping[str, Any]

_TOP = {"ociVersion", "process", "root", "hostname", "domainname", "mounts", "annotations", "linux"}
_PROCESS = {
    "terminal",
    "consoleSize",
    "user",
    "args",
    "commandLine",
    "env",
    "cwd",
    "capabilities",
    "rlimits",
    "noNewPrivileges",
    "apparmorProfile",
    "oomScoreAdj",
    "selinuxLabel",
}
_LINUX = {
    "uidMappings",
    "gidMappings",
    "sysctl",
    "resources",
    "cgroupsPath",
    "namespaces",
    "devices",
    "seccomp",
    "rootfsPropagation",
    "maskedPaths",
    "readonlyPaths",
    "mountLabel",
    "personality",
}
_RESOURCES = {"devices", "memory", "cpu", "pids", "blockIO", "hugepageLimits", "network", "rdma", "unified"}
_SECCOMP = {"defaultAction", "defaultErrnoRet", "architectures", "flags", "syscalls"}

_NEW_NAMESPACES = {"pid", "ipc", "uts", "mount", "network"}
_MAY_BE_NEW = _NEW_NAMESPACES | {"cgroup", "user", "time"}

# Where each kind of file system may be, None for anywhere. proc and sysfs elsewhere would show what is masked in their places.
_FILE_SYSTEMS: dict[str, frozenset[str] | None] = {
    "proc": frozenset({"/proc"}),
    "sysfs": frozenset({"/sys"}),
    "cgroup": frozenset({"/sys/fs/cgroup"}),
    "cgroup2": frozenset({"/sys/fs/cgroup"}),
    "devpts": frozenset({"/dev/pts"}),
    "mqueue": frozenset({"/dev/mqueue"}),
    "tmpfs": None,
}
_OWN_FILES = frozenset({"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"})
"""Files of each node that may be mounted read-only, from and to the same place."""
_NOT_COVERED = ("/proc", "/sys")
_OPTIONS = frozenset(
    {
        *(
            "ro",
            "rw",
            "nosuid",
            "suid",
            "nodev",
            "noexec",
            "exec",
            "sync",
            "async",
            "dirsync",
            "newinstance",
            "tmpcopyup",
        ),
        *("relatime", "norelatime", "noatime", "atime", "strictatime", "nostrictatime", "nodiratime", "diratime"),
        *("private", "rprivate", "slave", "rslave", "unbindable", "runbindable"),
    }
)
_SETTING = re.compile(r"(mode|ptmxmode|uid|gid|size|nr_inodes|nr_blocks|huge)=[A-Za-z0-9%]{1,20}")

_MASKED = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware")
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_SYSCTL = re.compile(
    r"net\.[\w./-]{1,200}|fs\.mqueue\.\w{1,64}|kernel\.(msgmax|msgmnb|msgmni|sem|shmall|shmmax|shmmni|shm_rmid_forced|domainname)"
)
_UNIFIED = re.compile(r"(cpu|cpuset|io|memory|pids|hugetlb|rdma|misc)\.[\w.]{1,64}")
# runc takes CRIU's settings and systemd's properties from annotations, containerd the shim that a container is put into.
_ANNOTATIONS_READ = ("org.criu.", "org.systemd.", "run.oci.", "io.containerd.", "io.kubernetes.", "podferry.dev/")
_SLICES = ("", "system.slice", "user.slice", "machine.slice")
_MOST = 256


def against(spec: Any, *, id: str, namespace: str, capabilities: frozenset[str]) -> list[str]:
    """Every reason why this node does not make a container from `spec`; none where it may.

    `id` is the container's, `namespace` containerd's; `capabilities` are those that the operator lets containers of peers have.
    """
    if not isinstance(spec, dict):
        return ["it is no object"]
    return list(
        dict.fromkeys(
            (
                *_unknown("the spec", spec, _TOP),
                *_root(_object(spec, "root")),
                *_process(_object(spec, "process"), capabilities),
                *_mounts(spec.get("mounts")),
                *_annotations(_object(spec, "annotations")),
                *_linux(_object(spec, "linux"), id, namespace),
            )
        )
    )


def _root(root: Json) -> Iterator[str]:
    yield from _unknown("root", root, {"path", "readonly"})
    if root.get("path") != "rootfs":
        yield f"its root is {_show(root.get('path'))}, not that of its bundle"


def _process(process: Json, allowed: frozenset[str]) -> Iterator[str]:
    yield from _unknown("process", process, _PROCESS)
    sets = _object(process, "capabilities")
    yield from _unknown("capabilities", sets, {"bounding", "effective", "inheritable", "permitted", "ambient"})
    asked = [one for each in sets.values() for one in (each if isinstance(each, list) else [each]) if one is not None]
    if more := sorted({one if isinstance(one, str) else repr(one) for one in asked} - allowed):
        yield f"it has capabilities beyond those allowed here: {', '.join(map(_show, more[:8]))}"
    adjustment = process.get("oomScoreAdj")
    if adjustment is not None and not (isinstance(adjustment, int) and 0 <= adjustment <= 1000):
        yield f"its oomScoreAdj is {_show(adjustment)}: others would be killed in its place"


def _mounts(mounts: Any) -> Iterator[str]:
    if mounts is None:
        return
    if not isinstance(mounts, list) or len(mounts) > _MOST:
        yield "its mounts are no list, or too many"
        return
    for mount in mounts:
        if not isinstance(mount, dict):
            yield "a mount is no object"
            continue
        yield from _mount(mount)


def _mount(mount: Json) -> Iterator[str]:
    kind, place, source, options = (mount.get(name) for name in ("type", "destination", "source", "options"))
    where = f"the mount at {_show(place)}"
    yield from _unknown(where, mount, {"type", "destination", "source", "options"})
    if not is_plain_path(place) or place == "/":
        yield f"{where} is not at a plain absolute path"
        return
    options = [] if options is None else options
    if not isinstance(options, list) or not all(isinstance(one, str) for one in options):
        yield f"{where} has options that are no texts"
        return
    if kind == "bind" or {"bind", "rbind"} & set(options):
        if not (place == source and place in _OWN_FILES and "ro" in options and "rw" not in options):
            yield f"{where} is {_show(source)} of this node"
        odd = set(options) - _OPTIONS - {"bind", "rbind"}
    else:
        places = _FILE_SYSTEMS.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
        if places is not None and place not in places:
            yield f"{where} is of type {_show(kind)}, which may not be there"
        elif places is None and any(_is_below(str(place), one) for one in _NOT_COVERED):
            yield f"{where} covers what the kernel shows there"
        if source is not None and (not isinstance(source, str) or "/" in source):
            yield f"{where} has the source {_show(source)}"
        odd = {one for one in options if one not in _OPTIONS and not _SETTING.fullmatch(one)}
    if odd:
        yield f"{where} has options that are not allowed: {', '.join(map(_show, sorted(odd)[:8]))}"


def _annotations(annotations: Json) -> Iterator[str]:
    for name, value in annotations.items():
        if not name or name.lower().startswith(_ANNOTATIONS_READ):
            yield f"its annotation {_show(name)} would be read by programs of this node"
        if not isinstance(value, str):
            yield f"its annotation {_show(name)} is no text"


def _linux(linux: Json, id: str, namespace: str) -> Iterator[str]:
    yield from _unknown("linux", linux, _LINUX)
    yield from _namespaces(linux.get("namespaces"))
    yield from _devices(linux.get("devices"))
    yield from _resources(_object(linux, "resources"))
    group = linux.get("cgroupsPath")
    if not (isinstance(group, str) and _is_own_group(group, id, namespace)):
        yield f"its group is {_show(group)}, not /{namespace}/{id}"
    if linux.get("rootfsPropagation") not in (None, "", "private", "rprivate", "slave", "rslave", "unbindable"):
        yield f"its root's mounts would show on the node: {_show(linux.get('rootfsPropagation'))}"
    yield from _seccomp(_object(linux, "seccomp"))
    for name, demanded in (("maskedPaths", _MASKED), ("readonlyPaths", _READ_ONLY)):
        said = linux.get(name)
        if not isinstance(said, list) or (lacking := [one for one in demanded if one not in said]):
            yield f"{name} lacks {', '.join(lacking if isinstance(said, list) else demanded)}"
    for name in _object(linux, "sysctl"):
        if not _SYSCTL.fullmatch(name):
            yield f"the setting {_show(name)} is the whole node's"


def _seccomp(seccomp: Json) -> Iterator[str]:
    """That runc reads it as `allowed_syscalls` does."""
    yield from _unknown("seccomp", seccomp, _SECCOMP)  # a listener is a program of the node's
    entries = seccomp.get("syscalls")
    if entries and not isinstance(entries, list):
        yield "its system calls are no list"
        return
    architectures = seccomp.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(one, str) for one in architectures):
        yield "its architectures are no list of names"
    for entry in entries or []:
        if not isinstance(entry, dict):
            yield "a rule for system calls is no object"
            continue
        yield from _unknown("a rule for system calls", entry, {"names", "action", "errnoRet", "args"})
        names, arguments = entry.get("names"), entry.get("args") or []
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            yield "a rule for system calls names none"
        if not isinstance(arguments, list) or not all(_is_condition(one) for one in arguments):
            yield "a rule for system calls has a condition that is none"
    for action in (
        seccomp.get("defaultAction"),
        *(one.get("action") for one in entries or [] if isinstance(one, dict)),
    ):
        if not (isinstance(action, str) and action in ACTIONS) and seccomp:
            yield f"there is no action {_show(action)} for system calls"


def _is_condition(condition: Any) -> bool:
    return (
        isinstance(condition, dict)
        and set(condition) <= {"index", "value", "valueTwo", "op"}
        and isinstance(operator := condition.get("op"), str)
        and operator in OPERATORS
        and type(index := condition.get("index", 0)) is int
        and 0 <= index < 6
        and all(type(value := condition.get(one, 0)) is int and 0 <= value < 1 << 64 for one in ("value", "valueTwo"))
    )


def _namespaces(namespaces: Any) -> Iterator[str]:
    found = namespaces if isinstance(namespaces, list) else []
    if not all(isinstance(one, dict) for one in found):
        yield "a namespace is no object"
        return
    kinds = [one.get("type") for one in found]
    for one in found:
        if one.get("path"):
            yield f"it wants to join {_show(one.get('path'))}"
        if not isinstance(one.get("type"), str) or one["type"] not in _MAY_BE_NEW or set(one) - {"type", "path"}:
            yield f"there is no namespace {_show(one.get('type'))}"
    if lacking := sorted(_NEW_NAMESPACES - {one for one in kinds if isinstance(one, str)}):
        yield f"it shares the node's namespaces: {', '.join(lacking)}"


def _devices(devices: Any) -> Iterator[str]:
    for device in devices if isinstance(devices, list) else [devices] if devices else []:
        if isinstance(device, dict):
            yield from _unknown("a device", device, {"path", "type", "major", "minor", "fileMode", "uid", "gid"})
        known = isinstance(device, dict) and is_plain_device(device.get("major"), device.get("minor"))
        if not known or not is_plain_path(device.get("path")) or not _is_below(device["path"], "/dev"):
            yield f"it wants the device {_show(device.get('path') if isinstance(device, dict) else device)}"


def _resources(resources: Json) -> Iterator[str]:
    yield from _unknown("resources", resources, _RESOURCES)
    rules = resources.get("devices")
    for rule in rules if isinstance(rules, list) else [rules] if rules else []:
        if not isinstance(rule, dict):
            yield "a rule for devices is no object"
            continue
        yield from _unknown("a rule for devices", rule, {"allow", "type", "major", "minor", "access"})
        if rule.get("allow") is not False and not _is_allowed_rule(rule):
            yield f"it may use the devices {_show(rule.get('type'))} {_show(rule.get('major'))}:{_show(rule.get('minor'))}"
    for name in _object(resources, "unified"):
        if not _UNIFIED.fullmatch(name):
            yield f"the setting {_show(name)} of its group is not allowed"


def _is_allowed_rule(rule: Json) -> bool:
    """Use of devices that every container has. To make a node of any device (`m`) is no use of it."""
    kind, major, minor, access = (rule.get(name) for name in ("type", "major", "minor", "access"))
    if access == "m":
        return True
    every_terminal = major == PTS_MAJOR and minor in (None, -1)
    return kind == "c" and (is_plain_device(major, minor) or (major, minor) == TUN or every_terminal)


def is_plain_device(major: Any, minor: Any) -> bool:
    """Whether every container has this device. `True` is no number."""
    return type(major) is int and type(minor) is int and ((major, minor) in PLAIN_DEVICES or major == PTS_MAJOR)


def is_plain_path(path: Any) -> bool:
    """Whether this is an absolute path that needs no resolving: no `..`, no double slash, no character of control."""
    return (
        isinstance(path, str)
        and path.startswith("/")
        and not path.startswith("//")
        and len(path) < 4096
        and path.isprintable()
        and posixpath.normpath(path) == path
    )


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")


def _is_own_group(group: str, id: str, namespace: str) -> bool:
    if group == f"/{namespace}/{id}":
        return True
    slice, _, rest = group.partition(":")
    prefix, _, name = rest.partition(":")
    return name == id and slice in _SLICES and re.fullmatch(r"[A-Za-z0-9-]{1,64}", prefix) is not None


def _unknown(where: str, found: Json, known: set[str]) -> Iterator[str]:
    # What is null, empty or false asks for nothing: containerd writes some such fields. But Go's JSON takes `Hooks` for `hooks`.
    nothing: tuple[Any, ...] = (None, "", [], {}, False)
    folded = {name.lower() for name in known}
    odd = [one for one in found if one not in known]
    odd = [one for one in odd if found[one] not in nothing or not one.isascii() or one.lower() in folded]
    if odd:
        yield f"{where} has what is not allowed: {', '.join(map(_show, sorted(odd)[:8]))}"


def _object(of: Json, name: str) -> dict[str, Any]:
    found = of.get(name)
    return found if isinstance(found, dict) else {} if not found else {"": found}


def _show(value: Any) -> str:
    return repr(value)[:80] if not isinstance(value, str) or not value.isprintable() else value[:80]

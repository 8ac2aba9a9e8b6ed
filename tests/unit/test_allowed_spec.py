"""What an OCI spec of a peer's may ask of the target: the table of attacks, each a spec that is otherwise an ordinary one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podferry.core.allowed_spec import DEFAULT_CAPABILITIES, against, is_plain_path
from podferry.node.records import RUNC_V2, Container, Opaque
from podferry.protos import runc_pb2
from podferry.workload.offered import OPTIONS_TYPE, OfferedContainer

pytestmark = pytest.mark.unit

Json = dict[str, Any]

CAPABILITIES = sorted(DEFAULT_CAPABILITIES)
DEVICES = [(1, 3), (1, 8), (1, 7), (5, 0), (1, 5), (1, 9), (5, 1), (136, None), (5, 2), (10, 200)]
SPEC: Json = {  # as containerd 2 writes it for `ctr run`
    "ociVersion": "1.2.0",
    "process": {
        "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
        "args": ["train", "--epochs=100"],
        "env": ["PATH=/usr/bin:/bin"],
        "cwd": "/",
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": True,
    },
    "root": {"path": "rootfs"},
    "mounts": [
        {
            "destination": "/proc",
            "type": "proc",
            "source": "proc",
            "options": ["nosuid", "noexec", "nodev"],
        },
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        },
        {
            "destination": "/dev/mqueue",
            "type": "mqueue",
            "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"],
        },
        {
            "destination": "/sys",
            "type": "sysfs",
            "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"],
        },
        {
            "destination": "/run",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
    ],
    "linux": {
        "resources": {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "access": "m"},
                {"allow": True, "type": "b", "access": "m"},
                *(
                    {"allow": True, "type": "c", "major": major, "access": "rwm"}
                    | ({} if minor is None else {"minor": minor})
                    for major, minor in DEVICES
                ),
            ]
        },
        "cgroupsPath": "/default/job",
        "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
        "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    },
}


def judged(spec: Any) -> list[str]:
    return against(spec, id="job", namespace="default", capabilities=DEFAULT_CAPABILITIES)


def changed(place: str, value: Any) -> Json:
    """The ordinary spec with `value` at `place`; a place that ends with `+` is a list that gets one more."""
    spec = copy.deepcopy(SPEC)
    *path, last = place.rstrip("+").split("/")
    at = spec
    for name in path:
        at = at.setdefault(name, {})
    at[last] = [*at.get(last, []), value] if place.endswith("+") else value
    return spec


def without(place: str) -> Json:
    spec = copy.deepcopy(SPEC)
    *path, last = place.split("/")
    at = spec
    for name in path:
        at = at[name]
    del at[last]
    return spec


def mount(destination: Any, type: Any = "tmpfs", source: Any = "tmpfs", *options: Any) -> Json:
    return changed("mounts+", {"destination": destination, "type": type, "source": source, "options": list(options)})


def test_an_ordinary_container_is_made() -> None:
    assert judged(SPEC) == []


@pytest.mark.parametrize(
    "spec",
    [
        changed("linux/namespaces+", {"type": "cgroup"}),
        changed("process/noNewPrivileges", False),
        changed("process/user", {"uid": 1000, "gid": 1000}),
        changed("process/oomScoreAdj", 500),
        changed("process/rlimits", None),
        changed("hostname", "job"),
        changed("linux/cgroupsPath", "system.slice:nerdctl:job"),
        changed("linux/seccomp", {"defaultAction": "SCMP_ACT_ERRNO", "architectures": [], "syscalls": []}),
        changed("linux/resources/memory", {"limit": 1 << 30}),
        changed("linux/resources/unified", {"memory.high": "1073741824"}),
        changed("linux/sysctl", {"net.ipv4.ip_unprivileged_port_start": "0"}),
        changed("annotations", {"org.example/experiment": "7"}),
        changed("hooks", {}),
        changed("hooks", None),
        mount("/scratch", "tmpfs", "tmpfs", "size=1g", "mode=1777"),
        mount("/etc/hosts", "bind", "/etc/hosts", "rbind", "ro"),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro", "nosuid"),
    ],
)
def test_what_containers_ask_for_is_allowed(spec: Json) -> None:
    assert judged(spec) == []


ATTACKS: dict[str, Any] = {
    "hooks run programs as root": changed("hooks", {"createRuntime": [{"path": "/bin/sh"}]}),
    "a virtual machine's settings": changed("vm", {"kernel": {"path": "/x"}}),
    "a root elsewhere": changed("root/path", "/"),
    "a root above its bundle": changed("root/path", "rootfs/../../.."),
    "no root": without("root"),
    "the node's root under a place of the kubelet's": mount("/dev/shm", "bind", "/", "rbind", "rw"),
    "the node's root as its own hosts file": mount("/etc/hosts", "bind", "/", "rbind", "ro"),
    "the node's hosts file to be written": mount("/etc/hosts", "bind", "/etc/hosts", "rbind", "rw"),
    "and by leaving out ro": mount("/etc/hosts", "bind", "/etc/hosts", "rbind"),
    "a bind that calls itself tmpfs": mount("/x", "tmpfs", "/etc", "bind"),
    "a bind without a type": mount("/x", None, "/etc", "rbind"),
    "a disk": mount("/x", "ext4", "/dev/vda1"),
    "an overlay of the node's directories": mount("/x", "overlay", "overlay", "lowerdir=/:/etc"),
    "a share": mount("/x", "nfs", "server:/"),
    "a file system in user space": mount("/x", "fuse", "none", "fd=3"),
    "the kernel's debugging": mount("/x", "debugfs", "debugfs"),
    "the kernel's security": mount("/x", "securityfs", "securityfs"),
    "a second proc, unmasked": mount("/x", "proc", "proc"),
    "a second sysfs": mount("/x", "sysfs", "sysfs"),
    "the node's devices": mount("/x", "devtmpfs", "devtmpfs"),
    "a tmpfs over what is read-only": mount("/proc/sys"),
    "a source that is a path": mount("/x", "tmpfs", "/dev/vda1"),
    "a destination with dots": mount("/x/../../proc/sys"),
    "a destination that is relative": mount("proc/sys"),
    "the root itself": mount("/"),
    "a mount that spreads": mount("/x", "tmpfs", "tmpfs", "rshared"),
    "an option of the security module's": mount("/x", "tmpfs", "tmpfs", "context=unconfined_u"),
    "an option with a comma": mount("/x", "tmpfs", "tmpfs", "size=1,mode=7"),
    "ids mapped": changed(
        "mounts+", {"destination": "/x", "type": "tmpfs", "source": "t", "uidMappings": [{"hostID": 0}]}
    ),
    "mounts that are none": changed("mounts", [7]),
    "mounts that are no list": changed("mounts", {"a": 1}),
    "CRIU's settings, and with them its action script": changed("annotations", {"org.criu.config": "/var/log/x"}),
    "systemd's properties": changed("annotations", {"org.systemd.property.AllowedCPUs": "'0'"}),
    "the shim of another's sandbox": changed("annotations", {"io.kubernetes.cri.sandbox-id": "victim"}),
    "the shim of another's group": changed("annotations", {"io.containerd.runc.v2.group": "victim"}),
    "all capabilities": changed("process/capabilities/bounding", [*CAPABILITIES, "CAP_SYS_ADMIN"]),
    "one that is ambient": changed("process/capabilities/ambient", ["CAP_SYS_PTRACE"]),
    "one that is inheritable": changed("process/capabilities/inheritable", ["CAP_NET_ADMIN"]),
    "one in small letters": changed("process/capabilities/effective", ["cap_sys_admin"]),
    "sets of another name": changed("process/capabilities/boundless", ["CAP_CHOWN"]),
    "sets that are no lists": changed("process/capabilities/effective", "CAP_SYS_ADMIN"),
    "never killed for memory": changed("process/oomScoreAdj", -1000),
    "a processor of its own": changed("process/scheduler", {"policy": "SCHED_FIFO", "priority": 99}),
    "priority for its disk": changed("process/ioPriority", {"class": "IOPRIO_CLASS_RT"}),
    "the node's processes": changed("linux/namespaces", [{"type": "mount"}]),
    "no namespaces at all": without("linux/namespaces"),
    "another's namespace": changed("linux/namespaces+", {"type": "network", "path": "/proc/1/ns/net"}),
    "a namespace that there is not": changed("linux/namespaces+", {"type": "mnt"}),
    "another's group": changed("linux/cgroupsPath", "/default/victim"),
    "a group below another's": changed("linux/cgroupsPath", "/kubepods/victim/job"),
    "a group above": changed("linux/cgroupsPath", "/default/../../job"),
    "a slice of the system's": changed("linux/cgroupsPath", "kubepods.slice:x:job"),
    "no group": without("linux/cgroupsPath"),
    "a disk's device": changed("linux/devices+", {"path": "/dev/vda", "type": "b", "major": 253, "minor": 0}),
    "a device beside /dev": changed("linux/devices+", {"path": "/etc/x", "type": "c", "major": 1, "minor": 3}),
    "the node's memory": changed("linux/devices+", {"path": "/dev/mem", "type": "c", "major": 1, "minor": 1}),
    "every device": changed("linux/resources/devices", [{"allow": True, "access": "rwm"}]),
    "one disk": changed(
        "linux/resources/devices+", {"allow": True, "type": "b", "major": 253, "minor": 0, "access": "r"}
    ),
    "every character device": changed("linux/resources/devices+", {"allow": True, "type": "c", "access": "rw"}),
    "rules for devices that are no list": changed("linux/resources/devices", {"allow": True, "access": "rwm"}),
    "a rule that says neither": changed("linux/resources/devices+", {"type": "a", "access": "rwm"}),
    "a number that is a word": changed(
        "linux/resources/devices+", {"allow": True, "type": "c", "major": True, "minor": 3, "access": "rw"}
    ),
    "a setting of the node's": changed("linux/sysctl", {"kernel.core_pattern": "|/bin/sh"}),
    "a file outside its group": changed("linux/resources/unified", {"../cgroup.procs": "1"}),
    "a file of the group that moves processes": changed("linux/resources/unified", {"cgroup.procs": "1"}),
    "mounts that show on the node": changed("linux/rootfsPropagation", "shared"),
    "a listener for system calls": changed("linux/seccomp", {"defaultAction": "A", "listenerPath": "/run/x.sock"}),
    "rules for system calls that are none": changed(
        "linux/seccomp",
        {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": "mount", "action": "SCMP_ACT_ALLOW"}]},
    ),
    "an action that there is not": changed("linux/seccomp", {"defaultAction": "SCMP_ACT_MAYBE"}),
    "a condition on a seventh argument": changed(
        "linux/seccomp",
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [
                {
                    "names": ["clone"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
    ),
    "the node's network devices": changed("linux/netDevices", {"eth0": {"name": "eth0"}}),
    "cache of the processor": changed("linux/intelRdt", {"closID": "x"}),
    "nothing masked": changed("linux/maskedPaths", []),
    "no word on what is masked": without("linux/maskedPaths"),
    "settings to be written": changed("linux/readonlyPaths", ["/proc/bus"]),
    "hooks as Go reads them": changed("Hooks", {"createRuntime": [{"path": "/bin/sh"}]}),
    "nothing masked, as Go reads it": changed("linux/MaskedPaths", []),
    "nothing masked, in letters that Go folds": changed("linux/ma\u017fkedPaths", []),
    "a rule that Go turns round": changed("linux/resources/devices+", {"allow": False, "Allow": True, "access": "rw"}),
    "CRIU's settings in capitals": changed("annotations", {"Org.Criu.config": "/x"}),
    "no object": [],
    "a text": "spec",
    "nothing": None,
    "nothing in it": {},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_reaches_further_is_refused(attack: str) -> None:
    assert judged(ATTACKS[attack])


def test_capabilities_are_the_operators_to_allow() -> None:
    more = changed("process/capabilities/effective", ["CAP_SYS_PTRACE"])
    assert against(more, id="job", namespace="default", capabilities=DEFAULT_CAPABILITIES | {"CAP_SYS_PTRACE"}) == []
    assert "CAP_SYS_PTRACE" in judged(more)[0]


def test_a_path_is_plain_or_not() -> None:
    for path in ("/", "/a", "/a/b.c"):
        assert is_plain_path(path)
    for other in ("", "a", "//a", "/a/", "/a//b", "/a/.", "/../a", "/a\n", "/a\0", 7, None, "/" + "a" * 5000):
        assert not is_plain_path(other)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
places = st.sampled_from(
    [
        "process",
        "root",
        "mounts",
        "mounts+",
        "annotations",
        "linux",
        "hooks",
        "process/capabilities",
        "process/capabilities/bounding",
        "process/oomScoreAdj",
        "linux/namespaces",
        "linux/namespaces+",
        "linux/devices",
        "linux/devices+",
        "linux/resources",
        "linux/resources/devices+",
        "linux/resources/unified",
        "linux/seccomp",
        "linux/seccomp/syscalls",
        "linux/seccomp/syscalls+",
        "linux/sysctl",
        "linux/cgroupsPath",
        "linux/maskedPaths",
    ]
)


def check_whatever(place: str, value: Any) -> None:
    """A judgement, never another error; and what is not the kind of thing that belongs there is not waved through."""
    reasons = judged(changed(place, value))
    assert all(isinstance(one, str) and one.isprintable() for one in reasons)
    if place in ("process", "linux", "root", "annotations") and value and not isinstance(value, dict):
        assert reasons


@given(places, anything)
def test_whatever_a_peer_sends_there_is_a_judgement(place: str, value: Any) -> None:
    check_whatever(place, value)


@pytest.mark.slow
@settings(max_examples=200_000)
@given(places, anything)
def test_whatever_a_peer_sends_there_is_a_judgement_at_length(place: str, value: Any) -> None:
    check_whatever(place, value)


@given(anything)
def test_anything_else_than_a_spec_is_refused(value: Any) -> None:
    assert judged(value)


# The record around the spec.


def record(**fields: Any) -> Container:
    options = runc_pb2.Options(
        binary_name="/evil/runc",
        root="/run/victim",
        shim_cgroup="/kubepods",
        criu_image_path="/evil",
        criu_work_path="/evil",
        io_uid=7,
        no_pivot_root=True,
        no_new_keyring=True,
        systemd_cgroup=True,
    )
    base = Container(
        "job",
        "registry.example/job:1",
        "overlayfs",
        "another's-key",
        Opaque("some.other/type", json.dumps(SPEC).encode()),
        options=Opaque(OPTIONS_TYPE, options.SerializeToString()),
        labels={"containerd.io/gc.root": "x", "io.kubernetes.pod.uid": "victim", "team": "physics"},
        extensions={"io.cri-containerd.container.metadata": Opaque("x", b"y")},
    )
    return replace(base, **fields)


def test_the_record_is_made_anew() -> None:
    here = OfferedContainer(record()).record_here(Path("/here/podferry-runc"))
    assert here.options is not None
    assert here.runc_options() == runc_pb2.Options(binary_name="/here/podferry-runc", systemd_cgroup=True)
    assert (here.runtime, here.snapshot_key, here.sandbox) == (RUNC_V2, "job", "")
    assert (here.labels, here.extensions) == ({"team": "physics"}, {})
    assert here.spec_json() == SPEC
    assert here.spec.type_url == "types.containerd.io/opencontainers/runtime-spec/1/Spec"


def test_of_a_field_that_stands_there_twice_one_is_left() -> None:
    """Go's JSON would put both together; what was judged is what is made."""
    text = json.dumps(SPEC)[:-1] + ', "root": {"readonly": true, "path": "rootfs"}}'
    here = OfferedContainer(record(spec=Opaque("x", text.encode()))).record_here(Path("/here/podferry-runc"))
    assert here.spec.value.count(b'"root"') == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"runtime": "io.containerd.runc.v1"},
        {"runtime": "/tmp/shim"},
        {"sandbox": "victim"},
        {"snapshotter": "../overlayfs"},
        {"snapshotter": ""},
        {"image": "a b"},
        {"image": "x" * 1000},
        {"spec": Opaque("x", b"{}")},
    ],
)
def test_a_record_that_names_what_it_may_not_is_refused(fields: Json) -> None:
    allowed: Callable[[Container], Any] = lambda one: OfferedContainer(one).against(  # noqa: E731
        namespace="default", capabilities=DEFAULT_CAPABILITIES
    )
    assert allowed(record()) == []
    assert allowed(record(**fields))

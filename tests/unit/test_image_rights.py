"""CRIU's images as input from a peer: the real images of a real job, and every way in which they could say more than its spec.

`criu_images/` is what CRIU 4.1 wrote of the lab's job `family` under runc 1.1, without its memory.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from podferry.core.allowed_rights import CAPABILITIES, Rights, rights_of
from podferry.criu.dump_images import messages_of
from podferry.criu.incoming import Incoming
from podferry.criu.oom_score import raise_to_spec
from podferry.criu.rights import MAGIC, against, demand_no_more
from podferry.engine.journal import Journal, Part
from podferry.errors import PeerMisbehaved
from podferry.node.records import Container, Opaque
from podferry.protos import rights_pb2 as pb
from podferry.wire.messages import StateEnd
from podferry.workload import target_container
from podferry.workload.config import Config
from podferry.workload.makers.containerd import ContainerdContainer
from podferry.workload.makers.kubelet import KubeletContainer
from podferry.workload.offered import LAST_WORDS, PAYLOADS, OfferedContainer, PodPart
from podferry.workload.target_container import TargetContainer

pytestmark = pytest.mark.unit

REAL = Path(__file__).with_name("criu_images")
COMMON = struct.pack("<I", 0x54564319)
SPEC: dict[str, Any] = json.loads((REAL / "spec.json").read_text())
FIRST = "core-1.img"

Change = Callable[[Any], object]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return copied(tmp_path / "images")


def copied(to: Path) -> Path:
    shutil.copytree(REAL, to)
    (to / "spec.json").unlink()
    return to


def rights(exists: Callable[[str], bool] = lambda path: path != "/proc/kcore", **changes: Any) -> Rights:
    """What the real spec grants on a node such as the one that the images are of; with `process` or `linux` changed."""
    spec = copy.deepcopy(SPEC)
    for part, change in changes.items():
        spec[part] |= change
    return rights_of(spec, exists, "x86_64")


def kind_of(name: str) -> str:
    return "ghost-file" if name.startswith("ghost-file") else name.removesuffix(".img").partition("-")[0]


def read(path: Path) -> list[bytes]:
    kind = kind_of(path.name)
    return list(messages_of(COMMON * (kind == "inventory") + path.read_bytes(), path.name, MAGIC[kind]))


def write(path: Path, messages: list[bytes]) -> None:
    kind = kind_of(path.name)
    head = (b"" if kind == "inventory" else COMMON) + struct.pack("<I", MAGIC[kind])
    path.write_bytes(head + b"".join(struct.pack("<I", len(one)) + one for one in messages))


def alter(path: Path, kind: type[Message], change: Change) -> None:
    """Apply `change` to every message of an image."""
    parsed = []
    for data in read(path):
        message = kind()
        message.ParseFromString(data)
        change(message)
        parsed.append(message.SerializePartialToString())
    write(path, parsed)


def add(path: Path, message: Message) -> None:
    write(path, [*read(path), message.SerializeToString()])


def test_what_criu_wrote_of_a_real_job_is_no_more_than_its_spec(images: Path) -> None:
    assert against(images, rights()) == []
    demand_no_more(images, rights())
    assert len(list(images.glob("core-*.img"))) > 5


def test_processes_are_raised_to_the_oom_score_that_the_spec_here_says(images: Path) -> None:
    def scores() -> dict[str, int]:
        found = {}
        for path in images.glob("core-*.img"):
            (core,) = (pb.Core.FromString(data) for data in read(path))
            if core.HasField("tc"):
                found[path.name] = core.tc.oom_score_adj
        return found

    alter(images / FIRST, pb.Core, lambda one: setattr(one.tc, "oom_score_adj", 990))
    other = next(name for name in scores() if name != FIRST)
    alter(images / other, pb.Core, lambda one: setattr(one.tc, "oom_score_adj", 1000))
    before = (images / FIRST).read_bytes()
    assert raise_to_spec(images, rights(process={"oomScoreAdj": -998})) is None
    mighty = rights(process={"oomScoreAdj": 997, "capabilities": {"bounding": ["CAP_SYS_RESOURCE"]}})
    assert mighty.has("CAP_SYS_RESOURCE")
    assert raise_to_spec(images, mighty) is None
    assert (images / FIRST).read_bytes() == before
    assert raise_to_spec(images, rights(process={"oomScoreAdj": 997})) == 997
    assert set(scores().values()) == {997, 1000}
    assert scores()[other] == 1000, "who asked for more keeps it"
    alter(images / FIRST, pb.Core, lambda one: setattr(one.tc, "oom_score_adj", 990))
    assert (images / FIRST).read_bytes() == before, "nothing else has changed"
    assert raise_to_spec(images, rights(process={"oomScoreAdj": 997})) == 997
    demand_no_more(images, rights(process={"oomScoreAdj": 997}))


def creds(**fields: Any) -> Change:
    def change(core: pb.Core) -> None:
        found = pb.Creds()
        found.ParseFromString(core.thread_core.creds)
        for name, value in fields.items():
            found.ClearField(name)  # type: ignore[arg-type]
            if isinstance(value, list):
                getattr(found, name).extend(value)
            else:
                setattr(found, name, value)
        core.thread_core.creds = found.SerializeToString()

    return change


def bits(*names: str) -> list[int]:
    number = sum(1 << CAPABILITIES.index(name) for name in names)
    return [number & 0xFFFFFFFF, number >> 32]


def core(**fields: Any) -> Change:
    return lambda one: [setattr(one.thread_core, name, value) for name, value in fields.items()]


UNPRIVILEGED = {"user": {"uid": 1000, "gid": 1000}, "capabilities": {}}
SECCOMP = {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}}

# Attack: what is changed in the first process' image, how, and what of the spec is otherwise than the real one.
OF_THREADS: dict[str, tuple[Change, dict[str, Any]]] = {
    **{
        f"a capability more in {field}": (creds(**{field: bits("SYS_ADMIN")}), {})
        for field in ("cap_bnd", "cap_prm", "cap_eff", "cap_inh", "cap_amb")
    },
    "a capability of the second word": (creds(cap_eff=bits("SYSLOG", "BPF")), {}),
    "a capability that there is not": (creds(cap_bnd=[0, 1 << 31]), {}),
    "a third word of capabilities": (creds(cap_bnd=[0, 0, 1]), {}),
    "root in place of a user": (creds(uid=0, euid=0), {"process": UNPRIVILEGED}),
    "another user": (creds(fsuid=7), {"process": UNPRIVILEGED}),
    "another group": (creds(egid=7), {"process": UNPRIVILEGED | {"user": {"uid": 0, "gid": 0}}}),
    "one group more": (creds(groups=[0, 6]), {"process": UNPRIVILEGED | {"user": {"uid": 0, "gid": 0}}}),
    "what a program with the set-uid bit could not have": (
        creds(uid=7),
        {"process": UNPRIVILEGED | {"user": {"uid": 0, "gid": 0}, "noNewPrivileges": False}},
    ),
    "new privileges": (creds(no_new_privs=0), {}),
    "secure bits that there are not": (creds(secbits=0x100), {}),
    "secure bits without the right to set them": (
        creds(secbits=1),
        {"process": {"capabilities": {"bounding": ["CAP_SETUID", "CAP_SETGID"], "permitted": ["CAP_SETUID"]}}},
    ),
    "no profile": (creds(), {"process": {"apparmorProfile": "cri-containerd.apparmor.d"}}),
    "another profile": (creds(lsm_profile=b"other"), {"process": {"apparmorProfile": "cri-containerd.apparmor.d"}}),
    "a profile of nearly that name": (creds(lsm_profile=b"jobs"), {"process": {"apparmorProfile": "job"}}),
    "no label": (creds(), {"process": {"selinuxLabel": "system_u:system_r:container_t:s0:c1,c2"}}),
    "labelled sockets": (creds(lsm_sockcreate=b"unconfined_u"), {}),
    "a policy of its own": (creds(apparmor_data=b"x"), {}),
    "no credentials": (lambda one: one.thread_core.ClearField("creds"), {}),
    "no filter": (core(), {"linux": SECCOMP}),
    "a strict filter in place of the spec's": (core(seccomp_mode=1), {"linux": SECCOMP}),
    "a filter that there is not": (core(seccomp_mode=2, seccomp_filter=0), {}),
    "a filter where nobody looks": (lambda one: setattr(one.tc, "old_seccomp_mode", 2), {}),
    "real time": (core(sched_policy=1), {}),
    "never killed for memory": (lambda one: setattr(one.tc, "oom_score_adj", -1000), {"process": {"oomScoreAdj": 0}}),
    "the node's processes": (lambda one: one.ids.CopyFrom(pb.KobjIds(vm_id=9, files_id=9, fs_id=9, sighand_id=9)), {}),
}


@pytest.mark.parametrize("attack", OF_THREADS)
def test_a_thread_that_would_have_more_is_refused(attack: str, images: Path) -> None:
    change, spec = OF_THREADS[attack]
    alter(images / FIRST, pb.Core, change)
    with pytest.raises(PeerMisbehaved, match="more than its spec"):
        demand_no_more(images, rights(**spec))


def test_every_thread_counts_not_the_first_alone(images: Path) -> None:
    last = max(images.glob("core-*.img"), key=lambda path: int(path.stem.partition("-")[2]))
    alter(last, pb.Core, creds(cap_eff=bits("SYS_ADMIN")))
    assert against(images, rights())


@pytest.mark.parametrize(
    ("change", "spec"),
    [
        (
            creds(uid=1000, euid=1000, suid=1000, fsuid=1000, cap_eff=[0, 0], cap_prm=[0, 0]),
            {},
        ),  # a daemon that gave up root
        (creds(cap_bnd=[0, 0], cap_inh=[0, 0]), {}),
        (creds(secbits=0x10), {}),
        (creds(secbits=0x2F), {}),
        (creds(groups=[0, 6, 7]), {}),
        (creds(lsm_profile=b"job"), {"process": {"apparmorProfile": "job"}}),
        (creds(no_new_privs=0), {"process": {"noNewPrivileges": False}}),
        (core(seccomp_mode=2, seccomp_filter=0), {"linux": SECCOMP}),
    ],
)
def test_a_thread_with_less_or_what_it_may_come_by_moves(change: Change, spec: dict[str, Any], images: Path) -> None:
    deny = struct.pack("=HBBI", 6, 0, 0, 0x50001)  # return ERRNO(1)
    write(images / "seccomp.img", [pb.Seccomp(seccomp_filters=[pb.SeccompFilter(filter=deny)]).SerializeToString()])
    for path in images.glob("core-*.img"):
        alter(path, pb.Core, change)
    assert against(images, rights(**spec)) == []


@pytest.mark.parametrize("field", ["pid_ns_id", "net_ns_id", "ipc_ns_id", "uts_ns_id", "mnt_ns_id"])
@pytest.mark.parametrize("last", [False, True])
def test_a_process_in_the_nodes_namespace_is_refused(field: str, last: bool, images: Path) -> None:
    """CRIU makes a namespace only where the id is another than the node's: equal ids put root into the node itself."""
    inventory = pb.Inventory()
    inventory.ParseFromString(read(images / "inventory.img")[0])
    node = getattr(inventory.root_ids, field)
    paths = sorted(images.glob("ids-*.img"), key=lambda path: int(path.stem.partition("-")[2]))
    alter(paths[-1 if last else 0], pb.KobjIds, lambda ids: setattr(ids, field, node))
    assert against(images, rights())


def test_the_inventory_cannot_be_silent_or_agree_with_the_processes(images: Path) -> None:
    ids = pb.KobjIds()
    ids.ParseFromString(read(images / "ids-1.img")[0])
    alter(images / "inventory.img", pb.Inventory, lambda one: one.root_ids.CopyFrom(ids))
    assert against(images, rights())
    alter(images / "inventory.img", pb.Inventory, lambda one: one.ClearField("root_ids"))
    assert against(images, rights())


def test_compressed_memory_is_refused(images: Path) -> None:
    """CRIU 4.3 always says how it has compressed it, 0 for not at all."""
    alter(images / "inventory.img", pb.Inventory, lambda one: setattr(one, "compress", 0))
    assert against(images, rights()) == []
    alter(images / "inventory.img", pb.Inventory, lambda one: setattr(one, "compress", 1))
    assert "compressed" in against(images, rights())[0]


def mounted(**fields: Any) -> pb.MountEntry:
    base: dict[str, Any] = {
        "fstype": 5,
        "mnt_id": 99,
        "root_dev": 99,
        "parent_mnt_id": 1,
        "flags": 0,
        "root": b"/",
        "mountpoint": b"/run",
        "source": b"tmpfs",
        "options": b"",
    }
    return pb.MountEntry(**base | fields)


MOUNTS: dict[str, pb.MountEntry] = {
    "a disk": mounted(fstype=0, source=b"/dev/vda1"),
    "the node's devices": mounted(fstype=3),
    "the node's debugging": mounted(fstype=11),
    "an overlay": mounted(fstype=17, options=b"lowerdir=/"),
    "programs for foreign files": mounted(fstype=4),
    "any kind": mounted(fstype=16, fsname=b"ext4"),
    "a kind that there is not": mounted(fstype=99),
    "a plugin's": mounted(with_plugin=True),
    "a second proc": mounted(fstype=1, mountpoint=b"/proc2"),
    "a tmpfs beside the spec": mounted(mountpoint=b"/etc"),
    "a place above the root": mounted(mountpoint=b"/run/../../etc"),
    "a root above its own": mounted(root=b"/../etc"),
    "a place that is relative": mounted(mountpoint=b"run"),
    "settings to be written, over those that are read-only": mounted(
        fstype=1, root=b"/sys", mountpoint=b"/proc/sys", flags=0xE
    ),
    "settings to be written, below": mounted(fstype=1, root=b"/sys/kernel", mountpoint=b"/proc/sys/kernel"),
    "programs with the set-uid bit": mounted(mountpoint=b"/dev/shm", flags=0xC),
    "a place of bytes that are no text": mounted(mountpoint=b"/\xff\xfe"),
}


@pytest.mark.parametrize("attack", MOUNTS)
def test_a_mount_that_shows_more_is_refused(attack: str, images: Path) -> None:
    (path,) = images.glob("mountpoints-*.img")
    add(path, MOUNTS[attack])
    assert against(images, rights())


@pytest.mark.parametrize(
    ("entry", "fine"),
    [
        (
            mounted(mountpoint=b"/sys/fs/cgroup", flags=0xE),
            True,
        ),  # cgroup v1: runc leaves the directory of the trees writable
        (mounted(mountpoint=b"/sys/fs/cgroup/cpu", fstype=12, ext_key=b"/sys/fs/cgroup/cpu", flags=0xF), True),
        (mounted(mountpoint=b"/sys/fs/cgroup/cpu", fstype=12, ext_key=b"/sys/fs/cgroup/cpu", flags=0xE), False),
        (mounted(mountpoint=b"/sys/fs/cgroup", fstype=23, flags=0xF), True),
        (mounted(mountpoint=b"/sys/fs/cgroup", fstype=23, flags=0xE), False),
        (mounted(mountpoint=b"/sys/fs/cgroup", flags=0x6), False),
    ],
)
def test_groups_that_may_only_be_read_are_not_written(entry: pb.MountEntry, fine: bool, images: Path) -> None:
    (path,) = images.glob("mountpoints-*.img")
    add(path, entry)
    spec = copy.deepcopy(SPEC)
    options = ["nosuid", "noexec", "nodev", "relatime", "ro"]
    spec["mounts"].append({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options})
    assert (against(images, rights_of(spec, lambda path: path != "/proc/kcore", "x86_64")) == []) == fine


def test_what_the_spec_covers_is_covered(images: Path) -> None:
    (path,) = images.glob("mountpoints-*.img")
    all_of_them = read(path)
    for place in (b"/proc/sys", b"/proc/timer_list"):
        write(path, [one for one in all_of_them if place not in one])
        assert any(place.decode() in reason for reason in against(images, rights()))
    write(path, all_of_them)
    assert against(images, rights(lambda _: True)) == ["nothing covers /proc/kcore"]


def test_who_may_mount_may_have_mounted(images: Path) -> None:
    (path,) = images.glob("mountpoints-*.img")
    add(path, MOUNTS["a tmpfs beside the spec"])
    add(path, mounted(ext_key=b"/data", mountpoint=b"/run/data"))
    names = [*SPEC["process"]["capabilities"]["bounding"], "CAP_SYS_ADMIN"]
    assert against(images, rights(process={"capabilities": {"bounding": names, "permitted": names}})) == []


FILES: dict[str, pb.FileEntry] = {
    "a packet socket": pb.FileEntry(type=10, id=9, psk=b""),
    "a raw socket": pb.FileEntry(type=4, id=9, isk=pb.InetSocket(family=2, type=3, proto=1).SerializeToString()),
    "a tunnel": pb.FileEntry(type=15, id=9, tunf=b""),
    "a map of BPF's": pb.FileEntry(type=19, id=9, bpf=b""),
    "a watch over all": pb.FileEntry(type=12, id=9, ffy=b""),
    "what a plugin restores": pb.FileEntry(type=16, id=9, ext=b""),
    "a kind that there is not": pb.FileEntry(type=77, id=9),
    "the node's namespace": pb.FileEntry(type=14, id=9, nsf=pb.NamespaceFile(id=9, ns_id=2, ns_cflag=1, flags=0)),
    "a path with dots": pb.FileEntry(
        type=1, id=9, reg=pb.RegularFile(id=9, flags=2, pos=0, fown=b"", name=b"/run/../../etc/shadow")
    ),
    "a disk": pb.FileEntry(
        type=1, id=9, reg=pb.RegularFile(id=9, flags=2, pos=0, fown=b"", name=b"/dev/vda", mode=0o060660)
    ),
}


@pytest.mark.parametrize("attack", FILES)
def test_a_descriptor_that_gives_more_is_refused(attack: str, images: Path) -> None:
    add(images / "files.img", FILES[attack])
    without_raw = [one for one in SPEC["process"]["capabilities"]["bounding"] if one != "CAP_NET_RAW"]
    assert against(images, rights(process={"capabilities": {"bounding": without_raw, "permitted": without_raw}}))


def test_a_deleted_file_is_no_device_of_the_nodes(images: Path) -> None:
    for mode, rdev, fine in (
        (0o100600, 0, True),
        (0o020666, 0x103, True),
        (0o020666, 0x101, False),
        (0o060666, 0, False),
    ):
        ghost = pb.GhostFile(uid=0, gid=0, mode=mode, rdev=rdev)
        write(images / "ghost-file-1f.img", [ghost.SerializeToString()])
        with (images / "ghost-file-1f.img").open("ab") as file:
            file.write(b"and then what is in it")
        assert (against(images, rights()) == []) == fine


GROUPS: dict[str, Change] = {
    "another's group": lambda one: setattr(one.sets[0].ctls[1], "path", b"/kubepods/victim"),
    "a group of nearly that name": lambda one: setattr(one.sets[0].ctls[1], "path", one.sets[0].ctls[1].path + b"2"),
    "the top": lambda one: setattr(one.sets[0].ctls[1], "path", b"/"),
    "the group above": lambda one: setattr(one.sets[0].ctls[1], "path", one.sets[0].ctls[1].path + b"/.."),
    "a tree that nobody knows": lambda one: setattr(one.sets[0].ctls[1], "name", b"rdma"),
    "a group below that leads out": lambda one: one.controllers[0].dirs[0].children.add(dir_name=b"../victim"),
    "a file beside the group": lambda one: one.controllers[0].dirs[0].properties.add(name=b"../x", value=b"1"),
    "a program at the group's end": lambda one: (
        one.controllers[0].dirs[0].properties.add(name=b"release_agent", value=b"/bin/sh")
    ),
    "a process moved": lambda one: one.controllers[0].dirs[0].properties.add(name=b"cgroup.procs", value=b"1"),
}


@pytest.mark.parametrize("attack", GROUPS)
def test_no_process_leaves_the_containers_group(attack: str, images: Path) -> None:
    alter(images / "cgroup.img", pb.Cgroup, GROUPS[attack])
    assert against(images, rights())


@pytest.mark.parametrize(
    "name",
    [
        "reg-files.img",
        "creds-1.img",
        "apparmor.img",
        "binfmt-misc.img",
        "autofs-1.img",
        "bpfmap-data.img",
        "cpuinfo.img",
        "core-1.img.bak",
        "core-x.img",
        "parent",
        "criu.conf",
        "podferry-last-words",
    ],
)
def test_an_image_that_is_not_known_is_refused(name: str, images: Path) -> None:
    (images / name).write_bytes(b"")
    assert against(images, rights()) == [f"there is no image called {name}"]
    assert against(images, rights(), also=frozenset({name})) == []


def test_in_a_network_that_somebody_else_made_criu_makes_nothing(images: Path) -> None:
    (images / "iptables-9.img").write_bytes(b"*filter")
    assert against(images, rights()) == []
    address_spaces = [
        one | ({"path": "/run/netns/x"} if one["type"] == "network" else {}) for one in SPEC["linux"]["namespaces"]
    ]
    assert against(images, rights(linux={"namespaces": address_spaces})) == ["iptables-9.img would make a network"]


@pytest.mark.parametrize(
    "name", ["inventory.img", "core-1.img", "ids-1.img", "files.img", "cgroup.img", "mountpoints-13.img"]
)
def test_a_field_that_is_not_known_is_refused(name: str, images: Path) -> None:
    path = next(images.glob(name if "mount" not in name else "mountpoints-*.img"))
    first, *rest = read(path)
    write(path, [first + b"\xf2\x7f\x01x", *rest])  # field 2030, a text
    with pytest.raises(PeerMisbehaved, match="not known"):
        against(images, rights())


def test_a_field_that_is_not_known_in_the_credentials_is_refused(images: Path) -> None:
    def change(one: pb.Core) -> None:
        one.thread_core.creds = one.thread_core.creds + b"\xf2\x7f\x01x"

    alter(images / FIRST, pb.Core, change)
    with pytest.raises(PeerMisbehaved, match="not known"):
        against(images, rights())


@pytest.mark.parametrize("name", ["inventory.img", "core-1.img", "ids-1.img", "files.img", "cgroup.img"])
def test_an_image_that_is_none_is_refused(name: str, images: Path) -> None:
    whole = (images / name).read_bytes()
    for damaged in (b"", whole[:6], whole[:-1], b"x" * len(whole), whole + b"\1\0\0\0"):
        (images / name).write_bytes(damaged)
        with pytest.raises(PeerMisbehaved):
            against(images, rights())
    (images / name).unlink()
    (images / name).symlink_to("/etc/passwd")
    with pytest.raises(PeerMisbehaved):
        against(images, rights())


def test_there_is_one_inventory_entry(images: Path) -> None:
    write(images / "inventory.img", read(images / "inventory.img") * 2)
    with pytest.raises(PeerMisbehaved, match="2 entries"):
        against(images, rights())


# Whatever a peer sends.

NAMES = sorted(path.name for path in REAL.iterdir() if kind_of(path.name) in MAGIC)
DAMAGE = st.tuples(
    st.sampled_from(NAMES), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8)
)


def check_damaged(directory: Path, damage: tuple[str, list[tuple[int, int]]], extra: bytes) -> None:
    """A judgement or `PeerMisbehaved`, whatever the bytes."""
    name, flips = damage
    content = bytearray((REAL / name).read_bytes())
    for at, value in flips:
        content[at % len(content)] = value
    (directory / name).write_bytes(bytes(content) + extra)
    try:
        assert all(isinstance(one, str) for one in against(directory, rights()))
    except PeerMisbehaved:
        pass
    finally:
        shutil.copy(REAL / name, directory / name)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("fuzz") / "images")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=300)
@given(DAMAGE, st.binary(max_size=24))
def test_damaged_images_end_in_a_judgement(scratch: Path, damage: Any, extra: bytes) -> None:
    check_damaged(scratch, damage, extra)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=50_000)
@given(DAMAGE, st.binary(max_size=24))
def test_damaged_images_end_in_a_judgement_at_length(scratch: Path, damage: Any, extra: bytes) -> None:
    check_damaged(scratch, damage, extra)


@given(st.sampled_from([pb.Core, pb.Creds, pb.MountEntry, pb.FileEntry, pb.Cgroup, pb.KobjIds]), st.binary(max_size=80))
def test_arbitrary_bytes_are_a_message_or_refused(kind: type[Message], data: bytes) -> None:
    from podferry.criu.rights import _parsed

    try:
        message = _parsed(kind(), data, "an image")
    except PeerMisbehaved:
        return
    assert isinstance(message, kind)


# Where it is asked.


def test_the_target_asks_before_it_says_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real `TargetContainer`: images that arrived whole, and say more than the spec of the container that was made here."""
    record = Container("job", "image", "overlayfs", "job", Opaque("spec", json.dumps(SPEC).encode()))
    config = Config("b", "b:1", tmp_path, {}, run=tmp_path / "run", state=tmp_path)
    maker = ContainerdContainer(config, None, OfferedContainer(record, ()))  # type: ignore[arg-type]
    maker._starter = cast(Any, "it waits")
    job = TargetContainer(config, None, Part(Journal(tmp_path / "m1"), 0), maker)  # type: ignore[arg-type]
    job._incoming = Incoming.prepare("job", run=config.run)
    job.scratch.mkdir(parents=True)
    job._store = target_container.PageStore.create(job.scratch / "store")
    journal_end = StateEnd("m1", (), (), ())
    images = job._incoming.images
    for path in REAL.iterdir():
        if path.name != "spec.json":
            shutil.copy(path, images)
    monkeypatch.setattr(target_container, "missing", lambda *_: {})
    alter(images / FIRST, pb.Core, creds(cap_eff=bits("SYS_ADMIN")))
    with pytest.raises(PeerMisbehaved, match="effective capabilities"):
        job._verify(journal_end)


def test_a_later_container_of_a_pod_is_asked_before_it_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubelet makes it after GO: its spec is known no sooner. The real `TargetContainer`."""
    record = Container("c1", "image", "overlayfs", "c1", Opaque("spec", json.dumps(SPEC).encode()))
    config = Config("b", "b:1", tmp_path, {}, run=tmp_path / "run", state=tmp_path)
    journal = Part(Journal(tmp_path / "m1"), 1)
    maker = KubeletContainer(config, None, journal, PodPart("side", "c1", ()))  # type: ignore[arg-type]
    part = TargetContainer(config, None, journal, maker)  # type: ignore[arg-type]
    part._incoming = incoming = Incoming.prepare("side", run=config.run)
    shutil.rmtree(incoming.images)
    alter(copied(incoming.images) / FIRST, pb.Core, creds(cap_eff=bits("SYS_ADMIN")))
    for name in (LAST_WORDS, PAYLOADS):
        (incoming.images / name).write_bytes(b"")
    restored: list[str] = []

    async def make(container: TargetContainer, timeout: float) -> Container:
        maker.made_already = record
        return record

    monkeypatch.setattr(maker, "make", make)
    monkeypatch.setattr(incoming, "restore", lambda: restored.append("yes"))
    with pytest.raises(PeerMisbehaved, match="effective capabilities"):
        anyio.run(part.release)
    assert not restored

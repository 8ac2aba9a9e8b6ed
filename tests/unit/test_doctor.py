"""What `podferry doctor` makes of the facts of a machine, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from podferry.cli import doctor as command
from podferry.cli.app import run
from podferry.core import labhost, nodehost
from podferry.core.facts import CgroupKind, NodeFacts, RuntimeKind
from podferry.core.findings import Finding, MachineUnfit, Verdict, blocked, fine, limited, mebibytes, require, worst
from podferry.core.host import CAPABILITIES, NEEDED, Kernel, Privileges
from podferry.core.labhost import TRIALS, Cgroups, Disk, LabHost
from podferry.core.nodehost import NodeHost, Place
from podferry.lab import hostfacts
from podferry.node import host

pytestmark = pytest.mark.unit
GIB = 1 << 30

ROOT = Privileges(True, False, frozenset(CAPABILITIES))
KERNEL = Kernel("6.12.48-amd64", "x86_64", True, True, "uffd", "the kernel has it")
LAB_HOST = LabHost(
    privileges=ROOT,
    kernel=KERNEL,
    trials=dict.fromkeys(TRIALS, ""),
    cgroups=Cgroups("v2", True, frozenset({"cpu", "memory", "pids"})),
    memory=16 * GIB,
    disk=Disk("/var/lib/podferry", "ext4", 60 * GIB, 1_000_000, frozenset({"rw", "relatime"})),
    to_build=2 * GIB,
    programs_missing=(),
    apt=True,
    mirror_problem="",
    pipe_max_size=1 << 20,
    pipe_settable=True,
    tmp_noexec=False,
    daemons=(),
    subnet="10.119.168.0/24",
    clashes=(),
    ipv6=True,
    criu=(4, 1),
)
NODE_HOST = NodeHost(
    privileges=ROOT,
    kernel=KERNEL,
    facts=NodeFacts(
        kernel="6.12.48-amd64",
        machine="x86_64",
        page_size=4096,
        boot="b",
        cpus=2,
        cpu_model="m",
        cpu_flags=(),
        criu="4.1.1",
        runc="1.1.15",
        runtime=RuntimeKind.CONTAINERD,
        runtime_version="1.7.24",
        cgroup=CgroupKind.V2,
        memory_available=16 * GIB,
        disk_free=60 * GIB,
        run_free=10 * GIB,
        lazy_pages=True,
        pagemap_scan=True,
        wp_async=True,
        soft_dirty=False,
        memory_skipping_dump=True,
        pipe_max_size=4 << 20,
        selinux=False,
        clock=0.0,
    ),
    memory_total=16 * GIB,
    run=Place("/run/podferry", "tmpfs", 10 * GIB, 12 * GIB),
    state=Place("/var/lib/podferry", "ext4", 60 * GIB, 100 * GIB),
    socket="/run/containerd/containerd.sock",
    others=(),
    kubelet="",
    wrapper=True,
    cpu_controller=True,
    python=(3, 13),
)


def verdicts(findings: list[Finding]) -> dict[str, Verdict]:
    """What is not fine."""
    return {one.check: one.verdict for one in findings if one.verdict is not Verdict.FINE}


def test_a_machine_that_has_everything() -> None:
    assert verdicts(labhost.findings(LAB_HOST)) == {}
    assert verdicts(nodehost.findings(NODE_HOST)) == {}


def kernel(**other: Any) -> Callable[[Any], Any]:
    return lambda machine: replace(machine, kernel=replace(machine.kernel, **other))


def rights(**other: Any) -> Callable[[Any], Any]:
    return lambda machine: replace(machine, privileges=replace(machine.privileges, **other))


def disk(**other: Any) -> Callable[[LabHost], LabHost]:
    return lambda machine: replace(machine, disk=replace(machine.disk, **other))


def facts(**other: Any) -> Callable[[NodeHost], NodeHost]:
    return lambda machine: replace(machine, facts=replace(machine.facts, **other))


def having(**other: Any) -> Callable[[Any], Any]:
    return lambda machine: replace(machine, **other)


BLOCKED, LIMITED = Verdict.BLOCKED, Verdict.LIMITED
BOTH: list[tuple[str, Callable[[Any], Any], dict[str, Verdict]]] = [
    ("not root", rights(root=False, capabilities=frozenset()), {"user": BLOCKED}),
    ("a rootless container", rights(user_namespace=True), {"user": BLOCKED}),
    (
        "no CAP_SYS_RESOURCE",
        rights(capabilities=frozenset(CAPABILITIES) - {"sys_resource"}),
        {"capabilities": LIMITED},
    ),
    *(
        (f"no CAP_{one}", rights(capabilities=frozenset(CAPABILITIES) - {one}), {"capabilities": BLOCKED})
        for one in NEEDED
    ),
    ("confined", rights(confined="AppArmor profile docker-default (enforce)"), {"confinement": LIMITED}),
    ("another processor", kernel(machine="riscv64"), {"kernel": BLOCKED}),
    ("arm64", kernel(machine="aarch64"), {"kernel": LIMITED}),
    ("no checkpoint", kernel(checkpoint=False), {"kernel": BLOCKED}),
    ("no userfaultfd", kernel(lazy_pages=False), {"userfaultfd": BLOCKED}),
    ("Debian 12's tracking", kernel(tracker="soft-dirty"), {"tracking": LIMITED}),
    ("no tracking", kernel(tracker="none"), {"tracking": LIMITED}),
    ("Ubuntu's AppArmor", kernel(userns_restricted=True), {}),
]
LAB: list[tuple[str, Callable[[LabHost], LabHost], dict[str, Verdict]]] = [
    ("SELinux", kernel(selinux=True), {"SELinux": LIMITED}),
    *((f"{one} fails", having(trials={**dict.fromkeys(TRIALS, ""), one: "no"}), {one: BLOCKED}) for one in TRIALS),
    ("no cgroups", having(cgroups=Cgroups("", False, frozenset())), {"cgroups": BLOCKED}),
    ("cgroups read-only", having(cgroups=replace(LAB_HOST.cgroups, writable=False)), {"cgroups": BLOCKED}),
    (
        "no cpu",
        having(cgroups=replace(LAB_HOST.cgroups, controllers=frozenset({"memory", "pids"}))),
        {"cgroups": LIMITED},
    ),
    ("little memory", having(memory=500 << 20), {"memory": BLOCKED}),
    ("hardly enough memory", having(memory=GIB), {"memory": LIMITED}),
    ("little for Kubernetes", having(memory=GIB, kubernetes=True), {"memory": BLOCKED}),
    ("on an overlay", disk(kind="overlay"), {"disk": BLOCKED}),
    ("on a tmpfs", disk(kind="tmpfs"), {"disk": BLOCKED}),
    ("on NFS", disk(kind="nfs4"), {"disk": BLOCKED}),
    ("/var noexec", disk(options=frozenset({"rw", "noexec"})), {"disk": BLOCKED}),
    ("/var read-only", disk(options=frozenset({"ro"})), {"disk": BLOCKED}),
    ("/var small", disk(free=2 * GIB), {"disk": BLOCKED}),
    ("/var small, but all is built", lambda one: disk(free=2 * GIB)(replace(one, to_build=0)), {}),
    ("/var tight", disk(free=3 * GIB), {"disk": LIMITED}),
    ("few inodes", disk(inodes=1000), {"disk": BLOCKED}),
    ("inodes without number", disk(inodes=None), {}),
    ("programs missing", having(programs_missing=("iproute2",)), {"programs": LIMITED}),
    ("no Debian", having(programs_missing=("dpkg",), apt=False), {"programs": BLOCKED}),
    ("no mirror", having(mirror_problem="no Debian mirror is known"), {"mirror": BLOCKED}),
    ("no mirror, but all is built", having(mirror_problem="no Debian mirror is known", to_build=0), {}),
    (
        "pipes that stay small",
        lambda one: rights(capabilities=frozenset(NEEDED))(replace(one, pipe_settable=False)),
        {"capabilities": LIMITED, "fs.pipe-max-size": LIMITED},
    ),
    ("CRIU 4.1 on a late kernel", kernel(release="6.16.3"), {"nodes' CRIU": LIMITED}),
    ("CRIU 4.2 on a late kernel", lambda one: kernel(release="7.0-rc1")(replace(one, criu=(4, 2))), {}),
    (
        "Linux without UDP-Lite",
        lambda one: kernel(release="7.2.12+deb14")(replace(one, criu=(4, 2))),
        {"nodes' CRIU": BLOCKED},
    ),
    ("Docker, k3s, /tmp noexec, no IPv6", having(daemons=("Docker",), tmp_noexec=True, ipv6=False, clashes=("x",)), {}),
]
NODE: list[tuple[str, Callable[[NodeHost], NodeHost], dict[str, Verdict]]] = [
    ("an old Python", having(python=(3, 9)), {"Python": BLOCKED}),
    ("SELinux", kernel(selinux=True), {"SELinux": BLOCKED}),
    ("Linux without UDP-Lite", lambda one: kernel(release="7.1.0")(facts(criu="4.2.1")(one)), {"CRIU": BLOCKED}),
    ("Linux without UDP-Lite, a late CRIU", lambda one: kernel(release="7.1.0")(facts(criu="4.3")(one)), {}),
    (
        "Linux without UDP-Lite in a cluster",
        lambda one: kernel(release="7.1.0")(facts(criu="")(replace(one, kubelet="/var/lib/kubelet"))),
        {"CRIU": BLOCKED},
    ),
    ("no CRIU", facts(criu=""), {"CRIU": BLOCKED}),
    ("Debian 12's CRIU", facts(criu="3.17.1"), {"CRIU": BLOCKED}),
    (
        "an old CRIU in a cluster",
        lambda one: facts(criu="3.17.1")(replace(one, kubelet="/var/lib/kubelet")),
        {"CRIU": LIMITED},
    ),
    ("no runc", facts(runc=""), {"runc": BLOCKED}),
    ("an old runc", facts(runc="1.0.3"), {"runc": BLOCKED}),
    ("an old containerd", facts(runtime_version="1.6.20"), {"containerd": BLOCKED}),
    ("containerd somewhere else", facts(runtime_version=""), {"containerd": LIMITED}),
    ("no containerd", having(socket="", others=("k3s' containerd",)), {"containerd": BLOCKED}),
    ("CRI-O", facts(runtime=RuntimeKind.CRIO, runtime_version="1.34.0"), {"pods of CRI-O": LIMITED}),
    (
        "an old CRI-O",
        facts(runtime=RuntimeKind.CRIO, runtime_version="1.28.4"),
        {"CRI-O": BLOCKED, "pods of CRI-O": LIMITED},
    ),
    ("Docker beside it", having(others=("Docker",)), {"other container runtimes": LIMITED}),
    ("no wrapper", having(wrapper=False), {"podferry-runc": LIMITED}),
    ("no wrapper yet in a cluster", having(wrapper=False, kubelet="/var/lib/kubelet"), {}),
    ("no cpu controller", having(cpu_controller=False), {"cgroups": LIMITED}),
    ("small pipes", facts(pipe_max_size=1 << 20), {"fs.pipe-max-size": BLOCKED}),
    ("no memory", facts(memory_available=10 << 20), {"memory": BLOCKED}),
    ("/run of 10 % of memory", having(run=Place("/run/podferry", "tmpfs", GIB, 16 * GIB // 10)), {"run": LIMITED}),
    ("/run on a disk", having(run=Place("/run/podferry", "ext4", GIB, GIB)), {"run": LIMITED}),
    ("state in memory", having(state=Place("/var/lib/podferry", "tmpfs", GIB, GIB)), {"state": BLOCKED}),
    ("state on a full disk", having(state=Place("/var/lib/podferry", "ext4", 1 << 20, GIB)), {"state": BLOCKED}),
]


@pytest.mark.parametrize(("change", "expected"), [pytest.param(*case[1:], id=case[0]) for case in BOTH + LAB])
def test_a_lab(change: Callable[[LabHost], LabHost], expected: dict[str, Verdict]) -> None:
    findings = labhost.findings(change(LAB_HOST))
    assert verdicts(findings) == expected
    explained(findings)


@pytest.mark.parametrize(("change", "expected"), [pytest.param(*case[1:], id=case[0]) for case in BOTH + NODE])
def test_a_node(change: Callable[[NodeHost], NodeHost], expected: dict[str, Verdict]) -> None:
    findings = nodehost.findings(change(NODE_HOST))
    assert verdicts(findings) == expected
    explained(findings)


def explained(findings: list[Finding]) -> None:
    """Whatever is wrong says what follows; what is in the way says what to do."""
    for one in findings:
        assert one.check and one.found
        assert bool(one.why) is (one.verdict is not Verdict.FINE)
        assert one.remedy or one.verdict is not Verdict.BLOCKED


def test_a_user_without_root_is_told_what_was_not_tried() -> None:
    machine = replace(
        LAB_HOST,
        privileges=Privileges(False, False, frozenset()),
        kernel=replace(KERNEL, lazy_pages=None, tracker=None),
        trials={},
        cgroups=replace(LAB_HOST.cgroups, writable=False),
    )
    assert verdicts(labhost.findings(machine)) == {"user": BLOCKED, "userfaultfd": LIMITED, "tracking": LIMITED}


def test_all_reasons_at_once_and_only_those() -> None:
    found = [fine("a", "x"), limited("b", "x", "so"), blocked("c", "x", "so", "do y"), blocked("d", "x", "so", "do z")]
    with pytest.raises(MachineUnfit) as refused:
        require("nothing works", found)
    assert "c: x; so; d: x; so" in refused.value.why
    assert "do y; do z" in refused.value.remedy
    require("nothing works", found[:2])
    assert [worst(found), worst(found[:2]), worst(found[:1])] == [BLOCKED, LIMITED, Verdict.FINE]


@pytest.mark.parametrize(
    ("machine", "code"), [(LAB_HOST, 0), (having(memory=GIB)(LAB_HOST), 0), (having(memory=1)(LAB_HOST), 3)]
)
def test_json_and_exit_codes(
    machine: LabHost, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hostfacts, "lab_host", lambda *_, **__: machine)
    assert run(["doctor", "--json"]) == code
    said = json.loads(capsys.readouterr().out)
    assert list(said) == ["purpose", "verdict", "findings"]
    assert said["purpose"] == "lab"
    assert said["verdict"] == worst(labhost.findings(machine)).value
    for one in said["findings"]:
        assert list(one) == ["check", "verdict", "found", "why", "remedy"]
        assert one["verdict"] in ("fine", "limited", "blocked")


@pytest.mark.parametrize(("size", "shown"), [(500 << 20, "500 MiB"), (1 << 30, "1.0 GiB"), (3 << 29, "1.5 GiB")])
def test_sizes_are_in_gib_from_one_gib_on(size: int, shown: str) -> None:
    assert mebibytes(size) == shown


def test_words_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "_of_lab", lambda *_: [blocked("disk", "full", "no room", "buy another")])
    assert run(["doctor"]) == 3
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["in", "the", "way", "disk:", "full"]
    assert [line.strip() for line in out[1:]] == ["no room", "what to do: buy another"]


@pytest.mark.parametrize(
    "argv", [["doctor", "--debian", "etch"], ["doctor", "--config", "x"], ["doctor", "--lab", "A B"]]
)
def test_nonsense(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2


def test_real_facts_can_be_gathered_without_root(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["doctor", "--json"], ["doctor", "--node", "--json"]):
        assert run(argv) in (0, 3)
        assert json.loads(capsys.readouterr().out)["findings"]


def test_the_mount_of_a_path_is_the_last_and_longest(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        f"2 1 8:2 / {tmp_path} rw,noexec - xfs /dev/sdb rw\n"
        f"3 1 8:3 / {tmp_path} rw - fuse.glusterfs x rw,user_id=0\n"
        f"4 1 8:4 / {tmp_path}-other rw - tmpfs x rw\n"
    )
    assert host.mount_of(tmp_path / "not" / "there", table).kind == "fuse"
    assert host.mount_of(Path("/nowhere"), table).kind == "ext4"


def test_routes_into_the_labs_range() -> None:
    header = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    lines = [
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0",  # the default one
        "tun0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0",  # 10.0.0.0/8
        "eth1\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0",  # 192.168.1.0/24
    ]
    found = hostfacts.routes_into("10.119.168.0/24", header + "\n".join(lines))
    assert list(found) == ["10.0.0.0/8 at tun0"]

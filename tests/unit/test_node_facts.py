"""Facts that travel, and the parts of /proc they come from."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from podferry.core.facts import NodeFacts, RuntimeKind
from podferry.errors import PeerMisbehaved
from podferry.node import jobfacts
from podferry.node.jobfacts import Bind, ContainerFacts
from podferry.workload import nodefacts as facts
from podferry.workload.nodefacts import node_facts, version

pytestmark = pytest.mark.unit

X86 = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu sse avx2\n\nprocessor\t: 1\nmodel name\t: Other\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\nCPU variant\t: 0x1\n"

JOB = ContainerFacts(
    id="job",
    image="example.org/job:1",
    binary="podferry-runc",
    pids=(1, 2),
    host_namespaces=("net",),
    devices=("/dev/kvm",),
    unsaved=("io_uring",),
    binds=(Bind("/data", "/data"),),
    connections=("10.0.0.1:1 -> 10.0.0.2:2",),
    stdio=("null", "pipe", "pipe"),
    memory=None,
    anonymous=1,
    shared=2,
    tmpfs=3,
    upper=4,
)


def test_the_processor() -> None:
    assert facts._processor(X86) == ("Some CPU @ 3 GHz", ("avx2", "fpu", "sse"))
    assert facts._processor(ARM) == (
        "CPU implementer 0x41 CPU part 0xd40 CPU variant 0x1",
        ("asimd", "fp", "sve"),
    )


def test_this_machine() -> None:
    if not Path("/sys/fs/cgroup").exists():
        pytest.skip("no cgroups here")
    here = node_facts(Path("/"), Path("/run"), RuntimeKind.CONTAINERD, runc="no-such-runc", criu="no-such-criu")
    assert (here.runc, here.criu) == ("", "")
    assert here.kernel == os.uname().release and here.cpus >= 1
    assert here.memory_available > 0 and here.disk_free > 0
    assert NodeFacts.from_dict(json.loads(json.dumps(here.to_dict()))) == here


def test_versions() -> None:
    assert version("no-such-program") == ""
    assert version("tar")[0].isdigit()


@pytest.mark.parametrize("change", [{"kernel": 6}, {"extra": 1}, {"cpu_flags": "avx"}, {"memory_available": -1}])
def test_facts_from_a_peer_are_checked(change: dict[str, object]) -> None:
    data = dict.fromkeys(NodeFacts.__dataclass_fields__, "") | change
    with pytest.raises(PeerMisbehaved):
        NodeFacts.from_dict(data)
    with pytest.raises(PeerMisbehaved):
        ContainerFacts.from_dict(JOB.to_dict() | change)
    for wrong in (None, [], {}):
        with pytest.raises(PeerMisbehaved):
            ContainerFacts.from_dict(wrong)


def test_facts_of_a_container_travel() -> None:
    assert ContainerFacts.from_dict(json.loads(json.dumps(JOB.to_dict()))) == JOB


def test_what_is_open_of_the_files_that_were_deleted_under_a_mount(tmp_path: Path) -> None:
    gone, here = tmp_path / "gone", tmp_path / "here"
    with gone.open("w"), here.open("w"), (tmp_path / "other").open("w"):
        gone.unlink()
        (tmp_path / "other").unlink()
        found = jobfacts.deleted_but_open([os.getpid()], [str(gone), str(here)])
    assert found == (str(gone),)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of others")
def test_limits_of_other_users_are_read_with_a_capability_alone() -> None:
    capabilities = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    with subprocess.Popen(["sleep", "60"], user=65534, group=65534) as other:
        try:
            assert jobfacts.may_read_limits(other.pid) == bool(capabilities & 1 << 24)  # CAP_SYS_RESOURCE
        finally:
            other.kill()
    assert jobfacts.may_read_limits(os.getpid())
    assert jobfacts.may_read_limits(2**22 + 1), "what is gone has none"


def test_open_files() -> None:
    reader, writer = os.pipe()
    random, event = os.open("/dev/urandom", os.O_RDONLY), os.eventfd(0)
    try:
        pids = [os.getpid(), 2**22 + 1]
        assert "anon_inode:[eventfd]" in {link for link, _ in jobfacts._open_files(pids)}
        found = jobfacts._Open.by(pids)
        assert not found.unsaved & {"eventfd", "eventpoll"}
        assert "/dev/urandom" not in found.devices
    finally:
        for fd in (reader, writer, random, event):
            os.close(fd)


def test_what_a_spec_mounts_and_allows() -> None:
    spec = {
        "mounts": [
            {"type": "proc", "source": "proc", "destination": "/proc"},
            {"type": "bind", "source": "/data", "destination": "/data", "options": ["rbind", "ro"]},
            {"source": "/etc/hosts", "destination": "/etc/hosts", "options": ["bind"]},
        ],
        "linux": {
            "devices": [{"path": "/dev/null", "major": 1, "minor": 3}, {"path": "/dev/kvm", "major": 10, "minor": 232}]
        },
    }
    assert list(jobfacts.binds(spec)) == [Bind("/data", "/data"), Bind("/etc/hosts", "/etc/hosts")]
    assert list(jobfacts._allowed_devices(spec)) == ["/dev/kvm"]
    assert list(jobfacts.binds({})) == list(jobfacts._allowed_devices({"linux": None})) == []


def test_stdio_kinds(tmp_path: Path) -> None:
    assert jobfacts._stdio(2**22 + 1, 1) == "closed"
    kinds = {jobfacts._stdio(os.getpid(), number) for number in (0, 1, 2)}
    assert all(kind.split()[0] in {"pipe", "null", "terminal", "socket", "closed", "file"} for kind in kinds)


def test_disk_usage(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/file").write_bytes(bytes(100_000))
    (tmp_path / "dangling").symlink_to("nowhere")
    assert jobfacts.disk_usage(tmp_path) >= 100_000
    assert jobfacts.disk_usage(tmp_path / "none") == 0

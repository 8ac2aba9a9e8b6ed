"""Containers with a seccomp profile on real nodes: honest filters move; one that a hostile source widens on its way does not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from moving import A, B, Cluster, until

from podferry.lab import Lab, containers
from podferry.lab.machine_config import SNAPSHOTTER

pytestmark = pytest.mark.lab

COUNTS = "import itertools, time\nfor n in itertools.count(1):\n    print(n, flush=True)\n    time.sleep(0.05)"


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    return Cluster(lab)


@pytest.fixture
def name(cluster: Cluster, lab: Lab, request: pytest.FixtureRequest) -> Iterator[str]:
    """A job under containerd's default profile."""
    name = request.node.name.removeprefix("test_").replace("_", "-")[:40]
    containers.start(lab, A, "image-there", ["true"])
    image = lab.exec(A, ["ctr", "container", "ls"]).stdout
    reference = next(line.split()[1] for line in image.splitlines() if line.startswith("image-there"))
    log = f"--log-uri=file://{containers.LOGS / name}.log"
    options = ["--detach", "--snapshotter", SNAPSHOTTER, "--runc-binary", containers.RUNTIME, "--cpu-shares=0", log]
    lab.exec(A, ["ctr", "run", *options, "--seccomp", reference, name, "python3", "-c", COUNTS])
    cluster.stop("image-there")
    until(lambda: cluster.counted(A, name) > 0, f"{name} counts")
    yield name
    cluster.stop(name)


def test_a_filtered_job_moves_with_its_filter(cluster: Cluster, name: str) -> None:
    for source, target in ((A, B), (B, A)):
        record = cluster.migrate(name, source=source, mode="live")
        assert record["outcome"] == "completed", (record["reason"], record["error"])
        cluster.goes_on(target, name)
        (job,) = (one for one in cluster.processes(target) if one.job == name)
        status = (cluster.root(target).parent.parent / str(job.pid) / "status").read_text()
        assert "Seccomp:\t2" in status and "Seccomp_filters:\t1" in status


LIES = """
import struct
from podferry.criu import timers
from podferry.criu.dump_images import messages_of
from podferry.criu.rights import MAGIC
from podferry.protos import rights_pb2

honest = timers.put_right

def widened(directory):
    honest(directory)
    for path in directory.glob("seccomp.img"):
        image, seccomp = path.read_bytes(), rights_pb2.Seccomp()
        seccomp.ParseFromString(next(messages_of(image, "seccomp.img", MAGIC["seccomp"])))
        for one in seccomp.seccomp_filters:
            one.filter = struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)
        data = seccomp.SerializeToString()
        path.write_bytes(image[:8] + struct.pack("<I", len(data)) + data)

timers.put_right = widened
"""
"""An agent that sends filters which permit everything: its last look at the images does it."""


@pytest.fixture
def liar(cluster: Cluster) -> Iterator[None]:
    """The source's agent lies."""
    run = cluster.root(A) / "run/service/agent/run"
    honest, lies = run.read_text(), cluster.root(A) / "run/lies"
    lies.mkdir()
    (lies / "sitecustomize.py").write_text(LIES)
    run.write_text(honest.replace("exec ", 'export PYTHONPATH="/run/lies:$PYTHONPATH"\nexec ', 1))
    cluster.kill(A, "agent")
    yield
    run.write_text(honest)
    shutil.rmtree(lies)
    cluster.kill(A, "agent")


def test_a_filter_that_a_source_has_widened_is_refused(cluster: Cluster, name: str, liar: None) -> None:
    record = cluster.migrate(name, source=A, mode="live")
    assert record["outcome"] == "rolled-back", record
    assert "a seccomp filter permits more than the spec's profile" in record["reason"]
    cluster.goes_on(A, name)

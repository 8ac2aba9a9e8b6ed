"""Bad input: each with a clear error, and nothing lost or left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from moving import A, B, Cluster, until

from podferry.errors import PodferryError, Refused, UsageError
from podferry.lab import Lab, containers
from podferry.lab.machine_config import SNAPSHOTTER
from podferry.lab.root_images import JOB_IMAGE
from podferry.wire.pki import Authority

pytestmark = pytest.mark.lab
JOB = "stubborn"
PODFERRY = [sys.executable, "-c", "from podferry.cli import main; main()"]
RING = """
import ctypes, time
libc = ctypes.CDLL(None, use_errno=True)
ring = libc.syscall(425, 4, (ctypes.c_char * 120)())
n = 0
while True:
    print(n, ring, flush=True)
    n += 1
    time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    return Cluster(lab)


@pytest.fixture
def job(cluster: Cluster) -> Iterator[str]:
    cluster.start(JOB, "simple", "8")
    yield JOB
    cluster.open_breakpoints()
    cluster.stop(JOB)


def refused(cluster: Cluster, **request: Any) -> PodferryError:
    with pytest.raises(PodferryError) as caught:
        cluster.agent(A).call("migrate", timeout=60.0, **request)
    return caught.value


def podferry(cluster: Cluster, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [*PODFERRY, "--lab", cluster.lab.name, *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"name": "nobody", "to": B}, "no container nobody"),
        ({"name": JOB, "to": "node-z"}, "no node node-z"),
        ({"name": JOB, "to": A}, "on node-a already"),
        ({"name": JOB, "to": B, "mode": "teleport"}, "no mode 'teleport'"),
    ],
)
def test_what_makes_no_sense_is_said(cluster: Cluster, job: str, request_: dict[str, Any], says: str) -> None:
    try:
        record = cluster.agent(A).call("migrate", timeout=60.0, **request_)
    except UsageError as error:
        assert says in str(error)
    else:
        assert record["outcome"] == "refused"
        assert says in record["reason"]
    cluster.only_on(A, job)


def test_the_shell_hears_it_too(cluster: Cluster, job: str) -> None:
    done = podferry(cluster, "migrate", "nobody", "--to", B)
    assert done.returncode == 2
    assert "nobody" in done.stderr
    done = podferry(cluster, "check", job, "--to", "node-z")
    assert done.returncode == 2
    assert "node-z" in done.stderr


def test_a_name_that_is_taken(cluster: Cluster, job: str) -> None:
    containers.pull(cluster.lab, B, JOB_IMAGE)
    cluster.lab.exec(B, ["ctr", "container", "create", "--snapshotter", SNAPSHOTTER, JOB_IMAGE, job, "sleep", "1"])
    try:
        record = cluster.migrate(job, source=A)
        assert record["outcome"] == "refused"
        assert "already" in record["reason"]
        assert record["error"]["remedy"]
    finally:
        cluster.lab.exec(B, ["ctr", "container", "delete", job])
    cluster.goes_on(A, job)


def test_a_container_that_another_runtime_started(cluster: Cluster) -> None:
    containers.pull(cluster.lab, A, JOB_IMAGE)
    command = ["ctr", "run", "--detach", "--cpu-shares=0", "--snapshotter", SNAPSHOTTER, JOB_IMAGE, "plain"]
    cluster.lab.exec(A, [*command, "python3", "-c", "import time; time.sleep(600)"])
    try:
        record = cluster.migrate("plain", source=A)
        assert record["outcome"] == "refused"
        assert "podferry-runc" in record["reason"]
        assert "runtime" in record["error"]["remedy"]
    finally:
        cluster.stop("plain")


def test_a_container_with_a_device(cluster: Cluster) -> None:
    containers.pull(cluster.lab, A, JOB_IMAGE)
    command = [
        "ctr",
        "run",
        "--detach",
        "--cpu-shares=0",
        "--snapshotter",
        SNAPSHOTTER,
        "--device=/dev/fuse",
        "--log-uri=file:///var/log/podferry/containers/device.log",
    ]
    command += ["--runc-binary", containers.RUNTIME, JOB_IMAGE, "device"]
    cluster.lab.exec(A, [*command, "python3", "-c", "import time; kept = open('/dev/fuse'); time.sleep(600)"])
    try:
        record = cluster.migrate("device", source=A)
        assert record["outcome"] == "refused"
        assert "devices" in record["reason"]
        assert "/dev/fuse" in record["reason"]
        assert record["error"]["remedy"]
    finally:
        cluster.stop("device")


def test_a_second_migration_of_one_container(cluster: Cluster, job: str) -> None:
    cluster.install_gates()
    gate = f"source-cut-over-{job}"
    cluster.close_breakpoint(gate)
    move = cluster.begin(job, source=A)
    cluster.reached(gate, move)
    error = refused(cluster, name=job, to=B, mode="stop")
    assert isinstance(error, Refused)
    assert "being migrated already" in str(error)
    cluster.open_breakpoints()
    assert move.result(60)["outcome"] == "completed"
    cluster.only_on(B, job)


def test_a_container_that_ends_during_the_move(cluster: Cluster, job: str) -> None:
    cluster.install_gates()
    gate = f"source-pre-copy-{job}"
    cluster.close_breakpoint(gate)
    move = cluster.begin(job, source=A)
    cluster.reached(gate, move)
    cluster.containerd(A).kill_task(job, signal.SIGTERM)
    record = move.result(60)
    assert record["outcome"] == "failed"
    assert "ended during the move" in record["reason"]
    assert "exit status 7" in record["reason"]
    assert cluster.containerd(A).wait_task(job, 30.0) == 7
    assert f"container {job}" not in cluster.traces(B)


def test_a_node_that_is_down(cluster: Cluster, job: str) -> None:
    cluster.lab.exec(B, ["sv", "down", "/run/service/agent"])
    try:
        record = cluster.migrate(job, source=A)
        assert record["outcome"] in ("rolled-back", "refused")
        assert B in record["reason"]
    finally:
        cluster.lab.exec(B, ["sv", "up", "/run/service/agent"])
        cluster.records(B)
    cluster.only_on(A, job)


def test_a_job_that_criu_cannot_save(cluster: Cluster) -> None:
    name = "ring"
    containers.start(cluster.lab, A, name, ["python3", "-u", "-c", RING])
    try:
        until(lambda: cluster.counted(A, name) > 0, "the job with a ring begins")
        if cluster.lines(A, name)[0].split()[1] == "-1":
            pytest.skip("this machine's containers may not make an io_uring")
        record = cluster.migrate(name, source=A)
        assert record["outcome"] == "refused"
        assert "io_uring" in record["reason"]
        assert record["error"]["remedy"]
        cluster.goes_on(A, name)
    finally:
        cluster.stop(name)


@pytest.fixture
def certificates(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """Where node B keeps its certificates; they are put back."""
    place = cluster.root(B) / "etc/podferry/pki"
    kept = {name: (place / name).read_bytes() for name in ("ca.crt", "node.crt", "node.key")}
    yield place
    for name, content in kept.items():
        (place / name).write_bytes(content)


def issue(cluster: Cluster, kind: str, into: Path, elsewhere: Path) -> None:
    address = cluster.lab.node(B).address
    if kind == "another authority":
        Authority.create(elsewhere).issue(B, [address], into)
        return
    authority = Authority.load(cluster.lab.home / "pki")
    yesterday = datetime.now(UTC) - timedelta(days=1)
    match kind:
        case "another node's":
            authority.issue("node-q", [address], into)
        case "expired":
            authority.issue(B, [address], into, not_before=yesterday - timedelta(days=1), not_after=yesterday)


@pytest.mark.parametrize(
    ("kind", "says"),
    [("another authority", "authority"), ("another node's", "another node's"), ("expired", "expired")],
)
def test_a_certificate_that_is_not_the_nodes(
    cluster: Cluster, job: str, certificates: Path, tmp_path: Path, kind: str, says: str
) -> None:
    issue(cluster, kind, certificates, tmp_path)
    record = cluster.migrate(job, source=A)
    assert record["outcome"] in ("rolled-back", "refused")
    assert says in record["reason"]
    assert record["error"]["code"] == "PF211"
    cluster.only_on(A, job)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b""])
def test_garbage_on_the_agents_port_harms_nobody(cluster: Cluster, job: str, garbage: bytes) -> None:
    """Spoken from within the lab: the agents' addresses are nowhere else."""
    address = cluster.lab.node(B).address
    script = f"import socket; s=socket.create_connection(('{address}', 7460), 5); s.sendall({garbage!r}); s.close()"
    cluster.lab.exec(A, ["python3", "-c", script])
    record = cluster.migrate(job, source=A)
    assert record["outcome"] == "completed"
    cluster.only_on(B, job)


@pytest.mark.parametrize("phase", ["source-pre-copy", "source-cut-over"])
def test_ctrl_c(cluster: Cluster, job: str, phase: str) -> None:
    cluster.install_gates()
    gate = f"{phase}-{job}"
    cluster.close_breakpoint(gate)
    command = [*PODFERRY, "--lab", cluster.lab.name, "migrate", job, "--to", B, "--mode", "stop"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as shell:
        cluster.reached(gate)
        shell.send_signal(signal.SIGINT)
        cluster.open_breakpoints()
        said, _ = shell.communicate(timeout=60)
    assert shell.returncode == 6, said
    assert cluster.ended(A, job)["outcome"] == "cancelled"
    cluster.only_on(A, job)
    cluster.goes_on(A, job)


def test_not_root(cluster: Cluster) -> None:
    program = "import os; os.geteuid = lambda: 65534; from podferry.cli import main; main()"
    command = [sys.executable, "-c", program, "lab", "status", "--lab", cluster.lab.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "root" in done.stderr

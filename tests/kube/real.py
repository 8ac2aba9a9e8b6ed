"""The real thing: etcd, kube-apiserver, kube-controller-manager and kube-scheduler, with no node; started once for
all tests here.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from podferry.kube.schema import RESOURCES, definition
from podferry.lab.state import CACHE

BINARIES = Path(os.environ.get("PODFERRY_KUBE_BIN", "/opt/podferry/kube/bin"))
NEEDED = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")


def missing() -> str:
    """What this machine lacks for it; empty where nothing is."""
    absent = [name for name in NEEDED if not (BINARIES / name).exists()]
    if absent:
        return f"{', '.join(absent)} not in {BINARIES} (PODFERRY_KUBE_BIN)"
    return "" if etcd() else "no etcd here (Debian: etcd-server)"


def etcd() -> Path | None:
    """The host's own, or the one of the lab's node image."""
    found = shutil.which("etcd")
    of_lab = sorted(CACHE.glob("node-*/usr/bin/etcd"))
    return Path(found) if found else (of_lab[-1] if of_lab else None)


@contextmanager
def control_plane(*, bare: bool = False) -> Iterator[Path]:
    """Up while the context lasts, with podferry's CRDs and RuntimeClass unless it is to be `bare`.

    Yields an administrator's kubeconfig.
    """
    with tempfile.TemporaryDirectory(prefix="podferry-test-") as where:
        home = Path(where)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            yield _start(home, processes, bare=bare)
        finally:
            for one in reversed(processes):
                one.send_signal(signal.SIGKILL)
                one.wait()


def _start(home: Path, processes: list[subprocess.Popen[bytes]], *, bare: bool) -> Path:
    def start(name: str, program: Path, *argv: str) -> None:
        log = (home / f"{name}.log").open("wb")
        processes.append(
            subprocess.Popen([program, *argv], stdout=log, stderr=log, cwd=home, preexec_fn=_die_with_parent)  # noqa: PLW1509 - before any thread
        )

    store, peers, api, *rest = _ports(5)
    program = etcd()
    assert program is not None
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (home / "sa.key").write_bytes(pem)
    token = secrets.token_hex(16)
    (home / "tokens").write_text(f'{token},admin,admin,"system:masters"\n')
    start(
        "etcd",
        program,
        f"--data-dir={home}/etcd",
        f"--listen-client-urls=http://127.0.0.1:{store}",
        f"--advertise-client-urls=http://127.0.0.1:{store}",
        f"--listen-peer-urls=http://127.0.0.1:{peers}",
        f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
        f"--initial-cluster=default=http://127.0.0.1:{peers}",
        "--unsafe-no-fsync",
    )
    start(
        "apiserver",
        BINARIES / "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{store}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        f"--secure-port={api}",
        f"--cert-dir={home}/tls",
        "--service-cluster-ip-range=10.99.0.0/16",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={home}/sa.key",
        f"--service-account-signing-key-file={home}/sa.key",
        f"--token-auth-file={home}/tokens",
        "--authorization-mode=RBAC",
        "--allow-privileged=true",
        "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
    )
    kubeconfig = home / "kubeconfig"
    server = f"https://127.0.0.1:{api}"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
                "clusters": [{"name": "test", "cluster": {"server": server, "insecure-skip-tls-verify": True}}],
                "users": [{"name": "admin", "user": {"token": token}}],
            }
        )
    )
    with httpx2.Client(base_url=server, verify=False, headers={"Authorization": f"Bearer {token}"}) as http:
        _until(lambda: http.get("/readyz").status_code == 200, home / "apiserver.log", processes)
        for resource in () if bare else RESOURCES:
            made = http.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", json=definition(resource))
            assert made.status_code == 201, made.text
        runtime = {"metadata": {"name": "podferry"}, "handler": "podferry"}
        if not bare:
            assert http.post("/apis/node.k8s.io/v1/runtimeclasses", json=runtime).status_code == 201
        for resource in () if bare else RESOURCES:
            path = resource.kind.path()
            _until(lambda path=path: http.get(path).status_code == 200, home / "apiserver.log", processes)
    common = (f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--bind-address=127.0.0.1")
    start(
        "controller-manager",
        BINARIES / "kube-controller-manager",
        *common,
        f"--secure-port={rest[0]}",
        f"--service-account-private-key-file={home}/sa.key",
        "--controllers=*,-node-lifecycle-controller,-taint-eviction-controller",
    )
    start("scheduler", BINARIES / "kube-scheduler", *common, f"--secure-port={rest[1]}")
    return kubeconfig


def _die_with_parent() -> None:
    """A test run that is killed leaves no control plane behind (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _until(holds: object, log: Path, processes: list[subprocess.Popen[bytes]], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if holds():  # type: ignore[operator]
                return
        except httpx2.HTTPError:
            pass
        if dead := [one.args for one in processes if one.poll() is not None]:
            raise RuntimeError(f"{dead} ended: {log.read_text()[-3000:]}")
        time.sleep(0.1)
    raise RuntimeError(f"the control plane does not come up: {log.read_text()[-3000:]}")


def _ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports

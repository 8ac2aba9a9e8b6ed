"""Real containerd over real snapshotters, and a registry that counts what it is asked for."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from podferry.fs.mounts import unmount
from podferry.node.process import Completed, run, spawn
from podferry.snapshotter.layer_mounts import mount_points

NAMESPACE = "k8s.io"
READY = 30.0


@dataclass
class Image:
    """An OCI image in memory: blobs by digest, layer digests, and what its files must be."""

    name: str
    blobs: dict[str, bytes]
    manifest: str
    layers: list[str]
    chains: list[str]


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def make_image(name: str, *layers: Callable[[tarfile.TarFile], None]) -> Image:
    """An image whose layers the functions fill."""
    blobs: dict[str, bytes] = {}
    descriptors, diffs = [], []
    for fill in layers:
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
            fill(tar)
        packed = gzip.compress(raw.getvalue(), 1, mtime=0)
        blobs[digest(packed)] = packed
        diffs.append(digest(raw.getvalue()))
        kind = "application/vnd.oci.image.layer.v1.tar+gzip"
        descriptors.append({"mediaType": kind, "digest": digest(packed), "size": len(packed)})
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    rootfs = {"type": "layers", "diff_ids": diffs}
    config = json.dumps({"architecture": arch, "os": "linux", "config": {}, "rootfs": rootfs}).encode()
    blobs[digest(config)] = config
    kind = "application/vnd.oci.image.config.v1+json"
    described = {"mediaType": kind, "digest": digest(config), "size": len(config)}
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": described,
            "layers": descriptors,
        }
    ).encode()
    blobs[digest(manifest)] = manifest
    chains = [diffs[0]]
    for diff in diffs[1:]:
        chains.append(digest(f"{chains[-1]} {diff}".encode()))
    return Image(name, blobs, digest(manifest), [one["digest"] for one in descriptors], chains)  # type: ignore[misc]


def file(tar: tarfile.TarFile, name: str, content: bytes = b"", mode: int = 0o644, **more: object) -> None:
    info = tarfile.TarInfo(name)
    info.mode, info.size, info.mtime = mode, len(content), 1_700_000_000
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def program(tar: tarfile.TarFile, *paths: str) -> None:
    """Programs of the node with the libraries they need."""
    wanted = {Path(path): Path(path).resolve() for path in paths}
    for path in paths:
        for line in run(["ldd", path]).stdout.splitlines():
            library = next((word for word in line.split() if word.startswith("/")), None)
            if library:
                wanted[Path(library)] = Path(library).resolve()
    for name, real in sorted(wanted.items()):
        file(tar, str(name).lstrip("/"), real.read_bytes(), 0o755)


class Registry(http.server.ThreadingHTTPServer):
    """Serves images and counts the bytes of every blob."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.images: dict[str, Image] = {}
        self.served: Counter[str] = Counter()
        self.before: Callable[[str], None] = lambda digest: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, image: Image) -> str:
        """Offer an image; its reference."""
        self.images[image.name] = image
        return f"127.0.0.1:{self.server_address[1]}/{image.name}:1"

    def layer_bytes(self, image: Image) -> int:
        """How many bytes of the image's layers were asked for."""
        return sum(self.served[layer] for layer in image.layers)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Registry
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None: ...

    def _answer(self, *, body: bool) -> None:
        _, _, name, kind, what, *_ = [*self.path.split("/"), "", "", "", ""]
        image = self.server.images.get(name)
        wanted = (image.manifest if what == "1" else what) if image else ""
        data = image.blobs.get(wanted) if image else None
        if self.path == "/v2/":
            data, wanted = b"{}", ""
        if data is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        manifest = kind == "manifests"
        self.send_header(
            "Content-Type", "application/vnd.oci.image.manifest.v1+json" if manifest else "application/octet-stream"
        )
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Docker-Content-Digest", wanted)
        self.end_headers()
        if body:
            self.server.before(wanted)
            self.wfile.write(data)
            self.server.served[wanted] += len(data)


@dataclass
class ContainerdNode:
    """A containerd and a snapshotter of their own, as one node has them."""

    home: Path
    share: Path
    name: str
    snapshotter: str = "podferry"
    options: list[str] = field(default_factory=list)
    driver: list[str] = field(default_factory=lambda: ["-c", "from podferry.snapshotter import main; main()"])
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.home / "containerd.sock"

    def start(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.start_snapshotter()
        self.start_containerd()

    def start_snapshotter(self, *driver: str) -> None:
        argv = ["python3", "-P", *(driver or self.driver), "--share", self.share, "--root", self.home / "root"]
        argv += ["--socket", self.home / "snap.sock", "--node", self.name, *self.options]
        self._spawn("snapshotter", [str(one) for one in argv])
        _answers(self.home / "snap.sock", self.processes["snapshotter"], self.home / "snapshotter.log")

    def start_containerd(self) -> None:
        config = self.home / "containerd.toml"
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        config.write_text(f"""\
version = 2
root = "{self.home}/containerd"
state = "{self.home}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{self.socket}"
[ttrpc]
  address = "{self.home}/ttrpc.sock"
[proxy_plugins.podferry]
  type = "snapshot"
  address = "{self.home}/snap.sock"
[{cri}]
  restrict_oom_score_adj = true
  disable_apparmor = true
[{cri}.containerd]
  snapshotter = "{self.snapshotter}"
""")
        self._spawn("containerd", ["containerd", "--config", str(config)])
        _answers(self.socket, self.processes["containerd"], self.home / "containerd.log")
        # the CRI service comes last, and answers before it can do anything
        with grpc.insecure_channel(f"unix://{self.socket}") as channel:
            call = channel.unary_unary("/runtime.v1.ImageService/ListImages")
            until = time.monotonic() + READY
            while True:
                try:
                    call(b"", wait_for_ready=True, timeout=READY)
                except grpc.RpcError as error:
                    if "not initialized" not in error.details() or time.monotonic() > until:
                        raise
                    threading.Event().wait(0.05)
                else:
                    return

    def pull(self, reference: str, *, timeout: float = 120.0) -> None:
        """Pull as the kubelet does: CRI's ImageService/PullImage, whose request is written by hand (fields 1 and 1),
        and once more where containerd has not yet noticed that the snapshotter is back."""
        name = reference.encode()
        spec = b"\x0a" + bytes([len(name)]) + name
        with grpc.insecure_channel(f"unix://{self.socket}") as channel:
            call = channel.unary_unary("/runtime.v1.ImageService/PullImage")
            for last in (False, False, False, True):
                try:
                    call(b"\x0a" + bytes([len(spec)]) + spec, timeout=timeout)
                except grpc.RpcError as error:
                    if last or "while dialing" not in error.details():
                        raise
                    threading.Event().wait(2.0)
                else:
                    return

    def remove_image(self, reference: str) -> None:
        """Remove an image and wait until its snapshots are collected."""
        self.ctr("images", "rm", "--sync", reference)
        for line in self.ctr("images", "ls", "-q").stdout.split():
            self.ctr("images", "rm", "--sync", line)

    def ctr(self, *argv: str, check: bool = True, timeout: float = 60.0) -> Completed:
        whole = ["ctr", "--address", self.socket, "-n", NAMESPACE, *argv]
        return run(whole, check=check, timeout=timeout)

    def run(self, reference: str, *argv: str) -> str:
        """Run a container to its end; what it printed."""
        flags = ["--rm", "--snapshotter", self.snapshotter]
        return self.ctr("run", *flags, reference, f"c-{os.urandom(4).hex()}", *argv).stdout

    @contextmanager
    def mounted(self, reference: str) -> Iterator[Path]:
        """The image's files."""
        at = self.home / f"look-{os.urandom(4).hex()}"
        at.mkdir()
        self.ctr("images", "mount", "--snapshotter", self.snapshotter, reference, str(at))
        try:
            yield at
        finally:
            run(["umount", at])
            self.ctr("snapshots", "--snapshotter", self.snapshotter, "rm", str(at))
            at.rmdir()

    def kill(self, what: str) -> None:
        process = self.processes.pop(what)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for what in list(self.processes):
            self.kill(what)
        for point in sorted(mount_points(self.home), reverse=True):
            unmount(point)
        shutil.rmtree(self.home, ignore_errors=True)

    def log(self, what: str = "snapshotter") -> str:
        return (self.home / f"{what}.log").read_text()

    def _spawn(self, what: str, argv: list[str]) -> None:
        environment = {"PYTHONPATH": os.environ["PYTHONPATH"], "PYTHONDONTWRITEBYTECODE": "1"}
        with (self.home / f"{what}.log").open("ab") as log:
            self.processes[what] = spawn(argv, stdout=log, stderr=log, env=environment)


def _answers(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    ended = threading.Event()
    for _ in range(int(READY / 0.05)):
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(str(path)) == 0:
                return
        assert process.poll() is None, log.read_text()
        ended.wait(0.05)
    raise AssertionError(f"no process listens at {path}:\n{log.read_text()}")

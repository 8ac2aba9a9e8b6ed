"""A snapshotter in this process, spoken to over a real socket as containerd does, and the mounts it hands out."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from podferry.fs.mounts import unmount
from podferry.node.process import run
from podferry.protos import snapshots_pb2 as pb
from podferry.protos import snapshots_pb2_grpc
from podferry.protos.types_pb2 import Mount
from podferry.snapshotter import layout
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.erofs import ErofsForm
from podferry.snapshotter.grpc_service import Service
from podferry.snapshotter.layer_mounts import mount_points
from podferry.snapshotter.layer_ports import SystemClock
from podferry.snapshotter.layout import FormName
from podferry.snapshotter.leases import Leases
from podferry.snapshotter.metadata import Metadata
from podferry.snapshotter.opening import initialise, open_share
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.publisher import Publisher
from podferry.snapshotter.references import References
from podferry.snapshotter.snapshotter import REF, Snapshotter
from podferry.snapshotter.store import LayerStore
from podferry.snapshotter.tree import TreeForm

KINDS = {"view": pb.VIEW, "active": pb.ACTIVE, "committed": pb.COMMITTED}
GC = {"containerd.io/gc.root": "2026"}


LOCAL = Path("/var/lib/podferry")
"""On a node's plain disk; /tmp is a tmpfs, from which EROFS images are only mounted through loop devices."""
NETWORK = Path("/share")


@contextmanager
def scratch(where: Path) -> Iterator[Path]:
    """A directory of the test's own."""
    path = where / f"test-{secrets.token_hex(4)}"
    path.mkdir()
    try:
        yield path
    finally:
        for point in mount_points(path):
            unmount(point)
        shutil.rmtree(path, ignore_errors=True)


class Rig:
    """One node: its snapshotter, and a client of it."""

    def __init__(
        self,
        home: Path,
        share: Path,
        *,
        name: str = "node",
        form: FormName = FormName.EROFS,
        share_all: bool = False,
        wait: float = 20.0,
        deadline: float = 15.0,
        read_only: bool = False,
    ) -> None:
        self.home, self.share_all = home, share_all
        self.root = home / "root"
        self.root.mkdir(parents=True, exist_ok=True)
        if not (share / layout.MARKER).exists():
            share.mkdir(parents=True, exist_ok=True)
            initialise(share)
        self.metadata = Metadata(self.root / "metadata.db")
        self.share: PosixShare = open_share(share, guard=Guard(deadline), read_only=read_only)
        clock = SystemClock()
        instance = self.metadata.fact("instance", layout.new_token)
        self.store = LayerStore(
            self.share,
            clock,
            References(self.share, clock, name, instance),
            Leases(self.share, clock, name, 5.0),
            forms={FormName.DIR: TreeForm(self.share), FormName.EROFS: ErofsForm(self.share, self.root / "scratch")},
            form=form,
            read_only=read_only,
        )
        self.publisher = Publisher(self.root, self.metadata, self.store)
        self.snapshotter = Snapshotter(self.root, self.metadata, self.store, self.publisher, wait=wait)
        self.socket = home / "s"
        self.server = grpc.server(ThreadPoolExecutor(16))
        snapshots_pb2_grpc.add_SnapshotsServicer_to_server(Service(self.snapshotter), self.server)
        self.server.add_insecure_port(f"unix://{self.socket}")
        self.server.start()
        self.channel = grpc.insecure_channel(f"unix://{self.socket}")
        self.stub = snapshots_pb2_grpc.SnapshotsStub(self.channel)

    def stop(self) -> None:
        """End the service; its files and mounts stay."""
        self.channel.close()
        self.server.stop(0).wait()
        self.metadata.close()

    def close(self) -> None:
        """End the service and remove what it made."""
        self.stop()
        for point in mount_points(self.home):
            unmount(point)
        shutil.rmtree(self.home, ignore_errors=True)

    # -- containerd's calls --------------------------------------------------------------------------------------------

    def prepare(self, key: str, parent: str = "", labels: dict[str, str] | None = None) -> list[Mount]:
        return list(self.stub.Prepare(pb.PrepareSnapshotRequest(key=key, parent=parent, labels=labels or GC)).mounts)

    def view(self, key: str, parent: str = "", labels: dict[str, str] | None = None) -> list[Mount]:
        return list(self.stub.View(pb.ViewSnapshotRequest(key=key, parent=parent, labels=labels or GC)).mounts)

    def commit(self, name: str, key: str, labels: dict[str, str] | None = None) -> None:
        labels = dict(labels or GC)
        if self.share_all:
            labels.setdefault(REF, some_chain())
        self.stub.Commit(pb.CommitSnapshotRequest(name=name, key=key, labels=labels))
        if self.share_all:
            assert self.publisher.publish_all(), [layer.note for layer in self.metadata.layers()]

    def stat(self, key: str) -> pb.Info:
        return self.stub.Stat(pb.StatSnapshotRequest(key=key)).info

    def remove(self, key: str) -> None:
        self.stub.Remove(pb.RemoveSnapshotRequest(key=key))

    def update(self, info: pb.Info, *paths: str) -> pb.Info:
        request = pb.UpdateSnapshotRequest(info=info)
        request.update_mask.paths.extend(paths)
        return self.stub.Update(request).info

    def walk(self, *filters: str) -> list[pb.Info]:
        return [info for page in self.stub.List(pb.ListSnapshotsRequest(filters=filters)) for info in page.info]

    def names(self, *filters: str) -> list[str]:
        return sorted(info.name for info in self.walk(*filters))

    # -- files -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def mounted(self, mounts: list[Mount]) -> Iterator[Path]:
        """Mount what the service gave, as containerd would."""
        at = self.home / "mounted" / secrets.token_hex(4)
        at.mkdir(parents=True)
        (mount,) = mounts
        options = ",".join(option for option in mount.options if option not in ("rbind", "ro", "rw"))
        if mount.type == "bind":
            run(["mount", "--rbind", mount.source, at])
            if "ro" in mount.options:
                run(["mount", "-o", "remount,bind,ro", at])
        else:
            short = options.replace(f"{self.root}/l/", "")  # containerd shortens many layers in the same way
            environment = {"LIBMOUNT_FORCE_MOUNT2": "always"}
            run(["mount", "-t", mount.type, "-o", short, mount.source, at], env=environment, cwd=self.root / "l")
        try:
            yield at
        finally:
            run(["umount", at])


@contextmanager
def refused(code: str) -> Iterator[list[str]]:
    """The call must fail with this status; yields a list that then holds what was said."""
    said: list[str] = []
    try:
        yield said
    except grpc.RpcError as error:
        assert error.code().name == code, f"{error.code()}: {error.details()}"
        said.append(error.details())
    else:
        raise AssertionError(f"the call succeeded instead of {code}")


def some_chain() -> str:
    return "sha256:" + secrets.token_hex(32)


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything a container can see of a tree: kinds, modes, owners, link targets, content; hard links by group."""
    seen: dict[str, tuple[object, ...]] = {}
    groups: dict[tuple[int, int], str] = {}
    for path in sorted([root, *root.rglob("*")]):
        about = path.lstat()
        kind: object = None
        if stat.S_ISLNK(about.st_mode):
            kind = str(path.readlink())
        elif stat.S_ISREG(about.st_mode):
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISCHR(about.st_mode):
            kind = about.st_rdev
        name = str(path.relative_to(root))
        group = None if stat.S_ISDIR(about.st_mode) else groups.setdefault((about.st_dev, about.st_ino), name)
        attributes = tuple(
            (one, os.getxattr(path, one, follow_symlinks=False))
            for one in os.listxattr(path, follow_symlinks=False)
            if one.startswith("user.") or one == "security.capability"
        )
        seen[name] = (about.st_mode, about.st_uid, about.st_gid, kind, group, attributes)
    return seen

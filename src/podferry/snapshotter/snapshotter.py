"""What each call of containerd's snapshot service does.

Unpacking goes to the node's own disk and `Commit` returns as soon as that is durable, because containerd holds its
metadata lock meanwhile; the layer is copied to the share right after, by the `Publisher`. Until then, and whenever the
share is away, the node works from its own copy.

On disk below the root:

    metadata.db         names, kinds, parents, labels
    snapshots/ID/fs     the files of a snapshot that are on this node; `work` beside it is overlayfs's
    images/ID           where a layer's EROFS image, or its tree, is mounted from the share
    l/ID                a link to wherever the layer is now; short, since 128 of them go into one mount call
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from podferry.errors import PodferryError
from podferry.fs.beneath import DIRECTORY, Beneath
from podferry.fs.mounts import unmount
from podferry.fs.private import private_directory
from podferry.node.containerd import LAYER_MAKER
from podferry.snapshotter import layout
from podferry.snapshotter.erofs import IMAGE
from podferry.snapshotter.faults import LayerMissing
from podferry.snapshotter.kept import NodeDigests
from podferry.snapshotter.layer_mounts import mount_directory, mount_image, mount_points
from podferry.snapshotter.layout import FormName
from podferry.snapshotter.leases import Lease
from podferry.snapshotter.metadata import Metadata, SnapshotExists, SnapshotInUse
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.publisher import Publisher
from podferry.snapshotter.snapshot_row import Home, SnapshotKind, SnapshotRow
from podferry.snapshotter.store import Layer, LayerStore
from podferry.snapshotter.tree import FILES, walk

REF = "containerd.io/snapshot.ref"
"""The label with which containerd's unpacker says which layer it is about to download."""
UID_MAP, GID_MAP = "containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"
POLL = (0.2, 2.0)  # seconds between looks while another node makes a layer: the first, and the longest

log = structlog.get_logger()


@dataclass(frozen=True)
class PreparedMount:
    """A mount as containerd takes it."""

    type: str
    source: str
    options: list[str]


class Snapshotter:
    """containerd's snapshotter over a layer store. Safe to use from several threads.

    `wait` is how long, in seconds, a `Prepare` waits for another node that is making the same layer; after that the
    node makes it for itself. containerd's garbage collector stands still for so long at worst.
    """

    def __init__(
        self, root: Path, metadata: Metadata, store: LayerStore, publisher: Publisher, *, wait: float = 60.0
    ) -> None:
        self.root = root
        self.metadata = metadata
        self.store = store
        self.publisher = publisher
        self.wait = wait
        self.starting: Callable[[Sequence[str]], None] = lambda chains: None
        """Told of the layers on the share, by chain id, that a new container runs from."""
        self.kept = NodeDigests(metadata)
        store.kept = self.kept
        self._mounting = threading.Lock()
        for folder in ("snapshots", "images", "l"):
            private_directory(root / folder, below=root)

    # -- containerd's calls ------------------------------------------------------------------------------------------

    def stat(self, name: str) -> SnapshotRow:
        """The snapshot `name`."""
        return self.metadata.get(name)

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> SnapshotRow:
        """Change labels."""
        return self.metadata.update(name, labels, paths)

    def walk(self, filters: Sequence[str]) -> list[SnapshotRow]:
        """The snapshots that a filter asks for."""
        return self.metadata.all(filters)

    def usage(self, name: str) -> tuple[int, int]:
        """Bytes and inodes on this node's disk; a layer that lives on the share takes none."""
        found = self.metadata.get(name)
        if found.kind is SnapshotKind.COMMITTED:
            return found.bytes, found.inodes
        return disk_usage(self.files(found))

    def prepare(
        self, key: str, parent: str, labels: Mapping[str, str], stop: threading.Event | None = None
    ) -> list[PreparedMount]:
        """A new active snapshot. With the label of a layer that the share has, `SnapshotExists`: nothing to download."""
        chain = labels.get(REF, "")
        if layout.is_chain(chain) and self._found(chain, parent, labels, stop or threading.Event()):
            raise SnapshotExists(f"layer {chain} is there already")
        if layout.is_chain(chain) and (maker := self._maker(chain)):
            labels = {**labels, LAYER_MAKER: maker}  # for a target that looks for its image, and need not pull it
        mounts = self._create(SnapshotKind.ACTIVE, key, parent, labels)
        if not chain:
            self.starting([one.chain for one in self.metadata.lineage(parent) if one.home is Home.SHARE and one.chain])
        return mounts

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[PreparedMount]:
        """A new read-only snapshot."""
        return self._create(SnapshotKind.VIEW, key, parent, labels)

    def mounts(self, key: str) -> list[PreparedMount]:
        """How to mount an active snapshot or a view."""
        found = self.metadata.get(key)
        if found.kind is SnapshotKind.COMMITTED:
            raise SnapshotInUse(f"snapshot {key} is committed", why="only active snapshots and views are mounted")
        return self._mounts(found, self._lowers(found.parent))

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """Make an active snapshot a layer; it is copied to the share afterwards."""
        active = self.metadata.get(key)
        if active.kind is not SnapshotKind.ACTIVE:
            raise SnapshotInUse(f"snapshot {key} is not active")
        size = disk_usage(self.files(active))
        chain = _chain(name, labels, active.labels)
        done = self.metadata.commit(name, key, labels, size=size, chain=chain, parent=parent)
        if done.chain is not None:
            self.publisher.wake()

    def remove(self, name: str) -> None:
        """Forget a snapshot; its files go right away, the layer on the share stays for others."""
        gone = self.metadata.remove(name)
        if gone.chain is not None and not self._still_used(gone.chain):
            self.store.references.drop(gone.chain)
            self.kept.forget(gone.chain)
        if (chain := gone.labels.get(REF)) is not None and gone.kind is SnapshotKind.ACTIVE:
            self.publisher.abandon(chain)
        self._delete(gone.id)

    def unpacking(self) -> bool:
        """Whether containerd is unpacking a layer into an active snapshot."""
        return any(one.kind is SnapshotKind.ACTIVE and REF in one.labels for one in self.metadata.all([]))

    def cleanup(self) -> None:
        """Delete what crashes and finished moves left on disk."""
        known = self.metadata.ids()
        for folder in ("snapshots", "images", "l"):
            for entry in (self.root / folder).iterdir():
                if not entry.name.isdecimal() or int(entry.name) not in known:
                    self._delete_entry(entry)
        self.publisher.drop_copies()

    # -- what they are made of ---------------------------------------------------------------------------------------

    def files(self, snapshot: SnapshotRow) -> Path:
        """Where the files of a snapshot are on this node's disk."""
        return self.root / "snapshots" / str(snapshot.id) / "fs"

    def _found(self, chain: str, parent: str, labels: Mapping[str, str], stop: threading.Event) -> bool:
        """Whether the layer is there, if need be after another node has made it; then it is a snapshot of ours."""
        if self.metadata.layer(chain, parent) is not None:
            return True
        try:
            layer = self._await(chain, stop)
        except PodferryError as error:  # the share is an opportunity; without it containerd downloads as always
            log.warning("share not asked", chain=chain, code=error.code, why=str(error))
            return False
        if layer is None:
            return False
        self.store.keep(layer)
        self.metadata.refer(chain, parent, chain, labels)
        log.info("layer found on the share", chain=chain, bytes=layer.record.bytes, published_by=layer.record.node)
        return True

    def _await(self, chain: str, stop: threading.Event) -> Layer | None:
        """The layer; None when it is ours to make, or when waiting took too long."""
        if self.store.read_only:
            return self.store.find(chain)
        clock = self.store.clock
        until = clock.monotonic() + self.wait
        pause = POLL[0]
        while True:
            answer = self.store.claim(chain)
            if isinstance(answer, Layer):
                return answer
            if self.publisher.holds(chain):  # containerd began before, and died; or does so in another namespace
                return None
            if isinstance(answer, Lease):
                self.publisher.hold(chain, answer)
                return None
            if clock.monotonic() >= until:
                log.warning("no longer waiting for another node's layer", chain=chain, node=answer.node)
                return None
            if clock.pause(pause, stop):
                return None
            pause = min(pause * 1.5, POLL[1])

    def _maker(self, chain: str) -> str:
        """Which other node is making a layer just now, and how far its sign of life is."""
        if self.publisher.holds(chain):
            return ""
        with suppress(PodferryError):
            return self.store.leases.holder(layout.name_of(chain))
        return ""

    def _create(self, kind: SnapshotKind, key: str, parent: str, labels: Mapping[str, str]) -> list[PreparedMount]:
        top_owner = self._top_owner(parent)
        owner = _mapped_root(labels) or top_owner
        made = self.metadata.create(kind, key, parent, labels, lambda made: self._make_directories(made, owner))
        try:  # looked up again: only from here on do the copies stay that a layer has on disk when it moves to the share
            return self._mounts(made, self._lowers(parent))
        except BaseException:
            self.remove(key)
            raise

    def _make_directories(self, made: SnapshotRow, owner: tuple[int, int] | None) -> None:
        files = self.files(made)
        shutil.rmtree(files.parent, ignore_errors=True)  # of a crash before the same number was given out
        private_directory(files.parent, below=self.root)
        files.mkdir()
        files.chmod(0o755)
        (files.parent / "work").mkdir(mode=0o711)
        if owner is not None:
            os.chown(files, *owner)

    def _top_owner(self, parent: str) -> tuple[int, int] | None:
        """The owner of the root directory, which overlayfs takes from the top layer. All layers must be there and answer."""
        if not parent:
            return None
        try:
            return self._owner_of(self._lowers(parent)[0], parent)
        except FileNotFoundError:  # it has just moved to the share, which it does once
            return self._owner_of(self._lowers(parent)[0], parent)

    def _owner_of(self, top: Path, name: str) -> tuple[int, int]:
        layer = self.metadata.get(name)
        at = self.root / "images" / str(layer.id)
        on_share = layer.home is Home.SHARE and mount_points(at).get(at) != "erofs"  # whose root is in memory
        about = self._share.call(f"look at {top}", top.stat) if on_share else top.stat()
        return about.st_uid, about.st_gid

    def _lowers(self, parent: str) -> list[Path]:
        return [self._lower(layer) for layer in self.metadata.lineage(parent)]

    def _mounts(self, snapshot: SnapshotRow, lowers: list[Path]) -> list[PreparedMount]:
        files = self.files(snapshot)
        writable = snapshot.kind is SnapshotKind.ACTIVE
        if not lowers:
            return [PreparedMount("bind", str(files), ["rw" if writable else "ro", "rbind"])]
        if not writable and len(lowers) == 1:
            return [PreparedMount("bind", str(lowers[0]), ["ro", "rbind"])]
        options = [f"lowerdir={':'.join(map(str, lowers))}"]
        if writable:
            options = [f"workdir={files.parent / 'work'}", f"upperdir={files}", *options]
        return [PreparedMount("overlay", "overlay", options)]

    def _lower(self, layer: SnapshotRow) -> Path:
        """The path of a layer for overlayfs, there and answering."""
        up = Path("..")
        if layer.home is Home.DISK or layer.chain is None:
            return self._link(layer, up / "snapshots" / str(layer.id) / "fs")
        self.kept.demand_whole(layer.chain)
        if self._mounted(layer):
            return self._link(layer, up / "images" / str(layer.id))
        published = self.store.need(layer.chain)
        with self._mounting:
            if not self._mounted(self.metadata.get(layer.name)):
                self._mount(layer, published)
        return self._link(layer, up / "images" / str(layer.id))

    def _mount(self, layer: SnapshotRow, published: Layer) -> None:
        at = self.root / "images" / str(layer.id)
        tree = published.record.form is FormName.DIR
        path = f"{published.at}/{FILES if tree else IMAGE}"

        def mount(root: Beneath) -> None:
            descriptor = root.open(path, DIRECTORY) if tree else root.open_regular(path)
            try:
                mount_directory(descriptor, at) if tree else mount_image(descriptor, at)
            finally:
                os.close(descriptor)

        unmount(
            at
        )  # of a share that has gone; who still runs from it keeps it. First: `at` is its root, and may be read-only
        private_directory(at, below=self.root)
        try:
            self._share.at(f"mount {path}", mount)
        except FileNotFoundError as gone:
            raise LayerMissing(f"layer {layer.chain} is not on the share", why=str(gone)) from gone
        self.metadata.mounted(layer.id, self._share.device)

    def _mounted(self, layer: SnapshotRow) -> bool:
        """Whether the layer's image is mounted, from the share as it is mounted now.

        Asks the kernel's list and nobody else, so that a hung share does not matter.
        """
        at = self.root / "images" / str(layer.id)
        return self._share.device in (layer.device, -1) and at in mount_points(at)

    @property
    def _share(self) -> PosixShare:
        share = self.store.share
        assert isinstance(share, PosixShare)
        return share

    def _link(self, layer: SnapshotRow, target: Path) -> Path:
        link = self.root / "l" / str(layer.id)
        if not (link.is_symlink() and link.readlink() == target):
            draft = link.with_name(f".{layer.id}.{layout.new_token()}")
            draft.symlink_to(target)
            draft.rename(link)
        return link

    def _still_used(self, chain: str) -> bool:
        return any(layer.chain == chain for layer in self.metadata.layers())

    def _delete(self, identity: int) -> None:
        for folder in ("l", "images", "snapshots"):
            self._delete_entry(self.root / folder / str(identity))

    def _delete_entry(self, entry: Path) -> None:
        try:
            if entry.parent.name == "images":
                unmount(entry)
                with suppress(FileNotFoundError):
                    entry.rmdir()
            elif entry.is_symlink():
                entry.unlink(missing_ok=True)
            elif entry.exists():
                shutil.rmtree(entry)
        except OSError as error:  # the snapshot is gone already; `cleanup` tries again
            log.warning("left on disk", path=str(entry), why=str(error))


def _chain(name: str, *labels: Mapping[str, str]) -> str | None:
    """The layer that a snapshot is: by label, or by the name `NAMESPACE/NUMBER/CHAIN` that clients without it use."""
    named = [given[REF] for given in labels if REF in given] or [name.rpartition("/")[2]]
    return named[0] if layout.is_chain(named[0]) else None


def disk_usage(root: Path) -> tuple[int, int]:
    """Bytes and inodes that a tree takes on disk."""
    found = [entry.about for entry in walk(root) if entry.link is None]
    return sum(about.st_blocks * 512 for about in found), len(found)


def _mapped_root(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """The host's user and group for the root of a user namespace, from containerd's `0:HOST:LENGTH` labels."""

    def host(label: str) -> int:
        for mapping in labels.get(label, "").split(","):
            inside, _, rest = mapping.partition(":")
            if inside == "0":
                return int(rest.partition(":")[0])
        return -1

    if UID_MAP not in labels and GID_MAP not in labels:
        return None
    return host(UID_MAP), host(GID_MAP)

"""Opening a share: is it mounted, is it ours, does it keep the promises that the store rests on?

Nothing is written before the share is known to be ours or empty, so another owner's files are never touched.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from podferry.fs.beneath import DIRECTORY, Beneath
from podferry.fs.mountinfo import holding, mounts
from podferry.snapshotter import layout
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.faults import ShareRefused, ShareUnavailable, faults
from podferry.snapshotter.posix import PosixShare, read_small, write_new

RENAMES_BY_COPYING = ("fuse.s3fs", "fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.mount-s3", "fuse.blobfuse2")
"""Object stores behind FUSE: a probe would not catch them every time, so they are known by name."""
OF_THE_FILE_SYSTEM = ("lost+found", ".trashcan", ".glusterfs", ".snapshot")
PROBE_FILES = 40
TRIES = 10


def open_share(root: Path, *, guard: Guard | None = None, create: bool = True, read_only: bool = False) -> PosixShare:
    """The share mounted at `root`, checked.

    An empty directory becomes a share if `create` is true and something is mounted there (an unmounted mount point is
    an empty directory too); one that does not exist is made, below such a mount.
    Raises `ShareRefused` with nothing changed, or the errors of `podferry.snapshotter.faults`.
    """
    guard = guard or Guard()

    def look() -> str | None:
        with faults(f"cannot open the share {root}"):
            if create and not read_only and not root.exists() and _mounted_kind(root) is not None:
                root.mkdir(mode=0o755, exist_ok=True)
            return _identify(root)

    share_id = guard.call(f"open the share {root}", look)
    if share_id is None:
        if read_only or not create:
            raise ShareRefused(f"{root} is empty", why="no share was made there", remedy="podferry images init")
        share_id = guard.call(f"make a share of {root}", lambda: _initialise(root))
    share = PosixShare(root, share_id, guard)
    if not read_only:
        for folder in layout.FOLDERS:
            _have(share, folder)
        probe(share)
    return share


def _have(share: PosixShare, folder: str) -> None:
    """See to it that a folder is there, and not only that some node has been told so.

    Where two nodes make the same directory at once, GlusterFS may tell both that it exists, and take back what the first had made
    (posix_mkdir undoes what it cannot give an id). Who was told so last makes it again.
    """
    for _ in range(TRIES):
        with suppress(FileExistsError):
            share.make(folder)
        with suppress(FileNotFoundError):
            return share.refresh(folder)
    raise ShareUnavailable(
        f"cannot make the folder {folder} on the share {share.root}",
        why="the share says that it exists, and has nothing there",
        remedy=f"make the directory {share.root / folder} by hand",
    )


def _identify(root: Path) -> str | None:
    """The id of the share at `root`, None for an empty mounted directory; refuses anything else."""
    with _opened(root) as there:
        return _identify_opened(root, there)


@contextmanager
def _opened(root: Path) -> Iterator[Beneath]:
    try:
        descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShareRefused(f"{root} is not a directory", remedy="mount the share there") from error
    try:
        yield Beneath(descriptor)
    finally:
        os.close(descriptor)


def _marked(there: Beneath) -> str | None:
    """The id of the share that this directory is marked as."""
    try:
        return layout.decode_marker(read_small(there, layout.MARKER))
    except FileNotFoundError:
        return None


def _identify_opened(root: Path, there: Beneath) -> str | None:
    kind = _mounted_kind(root)
    if kind in RENAMES_BY_COPYING:
        raise ShareRefused(
            f"{root} cannot carry layers",
            why=f"{kind} renames by copying, so that half a layer could be seen",
            remedy="use a POSIX file system: NFS, GlusterFS, CephFS, JuiceFS ...",
        )
    if (marked := _marked(there)) is not None:
        return marked
    foreign = _foreign(there)
    if layout.MARKER in foreign:  # another node has just made it
        return _marked(there)
    if foreign:
        raise ShareRefused(
            f"{root} belongs to somebody else",
            why=f"it has no {layout.MARKER}, but holds {foreign[0]!r} and {len(foreign) - 1} more",
            remedy="give podferry an empty directory of its own on the share",
        )
    if kind is None:
        raise ShareRefused(
            f"nothing is mounted at {root} or above it but the root file system",
            why="an empty directory there looks like a mount point whose share is not mounted",
            remedy="mount the share; to use a plain local directory: podferry images init --local",
        )
    return None


def _foreign(there: Beneath) -> list[str]:
    """What lies in a directory besides what a file system or a node making a share puts there."""
    drafts = f".{layout.MARKER}."
    with there.opened("", DIRECTORY) as directory, os.scandir(directory) as listing:
        names = [entry.name for entry in listing]
    return sorted(name for name in names if name not in OF_THE_FILE_SYSTEM and not name.startswith(drafts))


def _mounted_kind(root: Path) -> str | None:
    """The type of the file system at `root`; None when that is the root file system's."""
    found = holding(str(root.resolve()), mounts())
    return None if found is None or found.point == "/" else found.kind


def initialise(root: Path) -> str:
    """Make a share of the empty directory `root`, mounted or not; its id. A second call finds the first's."""
    with faults(f"cannot make a share of {root}"), _opened(root) as there:
        if (foreign := _foreign(there)) and layout.MARKER not in foreign:
            raise ShareRefused(f"{root} is not empty", remedy="give podferry an empty directory of its own")
        return _initialise_opened(there)


def _initialise(root: Path) -> str:
    with faults(f"cannot make a share of {root}"), _opened(root) as there:
        return _initialise_opened(there)


def _initialise_opened(there: Beneath) -> str:
    draft = f".{layout.MARKER}.{layout.new_token()}"
    with there.opened("", DIRECTORY) as place:
        try:
            write_new(there, draft, layout.encode({"format": layout.FORMAT, "id": str(uuid.uuid4())}))
            try:  # of several nodes that start at once, one wins
                os.link(draft, layout.MARKER, src_dir_fd=place, dst_dir_fd=place, follow_symlinks=False)
            except FileExistsError:
                pass
            except OSError:
                if _marked(there) is None:
                    os.rename(draft, layout.MARKER, src_dir_fd=place, dst_dir_fd=place)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(draft, dir_fd=place)
    return layout.decode_marker(read_small(there, layout.MARKER))


def probe(share: PosixShare) -> None:
    """Try what the store relies on. Raises `ShareRefused` naming what does not hold; leaves nothing behind."""
    base = f"{layout.STAGING}/probe.{layout.new_token()}"
    share.make(base)
    try:
        _probe_exclusive(share, base)
        _probe_rename(share, base)
    finally:
        share.remove_tree(base)


def _probe_exclusive(share: PosixShare, base: str) -> None:
    share.create(f"{base}/exclusive", b"1")
    try:
        share.create(f"{base}/exclusive", b"2")
    except FileExistsError:
        return
    raise _broken(share, "a file that exists was created a second time", "O_EXCL")


def _probe_rename(share: PosixShare, base: str) -> None:
    for name in ("new", "old"):
        share.make(f"{base}/{name}")
    for number in range(PROBE_FILES):
        share.create(f"{base}/new/{number}", b"")
    share.create(f"{base}/old/kept", b"")
    try:
        share.rename(f"{base}/new", f"{base}/old")
    except FileExistsError:
        pass
    else:
        raise _broken(share, "a directory with entries was replaced by rename", "rename")
    halves: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            halves.add(len(share.names(f"{base}/published")))

    watcher = threading.Thread(target=watch, name="probe", daemon=True)
    watcher.start()
    try:
        share.rename(f"{base}/new", f"{base}/published")
    finally:
        stop.set()
        watcher.join(share.guard.deadline)
    if share.names(f"{base}/new") or len(share.names(f"{base}/published")) != PROBE_FILES:
        raise _broken(share, "a renamed directory is not whole, or still has its old name", "rename")
    if halves - {0, PROBE_FILES}:
        raise _broken(share, "a directory was seen half while it was renamed", "rename")


def _broken(share: PosixShare, what: str, call: str) -> ShareRefused:
    return ShareRefused(
        f"{share.root} cannot carry layers",
        why=f"{what}: {call} is not atomic there",
        remedy="use a POSIX file system: NFS, GlusterFS, CephFS, JuiceFS ...",
    )

"""One snapshot, as the node's database has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum


class SnapshotKind(IntEnum):
    """The numbers are containerd's."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class Home(StrEnum):
    """Where a snapshot's files are: on the node's own disk, or on the share."""

    DISK = "disk"
    SHARE = "share"


@dataclass(frozen=True)
class SnapshotRow:
    """One row. `chain` is the layer it is, if it is one; `bytes` and `inodes` are what it takes on the node's disk.

    `moved_at` is the newest snapshot's id when the files moved to the share: mounts of younger ones use the share.
    `note` says why a layer is not on the share; `boot` is the boot of the machine in which it was committed.
    `device` is that of the share from which its image was mounted.
    """

    id: int
    name: str
    kind: SnapshotKind
    parent: str
    created: int  # nanoseconds since the epoch
    updated: int
    labels: dict[str, str] = field(default_factory=dict)
    chain: str | None = None
    home: Home = Home.DISK
    bytes: int = 0
    inodes: int = 0
    moved_at: int | None = None
    note: str = ""
    boot: str = ""
    device: int | None = None

"""Which PersistentVolumes are directories of a file server: several nodes have them mounted, whatever their claims asked for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

Json = dict[str, Any]

ONE_POD = "ReadWriteOncePod"
SOURCES = frozenset({"nfs", "cephfs", "glusterfs", "azureFile"})
DRIVERS = frozenset(
    {
        "nfs.csi.k8s.io",
        "smb.csi.k8s.io",
        "efs.csi.aws.com",
        "file.csi.azure.com",
        "filestore.csi.storage.gke.io",
        "cephfs.csi.ceph.com",
        "rook-ceph.cephfs.csi.ceph.com",
    }
)
"""CSI drivers of file servers. The volumes of others may be disks, which two nodes that have them mounted would destroy: that a
driver attaches nothing (`attachRequired: false`) proves nothing."""


def holds(volume: Json, modes: Collection[str]) -> bool:
    """Whether the PersistentVolume with the spec `volume`, claimed with these access modes, is one. ReadWriteOnce is not enforced
    for such volumes; ReadWriteOncePod is, by the scheduler."""
    return ONE_POD not in modes and (bool(SOURCES & set(volume)) or (volume.get("csi") or {}).get("driver") in DRIVERS)

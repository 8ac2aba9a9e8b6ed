"""The form that keeps a layer as one EROFS image: one file to look up, copy, check and mount.

The share needs to carry nothing but plain files: owners, device numbers and extended attributes are inside the image.
"""

from __future__ import annotations

import os
import stat
import struct
import uuid
from pathlib import Path

from podferry.fs.beneath import Beneath
from podferry.fs.private import private_directory
from podferry.node.process import run
from podferry.snapshotter import layout
from podferry.snapshotter.faults import LayerDamaged
from podferry.snapshotter.layer_ports import Payload
from podferry.snapshotter.layout import FormName, LayerRecord
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.tree import survey

IMAGE = "layer.erofs"
MAGIC = struct.pack("<I", 0xE0F5E1E2)  # linux/magic.h, EROFS_SUPER_MAGIC_V1
MAGIC_AT = 1024  # bytes into the image, fs/erofs: EROFS_SUPER_OFFSET
PACKED = ("-zlz4hc,3", f"-C{1 << 16}")
"""Half the bytes cross the network when a program starts cold, and lz4 unpacks faster than any link brings them. That of level
3 is read in the same way and takes 13% less than plain lz4's, for 2.7 s of processor time more for 480 MB."""
MAKE_DEADLINE = 1800.0  # seconds for mkfs.erofs on the local disk
NAMESPACE = uuid.UUID("5d1ff3c3-66f8-4a3c-9fd5-2a6f3f4b62f0")


class ErofsForm:
    """A layer as one EROFS image. `scratch` is a local directory in which images are built before they are copied."""

    name = FormName.EROFS
    payload = IMAGE

    def __init__(self, share: PosixShare, scratch: Path) -> None:
        self.share = share
        self.scratch = scratch

    def write(self, source: Path, into: str) -> Payload:
        found = survey(source)
        private_directory(self.scratch, below=self.scratch.parent)
        image = self.scratch / f"{layout.new_token()}.erofs"
        try:
            # The same layer is the same bytes on whatever node and as often as it is made, so that a node that uses it takes
            # one that was made again for it: the UUID is the layer's, and no time is later than the newest of its files.
            layer = into.rpartition(".")[0]  # without the token of this attempt
            run(
                ["mkfs.erofs", "--quiet", *PACKED, "-U", str(uuid.uuid5(NAMESPACE, layer)), image, source],
                timeout=MAKE_DEADLINE,
                env={"SOURCE_DATE_EPOCH": str(found.newest)},
                remedy="install erofs-utils, or use --form dir",
            )
            digest = self.share.copy_in(image, f"{into}/{IMAGE}")
            return Payload(digest, image.stat().st_size, found.inodes)
        finally:
            image.unlink(missing_ok=True)

    def check(self, at: str, record: LayerRecord) -> None:
        self.glance(at, record)
        if self.share.digest(f"{at}/{IMAGE}") != record.digest:
            raise LayerDamaged(
                f"layer {record.chain} is damaged", why=f"the digest of {IMAGE} is not the one published"
            )

    def glance(self, at: str, record: LayerRecord) -> None:
        def look(root: Beneath) -> tuple[os.stat_result, bytes]:
            descriptor = root.open_regular(f"{at}/{IMAGE}")
            try:
                return os.fstat(descriptor), os.pread(descriptor, len(MAGIC), MAGIC_AT)
            finally:
                os.close(descriptor)

        about, magic = self.share.at(f"look at {at}", look)
        if not stat.S_ISREG(about.st_mode) or about.st_size != record.bytes or magic != MAGIC:
            raise LayerDamaged(
                f"layer {record.chain} is damaged",
                why=f"{IMAGE} has {about.st_size} bytes instead of {record.bytes}, or is no EROFS image",
            )

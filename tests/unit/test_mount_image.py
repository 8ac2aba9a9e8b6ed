"""CRIU's image of the mounts: what runc mounts anew on the target is not deleted there."""

from __future__ import annotations

import struct

import pytest

from podferry.criu.dump_images import without_deleted_sources
from podferry.errors import PeerMisbehaved

pytestmark = pytest.mark.unit
HEAD = struct.pack("<II", 0x54564319, 0x55563928)
EXTERNAL, DELETED = b"\x92\x01\x0b/etc/colour", b"\x80\x01\x01"  # fields 18 and 16 of CRIU's mnt.proto
MOUNT = b"\x08\x11\x10\x2a\x32\x01/\x3a\x0aetc/colour"  # fstype, mnt_id, root, mountpoint


def image(*messages: bytes) -> bytes:
    return HEAD + b"".join(struct.pack("<I", len(one)) + one for one in messages)


def test_what_is_mounted_anew_is_not_deleted_and_all_else_is_as_it_was() -> None:
    own, external = MOUNT + DELETED, MOUNT + DELETED + EXTERNAL
    changed = without_deleted_sources(image(own, external, MOUNT))
    assert len(changed) == len(image(own, external, MOUNT)) - len(DELETED)
    assert sorted(changed) == sorted(image(own, MOUNT + EXTERNAL, MOUNT)), "fields may change their order, no more"
    assert (changed.count(DELETED), changed.count(EXTERNAL), changed.count(MOUNT)) == (1, 1, 3)


def test_where_nothing_was_deleted_the_image_is_untouched() -> None:
    before = image(MOUNT + EXTERNAL, MOUNT + DELETED)
    assert without_deleted_sources(before) is before


@pytest.mark.parametrize("broken", [b"", HEAD[:4], b"x" * 20, image(MOUNT)[:-1], image(b"\xff\xff")])
def test_what_is_no_image_is_refused(broken: bytes) -> None:
    with pytest.raises(PeerMisbehaved):
        without_deleted_sources(broken)

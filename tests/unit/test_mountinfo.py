"""The kernel's list of mounts, with every name that a mount point may have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podferry.criu.gatekeeper import _mount_point
from podferry.fs.mountinfo import holding, mounts, parsed
from podferry.fs.mounts import MS_NODEV, mount, unmount
from podferry.node.host import mount_of

pytestmark = pytest.mark.unit
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts")

# The kernel escapes the first few; Python's own ideas of a blank and of a line's end differ from its.
ODD = ("form\x0cfeed", "sep\u2028arator", "nb\xa0sp")
NAMES = (
    "plain",
    "a b",
    "tab\there",
    "line\nend",
    "back\\slash",
    "h#sh",
    "straße",
    "行",
    "form\x0cfeed",
    "sep\u2028arator",
    "nb\xa0sp",
)
NOT_UTF8 = os.fsdecode(b"latin\xe9")
LISTING = b"""\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
23 22 0:21 /sub\\040dir /mnt/a\\040b ro,nosuid shared:7 master:2 - cifs //host/my\\040share rw
24 23 0:22 / /mnt/a\\040b rw - tmpfs  rw,size=4k
"""


def test_each_field_is_told() -> None:
    root, share, empty = parsed(LISTING)
    assert (root.id, root.device, root.kind, root.settings) == (
        22,
        os.makedev(8, 1),
        "ext4",
        ("rw", "errors=remount-ro"),
    )
    assert (share.root, share.point, share.options, share.source) == (
        "/sub dir",
        "/mnt/a b",
        ("ro", "nosuid"),
        "//host/my share",
    )
    assert (empty.source, empty.settings) == ("", ("rw", "size=4k"))


def test_the_last_of_two_mounts_upon_one_another_holds_a_path() -> None:
    found = list(parsed(LISTING))
    assert [holding(path, found) for path in ("/mnt/a b/x", "/mnt/a b", "/mnt/a bc", "/")] == [
        found[2],
        found[2],
        found[0],
        found[0],
    ]


@needs_root
@pytest.mark.parametrize("name", [*NAMES, NOT_UTF8])
def test_a_mount_point_of_any_name_is_found(tmp_path: Path, name: str) -> None:
    at = tmp_path / name
    at.mkdir()
    mount("none", at, "tmpfs", MS_NODEV)
    try:
        (at / "file").touch()
        assert [one.kind for one in mounts() if one.point == str(at)] == ["tmpfs"]
        assert mount_of(at / "file").point == at
        assert _mount_point(str(at / "file")) == str(at)
    finally:
        unmount(at)

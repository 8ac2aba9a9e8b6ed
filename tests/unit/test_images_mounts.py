"""Mounts of layers and of the share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podferry.errors import Failed
from podferry.fs.mounts import unmount
from podferry.snapshotter.layer_mounts import mount_directory, mount_points, mounted_read_only
from podferry.snapshotter.loops import loop_device

pytestmark = pytest.mark.unit
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts")

MOUNTS = """\
20 1 8:1 / / rw,relatime - ext4 /dev/vda rw
30 20 0:31 / /share rw - nfs4 storage:/ ro
31 20 0:32 / /share\\040two ro,nosuid - nfs4 storage:/two rw
32 30 0:33 / /share/images ro,nosuid - nfs4 storage:/images rw
"""


@pytest.mark.parametrize(
    ("path", "reader"),
    [("/share/images", True), ("/share/images/a", True), ("/share", False), ("/share two/x", True), ("/other", False)],
)
def test_a_node_whose_mount_is_read_only_is_a_reader(tmp_path: Path, path: str, reader: bool) -> None:
    """Not so where a file system takes no writes for now: that ends by itself."""
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert mounted_read_only(Path(path), tmp_path / "mountinfo") is reader


@needs_root
def test_a_mounted_tree_stays_whatever_takes_its_name(tmp_path: Path) -> None:
    tree, at = tmp_path / "tree", tmp_path / "at"
    tree.mkdir()
    at.mkdir()
    (tree / "file").write_text("layer")
    descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    tree.rename(tmp_path / "elsewhere")
    tree.symlink_to("/etc")
    try:
        mount_directory(descriptor, at)
        assert (at / "file").read_text() == "layer"
        with pytest.raises(OSError, match="Read-only"):
            (at / "new").touch()
        assert at in mount_points(at)
    finally:
        os.close(descriptor)
        unmount(at)
    assert mount_points(at) == {}


@needs_root
def test_a_loop_device_shows_the_open_file_and_goes_with_its_user(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4096)
    descriptor = os.open(image, os.O_RDONLY)
    image.rename(tmp_path / "elsewhere")
    image.write_bytes(b"y" * 4096)
    try:
        with loop_device(descriptor) as device:
            number = os.open(device, os.O_RDONLY)
            assert os.pread(number, 4096, 0) == b"x" * 4096
            with pytest.raises(OSError, match=r"not permitted|Permission|Bad file"):
                os.pwrite(number, b"z", 0)
            os.close(number)
            backing = Path(f"/sys/block/{Path(device).name}/loop/backing_file")
            assert backing.read_text().strip() == str(tmp_path / "elsewhere")
        assert not backing.exists() or backing.read_text().strip() != str(tmp_path / "elsewhere")
    except Failed as error:
        pytest.skip(f"loop devices cannot be set up here: {error}")
    finally:
        os.close(descriptor)

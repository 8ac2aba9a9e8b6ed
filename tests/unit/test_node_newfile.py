"""A file that a peer names is new and below its directory, whatever lies there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podferry.errors import Refused
from podferry.node.newfile import check_new, create_new

pytestmark = pytest.mark.unit


def test_a_new_file_is_made_with_its_directories(tmp_path: Path) -> None:
    root, path = tmp_path / "logs", tmp_path / "logs/a/b/job.log"
    check_new(root, path)
    fd = create_new(root, path)
    os.write(fd, b"x")
    os.close(fd)
    assert path.read_bytes() == b"x"
    with pytest.raises(Refused, match="already"):
        check_new(root, path)


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "directory"])
def test_what_is_there_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    root, other = tmp_path / "logs", tmp_path / "other"
    root.mkdir()
    path = root / "job.log"
    match kind:
        case "file":
            path.write_text("kept")
        case "link":
            other.write_text("kept")
            path.symlink_to(other)
        case "dangling":
            path.symlink_to(other)
        case "directory":
            path.mkdir()
    for act in (check_new, create_new):
        with pytest.raises(Refused, match="already"):
            act(root, path)
    assert path.is_symlink() == (kind in ("link", "dangling"))
    assert kind not in ("file", "link") or path.read_text() == "kept"
    assert other.exists() == (kind == "link")


def test_no_link_on_the_way_is_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "logs", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "a").symlink_to(outside)
    for act in (check_new, create_new):
        with pytest.raises(Refused):
            act(root, root / "a/job.log")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("path", ["/etc/cron.d/x", "logs/x", "/logs/../etc/x", "/logs", "/logsx/y"])
def test_only_below_the_directory(path: str) -> None:
    for act in (check_new, create_new):
        with pytest.raises(Refused, match="not below"):
            act(Path("/logs"), Path(path))

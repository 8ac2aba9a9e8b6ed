"""Names that a rolled-back dump has left among the job's files go, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from podferry.criu import link_remaps
from podferry.criu.dump_images import FILES_MAGIC, write_entries
from podferry.protos.rights_pb2 import FileEntry

pytestmark = pytest.mark.unit


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the job's root is, instead of ours."""
    root = tmp_path / "root"
    (root / "srv").mkdir(parents=True)
    opened = link_remaps.os.open

    def beneath(path: object, *args: int, **more: int) -> int:
        return opened(root if path == "/proc/7/root" else path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(link_remaps.os, "open", beneath)
    monkeypatch.setattr(link_remaps, "_first", lambda pids: list(pids)[:1])
    return root


def dumped(images: Path, *names: bytes) -> Path:
    images.mkdir()
    entries = []
    for number, name in enumerate(names):
        entry = FileEntry(type=1, id=number)
        entry.reg.id, entry.reg.flags, entry.reg.pos, entry.reg.fown, entry.reg.name = number, 0, 0, b"", name
        entries.append(entry)
    write_entries(images / "files.img", FILES_MAGIC, entries)
    return images


def test_what_criu_made_goes_and_the_jobs_own_stay(root: Path, tmp_path: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "srv" / "link").symlink_to(root / "elsewhere")
    files = [
        root / "srv" / "link_remap.5",
        root / "srv" / "link_remap.x",
        root / "srv" / "kept",
        root / "elsewhere" / "link_remap.7",
    ]
    for file in files:
        file.touch()
    names = (b"/srv/link_remap.5", b"/srv/link_remap.6", b"/srv/link_remap.x", b"/srv/kept")
    astray = (b"/srv/link/link_remap.7", b"/../link_remap.8")
    assert link_remaps.remove(dumped(tmp_path / "images", *names, *astray), [7]) == 1
    assert [file.exists() for file in files] == [False, True, True, True]


def test_without_images_there_is_nothing_to_do(root: Path, tmp_path: Path) -> None:
    assert link_remaps.remove(tmp_path / "none", [7]) == 0


def test_the_first_process_of_a_namespace_is_found_by_its_pid_there() -> None:
    assert link_remaps._first([2**22 + 1]) == []

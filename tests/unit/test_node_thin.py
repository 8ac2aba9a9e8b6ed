"""The parent that a thin dump is shown, and when there is none."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from podferry.errors import CommandFailed
from podferry.memory.criu_images import PE_PARENT, page_map
from podferry.node import thin
from podferry.node.thin import ThinDump, View
from podferry.protos.pagemap_pb2 import InventoryEntry

pytestmark = pytest.mark.unit

FACTS = bytes(32) + b"\0" + bytes(range(100))
CHANGED = bytes(32) + b"\1" + bytes(range(100))


def test_the_parent_claims_all_memory_of_the_processes_that_it_knows(tmp_path: Path) -> None:
    dump = ThinDump(tmp_path / "thin", View(FACTS))
    dump.claim([os.getpid(), 1 << 23])
    inside = int(Path("/proc/self/status").read_text().partition("NSpid:")[2].split("\n")[0].split()[-1])
    entries = page_map(tmp_path / "thin", inside).entries
    assert entries[0].start == 0
    assert all(one.end == next.start for one, next in pairwise(entries))
    assert entries[-1].end >= 1 << 52
    assert {one.flags for one in entries} == {PE_PARENT}
    assert (tmp_path / "thin" / "pages-1.img").read_bytes() == b""
    assert [path.name for path in (tmp_path / "thin").glob("pagemap-*")] == [f"pagemap-{inside}.img"]


def test_no_process_is_younger_than_the_parent(tmp_path: Path) -> None:
    ThinDump(tmp_path / "thin", View(FACTS))
    data = (tmp_path / "thin" / "inventory.img").read_bytes()
    magic, size = struct.unpack_from("<II", data)
    assert (magic, size) == (0x58313116, len(data) - 8)
    ticks = 100
    assert InventoryEntry.FromString(data[8:]).dump_uptime // (1_000_000 // ticks) > 1 << 48


def test_criu_finds_the_parent_by_a_path_from_the_images(tmp_path: Path) -> None:
    conf, images = tmp_path / "criu.conf", tmp_path / "images"
    conf.write_text("network-lock skip")
    images.mkdir()
    environment = ThinDump(tmp_path / "work-thin", View(FACTS)).environment(conf, images)
    settings = Path(environment["PODFERRY_THIN"]).read_text().splitlines()
    assert settings[0] == "network-lock skip"
    assert "track-mem" in settings
    (parent,) = (line.split()[1] for line in settings if line.startswith("prev-images-dir "))
    assert not parent.startswith("/")
    assert (images / parent / "inventory.img").exists()
    assert Path(environment["PODFERRY_SHOWN"]).read_bytes() == FACTS
    assert environment["PODFERRY_INSTEAD_OF"] == "/run/criu.kdat"


def test_a_kernel_that_tracks_memory_is_shown_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "criu.conf").touch()
    environment = ThinDump(tmp_path / "thin", View(None)).environment(tmp_path / "criu.conf", tmp_path / "images")
    assert set(environment) == {"PODFERRY_THIN"}


class Criu:
    """A stand-in for `criu check`: what it says with its own facts, and with others."""

    def __init__(self, own: set[str], shown: set[str]) -> None:
        self.own, self.shown = own, shown
        self.was_shown: set[bytes] = set()

    def supports(self, feature: str, shown: Path | None = None) -> bool:
        if shown is not None:
            self.was_shown.add(shown.read_bytes())
        return feature in (self.own if shown is None else self.shown)


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "criu.kdat"
    path.write_bytes(FACTS)
    monkeypatch.setattr(thin, "KERNDAT", path)
    thin._doctored.cache_clear()
    yield path
    thin._doctored.cache_clear()


def test_one_fact_is_changed_where_that_does_what_it_should(facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    criu = Criu({"fdinfo_lock"}, {"fdinfo_lock", thin.TRACKING})
    monkeypatch.setattr(thin, "_supports", criu.supports)
    assert View.here() == View(CHANGED)
    assert criu.was_shown == {CHANGED}
    assert facts.read_bytes() == FACTS


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        (set(), set()),  # it is another fact, or none
        ({"fdinfo_lock"}, {thin.TRACKING}),
        (set(), {thin.TRACKING, "uffd-noncoop"}),
    ],
)
def test_facts_that_lie_elsewhere_are_left_alone(
    facts: Path, monkeypatch: pytest.MonkeyPatch, own: set[str], shown: set[str]
) -> None:
    monkeypatch.setattr(thin, "_supports", Criu(own, shown).supports)
    assert View.here() is None


def test_a_kernel_that_criu_would_break_off_on_is_left_alone(
    facts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(thin, "_supports", Criu(set(), {thin.TRACKING}).supports)
    monkeypatch.setattr(thin, "CLEAR_REFS", tmp_path / "nothing" / "clear_refs")
    assert View.here() is None


@pytest.mark.parametrize("content", [b"", FACTS[:32], CHANGED])
def test_facts_of_another_shape_are_left_alone(facts: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    criu = Criu(set(), {thin.TRACKING})
    monkeypatch.setattr(thin, "_supports", criu.supports)
    facts.write_bytes(content)
    assert View.here() is None
    facts.unlink()
    assert View.here() is None
    assert not criu.was_shown


def test_memory_that_is_tracked_needs_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_supports", Criu({thin.TRACKING}, set()).supports)
    assert View.here() == View(None)


def test_without_criu_no_dump_is_thin(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(feature: str, shown: Path | None = None) -> bool:
        raise CommandFailed("cannot run criu", argv=["criu"])

    monkeypatch.setattr(thin, "_supports", missing)
    assert View.here() is None

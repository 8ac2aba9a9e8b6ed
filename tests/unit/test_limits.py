"""What a migration costs an agent: images and descriptors are streamed, and what is beyond the table is refused by name."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import xxhash

from podferry.core.limits import (
    FILES,
    IMAGE,
    OPEN_PAYLOADS,
    PARSED_IMAGE,
    TABLE,
    TERMINATION_MESSAGE,
    TooMuch,
    of_image,
)
from podferry.engine.migration_record import MigrationRecord
from podferry.engine.sending import Sender
from podferry.errors import Failed, PeerMisbehaved
from podferry.model import Mode
from podferry.node import jobfacts, payloads
from podferry.node.newfile import small_file
from podferry.node.upper import scan
from podferry.wire.frames import MAX_PAYLOAD, File
from podferry.wire.held_pages import HeldPages
from podferry.workload import received_image
from podferry.workload.received_image import ReceivedImage

pytestmark = pytest.mark.unit

MIB = 1 << 20


def test_each_limit_says_which_it_is_and_what_to_do() -> None:
    for limit in TABLE:
        limit.demand(limit.most)
        with pytest.raises(TooMuch) as refused:
            limit.demand(limit.most + 1, "the pod")
        assert limit.what in refused.value.what
        assert str(limit.most) in refused.value.why
        assert refused.value.remedy == limit.remedy
    assert len({limit.what for limit in TABLE}) == len(TABLE)


def test_only_images_that_nobody_reads_as_a_whole_may_be_large() -> None:
    assert of_image("pages-7.img") is of_image("tmpfs-dev-9.tar.gz.img") is of_image("ghost-file-1.img") is IMAGE
    assert of_image("files.img") is of_image("core-1.img") is of_image("anything") is PARSED_IMAGE


class Wire:
    """A channel and a job: what is sent is written where the target would, and forgotten."""

    def __init__(self, images: dict[tuple[int, str], bytes | Path], into: Path) -> None:
        self.images, self.into = images, into
        self.arrived: dict[str, ReceivedImage] = {}
        self.whole: dict[str, tuple[int, str]] = {}
        self.longest = 0
        self.traffic = SimpleNamespace(sent=0)

    async def dump(self) -> dict[tuple[int, str], bytes | Path]:
        return self.images

    def dumped(self) -> str:
        return "memory-skipping"

    def closed_connections(self) -> tuple[str, ...]:
        return ()

    def held_pages(self, directory: int) -> HeldPages:
        return HeldPages()

    async def send(self, frame: Any) -> None:
        assert isinstance(frame, File)
        self.longest = max(self.longest, len(frame.payload))
        image = (
            self.arrived.setdefault(frame.name, ReceivedImage(self.into / frame.name))
            if (frame.name not in self.arrived)
            else self.arrived[frame.name]
        )
        image.take(frame.offset, memoryview(frame.payload))
        if frame.last:
            self.whole[frame.name] = image.whole()


def test_images_are_streamed_at_both_ends(tmp_path: Path) -> None:
    """A sparse image of a gigabyte goes through, and neither end ever has more of it than a few pieces."""
    big, size = tmp_path / "pages-1.img", 1 << 30
    with big.open("wb") as file:
        file.truncate(size)
        file.seek(size - 5)
        file.write(b"at last"[:5])
    (tmp_path / "into").mkdir()
    images: dict[tuple[int, str], bytes | Path] = {
        (0, "pages-1.img"): big,
        (0, "small.img"): b"x" * 3,
        (0, "none.img"): b"",
    }
    wire = Wire(images, tmp_path / "into")
    sender = Sender(wire, MigrationRecord("1", "job", "a", "b", Mode.LIVE))  # type: ignore[arg-type]
    tracemalloc.start()
    anyio.run(sender.images, wire)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MIB
    assert wire.longest <= MAX_PAYLOAD
    digest = xxhash.xxh3_128()
    with big.open("rb") as file:
        while piece := file.read(MIB):
            digest.update(piece)
    assert wire.whole["pages-1.img"] == (size, digest.hexdigest())
    assert wire.whole["none.img"] == (0, xxhash.xxh3_128_hexdigest(b""))
    assert {one.name: (one.size, one.digest) for one in sender._files} == wire.whole
    assert (tmp_path / "into" / "pages-1.img").stat().st_size == size


def test_an_image_beyond_the_limit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    files = tmp_path / "files.img"
    with files.open("wb") as file:
        file.truncate(PARSED_IMAGE.most + 1)
    wire = Wire({(0, "files.img"): files}, tmp_path)
    with pytest.raises(TooMuch, match="read as a whole"):
        anyio.run(Sender(wire, MigrationRecord("1", "job", "a", "b", Mode.LIVE)).images, wire)  # type: ignore[arg-type]
    assert wire.longest == 0


def test_an_image_that_arrives_otherwise_than_it_must_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ReceivedImage(tmp_path / "core-1.img")
    image.take(0, memoryview(b"abc"))
    with pytest.raises(PeerMisbehaved, match="out of order"):
        image.take(1, memoryview(b"abc"))
    with pytest.raises(PeerMisbehaved, match="too large"):
        image._size = PARSED_IMAGE.most
        image.take(PARSED_IMAGE.most, memoryview(b"abc"))
    image._size = 3
    monkeypatch.setattr(received_image.os, "pwrite", lambda fd, data, offset: 1)
    with pytest.raises(Failed, match="cannot be written"):
        image.take(3, memoryview(b"abc"))
    image.close()


def test_a_termination_message_of_a_terabyte_is_refused_unread(tmp_path: Path) -> None:
    sparse = tmp_path / "message"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TooMuch, match="termination message"):
        small_file(sparse, TERMINATION_MESSAGE)
    os.truncate(sparse, 3)
    assert small_file(sparse, TERMINATION_MESSAGE) == bytes(3)
    link, fifo = tmp_path / "link", tmp_path / "fifo"
    link.symlink_to("/etc/passwd")
    os.mkfifo(fifo)
    for wrong in (link, fifo):
        with pytest.raises(OSError):
            small_file(wrong, TERMINATION_MESSAGE)


def test_open_descriptors_cost_no_memory_each(monkeypatch: pytest.MonkeyPatch) -> None:
    status = Path("/etc/passwd").stat()

    def many(pids: Any) -> Any:
        for number in range(200_000):
            yield f"/some/where/{number}", status

    monkeypatch.setattr(jobfacts, "_open_files", many)
    tracemalloc.start()
    found = jobfacts._Open.by([1])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB
    assert not (found.devices or found.unsaved)


def test_a_tree_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = type(FILES)(FILES.what, 5, FILES.each, FILES.remedy)
    monkeypatch.setitem(scan.__globals__, "FILES", few)
    for number in range(4):
        (tmp_path / str(number)).touch()
    root = os.open(tmp_path, os.O_RDONLY)
    assert len(scan(root).entries) == 5
    (tmp_path / "one more").touch()
    with pytest.raises(TooMuch, match="files and directories"):
        scan(root)
    os.close(root)


def test_open_payloads_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = type(OPEN_PAYLOADS)(OPEN_PAYLOADS.what, 3 * MIB, 3, OPEN_PAYLOADS.remedy)
    monkeypatch.setattr(payloads, "OPEN_PAYLOADS", few)
    places = []
    for number in range(2):
        place = tmp_path / f"kubernetes.io~secret/s{number}/..2026_11_28_01_45_00.{number}"
        place.mkdir(parents=True)
        (place / "x").write_bytes(os.urandom(2 * MIB))
        places.append(place)
    assert payloads.pack(places[:1])
    with pytest.raises(TooMuch, match="ConfigMap"):
        payloads.pack(places)

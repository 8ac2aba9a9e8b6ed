"""The page of `explain --html`: well-formed, self-contained, and safe to show whatever the record says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from cli_fake_agent import FakeAgent

from podferry.cli.page import page
from podferry.cli.record import Record
from podferry.engine.migration_record import MigrationRecord
from podferry.errors import Failed
from podferry.model import Mode, Outcome

pytestmark = pytest.mark.unit
VOID = {"meta"}


class Reader(HTMLParser):
    """Holds that every tag is closed by its like, and remembers tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data


def completed(name: str = "train") -> dict[str, Any]:
    migration_record = MigrationRecord("m1", name, "node-a", "node-b", Mode.LIVE)
    FakeAgent("node-a", {})._move(migration_record, weak=False)
    return migration_record.to_dict()


def failed() -> dict[str, Any]:
    migration_record = MigrationRecord("m2", "train", "node-a", "node-b", Mode.LIVE)
    migration_record.enter("check")
    migration_record.end(
        Outcome.FAILED, "the disk is gone", Failed("disk", remedy="a new disk", evidence=["I/O error"])
    )
    return migration_record.to_dict()


@pytest.mark.parametrize("record", [completed(), failed(), completed() | {"outcome": None, "downtime_ms": None}])
def test_it_is_well_formed_and_needs_nothing_else(record: dict[str, Any]) -> None:
    text = page(Record.from_dict(record))
    read = Reader(text)
    assert not {"script", "link", "img", "iframe", "object", "image", "use", "foreignobject"} & set(read.tags)
    assert not {"src", "href", "srcset", "data", "xlink:href"} & {name for name, _ in read.attributes}
    assert not re.search(r"url\(|@import|https?:", text)
    assert "prefers-color-scheme: dark" in text


def test_it_tells_what_the_record_knows() -> None:
    read = Reader(page(Record.from_dict(completed())))
    for fact in (
        "222 ms",
        "512 MiB",
        "restore 88 ms",
        "round",
        "cut-over",
        "The downtime, enlarged",
        "node-b",
        "dump was prepared",
    ):
        assert fact in read.words
    assert read.tags.count("svg") == 3
    read = Reader(page(Record.from_dict(failed())))
    for fact in ("the disk is gone", "I/O error", "a new disk"):
        assert fact in read.words


def test_what_comes_from_elsewhere_is_text() -> None:
    evil = "</title><script>alert(1)</script><b onclick=x>&amp;\x1b[31m"
    record = completed(evil) | {"source": evil, "reason": evil, "phases": {evil: 1.0}, "tracker": evil, "dump": evil}
    record["spans"] = [{"name": evil, "where": evil, "start_ms": 0, "end_ms": 9, "detail": evil}]
    read = Reader(page(Record.from_dict(record)))
    assert "script" not in read.tags
    assert "onclick" not in {name for name, _ in read.attributes}
    assert "<script>alert(1)</script>" in read.words
    assert "\x1b" not in page(Record.from_dict(record))


def test_extremes_draw() -> None:
    assert "details" in Reader(page(Record.from_dict(completed()))).tags
    many = [{"round": one, "pages": one, "bytes": 10**one, "ms": 0, "dirty_rate": None} for one in range(40)]
    long = [{"name": "x" * 300, "where": "target", "start_ms": 0, "end_ms": 1e8, "detail": ""}] * 50
    for change in ({"rounds_detail": many}, {"spans": long}, {"spans": [], "downtime_ms": 0}, {"spans": long[:1]}):
        Reader(page(Record.from_dict(completed() | change)))
    json.dumps(Record.from_dict(completed()).raw)

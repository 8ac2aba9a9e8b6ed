"""The matrix of situations and the document that a run makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "lab"))

from matrix import FAMILIES, REFUSED, SITUATIONS
from what_moves import kind, render, text, verdict

pytestmark = pytest.mark.unit


def test_situations_have_names_of_their_own_and_remedies() -> None:
    names = [one.name for one in SITUATIONS]
    assert len(names) == len(set(names)) > 190
    assert all(one.remedy for one in SITUATIONS if one.refused)
    assert set(REFUSED) <= {one.name for one in FAMILIES}


def test_the_document_says_what_was_seen(tmp_path: Path) -> None:
    times = {mode: [100, 120] for mode in ("live", "postcopy", "stop")}
    first = {"name": "one", "what": "one thing", "family": "files", "check": [], "remedies": [], "downtimes": times}
    refused = first | {"name": "two", "check": ["it has a | ring: CRIU does not save it"], "remedies": ["close it"]}
    back = first | {"name": "three", "failed": "cannot dump", "failed_remedy": "wait"}
    harmed = first | {"name": "four", "harmed": "BAD lost"}
    stale = first | {"name": "five", "harmed": "BAD lost", "stale": "it was lost"}
    lines = [json.dumps(one) for one in (first, refused, back, harmed, stale)]
    (tmp_path / "criu-4.1.1.jsonl").write_text("\n".join(lines))
    (tmp_path / "criu-4.2.jsonl").write_text(lines[0])
    document = render(tmp_path)
    assert "| 4.1.1 | 5 | 1 | 1 | 1 | 1 | 1 |" in document
    assert "| 4.2 | 1 | 1 | 0 | 0 | 0 | 0 |" in document
    assert "| `one` | one thing | moves (live, postcopy, stop); stood still for 120 ms at most |" in document
    assert "refused: it has a \\| ring: CRIU does not save it. Close it. | not run |" in document
    assert "**rolled back**: cannot dump. Wait." in document
    assert "**harmed**: BAD lost" in document
    assert "| to run again: it was lost | not run |" in document


def test_harm_comes_before_everything_else() -> None:
    assert kind({"harmed": "x", "check": ["no"], "failed": "y"}) == "harmed"
    assert verdict(None) == "not run"
    assert text("a\nb") == "a b"

"""docs/what-moves.md from the results of `scripts/what-moves`: a line of JSON for each situation, a file for each CRIU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
HEAD = """# What moves

Written by `make what-moves` from a run: each job was started on one node of a lab, looked at (`check`), rehearsed (`check
--rehearse`), and moved there and back in each of the modes that its line names. It counts all the while and looks whether
what it has is as it was. What was not run is not here. `tests/lab/test_situations.py` moves them as tests.

Two jobs are moved at a time, on whatever machine there is: how long they stood still says more of that than of podferry.

A job **moves** where all of them completed, it counted on without a gap or repeat, and found nothing changed. It is **refused**
where `check` says no, and nothing was touched. **Rolled back**: `check` said yes, and the move no. **Harmed**: it moved, and is
not as it was. **To run again**: what was seen is no more so, since podferry or the job was mended.
"""


KINDS = ("moves", "refused", "rolled back", "harmed", "to run again")


def render(results: Path) -> str:
    """The document."""
    runs = {path.stem.removeprefix("criu-"): read(path) for path in sorted(results.glob("criu-*.jsonl"))}
    parts = [HEAD, *summary(runs)]
    names = dict.fromkeys((one["family"], name) for run in runs.values() for name, one in run.items())
    for family in dict.fromkeys(family for family, _ in names):
        parts += ["", f"## {family.replace('_', ' ').capitalize()}", "", f"Programs: `tests/lab/jobs/{family}.py`.", ""]
        parts += [row("job", "what it is", *(f"CRIU {version}" for version in runs)), "|---" * (2 + len(runs)) + "|"]
        for of, name in names:
            if of == family:
                known = [run.get(name) for run in runs.values()]
                what = next(one["what"] for one in known if one)
                parts.append(row(f"`{name}`", text(what), *(verdict(one) for one in known)))
    return "\n".join(parts) + "\n"


def read(path: Path) -> dict[str, Result]:
    """The results of a run by situation; the latest counts."""
    lines = map(json.loads, path.read_text().splitlines())
    return {one["name"]: one for one in sorted(lines, key=lambda one: (one["family"], one["name"]))}


def summary(runs: Mapping[str, Mapping[str, Result]]) -> Iterable[str]:
    """How many of each kind there are."""
    yield row("CRIU", "jobs", "move", "refused", "rolled back", "harmed", "to run again")
    yield "|---|---|---|---|---|---|---|"
    for version, run in runs.items():
        kinds = [kind(one) for one in run.values()]
        yield row(version, len(kinds), *(kinds.count(one) for one in KINDS))


def kind(one: Result) -> str:
    """What became of it, in a word."""
    if "stale" in one:
        return "to run again"
    if "harmed" in one:
        return "harmed"
    if one.get("check"):
        return "refused"
    return "rolled back" if "failed" in one else "moves"


def verdict(one: Result | None) -> str:
    """What became of it, and why; or how long it stood still."""
    if one is None:
        return "not run"
    match kind(one):
        case "moves":
            differs = ", ".join(sorted(set(one.get("differences") or ())))
            stood = max(max(times) for times in one["downtimes"].values())
            modes = ", ".join(one["downtimes"])
            return f"moves ({modes}); stood still for {stood} ms at most" + (
                f"; differs: {text(differs)}" if differs else ""
            )
        case "to run again":
            return f"to run again: {text(one['stale'])}"
        case "refused":
            return f"refused: {text(one['check'][0])}. {sentence(one['remedies'][0])}"
        case "rolled back":
            return f"**rolled back**: {text(one['failed'])}. {sentence(one.get('failed_remedy', ''))}"
        case _:
            return f"**harmed**: {text(one['harmed'])}"


def row(*cells: object) -> str:
    """A row of a table."""
    return f"| {' | '.join(str(cell).strip() for cell in cells)} |"


def text(words: str) -> str:
    """What a cell can hold."""
    return " ".join(words.replace("|", "\\|").replace("<", "&lt;").split()).rstrip(".")


def sentence(words: str) -> str:
    """With a capital and a stop."""
    return f"{text(words)[:1].upper()}{text(words)[1:]}." if words else ""

"""The house's language: words of its own for which the field has better ones do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = [
    path
    for path in [
        *(ROOT / "src/podferry").rglob("*"),
        *(ROOT / "deploy").rglob("*"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    ]
    if path.is_file() and path.suffix in ("", ".py", ".md", ".yaml")
]

BANNED = {
    "poise": "prepare target",
    "poised": "prepared",
    "Poised": "TargetReady",
    "LeavingJob": "SourceJob",
    "ArrivingJob": "TargetJob",
    "Story": "MigrationRecord",
    "story": "record",
    "Attempt": "Side",
    "last_look": "final_scan",
    "last look": "final scan",
    "PageWanted": "PageRequest",
    "debt": "remote pages",
    "Letters": "Inbox",
    "feeder": "lazy-pages daemon",
    "page daemon": "lazy-pages daemon",
    "pump": "loop",
    "keeper": "descriptor holder",
    "thin": "memory-skipping",
    "spared": "skipped",
    "guests": "exec sessions",
    "show_out": "terminate",
    "Books": "StatusWriter",
    "troubles": "failures",
    "slow_down": "throttle",
    "Relay": "PageChannel",
    "Debt": "remote pages",
    "Remains": "FrozenWorkload",
    "door": "exec lock",
    "nobody's": "unowned",
}
"""A word, and what the field calls the thing."""

ALLOWED = {
    "engine/journal.py": {"poise", "poised", "feeder", "door"},  # what journals up to format 3 say
    "criu/incoming.py": {"poised"},  # the FIFO's name: podferry-runc of the version before writes into it
    "node/podferry-runc": {"poised"},
    "workload/lazypages_process.py": {"feeder"},  # files of a daemon that an agent of the version before has started
    "bench/report.py": {"last look"},  # what records of the version before say
    "kube/migration.py": {"Poised"},  # the condition of agents of the version before
    "deploy/status-policy.yaml": {"Poised"},
    "model.py": {"thin"},  # what records of the version before say
    "cli/explanation.py": {"thin"},
    "docs/api.md": {"Poised"},
}


@pytest.mark.parametrize("word", BANNED)
def test_the_fields_words_are_used(word: str) -> None:
    found = []
    for path in TEXTS:
        name = path.relative_to(ROOT).as_posix()
        allowed = next((words for end, words in ALLOWED.items() if name.endswith(end)), set())
        if word in allowed:
            continue
        text = path.read_text(errors="replace")
        found += [
            f"{name}: {line.strip()}" for line in text.splitlines() if re.search(rf"(?<![\w-]){word}(?![\w-])", line)
        ]
    assert not found, f"say {BANNED[word]!r} for {word!r}"

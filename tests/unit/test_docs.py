"""What the documents say is so: commands and options exist, fields and phases are all there, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import typer

import podferry
from podferry.cli.app import app
from podferry.core.phases import SourcePhase
from podferry.core.preflight import OLDEST_CRIU, OLDEST_RUNC, PIPE_BYTES
from podferry.errors import Failed
from podferry.memory.tracking.tracker import TrackerKind
from podferry.model import Mode
from podferry.snapshotter import program
from podferry.snapshotter.metrics import Metrics
from podferry.workload.config import Config, load

pytestmark = pytest.mark.unit
ROOT = Path(podferry.__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> Iterator[str]:
    """The commands in a page's shell blocks, quotes that span lines included."""
    for language, block in FENCE.findall(page.read_text()):
        if language != "sh":
            continue
        pending = ""
        for line in block.splitlines():
            pending += line + "\n"
            try:
                shlex.split(pending, comments=True)
            except ValueError:
                continue  # a quote is still open
            yield pending.strip()
            pending = ""


def commands(page: Path) -> list[list[str]]:
    """Every `podferry ...` that a page tells its reader to run, and those it mentions in backticks."""
    mentioned = re.findall(r"`(podferry [^`\n]+)`", FENCE.sub("", page.read_text()))
    told = [line for line in shell_lines(page) if line.startswith("podferry ")]
    return [shlex.split(line, comments=True)[1:] for line in (*told, *mentioned)]


TYPED = [(page, argv) for page in PAGES for argv in commands(page)]


@pytest.mark.parametrize(
    ("page", "argv"), [pytest.param(page, argv, id=f"{page.name}: {' '.join(argv)[:60]}") for page, argv in TYPED]
)
def test_every_command_exists_with_its_options(page: Path, argv: list[str]) -> None:
    command = typer.main.get_command(app)
    options = {"--help": False}
    words = iter(argv)
    for word in words:
        if word == "--":
            break
        for one in command.params:
            if one.param_type_name == "option":
                options |= dict.fromkeys((*one.opts, *one.secondary_opts), not getattr(one, "is_flag", False))
        subcommands = getattr(command, "commands", None)
        if word.startswith("-"):
            assert word in options, f"{page.name}: podferry {command.name} has no option {word}"
            if options[word]:
                next(words, None)
        elif subcommands is not None:
            if word == "COMMAND":
                break
            assert word in subcommands, f"{page.name}: there is no command {word}"
            command = subcommands[word]


def test_the_pages_do_show_commands() -> None:
    assert {"README.md", "agent.md", "failures.md", "cli.md"} <= {page.name for page, _ in TYPED}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_agent_md_lists_the_fields_with_their_defaults() -> None:
    listed = dict(
        re.findall(r"^\| `(\w+)` \| (required|`[^`]+`) \|", (ROOT / "docs/agent.md").read_text(), re.MULTILINE)
    )
    assert list(listed) == [
        *(name for name in listed if name in {one.name for one in fields(Config)}),
    ], "a field that the agent does not know"
    for one in fields(Config):
        if one.default is not MISSING:
            shown = {None: "null", "": '""', frozenset(): "[]"}.get(one.default, one.default)
            assert listed[one.name] == f"`{shown}`"
        else:
            assert listed[one.name] == ("required" if one.default_factory is MISSING else "`{}`")


def test_the_example_of_agent_json_is_one(tmp_path: Path) -> None:
    (example,) = [
        block for language, block in FENCE.findall((ROOT / "docs/agent.md").read_text()) if language == "json"
    ]
    (tmp_path / "agent.json").write_text(example)
    assert load(tmp_path / "agent.json").node == "node-a"


def test_what_a_node_needs_is_what_preflight_asks_for() -> None:
    page = (ROOT / "docs/agent.md").read_text()
    assert f"| CRIU | {'.'.join(map(str, OLDEST_CRIU))} or later" in page
    assert f"| runc | {'.'.join(map(str, OLDEST_RUNC))} or later" in page
    assert f"at least {PIPE_BYTES} |" in page


def test_every_phase_of_the_source_has_its_place_in_the_failures() -> None:
    page = (ROOT / "docs/failures.md").read_text()
    going_on = set(SourcePhase) - {SourcePhase.UNDO, SourcePhase.REFUSED, SourcePhase.FAILED, SourcePhase.CANCELLED}
    assert [phase for phase in going_on if f"`{phase}`" not in page] == []


def test_cli_md_names_every_tracker_and_no_other() -> None:
    (row,) = re.findall(r"^\| `tracker`, .*$", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"\(([^)]+)\)", row)[0].split(", ")) == {f"`{kind}`" for kind in TrackerKind}


def test_the_readme_names_every_mode() -> None:
    listed = re.findall(r"^\| `(\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(Mode)


def test_images_md_lists_the_snapshotters_metrics_and_options() -> None:
    page = (ROOT / "docs/images.md").read_text()
    metrics = Metrics()
    metrics.called("Prepare", "OK")
    metrics.failed(Failed("x"))
    served = {
        sample.name
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket", "_sum", "_count"))
    } | {"podferry_layer_publish_seconds"}
    assert set(re.findall(r"`(podferry_[a-z_]+)(?:\{[^}]*\})?`", page)) == served
    command = typer.main.get_command(program.app)
    options = {max(one.opts, key=len) for one in command.params if one.param_type_name == "option"}
    listed = set(re.findall(r"^\| `(--[a-z-]+)` \|", page, re.MULTILINE))
    assert {one.replace("--no-", "--") for one in listed} == options - {"--help"}


def test_every_test_that_the_threat_model_names_exists() -> None:
    """A promise whose test was renamed or removed is a promise that nothing shows."""
    text = (ROOT / "docs/security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 50
    for file, name in named:
        path = ROOT / file
        assert path.exists(), file
        assert re.search(rf"^(async )?def {name}\(", path.read_text(), re.MULTILINE), f"{file}::{name}"


def test_every_attack_has_a_test_and_a_result() -> None:
    rows = re.findall(r"^\| (?!Attack|Who|\*\*)(.+) \|$", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        attack, tests, result = row.split(" | ")
        assert attack and result and "::test_" in tests, row

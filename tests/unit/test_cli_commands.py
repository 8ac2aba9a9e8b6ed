"""The commands as a script meets them: JSON, exit codes, plain lines, and words instead of tracebacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cli_contract import RESULT
from cli_fake_agent import SCRIPTS, FakeAgent, serving

from podferry import __version__
from podferry.cli import app as app_module
from podferry.cli.app import run

pytestmark = pytest.mark.unit


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Podferry = Callable[..., Ran]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with serving(FakeAgent("node-a", dict.fromkeys(SCRIPTS, "running")), tmp_path / "agent") as one:
        yield one


@pytest.fixture
def podferry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Podferry:
    monkeypatch.setenv("PODFERRY_AGENT", str(tmp_path / "agent"))
    monkeypatch.delenv("PODFERRY_DEBUG", raising=False)

    def call(*argv: str) -> Ran:
        code = run(list(argv))
        return Ran(code, *capsys.readouterr())

    return call


def test_ps(podferry: Podferry, agent: FakeAgent) -> None:
    agent.containers = {"train": "running", "old": "stopped"}
    ran = podferry("ps", "--json")
    assert ran.code == 0
    assert ran.err == ""
    assert [(row["name"], row["movable"]) for row in ran.json()["containers"]] == [("old", False), ("train", True)]
    assert ran.json()["nodes_down"] == []
    assert "512 MiB" in podferry("ps").out
    assert "no: it is stopped" in podferry("ps").out


def test_check(podferry: Podferry, agent: FakeAgent) -> None:
    ran = podferry("check", "train", "--to", "node-b", "--json")
    assert (ran.code, ran.json()["movable"]) == (0, True)
    ran = podferry("check", "greedy", "--to", "node-b", "--json")
    assert (ran.code, ran.json()["refusals"][0]["code"]) == (3, "PF100")
    assert [(one["remote"], one["fate"]) for one in ran.json()["connections"]] == [
        ("[fd00:96::7]:5432", "closed"),
        ("", "lives"),
    ]
    ran = podferry("check", "greedy", "--to", "node-b")
    for word in ("[fd00::5]:40000", "[fd00:96::7]:5432", "another", "closed", "knows only the old address"):
        assert word in ran.out, "what becomes of each connection, and why"
    assert "UV_USE_IO_URING" in ran.err
    assert "the clock of [b]node-b[/b]" in ran.out, "what an agent says is not markup"


def test_a_rehearsal_says_what_it_found(podferry: Podferry, agent: FakeAgent) -> None:
    ran = podferry("check", "train", "--to", "node-b", "--rehearse")
    assert ran.code == 0
    assert "stood still for 104 ms" in ran.out
    assert "about 222 ms" in ran.out
    assert podferry("check", "weak", "--to", "node-b").code == 0
    ran = podferry("check", "weak", "--to", "node-b", "--rehearse", "--json")
    assert ran.code == 3
    [answer] = [json.loads(ran.out)]
    assert (answer["movable"], answer["rehearsal"]["outcome"]) == (False, "rolled-back")


@pytest.mark.parametrize(
    ("name", "outcome", "code"),
    [
        ("train", "completed", 0),
        ("greedy", "refused", 3),
        ("shy", "refused", 3),
        ("weak", "rolled-back", 4),
        ("broken", "failed", 5),
    ],
)
def test_migrate_ends_with_a_result_and_its_code(
    podferry: Podferry, agent: FakeAgent, name: str, outcome: str, code: int
) -> None:
    ran = podferry("migrate", name, "--to", "node-b", "--json")
    *events, result = ran.lines()
    assert ran.code == code
    assert ran.err == ""
    assert all(event["type"] == "progress" for event in events)
    assert (result["type"], result["name"], result["target"], result["outcome"]) == ("result", name, "node-b", outcome)
    assert set(result) >= RESULT - {"phase", "started_at", "ended_at", "spans", "rounds_detail"}
    assert (result["error"] is None) == (code == 0)


def test_migrate_sends_what_was_asked_for(podferry: Podferry, agent: FakeAgent) -> None:
    wishes = ("--mode", "stop", "--bandwidth", "100mbit", "--max-downtime", "300", "--connections", "require")
    podferry("migrate", "train", "--to", "node-b", *wishes)
    asked = {"bandwidth": 12_500_000, "mode": "stop", "max_downtime_ms": 300.0, "connections": "Require"}
    assert agent.asked == [asked]
    podferry("check", "train", "--to", "node-b", "--connections", "Require")
    podferry("check", "train", "--to", "node-b")
    assert agent.asked[1:] == [{"rehearse": False, "connections": one} for one in ("Require", "Close")]


def test_migrate_prints_a_line_for_each_phase(podferry: Podferry, agent: FakeAgent) -> None:
    ran = podferry("migrate", "train", "--to", "node-b")
    phases = [line.split()[2] for line in ran.err.splitlines()]
    assert list(dict.fromkeys(phases)) == ["check", "pre-copy", "prepare-target", "cut-over", "resume"]
    assert "round 4: 2 pages" in ran.err
    assert "stood still for 222 ms" in ran.out
    assert "restore" in ran.out
    assert "\x1b" not in ran.out + ran.err


def test_control_characters_never_reach_the_terminal(podferry: Podferry, agent: FakeAgent) -> None:
    ran = podferry("migrate", "weak", "--to", "node-b")
    assert "no pidns" in ran.err or "31mno pidns" in ran.err
    assert "\x1b" not in ran.out + ran.err


@pytest.mark.parametrize(
    ("argv", "code", "error"),
    [
        (["migrate", "mute", "--to", "node-b"], 7, "PF270"),
        (["migrate", "nobody", "--to", "node-b"], 2, "PF101"),
        (["migrate", "train"], 2, "PF101"),
        (["migrate", "train", "--to", "node-b", "--bandwidth", "fast"], 2, "PF101"),
        (["migrate", "train", "--to", "node-b", "--mode", "warm"], 2, "PF101"),
        (["frobnicate"], 2, "PF101"),
        (["status", "m9"], 2, "PF101"),
        (["cancel", "m9"], 2, "PF101"),
        (["--agent", "nothing", "ps"], 7, "PF270"),
        (["ps", "--agent", "nothing"], 7, "PF270"),
        (["ps", "--agent", "nothing", "--lab", "x"], 2, "PF101"),
    ],
)
def test_errors_are_words_or_json(podferry: Podferry, agent: FakeAgent, argv: list[str], code: int, error: str) -> None:
    ran = podferry(*argv)
    assert ran.code == code
    assert f"[{error}]" in ran.err
    assert ran.out == ""
    ran = podferry(*argv, "--json")
    assert ran.code == code
    last = ran.lines()[-1]
    assert (last["type"], last["error"]["code"]) == ("error", error)
    assert ran.err == ""


def test_an_unforeseen_exception_is_called_a_bug(podferry: Podferry, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(app_module, "_fleet", broken)
    ran = podferry("ps")
    assert ran.code == 1
    assert "this is a bug in podferry: KeyError: 'surprise'" in ran.err
    assert "Traceback" not in ran.err
    assert __version__ in ran.err
    monkeypatch.setenv("PODFERRY_DEBUG", "1")
    ran = podferry("ps")
    assert ran.code == 1
    assert "Traceback" in ran.err


def test_status_cancel_resolve_explain(podferry: Podferry, agent: FakeAgent, tmp_path: Path) -> None:
    assert podferry("status", "--json").json() == {"migrations": [], "nodes_down": []}
    for name in ("train", "weak"):
        podferry("migrate", name, "--to", "node-b")
    assert [row["outcome"] for row in podferry("status", "--json").json()["migrations"]] == ["completed", "rolled-back"]
    assert podferry("status", "m2", "--json").json()["id"] == "m2"
    assert "rolled-back" in podferry("status").out

    ran = podferry("cancel", "m1")
    assert (ran.code, ran.out) == (2, "")
    assert podferry("resolve", "m1", "--run-on", "node-z").code == 2
    assert podferry("resolve", "m1", "--run-on", "node-b", "--json").json()["id"] == "m1"
    assert agent.asked[-1] == {"resolve": "m1", "run_on": "node-b"}

    told = podferry("explain", "m1")
    assert "The first round sent 512 MiB" in told.out
    assert "enlarged" not in told.out
    page = tmp_path / "page.html"
    assert podferry("explain", "m1", "--html", str(page)).code == 0
    assert page.read_text().startswith("<!doctype html>")
    assert podferry("explain", "m1", "--html", "-").out.startswith("<!doctype html>")
    assert podferry("explain", "m1", "--html", str(tmp_path / "no" / "page")).code == 2


def test_help_teaches(podferry: Podferry) -> None:
    assert podferry().code == 0
    assert "podferry lab demo" in podferry().out
    for command in ("ps", "check", "migrate", "status", "cancel", "resolve", "explain"):
        ran = podferry(command, "--help")
        assert ran.code == 0
        assert f"podferry {command}" in ran.out.split("Usage:")[1].split("\n", 1)[1], f"{command} has no example"
    assert podferry("version").out == podferry("--version").out == f"podferry {__version__}\n"


def test_the_shell_completes_what_there_is(
    podferry: Podferry, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    podferry("migrate", "train", "--to", "node-b")
    for words, offered in (("podferry migrate tr", "train"), ("podferry explain ", "m1")):
        monkeypatch.setenv("_PODFERRY_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", "2")
        with pytest.raises(SystemExit) as ended:
            run([])
        assert ended.value.code == 0
        assert capsys.readouterr().out.split() == [offered]

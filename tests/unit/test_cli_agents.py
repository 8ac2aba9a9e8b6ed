"""Which agent a command goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cli_fake_agent import FakeAgent, serving

from podferry.cli.agent_client import AgentClient, AgentUnreachable
from podferry.cli.agents import AgentOptions, Endpoint, Fleet
from podferry.engine.migration_record import MigrationRecord
from podferry.errors import Refused, UsageError
from podferry.model import Mode, Outcome

pytestmark = pytest.mark.unit
SOCKET = Path("agent")


@pytest.mark.parametrize(
    ("given", "outer", "environ", "settled"),
    [
        (AgentOptions(), AgentOptions(), {}, AgentOptions(lab="default")),
        (AgentOptions(), AgentOptions(), {"PODFERRY_LAB": "ci"}, AgentOptions(lab="ci")),
        (AgentOptions(), AgentOptions(), {"PODFERRY_LAB": "ci", "PODFERRY_AGENT": "agent"}, AgentOptions(agent=SOCKET)),
        (AgentOptions(lab="mine"), AgentOptions(), {"PODFERRY_AGENT": "agent"}, AgentOptions(lab="mine")),
        (AgentOptions(), AgentOptions(lab="mine"), {"PODFERRY_LAB": "ci"}, AgentOptions(lab="mine")),
        (AgentOptions(agent=SOCKET), AgentOptions(lab="mine"), {}, AgentOptions(agent=SOCKET)),
    ],
)
def test_options_beat_the_environment(
    given: AgentOptions, outer: AgentOptions, environ: dict[str, str], settled: AgentOptions
) -> None:
    assert given.over(outer).settle(environ) == settled


def test_a_lab_and_an_agent_exclude_each_other() -> None:
    with pytest.raises(UsageError):
        AgentOptions("lab", SOCKET).settle({})


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[dict[str, FakeAgent]]:
    with ExitStack() as stack:
        yield {
            node: stack.enter_context(serving(FakeAgent(node, containers), tmp_path / node))
            for node, containers in {
                "node-a": {"train": "prepared", "web": "running"},
                "node-b": {"train": "running"},
            }.items()
        }


@pytest.fixture
def fleet(tmp_path: Path, agents: dict[str, FakeAgent]) -> Fleet:
    endpoints = [Endpoint(node, AgentClient(tmp_path / node)) for node in agents]
    return Fleet([*endpoints, Endpoint("node-c", None), Endpoint("node-d", AgentClient(tmp_path / "node-d"))])


def test_all_nodes_are_asked_and_silence_is_a_fact(fleet: Fleet) -> None:
    answers = fleet.containers()
    assert [(row["node"], row["name"]) for row in answers.rows] == [
        ("node-a", "train"),
        ("node-a", "web"),
        ("node-b", "train"),
    ]
    assert [one["node"] for one in answers.down_dicts()] == ["node-c", "node-d"]


def test_no_answer_at_all_is_an_error() -> None:
    with pytest.raises(AgentUnreachable):
        Fleet([Endpoint("node-c", None)]).containers()


def test_a_move_goes_to_the_node_where_it_runs(fleet: Fleet) -> None:
    assert fleet.holder("train").path.name == "node-b"
    assert fleet.holder("web").path.name == "node-a"


@pytest.mark.parametrize("what", [lambda fleet: fleet.holder("nobody"), lambda fleet: fleet.record("m9")])
def test_what_a_silent_node_may_have_is_not_said_to_be_nowhere(fleet: Fleet, what: Callable[[Fleet], object]) -> None:
    with pytest.raises(AgentUnreachable) as error:
        what(fleet)
    assert "no answer from node-c, node-d" in error.value.why
    for one in ("node-c", "node-d"):
        fleet.endpoints = [endpoint for endpoint in fleet.endpoints if endpoint.node != one]
    with pytest.raises(UsageError):
        what(fleet)


def test_the_sources_record_counts_while_it_answers(fleet: Fleet, agents: dict[str, FakeAgent]) -> None:
    for node, phase in (("node-a", "serve"), ("node-b", "fill")):
        record = MigrationRecord("m1", "train", "node-b", "node-a", Mode.LIVE)
        record.enter(phase)
        agents[node].records["m1"] = record
    gone = MigrationRecord("m0", "web", "node-c", "node-a", Mode.LIVE)
    gone.started_at = 1.0
    gone.end(Outcome.COMPLETED)
    agents["node-a"].records["m0"] = gone
    assert [(row["id"], row["phase"]) for row in fleet.records().rows] == [("m0", "completed"), ("m1", "fill")]
    assert fleet.record("m1").phase == "fill"
    assert fleet.record("m0").source == "node-c"


def test_the_target_stands_in_for_a_dead_source(fleet: Fleet) -> None:
    assert fleet.first_of(["node-d", "node-a"]).path.name == "node-a"
    assert fleet.first_of(["node-b", "node-a"]).path.name == "node-b"
    with pytest.raises(AgentUnreachable, match="node-c"):
        fleet.first_of(["node-c", "node-d"])
    with pytest.raises(UsageError, match="no node 'node-z'"):
        fleet.at("node-z")


def test_who_shall_not_run_is_told_first(fleet: Fleet, agents: dict[str, FakeAgent]) -> None:
    for agent in agents.values():
        agent.records["m1"] = MigrationRecord("m1", "train", "node-a", "node-b", Mode.LIVE)
    assert fleet.stand_down("node-b", id="m1", run_on="node-a") is None
    assert agents["node-b"].asked == [{"resolve": "m1", "run_on": "node-a"}]
    assert agents["node-a"].asked == []
    agents["node-b"].records["m1"].end(Outcome.COMPLETED, "the job runs here")
    assert fleet.stand_down("node-a", id="m1", run_on="node-b") is None
    assert agents["node-a"].asked == [{"resolve": "m1", "run_on": "node-b", "filled": True}], (
        "so it may drop its original"
    )
    assert isinstance(fleet.stand_down("node-c", id="m1", run_on="node-a"), AgentUnreachable)
    assert fleet.stand_down("node-b", id="m2", run_on="node-a") is None, "it knows nothing of it"
    agents["node-b"].refuses_to_stand_down = True
    with pytest.raises(Refused):
        fleet.stand_down("node-b", id="m1", run_on="node-a")

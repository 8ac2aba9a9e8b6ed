"""What the terminal relies on in an agent, as one function over a client: it runs against the fake and the real one."""

from __future__ import annotations

from typing import Any

from podferry.cli.agent_client import AgentClient
from podferry.cli.record import ProgressRecord, Record
from podferry.errors import PodferryError, UsageError
from podferry.model import Outcome

CONTAINER = {"name", "node", "state", "memory_bytes", "image", "movable", "why"}
CHECK = {
    *("name", "source", "target", "movable", "refusals", "warnings", "tracker", "tracker_reason"),
    *("memory_bytes", "upper_bytes", "connections", "connections_total"),
}
CONNECTION = {"protocol", "local", "remote", "backend", "peer", "fate", "why"}
REHEARSAL = {"id", "outcome", "stood_still_ms", "forecast_ms", "written_bytes"}
EVENT = {"id", "phase", "t_ms", "bytes", "total_bytes", "rate", "eta_s", "round", "note"}
RESULT = {
    *("id", "name", "source", "target", "mode", "outcome", "reason", "downtime_ms", "total_ms", "wire_bytes"),
    *("memory_bytes", "upper_bytes", "rounds", "phases", "phase", "started_at", "ended_at", "spans", "rounds_detail"),
    "error",
}
SPAN = {"name", "where", "start_ms", "end_ms", "detail"}
ROUND = {"round", "pages", "bytes", "ms", "dirty_rate"}


def agent_keeps_the_contract(client: AgentClient, name: str, to: str) -> Record:
    """Check the container `name`, move it to the node `to`, look again; return the migration's record."""
    node = client.call("node")["node"]
    rows = {row["name"]: row for row in client.call("ps")}
    assert set(rows[name]) >= CONTAINER
    assert rows[name]["node"] == node

    check = client.call("check", name=name, to=to)
    assert set(check) >= CHECK
    assert (check["source"], check["target"], check["movable"]) == (node, to, True)
    assert all(set(one) >= CONNECTION for one in check["connections"])

    rehearsed = client.call("check", timeout=None, name=name, to=to, rehearse=True, max_freeze_s=120.0)
    assert set(rehearsed) >= {*CHECK, "rehearsal"}
    assert set(rehearsed["rehearsal"]) >= REHEARSAL
    assert (rehearsed["movable"], rehearsed["rehearsal"]["outcome"]) == (True, "rehearsed")

    events: list[dict[str, Any]] = []
    request = {"name": name, "to": to, "mode": "live", "timeout_s": 120.0, "max_downtime_ms": None}
    more = {"bandwidth": None, "allow_postcopy": False}
    result = client.call("migrate", timeout=None, on_event=events.append, **request, **more)
    assert events
    assert all(set(event) >= EVENT for event in events)
    times = [ProgressRecord.from_dict(event).t_ms for event in events]
    assert times == sorted(times)

    assert set(result) >= RESULT
    record = Record.from_dict(result)
    assert record.outcome is Outcome.COMPLETED, result["error"]
    assert {event["id"] for event in events} == {record.id}
    assert (record.source, record.target, record.mode) == (node, to, "live")
    assert record.downtime_ms and record.total_ms and record.downtime_ms < record.total_ms
    assert all(set(span) >= SPAN for span in result["spans"])
    assert all(set(one) >= ROUND for one in result["rounds_detail"])
    assert len(result["rounds_detail"]) == record.rounds

    assert record.id in {row["id"] for row in client.call("status", id=None)}
    assert [row["id"] for row in client.call("status", id=record.id)] == [record.id]
    assert client.call("status", id="no such id") == []
    for request in ({"op": "cancel", "id": "no such id"}, {"op": "no such op"}):
        assert isinstance(error_of(client, **request), UsageError)
    return record


def error_of(client: AgentClient, op: str, **args: Any) -> PodferryError | None:
    """The error that the agent answers with, None where it answers with a result."""
    try:
        client.call(op, **args)
    except PodferryError as error:
        return error
    return None

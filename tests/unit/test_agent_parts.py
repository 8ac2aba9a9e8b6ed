"""The parts of an agent, one by one: journal, configuration, offers, control socket, story, metrics."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import anyio
import pytest
import yaml
from anyio.streams.buffered import BufferedByteReceiveStream

from podferry.agent import control
from podferry.agent.program import _serve_metrics
from podferry.controller import program as controller
from podferry.core.precopy import Round
from podferry.engine import metrics
from podferry.engine.journal import JOURNAL, Journal, forget_old, journals
from podferry.engine.migration_record import MigrationRecord
from podferry.errors import Failed, PeerMisbehaved, PodferryError, Refused, UsageError
from podferry.model import Mode, Outcome
from podferry.node.records import Container, Opaque, Stdio
from podferry.wire import metrics_server
from podferry.wire.pki import NODE_CERTIFICATE, Authority
from podferry.wire.tls import Credentials
from podferry.workload.config import METRICS_PORT, load, of_kubernetes
from podferry.workload.offered import OfferedContainer

pytestmark = pytest.mark.unit


# The journal.


def written(directory: Path) -> Journal:
    journal = Journal(directory)
    journal.note(role="source", target_pod="b")
    journal.enter("check")
    journal.acquire("freeze", cgroup="/a")
    journal.acquire("held-dump", work="/w")
    journal.acquire("freeze", cgroup="/b")
    journal.release("held-dump")
    journal.enter("resume", sync=True)
    return journal


def test_a_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    written(tmp_path / "m").close()
    again = Journal(tmp_path / "m")
    assert (again.phase, again.facts) == ("resume", {"role": "source", "target_pod": "b"})
    assert [(one.kind, one.facts) for one in again.ledger.entries] == [("freeze", {"cgroup": "/b"})]
    again.close()


@pytest.mark.parametrize("torn", [b"{", b'{"phase":"und', b"\0" * 50, b"\n\n"])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path, torn: bytes) -> None:
    written(tmp_path / "m").close()
    path = tmp_path / "m" / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    again = Journal(tmp_path / "m")
    assert again.phase == "resume"
    again.enter("undo")
    again.close()
    last = Journal(tmp_path / "m")
    assert last.phase == "undo"
    last.close()


def test_old_journals_go_and_records_stay_whole(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        journal = written(tmp_path / name)
        for entry in journal.ledger.entries:
            journal.release(entry.kind)
        journal.enter("completed")
        journal.save_record({"id": name})
        journal.close()
    assert len(journals(tmp_path)) == 3
    forget_old(tmp_path, 2)
    assert len(journals(tmp_path)) == 2
    (tmp_path / "three" / "record.json").write_text("{")
    journal = Journal(tmp_path / "three")
    assert journal.load_record() is None
    journal.close()


# The configuration.

GOOD: dict[str, Any] = {"node": "a", "listen": "a:1", "certificates": "/c"}


def config(path: Path, text: str) -> Path:
    file = path / "agent.json"
    file.write_text(text)
    return file


def test_a_configuration(tmp_path: Path) -> None:
    loaded = load(config(tmp_path, json.dumps(GOOD | {"peers": {"b": "b:1"}, "run": "/r"})))
    assert (loaded.node, loaded.socket, loaded.metrics) == ("a", Path("/r/agent.sock"), "")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "certificates, listen, node"),
        (json.dumps(GOOD | {"colour": "red"}), "colour"),
        *[(json.dumps(GOOD | {name: 7}), name) for name in ("node", "peers", "run", "metrics", "wrapper")],
    ],
)
def test_what_is_wrong_with_a_configuration_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(config(tmp_path, text))
    assert named in str(caught.value)


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "none.json")


# What is offered.

RECORD = Container("job", "image", "overlayfs", "key", Opaque("spec", b"{}"))


def offer(container: Container = RECORD, **fields: Any) -> dict[str, Any]:
    return OfferedContainer(container, ("lower", "upper"), Stdio()).to_dict() | fields


def with_spec(spec: Any) -> Container:
    return replace(RECORD, spec=Opaque("spec", json.dumps(spec).encode()))


def stdio(**fields: Any) -> dict[str, Any]:
    return asdict(Stdio()) | fields


def test_an_offer_travels() -> None:
    offered = OfferedContainer(
        RECORD,
        ("lower", "upper"),
        Stdio("", "file:///var/log/a", "file:///var/log/a"),
        ("--file-locks",),
        {"upper": "it holds a device node"},
    )
    assert OfferedContainer.from_dict(json.loads(json.dumps(offered.to_dict())), "job") == offered
    here = offered.record_here(Path("/here/podferry-runc"))
    assert here.runc_options().binary_name == "/here/podferry-runc"
    assert here.snapshot_key == "job"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({}, "job"),
        (offer(staying={"upper": 5}), "job"),
        (offer(staying={"upper": "x" * 256}), "job"),
        (offer(staying=["upper"]), "job"),
        (offer(), "other"),
        (offer(replace(RECORD, id="../job")), "../job"),
        (offer(replace(RECORD, id="a/b")), "a/b"),
        (offer(replace(RECORD, id="")), ""),
        (offer(record="!"), "job"),
        (offer(layers=7), "job"),
        (offer(layers=[7]), "job"),
        (offer(layers=["x" * 256]), "job"),
        (offer(layers=["x"] * 501), "job"),
        (offer(flags=["--external"]), "job"),
        (offer(stdio={"colour": 1}), "job"),
        (offer(stdio=None), "job"),
        (offer(with_spec([])), "job"),
        (offer(replace(RECORD, spec=Opaque("spec", b"{"))), "job"),
        (offer(stdio=stdio(stdout="file:///var/log/../../etc/x")), "job"),
        (offer(stdio=stdio(stdout="/var/log/x")), "job"),
        (offer(stdio=stdio(stdin="file:///var/log/x")), "job"),
        (offer(with_spec({"hooks": {"prestart": [{"path": "/bin/sh"}]}})), "job"),
        (offer(with_spec({"mounts": [{"type": "bind", "source": "/", "destination": "/host"}]})), "job"),
        (offer(with_spec({"mounts": [{"options": ["rbind"], "source": "/", "destination": "/host"}]})), "job"),
    ],
)
def test_a_hostile_offer_is_refused(data: dict[str, Any], name: str) -> None:
    with pytest.raises((PeerMisbehaved, Refused)):
        OfferedContainer.from_dict(data, name)


# The control socket.


async def op_echo(emit: control.Emit, word: str, number: int = 1) -> dict[str, Any]:
    await emit({"word": word})
    return {"word": word, "number": number}


async def op_fail(emit: control.Emit) -> None:
    raise Failed("it did not work", remedy="try again")


async def op_bug(emit: control.Emit) -> None:
    raise ValueError("oh")


class Client:
    def __init__(self, stream: anyio.abc.SocketStream) -> None:
        self.stream, self.lines = stream, BufferedByteReceiveStream(stream)

    async def ask(self, request: bytes | dict[str, Any]) -> list[dict[str, Any]]:
        """Say it, and return all lines up to the result or error."""
        await self.stream.send((request if isinstance(request, bytes) else json.dumps(request).encode()) + b"\n")
        said = []
        while not said or "event" in said[-1]:
            said.append(json.loads(await self.lines.receive_until(b"\n", 1 << 20)))
        return said


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[None]:
    ready = anyio.Event()
    ops = {"echo": op_echo, "fail": op_fail, "bug": op_bug}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: control.serve(path, ops, started=ready.set))
        await ready.wait()
        with anyio.fail_after(30):
            yield
        tasks.cancel_scope.cancel()


def test_the_control_socket(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "s"
        async with served(path), await anyio.connect_unix(path) as one, await anyio.connect_unix(path) as two:
            first, second = Client(one), Client(two)
            assert path.stat().st_mode & 0o777 == 0o600
            for client in (first, second):
                assert await client.ask({"op": "echo", "word": "x"}) == [
                    {"event": {"word": "x"}},
                    {"result": {"word": "x", "number": 1}},
                ]
            for request, code in [
                (b"garbage", "PF101"),
                (b"[]", "PF101"),
                ({"op": "none"}, "PF101"),
                ({"op": "echo"}, "PF101"),
                ({"op": "echo", "word": "x", "colour": 1}, "PF101"),
                ({"op": "fail"}, "PF200"),
                ({"op": "bug"}, "PF900"),
            ]:
                (answer,) = await first.ask(request)
                assert answer["error"]["code"] == code, request
            assert (await second.ask({"op": "echo", "word": "y"}))[-1]["result"]["word"] == "y"
        assert not path.exists()

    anyio.run(main)


# The story.

RECORD_FIELDS = [
    "id",
    "name",
    "source",
    "target",
    "mode",
    "outcome",
    "reason",
    "downtime_ms",
    "total_ms",
    "wire_bytes",
    "memory_bytes",
    "upper_bytes",
    "rounds",
    "phases",
    "phase",
    "started_at",
    "ended_at",
    "spans",
    "rounds_detail",
    "error",
]


def test_a_story_has_the_fields_of_the_contract() -> None:
    migration_record, events = MigrationRecord("m", "job", "a", "b", Mode.LIVE), list[dict[str, Any]]()
    stop = migration_record.listen(events.append)
    migration_record.enter("check")
    migration_record.expect(100)
    migration_record.sent(50)
    with migration_record.span("freeze"):
        migration_record.add_round(Round(1, 2, 8192, 0.5, 4096))
    migration_record.downtime_ms = 12.34567
    migration_record.end(Outcome.ROLLED_BACK, "why", Failed("why"))
    stop()
    migration_record.enter("unheard")
    record = json.loads(json.dumps(migration_record.to_dict()))
    assert set(RECORD_FIELDS) <= record.keys()
    assert (record["outcome"], record["downtime_ms"], record["rounds"]) == ("rolled-back", 12.346, 1)
    assert record["rounds_detail"] == [{"round": 1, "pages": 2, "bytes": 8192, "ms": 500.0, "dirty_rate": 8192}]
    assert set(record["spans"][0]) == {"name", "where", "start_ms", "end_ms", "detail"}
    assert set(events[0]) == {"id", "phase", "t_ms", "bytes", "total_bytes", "rate", "eta_s", "round", "note"}
    assert events[0]["phase"] == "check"
    assert "unheard" not in [one["phase"] for one in events]
    again = MigrationRecord.from_dict(record)
    assert (again.id, again.mode, again.wire_bytes) == ("m", Mode.LIVE, 50)


def test_ends_and_broken_rules_are_counted() -> None:
    def value(name: str, **labels: str) -> float:
        return metrics.REGISTRY.get_sample_value(name, labels) or 0.0

    migration_record = MigrationRecord("m", "job", "a", "b", Mode.STOP)
    migration_record.end(Outcome.COMPLETED)
    migration_record.downtime_ms = 250.0
    ends = {"role": "source", "mode": "stop", "outcome": "completed"}
    before = value("podferry_migrations_total", **ends), value("podferry_invariant_violations_total", rule="I1")
    metrics.ended("source", migration_record)
    metrics.violated("I1")
    assert value("podferry_migrations_total", **ends) == before[0] + 1
    assert value("podferry_invariant_violations_total", rule="I1") == before[1] + 1
    assert value("podferry_downtime_seconds_bucket", mode="stop", le="0.3") >= 1


def test_what_was_sent_the_phases_and_refusals_are_counted() -> None:
    def value(name: str, **labels: str) -> float:
        return metrics.REGISTRY.get_sample_value(name, labels) or 0.0

    migration_record = MigrationRecord("m", "job", "a", "b", Mode.LIVE)
    migration_record.enter("check")
    migration_record.sent(50)
    migration_record.memory_bytes, migration_record.upper_bytes = 70, 7
    error = Refused("no", why="because")
    migration_record.end(Outcome.REFUSED, error=error)

    def counted() -> list[float]:
        return [
            *(value("podferry_bytes_total", kind=kind) for kind in ("wire", "memory", "files")),
            value("podferry_refusals_total", code=error.code),
            value("podferry_phase_seconds_count", role="source", phase="check"),
        ]

    before = counted()
    metrics.ended("source", migration_record)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [50, 70, 7, 1, 1]
    metrics.ended("target", migration_record)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [50, 70, 7, 1, 1], "once, by the source"
    assert value("podferry_phase_seconds_count", role="target", phase="check") >= 1


def test_the_end_of_the_certificate_is_shown(tmp_path: Path) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(days=6)
    Authority.new().issue("a", [], tmp_path, not_after=end)
    metrics.watch_certificate(Credentials.load(tmp_path).not_after)
    assert metrics.REGISTRY.get_sample_value("podferry_certificate_not_after_seconds") == end.timestamp()
    (tmp_path / NODE_CERTIFICATE).unlink()
    gone = metrics.REGISTRY.get_sample_value("podferry_certificate_not_after_seconds")
    assert gone is not None
    assert math.isnan(gone)


def test_an_agent_of_a_cluster_serves_its_metrics() -> None:
    """At its node's address: the DaemonSet's annotations say at which port."""
    pod = {"NODE_NAME": "a", "NODE_IP": "10.0.0.1"}
    assert of_kubernetes(pod).metrics == "10.0.0.1:7401"
    assert of_kubernetes(pod | {"NODE_IP": "fd00::1"}).metrics == "[fd00::1]:7401"
    manifest = Path(__file__).parents[2] / "deploy/agent.yaml"
    (agents,) = yaml.safe_load_all(manifest.read_text())
    annotations = agents["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS_PORT)}


def keeps_no_other_out(port: int, counted: bytes) -> None:
    """Whoever asks there for metrics and says nothing."""

    def scraped() -> bytes:
        while True:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                found: bytes = answer.read()
                return found

    assert counted in scraped()
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    try:
        assert threading.active_count() - before <= 2 * metrics_server.AT_ONCE
        assert counted in scraped(), "as soon as their time is over"
        for one in silent:
            assert one.recv(1) == b""
    finally:
        for one in silent:
            one.close()


def test_whoever_asks_an_agent_for_metrics_and_says_nothing_keeps_no_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "ANSWER_WITHIN", 0.05)
    keeps_no_other_out(metrics_server.serve_metrics("127.0.0.1:0", metrics.REGISTRY), b"podferry_migrations_total")


def test_whoever_asks_the_controller_for_metrics_and_says_nothing_keeps_no_other_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def work(*_: object) -> None:
        keeps_no_other_out(port, b"podferry_migrations_waiting")

    monkeypatch.setattr(metrics_server, "ANSWER_WITHIN", 0.05)
    monkeypatch.setattr(controller.anyio, "run", work)
    monkeypatch.setattr("sys.argv", ["podferry-controller", f"--metrics-port={port}"])
    controller.main()


def test_an_agent_that_cannot_serve_metrics_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = SimpleNamespace(error=lambda what, **_: said.append(what))
    monkeypatch.setattr("podferry.agent.program.structlog.get_logger", lambda: log)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _serve_metrics(f"127.0.0.1:{taken.getsockname()[1]}")
    assert said == ["metrics are not served"]


def test_errors_cross_the_socket_whole() -> None:
    error = Failed("what", why="why", remedy="remedy", evidence=["line"])
    assert PodferryError.from_dict(error.to_dict()).to_dict() == error.to_dict()

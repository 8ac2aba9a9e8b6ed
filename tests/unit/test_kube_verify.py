"""`spec.verify`: what is asked of the target's kubelet, and what its answers mean."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from test_controller_pods import NOW, source

from podferry.cli.kubectl_verify import parse
from podferry.controller import pods, verifying
from podferry.errors import UsageError
from podferry.kube.migration import RESUMED, Migration

pytestmark = pytest.mark.unit

Json = dict[str, Any]


def migration(**verify: Any) -> Migration:
    about = {"name": "move", "namespace": "default", "uid": "m1"}
    made = Migration.from_json({"metadata": about, "spec": {"podName": "train", "verify": verify}})
    made.status.set_condition(RESUMED, True, "Running")
    return made


def verdict(asked: Migration, state: Json, seconds: float = 0.0, warnings: tuple[Json, ...] = ()) -> bool | None:
    target = {"spec": {"containers": [{"name": "main"}]}, "status": {"containerStatuses": [{"name": "main", **state}]}}
    resumed = asked.status.condition(RESUMED)
    assert resumed is not None
    now = datetime.datetime.fromisoformat(resumed.last_transition_time) + datetime.timedelta(seconds=seconds)
    found = verifying.verdict(asked, target, list(warnings), now)
    return None if found is None else found.holds


@pytest.mark.parametrize(
    ("way", "asks"),
    [
        ({"http": {"port": 80}}, {"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}}),
        (
            {"http": {"port": 80, "path": "/x", "scheme": "HTTPS"}},
            {"httpGet": {"port": 80, "path": "/x", "scheme": "HTTPS"}},
        ),
        ({"tcp": {"port": 5432}}, {"tcpSocket": {"port": 5432}}),
        ({"exec": {"command": ["test", "-e", "/x"]}}, {"exec": {"command": ["test", "-e", "/x"]}}),
    ],
)
def test_one_container_has_a_startup_probe_that_asks(way: Json, asks: Json) -> None:
    spec = pods.target_pod(source(), migration(**way), "b", NOW)["spec"]
    (main,), (proxy,) = spec["containers"], spec["initContainers"]
    assert main["startupProbe"].items() >= asks.items()
    assert "startupProbe" not in proxy
    spec = pods.target_pod(source(), migration(**way, container="proxy"), "b", NOW)["spec"]
    (main,), (proxy,) = spec["containers"], spec["initContainers"]
    assert proxy["startupProbe"].items() >= asks.items()
    assert "startupProbe" not in main


def test_the_kubelets_word_decides_and_silence_only_after_the_timeout() -> None:
    asked = migration(tcp={"port": 1}, timeout="10s")
    running: Json = {"state": {"running": {}}, "restartCount": 0}
    assert verdict(asked, {**running, "started": True}) is True
    assert verdict(asked, {**running, "started": True}, seconds=100) is True
    assert verdict(asked, {**running, "started": False}, seconds=9) is None
    assert verdict(asked, {**running, "started": False}, seconds=10) is False
    assert verdict(asked, {}, seconds=9) is None
    assert verdict(asked, {**running, "started": True, "restartCount": 1}) is False
    assert verdict(asked, {"state": {"terminated": {"exitCode": 0}}}) is False


def test_the_kubelets_last_words_are_told() -> None:
    target = {"spec": {"containers": [{"name": "main"}]}}
    told = [
        {"reason": "Unhealthy", "note": "Startup probe failed: refused", "eventTime": "2026-01-01T00:00:02Z"},
        {"reason": "Unhealthy", "note": "Startup probe failed: early", "eventTime": "2026-01-01T00:00:01Z"},
        {"reason": "Unhealthy", "note": "Readiness probe failed: late", "eventTime": "2026-01-01T00:00:03Z"},
    ]
    found = verifying.verdict(
        migration(tcp={"port": 1}, timeout="1s"), target, told, datetime.datetime.max.replace(tzinfo=datetime.UTC)
    )
    assert found is not None
    assert found.words.endswith("within 1s of its resume: Startup probe failed: refused")


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ("http:8080/healthz", {"http": {"port": 8080, "path": "/healthz", "scheme": "HTTP"}}),
        ("https:8443", {"http": {"port": 8443, "path": "/", "scheme": "HTTPS"}}),
        ("tcp:5432", {"tcp": {"port": 5432}}),
        ("exec:test -e '/a b'", {"exec": {"command": ["test", "-e", "/a b"]}}),
    ],
)
def test_the_option_becomes_what_is_asked(text: str, asks: Json) -> None:
    assert parse(text, None, None) == asks
    assert parse(text, "main", "5s") == {**asks, "container": "main", "timeout": "5s"}


@pytest.mark.parametrize("text", ["", "http", "http:x/", "tcp:0", "tcp:70000", "exec:", "exec:'", "grpc:1"])
def test_an_option_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        parse(text, None, None)

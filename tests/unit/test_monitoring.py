"""deploy/monitoring: alerts and the dashboard rest on metrics that there are. Each alert has a runbook, and fires when it
should, by promtool.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from podferry.controller.metrics import ControllerMetrics
from podferry.engine import metrics as of_agents

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
Json = dict[str, Any]

FIRES: dict[str, tuple[dict[str, str], str]] = {
    "PodferryNoController": ({"podferry_controller_leading": "0x30"}, "10m"),
    "PodferryJobLost": ({'podferry_migrations_ended_total{phase="Failed",reason="JobDied"}': "0x10 1x30"}, "20m"),
    "PodferryRuleBroken": ({'podferry_invariant_violations_total{rule="I1"}': "0x10 1x30"}, "20m"),
    "PodferryMovesFail": (
        {
            'podferry_migrations_ended_total{phase="RolledBack",reason="TimedOut"}': "0x10 8x60",
            'podferry_migrations_ended_total{phase="Completed",reason="Moved"}': "0x10 4x60",
        },
        "30m",
    ),
    "PodferryQueueStands": ({"podferry_migrations_waiting": "3x60", "podferry_migrations_under_way": "0x60"}, "30m"),
    "PodferryLongStops": (
        {
            'podferry_migration_downtime_seconds_bucket{le="5"}': "0x10 1x90",
            'podferry_migration_downtime_seconds_bucket{le="10"}': "0x10 10x90",
            'podferry_migration_downtime_seconds_bucket{le="+Inf"}': "0x10 10x90",
        },
        "40m",
    ),
    "PodferryCertificateEnds": ({'podferry_certificate_not_after_seconds{instance="a"}': "100000x60"}, "30m"),
    "PodferryPodsMissed": ({'podferry_pods_opted_in{state="missed"}': "2x120"}, "90m"),
}
"""For each alert a fault as its series, and when the alert fires."""
CALM = {
    "podferry_controller_leading": "1x120",
    'podferry_migrations_ended_total{phase="Completed",reason="Moved"}': "0+1x120",
    'podferry_migrations_ended_total{phase="Failed",reason="PodDeleted"}': "0x10 1x110",
    'podferry_migrations_ended_total{phase="RolledBack",reason="TimedOut"}': "0x10 2x110",
    'podferry_invariant_violations_total{rule="I1"}': "0x120",
    "podferry_migrations_waiting": "3x120",
    "podferry_migrations_under_way": "2x120",
    'podferry_migration_downtime_seconds_bucket{le="5"}': "0+1x120",
    'podferry_migration_downtime_seconds_bucket{le="+Inf"}': "0+1x120",
    'podferry_certificate_not_after_seconds{instance="a"}': "700000x120",
    'podferry_pods_opted_in{state="missed"}': "0x120",
    'podferry_pods_opted_in{state="held"}': "5x120",
}
"""A cluster in which nobody is woken."""


def rules() -> Json:
    several = yaml.safe_load_all((ROOT / "deploy/monitoring/monitoring.yaml").read_text())
    (found,) = [one["spec"] for one in several if one["kind"] == "PrometheusRule"]
    spec: Json = found
    return spec


def alerts() -> dict[str, Json]:
    return {one["alert"]: one for group in rules()["groups"] for one in group["rules"]}


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool (Debian: prometheus): whether the alerts fire is not shown")
    return found


ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
"""By the kind of a metric, how its samples are called."""


def families() -> dict[str, tuple[str, set[str]]]:
    """The program's metrics: the kind of each, and its labels."""
    collectors: list[Any] = [
        one for registry in (ControllerMetrics().registry, of_agents.REGISTRY) for one in registry._collector_to_names
    ]
    return {
        family.name: (family.type, set(collector._labelnames))
        for collector in collectors
        for family in collector.describe()
    }


def unknown(expression: str) -> list[str]:
    """What a query names that no program serves: metrics, and labels in their selectors."""
    samples = {name + ending: labels for name, (kind, labels) in families().items() for ending in ENDINGS[kind]}
    wrong = []
    for name, selector in re.findall(r"(podferry_\w+)(?:{([^}]*)})?", expression):
        wrong += [name] if name not in samples else []
        wrong += [one for one in re.findall(r"(\w+)[=!]", selector) if one not in samples.get(name, set())]
    return wrong


def test_each_alert_rests_on_metrics_that_there_are() -> None:
    for name, one in alerts().items():
        assert "podferry_" in one["expr"], name
        assert unknown(one["expr"]) == [], name


def test_a_metric_that_is_not_there_would_be_seen() -> None:
    assert unknown("sum(podferry_migrations_total)") == []
    assert unknown("podferry_migrations") == ["podferry_migrations"]
    assert unknown('podferry_migrations_total{because="x"}') == ["because"]


def dashboard() -> Json:
    read: Json = json.loads((ROOT / "deploy/monitoring/dashboard.json").read_text())
    return read


def test_each_panel_shows_metrics_that_there_are() -> None:
    panels = [one for one in dashboard()["panels"] if one["type"] != "row"]
    assert panels
    for one in panels:
        for target in one["targets"]:
            assert "podferry_" in target["expr"], one["title"]
            assert unknown(target["expr"]) == [], one["title"]
            by = {name for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in group.split(", ")}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= by, one["title"]


def test_each_metric_is_on_the_dashboard_and_in_the_documents() -> None:
    """What nobody is shown need not be counted."""
    shown = " ".join(target["expr"] for one in dashboard()["panels"] for target in one.get("targets", ()))
    told = "".join((ROOT / "docs" / name).read_text() for name in ("kubernetes.md", "agent.md"))
    assert [name for name in families() if name not in shown] == []
    assert [name for name in families() if name not in told] == []


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({one["id"] for one in panels}) == len(panels)
    covered: set[tuple[int, int]] = set()
    for one in panels:
        at = one["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not covered & cells, one["title"]
        assert at["x"] + at["w"] <= 24
        covered |= cells


def test_the_dashboards_alerts_are_those_that_have_a_panel_or_a_runbook() -> None:
    """A panel that names an alert names one that there is."""
    for one in dashboard()["panels"]:
        assert set(re.findall(r"\((Podferry\w+)\)", one.get("description", ""))) <= set(alerts()), one["title"]


def test_prometheus_understands_each_panel(promtool: str, tmp_path: Path) -> None:
    groups = [
        {"record": "x:y", "expr": target["expr"]} for one in dashboard()["panels"] for target in one.get("targets", ())
    ]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": groups}]}))
    ran = subprocess.run(
        [promtool, "check", "rules", "--lint=none", "panels.yaml"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_each_alert_has_its_runbook() -> None:
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(alerts())
    for name, one in alerts().items():
        assert one["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"


def test_every_alert_is_tried() -> None:
    assert set(FIRES) == set(alerts())


def tried(promtool: str, tmp_path: Path, series: dict[str, str], firing: set[str], at: str) -> str:
    """What promtool has against it that at this time these alerts fire, and no others."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))

    tests = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": f'sum by (alertname) (ALERTS{{alertname="{name}",alertstate="firing"}})',
                        "eval_time": at,
                        "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1}] if name in firing else [],
                    }
                    for name in alerts()
                ],
            }
        ],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    ran = subprocess.run(
        [promtool, "test", "rules", "tests.yaml"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    return "" if ran.returncode == 0 else ran.stdout + ran.stderr


@pytest.mark.parametrize("name", FIRES)
def test_a_fault_fires_its_alert(name: str, promtool: str, tmp_path: Path) -> None:
    series, at = FIRES[name]
    also = {} if name == "PodferryNoController" else {"podferry_controller_leading": "1x120"}
    assert not tried(promtool, tmp_path, {**also, **series}, {name}, at)


def test_a_calm_cluster_wakes_nobody(promtool: str, tmp_path: Path) -> None:
    for at in ("20m", "60m", "110m"):
        assert not tried(promtool, tmp_path, CALM, set(), at)


def test_what_is_scraped_is_served() -> None:
    """A PodMonitor finds pods by their labels and a port by its name."""
    monitors = [
        one
        for one in yaml.safe_load_all((ROOT / "deploy/monitoring/monitoring.yaml").read_text())
        if one["kind"] == "PodMonitor"
    ]
    assert {one["metadata"]["name"] for one in monitors} == {"podferry-controller", "podferry-agent"}
    for one in monitors:
        file = one["metadata"]["name"].removeprefix("podferry-")
        several = yaml.safe_load_all((ROOT / f"deploy/{file}.yaml").read_text())
        template = next(found for found in several if found["kind"] in ("Deployment", "DaemonSet"))["spec"]["template"]
        assert one["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        scraped = template["metadata"]["annotations"]["prometheus.io/port"]
        assert str(ports[one["spec"]["podMetricsEndpoints"][0]["port"]]) == scraped

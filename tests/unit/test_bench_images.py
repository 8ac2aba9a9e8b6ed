"""Records of shared images: which goals they keep, how they are reported, and the names that layers have on the share."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from test_bench_records import MACHINE, record

from podferry.bench import pulls, report
from podferry.bench.goals import FORMS, GoalVerdict, verdicts
from podferry.bench.moves import SOURCE, TARGET
from podferry.bench.pulls import Crowd, Measurement, Pulls
from podferry.bench.scenarios import SCENARIOS
from podferry.lab import Lab

pytestmark = pytest.mark.unit
IMAGE = {"image_bytes": 500 << 20, "packed_bytes": 170 << 20, "layers": 2}


def pulled(method: str, **fields: float | None) -> dict[str, Any]:
    """A run of the scenario `images`: as long as the fields do not say otherwise, as overlayfs would have it."""
    plain: dict[str, Any] = {
        "first_pull_ms": 10_000.0,
        "published_ms": 0.0,
        "second_start_ms": 10_000.0,
        "second_layer_bytes": 170 << 20,
        "second_link_bytes": 172 << 20,
        "import_first_ms": 1000.0,
        "import_cold_ms": 1000.0,
        "import_warm_ms": 500.0,
        "share_bytes": None,
        "facts": IMAGE,
    }
    bare = {name: record("images", method)[name] for name in ("scenario", "method", "run", "load", "link", "outcome")}
    return bare | {"machine": MACHINE} | plain | fields


def crowd(method: str, **fields: Any) -> dict[str, Any]:
    """A run of the scenario `crowd` in which all went well."""
    bare = {
        name: value for name, value in pulled(method).items() if name in ("run", "load", "link", "outcome", "machine")
    }
    figures = {"all_have_it_ms": 20_000.0, "unpacked": 1, "share_bytes": 500 << 20}
    return bare | {"scenario": "crowd", "method": method} | figures | {"facts": IMAGE | {"nodes": 10}} | fields


GOOD = {
    "second_start_ms": 1000.0,
    "second_layer_bytes": 0,
    "second_link_bytes": 1 << 20,
    "first_pull_ms": 12_000.0,
    "import_first_ms": 1490.0,
    "import_cold_ms": 1400.0,
    "import_warm_ms": 510.0,
    "published_ms": 5000.0,
    "share_bytes": 500 << 20,
}


def found(records: list[dict[str, Any]], form: str) -> dict[str, GoalVerdict]:
    """The verdicts on a form, by what they are about."""
    return {one.goal.removeprefix(f"{form}: "): one for one in verdicts(records) if one.goal.startswith(f"{form}: ")}


def test_a_form_that_keeps_every_goal() -> None:
    records = [pulled("overlayfs"), pulled("erofs", **GOOD), crowd("erofs")]
    goals = found(records, "erofs")
    assert len(goals) == 8
    assert all(one.kept for one in goals.values()), goals
    assert goals["second node's start sooner than with overlayfs"].measured == 10
    assert all(one.kept is None for one in found(records, "dir").values())


@pytest.mark.parametrize(
    ("goal", "run"),
    [
        ("layers that the second node downloaded", pulled("dir", **GOOD | {"second_layer_bytes": 1})),
        ("second node's start sooner than with overlayfs", pulled("dir", **GOOD | {"second_start_ms": 2001.0})),
        ("first node's pull against overlayfs", pulled("dir", **GOOD | {"first_pull_ms": 13_001.0})),
        ("import of numpy and scipy against local disk, warm", pulled("dir", **GOOD | {"import_warm_ms": 526.0})),
        ("the same, cold", pulled("dir", **GOOD | {"import_cold_ms": 1501.0})),
        (
            "the same, cold, as the first that imports them anywhere",
            pulled("dir", **GOOD | {"import_first_ms": 1501.0}),
        ),
        ("ten nodes at once, a layer unpacked", crowd("dir", unpacked=2)),
    ],
)
def test_each_goal_can_be_missed(goal: str, run: dict[str, Any]) -> None:
    assert found([pulled("overlayfs"), run], "dir")[goal].kept is False


def test_ten_nodes_may_take_no_more_than_one() -> None:
    runs = [pulled("erofs", **GOOD), crowd("erofs", share_bytes=501 << 20)]
    assert found(runs, "erofs")["bytes on the share for ten nodes"].kept is False
    assert found(runs[1:], "erofs")["bytes on the share for ten nodes"].kept is None


def test_a_crowd_is_judged_by_its_worst_run() -> None:
    runs = [crowd("erofs"), crowd("erofs"), crowd("erofs", unpacked=2)]
    assert found(runs, "erofs")["ten nodes at once, a layer unpacked"].measured == 2


def test_goals_that_have_nothing_to_do_with_the_records_are_left_out() -> None:
    assert {one.goal.partition(":")[0] for one in verdicts([pulled("overlayfs")])} == set(FORMS)
    assert not any(one.goal.startswith(FORMS) for one in verdicts([record()]))
    assert len({one.goal for one in verdicts([record(), crowd("erofs")])}) > 14


def test_the_report_has_a_table_of_its_own() -> None:
    records = [
        pulled("overlayfs"),
        pulled("erofs", **GOOD),
        pulled("erofs", **GOOD | {"first_pull_ms": 14_000.0}),
        crowd("dir"),
    ]
    page = report.markdown(records, "podferry bench run images")
    assert "## Runs" not in page
    assert "| images | erofs | 2 | 500 (170 packed) | 13.0 (12.0-14.0) |" in page
    assert "| crowd | dir | 1 |" in page
    assert "kept" in page
    assert "## Images" not in report.markdown([record()], "x")


def test_what_is_measured_without_a_job_can_be_told_from_a_move() -> None:
    for name in ("images", "crowd"):
        assert SCENARIOS[name].workload is None
        assert all(isinstance(one, Measurement) for one in SCENARIOS[name].methods.values())
    moves = [one for scenario in SCENARIOS.values() if scenario.workload for one in scenario.methods.values() if one]
    assert not any(isinstance(one, Measurement) for one in moves)
    assert isinstance(Pulls(), Measurement) and isinstance(Crowd("dir"), Measurement)


@pytest.mark.parametrize("form", ["", *FORMS])
def test_every_method_follows_the_same_pulls(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but what makes ready lies between the pulls that are not measured and the one that is, whatever ran before."""
    did: list[tuple[str, ...]] = []

    class Image:
        facts: ClassVar[dict[str, int]] = {}

        def __init__(self, lab: Any, form: str) -> None:
            self.form = form

        def make_ready(self, progress: Any) -> None:
            did.append((self.form, "ready"))

        def pull(self, node: str) -> None:
            did.append((self.form, "pull", node))

        def importing(self, node: str) -> float:
            return 1.0

        def layers_among(self, downloads: Any) -> list[Any]:
            return []

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: 0

    monkeypatch.setattr(pulls, "_Image", Image)
    monkeypatch.setattr(pulls, "_received", lambda lab, node: 0)
    monkeypatch.setattr(pulls, "_drop_caches", lambda: None)
    monkeypatch.setattr(pulls.registry, "downloads", lambda lab: [])
    timed: list[tuple[str, ...]] = []
    original = pulls._timed

    def watched(act: Any) -> float:
        before = len(did)
        took = original(act)
        timed.extend(did[before:])
        return took

    monkeypatch.setattr(pulls, "_timed", watched)
    Pulls(form).measure(Lab("unused"), print)
    plain = [("", "ready"), ("", "pull", SOURCE), ("", "pull", TARGET)]
    assert did == [*plain, (form, "ready"), (form, "pull", SOURCE)]
    assert timed == [(form, "pull", SOURCE)]


def test_chain_ids_are_those_of_the_image_spec() -> None:
    """ChainID(L0|L1) is Digest(ChainID(L0) + " " + DiffID(L1)): sha256sum says the same."""
    one, other = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    assert pulls._chains([one]) == [one]
    above = "sha256:9932074217c35353d2e03a3f5a86549f7c67bfeb0ba53e23d69f4d4c8f7958f5"
    assert pulls._chains([one, other]) == [one, above]

"""`bench compare`: hand-made pairs whose answer is known, and the command with its exit status."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from podferry.bench.compare import (
    EXACT_PAIRS,
    LEAST_PAIRS,
    ChangeVerdict,
    chance,
    compare,
    interval,
    judged,
    only_in,
    ratio_of_medians,
)
from podferry.cli.app import app

pytestmark = pytest.mark.unit

NOISE = (0.97, 1.02, 1.0, 0.99, 1.03, 0.98, 1.01, 1.0)


def runs(method: str, values: tuple[float, ...], scenario: str = "small", **fields: Any) -> list[dict[str, Any]]:
    """Completed runs with these downtimes."""
    base = {"scenario": scenario, "method": method, "outcome": "completed", **fields}
    return [{**base, "run": number, "downtime_ms": value} for number, value in enumerate(values, 1)]


def scaled(factor: float, noise: tuple[float, ...] = NOISE) -> tuple[float, ...]:
    return tuple(100 * factor * one for one in noise)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.5, ChangeVerdict.WORSE), (0.6, ChangeVerdict.BETTER), (1.0, ChangeVerdict.SAME)]
)
def test_what_changed_beyond_chance_is_said(factor: float, verdict: ChangeVerdict) -> None:
    after = scaled(factor, NOISE[::-1])
    (found,) = compare(runs("live", scaled(1)), runs("live", after))
    assert (found.figure, found.pairs, found.verdict) == ("downtime_ms", 8, verdict)
    assert found.ratio == pytest.approx(factor, rel=0.01)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.ratio <= found.high
    assert found.beyond(1.1) == (verdict is ChangeVerdict.WORSE)


def test_worse_within_the_threshold_is_not_beyond_it() -> None:
    (found,) = compare(runs("live", scaled(1)), runs("live", scaled(1.08)))
    assert found.verdict is ChangeVerdict.WORSE
    assert not found.beyond(1.1)
    assert found.beyond(1.05)


def test_few_pairs_show_no_difference_however_large() -> None:
    few = scaled(1)[: LEAST_PAIRS - 1]
    (found,) = compare(runs("live", few), runs("live", tuple(9 * one for one in few)))
    assert (found.verdict, found.beyond(1.1)) == (ChangeVerdict.FEW, False)
    assert found.p == pytest.approx(2 / 2 ** (LEAST_PAIRS - 1))


def test_runs_are_paired_by_their_number() -> None:
    """A machine that gets slower from run to run: unpaired nothing is to be seen, each pair has it."""
    drifting = tuple(100.0 * number for number in range(1, 9))
    after = [*reversed(runs("live", tuple(one * 1.05 for one in drifting)))]
    (found,) = compare(runs("live", drifting), after)
    assert found.verdict is ChangeVerdict.WORSE
    assert found.p == pytest.approx(2 / 2**8)


def test_a_baseline_takes_the_machine_out() -> None:
    quiet = [*runs("live", scaled(2)), *runs("floor", scaled(1), "elsewhere")]
    busy = [*runs("live", scaled(6)), *runs("floor", scaled(3), "elsewhere")]
    (plain,) = [one for one in compare(quiet, busy) if one.method == "live"]
    (relative,) = compare(quiet, busy, relative_to="floor")
    assert plain.verdict is ChangeVerdict.WORSE
    assert (relative.ratio, relative.verdict) == (pytest.approx(1), ChangeVerdict.SAME)


def test_what_the_baseline_has_not_is_divided_by_its_downtime() -> None:
    def file(factor: float) -> list[dict[str, Any]]:
        moves = [{**one, "total_ms": 9000 * factor, "wire_bytes": 5.0} for one in runs("live", scaled(factor))]
        return [*moves, *runs("floor", scaled(factor), "elsewhere")]

    found = {one.figure: one for one in compare(file(1), file(3), relative_to="floor")}
    assert found["total_ms"].ratio == pytest.approx(1)
    assert (found["wire_bytes"].old, found["wire_bytes"].new) == (5, 5)


def test_lost_work_may_be_negative() -> None:
    before, after = ([{**one, "lost": {"total_ms": value}} for one, value in zip(runs("live", scaled(1)), values, strict=True)]
                     for values in ((-5.0, 3.0, -2.0, 1.0, -1.0, -4.0, 2.0, -3.0), scaled(3)))  # fmt: skip
    found = next(one for one in compare(before, after) if one.figure == "lost_ms")
    assert (found.ratio, found.verdict) == (None, ChangeVerdict.WORSE)


def test_a_method_that_no_longer_completes_is_worse() -> None:
    broken = [{**one, "outcome": "failed"} for one in runs("live", scaled(1))]
    (found,) = compare(runs("live", scaled(1)), broken)
    assert found.verdict is ChangeVerdict.FAILED
    assert found.beyond(100)


def test_the_control_is_not_compared_and_what_is_missing_is_named() -> None:
    old = [*runs("unmoved", scaled(1)), *runs("live", scaled(1)), *runs("stop", scaled(1))]
    new = [*runs("unmoved", scaled(9)), *runs("live", scaled(1))]
    assert {one.method for one in compare(old, new)} == {"live"}
    assert only_in(old, new) == ["small, stop"]


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(1, 1e6)), min_size=2, max_size=9))
def test_the_interval_is_in_order_and_the_chance_is_one(pairs: list[tuple[float, float]]) -> None:
    low, high = interval(pairs)
    assert low is not None
    assert high is not None
    assert low <= high
    assert 0 < chance(pairs) <= 1
    assert chance(pairs) == pytest.approx(chance([(new, old) for old, new in pairs]))


def test_random_signs_agree_with_all_signs() -> None:
    seeded = random.Random(3)
    pairs = [(100 + seeded.gauss(0, 10), 104 + seeded.gauss(0, 10)) for _ in range(EXACT_PAIRS)]
    exact = chance(pairs)
    assert chance([*pairs, (100.0, 100.0)]) == pytest.approx(exact, abs=0.05), (
        "a pair without a difference adds nothing"
    )


def test_chance_is_rarely_below_the_level_where_nothing_changed() -> None:
    seeded = random.Random(7)
    low = sum(
        chance([(seeded.lognormvariate(5, 0.3), seeded.lognormvariate(5, 0.3)) for _ in range(8)]) <= 0.05
        for _ in range(200)
    )
    assert low < 25, "about one in twenty"


def test_a_ratio_needs_a_positive_median() -> None:
    assert ratio_of_medians([(0.0, 5.0)]) is None
    assert judged("s", "m", "f", [(0.0, 0.0)] * 8).verdict is ChangeVerdict.SAME


# -- the command --------------------------------------------------------------------------------------------------


def written(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def test_the_command_ends_with_1_where_something_got_worse(tmp_path: Path) -> None:
    old, same, worse = (
        written(tmp_path / f"{factor}.jsonl", runs("live", scaled(factor))) for factor in (1, 1.01, 1.5)
    )
    assert CliRunner().invoke(app, ["bench", "compare", old, same]).exit_code == 0
    told = CliRunner().invoke(app, ["bench", "compare", old, worse])
    assert told.exit_code == 1
    assert "worse" in told.stdout
    assert "1.50" in told.stdout
    assert CliRunner().invoke(app, ["bench", "compare", old, worse, "--threshold", "2"]).exit_code == 0


def test_the_command_prints_json(tmp_path: Path) -> None:
    old, new = (written(tmp_path / str(factor), runs("live", scaled(factor))) for factor in (1, 1.5))
    said = json.loads(CliRunner().invoke(app, ["bench", "compare", old, new, "--json"]).stdout)
    assert said["worse"] == 1
    assert said["comparisons"][0]["verdict"] == "worse"
    assert said["comparisons"][0]["ratio"] == pytest.approx(1.5)


def test_the_command_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    old = written(tmp_path / "old", runs("live", scaled(1)))
    new = written(tmp_path / "new", runs("live", scaled(1), "large"))
    assert CliRunner().invoke(app, ["bench", "compare", old, new], standalone_mode=False).exception is not None
    unknown = CliRunner().invoke(app, ["bench", "compare", old, old, "--figure", "beauty"], standalone_mode=False)
    assert "beauty" in str(unknown.exception)

"""The demo's parts that need no lab: the job, its output, the comparison."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from podferry.cli import demo, demo_job, main
from podferry.cli.app import run
from podferry.cli.demo_verdict import compare
from podferry.errors import Failed
from podferry.lab import Lab, containers, root_images
from podferry.model import Mode

pytestmark = pytest.mark.unit


def test_the_job_repeats_itself_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, ledgers, lines = set(), set(), set()
    for number in range(2):
        monkeypatch.setattr(demo_job, "LEDGER", tmp_path / str(number))
        results.add(demo_job.compute(2, 6, 10, 3))
        ledgers.add((tmp_path / str(number)).read_text())
        lines.add(capsys.readouterr().out)
    assert len(results) == len(ledgers) == len(lines) == 1
    assert ledgers.pop().count("\n") == 6
    assert lines.pop().count("\n") == 2


def test_every_byte_of_its_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_job, "LEDGER", tmp_path / "ledger")
    monkeypatch.setattr(demo_job, "BLOCK", 64)
    result = demo_job.compute(4, 5, 1, 10)
    real = demo_job.hashlib.shake_128
    monkeypatch.setattr(
        demo_job.hashlib, "shake_128", lambda seed: Torn(real(seed)) if seed == bytes([0, 0, 0, 3]) else real(seed)
    )
    assert demo_job.compute(4, 5, 1, 10) != result


class Torn:
    """A digest with one bit turned."""

    def __init__(self, digest: object) -> None:
        self._digest = digest

    def digest(self, length: int) -> bytes:
        whole = bytearray(self._digest.digest(length))  # type: ignore[attr-defined]
        whole[-1] ^= 1
        return bytes(whole)


def test_primes() -> None:
    assert demo_job.primes(10**12, 100) == sum(
        all(number % divisor for divisor in range(3, 10**6 + 1, 2)) for number in range(10**12 + 1, 10**12 + 201, 2)
    )


def test_output_is_read_in_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def output(lab: Lab, name: str, *, follow: bool) -> Iterator[bytes]:
        yield b"step 1 of 2: a\nst"
        yield b"ep 2 of 2: b\nresult ff\n"

    monkeypatch.setattr(containers, "output", output)
    out = demo.ContainerOutput(Lab("test-none"), "moved")
    out.wait_for("result")
    assert out.lines == ["step 1 of 2: a", "step 2 of 2: b", "result ff"]
    with pytest.raises(Failed, match="ended before"):
        out.wait_for("never")


def test_a_lab_that_is_up_is_not_taken_for_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "require_root", lambda: None)
    monkeypatch.setattr(Lab, "exists", lambda lab: True)
    monkeypatch.setattr(Lab, "down", lambda lab, progress: pytest.fail("it was taken down"))
    assert run(["lab", "demo", "--lab", "mine"]) == 2
    assert "lab mine is up already" in capsys.readouterr().err


def test_every_mode_has_its_words() -> None:
    assert set(demo.WAYS) == set(Mode)


def test_a_difference_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    compare({"final checksum": "ab"}, {"final checksum": "ab"})
    assert "exactly" in capsys.readouterr().out
    for other in ({"final checksum": "ac"}, {}, {"final checksum": "ab", "more": "x"}):
        with pytest.raises(Failed):
            compare({"final checksum": "ab"}, other)


def test_a_terminal_that_lacks_characters_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What prints the proof of a demo must not fail where the locale is de_DE without UTF-8."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="iso8859-1"))
    monkeypatch.setattr(sys, "argv", ["podferry", "version"])
    with pytest.raises(SystemExit):
        main()
    compare({"final checksum": "5a"}, {"final checksum": "5a"})
    sys.stdout.flush()
    assert b"? equal" in printed.getvalue()


def test_the_demo_says_what_is_built_and_how_long_that_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_images, "place", lambda kind, recipe, suffix="": Path("/nowhere"))
    monkeypatch.setattr(root_images, "architecture", lambda: "amd64")
    both = sum(one.seconds for one in root_images.ALL)
    assert f"node image and job image, usually in {both} s" in demo._first()
    monkeypatch.setattr(root_images, "place", lambda kind, recipe, suffix="": Path("/"))
    assert demo._first() == "Its images are there already."

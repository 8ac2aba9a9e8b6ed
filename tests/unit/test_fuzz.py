"""Every parser that faces a peer, CRIU's images, the share or the API server, on damaged inputs of its kind.

A second of each with every run; a million in all with `-m slow`. `PODFERRY_SEED` repeats a run.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import TARGETS, Target, damaged, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.unit

SEED = int(os.environ.get("PODFERRY_SEED") or random.randrange(1 << 32))
IN_ALL = 1_000_000
A_MOMENT = 300
"""Inputs of each target in an ordinary run."""
BATCH, BATCH_SECONDS = 500, 120
MEMORY = 512 << 20
"""What a reader may take beyond what is there when it begins: a thousand times its largest input here."""

each = pytest.mark.parametrize("target", TARGETS, ids=[one.name.replace(" ", "-") for one in TARGETS])


@pytest.fixture
def bounded() -> Iterator[None]:
    """No reader takes all memory, or for ever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    before = signal.signal(signal.SIGALRM, _too_long)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"{BATCH} inputs are not read after {BATCH_SECONDS} s")


@each
def test_a_real_one_is_read(target: Target, tmp_path: Path) -> None:
    """What is damaged below is not refused for its seed alone."""
    for seed in target.seeds[:-1] or target.seeds:
        target.run(seed, tmp_path)


@each
def test_damaged_ones_are_read_or_refused(target: Target, tmp_path: Path, bounded: None) -> None:
    fuzz(target, A_MOMENT, tmp_path)


@each
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=50
)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(target: Target, tmp_path: Path, data: bytes) -> None:
    run(target, data, tmp_path)


PEM = b"-----%s CERTIFICATE REQUEST-----\n"
OF_VERSION_8 = (
    b"MIHwMIGXAgEIMBExDzANBgNVBAMMBm5vZGUtYTBZMBMGByqGSM49AgEGCCqGSM49\n"
    b"AwEHA0IABI5TO2+gv3tGJbswZnwB+2B++fi4qA/vWzAGKHAxh7Kjc+sdveAzGDZt\n"
    b"Bp+DpvWQAFPHNjPLBBshxV4ahsH0ALSgJDAiBgkqhkiG9w0BCQ4xFTATMBEGA1Ud\n"
    b"EQQKMAiCBm5vZGUtYTAKBggqhkjOPQQDAgNIADBFAiBmDkI+tei4sfdowH/lRSmI\n"
    b"d6tKI6YBdcNRaMNuBI+W0AIhANQyIH8u5YuwRMBwHyumPd/lpxBXXxlaZWzgPQrV\n"
    b"u7up\n"
)
FOUND = {
    "a request of a version that there is not": ("certificate request", PEM % b"BEGIN" + OF_VERSION_8 + PEM % b"END"),
    "a record nested without end": ("records on the share", b"[" * 100_000),
    "an acquisition of nothing": ("journal", b'{"format": 2}\n{"acquire": "scratch"}\n'),
}


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found_before_is_refused(found: str, tmp_path: Path) -> None:
    name, data = FOUND[found]
    run(next(one for one in TARGETS if one.name == name), data, tmp_path)


@pytest.mark.slow
def test_a_million_inputs(tmp_path: Path, bounded: None) -> None:
    parts, done = sum(one.share for one in TARGETS), 0
    for target in TARGETS:
        directory = tmp_path / target.name.replace(" ", "-")
        directory.mkdir()
        count = -(-IN_ALL * target.share // parts)
        fuzz(target, count, directory)
        print(f"{count:>8} {target.name}")
        done += count
    assert done >= IN_ALL


def fuzz(target: Target, count: int, directory: Path) -> None:
    """So many inputs; one that fails is told, and written down beside nothing else that is new."""
    chance = random.Random(f"{SEED} {target.name}")
    inside, beside = directory / "inside", directory / "beside"
    inside.mkdir(mode=0o700)
    beside.write_text("untouched")
    for number in range(count):
        if number % BATCH == 0:
            signal.alarm(BATCH_SECONDS)
        data = damaged(chance.choice(target.seeds), target.words, chance)
        try:
            run(target, data, inside)
        except BaseException as error:
            error.add_note(f"PODFERRY_SEED={SEED}, input {number} of {target.name}: {data[:400]!r}")
            raise
    signal.alarm(0)
    assert beside.read_text() == "untouched"
    assert sorted(path.name for path in directory.iterdir()) == ["beside", "inside"]

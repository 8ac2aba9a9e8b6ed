"""Jobs in each situation of the matrix: there and back and there again, or refused before anything is touched.

The matrix is long: a run takes a tenth of it, another one each time (`PODFERRY_SEED` repeats a choice), and the marker `slow` all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from matrix import FAMILIES, SITUATIONS, Situation
from moving import PATIENCE, A, B, Cluster, Witness, other, until

from podferry.core.preflight import SOCKETS_CRIU, numbers
from podferry.lab import Lab
from podferry.node.sockets import credentials_may_be_asked

pytestmark = pytest.mark.lab
MODES = ("live", "stop", "postcopy")
SEED = int(os.environ.get("PODFERRY_SEED") or random.randrange(1 << 16))
OFTEN = [one for one in SITUATIONS if one not in FAMILIES]
"""Those of the families are all slow for now: not each has been run on each CRIU yet (docs/what-moves.md)."""
TENTH = {one.name for one in random.Random(SEED).sample(OFTEN, max(3, len(OFTEN) // 10))}


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    return Cluster(lab)


@pytest.fixture
def name(cluster: Cluster, situation: Situation) -> Iterator[str]:
    name = situation.name.replace("_", "-")
    yield name
    cluster.stop(name)


@pytest.mark.parametrize(
    "situation",
    [pytest.param(one, id=one.name, marks=() if one.name in TENTH else pytest.mark.slow) for one in SITUATIONS],
)
def test_situation(cluster: Cluster, name: str, situation: Situation) -> None:
    print(f"PODFERRY_SEED={SEED} chooses this again")
    cluster.start(name, situation.job, situation.name)
    cluster.goes_on(A, name)
    if situation.refused:
        refused(cluster, name, situation.refused)
    elif situation.sockets and not saves_sockets(cluster):
        refused(cluster, name, "CRIU cannot save TCP and UDP sockets")
    elif situation.other_user and not may_read_limits_of_others():
        refused(cluster, name, "may not read the resource limits")
    else:
        rehearsed(cluster, name)
        there_and_back(cluster, name, situation.differs, situation.tells_at)


def rehearsed(cluster: Cluster, name: str) -> None:
    """`check` says yes, and so does a rehearsal, which the job does not feel."""
    answer = cluster.agent(A).call("check", timeout=None, name=name, to=B, rehearse=True, max_freeze_s=PATIENCE)
    assert answer["movable"], answer["refusals"]
    assert answer["rehearsal"]["outcome"] == "rehearsed"
    cluster.goes_on(A, name)


def there_and_back(cluster: Cluster, name: str, differs: str = "", tells_at: int = 0) -> None:
    """One move in each mode. What the agents say that the job has not as it had it, is what `differs` says."""
    here = A
    with Witness(cluster, name) as witness:
        for mode in MODES:
            record = cluster.migrate(name, source=here, mode=mode)
            evidence = (record["error"] or {}).get("evidence", [])
            assert record["outcome"] == "completed", (record["reason"], evidence[:4], cluster.lines(here, name)[-2:])
            assert all(differs and differs in one for one in record["differences"]), record["differences"]
            here = other(here)
            cluster.goes_on(here, name)
        until(
            lambda: cluster.counted(here, name) >= tells_at or cluster.goes_on(here, name),
            "it tells whether it was harmed",
        )
        witness.testify(name)


def may_read_limits_of_others() -> bool:
    """Whether the agents of this machine's lab have CAP_SYS_RESOURCE, as this process has it or not."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> 24 & 1)


def saves_sockets(cluster: Cluster) -> bool:
    """Whether the nodes' CRIU saves TCP and UDP sockets on this kernel."""
    version = cluster.lab.exec(A, ["criu", "--version"]).stdout.split()[1]
    return credentials_may_be_asked() or numbers(version) >= SOCKETS_CRIU


def refused(cluster: Cluster, name: str, reason: str) -> None:
    """`check` says no, as does a migration, with a reason and a remedy; and the job has felt nothing."""
    answer = cluster.agent(A).call("check", name=name, to=B)
    said = " ".join(f"{one['what']}: {one['why']}" for one in answer["refusals"])
    assert reason in said
    assert all(one["remedy"] for one in answer["refusals"])
    record = cluster.migrate(name, source=A, mode="live")
    assert record["outcome"] == "refused", record
    cluster.goes_on(A, name)

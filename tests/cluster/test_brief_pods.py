"""Pods whose job ends as soon as it has been moved: it has run, once, and its end is what the kubelet tells.

tests/lab/test_brief_jobs.py has the same without Kubernetes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from podferry.lab import Lab

from .moving_pods import A, B, Json, Move, Movers, also, pod, until

pytestmark = pytest.mark.cluster
BRIEF = (Path(__file__).parents[1] / "lab/jobs/brief.py").read_text()
ENDS = {
    "0": 0,
    "3": 3,
    "exec": 5,
    "daemon": 6,
    "stop": 8,
    "fault": 128 + signal.SIGSEGV,
    "memory": 128 + signal.SIGKILL,
}
"""How the job ends, and the exit code that the kubelet must have of it."""
MODES = ("stop", "live", "postcopy")
SHORT = {("0", "live"), ("fault", "postcopy"), ("memory", "stop")}
COUNT = "import itertools, time\nfor n in itertools.count():\n    print(n, flush=True)\n    time.sleep(0.05)\n"


@pytest.fixture(scope="module")
def movers(bare: Lab) -> Iterator[Movers]:
    movers = Movers(bare)
    yield movers
    movers.stop()


@pytest.fixture
def clean(movers: Movers) -> Iterator[Movers]:
    """The agents; afterwards no pod is left, and nothing of a move on either node."""
    yield movers
    movers.kubectl.run("delete", "pod", "--all", "--wait", "--grace-period=1")
    for node in (A, B):
        until(lambda node=node: not movers.leftovers(node), f"nothing is left on {node}")


class Source:
    """What a container of the source prints, also once its log has been removed."""

    def __init__(self, movers: Movers, made: Json, container: str = "main") -> None:
        uid, name = made["metadata"]["uid"], made["metadata"]["name"]
        self._file = (movers.root(A) / f"var/log/pods/default_{name}_{uid}/{container}/0.log").open()

    def lines(self) -> list[str]:
        self._file.seek(0)
        words = [line.split(" ", 3) for line in self._file.read().split("\n")[:-1]]
        # the agent ends the last line with a partial one, of no content where it was whole
        return "".join(text + ("\n" if tag == "F" else "") for _, _, tag, text in words).splitlines()


def move(movers: Movers, here: Json, mode: str, name: str) -> Json:
    """Move the pod; its job looks out for a stop from the moment before the freeze on. The target pod, once it is handed over."""
    gate = movers.close_breakpoint(f"source-cut-over-default_{name}")
    moved: Move = movers.order(here, B, mode)
    with ThreadPoolExecutor(2) as answers:
        made = answers.submit(movers.make_target, moved)
        over = answers.submit(movers.hand_over, moved)
        try:
            until(gate.with_name(f"{gate.name}.reached").exists, "the source is about to cut over")
            movers.lab.exec(A, ["sh", "-c", f"kill -USR1 $(pgrep -f '[r]uns-as-{name}' | sort -n | head -n 1)"])
        finally:
            gate.unlink(missing_ok=True)
        record = movers.ended(A, moved)
        assert record["outcome"] == "completed", (record["reason"], record["error"], movers.evidence(moved))
        made.result()
        over.result()
    assert movers.ended(B, moved, "target")["outcome"] == "completed"
    assert moved.target_pod is not None
    return moved.target_pod


def ended(movers: Movers, target: Json, container: str = "main") -> Json:
    """How the container ended, as its kubelet says."""

    def terminated() -> Json | None:
        states = movers.get(target["metadata"]["name"])["status"].get("containerStatuses", [])
        found: list[Json] = [one for one in states if one["name"] == container and "terminated" in one["state"]]
        return found[0] if found else None

    found: Json = until(terminated, f"{container} has ended")
    return found


def its_own_end(status: Json, code: int) -> None:
    terminated = status["state"]["terminated"]
    assert terminated["exitCode"] == code, status
    assert status["restartCount"] == 0


def ran_once(movers: Movers, source: Source, target: Json) -> None:
    """No count was left out, and none was written at two times or on both nodes."""
    lines = movers.logs(target["metadata"]["name"])
    assert [line.split()[0] for line in lines] == [str(number) for number in range(len(lines))]
    assert lines[: len(source.lines())] == source.lines()
    assert len(lines) > len(source.lines()), "it wrote a last line on the target"


def marks(how: str, mode: str) -> list[pytest.MarkDecorator]:
    return [] if (how, mode) in SHORT else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("how", "mode"), [pytest.param(how, mode, marks=marks(how, mode)) for how in ENDS for mode in MODES]
)
def test_a_job_that_ends_as_soon_as_it_is_resumed(clean: Movers, how: str, mode: str) -> None:
    name = f"brief-{how}-{mode}"
    manifest = pod(name, BRIEF)
    (main,) = manifest["spec"]["containers"]
    main["command"] += [how, f"runs-as-{name}"]
    main["resources"] = {"limits": {"memory": "96Mi"}}
    here = clean.create(manifest)
    source = Source(clean, here)
    target = move(clean, here, mode, name)
    status = ended(clean, target)
    its_own_end(status, ENDS[how])
    ran_once(clean, source, target)


@pytest.mark.parametrize(
    "mode", [pytest.param("stop", marks=pytest.mark.slow), "live", pytest.param("postcopy", marks=pytest.mark.slow)]
)
def test_one_of_two_containers_ends_as_soon_as_it_is_resumed(clean: Movers, mode: str) -> None:
    name = f"brief-one-{mode}"
    manifest = pod(name, BRIEF)
    manifest["spec"]["containers"][0]["command"] += ["3", f"runs-as-{name}"]
    manifest["spec"]["containers"].append(also(COUNT))
    here = clean.create(manifest)
    source = Source(clean, here)
    target = move(clean, here, mode, name)
    status = ended(clean, target)
    its_own_end(status, 3)
    ran_once(clean, source, target)
    before = len(clean.logs(target["metadata"]["name"], "other"))
    until(lambda: len(clean.logs(target["metadata"]["name"], "other")) > before + 3, "the other one goes on")
    lines = clean.logs(target["metadata"]["name"], "other")
    assert lines == [str(number) for number in range(len(lines))]

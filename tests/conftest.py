"""Labs for tests: one for the session, tests that run inside its node, and what this machine can do.

A module marked `node` is an ordinary pytest module. Collected on the host it runs inside a node of the session's lab, with
the node's own Python, and its reports come back one by one, as pytest-xdist brings those of its workers. Where it is marked
`kernel(RELEASE)` too, it runs in an emulated machine with the kernel of that Debian release, and `kernel(RELEASE, "arm64")` on such
a processor.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import emulated
import inside_node
import pytest
from chance import SEED
from hypothesis import HealthCheck, settings

from podferry.errors import PodferryError
from podferry.lab import Lab, cgroups, containers, inside, list_labs, root_images, site
from podferry.lab.progress import phases
from podferry.lab.state import CACHE, INSIDE

pytest.register_assert_rewrite("contracts")
settings.register_profile("podferry", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("podferry")  # a busy machine is no failure

CHECKOUT = Path(__file__).parents[1]
IN_NODE = "/opt/podferry/checkout"
DEVELOPMENT = "/opt/podferry/dev"
ROOT = os.geteuid() == 0
TIERS = {"unit", "node", "lab", "cluster", "machine"}
"""The markers of which each test has one."""
TESTS_NODE = "node-a"
NODE_SECONDS = 1800.0
"""For a module; inside_node.py has the limit of one test."""
MACHINE_SECONDS = 1200.0
MACHINE_TEST_SECONDS = 80.0
"""The same in an emulated machine, where all tests are slow ones: these have five times as much."""

PYTEST_INSIDE = ["python3", "-m", "pytest", "-p", "no:cacheprovider", "--no-header"]
INSIDE_ENVIRONMENT = {
    INSIDE: "1",
    "PYTHONPATH": f"/opt/podferry/src:/opt/podferry/site:{DEVELOPMENT}",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
}

LAB = pytest.StashKey["SessionLab"]()
OUTCOMES = pytest.StashKey[dict[str, list[pytest.TestReport]]]()


class SessionLab:
    """The session's lab: brought up for the first test that needs it, with two nodes and links of 1 Gbit/s."""

    def __init__(self) -> None:
        self._lab: Lab | None = None

    def get(self) -> Lab:
        """The lab, up."""
        if self._lab is None:
            lab = Lab(f"test-{os.getpid()}")
            tell = phases(print)
            packages = site.development(root_images.node_root(tell), tell)
            self._lab = lab
            lab.up(2, "1gbit", binds={IN_NODE: CHECKOUT, DEVELOPMENT: packages}, progress=tell)
            containers.pull(lab, TESTS_NODE, root_images.JOB_IMAGE)
        return self._lab

    def down(self) -> None:
        """Take it down, if it was ever needed."""
        if self._lab is not None:
            self._lab.down()


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Lab:
    """The session's lab."""
    return request.config.stash[LAB].get()


@pytest.fixture
def node(lab: Lab) -> str:
    """The name of a node of the session's lab."""
    return TESTS_NODE


@pytest.fixture
def own_lab() -> Iterator[Lab]:
    """A lab of the test's own, not up yet, taken down afterwards whatever happens."""
    lab = Lab(f"test-{os.getpid()}-own")
    yield lab
    lab.down()


# -- the session --------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LAB] = SessionLab()
    config.stash[OUTCOMES] = {}
    if inside_node.REPORTS in os.environ:
        config.pluginmanager.register(inside_node)


def pytest_sessionstart() -> None:
    sweep()


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[LAB].down()
    sweep()


def sweep() -> None:
    """Take down the labs of test runs that were aborted; of pytest-xdist's processes the first one does it."""
    if not ROOT or inside() or "PYTEST_XDIST_WORKER" in os.environ:
        return
    for name in list_labs():
        if (match := re.fullmatch(r"test-(\d+)(-.*)?", name)) and not Path("/proc", match[1]).exists():
            Lab(name).down(print)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ROOT:
        return
    skip = pytest.mark.skip(reason="needs root: a lab is made of namespaces, mounts and cgroups")
    for item in items:
        if any(item.get_closest_marker(tier) for tier in TIERS - {"unit"}):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many seconds the tests of each tier took."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                for tier in report.keywords.keys() & TIERS:
                    seconds[tier] = seconds.get(tier, 0.0) + report.duration
    if seconds:
        told = ", ".join(f"{tier} {taken:.0f} s" for tier, taken in sorted(seconds.items(), key=lambda one: -one[1]))
        terminalreporter.write_line(f"time of the tests, by tier: {told}")


# -- tests inside a node ------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if inside() or not ROOT or not item.get_closest_marker("node"):
        return None
    outcomes = item.config.stash[OUTCOMES]
    if item.nodeid not in outcomes:
        outcomes.update(run_in_node(item))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in outcomes[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def run_in_node(item: pytest.Item) -> dict[str, list[pytest.TestReport]]:
    """Run the node tests of the item's module, as far as they were selected, and return the reports of each."""
    module = {one.nodeid: one for one in item.session.items if one.path == item.path and one.get_closest_marker("node")}
    kernel = item.get_closest_marker("kernel")
    attempt = in_machine(*kernel.args) if kernel else in_lab(item)
    try:
        return inside_node.from_node(item.config, module, attempt)
    except emulated.Lacking as lacking:
        where = (
            str(item.path),
            0,
            f"Skipped: no machine with the kernel of {kernel and ' '.join(kernel.args)}: {lacking}",
        )
        return {
            name: [pytest.TestReport(name, one.location, {}, "skipped", where, "setup")] for name, one in module.items()
        }


def in_lab(item: pytest.Item) -> inside_node.Side:
    """Runs tests of the item's module in a node of the session's lab."""
    reports, output = (Path(f"/tmp/{item.path.stem}.{kind}") for kind in ("jsonl", "out"))
    environment = {**INSIDE_ENVIRONMENT, inside_node.REPORTS: str(reports)}
    # Into a file: what a run that was killed leaves behind would hold a pipe open.
    pytest_inside = f'exec {shlex.join(PYTEST_INSIDE)} "$@" > {output} 2>&1'
    deadline = time.monotonic() + NODE_SECONDS

    def attempt(tests: Sequence[str]) -> tuple[str, str]:
        seconds = deadline - time.monotonic()
        if seconds < 1:
            return f"{item.path.name} as a whole took more than {NODE_SECONDS:g} s", ""
        argv = ["timeout", "--signal=KILL", f"{seconds:.0f}", "sh", "-c", pytest_inside, "sh", *tests]
        try:
            lab = item.config.stash[LAB].get()
            files = [lab.root(TESTS_NODE) / path.relative_to("/") for path in (output, reports)]
            for path in files:
                path.unlink(missing_ok=True)
            done = lab.exec(TESTS_NODE, argv, check=False, env=environment, cwd=IN_NODE, timeout=seconds + 60)
            said, written = (path.read_text(errors="replace") if path.exists() else "" for path in files)
            return f"{said}\n{done.stderr}", written
        except (PodferryError, OSError) as error:
            return error.report() if isinstance(error, PodferryError) else str(error), ""

    return attempt


def in_machine(suite: str, processor: str = "amd64") -> inside_node.Side:
    """Runs tests in an emulated machine with the kernel of a Debian release, booted each time."""
    environment = {
        **INSIDE_ENVIRONMENT,
        inside_node.REPORTS: emulated.BOARDS[processor].reports,
        inside_node.SECONDS: f"{MACHINE_TEST_SECONDS:g}",
    }
    deadline = time.monotonic() + MACHINE_SECONDS

    def attempt(tests: Sequence[str]) -> tuple[str, str]:
        seconds = deadline - time.monotonic()
        if seconds < 1:
            return f"the module as a whole took more than {MACHINE_SECONDS:g} s", ""
        argv = [*PYTEST_INSIDE, "--color=no", *tests]
        return emulated.attempt(suite, processor, CHECKOUT, argv, environment, seconds)

    return attempt


# -- what this machine can do -------------------------------------------------------------------------------------


def pytest_report_header() -> list[str]:
    filesystems = Path("/proc/filesystems").read_text().split()
    facts = {
        "root": ROOT,
        "userfaultfd": Path("/proc/sys/vm/unprivileged_userfaultfd").exists(),
        "soft-dirty": has_soft_dirty(),
        "overlay": "overlay" in filesystems,
        "fuse": "fuse" in filesystems and Path("/dev/fuse").exists(),
    }
    can = ", ".join(f"{'' if there else 'no '}{name}" for name, there in facts.items())
    mode = cgroups.native_mode(cgroups.hierarchies())
    return [
        f"seed: {SEED} (PODFERRY_SEED)",
        f"machine: kernel {os.uname().release}, cgroup {mode}, {can}; node image: {criu_of_image()}",
    ]


def has_soft_dirty() -> bool:
    """Whether the kernel keeps the soft-dirty bit (pagemap bit 55, Documentation/admin-guide/mm/soft-dirty.rst)."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[0] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(address // mmap.PAGESIZE * 8)
        entry = int.from_bytes(pagemap.read(8), "little")
    return bool(entry >> 55 & 1)


def criu_of_image() -> str:
    """The version of CRIU that nodes have, as far as their image is built."""
    for status in CACHE.glob("node-*/var/lib/dpkg/status"):
        if match := re.search(r"^Package: criu$.*?^Version: (\S+)$", status.read_text(), re.MULTILINE | re.DOTALL):
            return f"CRIU {match[1]}"
    return "not built yet"

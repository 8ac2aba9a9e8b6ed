"""What the README promises, on whole stock machines: everything is done through their shells and checked from outside.

test_stock_lab.py is what `make test` has of this; here is what takes hours.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

import pytest
from emulated import Lacking
from stock import USER, Stock, booted, built
from stock_lab import AT, CHECKOUT, CONFINED, PATIENCE, RESTRICTED, StockLab, load_profile, traces

from podferry.lab.debian import NEXT_SUITE, SUITE

pytestmark = [pytest.mark.machine, pytest.mark.slow]
SUITES = [SUITE, "bookworm", NEXT_SUITE]
DEMO = "--memory 64 --steps 900"


@pytest.fixture(scope="module", params=SUITES)
def machine(request: pytest.FixtureRequest) -> Iterator[Stock]:
    """A stock machine with the checkout of the moment, and whatever a user has done on it so far."""
    try:
        built(request.param)
    except Lacking as lacking:
        pytest.skip(f"no stock machine: {lacking}")
    with booted(request.param) as stock:
        stock.environment = stock.configure_clients()
        stock.check_out(CHECKOUT, AT)
        yield stock


@pytest.fixture(scope="module")
def lab(machine: Stock) -> StockLab:
    """The machine with a lab, the image of jobs and AppArmor's profile of containers."""
    machine.run(f"[ -x {AT}/.venv/bin/podferry ] || make -C {AT} setup", timeout=PATIENCE * 2)
    machine.run(f"ln -sf {AT}/.venv/bin/podferry /usr/local/bin/podferry")
    load_profile(machine)
    lab = StockLab(machine)
    lab.up()
    lab.start("first")
    return lab


def test_the_first_command_of_the_readme(machine: Stock) -> None:
    """By a user who may become root, in their own session (user.slice)."""
    before = traces(machine)
    done = machine.run(f"cd {AT} && sudo -E make demo DEMO={shlex.quote(DEMO)}", user=USER, timeout=4800.0, check=False)
    said = done.stdout + done.stderr
    print(said[-4000:])
    assert done.returncode == 0
    assert "equal" in said
    assert "different" not in said
    after = traces(machine)
    assert {what: after[what] ^ there for what, there in before.items() if after[what] != there} == {}


def test_a_job_of_another_user_goes_there_and_back(lab: StockLab) -> None:
    """Ten times: test_stock_moves.py."""
    lab.start("restricted", [*RESTRICTED, CONFINED])
    lab.goes_there_and_back("restricted")
    lab.podferry("lab", "stop", "restricted")


def test_a_job_without_a_cpu_controller_moves_and_check_says_so(lab: StockLab) -> None:
    lab.start("job")
    assert not json.loads(lab.podferry("check", "job", "--to", "node-b", "--json"))["warnings"]
    lab.in_node("node-a", "echo -cpu > /sys/fs/cgroup/default/cgroup.subtree_control")
    [told] = json.loads(lab.podferry("check", "job", "--to", "node-b", "--json"))["warnings"]
    assert "no cpu controller" in told
    lab.goes_there_and_back("job")


def test_nothing_is_left_of_the_lab(lab: StockLab) -> None:
    lab.podferry("lab", "down")
    left = traces(lab.machine)
    assert (left["cgroups"], left["labs"], left["processes"]) == (set(), set(), set())


def test_in_a_container_its_processes_make_room(machine: Stock) -> None:
    """A cgroup namespace of its own, as containers have: the lab is in its cgroup, which had processes and passed on nothing."""
    script = f"""
        umount -R /sys/fs/cgroup
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
        mkdir -p /var/lib/inner/cache
        mount --bind /var/lib/podferry/cache /var/lib/inner/cache
        export PODFERRY_STATE=/var/lib/inner
        {AT}/.venv/bin/podferry lab up --lab inner --nodes 1
        {AT}/.venv/bin/podferry lab exec --lab inner node-a -- cat /sys/fs/cgroup/cgroup.controllers
        {AT}/.venv/bin/podferry lab exec --lab inner node-a -- ls /sys/fs/cgroup
        {AT}/.venv/bin/podferry lab down --lab inner
        [ -s /sys/fs/cgroup/cgroup.procs ] && [ ! -s /sys/fs/cgroup/cgroup.subtree_control ] && echo as before
    """
    container = (
        f"systemd-run --quiet --wait --pipe -p Delegate=yes unshare --cgroup --mount sh -euxc {shlex.quote(script)}"
    )
    done = machine.run(container, timeout=PATIENCE * 2)
    assert done.stdout.endswith("as before\n")
    assert {"cpu", "memory", "pids"} <= set(done.stdout.split()), done.stdout + done.stderr
    assert "moving its processes to podferry-others" in done.stderr

"""The lab on a stock Debian 13, and jobs that move there: part of `make test`.

The machine that tests usually run on is no such machine: it has no systemd, no controllers of cgroup v2, no AppArmor and not all
capabilities. Here are a boot, a lab and a handful of moves; test_stock.py has the rest, for hours.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stock import Stock
from stock_lab import CONFINED, PROFILE, RESTRICTED, StockLab, load_profile, provide, stock_machine, traces

from podferry.lab.debian import SUITE

pytestmark = pytest.mark.machine


@pytest.fixture(scope="module")
def machine() -> Iterator[Stock]:
    with stock_machine(SUITE) as stock:
        provide(stock)
        yield stock


@pytest.fixture(scope="module")
def before(machine: Stock) -> dict[str, set[str]]:
    """The machine before there was a lab."""
    return traces(machine)


@pytest.fixture(scope="module")
def lab(machine: Stock, before: dict[str, set[str]]) -> StockLab:
    lab = StockLab(machine)
    lab.up()
    return lab


def test_the_machine_is_what_distributions_are(machine: Stock) -> None:
    """Else the tests below would show nothing."""
    said = machine.run(
        "cat /proc/1/comm; stat -f -c %T /sys/fs/cgroup; cat /sys/fs/cgroup/cgroup.controllers; "
        "cat /sys/module/apparmor/parameters/enabled; grep CapBnd /proc/self/status"
    ).stdout.splitlines()
    assert said[:2] == ["systemd", "cgroup2fs"]
    assert {"cpu", "memory", "pids"} <= set(said[2].split())
    assert said[3] == "Y"
    assert int(said[4].split()[1], 16) >> 24 & 1, "CAP_SYS_RESOURCE, without which no job of another user can be dumped"


def test_the_lab_comes_up_with_the_controllers_of_cgroup_v2(lab: StockLab) -> None:
    for node in lab.nodes:
        said = lab.in_node(node, "cat /sys/fs/cgroup/cgroup.subtree_control; cat /proc/1/cgroup")
        assert {"cpu", "memory", "pids"} <= set(said.split())


def test_a_job_of_root_goes_there_and_back(lab: StockLab) -> None:
    lab.start("root")
    lab.goes_there_and_back("root")


def test_a_job_of_another_user_without_capabilities_goes_there_and_back_under_apparmor(lab: StockLab) -> None:
    """What most pods are, in all its parts at once."""
    load_profile(lab.machine)
    lab.start("restricted", [*RESTRICTED, CONFINED])
    has = lab.rights("node-a", "restricted")
    assert has["Uid"].split()[0] == "1000"
    assert [int(has[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [0, 0, 0]
    assert (has["NoNewPrivs"], has["Seccomp"], has["profile"]) == ("1", "2", f"{PROFILE} (enforce)")
    lab.goes_there_and_back("restricted")


def test_nothing_is_left_of_the_lab(lab: StockLab, before: dict[str, set[str]]) -> None:
    lab.podferry("lab", "down")
    assert traces(lab.machine) == before

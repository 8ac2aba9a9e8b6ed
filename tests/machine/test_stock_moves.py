"""Many moves on a stock Debian 13 of what most pods are: of another user, without capabilities, under AppArmor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stock_lab import CONFINED, RESTRICTED, StockLab, load_profile, provide, stock_machine, warm

from podferry.lab.debian import SUITE
from podferry.lab.root_images import JOB_IMAGE

pytestmark = [pytest.mark.machine, pytest.mark.slow]


@pytest.fixture(scope="module")
def lab() -> Iterator[StockLab]:
    with stock_machine(SUITE) as machine:
        provide(machine)
        load_profile(machine)
        lab = StockLab(machine, warm(machine))
        lab.up()
        lab.fetch(JOB_IMAGE)
        yield lab


def test_a_job_of_another_user_goes_there_and_back_ten_times(lab: StockLab) -> None:
    lab.start("often", [*RESTRICTED, CONFINED])
    lab.goes_there_and_back("often", times=10)
    lab.podferry("lab", "stop", "often")

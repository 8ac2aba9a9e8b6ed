"""What a lab derives from its name and from what it is asked for, without touching anything."""

from __future__ import annotations

import json
import threading
import tomllib
from pathlib import Path

import pytest

from podferry.errors import UsageError
from podferry.lab import machine_config, network, progress, state
from podferry.workload.config import load

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ["default", "a", "test-123-own", "0", "a" * 32])
def test_names_that_labs_may_have(name: str) -> None:
    assert state.check_name(name) == name


@pytest.mark.parametrize("name", ["", "A", "a.b", "../x", "-a", "a-", "a" * 33, "a\n", "a b", "ä"])
def test_names_that_could_not_be_a_cgroups_or_a_paths(name: str) -> None:
    with pytest.raises(UsageError):
        state.check_name(name)


@pytest.mark.parametrize("count", [0, -1, 27])
def test_a_lab_has_1_to_26_nodes(count: int) -> None:
    with pytest.raises(UsageError):
        state.node_names(count)


def test_every_machine_has_an_address_of_its_own_in_the_labs_own_range() -> None:
    nodes = state.node_names(26)
    addresses = state.addresses("default", nodes)
    assert list(addresses) == ["storage", *nodes]
    assert len(set(addresses.values())) == 27
    assert all(address.startswith(state.subnet("default") + ".") for address in addresses.values())
    assert state.subnet("default") == state.subnet("default") != state.subnet("other")


@pytest.mark.parametrize(
    ("rate", "bits"),
    [("1gbit", 10**9), ("250mbit", 250 * 10**6), ("2.5gbit", 2_500_000_000), ("64kbit", 64000), ("none", None)],
)
def test_rates(rate: str, bits: int | None) -> None:
    assert network.bits_per_second(rate) == bits


@pytest.mark.parametrize("rate", ["", "1", "1gb", "gbit", "-1mbit", "1 gbit", "1gbit; reboot"])
def test_what_is_no_rate(rate: str) -> None:
    with pytest.raises(UsageError, match="no rate"):
        network.bits_per_second(rate)


def test_a_burst_lets_the_largest_packet_pass_at_any_rate() -> None:
    assert network.burst(64000) >= 65536
    assert network.burst(10**9) == 500_000


def test_the_agent_can_read_the_configuration_that_it_is_given(tmp_path: Path) -> None:
    addresses = state.addresses("default", ["node-a", "node-b", "node-c"])
    files = machine_config.for_machine("default", "node-b", addresses)
    assert machine_config.write(files, tmp_path)
    read = load(tmp_path / "agent.json")
    assert read.node == "node-b"
    assert read.listen == f"{addresses['node-b']}:7460"
    assert set(read.peers) == {"node-a", "node-c"}
    assert not machine_config.write(files, tmp_path), "written again though nothing changed"
    assert machine_config.write({"agent.json": json.dumps({})}, tmp_path)


def test_containerd_2_is_configured_in_its_own_format() -> None:
    addresses = state.addresses("default", ["node-a"])
    one, two = (
        machine_config.for_machine("default", "node-a", addresses, major)["containerd.toml"] for major in (1, 2)
    )
    assert (tomllib.loads(one)["version"], tomllib.loads(two)["version"]) == (2, 3)


def test_the_storage_node_gets_no_agent() -> None:
    files = machine_config.for_machine("default", "storage", state.addresses("default", ["node-a"]))
    assert "brick.vol" in files
    assert "agent.json" not in files


def test_containerd_2_has_other_names_for_the_same() -> None:
    one, two = machine_config.containerd(1), machine_config.containerd(2)
    assert "version = 2\n" in one
    assert "io.containerd.grpc.v1.cri" in one
    assert "version = 3\n" in two
    assert "io.containerd.grpc.v1.cri" not in two


def test_a_lock_keeps_others_out_and_goes_with_its_last_holder(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", 0, 0

    def visit() -> None:
        nonlocal inside, most
        for _ in range(50):
            with state.locked(path):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not path.exists()


def test_a_log_gets_one_line_for_each_phase() -> None:
    lines: list[str] = []
    tell = progress.phases(lines.append)
    first = ["i: [1/2] a · 1 of 9", "i: [1/2] a · 2 of 9", "i: [1/2] b"]
    steps = ["n: starting", *first, "i: [2/2] a", "j: [2/2] a · 3 %", "i: [1/2] a · 9 of 9", "n: ready", "n: ready"]
    for step in steps:
        tell(step)
    assert lines == ["n: starting", "i: [1/2] a", "i: [2/2] a", "j: [2/2] a", "n: ready", "n: ready"]

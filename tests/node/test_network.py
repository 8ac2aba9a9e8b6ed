"""Network namespaces looked at and made like others, in namespaces of the test's own."""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from podferry.node import netlink, network_namespace
from podferry.node.netns import in_network_of
from podferry.node.network_namespace import DEFAULT, Network

pytestmark = pytest.mark.node


@pytest.fixture
def pid() -> Iterator[int]:
    """A process in a new network namespace, in which nothing is up."""
    with subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as process:
        while Path(f"/proc/{process.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            pass
        yield process.pid
        process.kill()


def test_a_new_namespace_differs_in_nothing_but_loopback(pid: int) -> None:
    assert network_namespace.read(pid) == Network(up=False)
    network_namespace.make(DEFAULT, pid)
    assert network_namespace.read(pid) == DEFAULT


def test_what_was_set_is_seen_and_made_again(pid: int) -> None:
    wanted = Network(
        mtu=1400,
        addresses=("10.7.0.5/32", "fd00::7/128"),
        settings={"ipv4/ip_unprivileged_port_start": "80", "ipv4/conf/lo/rp_filter": "2", "core/somaxconn": "77"},
    )
    network_namespace.make(wanted, pid)
    seen = network_namespace.read(pid)
    assert seen == wanted


def test_settings_that_this_kernel_has_not_are_left_out(pid: int) -> None:
    network_namespace.make(Network(settings={"ipv4/there_is_none": "1", "core/somaxconn": "78"}), pid)
    assert network_namespace.read(pid) == Network(settings={"core/somaxconn": "78"})


def test_interfaces_other_than_loopback_are_told_when_they_are_up(pid: int) -> None:
    run = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "link"]
    subprocess.run([*run, "add", "d0", "type", "veth"], check=True)
    assert network_namespace.interfaces(pid) == ()
    subprocess.run([*run, "set", "d0", "up"], check=True)
    assert network_namespace.interfaces(pid) == ("d0",)


def test_an_address_is_given_and_taken_twice_without_harm(pid: int) -> None:
    network_namespace.make(DEFAULT, pid)
    address = ipaddress.ip_interface("10.7.0.6/32")
    for _ in range(2):
        in_network_of(pid, lambda: netlink.add_address(address))
    assert network_namespace.read(pid).addresses == (str(address),)
    for _ in range(2):
        in_network_of(pid, lambda: netlink.remove_address(address))
    assert network_namespace.read(pid) == DEFAULT

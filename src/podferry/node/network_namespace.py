"""A container's network namespace as it is, and another one made like it.

runc has CRIU leave out the network namespace that it made for a container: a restored container gets a new one, in which loopback
is down and every setting is the kernel's default. So what the container had is looked at on the source, goes with the images, and
is made again on the target before the first instruction of the job (`network_setup`). A pod's namespace is its sandbox's: there the
network plugin makes it, on each node for itself.

What is looked at: whether loopback is up, its MTU, its further addresses, and the settings (/proc/sys/net) in which the namespace
differs from a new one of the same node. Settings that the target's kernel has not, or does not take, stay as they are there.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from podferry.errors import PeerMisbehaved
from podferry.node import netlink
from podferry.node.netns import (
    IFF_UP,
    in_network_at,
    in_network_of,
    in_new_network,
    interface_flags,
    interface_request,
    loopback_up,
    on_node,
)

IMAGE = "network.json"
"""Its name among CRIU's images."""
SETTINGS = Path("/proc/sys/net")
LARGEST = 1 << 20
SIOCGIFMTU, SIOCSIFMTU = 0x8921, 0x8922
_LOCAL = frozenset({"127.0.0.1/8", "::1/128"})
"""What loopback has once it is up."""
_SECRETIVE = {"ipv4/conf/all/arp_ignore": "1", "ipv4/conf/all/arp_announce": "2"}
"""So that other interfaces neither answer for addresses of loopback nor use them to ask for others."""
_NAME = re.compile(r"(core|ipv4|ipv6|mptcp|netfilter|sctp|unix|vsock)(/[A-Za-z0-9_-]{1,64}){1,6}")
_VALUE = re.compile(r"[\x20-\x7e\t]{0,1024}")
_PASSING = re.compile(
    r"netfilter/nf_conntrack_count|ipv6/conf/[^/]+/mtu|ipv4/tcp_mem|ipv4/udp_mem|.*/(flush|stable_secret)"
)
"""Settings that change by themselves or with others, are the whole node's, or do something when they are written."""


@dataclass(frozen=True)
class Network:
    """What a container's own network namespace is like. `settings` are by their path below /proc/sys/net."""

    up: bool = True
    mtu: int = 65536
    addresses: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """As it travels."""
        told = {"up": self.up, "mtu": self.mtu, "addresses": self.addresses, "settings": dict(self.settings)}
        return json.dumps(told).encode()

    @staticmethod
    def decode(data: bytes) -> Network:
        """What a peer sent. Raises `PeerMisbehaved` for anything else."""
        try:
            told = json.loads(data[: LARGEST + 1])
            addresses = [str(ipaddress.ip_interface(one)) for one in told["addresses"]]
            settings = {str(name): str(value) for name, value in told["settings"].items()}
            network = Network(told["up"] is True, int(told["mtu"]), tuple(addresses), settings)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PeerMisbehaved.because("not a description of a network namespace", error) from error
        for name, value in settings.items():
            if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
                raise PeerMisbehaved("a network namespace has a setting that there is not", why=f"{name}"[:80])
        return network


DEFAULT = Network()


def read(pid: int) -> Network:
    """The network namespace of process `pid`. Raises `Failed` where it has ended, and `OSError`."""
    here, new = in_network_of(pid, _here), in_new_network(_here)
    settings = {name: value for name, value in here.settings.items() if new.settings.get(name, value) != value}
    return Network(here.up, here.mtu, here.addresses, settings)


def interfaces(pid: int) -> tuple[str, ...]:
    """The interfaces of a process' network namespace that are up, but loopback. Raises `Failed` and `OSError`."""
    return in_network_of(
        pid, lambda: tuple(name for _, name in socket.if_nameindex() if name != "lo" and interface_flags(name) & IFF_UP)
    )


def make(network: Network, pid: int) -> None:
    """Make the network namespace of process `pid` like this one. Raises `Failed` and `OSError`."""
    in_network_of(pid, lambda: _make(network))


def lend(path: str, images: Path) -> None:
    """Give loopback, in the network namespace that `path` names, the addresses that sockets in these images are bound to and no
    interface there has. Nobody else learns that it has them. Raises `Failed` and `OSError`."""
    described = images / IMAGE
    if path and described.exists():
        wanted = [ipaddress.ip_interface(one) for one in Network.decode(described.read_bytes()).addresses]
        in_network_at(on_node(path), lambda: _lend(wanted))


def _lend(wanted: list[netlink.Interface]) -> None:
    there = {one.ip for of_interface in netlink.addresses().values() for one in of_interface}
    if lacking := [one for one in wanted if one.ip not in there]:
        for name, value in _SECRETIVE.items():
            with suppress(OSError):
                (SETTINGS / name).write_text(value)
        for one in lacking:
            netlink.add_address(one)


def _here() -> Network:
    found = [str(one) for one in netlink.addresses().get(netlink.LOOPBACK, [])]
    return Network(
        bool(interface_flags("lo") & IFF_UP),
        _mtu("lo"),
        tuple(one for one in found if one not in _LOCAL),
        dict(_settings()),
    )


def _make(network: Network) -> None:
    if _mtu("lo") != network.mtu:
        interface_request(SIOCSIFMTU, struct.pack("16si20x", b"lo", network.mtu))
    if network.up:
        loopback_up()
    for address in network.addresses:
        netlink.add_address(ipaddress.ip_interface(address))
    # What is set for all interfaces, and for those to come, is set for each as well: theirs comes after it.
    for name in sorted(network.settings, key=lambda name: (("/all/" not in name), ("/default/" not in name), name)):
        with suppress(OSError):
            (SETTINGS / name).write_text(network.settings[name] + "\n")


def _settings() -> dict[str, str]:
    found = {}
    for directory, _, names in os.walk(SETTINGS):
        for name in names:
            path = os.path.join(directory, name)  # noqa: PTH118 - a thousand of them, while a job may be waiting
            relative = path.removeprefix(f"{SETTINGS}/")
            if not _PASSING.fullmatch(relative):
                with suppress(OSError, ValueError), open(path) as file:  # noqa: PTH123
                    found[relative] = file.read().removesuffix("\n")
    return {name: value for name, value in found.items() if _NAME.fullmatch(name) and _VALUE.fullmatch(value)}


def _mtu(name: str) -> int:
    return int(struct.unpack_from("16xi", interface_request(SIOCGIFMTU, struct.pack("16s24x", name.encode())))[0])

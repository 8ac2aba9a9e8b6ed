"""The lab's network: a bridge in a namespace of its own, and a link of a set rate to every machine.

Both ends of a link send through a token bucket (tc-tbf), so the rate holds in both directions. The machine that runs
the lab never sees an interface of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from podferry.errors import UsageError
from podferry.node.process import Completed, run

BRIDGE = "lab"
UNLIMITED = "none"
LATENCY = "50ms"
"""The longest a packet may wait for its turn before it is dropped."""

_RATE = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)bit")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}
_FORWARDING, _DISABLED = 3, 0
"""States of a bridge's port (BR_STATE_* of linux/if_bridge.h)."""


@dataclass(frozen=True)
class Port:
    """A machine's place on the bridge: its name, its address, and the id of its first process."""

    name: str
    address: str
    pid: int

    @property
    def interface(self) -> str:
        """The end of the link that is on the bridge; the other is the machine's eth0."""
        return self.name


def bits_per_second(rate: str) -> int | None:
    """A rate such as 1gbit or 250mbit in bit/s; None for `none`. Raises `UsageError`."""
    if rate == UNLIMITED:
        return None
    if not (match := _RATE.fullmatch(rate)):
        raise UsageError(f"{rate!r} is no rate", remedy="use a number with kbit, mbit or gbit (1gbit), or none")
    return int(float(match[1]) * _UNITS[match[2]])


def burst(bits: int) -> int:
    """Bytes a link may send at once: 4 ms of its rate, but at least two of the largest packets that TCP hands down."""
    return max(bits // 8 // 250, 2 * 65536)


def make_bridge(switch: int) -> None:
    """Make the bridge in the namespace of `switch`, if it is not there."""
    if _ip(switch, ["link", "show", BRIDGE], check=False).returncode:
        _batch(switch, ["link set lo up", f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up"])


def connect(switch: int, port: Port, rate: str) -> None:
    """Join a machine to the bridge, if it is not, and set its link's rate."""
    if _ip(port.pid, ["link", "show", "eth0"], check=False).returncode:
        # What a machine that was killed leaves on the bridge goes when the kernel gets to it; we do not wait.
        _ip(switch, ["link", "delete", port.interface], check=False)
        _batch(
            switch,
            [
                f"link add {port.interface} type veth peer name eth0 netns {port.pid}",
                f"link set {port.interface} master {BRIDGE} up",
            ],
        )
        _batch(port.pid, ["link set lo up", f"address add {port.address}/24 dev eth0", "link set eth0 up"])
    for pid, interface in ((switch, port.interface), (port.pid, "eth0")):
        _shape(pid, interface, rate)


def add_address(pid: int, address: str) -> None:
    """Give a machine one more address, such as 10.0.0.1/32."""
    _batch(pid, [f"address replace {address} dev lo"])


def set_routes(pid: int, routes: Mapping[str, str]) -> None:
    """Route networks by way of machines on the bridge."""
    _batch(pid, [f"route replace {network} via {gateway}" for network, gateway in routes.items()])


def set_cut(switch: int, name: str, *, cut: bool) -> None:
    """Take a machine's packets in both directions, without a word to either side, or let them pass again."""
    state = _DISABLED if cut else _FORWARDING
    run([*_in_network_of(switch), "bridge", "link", "set", "dev", name, "state", str(state)], remedy=_REMEDY)


def cut_off(switch: int) -> set[str]:
    """The machines that `set_cut` cut off."""
    ports = json.loads(run([*_in_network_of(switch), "bridge", "-json", "link", "show"], remedy=_REMEDY).stdout)
    return {str(port["ifname"]) for port in ports if port["state"] == "disabled"}


def _shape(pid: int, interface: str, rate: str) -> None:
    bits = bits_per_second(rate)
    if bits is None:
        _tc(pid, ["qdisc", "delete", "dev", interface, "root"], check=False)
        return
    bucket = ["tbf", "rate", f"{bits}bit", "burst", str(burst(bits)), "latency", LATENCY]
    _tc(pid, ["qdisc", "replace", "dev", interface, "root", *bucket])


def _batch(pid: int, lines: list[str]) -> None:
    run([*_in_network_of(pid), "ip", "-batch", "-"], input="\n".join(lines) + "\n", remedy=_REMEDY)


def _ip(pid: int, words: list[str], *, check: bool = True) -> Completed:
    return run([*_in_network_of(pid), "ip", *words], check=check, remedy=_REMEDY)


def _tc(pid: int, words: list[str], *, check: bool = True) -> Completed:
    return run([*_in_network_of(pid), "tc", *words], check=check, remedy=_REMEDY)


def _in_network_of(pid: int) -> list[str]:
    return ["nsenter", f"--target={pid}", "--net", "--"]


PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "bridge": "iproute2"}
"""What this machine needs for links, and the packages that have it."""

_REMEDY = "the lab needs iproute2, and a kernel with veth, bridge and sch_tbf"

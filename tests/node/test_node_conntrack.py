"""The kernel's connection tracking, asked for who is behind a Service. Each test has a network namespace of its own, in which it
writes down a connection as a Service's translation leaves it there."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest

from podferry.core.connections import TCP, UDP, End
from podferry.node import conntrack, netlink
from podferry.node.conntrack import Translations, real_peer
from podferry.node.netns import in_new_network

pytestmark = pytest.mark.node

NEW = 1 << 8 | 0  # IPCTNL_MSG_CT_NEW
TIMEOUT, TCP_STATE, STATUS = 7, 1, 3  # CTA_TIMEOUT, CTA_PROTOINFO_TCP_STATE, CTA_STATUS
ESTABLISHED, CONFIRMED = 3, 1 << 3 | 1 << 1
FAMILIES = [("10.0.0.5", "10.96.0.7", "10.0.1.9"), ("fd00::5", "fd00:96::7", "fd00:1::9")]


def end(host: str, port: int) -> End:
    return End(ipaddress.ip_address(host), port)


def track(protocol: str, original: tuple[End, End], reply: tuple[End, End]) -> None:
    family = socket.AF_INET if original[0].address.version == 4 else socket.AF_INET6
    body = struct.pack("=BBH", family, 0, 0)
    body += netlink.nest(conntrack._ORIGINAL, *conntrack._tuple(protocol, *original))
    body += netlink.nest(conntrack._REPLY, *conntrack._tuple(protocol, *reply))
    body += netlink.attribute(TIMEOUT, struct.pack(">I", 600)) + netlink.attribute(STATUS, struct.pack(">I", CONFIRMED))
    if protocol == TCP:
        body += netlink.nest(4, netlink.nest(1, netlink.attribute(TCP_STATE, bytes([ESTABLISHED]))))
    flags = netlink.REQUEST | netlink.ACK | netlink.CREATE | netlink.EXCL
    netlink.send(netlink.NETFILTER, netlink.message(NEW, flags, body))


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize(("pod", "service", "backend"), FAMILIES)
def test_who_is_behind_a_service(protocol: str, pod: str, service: str, backend: str) -> None:
    here, there, really = end(pod, 40000), end(service, 80), end(backend, 8080)

    def look() -> tuple[End | None, End | None]:
        track(protocol, (here, there), (really, here))
        return real_peer(protocol, here, there), real_peer(protocol, end(pod, 40001), there)

    assert in_new_network(look) == (really, None)


@pytest.mark.parametrize(("pod", "node", "client"), FAMILIES)
def test_who_has_called_through_the_nodes_own_address(pod: str, node: str, client: str) -> None:
    """Masquerading: the pod sees the node's address."""
    here, seen, really = end(pod, 8080), end(node, 61000), end(client, 40000)

    def look() -> End | None:
        track(TCP, (really, end(node, 30080)), (here, seen))
        return real_peer(TCP, here, seen)

    assert in_new_network(look) == really


def test_where_nothing_is_translated_nobody_else_is_told() -> None:
    here, there = end("10.0.0.5", 40000), end("10.0.1.9", 80)

    def look() -> tuple[End | None, End | None]:
        track(TCP, (here, there), (there, here))
        return real_peer(TCP, here, there), real_peer(TCP, there, here)

    assert in_new_network(look) == (None, None)


def test_a_process_that_is_gone_has_no_translations() -> None:
    assert Translations(2**22 + 1).backend(TCP, end("10.0.0.5", 1), end("10.0.1.9", 2)) is None

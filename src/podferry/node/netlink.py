"""The kernel's netlink sockets, as far as network namespaces are looked at and arranged by them: requests, answers, attributes.

Formats: linux/netlink.h, linux/rtnetlink.h. A socket is of the network namespace of the thread that makes it (`netns`).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

ROUTE = socket.NETLINK_ROUTE
NETFILTER = 12  # NETLINK_NETFILTER
NLMSG_ERROR, NLMSG_DONE = 2, 3
REQUEST, MULTI, ACK, DUMP, CREATE, EXCL = 0x1, 0x2, 0x4, 0x300, 0x400, 0x200  # NLM_F_*
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFA_F_NODAD = 0x02
RT_SCOPE_HOST = 254
LOOPBACK = 1
"""Loopback is the first interface of every network namespace."""
_HEADER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
_LARGEST, _USUAL = 1 << 16, 1 << 15
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_NESTED = 0x8000

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def nest(kind: int, *inner: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | _NESTED, b"".join(inner))


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in `data`, by their kind without its flags."""
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def message(kind: int, flags: int, payload: bytes, sequence: int = 1) -> bytes:
    """A message, whole."""
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, sequence, 0) + payload


def ask(family: int, kind: int, payload: bytes) -> Iterator[tuple[int, bytes]]:
    """Ask for a list: the kind and payload of each of its messages. Raises `OSError`."""
    with _socket(family) as kernel:
        kernel.send(message(kind, REQUEST | DUMP, payload))
        while True:
            for answered, _, body in _messages(kernel.recv(_LARGEST)):
                if answered == NLMSG_DONE:
                    return
                if answered == NLMSG_ERROR:
                    _raise(body)
                yield answered, body


def get(family: int, kind: int, payload: bytes) -> bytes | None:
    """Ask for one thing: its payload, or None where it is not there. Raises `OSError`."""
    with _socket(family) as kernel:
        kernel.send(message(kind, REQUEST, payload))
        for answered, _, body in _messages(kernel.recv(_LARGEST)):
            if answered != NLMSG_ERROR:
                return body
            try:
                _raise(body)
            except FileNotFoundError:
                return None
    return None


def send(family: int, *messages: bytes) -> None:
    """Send messages in one batch; each that asks for it (ACK) is waited for. Raises the first `OSError`."""
    awaited = sum(bool(_HEADER.unpack_from(one)[2] & ACK) for one in messages)
    batch = b"".join(messages)
    with _socket(family) as kernel:
        if len(batch) > _USUAL:
            kernel.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * len(batch))
        kernel.send(batch)
        while awaited:
            for answered, _, body in _messages(kernel.recv(_LARGEST)):
                if answered == NLMSG_ERROR:
                    _raise(body)
                    awaited -= 1


def addresses() -> dict[int, list[Interface]]:
    """The addresses of each interface, by its number, in the network namespace of this thread."""
    found: dict[int, list[Interface]] = {}
    for kind, body in ask(ROUTE, RTM_GETADDR, bytes(8)):
        if kind == RTM_NEWADDR and len(body) >= 8:
            family, prefix, _, _, index = struct.unpack_from("=BBBBI", body)
            told = attributes(body[8:])
            packed = told.get(IFA_LOCAL) or told.get(IFA_ADDRESS)
            if packed and family in (socket.AF_INET, socket.AF_INET6):
                found.setdefault(index, []).append(ipaddress.ip_interface((packed, prefix)))
    return found


def add_address(address: Interface, index: int = LOOPBACK) -> None:
    """Give an interface an address; one that it has is as good. No other node hears of it. Raises `OSError`."""
    try:
        send(ROUTE, _of_address(RTM_NEWADDR, REQUEST | ACK | CREATE | EXCL, address, index))
    except FileExistsError:
        return


def remove_address(address: Interface, index: int = LOOPBACK) -> None:
    """Take an address from an interface; one that it has not is as good. Raises `OSError`."""
    try:
        send(ROUTE, _of_address(RTM_DELADDR, REQUEST | ACK, address, index))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise


def _of_address(kind: int, flags: int, address: Interface, index: int) -> bytes:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    head = struct.pack("=BBBBI", family, address.network.prefixlen, IFA_F_NODAD, RT_SCOPE_HOST, index)
    packed = address.ip.packed
    return message(kind, flags, head + attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed))


def _socket(family: int) -> socket.socket:
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
    kernel.bind((0, 0))
    return kernel


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, flags, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _raise(body: bytes) -> None:
    """The error of an answer; none where it says that all went well."""
    (number,) = struct.unpack_from("=i", body)
    if number:
        raise OSError(-number, os.strerror(-number))

"""Run a function in another network namespace without moving the program there: in a thread that ends with it.

Sockets and processes that it starts stay in that namespace; the rest of the program does not notice.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from podferry.errors import Failed
from podferry.fs.libc import checked, libc
from podferry.node import outside

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

Result = TypeVar("Result")


def in_new_network(function: Callable[[], Result]) -> Result:
    """Call `function` in a network namespace of its own, in which only loopback is up. Needs CAP_SYS_ADMIN."""

    def enter() -> None:
        _check(libc.unshare(CLONE_NEWNET), "make a network namespace")
        loopback_up()

    return _in_thread(enter, function)


def in_network_of(pid: int, function: Callable[[], Result]) -> Result:
    """Call `function` in the network namespace of process `pid`. Raises `Failed` when it has ended."""

    return in_network_at(Path(f"/proc/{pid}/ns/net"), function, f"process {pid}")


def in_network_at(path: Path, function: Callable[[], Result], whose: str = "") -> Result:
    """Call `function` in the network namespace that `path` names. Raises `Failed` where it does not."""

    def enter() -> None:
        try:
            namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Failed.because(f"cannot enter the network of {whose or path}", error) from error
        try:
            _check(libc.setns(namespace, CLONE_NEWNET), f"enter the network of {whose or path}")
        finally:
            os.close(namespace)

    return _in_thread(enter, function)


def on_node(path: str) -> Path:
    """The network namespace that a spec names by this path, as this process reaches it."""
    return Path(path) if path.startswith("/proc/") else outside.root() / path.lstrip("/")


def is_own(spec: Mapping[str, Any]) -> bool:
    """Whether runc makes a network namespace for a container of this OCI spec, which otherwise shares or joins one."""
    return "" in _named(spec)


def joined(spec: Mapping[str, Any]) -> str:
    """The network namespace that a container of this OCI spec joins; empty where it gets its own."""
    return next(filter(None, _named(spec)), "")


def interface_request(what: int, request: bytes) -> bytes:
    """A request of netdevice(7) about an interface of the namespace that this thread is in: `struct ifreq`. Raises `OSError`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        return fcntl.ioctl(control, what, request)


def interface_flags(name: str) -> int:
    """An interface's flags, IFF_UP among them. Raises `OSError`."""
    return int(struct.unpack_from("16xH", interface_request(SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0)))[0])


def loopback_up() -> None:
    """Bring loopback up. Raises `OSError`."""
    interface_request(SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", interface_flags("lo") | IFF_UP))


def _named(spec: Mapping[str, Any]) -> list[str]:
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    return [str(one.get("path") or "") for one in namespaces if one.get("type") == "network"]


def _in_thread(enter: Callable[[], None], function: Callable[[], Result]) -> Result:
    results: list[Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            enter()
            results.append(function())
        except BaseException as error:  # noqa: BLE001  it is raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _check(result: int, doing: str) -> None:
    try:
        checked(result)
    except OSError as error:
        raise Failed.because(f"cannot {doing}", error, remedy="run the agent as root") from error

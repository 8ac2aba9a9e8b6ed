"""Run a function in another network namespace without moving the program there: in a thread that ends with it.

Sockets and processes that it starts stay in that namespace; the rest of the program does not notice.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from podferry.errors import Failed
from podferry.node import outside

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

Result = TypeVar("Result")

_libc = ctypes.CDLL(None, use_errno=True)


def in_new_network(function: Callable[[], Result]) -> Result:
    """Call `function` in a network namespace of its own, in which only loopback is up. Needs CAP_SYS_ADMIN."""

    def enter() -> None:
        _check(_libc.unshare(CLONE_NEWNET), "make a network namespace")
        _loopback_up()

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
            _check(_libc.setns(namespace, CLONE_NEWNET), f"enter the network of {whose or path}")
        finally:
            os.close(namespace)

    return _in_thread(enter, function)


def on_node(path: str) -> Path:
    """The network namespace that a spec names by this path, as this process reaches it."""
    return Path(path) if path.startswith("/proc/") else outside.root() / path.lstrip("/")


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


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack_from("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _check(result: int, doing: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise Failed.because(f"cannot {doing}", OSError(number, os.strerror(number)), remedy="run the agent as root")

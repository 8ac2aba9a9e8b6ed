"""The sockets that processes have open, by protocol, and what CRIU can make of them on this kernel."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from podferry.core.preflight import SOCKETS

INTERNET = frozenset({"TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6", "PING", "PINGv6"})
OTHERS = frozenset({"UNIX", "UNIX-STREAM", "NETLINK", "PACKET"})
"""What CRIU saves (`can_dump_ipproto` in its criu/sk-inet.c, and criu/sockets.c), as the kernel names it (`struct proto`)."""


def protocols(pids: Iterable[int]) -> set[str]:
    """The protocols of the sockets that these processes have open. What ends or vanishes meanwhile is left out."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    found.add(os.getxattr(descriptor, "system.sockprotoname").rstrip(b"\0").decode(errors="replace"))
    return found


def unsaved_sockets(pids: Iterable[int]) -> Iterable[str]:
    """Of the sockets that these processes have open what CRIU may not be able to save, as `ContainerFacts.unsaved` names it."""
    there = protocols(pids)
    for protocol in sorted(there - INTERNET - OTHERS):
        yield f"{protocol} socket"
    if there & INTERNET and not credentials_may_be_asked():
        yield SOCKETS


@cache
def credentials_may_be_asked() -> bool:
    """Whether internet sockets have SO_PASSCRED, as they had before Linux 6.16. CRIU up to 4.1 asks for it, and fails without."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError:
            return False
        return True

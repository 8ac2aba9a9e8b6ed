"""What a figure depends on: the machine, and the versions of everything that took part."""

from __future__ import annotations

import os
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import podferry
from podferry.bench.moves import SOURCE
from podferry.lab import Lab
from podferry.node.process import run

COPIED = 256 << 20

_VERSION = re.compile(r"\d+\.\d+[\w.~+-]*")


def describe(lab: Lab) -> dict[str, Any]:
    """Processor, memory, kernel; CRIU, runc and containerd in the lab's nodes; podferry and its commit."""
    versions = {name: _version(lab.exec(SOURCE, [name, "--version"]).stdout) for name in ("criu", "runc", "containerd")}
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "memory_bytes": pages * page,
        "memcpy_bytes_per_second": memcpy_rate(),
        "kernel": os.uname().release,
        **versions,
        "podferry": podferry.__version__,
        "commit": commit(),
    }


@cache
def memcpy_rate() -> float:
    """Bytes a second at which one thread copies into new memory: the fastest of three."""
    source = bytearray(COPIED)
    source[::4096] = b"\1" * (COPIED // 4096)  # else all of it is the one page of zeros
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        copy = bytes(source)
        rates.append(len(copy) / (time.perf_counter() - began))
        del copy
    return round(max(rates))


def _version(said: str) -> str:
    found = _VERSION.search(said)
    return found[0] if found else "unknown"


@cache
def _cpu() -> str:
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^(?:model name|CPU implementer)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else os.uname().machine


@cache
def commit() -> str:
    """The commit that podferry was started from, with a `+` where files differ from it; nothing outside a checkout."""
    package = Path(podferry.__file__).parent
    head = run(["git", "-C", package, "rev-parse", "--short", "HEAD"], check=False)
    if head.returncode:
        return ""
    changed = run(["git", "-C", package, "status", "--porcelain", "--", package], check=False).stdout
    return head.stdout.strip() + "+" * bool(changed)

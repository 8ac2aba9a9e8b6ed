"""A thread's memory policy, as /proc/PID/numa_maps names it, and as set_mempolicy(2) takes it."""

from __future__ import annotations

import re

DEFAULT = "default"
MOST_NODES = 1024
"""As many as the kernel may be built for."""
_LINE = re.compile(r"[0-9a-f]+ ((?:prefer \(many\)|weighted interleave|\w+)(?:=[a-z|]+)?(?::[0-9,-]+)?) ")
_POLICY = re.compile(r"(prefer \(many\)|weighted interleave|\w+)(?:=([a-z|]+))?(?::([0-9,-]+))?")
_MODES = {DEFAULT: 0, "prefer": 1, "bind": 2, "interleave": 3, "local": 4, "prefer (many)": 5, "weighted interleave": 6}
_FLAGS = {"static": 1 << 15, "relative": 1 << 14, "balancing": 1 << 13}


def told(line: str) -> str:
    """The policy that a line of numa_maps names; empty where it names none. The first mapping, the program's, has its thread's."""
    found = _LINE.match(line)
    return found[1] if found else ""


def arguments(policy: str) -> tuple[int, int]:
    """Mode with flags, and the nodes as bits, for set_mempolicy(2). Raises `ValueError`."""
    found = _POLICY.fullmatch(policy)
    if not found or found[1] not in _MODES:
        raise ValueError(f"no memory policy: {policy[:64]!r}")
    mode, mask = _MODES[found[1]], 0
    for flag in filter(None, (found[2] or "").split("|")):
        if flag not in _FLAGS:
            raise ValueError(f"no flag of a memory policy: {flag[:64]!r}")
        mode |= _FLAGS[flag]
    for part in filter(None, (found[3] or "").split(",")):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not low <= high < MOST_NODES:
            raise ValueError(f"no such nodes: {policy[:64]!r}")
        mask |= (1 << high + 1) - (1 << low)
    return mode, mask

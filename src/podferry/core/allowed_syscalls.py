"""The system calls that the seccomp profile of an OCI spec allows: the bound for the filters in CRIU's images.

The meaning of a profile is runc's (libcontainer/seccomp) and libseccomp's: a rule whose name a processor does not know does
nothing, conditions on two different arguments hold together, two on the same one are two rules. Where rules contradict each other,
the one that permits more counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from podferry.core.syscall_numbers import X32_BIT, numbers
from podferry.errors import Refused

KILL_PROCESS, KILL_THREAD, TRAP, ERRNO = -0x80000000, 0, 0x30000, 0x50000
NOTIFY, TRACE, LOG, ALLOW = 0x7FC00000, 0x7FF00000, 0x7FFC0000, 0x7FFF0000
"""Actions of linux/seccomp.h as signed numbers: the kernel lets the smallest of several filters win, so more permits more."""

ACTIONS = {
    "SCMP_ACT_KILL": KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": KILL_PROCESS,
    "SCMP_ACT_TRAP": TRAP,
    "SCMP_ACT_ERRNO": ERRNO,
    "SCMP_ACT_NOTIFY": NOTIFY,
    "SCMP_ACT_TRACE": TRACE,
    "SCMP_ACT_LOG": LOG,
    "SCMP_ACT_ALLOW": ALLOW,
}

EQUAL, NOT_EQUAL, BELOW, AT_MOST, ABOVE, AT_LEAST = "EQ", "NE", "LT", "LE", "GT", "GE"
_MASKED = "MASKED_EQ"
OPERATORS = {f"SCMP_CMP_{one}": one for one in (EQUAL, NOT_EQUAL, BELOW, AT_MOST, ABOVE, AT_LEAST, _MASKED)}
_ALL_BITS = (1 << 64) - 1

AUDIT_X86_64, AUDIT_I386, AUDIT_AARCH64, AUDIT_ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028
_TOKENS = {
    "SCMP_ARCH_X86_64": (AUDIT_X86_64, "x86_64"),
    "SCMP_ARCH_X86": (AUDIT_I386, "x86"),
    "SCMP_ARCH_X32": (AUDIT_X86_64, "x32"),
    "SCMP_ARCH_AARCH64": (AUDIT_AARCH64, "aarch64"),
    "SCMP_ARCH_ARM": (AUDIT_ARM, "arm"),
}
MACHINES = {
    "x86_64": ("SCMP_ARCH_X86_64", (AUDIT_X86_64, AUDIT_I386)),
    "aarch64": ("SCMP_ARCH_AARCH64", (AUDIT_AARCH64, AUDIT_ARM)),
}
"""A machine's own architecture, and what its kernel tells a filter of a caller's: no other value reaches one there."""

# Old calls of 32-bit x86 with one number for many; libseccomp adds a rule for that one too, where the
# first argument says which is meant.
_MANY_IN_ONE = {
    "socketcall": (
        *("socket", "bind", "connect", "listen", "accept", "getsockname", "getpeername", "socketpair", "send", "recv"),
        *(
            "sendto",
            "recvfrom",
            "shutdown",
            "setsockopt",
            "getsockopt",
            "sendmsg",
            "recvmsg",
            "accept4",
            "recvmmsg",
            "sendmmsg",
        ),
    ),
    "ipc": (
        *("semop", "semget", "semctl", "semtimedop", "", "", "", "", "", "", "msgsnd", "msgrcv", "msgget", "msgctl"),
        *("", "", "", "", "", "", "shmat", "shmdt", "shmget", "shmctl"),
    ),
}


@dataclass(frozen=True)
class ArgumentCondition:
    """The value that one argument must have behind a mask."""

    argument: int
    operator: str
    value: int
    mask: int = _ALL_BITS


@dataclass(frozen=True)
class Rule:
    """The action of a rule whose conditions all hold."""

    action: int
    conditions: tuple[ArgumentCondition, ...] = ()


@dataclass(frozen=True, eq=False)
class Profile:
    """A profile on one machine: for every value of `arch` and every number the rules, and what happens where none fits."""

    default: int
    rules: Mapping[tuple[int, int], tuple[Rule, ...]]
    spoken: frozenset[tuple[int, bool]]
    """The values of `arch` that it has rules for, and whether these are x32's. All other calls fail."""
    architectures: tuple[int, ...]
    """The values of `arch` that the machine's kernel knows."""
    numbers: Mapping[int, tuple[int, ...]]
    """Of each of these, the numbers that have rules, in order."""

    def default_of(self, arch: int, number: int) -> int:
        """The action for a call without a rule."""
        x32 = arch == AUDIT_X86_64 and bool(number & X32_BIT)
        return self.default if (arch, x32) in self.spoken else ERRNO

    def is_narrow(self, arch: int, number: int) -> bool:
        """Whether only the lower 32 bits of an argument count."""
        return arch in (AUDIT_I386, AUDIT_ARM) or (arch == AUDIT_X86_64 and bool(number & X32_BIT))


def profile_of(seccomp: Mapping[str, Any] | None, machine: str) -> Profile | None:
    """The profile in an OCI spec of this node's own, for a machine as uname(2) names it; None where nothing is filtered.

    Equal profiles are one object. Raises `Refused` on a machine of which it is not known what a profile means.
    """
    seccomp = seccomp or {}
    if not seccomp.get("defaultAction") and not seccomp.get("syscalls"):
        return None
    return _profile(json.dumps(seccomp, sort_keys=True), machine)


@lru_cache(maxsize=16)
def _profile(text: str, machine: str) -> Profile:
    seccomp = json.loads(text)
    if machine not in MACHINES:
        raise Refused(
            f"what a seccomp profile means on {machine} is not known", remedy="move between amd64 or arm64 nodes"
        )
    default = ACTIONS.get(seccomp.get("defaultAction") or "", KILL_PROCESS)
    native, architectures = MACHINES[machine]
    named = {native, *(seccomp.get("architectures") or [])}
    spoken = [_TOKENS[one] for one in sorted(named) if one in _TOKENS and _TOKENS[one][0] in architectures]
    rules: dict[tuple[int, int], tuple[Rule, ...]] = {}
    for entry in seccomp.get("syscalls") or []:
        action = ACTIONS.get(entry.get("action") or "", KILL_PROCESS)
        if action == default:
            continue
        for alternative in _alternatives(entry.get("args") or []):
            for name in entry.get("names") or []:
                for token, table in spoken:
                    for number, conditions in _calls(name, table, alternative):
                        rules[token, number] = (*rules.get((token, number), ()), Rule(action, conditions))
    return Profile(
        default,
        rules,
        frozenset((token, table == "x32") for token, table in spoken),
        architectures,
        {arch: tuple(sorted(number for token, number in rules if token == arch)) for arch in architectures},
    )


def _alternatives(arguments: list[Mapping[str, Any]]) -> list[tuple[ArgumentCondition, ...]]:
    conditions = [_condition(one) for one in arguments]
    if len({one.argument for one in conditions}) < len(conditions):
        return [(one,) for one in conditions]
    return [tuple(conditions)]


def _condition(argument: Mapping[str, Any]) -> ArgumentCondition:
    operator, place = OPERATORS.get(argument.get("op") or "", ""), argument.get("index") or 0
    value, second = argument.get("value") or 0, argument.get("valueTwo") or 0
    if operator == _MASKED:
        return ArgumentCondition(place, EQUAL, second & value, value)  # libseccomp drops what the mask hides
    return ArgumentCondition(place, operator, value)


def _calls(
    name: str, table: str, conditions: tuple[ArgumentCondition, ...]
) -> list[tuple[int, tuple[ArgumentCondition, ...]]]:
    found = numbers(table)
    bit = X32_BIT if table == "x32" else 0
    calls = [(found[name] | bit, conditions)] if name in found else []
    if table == "x86":
        others = tuple(one for one in conditions if one.argument != 0)
        calls += [
            (found[call], (ArgumentCondition(0, EQUAL, many.index(name) + 1), *others))
            for call, many in _MANY_IN_ONE.items()
            if name and name in many
        ]
    return calls

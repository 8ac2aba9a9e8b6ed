"""Taking the inventory of a job that stands still (`podferry.core.inventory`), and putting right what CRIU has not restored.

CRIU saves neither the processors that a thread may run on, nor its I/O priority, timer slack, or scheduler attributes beyond
policy, priority and nice value, nor what a process wants in its core dumps. All of these can be set from outside. Seen with 4.1.1
and 4.2.

Processors are compared as what the job has chosen: a thread that may run wherever its cgroup lets it, has chosen nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from podferry.core import mempolicy
from podferry.core.inventory import OOM_SCORE, Attributes, Inventory, may_be_given
from podferry.fs.libc import system_call
from podferry.node import descriptors

ANYWHERE = "anywhere"
THEIRS = ("memory-policy", "personality")
"""Attributes that only a thread itself can set."""
MOST = 20_000
"""Threads and descriptors of a job that are looked at while it stands still: 20 to 55 us each, three times."""
_NUMBERS = {  # ioprio_set, ioprio_get, sched_setattr, sched_getattr
    "x86_64": (251, 252, 314, 315),
    "aarch64": (30, 31, 274, 275),
}
_IOPRIO_WHO_PROCESS = 1
_ATTR = struct.Struct("=IIQiIQQQII")  # struct sched_attr, linux/sched/types.h, its version of 56 bytes
_WITHOUT_RUNTIME = (os.SCHED_OTHER, os.SCHED_BATCH)
_OF_A_THREAD = frozenset(
    {"Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Speculation_Store_Bypass", "SpeculationIndirectBranch"}
    | {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"}
    | {"THP_enabled", "VmLck", "VmData", "VmStk", "x86_Thread_features", "x86_Thread_features_locked"}
)


def take(init: int, pids: Iterable[int], cpuset: frozenset[int]) -> Inventory:
    """The inventory of the processes `pids` of the container whose first process is `init`; its cgroup lets them run on `cpuset`.

    What ends meanwhile is left out, as are processes that are not in the container, though in its cgroup: CRIU is, as it restores.
    """
    found: dict[str, Attributes] = {}
    for _, _, name, attributes in _threads(init, pids, cpuset):
        found[name] = attributes
    return found


def may_be_taken(pids: Iterable[int], most: int = MOST) -> bool:
    """Whether these processes have so few threads and descriptors that a job may stand still while they are looked at."""
    there = 0
    for pid in pids:
        with suppress(OSError):  # it has ended
            there += len(os.listdir(f"/proc/{pid}/task")) + len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - quick
        if there > most:
            return False
    return True


def cpuset(freezer: Path) -> frozenset[int]:
    """The processors that the cgroup lets its processes run on; where nobody says, those of this node. `freezer` is its freezer's
    directory, which on v2 is the cgroup itself."""
    v1 = Path(str(freezer).replace("/freezer/", "/cpuset/", 1)) / "cpuset.effective_cpus"
    for path in (freezer / "cpuset.cpus.effective", v1):
        with suppress(OSError, ValueError):
            if chosen := _numbers_of(path.read_text()):
                return chosen
    with suppress(OSError, ValueError):
        return _numbers_of(Path("/sys/devices/system/cpu/online").read_text())
    return frozenset(range(os.cpu_count() or 1))


def descendants(init: int) -> list[int]:
    """A container's processes by who started whom: all of a pid namespace's, wherever in nested groups they are."""
    found = [init]
    for pid in found:
        with suppress(OSError, ValueError):
            for tid in _listing(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{tid}/children").read_text().split())
    return found


class PutRight(NamedTuple):
    """How often a thread was given what it had, and what threads have not and they alone can set, when they run, by tid."""

    times: int
    left_to_them: dict[int, dict[str, str]]


def put_right(before: Inventory, init: int, pids: Iterable[int], cpuset: frozenset[int]) -> PutRight:
    """Give the threads of these processes what they had, as far as it can be given from outside and may be."""
    done, left = 0, dict[int, dict[str, str]]()
    for pid, tid, name, has in _threads(init, pids, cpuset):
        had = before.get(name, {})
        if lost := {one: had[one] for one in THEIRS if had.get(one) and had[one] != has.get(one, had[one])}:
            left[tid] = lost
        for attribute in filter(descriptors.may_be_set, had):
            value = has.get(attribute, "")
            with suppress(OSError, ValueError):
                if value != had[attribute]:
                    done += descriptors.give(pid, attribute, had[attribute], value)
        for attribute, give in _GIVE.items():
            value = had.get(attribute, "")
            with suppress(OSError, ValueError):
                if value and value != has.get(attribute) and may_be_given(attribute, value, has):
                    give(tid, value)
                    done += 1
    return PutRight(done, left)


def _threads(init: int, pids: Iterable[int], cpuset: frozenset[int]) -> Iterator[tuple[int, int, str, dict[str, str]]]:
    """pid, tid, the name inside the container, and what there is to be said of each thread."""
    try:
        depth = len(_status(f"/proc/{init}/status")["NSpid"].split())
    except (OSError, KeyError):
        return
    for pid in pids:
        with suppress(OSError, ValueError, KeyError, IndexError):
            for tid in _listing(f"/proc/{pid}/task"):
                name, attributes = _thread(pid, tid, depth, cpuset)
                yield pid, tid, name, attributes | _process(pid) if tid == pid else attributes


def _thread(pid: int, tid: int, depth: int, cpuset: frozenset[int]) -> tuple[str, dict[str, str]]:
    """The name of a thread in the pid namespace so deep below ours, and what there is to be said of it.

    Raises `OSError`, `KeyError` where it has ended, and `IndexError` where it is not in there.
    """
    status = _status(f"/proc/{pid}/task/{tid}/status")
    if status["State"].startswith("Z"):
        raise KeyError("it has ended: the source's cgroup does not list it")
    name = "/".join(status[field].split()[depth - 1] for field in ("NStgid", "NSpid"))
    attributes = {key: value for key, value in status.items() if key in _OF_A_THREAD}
    attributes["comm"] = status["Name"]
    for field in ("NSpgid", "NSsid"):
        attributes[field] = status[field].split()[depth - 1]
    allowed = os.sched_getaffinity(tid)
    attributes["affinity"] = ANYWHERE if allowed >= cpuset else _listed(allowed)
    with suppress(OSError):
        attributes["personality"] = descriptors.beginning(f"/proc/{pid}/task/{tid}/personality").decode().strip()
        # A small read makes the kernel look at one mapping's pages alone.
        line = descriptors.beginning(f"/proc/{pid}/task/{tid}/numa_maps", 80)
        attributes["memory-policy"] = mempolicy.told(line.decode(errors="replace"))
    for attribute, read in (("io-priority", _io_priority), ("scheduler", _scheduler), ("timer-slack", _timer_slack)):
        with suppress(OSError, KeyError):
            attributes[attribute] = read(tid)
    return name, attributes


def _process(pid: int) -> dict[str, str]:
    found = {}
    for name in (OOM_SCORE, "coredump_filter"):
        with suppress(OSError):
            found[name] = Path(f"/proc/{pid}/{name}").read_text().strip()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]:
            found[f"limit {line[:26].strip()}"] = " ".join(line[26:68].split())
    for name in ("cwd", "root", "exe"):
        with suppress(OSError):
            found[name] = descriptors.plain(str(Path(f"/proc/{pid}/{name}").readlink()))
    with suppress(OSError):
        found |= descriptors.take(pid)
    return found


def _status(path: str) -> dict[str, str]:
    text = descriptors.beginning(path).decode(errors="replace")
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _io_priority(tid: int) -> str:
    return str(system_call(_numbers()[1], _IOPRIO_WHO_PROCESS, tid))


def _scheduler(tid: int) -> str:
    buffer = ctypes.create_string_buffer(_ATTR.size)
    system_call(_numbers()[3], tid, buffer, _ATTR.size, 0)
    policy, flags, nice, priority, runtime, *rest = _ATTR.unpack(buffer.raw)[1:]
    if policy in _WITHOUT_RUNTIME:
        runtime = 0  # since 6.12 the slice, which each node sets by its number of processors unless the job did
    return " ".join(map(str, (policy, flags, nice, priority, runtime, *rest)))


def _timer_slack(tid: int) -> str:
    return descriptors.beginning(f"/proc/{tid}/timerslack_ns").decode().strip()


def _give_affinity(tid: int, value: str) -> None:
    if value != ANYWHERE:
        os.sched_setaffinity(tid, _numbers_of(value))


def _give_scheduler(tid: int, value: str) -> None:
    words = [int(word) for word in value.split()]
    system_call(_numbers()[2], tid, ctypes.create_string_buffer(_ATTR.pack(_ATTR.size, *words), _ATTR.size), 0)


_GIVE: Mapping[str, Callable[[int, str], object]] = {
    "affinity": _give_affinity,
    "scheduler": _give_scheduler,
    "io-priority": lambda tid, value: system_call(_numbers()[0], _IOPRIO_WHO_PROCESS, tid, int(value)),
    "timer-slack": lambda tid, value: Path(f"/proc/{tid}/timerslack_ns").write_text(value),
    "coredump_filter": lambda tid, value: Path(f"/proc/{tid}/coredump_filter").write_text(f"0x{value}"),
}


def _numbers() -> tuple[int, int, int, int]:
    return _NUMBERS[platform.machine()]


def _listing(directory: str) -> list[int]:
    return [int(one) for one in os.listdir(directory)]  # noqa: PTH208 - the names are all that is wanted, and this is quick


def _listed(cpus: Iterable[int]) -> str:
    return ",".join(map(str, sorted(cpus)))


def _numbers_of(text: str) -> frozenset[int]:
    """A list of the kernel's: `0-3,8`. Raises `ValueError`."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)

"""Handing the controllers of cgroup v2 down to machines, and giving them back when the last lab is down.

A cgroup of v2 that passes controllers on to those below it may hold no processes: the kernel says EBUSY, whichever of the two
is tried second (Documentation/admin-guide/cgroup-v2.rst, "No Internal Process Constraint"). Only the very root is exempt. systemd
passes on at the root what its own units need, which on a stock machine is `memory pids`; and in a container with a cgroup
namespace of its own, the container's processes sit where machines' cgroups are made.
"""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from podferry.errors import Refused
from podferry.lab.progress import Progress, quiet
from podferry.lab.state import STATE, locked

LEAF = "init"
"""Where a machine's own processes sit, since its cgroup passes controllers on."""
OTHERS = "podferry-others"
"""Where the processes of a container sit that a lab runs in, while it is up."""

WANTED = frozenset({"cpu", "cpuset", "hugetlb", "io", "memory", "pids"})
"""What containerd, runc and a kubelet set limits with."""

PROCS, CONTROLLERS, PASSED_ON = "cgroup.procs", "cgroup.controllers", "cgroup.subtree_control"
TRIES = 100

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_GIVEN = STATE / "controllers.given"
_LOCK = STATE / "controllers.lock"

_REMEDIES = {
    errno.EROFS: "mount it writable: a container needs --privileged for that, a systemd service ProtectControlGroups=no",
    errno.EACCES: "run it as the root of the machine, or of a container that owns its cgroup",
    errno.EPERM: "run it as the root of the machine, or of a container that owns its cgroup",
    errno.EBUSY: "a cgroup of v2 cannot both hold processes and pass controllers on: move its processes to one below it",
    errno.EAGAIN: "raise cgroup.max.depth and cgroup.max.descendants of the cgroups above",
    errno.EOPNOTSUPP: "the cgroup or one above it is threaded: start it from a cgroup whose cgroup.type is `domain`",
}


class CgroupUnusable(Refused):
    """The kernel does not let a lab use cgroups as it must."""

    code = "PF130"

    @classmethod
    def of(cls, what: str, path: Path, error: OSError) -> CgroupUnusable:
        """The error of one file: which, and what the kernel said."""
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        remedy = _REMEDIES.get(error.errno or 0, "")
        return cls(what, why=f"{path}: {error.strerror} ({name})", remedy=remedy)


def write(path: Path, text: str) -> None:
    """Write to a file of a cgroup. The kernel answers the write itself, so it is one call and not buffered."""
    with path.open("wb", buffering=0) as file:
        file.write(text.encode())


def read(path: Path) -> str:
    """What a file of a cgroup says; nothing where there is no such file."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def pass_on(directory: Path, wanted: frozenset[str]) -> dict[str, OSError]:
    """Hand the `wanted` controllers that a v2 cgroup has down to those below it.

    Returns what the kernel said of those that cannot be: one alone may fail, such as cpu, where a kernel with RT_GROUP_SCHED has
    realtime processes.
    """
    failed = {}
    for controller in sorted(set(read(directory / CONTROLLERS).split()) & wanted):
        try:
            write(directory / PASSED_ON, f"+{controller}")
        except OSError as error:
            failed[controller] = error
    return failed


def prepare(home: Path, progress: Progress = quiet) -> None:
    """Let machines whose cgroups are made in `home`, the top of a v2 tree, have controllers; `give_back` undoes it.

    Raises `CgroupUnusable` where processes are in the way that cannot be moved.
    """
    failed: dict[str, OSError] = {}
    with locked(_LOCK):
        wanted = set(read(home / CONTROLLERS).split()) & WANTED
        if missing := sorted(wanted - set(read(home / PASSED_ON).split())):
            record = _record() or _Record(str(home), _BOOT.read_text())
            moves = not is_root(home) and bool(read(home / PROCS).split())
            # Recorded first: what is done without a record is never undone.
            record.moved |= moves
            record.controllers = sorted({*record.controllers, *missing})
            _GIVEN.write_text(json.dumps(asdict(record)))
            if moves:
                progress(f"{home}: moving its processes to {OTHERS} below it, until the last lab is down")
                (home / OTHERS).mkdir(exist_ok=True)
                move_all(home, home / OTHERS)
            failed = pass_on(home, frozenset(missing))
            if done := sorted(set(missing) - set(failed)):
                progress(f"{home / PASSED_ON}: {' '.join(done)} added, until the last lab is down")
    for controller, error in failed.items():
        if error.errno == errno.EBUSY:
            raise CgroupUnusable.of(f"cannot pass the {controller} controller on to the lab", home / PASSED_ON, error)
        progress(f"warning: nodes have no {controller} controller: {home / PASSED_ON}: {error.strerror}")


def give_back() -> None:
    """Take back what `prepare` handed down, as far as nobody else uses it by now, and move processes to where they were."""
    with locked(_LOCK):
        record = _record()
        if record is None:
            return
        home = Path(record.home)
        for controller in record.controllers:
            with contextlib.suppress(OSError):  # EBUSY: another cgroup passes it on further
                write(home / PASSED_ON, f"-{controller}")
        if record.moved and not read(home / PASSED_ON).split():
            with contextlib.suppress(OSError, CgroupUnusable):
                move_all(home / OTHERS, home)
                (home / OTHERS).rmdir()
        _GIVEN.unlink()


def is_root(directory: Path) -> bool:
    """Whether a v2 cgroup is the root of all, which alone may hold processes and pass controllers on."""
    return not (directory / "cgroup.type").exists()


def move_all(source: Path, target: Path) -> None:
    """Move every process of one cgroup to another. Raises `CgroupUnusable`."""
    what = f"cannot empty the cgroup {source}, which is to pass controllers on"
    for _ in range(TRIES):  # what forks meanwhile is found the next time
        pids = read(source / PROCS).split()
        if not pids:
            return
        if "0" in pids:
            raise CgroupUnusable(
                what,
                why=f"{source / PROCS} lists processes of another process namespace (0)",
                remedy="start the lab where all processes of that cgroup can be seen",
            )
        for pid in pids:
            try:
                write(target / PROCS, pid)
            except ProcessLookupError:
                continue
            except OSError as error:
                raise CgroupUnusable.of(what, target / PROCS, error) from error
    raise CgroupUnusable(what, why="its processes multiply faster than they can be moved")


@dataclass
class _Record:
    """What was handed down: in which cgroup, since which start of the machine; and whether its processes had to move."""

    home: str
    boot: str
    controllers: list[str] = field(default_factory=list)
    moved: bool = False


def _record() -> _Record | None:
    """What was handed down since this machine has started; the record of an earlier start says nothing."""
    try:
        record = _Record(**json.loads(_GIVEN.read_text()))
    except FileNotFoundError:
        return None
    return record if record.boot == _BOOT.read_text() else None

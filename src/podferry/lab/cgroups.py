"""The cgroups of a lab's machines, and how every process of a lab is found again without a record of it.

A machine has one cgroup in every hierarchy, called `podferry.LAB.MACHINE`. The name is the mark: whatever runs in a lab
has it in its /proc/PID/cgroup, whoever started it and whatever became of its parents.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from podferry.errors import Failed, TimedOut
from podferry.fs.mountinfo import mounts
from podferry.lab import delegation
from podferry.lab.delegation import LEAF, PROCS, CgroupUnusable
from podferry.lab.progress import Progress, quiet

_MARK = re.compile(r"/podferry\.(?P<lab>[a-z0-9-]+)\.(?P<machine>[a-z0-9-]+)(?:/|$)")
PATIENCE = 20.0
"""Seconds until a process that was killed, or a cgroup that is empty, must be gone."""


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup hierarchy; `own` is the caller's own directory in it. `controllers` is empty for v2."""

    version: int
    mount: Path
    controllers: str
    own: Path

    @property
    def home(self) -> Path:
        """Where machines' cgroups are made.

        v1: below the caller, whose limits hold for the lab too. v2: at the top, since a cgroup with processes in it
        cannot pass controllers on.
        """
        return self.own if self.version == 1 else self.mount

    @property
    def option(self) -> str:
        """The mount option that gives this v1 hierarchy."""
        return f"none,{self.controllers}" if self.controllers.startswith("name=") else self.controllers


@dataclass(frozen=True)
class Marked:
    """A process of a lab: its id here, and whether it is the first of its machine's process namespace."""

    pid: int
    lab: str
    machine: str
    first: bool


def hierarchies() -> list[Hierarchy]:
    """The cgroup hierarchies that are mounted here, in the order of their mounts."""
    own = _memberships("self")
    found: dict[str, Hierarchy] = {}
    for one in mounts():
        if one.kind not in ("cgroup", "cgroup2"):
            continue
        key = "" if one.kind == "cgroup2" else _controllers(",".join(one.settings), own)
        if key is None or key not in own or key in found:
            continue
        here = Path(one.point) / os.path.relpath(own[key], one.root)
        if here.is_dir():
            found[key] = Hierarchy(2 if key == "" else 1, Path(one.point), key, here)
    return list(found.values())


def native_mode(mounted: list[Hierarchy]) -> str:
    """`v1` where controllers are mounted the old way, else `v2`."""
    return "v1" if any(h.version == 1 and not h.controllers.startswith("name=") for h in mounted) else "v2"


def prepare(progress: Progress = quiet) -> None:
    """See to it that machines get the controllers of v2, where it has any. `delegation.give_back` undoes it."""
    for hierarchy in hierarchies():
        if hierarchy.version == 2:
            delegation.prepare(hierarchy.home, progress)


def create(lab: str, machine: str, mounted: list[Hierarchy]) -> list[Path]:
    """Make the machine's cgroups, and on v2 the leaf below it. Returns their directories. Raises `CgroupUnusable`."""
    made = []
    for hierarchy in mounted:
        directory = hierarchy.home / f"podferry.{lab}.{machine}"
        try:
            directory.mkdir(exist_ok=True)
            if "cpuset" in hierarchy.controllers.split(","):
                for name in ("cpuset.cpus", "cpuset.mems"):  # empty in a new v1 cgroup, and nothing may enter it then
                    (directory / name).write_text((hierarchy.home / name).read_text())
            if hierarchy.version == 2:
                (directory / LEAF).mkdir(exist_ok=True)
        except OSError as error:
            raise CgroupUnusable.of("cannot make the cgroup of a machine", directory, error) from error
        made.append(directory)
    return made


def settle(pid: int, mounted: list[Hierarchy], made: list[Path], in_namespace: Callable[[], None]) -> None:
    """Move `pid` into a machine's new cgroups, `made` in those `mounted`; on v2 into its leaf, which then gets controllers.

    `in_namespace` has the process make its cgroup namespace, whose root is where it is at that moment: the machine's cgroup. Only
    once nothing is left there may that pass controllers on. Raises `CgroupUnusable`.
    """
    for directory in made:
        _join(pid, directory)
    in_namespace()
    for hierarchy, directory in zip(mounted, made, strict=True):
        if hierarchy.version == 2:
            _join(pid, directory / LEAF)
            delegation.prepare(hierarchy.home)  # systemd takes back what none of its units needs, until we pass it on
            for controller, error in delegation.pass_on(directory, delegation.WANTED).items():
                raise CgroupUnusable.of(
                    f"cannot pass the {controller} controller on inside a machine",
                    directory / delegation.PASSED_ON,
                    error,
                )


def _join(pid: int, directory: Path) -> None:
    try:
        delegation.write(directory / PROCS, str(pid))
    except OSError as error:
        raise CgroupUnusable.of("cannot move a machine's first process", directory / PROCS, error) from error


def directories_of(pid: int) -> list[Path]:
    """The cgroup directories that `pid` is in, for another process to join."""
    member = _memberships(str(pid))
    own = _memberships("self")
    return [
        h.own / os.path.relpath(member[h.controllers], own[h.controllers])
        for h in hierarchies()
        if h.controllers in member
    ]


def processes(lab: str | None = None, machine: str | None = None) -> list[Marked]:
    """The processes of one machine, of one lab, or of all labs."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            mark = _MARK.search(entry.joinpath("cgroup").read_text().replace("\n", "/"))
            if mark and lab in (None, mark["lab"]) and machine in (None, mark["machine"]):
                first = _is_first(entry.joinpath("status").read_text())
                found.append(Marked(int(entry.name), mark["lab"], mark["machine"], first))
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
    return found


def kill(lab: str, machine: str | None = None) -> None:
    """Kill every process of a lab, or of one machine, and wait until they are gone. Raises `TimedOut`."""
    deadline = time.monotonic() + PATIENCE
    me = os.getpid()
    while doomed := [one for one in processes(lab, machine) if one.pid != me]:
        with contextlib.ExitStack() as stack:
            handles = [handle for one in doomed if (handle := _open(one.pid)) is not None]
            for handle in handles:
                stack.callback(os.close, handle)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            _thaw(lab, machine)
            if not _wait(handles, deadline):
                raise TimedOut(
                    f"processes of lab {lab} outlive SIGKILL",
                    why=", ".join(f"{one.pid} ({one.machine})" for one in doomed),
                    remedy="look at /proc/PID/stack; then run `podferry lab down` again",
                )


def remove(lab: str, machine: str | None = None) -> None:
    """Remove the cgroups of a lab or of one machine, wherever they are. Raises `Failed` if one stays busy."""
    deadline = time.monotonic() + PATIENCE
    while left := list(_directories(lab, machine)):
        for top in left:
            for directory, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)  # noqa: PTH106
        if time.monotonic() > deadline:
            raise Failed(f"cannot remove the cgroups of lab {lab}", why=", ".join(map(str, left)))
        if any(top.exists() for top in left):
            time.sleep(0.01)  # the kernel lets go of a dead process's cgroup late and tells nobody on v1


def labs() -> set[str]:
    """The names of all labs that have processes."""
    return {one.lab for one in processes()}


def _directories(lab: str, machine: str | None) -> Iterator[Path]:
    wanted = re.compile(rf"podferry\.{re.escape(lab)}\.{re.escape(machine) if machine else '[a-z0-9-]+'}")
    for hierarchy in hierarchies():
        for directory, below, _ in os.walk(hierarchy.mount):
            mine = [name for name in below if wanted.fullmatch(name)]
            yield from (Path(directory) / name for name in mine)
            below[:] = [name for name in below if not name.startswith("podferry.")]


def _thaw(lab: str, machine: str | None) -> None:
    """A task in a frozen v1 cgroup dies of SIGKILL only once it is thawed."""
    for top in _directories(lab, machine):
        for directory, _, files in os.walk(top):
            if "freezer.state" in files:
                with contextlib.suppress(OSError):
                    Path(directory, "freezer.state").write_text("THAWED")


def _memberships(pid: str) -> dict[str, str]:
    """Controllers (as /proc/PID/cgroup lists them; empty for v2) and the cgroup's path in that hierarchy."""
    lines = Path("/proc", pid, "cgroup").read_text().splitlines()
    return {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}


def _controllers(options: str, known: dict[str, str]) -> str | None:
    words = set(options.split(","))
    return next((key for key in known if key and set(key.split(",")) <= words), None)


def _is_first(status: str) -> bool:
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return line.split()[2:] == ["1"]
    return False


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _wait(handles: list[int], deadline: float) -> bool:
    """True once every process of `handles` has ended; its first ends a namespace only after all in it."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    left = set(handles)
    while left and (rest := deadline - time.monotonic()) > 0:
        for handle, _ in poll.poll(rest * 1000):
            poll.unregister(handle)
            left.discard(handle)
    return not left

"""A container's control groups: who is in it, freezing it, giving it less CPU, what memory it uses.

Works on cgroup v1, on v2, and on hybrid hosts, where v1 controllers stand beside a v2 tree without any. Which tree holds
a controller is asked for each controller; the container's own directories come from runc, which made them, so that a
container whose processes moved into nested groups is still taken as a whole: freezing and quotas are hierarchical.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from podferry.core.facts import CgroupKind
from podferry.errors import Failed, PeerMisbehaved, Refused, TimedOut
from podferry.fs.mountinfo import mounts_in
from podferry.node.members import killed

FREEZE_TIMEOUT = 10.0  # seconds
V1_FIRST_POLL, V1_LAST_POLL = 0.0002, 0.005  # seconds between looks at a v1 freezer, which has no event
DEFAULT_PERIOD = 100_000  # microseconds, the kernel's


class CgroupFailed(Failed):
    """A control group did not do what was asked, or has gone with its container."""

    code = "PF240"


class Frozen(StrEnum):
    """The state of a freezer."""

    THAWED = "thawed"
    FREEZING = "freezing"
    FROZEN = "frozen"


@dataclass(frozen=True)
class CpuQuota:
    """CPU time, in microseconds, that a group may use in each period; `None` is no limit."""

    quota: int | None = None
    period: int = DEFAULT_PERIOD

    def scaled(self, share: float, used: float) -> CpuQuota:
        """`share` (0 to 1) of what a group uses, `used` processors, as far as this quota lets it. The kernel takes no less
        than 1 ms."""
        whole = used * self.period
        if self.quota is not None:
            whole = min(whole, self.quota)
        return CpuQuota(max(1000, int(whole * share)), self.period)

    def to_dict(self) -> dict[str, Any]:
        """The quota as the journal holds it."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> CpuQuota:
        """The inverse of `to_dict`."""
        quota = data["quota"]
        return CpuQuota(None if quota is None else int(quota), int(data["period"]))


@dataclass(frozen=True)
class CgroupTree:
    """One mounted cgroup tree; `controllers` is empty for v2."""

    mountpoint: Path
    root: str
    controllers: frozenset[str]


def trees(mountinfo: Path = Path("/proc/self/mountinfo")) -> tuple[CgroupTree, ...]:
    """The cgroup trees that the caller sees mounted."""
    return tuple(
        CgroupTree(Path(one.point), one.root, frozenset(one.settings if one.kind == "cgroup" else ()))
        for one in mounts_in(mountinfo)
        if one.kind in ("cgroup", "cgroup2")
    )


def cgroup_kind() -> CgroupKind:
    """v1, v2 or both."""
    found = trees()
    v1 = any({"freezer", "memory", "cpu"} & tree.controllers for tree in found)
    v2 = any(not tree.controllers for tree in found)
    if v1 and v2:
        return CgroupKind.HYBRID
    return CgroupKind.V1 if v1 else CgroupKind.V2


@dataclass(frozen=True)
class Cgroup:
    """A container's directories: `freezer`, and `cpu` and `memory` where these controllers are there."""

    freezer: Path
    cpu: Path | None = None
    memory: Path | None = None
    V1_STATES: ClassVar = {"THAWED": Frozen.THAWED, "FREEZING": Frozen.FREEZING, "FROZEN": Frozen.FROZEN}

    @staticmethod
    def of_container(runc_root: Path, id: str) -> Cgroup:
        """The groups of container `id`, from the state that runc keeps in `runc_root`."""
        try:
            paths = json.loads((runc_root / id / "state.json").read_text())["cgroup_paths"]
        except (OSError, ValueError, KeyError) as error:
            raise CgroupFailed.because(f"runc has no state of container {id}", error) from error
        return Cgroup.from_paths({name: Path(path) for name, path in paths.items() if path})

    @staticmethod
    def of(pid: int) -> Cgroup:
        """The groups that hold process `pid`, seen through the caller's mounts and cgroup namespace.

        Raises `Refused` where the caller does not see them.
        """
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        except OSError as error:
            raise CgroupFailed.because(f"process {pid} is gone", error) from error
        paths: dict[str, Path] = {}
        mounted = trees()
        for line in lines:
            _, names, path = line.split(":", 2)
            controllers = frozenset(names.split(",")) if names else frozenset[str]()
            for tree in mounted:
                if tree.controllers >= controllers and bool(tree.controllers) == bool(controllers):
                    relative = os.path.relpath(path, tree.root)
                    if not relative.startswith(".."):
                        paths.update(dict.fromkeys(controllers or {""}, tree.mountpoint / relative))
        return Cgroup.from_paths(paths)

    @staticmethod
    def from_paths(paths: dict[str, Path]) -> Cgroup:
        """From directories by controller; the v2 directory is named by the empty string."""
        v2 = paths.get("")
        freezer = paths.get("freezer", v2)
        if freezer is None:
            raise Refused(
                "the container's freezer cannot be seen",
                why="no cgroup tree with a freezer is mounted, or the container is outside of this cgroup namespace",
                remedy="mount the node's /sys/fs/cgroup where the agent runs",
            )
        return Cgroup(freezer, paths.get("cpu", v2), paths.get("memory", v2))

    def to_dict(self) -> dict[str, str | None]:
        """The directories as the journal holds them."""
        return {name: str(path) if path else None for name, path in asdict(self).items()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Cgroup:
        """The inverse of `to_dict`. Raises `PeerMisbehaved` on anything else."""
        paths = {name: data.get(name) for name in ("freezer", "cpu", "memory")}
        if not isinstance(paths["freezer"], str) or any(not isinstance(path, str | None) for path in paths.values()):
            raise PeerMisbehaved("not the directories of a cgroup", why=repr(data))
        cpu, memory = paths["cpu"], paths["memory"]
        return Cgroup(Path(paths["freezer"]), Path(cpu) if cpu else None, Path(memory) if memory else None)

    # Freezing.

    @property
    def v1_freezer(self) -> bool:
        """Whether the freezer is a v1 controller."""
        return (self.freezer / "freezer.state").exists()

    def state(self) -> Frozen:
        """Whether the group runs. A frozen parent counts."""
        if self.v1_freezer:
            return self.V1_STATES[_read(self.freezer / "freezer.state").strip()]
        if "frozen 1" in _read(self.freezer / "cgroup.events"):
            return Frozen.FROZEN
        return Frozen.FREEZING if _read(self.freezer / "cgroup.freeze").strip() == "1" else Frozen.THAWED

    def freeze(self, timeout: float = FREEZE_TIMEOUT) -> None:
        """Stop everything in the group; return when it stands still. `timeout` is in seconds.

        On failure the group is thawed again. Raises `TimedOut` and `CgroupFailed`.
        """
        try:
            if self.v1_freezer:
                self._freeze_v1(time.monotonic() + timeout)
            else:
                self._freeze_v2(time.monotonic() + timeout)
        except BaseException:
            with contextlib.suppress(CgroupFailed):
                self.thaw()
            raise

    def thaw(self) -> None:
        """Let the group run."""
        if self.v1_freezer:
            _write(self.freezer / "freezer.state", "THAWED")
        else:
            _write(self.freezer / "cgroup.freeze", "0")

    def _freeze_v1(self, deadline: float) -> None:
        pause = V1_FIRST_POLL
        while True:
            # Written anew each time: a task that was forked meanwhile is only seen then.
            _write(self.freezer / "freezer.state", "FROZEN")
            if self.state() is Frozen.FROZEN:
                return
            if time.monotonic() > deadline:
                raise self._unfrozen()
            time.sleep(pause)
            pause = min(2 * pause, V1_LAST_POLL)

    def _freeze_v2(self, deadline: float) -> None:
        with _opened(self.freezer / "cgroup.events") as events:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            _write(self.freezer / "cgroup.freeze", "1")
            while b"frozen 1" not in os.pread(events, 4096, 0):
                left = deadline - time.monotonic()
                if left <= 0 or not poll.poll(left * 1000):
                    raise self._unfrozen()

    def _unfrozen(self) -> TimedOut:
        waiting = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                comm, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
                if rest.split()[0] == "D":
                    waiting.append(comm + ")")
        return TimedOut(
            f"the container does not freeze: {self.freezer}",
            why=f"in uninterruptible sleep: {', '.join(waiting)}" if waiting else "",
            remedy="look at what these processes wait for: often a file server that does not answer" if waiting else "",
        )

    # Processes.

    def pids(self) -> tuple[int, ...]:
        """The processes in the group and in those below it; none where the group has gone."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.freezer):
            with contextlib.suppress(FileNotFoundError), (Path(directory) / "cgroup.procs").open() as procs:
                found += [int(line) for line in procs if line != "0\n"]  # 0: not in the caller's pid namespace
        return tuple(found)

    def remove(self, timeout: float = FREEZE_TIMEOUT) -> None:
        """Remove the directories, where runc has left them: it waits a tenth of a second for the dying to be gone, which a busy
        machine may need longer for. Raises `CgroupFailed` where processes are still there after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for path in {one for one in (self.freezer, self.cpu, self.memory) if one is not None}:
            while path.exists():
                try:
                    path.rmdir()
                except FileNotFoundError:
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise _gone(path, error) from error
                    time.sleep(V1_LAST_POLL)

    def kill(self, timeout: float = FREEZE_TIMEOUT, *, once_sent: Callable[[], object] = lambda: None) -> None:
        """Kill everything in the group so that nothing in it runs another instruction; return when all have ended.

        The group is frozen first, if it is not, and thawed once every process has its SIGKILL; then `once_sent` is
        called, which may end whoever traces them: a tracer is owed the death of its tracees. Raises `TimedOut`.
        """
        if not self.freezer.exists():
            once_sent()
            return
        if self.state() is not Frozen.FROZEN:
            with contextlib.suppress(TimedOut):  # who sleeps uninterruptibly runs nothing more before its SIGKILL
                self.freeze()
        with killed(self.pids) as ends:
            with contextlib.suppress(CgroupFailed):  # v2 kills the frozen: its directory may be gone already
                self.thaw()
            once_sent()
            if left := ends.wait(timeout):
                raise TimedOut(f"killed processes do not end: {self.freezer}", why=f"{left} are left")

    # CPU and memory.

    def cpu_quota(self) -> CpuQuota:
        """How much CPU the group may use. Raises `Refused` where the CPU controller is missing."""
        cpu = self._controller(self.cpu, "cpu")
        if (cpu / "cpu.cfs_quota_us").exists():
            quota, period = int(_read(cpu / "cpu.cfs_quota_us")), int(_read(cpu / "cpu.cfs_period_us"))
            return CpuQuota(None if quota < 0 else quota, period)
        words = _read(cpu / "cpu.max").split()
        return CpuQuota(None if words[0] == "max" else int(words[0]), int(words[1]))

    def why_no_quota(self) -> str:
        """Why the group cannot be given less CPU, where it cannot; else empty."""
        try:
            self.cpu_quota()
        except (Refused, CgroupFailed) as cannot:
            return str(cannot)
        return ""

    def set_cpu_quota(self, quota: CpuQuota) -> None:
        """Let the group use this much CPU."""
        cpu = self._controller(self.cpu, "cpu")
        if (cpu / "cpu.cfs_quota_us").exists():
            if self.cpu_quota().period != quota.period:
                _write(cpu / "cpu.cfs_quota_us", "-1")
                _write(cpu / "cpu.cfs_period_us", str(quota.period))
            _write(cpu / "cpu.cfs_quota_us", str(-1 if quota.quota is None else quota.quota))
        else:
            _write(cpu / "cpu.max", f"{'max' if quota.quota is None else quota.quota} {quota.period}")

    def cpu_seconds(self) -> float:
        """Processor time that the group has used. Where nobody accounts for it, what its processes have used that still live."""
        if self.cpu is not None:
            with contextlib.suppress(OSError, ValueError):
                return int((self.cpu / "cpuacct.usage").read_text()) / 1e9
            with contextlib.suppress(OSError, KeyError, ValueError):
                stat = dict(line.split() for line in (self.cpu / "cpu.stat").read_text().splitlines())
                return int(stat["usage_usec"]) / 1e6
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_usage(self) -> int | None:
        """Bytes that the group uses, page cache included; `None` where the memory controller is missing."""
        if self.memory is not None:
            for name in ("memory.usage_in_bytes", "memory.current"):
                if (self.memory / name).exists():
                    return int(_read(self.memory / name))
        return None

    def memory_held(self) -> int | None:
        """Bytes that the group holds and the kernel cannot drop: private and shared memory, swapped out or not. What is read from
        files is left out. `None` where the memory controller is missing.
        """
        if self.memory is None:
            return None
        try:
            stat = dict(line.split() for line in _read(self.memory / "memory.stat").splitlines())
        except CgroupFailed:
            return None
        if "total_rss" in stat:
            return sum(int(stat.get(one, 0)) for one in ("total_rss", "total_shmem", "total_swap"))
        swapped = self.memory / "memory.swap.current"
        return sum(int(stat.get(one, 0)) for one in ("anon", "shmem")) + (
            int(_read(swapped)) if swapped.exists() else 0
        )

    def _controller(self, path: Path | None, name: str) -> Path:
        if path is None or not ((path / "cpu.cfs_quota_us").exists() or (path / "cpu.max").exists()):
            raise Refused(
                f"the container has no {name} controller",
                why=str(path or self.freezer),
                remedy=f"enable the {name} controller for the container's cgroup, or forbid throttling in the policy",
            )
        return path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _gone(path, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise _gone(path, error) from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise _gone(path, error) from error


def _gone(path: Path, error: OSError) -> CgroupFailed:
    if error.errno in (errno.ENOENT, errno.ENODEV):
        return CgroupFailed("the container's cgroup is gone", why=f"{path}: the container has ended")
    return CgroupFailed.because(f"cannot use {path}", error)

"""One machine of a lab: a set of namespaces with a root of its own, and the commands that run in it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from podferry.errors import CommandFailed, Failed, Refused
from podferry.lab import cgroups
from podferry.lab.site import PACKAGE
from podferry.lab.state import SWITCH
from podferry.lab.stepwise import Stepwise
from podferry.node.process import Arg, Completed

STAGE = Path(__file__).with_name("stage.sh")
START_SECONDS = 180.0

# Join the cgroups before `--`, then become what follows it.
_ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs"; shift; done; shift; exec "$@"'
# A machine's first process is put where it belongs by us, while it waits for a line: first here, then in its cgroup namespace.
_WAIT = 'read -r _; exec "$@"'
_SETTLE = 'echo; read -r _; exec "$@" < /dev/null'
# It leaves a child as the first of the new process namespace. setsid forks it: a shell's background child would ignore SIGINT, and
# with it every process of the machine. Where we are such a child ourselves, env gives the signals back.
_LEAVE = ("env", "--default-signal=INT,QUIT", "setsid", "--fork")
NAMESPACES = ("--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup")

# linux/capability.h: what starting a machine needs.
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_CHROOT": 18, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27}


class _EndedEarly(Exception):
    """The first process of a machine ended before it was one; what it said is the reason."""


@dataclass(frozen=True)
class Machine:
    """What a machine is started from. `home` is its disk; `binds` maps paths inside to what is shown there, read-only."""

    lab: str
    name: str
    home: Path
    image: Path
    services: Sequence[str]
    cgroups: str
    binds: Mapping[str, Path] = field(default_factory=dict)


def first_process(lab: str, name: str) -> int | None:
    """The id (here) of the machine's PID 1, or None where the machine is not running."""
    return next((one.pid for one in cgroups.processes(lab, name) if one.first), None)


def start(machine: Machine) -> int:
    """Start a machine that is not running; returns the id of its PID 1. Raises `Failed` with what the stage said."""
    mounted = cgroups.hierarchies()
    for name in ("root", "upper", "work", "log"):
        (machine.home / name).mkdir(parents=True, exist_ok=True)
    environment = {
        "NAME": machine.name,
        "IMAGE": str(machine.image),
        "HOME_DIR": str(machine.home),
        "PACKAGE": str(PACKAGE),
        "SERVICES": " ".join(machine.services),
        "PYTHON": sys.executable,
        "CGROUPS": cgroup_mounts(machine.cgroups, mounted),
        "BINDS": " ".join(f"{source}:{inside}" for inside, source in machine.binds.items()),
    }
    return _unshare(machine.lab, machine.name, mounted, ["sh", STAGE], environment=environment, sign="ready")


def start_switch(lab: str) -> int:
    """Start the lab's switch: an idle process that keeps a network namespace. Returns its id."""
    return _unshare(lab, SWITCH, cgroups.hierarchies(), ["sh", "-c", "exec >&- 2>&-; exec sleep infinity"])


def cgroup_mounts(mode: str, mounted: list[cgroups.Hierarchy]) -> str:
    """What `stage.sh` mounts below /sys/fs/cgroup for `mode` auto, v1 or v2. Raises `Refused` for a kind not there."""
    if mode == "auto":
        mode = cgroups.native_mode(mounted)
    wanted = [h for h in mounted if h.version == int(mode.removeprefix("v"))]
    if not wanted:
        raise Refused(f"no cgroup {mode} hierarchy is mounted here", remedy="use --cgroups auto")
    return "v2" if mode == "v2" else " ".join(f"{h.mount.name}:{h.option}" for h in wanted)


def enter(pid: int, argv: Sequence[Arg], *, cwd: str = "/") -> list[Arg]:
    """The command that runs `argv` inside the machine of `pid`: in its cgroups, namespaces and root."""
    try:
        joined = cgroups.directories_of(pid)
    except FileNotFoundError as gone:
        raise Failed("the machine has just ended") from gone
    inside: list[Arg] = ["sh", "-ec", 'cd "$1"; shift; exec "$@"', "sh", cwd, *argv]
    return ["sh", "-ec", _ENTER, "sh", *joined, "--", "nsenter", f"--target={pid}", *NAMESPACES, "--", *inside]


def _unshare(
    lab: str,
    name: str,
    mounted: list[cgroups.Hierarchy],
    argv: list[Arg],
    *,
    environment: Mapping[str, str] | None = None,
    sign: str = "",
) -> int:
    # Of a machine that ended alone its cgroups are left; one that passes controllers on takes no process in (EBUSY).
    cgroups.kill(lab, name)
    cgroups.remove(lab, name)
    made = cgroups.create(lab, name, mounted)
    rest = [option for option in NAMESPACES if option != "--cgroup"]
    words: list[Arg] = ["sh", "-ec", _WAIT, "sh", "unshare", "--cgroup", "sh", "-ec", _SETTLE, "sh"]
    words += ["unshare", *rest, *_LEAVE, *argv]
    # The stage holds its output until the machine stands, or until it gave up: their end is the event.
    with Stepwise(words, environment, START_SECONDS) as first:

        def in_namespace() -> None:
            first.go_on()
            if not first.receive():
                raise _EndedEarly

        with contextlib.suppress(_EndedEarly):
            cgroups.settle(first.pid, mounted, made, in_namespace)
        first.go_on()
        said = first.finish()
    pid = first_process(lab, name)
    if pid is None or sign not in said.stdout:
        cgroups.kill(lab, name)
        raise _not_started(name, said)
    return pid


def _not_started(name: str, said: Completed) -> CommandFailed:
    return CommandFailed(
        f"{name} did not start",
        why=(said.stderr.strip() or "its first process ended").splitlines()[-1],
        remedy=_remedy(said.stderr),
        evidence=said.stderr.splitlines(),
        argv=said.argv,
        returncode=said.returncode,
    )


def _remedy(said: str) -> str:
    """What is known of a start that failed: only what this process lacks itself."""
    held = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    lacking = [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]
    if "not permitted" in said and lacking:
        return f"the lab needs root with capabilities that this process lacks: {', '.join(lacking)}"
    return "the lines above are what the kernel and the programs said"

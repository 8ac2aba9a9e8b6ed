"""What a container's processes do: for a test that waits for one of them, and for a failure to explain itself."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from podferry.node.process import ending


def family(pid: int) -> dict[int, int]:
    """A process and all that descend from it, zombies too: by the pid that each has inside, its pid here."""
    found = {inside(pid): pid}
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    found |= family(int(child))
    return found


def inside(pid: int) -> int:
    """The pid that process `pid` has in its own pid namespace."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("NSpid:")[2].split("\n", 1)[0].split()[-1])


def ended(pid: int) -> str:
    """How a process ended, which nobody has reaped yet; empty while it lives."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "gone"
    # The state and the exit code are the third and the 52nd field, proc_pid_stat(5).
    return ending(os.waitstatus_to_exitcode(int(fields[49]))) if fields[0] in "ZX" else ""


def portrait(pid: int) -> str:
    """How a process ended, or what each of its threads does and where in the kernel it waits."""
    if how := ended(pid):
        return how
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        name, status, call, place = (said(task / one, 100) for one in ("comm", "status", "syscall", "wchan"))
        state = status.partition("State:")[2].split("\n", 1)[0].strip()
        lines += [
            f"{task.name} {name}: {state}, waits in {place}, system call {call}",
            *said(task / "stack").splitlines(),
        ]
    return "\n  ".join(lines)


def said(path: Path, lines: int = 20) -> str:
    """The end of a file, or why there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"({os.strerror(error.errno or 0)})"

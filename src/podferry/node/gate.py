"""A dump that is ready to begin: runc is started while the job still runs, and held just before CRIU touches anything.

`runc checkpoint` spends a third of its time before the dump: it starts, asks CRIU for its version, then for its features (each a
CRIU of its own), and puts the request together. None of that needs a frozen job. So runc is started early and finds first in
its PATH a `criu` of ours (`gated/criu`), which lets those questions through and holds the request to dump until the agent opens
the gate.

The gate is a FIFO of which the agent holds the writing end: one byte opens it, and its end without one (the agent is dead)
ends the attempt, as does the end of runc. Nothing has happened to the job then.

A thin dump (`thin.py`) needs CRIU to see one file otherwise than everybody else does: that, too, is done here.

Run as a program this file is that `criu`, with nothing but the standard library, `python -SI`.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
from pathlib import Path

SHIM = Path(__file__).with_name("gated") / "criu"
DUMP = (
    b"\x08\x01"  # CriuReq.type = DUMP, in CRIU's images/rpc.proto; libraries write fields in the order of their numbers
)
CLONE_NEWNS, MS_BIND, MS_PRIVATE = 0x20000, 0x1000, 0x40000  # linux/sched.h, linux/mount.h


class Gate:
    """The agent's end. `path` is where the FIFO is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path, 0o600)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    @staticmethod
    def usable() -> bool:
        """Whether our `criu` can be run: not where the package lies on a file system that runs no programs."""
        return os.access(SHIM, os.X_OK)

    def environment(self, path: str) -> dict[str, str]:
        """What runc needs in its environment, whose PATH would be `path`."""
        return {
            "PATH": f"{SHIM.parent}:{path}",
            "PODFERRY_PATH": path,
            "PODFERRY_PYTHON": sys.executable,
            "PODFERRY_GATE": str(self.path),
        }

    def open(self) -> None:
        """Let the dump begin. If runc is not so far yet, it will not wait when it is."""
        os.write(self._fd, b"1")

    def close(self) -> None:
        """Let go of the gate: a dump that still waits for it does not take place."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def viewing(shown: Path, file: Path) -> list[str]:
    """The words to put before a command that shall find `shown` where `file` is. Its name stays what it is."""
    return [sys.executable, "-SI", __file__, "view", str(shown), str(file)]


def view(shown: str, file: str) -> None:
    """Show this process, and what it becomes, `shown` in place of `file`. Nobody else sees it. Raises `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(CLONE_NEWNS))
    # Only the one mount leaves its peers: of all others CRIU may ask with whom they share what is mounted.
    check(libc.mount(None, os.fsencode(_mount_point(file)), None, MS_PRIVATE, None))
    check(libc.mount(os.fsencode(shown), os.fsencode(file), None, MS_BIND, None))


def _mount_point(file: str) -> str:
    """Where the mount is that `file` is reached through, as the kernel says."""
    found = os.open(file, os.O_PATH | os.O_CLOEXEC)
    try:
        with Path(f"/proc/self/fdinfo/{found}").open() as info, Path("/proc/self/mountinfo").open() as mounts:
            id = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
            return next(words[4] for words in map(str.split, mounts) if words[0] == id)
    except StopIteration:
        raise OSError(f"{file} lies on no mount") from None
    finally:
        os.close(found)


def _opened(gate: str, link: int) -> bool:
    """Wait at the gate. False where the agent or runc, at the other end of `link`, is gone."""
    try:
        both = os.open(gate, os.O_RDWR | os.O_CLOEXEC)  # an open for reading alone would wait for a writer
        reader = os.open(gate, os.O_RDONLY | os.O_CLOEXEC)
        os.close(both)
    except FileNotFoundError:
        return False
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(link, 0)
    events = dict(poll.poll())
    return link not in events and os.read(reader, 1) == b"1"


def _be_thin() -> None:
    """Have the dump be thin, where that is wanted and can be had; else it is an ordinary one.

    Done at the last moment, in 1 ms: while it exists, a mount namespace keeps what is unmounted elsewhere.
    """
    if settings := os.environ.get("PODFERRY_THIN"):
        try:
            if shown := os.environ.get("PODFERRY_SHOWN"):
                view(shown, os.environ["PODFERRY_INSTEAD_OF"])
        except OSError:
            return
        os.environ["CRIU_CONFIG_FILE"] = settings


def main() -> None:
    """Be `criu swrk 3`, or `view SHOWN FILE COMMAND...`."""
    if sys.argv[1] == "view":
        view(*sys.argv[2:4])
        os.execvp(sys.argv[4], sys.argv[4:])
    link = int(sys.argv[2])
    with socket.socket(fileno=os.dup(link)) as runc:
        request = runc.recv(len(DUMP), socket.MSG_PEEK)
    if request == DUMP:
        if not _opened(os.environ["PODFERRY_GATE"], link):
            sys.exit("the dump was called off")
        _be_thin()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.environ["PATH"] = os.environ["PODFERRY_PATH"]
    os.execvp("criu", ["criu", *sys.argv[1:]])


if __name__ == "__main__":
    main()

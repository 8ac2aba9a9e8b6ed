"""The `criu` that runc finds first while a dump is being prepared. `dump_gate.py` tells what for; this is the program behind it.

Run by `gated/criu` with nothing but the standard library: `python -SI gatekeeper.py HOME WORDS...`.

A node need not have a Python. There this is the Python of the agent's container, which came here by changing root into it
(`outside.from_node`), and goes back to the node's root directory, HOME, before it does anything.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import socket
import sys
import warnings  # noqa: F401 - os.execvp wants it, and finds no modules any more
from pathlib import Path

DUMP = (
    b"\x08\x01"  # CriuReq.type = DUMP, in CRIU's images/rpc.proto; libraries write fields in the order of their numbers
)
CLONE_NEWNS, MS_BIND, MS_PRIVATE = 0x20000, 0x1000, 0x40000  # linux/sched.h, linux/mount.h


def show(things: list[tuple[str, str]]) -> None:
    """Show this process, and what it becomes, in each pair the first file in place of the second. Nobody else sees it.

    Raises `OSError`.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(CLONE_NEWNS))
    # Only what is mounted upon leaves its peers: of all others CRIU may ask with whom they share what is mounted.
    for point in {_mount_point(file) for _, file in things}:
        check(libc.mount(None, os.fsencode(point), None, MS_PRIVATE, None))
    for shown, file in things:
        check(libc.mount(os.fsencode(shown), os.fsencode(file), None, MS_BIND, None))


def _mount_point(file: str) -> str:
    """Where the mount is that `file` is reached through, as the kernel says."""
    found = os.open(file, os.O_PATH | os.O_CLOEXEC)
    try:
        with Path(f"/proc/self/fdinfo/{found}").open() as info, Path("/proc/self/mountinfo").open("rb") as mounts:
            id = next(line.split()[1].encode() for line in info if line.startswith("mnt_id:"))
            # `fs/mountinfo.py` tells why; this program has no module of podferry's
            words = next(words for words in (line.split(b" ") for line in mounts) if words[0] == id)
            return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 0xFF]), words[4]))
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


def _skip_memory() -> None:
    """Have the dump find what it is to find, where that can be had; else it is an ordinary one.

    Done at the last moment, in 1 ms: while it exists, a mount namespace keeps what is unmounted elsewhere.
    """
    if listed := os.environ.get("PODFERRY_SHOWN"):
        try:
            with Path(listed).open() as lines:
                things = [(shown, file) for shown, file in map(str.split, lines)]
            if things:
                show(things)
        except OSError:
            return


def _hold(link: int) -> None:
    """Return when what runc asks for at `link` may be done."""
    with socket.socket(fileno=os.dup(link)) as runc:
        request = runc.recv(len(DUMP), socket.MSG_PEEK)
    if request == DUMP:
        if not _opened(os.environ["PODFERRY_GATE"], link):
            sys.exit("the dump was called off")
        _skip_memory()


def _go_home(home: str) -> None:
    """Be among the node's files. No module comes from there: they would be another Python's."""
    if home != "/":
        os.chroot(home)
        os.chdir("/")
        sys.path.clear()


def main() -> None:
    """Be `criu swrk 3`; or `try`, which is `criu --version`."""
    home, *words = sys.argv[1:]
    _go_home(home)
    if words == ["try"]:
        words = ["--version"]
    else:
        _hold(int(words[1]))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.environ["PATH"] = os.environ["PODFERRY_PATH"]
    os.execvp("criu", ["criu", *words])


if __name__ == "__main__":
    main()

"""The agent's side of the hand-shake with `podferry-runc`, which turns a container's `create` into `restore`.

The agent makes a directory for the container before it asks containerd for the task. The wrapper finds it, says that it
is prepared, and waits for the verdict. Both talk through FIFOs, so that each notices the other's death: the wrapper reads
an end of file where the agent is gone, and the agent a hang-up where the wrapper is.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from podferry.criu.log import explained
from podferry.criu.network_setup import NetworkSetup, settings
from podferry.criu.waiting import wake
from podferry.errors import EVIDENCE_LINES, Bug, Failed, PodferryError, TimedOut, UsageError
from podferry.fs.private import private_directory
from podferry.node import outside

RUN = Path("/run/podferry")
STOPPED = Path(__file__).with_name("gated") / "stopped"
ON_NODE = Path("/opt/podferry/gated/stopped")
"""CRIU's action script, and where the installer puts it for agents in pods."""
PARENT = STOPPED.with_name("parent")
PARENT_ON_NODE = ON_NODE.with_name("parent")
"""What stands for CRIU in the restore: the parent of the container's first process until containerd has started it."""
_FIFOS = ("poised", "verdict", "stopped", "inspected", "ended")
TAKEN_TIMEOUT = 10.0  # seconds
RESTORE_FLAGS = frozenset({"--lazy-pages", "--file-locks", "--tcp-established", "--ext-unix-sk", "--shell-job"})
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_UNSAID = re.compile(r"[^ !#-\[\]-~]")  # what cannot stand in a JSON string, on one line
_SAID = 900  # characters; so short a write to a FIFO is whole


class WrapperGone(Failed):
    """`podferry-runc` ended, or never came, while the agent counted on it."""

    code = "PF242"


def pod_key(pod_uid: str, container: str) -> str:
    """The key of a container of Kubernetes, whose id nobody knows before it is made."""
    return f"{pod_uid}_{container}"


def remove(directory: Path, key: str) -> None:
    """Remove what is prepared under `key` in the directory `incoming` of podferry's run, and what an agent that was killed or found
    no room had prepared of it in part."""
    for path in (directory / key, _draft(directory / key)):
        shutil.rmtree(path, ignore_errors=True)


def forget(run: Path, container: str) -> None:
    """Remove podferry-runc's mark that it has restored the container, and let go of its first process (`gated/parent`)."""
    mark = run / "restored" / container
    with contextlib.suppress(FileNotFoundError):
        if mark.is_fifo():
            with contextlib.suppress(OSError):  # nobody is there any more
                let_go = os.open(mark, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                os.write(let_go, b"\n")
                os.close(let_go)
        mark.unlink()


def _draft(path: Path) -> Path:
    """Where a directory is made that podferry-runc finds at `path` once it is whole: keys do not begin with a dot."""
    return path.with_name(f".{path.name}.draft")


def _runs(here: Path, on_node: Path) -> Path | None:
    """The script, where the node's processes find it and can run it."""
    script = on_node if outside.in_pod() else here
    return script if os.access(outside.root() / script.relative_to("/"), os.X_OK) else None


class Incoming:
    """One container that is to be restored. Made with `prepare`; `close` removes what is left of it.

    `images` is where CRIU's images go, `work` is for its log and the lazy-pages daemon's socket.
    """

    def __init__(self, run: Path, key: str) -> None:
        if not _KEY.fullmatch(key):
            raise UsageError(f"not a container's name: {key!r}")
        self.key = key
        self.path = run / "incoming" / key
        self.images = self.path / "images"
        self.work = self.path / "work"
        self._poised = self._verdict = self._stopped = self._inspected = -1
        self._abandoned = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._reason: PodferryError | None = None
        self._given = False
        self._network: NetworkSetup | None = None
        self.container = ""
        """The id that containerd gave the container. Known once it is prepared."""
        self.wrapper = 0
        """The pid of podferry-runc, which becomes that of `runc restore`. Known once it is prepared."""

    @classmethod
    def prepare(
        cls,
        key: str,
        *,
        flags: Sequence[str] = ("--lazy-pages", "--file-locks"),
        criu_conf: str = "",
        network: bool = False,
        run: Path = RUN,
    ) -> Incoming:
        """Make the directory, whole at once. `flags` are those of `runc restore` that mirror the dump, `criu_conf` CRIU's settings;
        `network`: the container gets a network namespace of its own, which is arranged as it was. Raises `Refused` where it cannot.

        What an earlier attempt left under this key is removed.
        """
        unknown = set(flags) - RESTORE_FLAGS
        if unknown:
            raise UsageError(f"no such restore option: {', '.join(sorted(unknown))}")
        if network:
            criu_conf += settings()
        self = cls(run, key)
        draft = _draft(self.path)
        remove(run / "incoming", key)
        for directory in (draft, draft / "images", draft / "work"):
            private_directory(directory, below=run, new=True)
        (draft / "restore").write_text(" ".join(flags) + "\n")
        if (script := _runs(STOPPED, ON_NODE)) is not None:
            criu_conf += f"\naction-script {script}\n"
            if (parent := _runs(PARENT, PARENT_ON_NODE)) is not None:
                private_directory(draft / "bin", below=run, new=True)
                (draft / "bin/criu").symlink_to(parent)
        if criu_conf:
            (draft / "criu.conf").write_text(criu_conf)
        if network:
            self._network = NetworkSetup(draft)
        self._open(draft)
        # podferry-runc takes the directory's name for the sign that all of it is there: so it appears whole, and only then is the
        # waiting wrapper woken.
        draft.rename(self.path)
        wake(run, key)
        return self

    @classmethod
    def adopt(cls, key: str, *, run: Path = RUN) -> Incoming:
        """Take over what an agent that died had prepared, images included. Raises `WrapperGone` where it left nothing."""
        self = cls(run, key)
        if not (self.path / "restore").exists():
            raise WrapperGone(f"nothing was prepared for {key}", why=f"no {self.path}")
        for name in (*_FIFOS, "whole"):  # the dead agent's wrapper has read its end of file: nobody has these open
            (self.path / name).unlink(missing_ok=True)
        if NetworkSetup.wanted(self.path):
            self._network = NetworkSetup(self.path)
        self._open(self.path)
        return self

    @staticmethod
    def left(run: Path = RUN) -> tuple[str, ...]:
        """The keys that are prepared: after an agent's restart, what its predecessor left behind."""
        directory = run / "incoming"
        names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
        return tuple(sorted(name for name in names if not name.startswith(".")))

    def wait_prepared(self, timeout: float) -> None:
        """Wait until the wrapper waits for the verdict. `timeout` is in seconds.

        Raises `TimedOut`, what `abandon` was given, or `WrapperGone`.
        """
        poll = select.poll()
        poll.register(self._poised, select.POLLIN)
        poll.register(self._abandoned, select.POLLIN)
        events = dict(poll.poll(timeout * 1000))
        if self._reason is not None:
            raise self._reason
        if not events:
            raise TimedOut(
                f"podferry-runc did not ask for {self.key} within {timeout:g} s",
                remedy="check that the container's runtime is podferry-runc, and containerd's log",
            )
        said = os.read(self._poised, 4096).decode(errors="replace").split()
        if len(said) < 3 or said[0] != "poised" or not said[2].isdecimal():
            raise self.gone("it ended right after its start")
        self.container, self.wrapper = said[1], int(said[2])
        # From here on only the wrapper reads the verdict, so that writing it to a dead one fails.
        writer = os.open(self.path / "verdict", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.close(self._verdict)
        self._verdict = writer

    def abandon(self, reason: PodferryError | None = None) -> None:
        """End a `wait_prepared` in another thread with `reason`: the call that should bring the wrapper has failed."""
        self._reason = reason or self.gone("nobody waits for it any more")
        with contextlib.suppress(ValueError):  # closed meanwhile
            os.eventfd_write(self._abandoned, 1)

    def fileno(self) -> int:
        """What can be read, once a wrapper that was prepared is gone: its end of file."""
        return self._poised

    def alive(self) -> bool:
        """Whether a wrapper that was prepared still waits."""
        poll = select.poll()
        poll.register(self._poised, 0)
        return not poll.poll(0)

    def belongs_in(self, group: str) -> None:
        """CRIU is to put the container into this control group (`podferry.criu.restored_group`); empty: runc tells it."""
        if group:
            with (self.path / "criu.conf").open("a") as settings:
                settings.write(f"\ncgroup-root :{group}\n")  # of the tree without controllers alone

    def stopped(self) -> int:
        """What can be read, once CRIU has restored all tasks and waits for `let_run` before any has run an instruction.

        CRIU does not wait where its action script cannot be run.
        """
        return self._stopped

    def first_process(self) -> int:
        """The pid, here, of the first process of what `stopped` told of. Raises `ValueError` where CRIU said something else."""
        return int(os.read(self._stopped, 64))

    def let_run(self) -> None:
        """What `stopped` told of, is done."""
        os.write(self._inspected, b"go\n")

    def restore(self) -> None:
        """Let the wrapper restore the container. Returns when it has taken the verdict."""
        if self._network is not None:
            self._network.serve(self.images)
        self._give("restore")

    def cold(self) -> None:
        """Let the wrapper start the container anew: somebody has said in so many words that this is wanted."""
        self._give("cold")

    def refuse(self, why: str) -> None:
        """Let the wrapper fail; containerd shows `why`."""
        self._give(f"refuse {_UNSAID.sub(' ', why)[:_SAID]}")

    def failure(self) -> list[str]:
        """The last lines of CRIU's log of the restore."""
        with contextlib.suppress(OSError):
            return (self.work / "restore.log").read_text(errors="replace").splitlines()[-EVIDENCE_LINES:]
        return []

    def failed(self, what: str) -> Failed | None:
        """An error that says why the restore failed, as far as CRIU's log tells; None where there is none."""
        if self._network is not None and self._network.error is not None:
            return Failed.because(what, self._network.error, remedy=self._network.error.remedy)
        log = self.work / "restore.log"
        return explained(Failed, what, log) if log.exists() else None

    def close(self) -> None:
        """Close the FIFOs, upon which a wrapper that still waits fails, and remove the directory."""
        for fd in (self._poised, self._verdict, self._stopped, self._inspected, self._abandoned):
            if fd >= 0:
                os.close(fd)
        self._poised = self._verdict = self._stopped = self._inspected = self._abandoned = -1
        if self._network is not None:
            self._network.close()
            self._network = None
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, directory: Path) -> None:
        for name in _FIFOS:
            os.mkfifo(directory / name, 0o600)
        self._poised = os.open(directory / "poised", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._verdict = os.open(directory / "verdict", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopped = os.open(directory / "stopped", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._inspected = os.open(directory / "inspected", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def _give(self, verdict: str) -> None:
        if self._given:
            raise Bug(f"a second verdict for {self.key}")
        try:
            os.write(self._verdict, verdict.encode("ascii") + b"\n")
        except BrokenPipeError as error:
            raise self.gone("it ended before the verdict") from error
        self._given = True
        poll = select.poll()
        poll.register(self._poised, 0)
        if not poll.poll(TAKEN_TIMEOUT * 1000):
            raise TimedOut(f"podferry-runc does not read the agent's verdict on {self.key}")

    def gone(self, why: str) -> WrapperGone:
        """The error that says so."""
        return WrapperGone(
            f"podferry-runc is not there to restore {self.key}", why=why, remedy="see containerd's log on this node"
        )

"""Holding a frozen container: CRIU's lazy dump, through runc, which keeps the source until the decision falls.

`runc checkpoint --lazy-pages` writes everything but private memory to its images and then waits, every task seized,
for somebody to fetch pages. Nobody does: pages are read from /proc/PID/mem. What makes this dump the holder is how it
ends. `commit` kills the tasks; `rollback` makes CRIU fail, which lets them go on as if nothing had happened.

Three things make the hold safe:

- Whoever connects to CRIU's page server decides: even a connection that only closes commits, and reads memory besides.
  So CRIU runs in a network namespace of its own, where nobody but we can connect, and any port is free.
- A CRIU that is killed (out of memory, say) lets the tasks go. So the cgroup is frozen again as soon as the dump is
  ready: then only the decision sets the source free.
- `commit` sends SIGKILL to the frozen tasks before it lets anything move, and asks CRIU nothing: no instruction of the
  job runs after it began, whatever happens to CRIU.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from podferry.criu import link_remaps
from podferry.criu.dump_gate import DumpGate
from podferry.criu.log import explained
from podferry.criu.memory_skipping import MemorySkippingDump
from podferry.criu.processes import Process, children_of, find_process, process_of_pair, readable_among
from podferry.criu.runc_switches import switches
from podferry.errors import CommandFailed, Failed, PeerMisbehaved, TimedOut
from podferry.fs.private import private_directory
from podferry.node import outside, terminals
from podferry.node.cgroup import Cgroup, CgroupFailed
from podferry.node.netns import in_network_of, in_new_network
from podferry.node.process import PATH, Child, ending, last_lines, spawn
from podferry.node.sockets import end_repair, reusing

PORT = 7117
READY_TIMEOUT = 120.0  # seconds
END_TIMEOUT = 10.0  # seconds
BREAK_OFF_TIMEOUT = 15.0
"""Seconds that CRIU gets to fail by itself, and to set right what it did to the tasks, before it is killed."""
THREADS_A_SECOND = 2000
FIRST_POLL, LAST_POLL = 0.001, 0.05  # seconds
# As long as the longest page-server header (32 bytes since CRIU 4.2, 24 before) and no known command in either.
NO_COMMAND = b"\xff" * 32
CRIU_CONF = Path(__file__).with_name("criu.conf")
_OF_THE_CLEANING = re.compile("container paused|container still running")
"""What runc says of what it does after a dump failed; why it failed, it said before."""
FLAGS = frozenset({"--file-locks", "--tcp-established", "--ext-unix-sk", "--shell-job"})


class CheckpointFailed(Failed):
    """CRIU could not dump the container. It goes on running."""

    code = "PF241"


class HeldDump:
    """A container held frozen by CRIU. Make one with `start` or, after an agent's restart, with `from_dict`."""

    def __init__(self, id: str, cgroup: Cgroup, work: Path, images: Path | None = None) -> None:
        self.id = id
        self.cgroup = cgroup
        self.work = work
        self.images = images
        self.runc: Process | None = None
        self.criu: Process | None = None
        self.waits = False
        self.reusing: tuple[int, ...] = ()
        self.terminals: terminals.Flags = ()
        self._child: Child | None = None
        self._status: int | None = None
        self._gate: DumpGate | None = None
        self._skipping: MemorySkippingDump | None = None

    @staticmethod
    def start(
        id: str,
        cgroup: Cgroup,
        *,
        runc_root: Path,
        images: Path,
        work: Path,
        flags: Sequence[str] = ("--file-locks",),
        conf: Path = CRIU_CONF,
        more: str = "",
        runc: str | Path = "runc",
        wait: bool = False,
        skipping: bool = False,
    ) -> HeldDump:
        """Begin to dump container `id`, which should be frozen already: CRIU looks only every 100 ms else.

        With `wait` only what can be done while it runs is begun; `go_on` does the rest. With `skipping` as well the dump can leave
        private memory where it is; its images must then be completed (`podferry.criu.skipped_pages`). `images` and `work` are
        made. `flags` are those of `FLAGS` that this dump, and its restore, need; `conf` is a file of CRIU's settings, `more` are
        others.
        """
        unknown = set(flags) - FLAGS
        if unknown:
            raise CheckpointFailed(f"no such dump option: {', '.join(sorted(unknown))}")
        for directory in (images, work):
            private_directory(directory, below=directory.parent)
        held = HeldDump(id, cgroup, work, images)
        if not wait:
            held.note_open()
        # CRIU may not see the files of this program (`outside`)
        settings = Path(shutil.copy(conf, work / CRIU_CONF.name))
        held.tell(f"timeout {seize_timeout(cgroup)}\n{more}")
        environment = {"CRIU_CONFIG_FILE": str(settings)}
        if wait:
            held.waits, held._gate = True, DumpGate(work / "gate")
            environment |= held._gate.environment(PATH)
            if skipping:
                with contextlib.suppress(CommandFailed):  # then the dump is an ordinary one
                    held._skipping = MemorySkippingDump(work / "shown")
                    environment |= held._skipping.environment()
        status, theirs = os.pipe()
        argv: list[str | Path] = [runc, "--root", runc_root, "--log", work / "runc.log", "checkpoint"]
        argv += ["--lazy-pages", "--page-server", f"127.0.0.1:{PORT}", "--status-fd", str(theirs)]
        argv += [*flags, *switches(runc), "--image-path", images, "--work-path", work, id]
        try:
            held._child = in_new_network(lambda: spawn(outside.on_node(argv), env=environment, pass_fds=[theirs]))
        except BaseException:
            os.close(status)
            held.let_go()
            raise
        finally:
            os.close(theirs)
        held._status = status
        held.runc = Process.of(held._child.pid)
        return held

    def tell(self, more: str) -> None:
        """Add to CRIU's settings, before a dump that waits begins."""
        if more:
            with (self.work / CRIU_CONF.name).open("a") as file:
                file.write(f"\n{more}")

    def go_on(self, skipped: Collection[int] = ()) -> None:
        """Let a dump that waits begin, of a container that is frozen. Journal that it does before: afterwards `to_dict` says so.

        A memory-skipping dump leaves the memory of the processes `skipped` where it is, and says nothing of it.
        """
        if self._gate is not None:
            self.waits = False
            if self._skipping is not None:
                self._skipping.claim(skipped)
            self._gate.open()

    @property
    def skipping(self) -> bool:
        """Whether this dump can be had to leave memory where it is."""
        return self._skipping is not None

    def may_go_on(self) -> bool:
        """Whether a dump that waits can still begin. Where it cannot, runc or our `criu` has failed, and touched nothing."""
        return self.runc is not None and self.runc.alive()

    def call_off(self) -> None:
        """End a dump that waits. The cgroup stays as it is."""
        self.close()
        self.runc = self.runc or self._find_runc()
        if self.runc is not None:
            self.runc.kill()
        self._end()

    def let_go(self) -> None:
        """Let go of the gate: a dump that still waits does not take place."""
        if self._gate is not None:
            self._gate.close()

    def close(self) -> None:
        """Close descriptors. A dump that still waits does not take place."""
        self.let_go()
        self._show_no_more()
        if self._status is not None:
            os.close(self._status)
            self._status = None

    def wait_ready(self, timeout: float = READY_TIMEOUT, *, stop: int | None = None) -> None:
        """Wait until the images are whole; then freeze the cgroup again under CRIU's hold. The wait is broken off when the
        descriptor `stop` can be read.

        Raises `CheckpointFailed` with CRIU's reason, or `TimedOut`; the container then runs, thawed.
        """
        status, self._status = self._status, None
        if status is None:
            raise CheckpointFailed(f"the dump of {self.id} was waited for already")
        try:
            ready = status in readable_among([status] if stop is None else [status, stop], timeout)
            done = os.read(status, 1) if ready else b""
        finally:
            os.close(status)
            self._show_no_more()
        if not done:
            error = self._failed() if ready else self._late()
            with contextlib.suppress(CgroupFailed):
                self.rollback()
            raise error
        try:
            self.criu = self._find_criu()
            self.cgroup.freeze()
            if not self.alive():  # then the tasks ran on until the freeze, and the images are of the past
                raise CheckpointFailed(f"CRIU died as it held {self.id}", remedy="see the kernel's log: out of memory?")
        except BaseException:
            self.rollback()
            raise

    def _show_no_more(self) -> None:
        if self._skipping is not None:
            self._skipping.close()
            self._skipping = None

    def alive(self) -> bool:
        """Whether CRIU still holds the tasks. Where it does not, the freezer does."""
        return self.criu is not None and self.criu.alive()

    def commit(self) -> None:
        """Kill the container: the right to run has passed on. No instruction of it runs from here on.

        May be called again after a failure. Raises `TimedOut` where a killed process does not end.
        """
        # A dead process stays CRIU's as long as CRIU lives, and a container's init waits for all of its own.
        self.cgroup.kill(once_sent=self._end)

    def rollback(self) -> None:
        """Let the container go on. A dump that is still under way is made to fail.

        May be called again after a failure. Raises `CgroupFailed` where the container has ended meanwhile.
        """
        # CRIU undoes what it did to the tasks only if it fails by itself; a kill leaves them as they are.
        if self.waits:
            self.call_off()
        elif self._settled(READY_TIMEOUT if self.images is None else BREAK_OFF_TIMEOUT):
            self._put_right()
            if self.images is not None:
                with contextlib.suppress(CgroupFailed):
                    link_remaps.remove(self.images, self.cgroup.pids())
            self.cgroup.thaw()
            with contextlib.suppress(OSError, Failed):
                self._fail_criu()
        self._end()
        self._put_right()
        self.cgroup.thaw()

    def note_open(self) -> None:
        """Remember, of a container that is frozen and not dumped yet, what CRIU changes of its connections and terminals."""
        pids = self.cgroup.pids()
        self.reusing, self.terminals = reusing(pids), terminals.flags(pids)

    def _put_right(self) -> None:
        """Give connections and terminals back to their owners as they were. May be done again."""
        pids = self.cgroup.pids()
        end_repair(pids, self.reusing)
        terminals.put_back(pids, self.terminals)

    def to_dict(self) -> dict[str, Any]:
        """The hold as the journal keeps it: enough for another agent process to commit it or roll it back."""
        return {
            "id": self.id,
            "cgroup": self.cgroup.to_dict(),
            "work": str(self.work),
            "images": str(self.images) if self.images else None,
            "runc": [self.runc.pid, self.runc.started] if self.runc else None,
            "criu": [self.criu.pid, self.criu.started] if self.criu else None,
            "waits": self.waits,
            "reusing": list(self.reusing),
            "terminals": [list(one) for one in self.terminals],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> HeldDump:
        """The inverse of `to_dict`. `cgroup` and `work` are enough: they can be journalled before `start`, and what it
        had started by the agent's end is found by them. Raises `PeerMisbehaved` on anything else.
        """
        try:
            images = data.get("images")  # agents before this one did not write it down
            held = HeldDump(
                str(data.get("id", "")),
                Cgroup.from_dict(data["cgroup"]),
                Path(data["work"]),
                Path(images) if images else None,
            )
            held.runc, held.criu = (process_of_pair(data.get(who)) for who in ("runc", "criu"))
            held.waits = data.get("waits") is True
            held.reusing = tuple(map(int, data.get("reusing", ())))
            noted = data.get("terminals", ())  # agents before this one did not write it down
            held.terminals = tuple((int(pid), int(descriptor), int(had)) for pid, descriptor, had in noted)
        except (KeyError, TypeError, ValueError) as error:
            raise PeerMisbehaved.because("the record of a held dump is invalid", error) from error
        return held

    def _settled(self, patience: float) -> bool:
        """Wait until CRIU's page server listens, which has no event for others; false where all has ended before. A CRIU that
        is on its way there fails: it finds no directory for its next image.

        What is not known of runc and CRIU is looked for: their agent may have died before it wrote it down.
        """
        deadline, pause = time.monotonic() + patience, FIRST_POLL
        self.runc = self.runc or self._find_runc()
        while True:
            self.criu = self.criu or self._find_criu()
            if self.criu is not None and self.criu.alive():
                if _listens(self.criu):
                    return True
                self._take_images_away()
            elif self.runc is None or not self.runc.alive():
                return False
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, LAST_POLL)

    def _take_images_away(self) -> None:
        if self.images is not None:
            shutil.rmtree(self.images, ignore_errors=True)

    def _find_runc(self) -> Process | None:
        """runc's process, which was told of our work directory."""
        told = f"\0--work-path\0{self.work}\0".encode()
        return find_process(lambda proc: told in (proc / "cmdline").read_bytes())

    def _find_criu(self) -> Process | None:
        """CRIU's process, which works in our work directory: a child of runc, unless runc has died."""
        work = self.work.resolve()

        def matches(proc: Path) -> bool:
            return (proc / "comm").read_text() == "criu\n" and (proc / "cwd").readlink() == work

        return (self.runc and find_process(matches, children_of(self.runc.pid))) or find_process(matches)

    def _fail_criu(self) -> None:
        """Send CRIU's page server a command that there is none of, from within its network, and wait for CRIU's end."""
        assert self.criu is not None
        with in_network_of(self.criu.pid, socket.socket) as connection:
            connection.settimeout(END_TIMEOUT)
            connection.connect(("127.0.0.1", PORT))
            connection.sendall(NO_COMMAND)
            self.criu.wait(END_TIMEOUT)

    def _end(self) -> None:
        """End CRIU, whatever it does, and reap runc."""
        if self.criu is not None:
            self.criu.kill()
        if self.runc is not None and not self.runc.wait(END_TIMEOUT):
            self.runc.kill()
        if self._child is not None:
            self._child.wait()

    def _failed(self) -> CheckpointFailed:
        said = [line for line in last_lines(self.work / "runc.log") if not _OF_THE_CLEANING.search(line)]
        if self._child is not None:
            self._child.wait()
            said.append(f"runc: {ending(self._child.returncode)}")
        return explained(CheckpointFailed, f"cannot dump {self.id}", self.work / "dump.log", said=said)

    def _late(self) -> TimedOut:
        return explained(TimedOut, f"the dump of {self.id} took too long and was broken off", self.work / "dump.log")


def seize_timeout(cgroup: Cgroup) -> int:
    """Seconds that CRIU may take to stop every task, which is what its option `timeout` is about; 10 is its default, and the job
    stands still in vain meanwhile. Stopped already by the freezer, a thousand threads take it less than 0.1 s."""
    threads = 0
    for pid in cgroup.pids():
        with contextlib.suppress(OSError):
            threads += sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    return 1 + threads // THREADS_A_SECOND


def _listens(criu: Process) -> bool:
    """Whether the page server listens in CRIU's network."""
    with contextlib.suppress(OSError):
        return f":{PORT:04X} 00000000:0000 0A " in Path(f"/proc/{criu.pid}/net/tcp").read_text()
    return False

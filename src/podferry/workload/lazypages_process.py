"""The lazy-pages daemon of one container on the target: a process (`podferry.lazypages.daemon`) that outlives a killed agent."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import anyio

from podferry.criu.incoming import Incoming
from podferry.criu.processes import Process
from podferry.engine.journal import Part
from podferry.engine.ports import Json
from podferry.errors import Failed, PodferryError
from podferry.node.process import last_lines
from podferry.workload.helpers import END_TIMEOUT, ended, kill_helper, process_of, python, start_helper
from podferry.workload.threads import run

POLL_INTERVAL = 0.02
DAEMON_SOCKET, DAEMON_STATUS = "feeder.sock", "feeder.json"


class LazyPagesProcess:
    """The lazy-pages daemon that `journal` names, or that `start` starts. It works in the directory `scratch`, and fills
    the job from the
    page store in there."""

    def __init__(self, journal: Part, scratch: Path) -> None:
        self._journal, self._scratch = journal, scratch
        self._process: Process | None = None

    @property
    def socket(self) -> Path:
        """In post-copy, where it is told what has come, and asks for what is wanted."""
        return self._scratch / DAEMON_SOCKET

    async def start(self, incoming: Incoming, *, postcopy: bool) -> None:
        """Start it, in the place of one that was started before; returns when it waits for CRIU."""
        if (old := self._journal.held("lazy-pages-daemon")) is not None:
            await run(kill_helper, old)
            (self._scratch / DAEMON_STATUS).unlink(missing_ok=True)
        argv = [*python("podferry.lazypages.daemon"), "--work", incoming.work, "--images", incoming.images]
        argv += ["--store", self._scratch / "store", "--status", self._scratch / DAEMON_STATUS]
        if postcopy:
            argv += ["--source", self.socket]
        self._process = start_helper(self._journal, self._scratch, "lazy-pages-daemon", argv)
        await self.status("listening")

    async def status(self, *wanted: str) -> Json:
        """Wait for one of these states; its death before is an error."""
        process = self._found()
        while True:
            alive = process is not None and process.alive()
            with suppress(OSError, ValueError):
                status: Json = json.loads((self._scratch / DAEMON_STATUS).read_text())
                if status["state"] in wanted and (alive or status["state"] == "done"):
                    return status
                if status["state"] == "failed":
                    raise Failed("the lazy-pages daemon failed", why=_reason(status), evidence=self.log())
            if not alive:
                raise Failed("the lazy-pages daemon died", evidence=self.log())
            await anyio.sleep(POLL_INTERVAL)

    def resumed_at(self) -> float:
        """When CRIU told it that the tasks are about to run, on the monotonic clock; 0 where it did not."""
        with suppress(OSError, ValueError):
            return float(json.loads((self._scratch / DAEMON_STATUS).read_text()).get("resumed_ns", 0)) / 1e9
        return 0.0

    async def since(self) -> float:
        """Since when a job that has run did so. Whether it still does, or has its memory, is for others to find out."""
        with suppress(PodferryError), anyio.move_on_after(END_TIMEOUT):
            await self.status("filling", "done")
        return self.resumed_at() or time.monotonic()

    async def ended(self) -> None:
        """Wait a while for its end."""
        if (process := self._found()) is not None:
            with anyio.move_on_after(END_TIMEOUT):
                await ended(process)

    def log(self) -> list[str]:
        """Its last words."""
        return last_lines(self._scratch / "feeder.log")

    def _found(self) -> Process | None:
        self._process = self._process or process_of(self._journal.held("lazy-pages-daemon"))
        return self._process


def _reason(status: Json) -> str:
    return str(PodferryError.from_dict(status["error"])) if status.get("error") else ""

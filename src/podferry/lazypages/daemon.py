"""The lazy-pages daemon: a process that speaks CRIU's lazy-pages protocol and feeds restored tasks from the local page store.

    python3 -m podferry.lazypages.daemon --work DIR --images DIR --store DIR --status FILE [--source SOCKET]

It is started before the freeze, so that nothing of its start is downtime; it prints `ready` when CRIU may connect to
`lazy-pages.socket` in the work directory. It is a process of its own because the memory of the job hangs on its descriptors: the
kernel hands out zero pages for what is missing once they are closed, silently. So it survives the agent, does not end on
a signal while a task lacks pages, and after a failure it stays, holding the descriptors (whoever touches a missing page
waits), until SIGTERM says that the tasks are dead. A second process keeps copies of them, should this one be killed. Exit
status: 0 all pages are in place, 1 failed (the status says why).
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from podferry.errors import Bug, PodferryError
from podferry.lazypages.criu_socket import CriuSocket
from podferry.lazypages.daemon_status import DaemonState, DaemonStatus, StatusFile
from podferry.lazypages.descriptor_holder import TO_END, fork_holder
from podferry.lazypages.loop import Loop
from podferry.lazypages.page_source import AgentSource, NoSource
from podferry.memory.store.page_store import PageStore
from podferry.node.secrecy import no_core_dumps

_LAST_TO_KILL = "-999"
_URGENT = -10  # nice: the job's threads wait for us


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the lazy-pages daemon; returns its exit status."""
    options = _parse(arguments)
    no_core_dumps()
    _harden()
    report = StatusFile(options.status, DaemonStatus(pid=os.getpid()))
    holder = fork_holder(report)
    source = AgentSource(options.source) if options.source else NoSource()
    loop = Loop(CriuSocket(options.work), options.images, lambda: PageStore.open(options.store), source, holder, report)

    def told(number: int, frame: FrameType | None) -> None:
        if report.status.state is DaemonState.FAILED or not loop.holds_memory:
            raise SystemExit(1)

    for number in TO_END:
        signal.signal(number, told)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_END)
    report.enter(DaemonState.LISTENING)
    gc.freeze()
    print("ready", flush=True)
    try:
        loop.run()
    except Exception as error:  # noqa: BLE001 - whatever it is: closing the descriptors would corrupt the job
        cause = error if isinstance(error, PodferryError) else Bug.because("the lazy-pages daemon broke", error)
        report.status.error = cause.to_dict()
        report.enter(DaemonState.FAILED)
        with suppress(OSError):  # there is no room for it
            print(cause.report(), file=sys.stderr, flush=True)
        report.insist()
        while loop.give_up():
            signal.pause()
        return 1
    report.enter(DaemonState.DONE)
    report.insist()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="podferry.lazypages.daemon", description="Feed restored tasks from the page store."
    )
    parser.add_argument("--work", type=Path, required=True, help="CRIU's work directory")
    parser.add_argument("--images", type=Path, required=True, help="the images that CRIU restores from")
    parser.add_argument("--store", type=Path, required=True, help="the page store's directory")
    parser.add_argument("--status", type=Path, required=True, help="the file to report in")
    parser.add_argument("--source", type=Path, help="listen here for the agent, which still gets pages (post-copy)")
    return parser.parse_args(arguments)


def _harden() -> None:
    """Be served first, be the last that the kernel kills for memory, hold a descriptor for every process that is forked."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _URGENT)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_LAST_TO_KILL)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    sys.exit(main())

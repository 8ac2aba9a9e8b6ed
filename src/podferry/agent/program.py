"""The program podferry-agent: reads its configuration, works until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
from pathlib import Path

import anyio
import structlog

from podferry import __version__
from podferry.agent import metrics
from podferry.agent.config import load
from podferry.agent.service import Agent
from podferry.errors import PodferryError, UsageError

DESCRIPTION = """Move running containers off this node and onto it.

The agent answers `podferry` on a unix socket (RUN/agent.sock) and other agents over TLS. It is told what to do by one JSON
file; docs/agent.md lists its fields. It may be killed and started again at any moment: what it was doing it finishes or undoes."""


def main() -> None:
    """The program. Ends with 0 after SIGTERM, 2 for a bad configuration."""
    parser = argparse.ArgumentParser(
        prog="podferry-agent", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("/etc/podferry/agent.json"), help="default: %(default)s")
    parser.add_argument("--version", action="version", version=__version__)
    arguments = parser.parse_args()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    try:
        if os.geteuid() != 0:
            raise UsageError("podferry-agent needs root", why="it reads other processes' memory and freezes cgroups")
        _raise_file_limit()
        agent = Agent(load(arguments.config))
        if agent.config.metrics:
            metrics.serve(agent.config.metrics)
        anyio.run(_work, agent)
    except PodferryError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _raise_file_limit() -> None:
    """CRIU inherits it, and a lazy dump opens about 512 pipes per GiB of the job (measured)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _work(agent: Agent) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_until_told, tasks.cancel_scope)
        await agent.run(lambda: agent.log.info("ready", socket=str(agent.config.socket), listen=agent.config.listen))


async def _until_told(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return

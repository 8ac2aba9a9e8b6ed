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
from podferry.agent import memory
from podferry.agent.node_paths import of_this_node
from podferry.agent.service import Agent
from podferry.engine.metrics import REGISTRY, watch_certificate
from podferry.errors import PodferryError, UsageError
from podferry.node import apparmor, own_tmpfs
from podferry.node.logs import log_json_lines
from podferry.node.secrecy import no_core_dumps
from podferry.wire.metrics_server import serve_metrics
from podferry.workload.config import Config, load, of_kubernetes

DESCRIPTION = """Move running containers off this node and onto it.

The agent answers `podferry` on a unix socket (RUN/agent.sock) and other agents over TLS. One JSON file holds
its settings; docs/agent.md lists the fields. It may be killed and restarted at any moment: it then finishes or undoes its
migrations."""


def main() -> None:
    """The program. Ends with 0 after SIGTERM, 2 for a bad configuration."""
    parser = argparse.ArgumentParser(
        prog="podferry-agent", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("/etc/podferry/agent.json"), help="default: %(default)s")
    parser.add_argument(
        "--kubernetes",
        action="store_true",
        help="serve the Kubernetes cluster that the agent runs in; settings come from NODE_NAME, NODE_IP and "
        "POD_NAMESPACE, not from a file",
    )
    parser.add_argument("--version", action="version", version=__version__)
    arguments = parser.parse_args()
    log_json_lines()
    try:
        if os.geteuid() != 0:
            raise UsageError("podferry-agent needs root", why="it reads other processes' memory and freezes cgroups")
        no_core_dumps()
        _raise_file_limit()
        if arguments.kubernetes:
            memory.limit(os.environ.get(memory.VARIABLE, ""))
        apparmor.show()
        config = of_this_node(of_kubernetes(os.environ)) if arguments.kubernetes else load(arguments.config)
        if config.run_size and (why := own_tmpfs.ensure(config.run, config.run_size)):
            structlog.get_logger().warning("memory on its way shares its file system with others", why=why)
        if config.metrics:
            _serve_metrics(config.metrics)
        anyio.run(_in_cluster if arguments.kubernetes else _alone, config)
    except PodferryError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _serve_metrics(address: str) -> None:
    """No migration fails since nobody can be told how many there were."""
    try:
        serve_metrics(address, REGISTRY)
    except OSError as error:
        structlog.get_logger().error("metrics are not served", address=address, why=str(error))


def _raise_file_limit() -> None:
    """CRIU inherits it, and a lazy dump opens about 512 pipes per GiB of the job (measured)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _alone(config: Config) -> None:
    agent = Agent(config)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_until_signalled, tasks.cancel_scope)
        await agent.run(lambda: _ready(agent))


async def _in_cluster(config: Config) -> None:
    from podferry.agent import certificate, notices
    from podferry.agent.kubernetes import Kubernetes
    from podferry.kube.client import Api

    namespace = os.environ.get("POD_NAMESPACE", "podferry-system")
    async with Api.open() as api, anyio.create_task_group() as tasks:
        tasks.start_soon(_until_signalled, tasks.cancel_scope)
        await certificate.ensure(api, namespace, config.node, config.certificates)
        tasks.start_soon(certificate.keep, api, namespace, config.node, config.certificates)
        tasks.start_soon(notices.watch, api, config.node)
        cluster = Kubernetes(api, config.node)
        agent = Agent(config, cluster)

        def ready() -> None:
            _ready(agent)
            tasks.start_soon(cluster.run, agent.pods)

        await agent.run(ready)


def _ready(agent: Agent) -> None:
    watch_certificate(agent.credentials.not_after)
    agent.log.info("ready", socket=str(agent.config.socket), listen=agent.config.listen)


async def _until_signalled(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return

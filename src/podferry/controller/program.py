"""The program podferry-controller: leads or waits, until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import sys
from pathlib import Path

import anyio

from podferry import __version__
from podferry.controller.drains import Drains
from podferry.controller.reconcile import Reconciler, Settings
from podferry.controller.signer import SIGNER, Signer, authority
from podferry.core.drain import Limits
from podferry.errors import PodferryError, UsageError
from podferry.kube.client import MIGRATIONS, NODE_DRAINS, PODS, SIGNING_REQUESTS, Api, Json
from podferry.kube.lease import Leader
from podferry.kube.migration import UID_LABEL
from podferry.kube.watch import Queues, follow
from podferry.node.logs import log_json_lines

DESCRIPTION = """Decide about Migration objects: which pods may move, where to, who owns them afterwards.

It may run twice (one leads, by a Lease) and may be killed at any moment: all that it knows is in the cluster's
objects. It finds the cluster as kubectl does, or by the service account of the pod that it runs in."""

LEASE = "podferry-controller"

Key = tuple[str, str]


class Controller:
    """Watches, and has the reconciler and the signer do what is next."""

    def __init__(self, api: Api, namespace: str, settings: Settings) -> None:
        self._api, self._namespace = api, namespace
        self._reconciler = Reconciler(api, settings)
        self._drainer = Drains(api, Limits(cluster=settings.parallel))
        self._of_uid: dict[str, Key] = {}
        self._drain_of_uid: dict[str, str] = {}

    async def run(self) -> None:
        """Work until cancelled."""
        signer = Signer(self._api, self._namespace, await authority(self._api, self._namespace))
        async with anyio.create_task_group() as tasks:
            migrations = Queues[Key](tasks, lambda key: self._reconciler.step(*key))
            requests = Queues[str](tasks, signer.step)
            drains = Queues[str](tasks, self._drainer.step)
            tasks.start_soon(self._migrations, migrations, drains)
            tasks.start_soon(self._drains, drains)
            tasks.start_soon(self._pods, migrations)
            tasks.start_soon(self._requests, requests)

    async def _migrations(self, queue: Queues[Key], drains: Queues[str]) -> None:
        async for what, one in follow(self._api, MIGRATIONS):
            about = one["metadata"]
            if (drain := self._drain_of(one)) is not None and "completionTime" in (one.get("status") or {}):
                drains.put(drain)
            key = about["namespace"], about["name"]
            if what == "DELETED":
                self._of_uid.pop(about["uid"], None)
            else:
                self._of_uid[about["uid"]] = key
            queue.put(key)

    async def _drains(self, queue: Queues[str]) -> None:
        async for what, one in follow(self._api, NODE_DRAINS):
            about = one["metadata"]
            if what == "DELETED":
                self._drain_of_uid.pop(about["uid"], None)
            else:
                self._drain_of_uid[about["uid"]] = about["name"]
                queue.put(about["name"])

    def _drain_of(self, migration: Json) -> str | None:
        """The NodeDrain that made the Migration. Whoever may write Migrations can write any owner's name into one, so the owner is
        known by its uid.
        """
        owners = migration["metadata"].get("ownerReferences") or []
        return next((self._drain_of_uid[one["uid"]] for one in owners if one["uid"] in self._drain_of_uid), None)

    async def _pods(self, queue: Queues[Key]) -> None:
        async for _, pod in follow(self._api, PODS, labels={UID_LABEL: None}):
            uid = pod["metadata"]["labels"].get(UID_LABEL, "")
            if uid in self._of_uid:
                queue.put(self._of_uid[uid])

    async def _requests(self, queue: Queues[str]) -> None:
        async for what, one in follow(self._api, SIGNING_REQUESTS, fields={"spec.signerName": SIGNER}):
            if what != "DELETED":
                queue.put(one["metadata"]["name"])


def main() -> None:
    """The program. Ends with 0 after SIGTERM, with 1 when it lost the lease (to be started anew), 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="podferry-controller", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kubeconfig", type=Path, help="the cluster; default: in-cluster, $KUBECONFIG, ~/.kube/config")
    parser.add_argument(
        "--namespace",
        default=os.environ.get("POD_NAMESPACE", "podferry-system"),
        help="where the lease and the authority are; default: $POD_NAMESPACE or podferry-system",
    )
    parser.add_argument(
        "--image",
        default=os.environ.get("PODFERRY_IMAGE", Settings.image),
        help="what placeholder pods run; it must have `sleep`; default: $PODFERRY_IMAGE or %(default)s",
    )
    parser.add_argument(
        "--scheduling-patience",
        type=float,
        default=Settings.scheduling,
        metavar="S",
        help="give a move up when no node was found for so long; default: %(default)s",
    )
    parser.add_argument("--version", action="version", version=__version__)
    arguments = parser.parse_args()
    log_json_lines()
    settings = Settings(image=arguments.image, scheduling=arguments.scheduling_patience)
    try:
        if anyio.run(_work, arguments.kubeconfig, arguments.namespace, settings):
            sys.exit(1)
    except PodferryError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


async def _work(kubeconfig: Path | None, namespace: str, settings: Settings) -> bool:
    """Lead until told to stop (False) or the lease is lost (True)."""
    lost = True
    async with Api.open(kubeconfig) as api, anyio.create_task_group() as tasks:

        async def until_told() -> None:
            nonlocal lost
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    lost = False
                    tasks.cancel_scope.cancel()
                    return

        tasks.start_soon(until_told)
        identity = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        await Leader(api, namespace, LEASE, identity).lead(Controller(api, namespace, settings).run)
        tasks.cancel_scope.cancel()
    return lost

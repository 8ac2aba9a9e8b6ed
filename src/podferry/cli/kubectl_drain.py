"""What `kubectl podferry drain` does in the cluster, and what it prints. The drain's state is its NodeDrain object: the terminal
only asks for it and shows it, and may be closed at any time.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
from rich.live import Live
from rich.table import Table

from podferry.cli.kubectl_moves import ClusterOptions
from podferry.cli.terminal import print_json, stderr, stdout, words
from podferry.core.drain import DrainPhase, PodState
from podferry.errors import Refused, UsageError
from podferry.kube.api_errors import Conflict, ObjectNotFound
from podferry.kube.client import NODE_DRAINS, NODES, Api
from podferry.kube.drain import NodeDrain, PodDrain
from podferry.kube.watch import follow

Json = dict[str, Any]
Show = Callable[[NodeDrain], None]

STYLE = {
    PodState.WAITING: "",
    PodState.MOVING: "cyan",
    PodState.MOVED: "bold green",
    PodState.EVICTING: "yellow",
    PodState.GONE: "dim",
    PodState.LEFT: "bold yellow",
}


class Interrupted(Exception):
    """Ctrl-C: the drain goes on in the cluster."""


def deadline(seconds: int) -> str:
    """So many seconds from now on, as the API server takes it."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


async def begin(where: ClusterOptions, node: str, spec: Json) -> NodeDrain:
    """Ask for the drain, or resume the one that is there with this `spec`. Raises `UsageError` where there is no such node."""
    async with where.open() as (api, _):
        if await api.find(NODES, node) is None:
            raise UsageError(f"there is no node {node}", remedy="kubectl get nodes")
        found = await api.find(NODE_DRAINS, node)
        if found is not None and not NodeDrain.from_json(found).ended:
            changes = {name: value for name, value in spec.items() if name != "mode"}
            return await _change(api, found, {**changes, "stop": False})
        if found is not None:
            await api.delete(NODE_DRAINS, node, uid=found["metadata"]["uid"])
        try:
            spec = {**spec, **({"requestedBy": name} if (name := await api.whoami()) else {})}
            return NodeDrain.from_json(await api.create(NODE_DRAINS, {"metadata": {"name": node}, "spec": spec}))
        except ObjectNotFound as absent:
            raise Refused(
                "the cluster has no resource NodeDrain",
                why=absent.why,
                remedy="install podferry: kubectl apply -k deploy/ (docs/kubernetes.md)",
            ) from absent


async def stop(where: ClusterOptions, node: str) -> NodeDrain:
    """Begin no further move. Raises `UsageError` where the node is not being drained."""
    async with where.open() as (api, _):
        found = await api.find(NODE_DRAINS, node)
        if found is None or NodeDrain.from_json(found).ended:
            raise UsageError(f"node {node} is not being drained", remedy="kubectl get nodedrains")
        return await _change(api, found, {"stop": True})


async def _change(api: Api, found: Json, spec: Json) -> NodeDrain:
    """This very drain: another one may have its name by now, which somebody asked for otherwise."""
    about = found["metadata"]
    try:
        changed = await api.patch(NODE_DRAINS, about["name"], {"spec": spec}, uid=about["uid"])
    except (Conflict, ObjectNotFound) as gone:
        raise UsageError(
            f"the drain of {about['name']} was deleted just now", remedy="see kubectl get nodedrains, and try again"
        ) from gone
    return NodeDrain.from_json(changed)


async def to_the_end(where: ClusterOptions, drain: NodeDrain, *, json: bool) -> NodeDrain:
    """Show how far it is until it has ended or was stopped. Raises `Interrupted` after Ctrl-C."""
    async with where.open() as (api, _):
        if json:
            return await _follow(api, drain, lambda now: print_json(now.to_json(), indent=None))
        if not stderr().is_terminal:
            return await _follow(api, drain, _Lines())
        with Live(table(drain), console=stderr(), refresh_per_second=4) as live:
            return await _follow(api, drain, lambda now: live.update(table(now)))


async def _follow(api: Api, drain: NodeDrain, show: Show) -> NodeDrain:
    ended: list[NodeDrain] = []
    interrupted = False
    async with anyio.create_task_group() as tasks:

        async def until_interrupt() -> None:
            nonlocal interrupted
            with anyio.open_signal_receiver(signal.SIGINT) as signals:
                async for _ in signals:
                    interrupted = True
                    tasks.cancel_scope.cancel()
                    return

        tasks.start_soon(until_interrupt)
        async for what, body in follow(api, NODE_DRAINS, fields={"metadata.name": drain.name}):
            if body["metadata"]["uid"] != drain.uid:
                continue
            if what == "DELETED":
                break
            now = NodeDrain.from_json(body)
            show(now)
            if now.ended or (now.spec.stop and now.status.phase is DrainPhase.STOPPED):
                ended.append(now)
                break
        tasks.cancel_scope.cancel()
    if interrupted:
        raise Interrupted
    if not ended:
        raise UsageError(
            f"the drain of {drain.name} was deleted", why="it had not ended; the controller rolls its moves back"
        )
    return ended[0]


class _Lines:
    """A line for each change, where there is no terminal."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, str]] = {}

    def __call__(self, drain: NodeDrain) -> None:
        """Say what is new."""
        for one in drain.status.pods:
            new = (str(one.state), "" if one.state is PodState.MOVING else one.message)
            if self._said.get(one.uid) != new:
                self._said[one.uid] = new
                stderr().print(words(f"{one.namespace}/{one.name}: {one.state.lower()}{_detail(one)}"))


def _detail(one: PodDrain) -> str:
    parts = [f"to {one.node}" if one.node else "", f"stopped for {one.downtime}" if one.downtime else "", one.message]
    said = ", ".join(filter(None, parts))
    return f" {said}" if said else ""


def table(drain: NodeDrain) -> Table:
    """The pods, a line each."""
    shown = Table(
        "NAMESPACE", "POD", "STATE", "TO", "TIME", "DOWNTIME", "", box=None, pad_edge=False, header_style="bold"
    )
    for one in drain.status.pods:
        shown.add_row(
            words(one.namespace),
            words(one.name),
            words(one.state, STYLE[one.state]),
            words(one.node),
            words(f"~{one.estimate}" if one.estimate and one.state in (PodState.WAITING, PodState.MOVING) else ""),
            words(one.downtime),
            words(one.message),
        )
    shown.caption = f"{drain.name}: {drain.status.phase}, {drain.status.summary or 'looking at its pods'}"
    if drain.spec.deadline:
        shown.caption += f"; it goes away at {drain.spec.deadline}" + (
            f" ({drain.spec.cause})" if drain.spec.cause else ""
        )
    if drain.status.remaining:
        shown.caption += f"; about {drain.status.remaining} left, by the moves that this cluster remembers"
    return shown


def print_end(drain: NodeDrain) -> None:
    """How it ended, and what is left to do."""
    stdout().print(table(drain))
    if drain.status.phase is DrainPhase.INCOMPLETE:
        stderr().print(
            words(
                f"{drain.status.left} pods stay on {drain.name}. What to do: end them, or evict them, which loses their "
                f"computed work: kubectl podferry drain {drain.name} --evict-others",
                "yellow",
            )
        )

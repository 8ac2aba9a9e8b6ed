"""What `kubectl podferry drain --dry-run` says of each pod: what would become of it, where it could go, and how long that takes."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from podferry.cli.kubectl_moves import ClusterOptions
from podferry.cli.terminal import stderr, stdout, words
from podferry.controller import drains, eligibility, failures, placement
from podferry.controller.measuring import expected as expected_of
from podferry.controller.measuring import measured
from podferry.controller.policies import Policies, forbids
from podferry.controller.surroundings import Surveyor
from podferry.core.drain import DrainedPod, plan
from podferry.core.estimate import Estimate, together
from podferry.errors import UsageError
from podferry.kube.api_errors import Forbidden
from podferry.kube.client import MIGRATIONS, NODES, PODS, Api
from podferry.kube.quantities import duration

Json = dict[str, Any]

PARALLEL = 2


async def preview(where: ClusterOptions, node: str, *, evict_others: bool) -> list[Json]:
    """What a drain would do with each pod of the node, in the order of their moves. Nothing is touched."""
    async with where.open() as (api, _):
        return await look(api, node, evict_others=evict_others)


async def look(api: Api, node: str, *, evict_others: bool) -> list[Json]:
    """As `preview`."""
    if await api.find(NODES, node) is None:
        raise UsageError(f"there is no node {node}", remedy="kubectl get nodes")
    found, _ = await api.list(PODS, fields={"spec.nodeName": node})
    leaving = {one["metadata"]["uid"]: one for one in found if drains.has_to_leave(one)}
    view = drains.DrainView(api)
    survey, policies = Surveyor(view), Policies(view)
    obstacles = {uid: eligibility.obstacles(pod, await survey.around(pod)) for uid, pod in leaving.items()}
    of = {uid: await policies.of(pod) for uid, pod in leaving.items()}
    for uid, policy in of.items():
        obstacles[uid] += [no] if (no := forbids(policy)) is not None else []
    earlier = measured((await api.list(MIGRATIONS))[0])
    others = await _other_nodes(api, node)
    judged = [
        DrainedPod(
            uid,
            started=str((pod.get("status") or {}).get("startTime") or ""),
            priority=drains.priority(pod, of[uid]),
            obstacle="; ".join(str(one) for one in obstacles[uid]),
        )
        for uid, pod in leaving.items()
    ]
    what = plan(judged, parallel=len(judged), evict_others=evict_others)
    order = [*what.move, *(uid for uid in what.states if uid not in what.move)]
    rows = []
    for uid in order:
        pod, moves = leaving[uid], uid in what.move
        expected = expected_of(pod, earlier) if moves else None
        allowed = (
            None
            if others is None or not moves
            else [name for name, labels in others.items() if placement.allows(pod, labels)]
        )
        rows.append(
            {
                "namespace": pod["metadata"]["namespace"],
                "pod": pod["metadata"]["name"],
                "action": "move" if moves else "evict" if uid in what.evict else "leave",
                "nodes": allowed,
                "estimate": _shown(expected),
                "policy": of[uid].name,
                "refusals": [{**one.to_dict(), "reason": one.reason} for one in obstacles[uid]],
            }
        )
    return rows


def _shown(expected: Estimate | None) -> Json | None:
    if expected is None:
        return None
    return {"seconds": expected.seconds, "downtime_seconds": expected.downtime, "moves": expected.moves}


async def _other_nodes(api: Api, node: str) -> dict[str, dict[str, str]] | None:
    """The labels of the nodes that take pods of `node`; None where they may not be read."""
    try:
        nodes, _ = await api.list(NODES)
    except Forbidden:
        return None
    fit = [one for one in nodes if failures.ready(one) and not (one.get("spec") or {}).get("unschedulable")]
    not_to = {node, *placement.of_other_runtimes(nodes, node)}
    return {
        one["metadata"]["name"]: one["metadata"].get("labels") or {}
        for one in fit
        if one["metadata"]["name"] not in not_to
    }


def print_preview(node: str, rows: list[Json]) -> None:
    """For people."""
    shown = Table(
        "NAMESPACE", "POD", "ACTION", "TO", "TIME", "STOP", "WHY", box=None, pad_edge=False, header_style="bold"
    )
    styles = {"move": "green", "evict": "yellow", "leave": "bold yellow"}
    for one in rows:
        why = "; ".join(
            f"{refusal['what']}{': ' + refusal['why'] if refusal['why'] else ''}" for refusal in one["refusals"]
        )
        expected = one["estimate"]
        shown.add_row(
            words(one["namespace"]),
            words(one["pod"]),
            words(one["action"], styles[one["action"]]),
            words("" if one["nodes"] is None else _to(one["nodes"])),
            words(f"~{duration(expected['seconds'])}" if expected else "?" * (one["action"] == "move")),
            words(f"~{duration(expected['downtime_seconds'])}" if expected else "?" * (one["action"] == "move")),
            words(why),
        )
    if not rows:
        stderr().print(words(f"{node} has no pods that a drain would move"))
        return
    known = [one["estimate"]["seconds"] for one in rows if one["estimate"]]
    if known:
        moves = next(one["estimate"]["moves"] for one in rows if one["estimate"])
        all_of_it = duration(together(known, PARALLEL))
        shown.caption = (
            f"two at a time: ~{all_of_it}; by memory requests and the {moves} moves that this cluster remembers"
        )
    stdout().print(shown)


def _to(nodes: list[str]) -> str:
    return nodes[0] if len(nodes) == 1 else f"one of {len(nodes)} nodes" if nodes else "no node is allowed"

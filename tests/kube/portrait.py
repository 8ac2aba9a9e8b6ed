"""What a namespace looks like, in words: a wait that ran out of time shows it, so that a failure explains itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio

from podferry.errors import PodferryError
from podferry.kube.client import DEPLOYMENTS, EVENTS, JOBS, MIGRATIONS, PODS, REPLICASETS, Api, Json, ResourceKind

PATIENCE = 10.0
LAST_EVENTS = 40


def name_of(holds: Callable[..., Any]) -> str:
    """Which wait it was: the function's name, its lines and what they close over."""
    while isinstance(holds, partial):
        holds = holds.func
    known = {name: repr(value)[:300] for name, value in inspect.getclosurevars(holds).nonlocals.items()}
    return f"{holds.__qualname__}\n{inspect.getsource(holds)}with {known}"


async def portrait(api: Api, namespace: str) -> str:
    """Everything there that may explain why something did not come to be."""
    lines: list[str] = []
    for kind, line in KINDS:
        try:
            with anyio.fail_after(PATIENCE):
                items, _ = await api.list(kind, namespace)
        except (PodferryError, TimeoutError) as error:
            lines.append(f"{kind.plural}: {error!r}")
            continue
        lines += [f"{kind.kind} {line(one)}" for one in items]
    return "\n".join([*lines, *await _events(api, namespace)])


async def _events(api: Api, namespace: str) -> list[str]:
    try:
        with anyio.fail_after(PATIENCE):
            items, _ = await api.list(EVENTS, namespace)
    except (PodferryError, TimeoutError) as error:
        return [f"events: {error!r}"]
    told = sorted((one["metadata"]["creationTimestamp"], _event(one)) for one in items)
    return [f"Event {when} {what}" for when, what in told[-LAST_EVENTS:]]


def _event(one: Json) -> str:
    about = one.get("regarding") or {}
    return f"{about.get('kind')} {about.get('name')}: {one.get('reason')}: {one.get('note')}"


def _metadata(one: Json) -> Json:
    about = one["metadata"]
    keep = ("name", "uid", "labels", "annotations", "finalizers", "deletionTimestamp", "resourceVersion")
    owners = [f"{owner['kind']} {owner['name']}" for owner in about.get("ownerReferences") or []]
    return {**{name: about[name] for name in keep if about.get(name)}, "owners": owners}


def _conditions(one: Json) -> list[str]:
    return [
        f"{it['type']}={it['status']} {it.get('reason', '')} {it.get('message', '')}".strip()
        for it in (one.get("status") or {}).get("conditions") or []
    ]


def _pod(one: Json) -> str:
    where, phase = one["spec"].get("nodeName"), (one.get("status") or {}).get("phase")
    return f"{_metadata(one)} on {where} is {phase}: {_conditions(one)}"


def _whole_status(one: Json) -> str:
    status = {name: value for name, value in (one.get("status") or {}).items() if name != "conditions"}
    wanted = {name: one["spec"][name] for name in ("replicas", "parallelism", "completions") if name in one["spec"]}
    return f"{_metadata(one)} wants {wanted}, has {status}: {_conditions(one)}"


KINDS: list[tuple[ResourceKind, Callable[[Json], str]]] = [
    (PODS, _pod),
    *((kind, _whole_status) for kind in (REPLICASETS, DEPLOYMENTS, JOBS, MIGRATIONS)),
]

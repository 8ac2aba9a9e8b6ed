"""`--requests` and `--limits` of `kubectl podferry migrate`, as a Migration's `spec.resources`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from podferry.cli.kubectl_moves import ClusterOptions
from podferry.controller.eligibility import containers
from podferry.errors import UsageError
from podferry.kube.client import PODS
from podferry.kube.resources import AMOUNT, CPU, DISK, MEMORY

Json = dict[str, Any]

KINDS = (CPU, MEMORY, DISK)
FORM = "[CONTAINER:]RESOURCE=AMOUNT,..."


def parse(kind: str, given: Iterable[str]) -> list[tuple[str, str, dict[str, str]]]:
    """What was typed: the container (empty: the pod's only one), `kind`, and the amounts. Raises `UsageError`.

    >>> parse("limits", ["main:cpu=2,memory=4Gi"])
    [('main', 'limits', {'cpu': '2', 'memory': '4Gi'})]
    """
    found = []
    for text in given:
        container, _, pairs = text.rpartition(":")
        amounts = {}
        for pair in pairs.split(","):
            name, _, value = pair.partition("=")
            if name not in KINDS or not re.fullmatch(AMOUNT, value):
                raise UsageError(
                    f"--{kind} {text} is not understood",
                    why=f"it is {FORM}, with {', '.join(KINDS)}",
                    remedy=f"--{kind} main:cpu=2,memory=4Gi",
                )
            amounts[name] = value
        found.append((container, kind, amounts))
    return found


def of_containers(typed: Iterable[tuple[str, str, dict[str, str]]], there: Sequence[str]) -> list[Json]:
    """`spec.resources` for a pod with the containers `there`. Raises `UsageError` where it is not clear which one is meant."""
    merged: dict[str, Json] = {}
    for container, kind, amounts in typed:
        if not container and len(there) != 1:
            raise UsageError(
                "which container is meant is not clear", why=f"the pod has {', '.join(there)}", remedy=FORM
            )
        one = merged.setdefault(container or there[0], {"name": container or there[0]})
        one[kind] = {**one.get(kind, {}), **amounts}
    return list(merged.values())


async def resources(where: ClusterOptions, pod: str, requests: Sequence[str], limits: Sequence[str]) -> list[Json]:
    """`spec.resources` for the pod."""
    typed = [*parse("requests", requests), *parse("limits", limits)]
    if all(container for container, _, _ in typed):
        return of_containers(typed, ())
    async with where.open() as (api, namespace):
        found = await api.find(PODS, pod, namespace)
    if found is None:
        raise UsageError(f"there is no pod {pod} in namespace {namespace}", remedy=f"kubectl get pods -n {namespace}")
    return of_containers(typed, [one["name"] for one in containers(found)])

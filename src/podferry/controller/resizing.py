"""May the containers of a pod have the requests and limits that a Migration asks for? Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from podferry.controller.eligibility import PodUnfit, containers, unfit
from podferry.kube.resources import ContainerResources, beyond, resized

Json = dict[str, Any]

RESOURCES_INVALID = "ResourcesInvalid"


def misfits(pod: Json, wanted: Sequence[ContainerResources]) -> Iterator[PodUnfit]:
    """What is wrong with what is wanted. Whether a job fits into a memory limit, its node's agent knows."""
    there = {one["name"]: one for one in containers(pod)}
    for one in wanted:
        if one.name not in there:
            yield unfit(
                RESOURCES_INVALID,
                f"the pod has no container {one.name} that moves",
                why=f"it has {', '.join(there)}",
                remedy="name one of these in spec.resources",
            )
        elif wrong := beyond(resized(there[one.name], wanted)):
            yield unfit(
                RESOURCES_INVALID,
                f"container {one.name} would ask for more than it may have",
                why="; ".join(wrong),
                remedy="what spec.resources does not say stays as it is in the pod: say both the request and the limit",
            )

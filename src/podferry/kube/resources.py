"""Other requests and limits for the containers of a pod that moves: what a Migration's `spec.resources` asks for. Pure."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from podferry.kube.objects import ObjectPart

Json = dict[str, Any]

MEMORY, CPU, DISK = "memory", "cpu", "ephemeral-storage"
AMOUNT = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
LONGEST_AMOUNT, MOST_CONTAINERS = 32, 64
_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)|[eE]([+-]?[0-9]{1,2}))?")
_SUFFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0}
_SUFFIXES |= {name: 1e3**power for power, name in enumerate("kMGTPE", 1)}
_SUFFIXES |= {f"{name}i": 1024.0**power for power, name in enumerate("KMGTPE", 1)}


def amount(text: object) -> float | None:
    """How much a quantity of Kubernetes is, in bytes or processors; None where it is none that podferry reads.

    >>> amount("1.5Gi"), amount("250m"), amount(2), amount("1e3"), amount("much")
    (1610612736.0, 0.25, 2.0, 1000.0, None)
    """
    found = _WRITTEN.fullmatch(str(text))
    if found is None:
        return None
    return float(found[1]) * (10.0 ** int(found[3]) if found[3] else _SUFFIXES[found[2] or ""])


def _an_amount(description: str) -> Any:
    return Field(description=description, pattern=AMOUNT, max_length=LONGEST_AMOUNT)


class Amounts(ObjectPart):
    """Of what a container asks for, or may have at most."""

    cpu: Annotated[str | None, _an_amount("Processors, e.g. 2 or 500m.")] = None
    memory: Annotated[str | None, _an_amount("Bytes, e.g. 4Gi.")] = None
    ephemeral_storage: Annotated[
        str | None,
        Field(
            description="Bytes of the node's disk, e.g. 10Gi.",
            pattern=AMOUNT,
            max_length=LONGEST_AMOUNT,
            alias=DISK,
        ),
    ] = None

    def given(self) -> dict[str, str]:
        """What is said, as a pod says it."""
        named = {CPU: self.cpu, MEMORY: self.memory, DISK: self.ephemeral_storage}
        return {name: value for name, value in named.items() if value is not None}


class ContainerResources(ObjectPart):
    """What one container of the target pod has instead of what it had on the source."""

    name: Annotated[str, Field(description="The container.", min_length=1, max_length=63)]
    requests: Annotated[Amounts, Field(description="What the scheduler keeps for it.")] = Field(default_factory=Amounts)
    limits: Annotated[Amounts, Field(description="What it may have at most.")] = Field(default_factory=Amounts)


def resized(container: Json, wanted: Iterable[ContainerResources]) -> Json:
    """The container with what is wanted of it; what is not said stays as it is."""
    found = copy.deepcopy(container)
    for one in wanted:
        if one.name == container["name"]:
            resources = found.setdefault("resources", {})
            for kind, amounts in (("requests", one.requests), ("limits", one.limits)):
                if given := amounts.given():
                    resources[kind] = {**(resources.get(kind) or {}), **given}
    return found


def beyond(container: Json) -> list[str]:
    """What a container asks for beyond its own limits, in words."""
    resources = container.get("resources") or {}
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    return [
        f"{name}: the request {requests[name]} is beyond the limit {limits[name]}"
        for name in sorted({*requests} & {*limits})
        if (asked := amount(requests[name])) is not None and (most := amount(limits[name])) is not None and asked > most
    ]


def memory_limits(wanted: Iterable[ContainerResources]) -> Mapping[str, int]:
    """Bytes of memory that each container may have from now on, where another limit is wanted."""
    found = {one.name: amount(one.limits.memory) for one in wanted if one.limits.memory is not None}
    return {name: int(most) for name, most in found.items() if most is not None}

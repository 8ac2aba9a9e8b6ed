"""How the containers and volumes of a pod are told apart on the wire, where a container alone needs no number.

A pod's containers are numbered from 0, in the order in which the kubelet starts them. Container `n` has

- the spaces `n << 22 | pid`, since every container counts its processes from 1 and the kernel allows 2^22 of them;
- the tree `n`, its upper layer; the volumes' trees follow those of all containers;
- the directories `2n`, CRIU's images, and `2n + 1`, its log.

So the first container of a pod, and a container alone, are numbered alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from podferry.engine.ports import Change
from podferry.errors import PeerMisbehaved
from podferry.memory.ranges import Runs
from podferry.wire.frames import Drop, Pages
from podferry.wire.messages import FileSum, SpaceSum, StateEnd, TreeSum

PID_BITS = 22
PIDS = (1 << PID_BITS) - 1
MOST_CONTAINERS = 64


def space_of(part: int, pid: int) -> int:
    """The space of process `pid` of container `part`."""
    return part << PID_BITS | pid


def container_of_space(space: int) -> tuple[int, int]:
    """The inverse of `space_of`: (container, pid)."""
    return space >> PID_BITS, space & PIDS


def directory_of(part: int, directory: int) -> int:
    """The directory that is `directory` (IMAGES or LOG) of container `part`."""
    return 2 * part + directory


def container_of_directory(directory: int) -> tuple[int, int]:
    """The inverse of `directory_of`."""
    return divmod(directory, 2)


def numbered(part: int, frames: Iterable[Pages | Drop]) -> Iterable[Pages | Drop]:
    """The frames of one container, as they travel."""
    return (replace(frame, space=space_of(part, frame.space)) for frame in frames)


def joined(changes: Iterable[Change]) -> Change:
    """What was found in each container, in order, as one."""

    def all_of(kind: str) -> dict[int, Runs]:
        return {
            space_of(part, pid): runs
            for part, change in enumerate(found)
            for pid, runs in getattr(change, kind).items()
        }

    found = list(changes)
    return Change(all_of("written"), all_of("dropped"))


def split(change: Change, parts: int) -> list[Change]:
    """The inverse of `joined`."""

    def of(part: int, spaces: Mapping[int, Runs]) -> dict[int, Runs]:
        return {space & PIDS: runs for space, runs in spaces.items() if space >> PID_BITS == part}

    return [Change(of(part, change.written), of(part, change.dropped)) for part in range(parts)]


def end_of(part: int, end: StateEnd) -> StateEnd:
    """What concerns container `part`, by its own numbers."""
    return StateEnd(
        end.migration,
        tuple(replace(one, directory=one.directory % 2) for one in end.files if one.directory // 2 == part),
        tuple(SpaceSum(one.space & PIDS, one.pages) for one in end.spaces if one.space >> PID_BITS == part),
        tuple(replace(one, tree=0) for one in end.trees if one.tree == part),
    )


def demand_known(end: StateEnd, containers: int, trees: int) -> None:
    """Raise `PeerMisbehaved` where `end` speaks of containers or trees that the pod has not."""
    strange: list[FileSum | SpaceSum | TreeSum] = [one for one in end.files if one.directory // 2 >= containers]
    strange += [one for one in end.spaces if one.space >> PID_BITS >= containers]
    strange += [one for one in end.trees if one.tree >= trees]
    if strange:
        raise PeerMisbehaved("the source speaks of containers that the pod has not", why=str(strange[0]))

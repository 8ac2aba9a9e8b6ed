"""How the containers and volumes of a workload are told apart on the wire.

The containers are numbered from 0, in the order in which the kubelet starts them. Container `n` has

- the spaces `n << 22 | pid`, since every container counts its processes from 1 and the kernel allows 2^22 of them;
- the tree `n`, its upper layer; the volumes' trees follow those of all containers;
- the directories `2n`, CRIU's images, and `2n + 1`, its log.

A container gives its pages and files these numbers when it makes their frames, and nobody between it and the container on the
target changes them.
"""

from __future__ import annotations

from podferry.errors import Failed, PeerMisbehaved
from podferry.node.upper import Receiver
from podferry.wire.messages import AddressSpaceSum, FileSum, StateEnd, TreeSum

PID_BITS = 22
PIDS = (1 << PID_BITS) - 1
MOST_CONTAINERS = 64


def address_space_of(container: int, pid: int) -> int:
    """The space of process `pid` of a container."""
    return container << PID_BITS | pid


def container_of_address_space(address_space: int) -> tuple[int, int]:
    """The inverse of `address_space_of`: (container, pid)."""
    return address_space >> PID_BITS, address_space & PIDS


def directory_of(container: int, directory: int) -> int:
    """The directory that is `directory` (IMAGES or LOG) of a container."""
    return 2 * container + directory


def container_of_directory(directory: int) -> int:
    """The container that a directory is of."""
    return directory // 2


def demand_known(end: StateEnd, containers: int, trees: int) -> None:
    """Raise `PeerMisbehaved` where `end` speaks of containers or trees that the workload has not."""
    strange: list[FileSum | AddressSpaceSum | TreeSum] = [
        one for one in end.files if container_of_directory(one.directory) >= containers
    ]
    strange += [one for one in end.address_spaces if container_of_address_space(one.address_space)[0] >= containers]
    strange += [one for one in end.trees if one.tree >= trees]
    if strange:
        raise PeerMisbehaved(
            "the source names a container or a tree of files that the workload does not have", why=str(strange[0])
        )


def demand_whole(receiver: Receiver | None, number: int, end: StateEnd, what: str) -> None:
    """Raise `Failed` unless the tree `number` came as the source sent it."""
    sent = next((one for one in end.trees if one.tree == number), None)
    came = receiver.finish() if receiver is not None else None
    if came is None or sent != TreeSum(number, came.entries, came.bytes, came.digest):
        raise Failed(f"{what} did not arrive whole", why=f"{came} is not {sent}")

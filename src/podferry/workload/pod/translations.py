"""What a node knows of its pods' connections that go on although an end has another address: written down, and held to in their
network namespaces (`podferry.node.address_rewriting`).

There is a file for each pod. It is written before the rules are changed, so that an agent that was killed makes them what they must
be. What a Migration that has not ended asked for is `pending`: it may be taken back. After that a connection's rules stay until it
has ended, or the pod is gone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from podferry.core.connections import End
from podferry.core.translation import Translation
from podferry.errors import Failed
from podferry.fs.private import private_directory
from podferry.fs.replacing import replace_file
from podferry.node.address_rewriting import establish
from podferry.node.netlink import addresses as addresses_here
from podferry.node.netlock import Namespace
from podferry.node.netns import in_network_at, on_node
from podferry.node.runtime import ContainerRuntime
from podferry.node.sockets import open_here
from podferry.workload.pod.cluster_port import Cluster, MigrationName
from podferry.workload.threads import run

Ends = tuple[End, End]


@dataclass(frozen=True)
class HeldTranslation:
    """A connection of a pod of this node. `pending` is the Migration that may still be taken back; `before` is what held before it,
    if anything did."""

    now: Translation
    before: Translation | None = None
    pending: MigrationName | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it is written down."""
        return {
            "now": self.now.to_dict(),
            "before": self.before and self.before.to_dict(),
            "pending": self.pending and asdict(self.pending),
        }

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> HeldTranslation:
        """What `to_dict` made."""
        before, pending = told["before"], told["pending"]
        return HeldTranslation(
            Translation.from_dict(told["now"]),
            Translation.from_dict(before) if before else None,
            MigrationName(**pending) if pending else None,
        )


@dataclass(frozen=True)
class OfPod:
    """What is known of one pod's connections, and its network namespace."""

    network: Namespace
    known: tuple[HeldTranslation, ...]

    def encode(self) -> bytes:
        """As it is written down."""
        return json.dumps({"network": asdict(self.network), "known": [one.to_dict() for one in self.known]}).encode()

    @staticmethod
    def decode(data: bytes) -> OfPod:
        """What `encode` made."""
        told = json.loads(data)
        return OfPod(Namespace(**told["network"]), tuple(map(HeldTranslation.from_dict, told["known"])))


class PodTranslations:
    """Those of the pods of one node, in files in `directory`, which is `below` the agent's state. Threads may call it."""

    def __init__(self, directory: Path, below: Path, runtime: ContainerRuntime) -> None:
        self._directory, self._below, self._runtime = directory, below, runtime
        self._lock = threading.RLock()

    def pods(self) -> list[str]:
        """The uids of the pods that have such connections."""
        try:
            return sorted(one.name for one in self._directory.iterdir() if not one.name.startswith("."))
        except FileNotFoundError:
            return []

    def of(self, uid: str) -> dict[Ends, HeldTranslation]:
        """A pod's connections with another address at an end, by the ends that its sockets have."""
        found = self._read(uid)
        return {one.now.ends: one for one in found.known} if found else {}

    def network(self, uid: str) -> Namespace:
        """A pod's network namespace. Raises `Failed` where no container of it is here."""
        for one in self._runtime.pod(uid).values():
            with suppress(OSError):
                return Namespace.of(one.record.spec_json(), 0)
        raise Failed(f"there is no pod with the uid {uid[:64]} on this node")

    def open_in(self, network: Namespace) -> set[Ends]:
        """The connections that are open in a network namespace."""
        return in_network_at(on_node(network.path), open_here)

    def take(self, uid: str, network: Namespace, found: Iterable[Translation], pending: MigrationName) -> None:
        """Have these connections of a pod go on. Raises `Failed` and `OSError`."""
        with self._lock:
            before = {one.now.ends: one for one in self._known(uid)}
            for one in found:
                earlier = before.get(one.ends)
                if earlier is not None and earlier.pending == pending:
                    before[one.ends] = replace(earlier, now=one)
                else:
                    before[one.ends] = HeldTranslation(one, earlier.now if earlier else None, pending)
            self._write(uid, OfPod(network, tuple(before.values())))

    def forget(self, uid: str) -> None:
        """Rewrite nothing of a pod's any more. Where its namespace is gone, the rules went with it."""
        with self._lock:
            found = self._read(uid)
            if found is not None:
                _hold(found.network, ())
                self.leave(uid)

    def leave(self, uid: str) -> None:
        """The pod goes, and its rules with it: until then they keep its end of the connections silent."""
        (self._directory / uid).unlink(missing_ok=True)

    def settle(self, uid: str, migration: MigrationName, *, moved: bool) -> None:
        """A Migration has ended: what it asked for holds if the other pod has `moved`, and what held before if it has not."""
        with self._lock:
            found = self._read(uid)
            if found is None:
                return
            known = []
            for one in found.known:
                if one.pending != migration:
                    known.append(one)
                elif moved:
                    known.append(HeldTranslation(one.now))
                elif one.before is not None:
                    known.append(HeldTranslation(one.before))
            self._write(uid, replace(found, known=tuple(known)))

    def prune(self, uid: str) -> None:
        """Forget what has ended."""
        with self._lock:
            found = self._read(uid)
            if found is None:
                return
            if not self._runtime.holds_pod(uid) or not found.network.there():
                self.forget(uid)
                return
            there = self.open_in(found.network)
            left = tuple(one for one in found.known if one.pending or one.now.ends in there)
            if left != found.known:
                self._write(uid, replace(found, known=left))

    def pending(self, uid: str) -> set[MigrationName]:
        """The Migrations that may still be taken back."""
        return {one.pending for one in self._known(uid) if one.pending}

    def establish(self) -> None:
        """Make the rules what they must be, in every pod."""
        for uid in self.pods():
            with self._lock:
                found = self._read(uid)
                if found is not None and found.network.there():
                    try:
                        _hold(found.network, found.known)
                    except (Failed, OSError) as error:
                        structlog.get_logger().error("a pod's connections are not held", pod=uid, error=str(error))

    def _known(self, uid: str) -> tuple[HeldTranslation, ...]:
        found = self._read(uid)
        return found.known if found else ()

    def _read(self, uid: str) -> OfPod | None:
        try:
            return OfPod.decode((self._directory / uid).read_bytes())
        except FileNotFoundError:
            return None

    def _write(self, uid: str, what: OfPod) -> None:
        if not what.known:
            return self.forget(uid)
        private_directory(self._directory, below=self._below)
        replace_file(self._directory / uid, what.encode())
        return _hold(what.network, what.known)


def _hold(network: Namespace, known: Collection[HeldTranslation]) -> None:
    if network.there():
        needed = [one.now for one in known if one.now.is_needed]
        in_network_at(on_node(network.path), lambda: establish(needed))


async def settle_ended(uid: str, cluster: Cluster, here: PodTranslations) -> None:
    """Ask how the Migrations have ended that a pod's connections depend on, and do what follows from it."""
    for migration in await run(here.pending, uid):
        if (moved := await cluster.moved(migration)) is not None:
            await run(partial(here.settle, uid, migration, moved=moved))


def own_addresses(network: Namespace) -> list[Any]:
    """The addresses of a pod's interfaces but loopback."""
    found = in_network_at(on_node(network.path), addresses_here)
    return [one.ip for index, of_interface in sorted(found.items()) if index != 1 for one in of_interface]


def remove_all(directory: Path, report: Callable[[str], None]) -> None:
    """Take the rules out of every pod of this node: podferry goes."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        try:
            _hold(OfPod.decode(path.read_bytes()).network, ())
        except (Failed, OSError, ValueError, KeyError, TypeError) as error:
            report(f"the rules for connections of the pod {path.name} stay: {error}")

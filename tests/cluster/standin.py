"""An agent whose Kubernetes side is a directory: what the controller would do, the test does. Runs on a node, as a program.

`python3 standin.py CONFIG DIRECTORY`. Orders are files `ID.order` in the directory; what the agent asks for appears as
`ID.admitted`, `ID.wants-pod`, `ID.wants-hand-over` and `ID.given-back`, the answers are `ID.pod`, `ID.peers`, `ID.moved` and
`ID.handed-over`, and the record of an ended half is `ID.ROLE`. All are JSON, made by a rename.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import anyio

from podferry.agent.service import Agent
from podferry.core.precopy import PreCopyPolicy
from podferry.engine.order import Order
from podferry.errors import Failed, PodferryError, Refused
from podferry.model import Connections, Mode
from podferry.workload.config import load
from podferry.workload.pod.cluster_port import MigrationName, MovingPod, PeerPod, PodName, PodOrder

POLL_INTERVAL = 0.01


class Directory:
    """`podferry.workload.pod.cluster_port.Cluster`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def address(self, node: str) -> str | None:
        return None

    def lives_at(self, host: str) -> bool:
        return False

    async def admit(self, id: str, pod: PodName, source: str, mode: Mode) -> None:
        if (self.path / f"{id}.admitted").exists():
            raise Refused(f"{source} offers {id} twice")
        self.say(id, "admitted", {"pod": str(pod), "source": source, "mode": mode})

    def keeps_name(self, id: str) -> bool:
        return False

    async def replaced(self, id: str) -> bool:
        return False

    async def target_pod(self, id: str) -> PodName:
        self.say(id, "wants-pod", {})
        answer = await self.hear(id, "pod")
        if "error" in answer:
            raise Failed(answer["error"])
        return PodName(**answer)

    async def give_back(self, id: str) -> None:
        self.say(id, "given-back", {})

    async def peers(self, id: str, wanted: Collection[str] = ()) -> tuple[MigrationName, Mapping[str, PeerPod]]:
        """The pods of which a test has said so, by their addresses."""
        found = await self.hear(id, "peers")
        return MigrationName("default", "m", id), {address: PeerPod(**one) for address, one in found["pods"].items()}

    async def moving(self, migration: MigrationName, target: str) -> MovingPod:
        found = await self.hear(migration.uid, "peers")
        if target != found["target"]:
            raise Refused(f"{target} is not the target")
        return MovingPod(frozenset(found["addresses"]), frozenset(one["uid"] for one in found["pods"].values()))

    async def moved(self, migration: MigrationName) -> bool | None:
        path = self.path / f"{migration.uid}.moved"
        return bool(json.loads(path.read_text())) if path.exists() else None

    async def hand_over(self, id: str) -> None:
        self.say(id, "wants-hand-over", {})
        await self.hear(id, "handed-over")

    def say(self, id: str, what: str, value: Any) -> None:
        new = self.path / f".{id}.{what}"
        new.write_text(json.dumps(value))
        new.rename(self.path / f"{id}.{what}")

    async def hear(self, id: str, what: str) -> Any:
        while not (path := self.path / f"{id}.{what}").exists():
            await anyio.sleep(POLL_INTERVAL)
        return json.loads(path.read_text())


async def follow(agent: Agent, cluster: Directory) -> None:
    """Carry out orders, and write down how every half ends."""
    followed: set[tuple[str, str]] = set()
    async with anyio.create_task_group() as tasks:

        async def watch(half: Any) -> None:
            cluster.say(half.id, half.role, await half.wait())

        while True:
            for path in cluster.path.glob("[!.]*.order"):
                order = json.loads(path.read_text())
                path.unlink()
                policy = PreCopyPolicy(**order.get("policy", {}))
                what = PodOrder(
                    path.stem,
                    PodName(**order["pod"]),
                    tuple(order["containers"]),
                    order["target"],
                    Order(
                        Mode(order["mode"]),
                        timeout=order.get("timeout", 300.0),
                        policy=policy,
                        max_freeze=120.0,
                        connections=Connections(order.get("connections", Connections.CLOSE)),
                    ),
                )
                try:
                    await agent.pods.move(what)
                except PodferryError as error:
                    cluster.say(path.stem, "source", {"outcome": "not begun", "error": error.to_dict()})
            for path in cluster.path.glob("[!.]*.cancel"):
                path.unlink()
                agent.pods.migrations()[path.stem].cancel()
            for half in agent.pods.migrations().values():
                if (half.id, half.role) not in followed:
                    followed.add((half.id, half.role))
                    tasks.start_soon(watch, half)
            await anyio.sleep(POLL_INTERVAL)


async def main() -> None:
    cluster = Directory(Path(sys.argv[2]))
    agent = Agent(load(Path(sys.argv[1])), cluster)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(agent.run, lambda: cluster.say("agent", "ready", os.getpid()))
        await cluster.hear("agent", "ready")
        tasks.start_soon(follow, agent, cluster)


if __name__ == "__main__":
    anyio.run(main)

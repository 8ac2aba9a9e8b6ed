"""Which agents there are, and which of them a command is for.

Standalone it is the one agent whose socket was named; otherwise the live nodes of a lab. A node that does not answer is
down, which is a fact to show and not an error, as long as the command can do without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from podferry.cli.agent_client import QUICK, AgentClient, AgentUnreachable
from podferry.cli.record import Record
from podferry.errors import PeerMisbehaved, PodferryError, Refused, UsageError
from podferry.model import Outcome

DEFAULT_LAB = "default"


@dataclass(frozen=True)
class AgentOptions:
    """What the options and the environment say about where to look: a lab's name, or one agent's socket."""

    lab: str | None = None
    agent: Path | None = None

    def over(self, outer: AgentOptions) -> AgentOptions:
        """These options, given after the command, before those given ahead of it."""
        return self if self.lab or self.agent else outer

    def settle(self, environ: Mapping[str, str] = os.environ) -> AgentOptions:
        """Fill in from PODFERRY_AGENT and PODFERRY_LAB; an option beats the environment, an agent beats a lab.

        Raises `UsageError` where both options are given.
        """
        if self.lab and self.agent:
            raise UsageError("--lab and --agent exclude each other", remedy="name the lab or the socket of one agent")
        if self.lab or self.agent:
            return self
        if socket := environ.get("PODFERRY_AGENT"):
            return AgentOptions(agent=Path(socket))
        return AgentOptions(lab=environ.get("PODFERRY_LAB") or DEFAULT_LAB)


@dataclass(frozen=True)
class Endpoint:
    """One agent. `node` is empty where only the socket is known; `client` is None where the node is known to be down."""

    node: str
    client: AgentClient | None

    def ask(self, op: str, **args: Any) -> Any:
        """Ask quickly. Raises `AgentUnreachable` for a node that is down."""
        if self.client is None:
            raise AgentUnreachable(f"node {self.node} is down", remedy=f"podferry lab start-node {self.node}")
        return self.client.call(op, timeout=QUICK, **args)


@dataclass(frozen=True)
class AgentAnswers:
    """What the nodes answered: every row with the node that told it, and the nodes that did not answer."""

    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    down: list[tuple[str, PodferryError]] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows alone."""
        return [row for _, row in self.told]

    def down_dicts(self) -> list[dict[str, Any]]:
        """The silent nodes as JSON carries them."""
        return [{"node": node, "error": error.to_dict()} for node, error in self.down]


class Fleet:
    """The agents that a command may talk to."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self.endpoints = endpoints

    @classmethod
    def find(cls, where: AgentOptions) -> Fleet:
        """The agents at `where`, which is settled. Raises `UsageError` for a lab that is not up."""
        if where.agent is not None:
            return cls([Endpoint("", AgentClient(where.agent))])
        return cls(lab_endpoints(where.lab or DEFAULT_LAB))

    def ask_all(self, op: str, **args: Any) -> AgentAnswers:
        """Ask every node at once and merge the rows; one that answers with an error counts as down.

        Raises that error where there is only one agent to ask, and `AgentUnreachable` where none answers.
        """
        answers = AgentAnswers()
        with ThreadPoolExecutor(max_workers=max(1, len(self.endpoints))) as pool:
            for endpoint, result in zip(
                self.endpoints, pool.map(lambda one: _attempt(one, op, args), self.endpoints), strict=True
            ):
                if isinstance(result, list):
                    answers.told.extend((endpoint.node, row) for row in result)
                else:
                    answers.down.append((endpoint.node, result))
        if answers.down and len(answers.down) == len(self.endpoints):
            raise answers.down[0][1]
        return answers

    def containers(self) -> AgentAnswers:
        """Every container that podferry could move, by node and name."""
        answers = self.ask_all("ps")
        answers.told.sort(key=lambda told: (str(told[1].get("node")), str(told[1].get("name"))))
        return answers

    def records(self, id: str | None = None) -> AgentAnswers:
        """Every migration, oldest first; both ends keep a record of it, and the source's counts where it answers."""
        answers = self.ask_all("status", id=id)
        best: dict[object, tuple[str, dict[str, Any]]] = {}
        for node, row in sorted(answers.told, key=lambda told: told[0] != told[1].get("source")):
            best.setdefault(row.get("id"), (node, row))
        told = sorted(best.values(), key=lambda told: float(told[1].get("started_at") or 0))
        return AgentAnswers(told, answers.down)

    def record(self, id: str) -> Record:
        """The record of the migration `id`. Raises `UsageError` where no node knows it, `AgentUnreachable` where none that answers
        does."""
        answers = self.records(id)
        for row in answers.rows:
            if row.get("id") == id:
                return Record.from_dict(row)
        if answers.down:
            raise AgentUnreachable(
                f"cannot tell whether there is a migration '{id}'",
                why=f"{_silence(answers)}, and no other node has a record of it",
                remedy="see whether these nodes and their agents run (podferry ps), and try again",
            )
        raise UsageError(
            f"no migration '{id}'",
            why="no node has a record of it",
            remedy="podferry status lists the migrations that there are",
        )

    def holder(self, name: str) -> AgentClient:
        """The agent of the node that has the container `name`; a running copy counts before one that waits.

        Raises `UsageError` where no node has it, `AgentUnreachable` where none that answers has.
        """
        if len(self.endpoints) == 1:
            return self._client(self.endpoints[0])
        answers = self.containers()
        rows = [row for row in answers.rows if row.get("name") == name]
        rows.sort(key=lambda row: row.get("state") != "running")
        for row in rows:
            return self.at(str(row.get("node")))
        if answers.down:
            raise AgentUnreachable(
                f"cannot tell whether there is a container '{name}'",
                why=f"{_silence(answers)}, and no other node has it",
                remedy="see whether these nodes and their agents run (podferry ps), and try again",
            )
        raise UsageError(
            f"no container '{name}'", why="no node has it", remedy="podferry ps lists the containers that there are"
        )

    def at(self, node: str) -> AgentClient:
        """The agent of `node`. Raises `UsageError` for an unknown node, `AgentUnreachable` for one that is down."""
        if len(self.endpoints) == 1 and not self.endpoints[0].node:
            return self._client(self.endpoints[0])
        for endpoint in self.endpoints:
            if endpoint.node == node:
                return self._client(endpoint)
        known = ", ".join(endpoint.node for endpoint in self.endpoints)
        raise UsageError(f"no node '{node}'", why=f"there are {known}", remedy="podferry lab status shows the nodes")

    def first_of(self, nodes: list[str]) -> AgentClient:
        """The agent of the first of `nodes` that answers. Raises the first one's error where none does."""
        errors: list[PodferryError] = []
        for node in nodes:
            try:
                client = self.at(node)
                client.call("node", timeout=QUICK)
                return client
            except PodferryError as error:
                errors.append(error)
        raise errors[0]

    def _completed(self, node: str, id: str) -> bool:
        """Whether the agent of `node` says that its part of a migration is done."""
        with suppress(PodferryError):
            return any(row.get("outcome") == Outcome.COMPLETED for row in self.at(node).call("status", id=id))
        return False

    def stand_down(self, node: str, *, id: str, run_on: str) -> AgentUnreachable | None:
        """Tell `node`, before the other hears of it, that the job of the migration `id` shall run on the other, and whether the
        other says that it has all of the job's memory.

        Returns why it could not be told. Raises its refusal: then the other must not run either (I1).
        """
        if len(self.endpoints) == 1:
            return None  # there is one agent to speak with, and it is asked for its part next
        filled: dict[str, Any] = {"filled": True} if self._completed(run_on, id) else {}
        try:
            self.at(node).call("resolve", id=id, run_on=run_on, **filled)
        except AgentUnreachable as silent:
            return silent
        except UsageError:
            return None  # it has nothing of that migration, so nothing that could run
        return None

    @staticmethod
    def _client(endpoint: Endpoint) -> AgentClient:
        if endpoint.client is None:
            raise AgentUnreachable(f"node {endpoint.node} is down", remedy=f"podferry lab start-node {endpoint.node}")
        return endpoint.client


def lab_endpoints(name: str) -> list[Endpoint]:
    """The nodes of a lab, living and dead. Raises `UsageError` for a lab that is not there."""
    from podferry.lab import Lab, Node

    lab = Lab(name)

    def client(node: Node) -> AgentClient | None:
        try:
            return AgentClient(lab.agent_socket(node.name)) if node.alive else None
        except Refused:  # it died while we looked
            return None

    return [Endpoint(node.name, client(node)) for node in lab.status().nodes]


def _attempt(endpoint: Endpoint, op: str, args: dict[str, Any]) -> list[dict[str, Any]] | PodferryError:
    try:
        rows = endpoint.ask(op, **args)
    except PodferryError as error:
        return error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return PeerMisbehaved(f"the agent answered '{op}' with something other than a list of objects")
    return rows


def _silence(answers: AgentAnswers) -> str:
    return f"no answer from {', '.join(node for node, _ in answers.down)}"

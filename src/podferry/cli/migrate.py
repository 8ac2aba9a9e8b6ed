"""One migration, followed to its end; Ctrl-C asks for it to be undone, a second one leaves it to the agent."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from podferry.cli.agent_client import AgentClient
from podferry.cli.record import ProgressRecord, Record
from podferry.cli.views import EventView
from podferry.errors import PodferryError, Refused, UsageError
from podferry.model import Outcome


class UserLeft(Exception):
    """The user went away; the agent finishes alone. `id` is empty where the agent had not named the migration yet."""

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id


class Follower:
    """Starts a migration on one agent and follows it in `view`."""

    def __init__(self, client: AgentClient, view: EventView) -> None:
        self._client = client
        self._view = view
        self._named = threading.Event()
        self._id = ""
        self._interrupts = 0

    def run(self, **request: Any) -> Record:
        """Ask for the migration and return its record; a refusal is a record too.

        Raises `UserLeft` after a second Ctrl-C, and whatever the agent answers.
        """
        with self._view, self._on_interrupt():
            try:
                return Record.from_dict(self._client.call("migrate", timeout=None, on_event=self._event, **request))
            except Refused as refusal:
                if isinstance(refusal, UsageError):
                    raise
                return refused(refusal, request, self._id)

    def _event(self, raw: dict[str, Any]) -> None:
        event = ProgressRecord.from_dict(raw)
        self._id = event.id
        self._named.set()
        self._view.event(raw, event)

    @contextmanager
    def _on_interrupt(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """A handler may not wait, and the socket is being read: a thread asks for the undoing over another one."""
        self._interrupts += 1
        if self._interrupts > 1:
            raise UserLeft(self._id)
        threading.Thread(target=self._cancel, daemon=True).start()

    def _cancel(self) -> None:
        self._view.note("rolling back; Ctrl-C again leaves that to the agent")
        self._named.wait()
        try:
            self._client.call("cancel", id=self._id)
        except PodferryError as error:
            self._view.note(f"cannot be cancelled: {error}")


def refused(refusal: Refused, request: dict[str, Any], id: str = "") -> Record:
    """The record of a migration that the agent would not even begin."""
    return Record.from_dict(
        {
            "id": id,
            "name": request.get("name"),
            "source": None,
            "target": request.get("to"),
            "mode": request.get("mode"),
            "outcome": Outcome.REFUSED.value,
            "reason": str(refusal),
            "downtime_ms": None,
            "total_ms": None,
            "wire_bytes": 0,
            "memory_bytes": 0,
            "upper_bytes": 0,
            "rounds": 0,
            "phases": {},
            "error": refusal.to_dict(),
        }
    )

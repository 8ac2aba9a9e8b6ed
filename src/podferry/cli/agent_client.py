"""A synchronous client of one agent's socket.

A unix stream that carries one JSON object a line. A request is `{"op": NAME, ...arguments}`; the answer is any number of
`{"event": {...}}` and then exactly one `{"result": ...}` or `{"error": {...}}` (`PodferryError.to_dict`). One request
to a connection: ending it in the middle never stops what the agent has begun.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from podferry.errors import Failed, PeerMisbehaved, PodferryError, UsageError

MAX_LINE = 64 * 2**20
QUICK = 5.0
PATIENT = 120.0

OnEvent = Callable[[dict[str, Any]], None]


class AgentUnreachable(Failed):
    """No agent answers at the socket, or it went away before its answer was complete."""

    code = "PF270"


class AgentClient:
    """One agent, found at the unix socket `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def call(self, op: str, *, timeout: float | None = PATIENT, on_event: OnEvent | None = None, **args: Any) -> Any:
        """Ask for `op` and return its result; `on_event` sees every event before it.

        `timeout` (seconds, None for ever) limits each wait for a line. Raises `AgentUnreachable`, `PeerMisbehaved`, or
        the error that the agent answers with.
        """
        for answer in self._answers({"op": op, **args}, timeout):
            if "event" in answer:
                if on_event is not None:
                    on_event(_object(answer["event"], "event"))
            elif "error" in answer:
                raise PodferryError.from_dict(_object(answer["error"], "error"))
            elif "result" in answer:
                return answer["result"]
            else:
                raise PeerMisbehaved("the agent sent neither an event nor a result nor an error")
        raise AgentUnreachable(
            f"the agent at {self.path} went away before it answered '{op}'",
            remedy="see the agent's log; `podferry status` tells what became of a migration",
        )

    def _answers(self, request: dict[str, Any], timeout: float | None) -> Iterator[dict[str, Any]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(timeout)
            with self._errors_named():
                link.connect(str(self.path))
                link.sendall(json.dumps(request).encode() + b"\n")
            with link.makefile("rb") as lines:
                while True:
                    with self._errors_named():
                        line = lines.readline(MAX_LINE)
                    if not line:
                        return
                    yield self._decode(line)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as denied:
            raise UsageError(
                f"may not talk to the agent at {self.path}", why=str(denied), remedy="run podferry as root"
            ) from denied
        except OSError as broken:
            why = "no answer in time" if isinstance(broken, TimeoutError) else (broken.strerror or str(broken))
            raise AgentUnreachable(
                f"no agent answers at {self.path}",
                why=why,
                remedy="start podferry-agent there, or the lab: podferry lab up",
            ) from broken

    def _decode(self, line: bytes) -> dict[str, Any]:
        try:
            return _object(json.loads(line), "line")
        except ValueError as garbled:
            raise PeerMisbehaved(f"what answers at {self.path} does not speak JSON", why=str(garbled)) from garbled


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PeerMisbehaved(f"the agent sent a {what} that is not a JSON object")
    return value

"""The agent's socket for people and scripts: one JSON object a line, both ways.

A request is `{"op": NAME, ...arguments}`; the answer is any number of `{"event": {...}}` lines and then exactly one
`{"result": ...}` or `{"error": {...}}`. Who may open the socket is root; the file's mode says so.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from podferry.errors import Bug, PodferryError, UsageError

LONGEST_REQUEST = 1 << 20

Emit = Callable[[dict[str, Any]], Awaitable[None]]
Op = Callable[..., Awaitable[object]]
"""Takes `emit` and the request's arguments by keyword; its return value is the result."""


async def serve(path: Path, ops: Mapping[str, Op], *, started: Callable[[], object]) -> None:
    """Answer requests on the socket at `path` until cancelled. `started` is called once it accepts connections."""
    path.unlink(missing_ok=True)
    listener = await anyio.create_unix_listener(path, mode=0o600)
    started()

    async def answer(stream: SocketStream) -> None:
        async with stream:
            await _answer(stream, ops)

    try:
        await listener.serve(answer)
    finally:
        path.unlink(missing_ok=True)


async def _answer(stream: SocketStream, ops: Mapping[str, Op]) -> None:
    requests = BufferedByteReceiveStream(stream)

    async def send(line: dict[str, Any]) -> None:
        await stream.send(json.dumps(line).encode() + b"\n")

    while True:
        try:
            line = await requests.receive_until(b"\n", LONGEST_REQUEST)
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
            return None
        except anyio.DelimiterNotFound:
            return await send({"error": UsageError("a request is longer than 1 MiB").to_dict()})
        try:
            reply: dict[str, Any] = {"result": await _do(line, ops, lambda event: send({"event": event}))}
        except PodferryError as error:
            reply = {"error": error.to_dict()}
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return None
        except Exception as error:  # noqa: BLE001 - one bad request must not end the agent
            reply = {"error": Bug.because("the agent failed at a request", error).to_dict()}
        try:
            await send(reply)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return None


async def _do(line: bytes, ops: Mapping[str, Op], emit: Emit) -> object:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise UsageError("the request is not JSON", why=str(error)) from error
    if not isinstance(request, dict) or request.get("op") not in ops:
        raise UsageError("the request names no known operation", why=f"the operations are {', '.join(sorted(ops))}")
    op = ops[request.pop("op")]
    try:
        inspect.signature(op).bind(emit, **request)
    except TypeError as error:
        raise UsageError("the request has the wrong arguments", why=str(error)) from error
    return await op(emit, **request)

"""What a node with a valid certificate may try against another's agent, all at once until its time is over; runs inside the node.

It speaks the protocol by podferry's own modules, as whoever has taken a node would. Prints how often it tried what, as JSON.
"""

from __future__ import annotations

import base64
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import anyio

from podferry.errors import PodferryError
from podferry.model import Mode
from podferry.node.records import Container, Opaque
from podferry.wire.channel import Channel
from podferry.wire.messages import Abort, Go, Offer, PrepareTarget, Query, StateEnd
from podferry.wire.tls import Credentials
from podferry.wire.transport import dial, parse_address

victim, address, seconds, *names = sys.argv[1:]
TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
tried: Counter[str] = Counter()
credentials = Credentials.load(Path("/etc/podferry/pki"))
chance = random.Random(7)


def spec() -> dict[str, object]:
    """One that would own the node."""
    bind = {"destination": "/host", "type": "bind", "source": "/", "options": ["rbind", "rw"]}
    every = ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_SYS_MODULE"]
    return {
        "ociVersion": "1.1.0",
        "process": {"args": ["sh"], "cwd": "/", "user": {}, "capabilities": {"bounding": every, "effective": every}},
        "root": {"path": "/"},
        "mounts": [bind],
        "hooks": {"createRuntime": [{"path": "/bin/sh"}]},
        "linux": {"namespaces": [], "cgroupsPath": f"/default/{names[0]}"},
    }


def container(name: str) -> dict[str, object]:
    record = Container(name, "image", "overlayfs", name, Opaque(TYPE, json.dumps(spec()).encode()))
    return {
        "record": base64.b64encode(record.to_bytes()).decode(),
        "stdio": {"stdin": "", "stdout": "file:///etc/shadow", "stderr": "", "terminal": False},
        "layers": [],
        "flags": [],
    }


def migration() -> str:
    return f"{chance.randrange(1 << 48):012x}"


async def offers(channel: Channel) -> None:
    """Containers that others have, with a spec beyond everything, of sizes beyond everything."""
    name = chance.choice([*names, "../../etc", "a" * 300])
    await channel.send(Offer(migration(), name, Mode.LIVE, container(name), {}, chance.choice((0, 1 << 62)), 0))
    await channel.receive()


async def questions(channel: Channel) -> None:
    """About what became of migrations of others."""
    await channel.send(Query(chance.choice([*names, migration(), "../migrations"])))
    await channel.receive()


async def words_out_of_turn(channel: Channel) -> None:
    one = migration()
    await channel.send(
        chance.choice([Go(one), Abort(one, "x" * 500), PrepareTarget(one, True), StateEnd(one, (), (), ())])
    )
    await channel.receive()


async def nonsense(channel: Channel) -> None:
    """What is no frame, behind a greeting that is one."""
    await channel._link.write(chance.randbytes(chance.choice((7, 4096, 1 << 20))))
    await channel.receive()


async def silence(channel: Channel) -> None:
    await anyio.sleep(2.0)


async def again(what: Callable[[Channel], Awaitable[None]], until: float) -> None:
    while time.monotonic() < until:
        with suppress(PodferryError, OSError, anyio.EndOfStream):
            async with dial(victim, address, credentials) as channel:
                with anyio.move_on_after(3.0):
                    tried[what.__name__] += 1
                    await what(channel)


def connections(until: float) -> None:
    """Hundreds that never greet, half of them inside TLS."""
    host = parse_address(address)
    while time.monotonic() < until:
        with ExitStack() as stack:
            for number in range(200):
                with suppress(OSError):
                    one = stack.enter_context(socket.create_connection(host, timeout=2.0))
                    tried["connections"] += 1
                    if number % 2:
                        one = credentials.client().wrap_socket(one, server_hostname=victim)
                        stack.enter_context(one)
            time.sleep(1.0)


async def main() -> None:
    until = time.monotonic() + float(seconds)
    async with anyio.create_task_group() as group:
        for what in (offers, questions, words_out_of_turn, nonsense, silence):
            for _ in range(4):
                group.start_soon(again, what, until)
        await anyio.to_thread.run_sync(connections, until)
    print(json.dumps(tried))


anyio.run(main)

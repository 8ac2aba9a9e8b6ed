"""Connections between agents: `dial` a node, or `serve` those that dial. Both give a `Channel` that has been greeted.

Acquire and undo stand side by side: leaving the context says goodbye, or why not, and closes.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import anyio

from podferry import __version__
from podferry.errors import Bug, Failed, PeerLost, PeerMisbehaved, PodferryError, Refused, UsageError, leaves
from podferry.wire.channel import Channel, Timing
from podferry.wire.greeters import Greeters
from podferry.wire.link import UNSENT, Link
from podferry.wire.messages import PROTOCOL, Hello
from podferry.wire.pki import check_node_name
from podferry.wire.session import Role
from podferry.wire.tls import Credentials, check_name

BACKLOG = 64
ATTEMPTS, PAUSE = 3, 0.5
"""How often a node is dialled that closes the connection before it has greeted, and the seconds between two attempts."""
OF_ONE_PEER = 64
"""Conversations with one node at once; a move needs one, and a few questions while contact is lost."""


def parse_address(address: str) -> tuple[str, int]:
    """`host:port` or `[host]:port`, as (host, port). Raises `UsageError`."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise UsageError(f"{address!r} is no address", remedy="write host:port, or [address]:port for IPv6")
    return host.removeprefix("[").removesuffix("]"), int(port)


def listen(address: str) -> socket.socket:
    """A socket that listens at `address`; port 0 takes a free one. Raises `UsageError`."""
    host, port = parse_address(address)
    try:
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as cause:
        raise UsageError.because(f"cannot listen at {address}", cause) from cause
    listener.setblocking(False)
    return listener


@asynccontextmanager
async def dial(
    node: str, address: str, credentials: Credentials, *, timing: Timing | None = None
) -> AsyncIterator[Channel]:
    """A conversation with the node `node` at `address`, we being the source.

    Raises `PeerLost` (nobody there, not in time), `PeerUntrusted` (not that node, or it does not trust us), `Refused`
    (another protocol). A `PodferryError` that leaves the context is told to the peer.
    """
    timing = timing or Timing()
    check_node_name(node)
    peer = f"{node} at {address}"
    with _in_time(peer, timing.greeting):
        channel = await _let_in(node, address, credentials, timing)
    async with _conversing(channel, timing):
        yield channel


async def serve(
    listener: socket.socket,
    credentials: Credentials,
    handler: Callable[[Channel], Awaitable[None]],
    report: Callable[[PodferryError], None],
    *,
    known: Callable[[str], bool] = lambda _: False,
    timing: Timing | None = None,
) -> None:
    """Take connections for ever and run `handler` on each, we being the target. Closes `listener` when cancelled.

    `known` says whether a peer lives at an address: these are never kept waiting by others. Errors of one connection end that
    one, and go to `report`; one that is not a `PodferryError` goes there as `Bug`.
    """
    timing = timing or Timing()
    greeters, talking = Greeters(known), Counter[str]()

    async def greet(connection: socket.socket, peer: str, host: str) -> Channel:
        slot = greeters.enter(host)
        if slot is None:
            connection.close()
            raise PeerLost(
                f"this node closed the connection of {peer}", why="as many handshakes as it allows are under way"
            )
        scope = anyio.CancelScope()
        slot.makes_way = scope.cancel
        try:
            with scope, _in_time(peer, timing.handshake):
                await _first_byte(connection, peer, timing.opening)
                return await _greet(connection, peer, credentials, None, timing)
        finally:
            greeters.leave(slot)
        connection.close()
        raise PeerLost(
            f"this node closed the connection of {peer} before the handshake was complete",
            why="it was slow, and other connections waited",
        )

    async def converse(connection: socket.socket, peer: str, host: str) -> None:
        try:
            channel = await greet(connection, peer, host)
            talking[channel.peer] += 1
            try:
                async with _conversing(channel, timing):
                    if talking[channel.peer] > OF_ONE_PEER:
                        raise Refused(f"{channel.peer} holds {OF_ONE_PEER} connections open already")
                    await handler(channel)
            finally:
                talking[channel.peer] -= 1
                if not talking[channel.peer]:
                    del talking[channel.peer]
        except Exception as error:  # noqa: BLE001 - one connection's bug must not end the others
            cause = next(leaves(error))
            if not isinstance(cause, PodferryError):
                cause = Bug.because(f"the conversation with {peer} failed", cause)
            report(cause)

    with listener:
        async with anyio.create_task_group() as tasks:
            while True:
                connection, peer, host = await _accept(listener, report)
                tasks.start_soon(converse, connection, peer, host)


async def _let_in(node: str, address: str, credentials: Credentials, timing: Timing) -> Channel:
    """A conversation that has been greeted. A node that closes the connection before is dialled again: it does so with whoever
    is slow while others wait, as a node without a free processor is, and nothing was said yet that could be said twice."""
    peer = f"{node} at {address}"
    for attempt in range(ATTEMPTS):
        connection = await _connect(address, peer)
        try:
            return await _greet(connection, peer, credentials, node, timing)
        except PeerLost:
            if attempt == ATTEMPTS - 1:
                raise
        await anyio.sleep(PAUSE)
    raise AssertionError


async def _first_byte(connection: socket.socket, peer: str, patience: float) -> None:
    """Whoever means to speak speaks first, and at once. Closes the connection on failure."""
    try:
        with anyio.fail_after(patience):
            await anyio.wait_readable(connection)
    except TimeoutError as late:
        connection.close()
        raise PeerLost(f"{peer} sent nothing for {patience:g} s") from late
    except BaseException:
        connection.close()
        raise


async def _greet(
    connection: socket.socket, peer: str, credentials: Credentials, node: str | None, timing: Timing
) -> Channel:
    """Handshake and `Hello` with `node`, or as the accepting side with whoever it is. Closes the connection on failure.

    The accepting side says its `Hello` after it has checked the other's: who has heard it has been let in.
    """
    wrap = credentials.client().wrap_socket if node else credentials.server().wrap_socket
    tls = wrap(connection, server_side=node is None, server_hostname=node, do_handshake_on_connect=False)
    link = Link(tls, peer, patience=timing.silence)
    channel = Channel(link, Role.SOURCE if node else Role.TARGET)
    mine = Hello(PROTOCOL, __version__, credentials.node)
    async with _closing_on_error(channel):
        await link.handshake()
        names = link.certified_names()
        if node:
            check_name(node, names, peer)
            await channel.speak(mine)
            theirs = await channel.receive_hello()
        else:
            try:
                theirs = await channel.receive_hello()
            except Refused:
                await channel.speak(mine)  # so that the other side, too, can name both versions
                raise
        check_name(node or theirs.node, names, peer)
        if node not in (None, theirs.node):
            raise PeerMisbehaved(f"{peer} calls itself {theirs.node} in its greeting")
        if not node:
            await channel.speak(mine)
        channel.peer = theirs.node
    return channel


@asynccontextmanager
async def _conversing(channel: Channel, timing: Timing) -> AsyncIterator[None]:
    """Watch over the channel while the body talks; part from the peer afterwards."""
    failure: Exception | None = None
    async with _closing_on_error(channel):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.watch, timing)
            try:
                yield
            except Exception as error:  # noqa: BLE001 - raised below, outside of the task group, which would wrap it
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
    await channel.close()


@asynccontextmanager
async def _closing_on_error(channel: Channel) -> AsyncIterator[None]:
    """Close the channel if the body fails, after telling the peer why where that makes sense."""
    try:
        yield
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            if isinstance(error, PodferryError):
                await channel.complain(error)
            await channel.close()
        raise


@contextmanager
def _in_time(peer: str, patience: float) -> Iterator[None]:
    try:
        with anyio.fail_after(patience):
            yield
    except TimeoutError as late:
        raise PeerLost(f"no greeting from {peer} within {patience:g} s") from late


async def _connect(address: str, peer: str) -> socket.socket:
    """A connected, non-blocking socket; tries every address of the host in turn."""
    host, port = parse_address(address)
    failure: OSError | None = None
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as cause:
        raise PeerLost.because(f"cannot find {peer}", cause) from cause
    for family, kind, protocol, _, target in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.connect(target)
            await anyio.wait_writable(connection)
            # Writable means that the attempt has ended, well or not: connect(2), EINPROGRESS. Only SO_ERROR tells.
            if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            return _tune(connection)
        except OSError as cause:
            connection.close()
            failure = cause
        except BaseException:
            connection.close()
            raise
    raise PeerLost.because(
        f"cannot reach {peer}", failure or OSError("no address"), remedy="is the agent running there?"
    ) from failure


async def _accept(listener: socket.socket, report: Callable[[PodferryError], None]) -> tuple[socket.socket, str, str]:
    while True:
        await anyio.wait_readable(listener)
        try:
            connection, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        except OSError as cause:  # out of descriptors or memory
            report(Failed.because("cannot take a connection", cause))
            await anyio.sleep(1)
            continue
        connection.setblocking(False)
        return _tune(connection), f"{address[0]} port {address[1]}", str(address[0])


def _tune(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
    return connection

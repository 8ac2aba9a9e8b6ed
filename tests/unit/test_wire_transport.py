"""Real connections over loopback: whom we trust, what ends a conversation, and that nothing hangs."""

from __future__ import annotations

import datetime
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from podferry import __version__
from podferry.errors import Bug, Failed, PeerLost, PeerMisbehaved, PeerUntrusted, PodferryError, Refused, UsageError
from podferry.model import Mode
from podferry.wire import frames, messages
from podferry.wire.channel import Channel, Timing
from podferry.wire.compression import Deflater
from podferry.wire.frames import MAX_PAYLOAD, PAGE, Beat, Control, FrameReader, Pages
from podferry.wire.messages import (
    PROTOCOL,
    Accept,
    ErrorReport,
    GaveUp,
    Hello,
    Message,
    Offer,
    PeerFailure,
    RoundAck,
    RoundEnd,
)
from podferry.wire.pki import Authority
from podferry.wire.session import SessionState
from podferry.wire.tls import Credentials
from podferry.wire.transport import dial, listen, parse_address, serve

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

QUICK = Timing(beat=0.05, silence=0.4, hung=0.4)
LIVELY = Timing(beat=0.05, silence=1.5, hung=1.5)
OFFER = Offer("m-1", "job", Mode.LIVE, {}, {}, 1, 1)
NOTHING = 30.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pki")
    authority = Authority.create(home / "ca")
    for name in ("a", "b", "c"):
        authority.issue(f"node-{name}", ["127.0.0.1"], home / name)
    authority.issue("node-a", ["127.0.0.1"], home / "late", not_after=days(-1), not_before=days(-2))
    authority.issue("node-b", ["127.0.0.1"], home / "late-b", not_after=days(-1), not_before=days(-2))
    authority.issue("node-a", ["127.0.0.1"], home / "early", not_before=days(1), not_after=days(2))
    stranger = Authority.create(home / "other-ca")
    for name in ("a", "b"):
        stranger.issue(f"node-{name}", ["127.0.0.1"], home / f"other-{name}")
    return home


def days(number: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=number)


@dataclass
class Target:
    """A serving node; `errors` is what it reported and `news` is set at each."""

    address: str
    errors: list[PodferryError] = field(default_factory=list)
    news: anyio.Event = field(default_factory=anyio.Event)

    def report(self, error: PodferryError) -> None:
        self.errors.append(error)
        self.news.set()

    async def reported(self) -> PodferryError:
        with anyio.fail_after(NOTHING):
            await self.news.wait()
        return self.errors[0]


async def accept(channel: Channel) -> None:
    """Take an offer, acknowledge rounds, and give up when the source aborts."""
    while True:
        match await channel.receive():
            case Offer(migration=migration):
                await channel.send(Accept(migration, {"peer": channel.peer}))
            case RoundEnd(round=number):
                await channel.send(RoundAck(number))
            case messages.Abort(migration=migration):
                await channel.send(GaveUp(migration, ErrorReport.of(Failed("as you wish"))))
                return


@asynccontextmanager
async def serving(
    directory: Path, handler: Callable[[Channel], Awaitable[None]] = accept, timing: Timing | None = None
) -> AsyncIterator[Target]:
    listener = listen("127.0.0.1:0")
    target = Target(f"127.0.0.1:{listener.getsockname()[1]}")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: serve(listener, Credentials.load(directory), handler, target.report, timing=timing))
        with anyio.fail_after(NOTHING):
            yield target
        tasks.cancel_scope.cancel()


async def test_a_conversation(pki: Path) -> None:
    async with serving(pki / "b") as target, dial("node-b", target.address, Credentials.load(pki / "a")) as channel:
        assert channel.peer == "node-b"
        await channel.send(OFFER)
        assert await channel.receive() == Accept("m-1", {"peer": "node-a"})
        await channel.send(Pages(1, 1, ((0, 2),), bytes(2 * PAGE)))
        await channel.send(RoundEnd(1, 2, 2 * PAGE))
        assert await channel.receive() == RoundAck(1)
        assert channel.traffic.sent > 2 * PAGE
        assert channel.traffic.received > 0
        await channel.send(messages.Abort("m-1", "enough"))
        assert isinstance(await channel.receive(), GaveUp)
        assert channel.session.state is SessionState.ENDED
    assert target.errors == []


async def test_pages_arrive_as_they_left_raw_and_compressed(pki: Path) -> None:
    came: list[tuple[int, bytes]] = []
    done = anyio.Event()

    async def keep(channel: Channel) -> None:
        offer = await channel.receive()
        assert isinstance(offer, Offer)
        await channel.send(Accept(offer.migration, {}))
        while isinstance(item := await channel.receive(), Pages):
            assert not item.zstd
            came.extend((address, bytes(data)) for address, data in item.pieces())
        done.set()
        await accept(channel)

    left = [(n << 20, bytes([n]) * MAX_PAYLOAD) for n in range(16)]
    deflater = Deflater()
    async with (
        serving(pki / "b", keep) as target,
        dial("node-b", target.address, Credentials.load(pki / "a")) as channel,
    ):
        await channel.send(OFFER)
        await channel.receive()
        for number, (address, data) in enumerate(left):
            pages = Pages(1, 1, ((address, MAX_PAYLOAD // PAGE),), data)
            await channel.send(deflater.deflate(pages) if number % 2 else pages)
        await channel.send(RoundEnd(1, 1, 1))
        await done.wait()
        await channel.send(messages.Abort("m-1", "enough"))
        await channel.receive()
    assert came == left
    assert deflater.ratio > 10


@pytest.mark.parametrize(
    ("ours", "theirs", "node", "here", "there"),
    [
        ("other-a", "b", "node-b", "another authority", None),
        ("a", "other-b", "node-b", "another authority", None),
        ("late", "b", "node-b", "our certificate has expired", "expired"),
        ("early", "b", "node-b", "our certificate", "not valid yet"),
        ("a", "late-b", "node-b", "expired", None),
        ("a", "c", "node-b", "another node's", None),
        ("a", "b", "node-c", "another node's", None),
    ],
)
async def test_who_is_not_trusted(pki: Path, ours: str, theirs: str, node: str, here: str, there: str | None) -> None:
    async with serving(pki / theirs) as target:
        with pytest.raises(PeerUntrusted) as caught:
            async with dial(node, target.address, Credentials.load(pki / ours)):
                pytest.fail("was let in")
        assert here in str(caught.value)
        assert target.address in caught.value.what
        reported = await target.reported()
        assert isinstance(reported, PeerUntrusted)
        assert there is None or there in str(reported)


async def test_an_authority_that_only_the_target_does_not_know(pki: Path, tmp_path: Path) -> None:
    """The source believes the target, but not the other way round: the source learns that from TLS's alert."""
    for name in ("node.crt", "node.key"):
        (tmp_path / name).write_bytes((pki / "other-a" / name).read_bytes())
    (tmp_path / "ca.crt").write_bytes((pki / "a" / "ca.crt").read_bytes())
    async with serving(pki / "b") as target:
        with pytest.raises(PeerUntrusted, match="our certificate"):
            async with dial("node-b", target.address, Credentials.load(tmp_path)):
                pytest.fail("was let in")
        assert "another authority" in str(await target.reported())


# The other side as a plain blocking TLS client or server, which may say anything.


class Raw:
    """One end that speaks frames without a session."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._frames = FrameReader()

    def say(self, *items: Message | frames.Frame | bytes) -> None:
        for item in items:
            if isinstance(item, bytes):
                self.connection.sendall(item)
                continue
            frame = item if isinstance(item, frames.Frame) else Control(messages.encode(item))
            head, payload = frames.encode(frame)
            self.connection.sendall(head + payload)

    def hear(self) -> Message | None:
        """The next message, or None at the end of the stream."""
        while True:
            frame = self._frames.next()
            if isinstance(frame, Control):
                return messages.decode(frame.payload)
            if frame is None:
                count = self.connection.recv_into(self._frames.buffer())
                if not count:
                    return None
                self._frames.received(count)


@contextmanager
def raw_client(address: str, context: ssl.SSLContext | None) -> Iterator[Raw]:
    with socket.create_connection(parse_address(address), timeout=NOTHING) as plain:
        if context is None:
            yield Raw(plain)
        else:
            with context.wrap_socket(plain, server_hostname="node-b") as connection:
                yield Raw(connection)


async def attack(pki: Path, target: Target, say: Callable[[Raw], None], *, certificate: str | None = "a") -> None:
    """Do `say` to the target over TLS with a certificate, and then wait until it hangs up."""
    if certificate:
        context = Credentials.load(pki / certificate).client()
    else:
        context = ssl.create_default_context(cafile=pki / "a" / "ca.crt")

    def act() -> None:
        with raw_client(target.address, context) as raw:
            say(raw)
            with suppress(OSError):
                while raw.hear():
                    pass

    with suppress(OSError):
        await run_sync(act)


HELLO = Hello(PROTOCOL, __version__, "node-a")


async def test_a_client_without_certificate_is_not_trusted(pki: Path) -> None:
    async with serving(pki / "b") as target:
        await attack(pki, target, lambda raw: raw.say(HELLO), certificate=None)
        reported = await target.reported()
        assert isinstance(reported, PeerUntrusted)
        assert "showed no certificate" in str(reported)


async def test_a_client_that_says_it_is_another_node_is_not_trusted(pki: Path) -> None:
    heard: list[Message | None] = []

    def lie(raw: Raw) -> None:
        raw.say(Hello(PROTOCOL, __version__, "node-c"))
        heard.append(raw.hear())

    async with serving(pki / "b") as target:
        await attack(pki, target, lie)
        reported = await target.reported()
        assert isinstance(reported, PeerUntrusted)
        assert "node-a" in str(reported)
    assert isinstance(heard[0], PeerFailure)
    assert isinstance(heard[0].error.error(), PeerUntrusted)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, b"SSH-2.0-x\r\n"])
async def test_a_client_that_speaks_no_tls(pki: Path, words: bytes) -> None:
    async with serving(pki / "b") as target:

        def act() -> None:
            with raw_client(target.address, None) as raw, suppress(OSError):
                raw.say(words)
                while raw.connection.recv(1 << 16):
                    pass

        await run_sync(act)
        assert isinstance(await target.reported(), PeerUntrusted)


async def test_a_client_of_an_older_tls_is_turned_away(pki: Path) -> None:
    context = Credentials.load(pki / "a").client()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with serving(pki / "b") as target:

        def act() -> None:
            with pytest.raises(ssl.SSLError), raw_client(target.address, context):
                pass

        await run_sync(act)
        reported = await target.reported()
        assert isinstance(reported, PeerUntrusted)
        assert "TLS 1.3" in str(reported)


async def test_a_client_that_connects_and_says_nothing_is_let_go_of(pki: Path) -> None:
    async with serving(pki / "b", timing=Timing(handshake=0.1)) as target:
        with socket.create_connection(parse_address(target.address)):
            reported = await target.reported()
    assert isinstance(reported, PeerLost)
    assert "no greeting" in str(reported)


def illegal_words() -> Iterator[tuple[str, list[Message | frames.Frame | bytes], str]]:
    head, payload = frames.encode(Control(messages.encode(OFFER)))
    yield "not hello first", [OFFER], "in place of Hello"
    yield "garbage for a hello", [b"\xff" * 100], "illegal frame"
    yield "hello twice", [HELLO, HELLO], "illegal Hello"
    yield "pages before an offer", [HELLO, Pages(1, 1, ((0, 1),), bytes(PAGE))], "illegal Pages"
    yield "go before an offer", [HELLO, messages.Go("m-1")], "illegal Go"
    yield "garbage after hello", [HELLO, b"\0" * 8], "illegal frame"
    yield "over-long frame", [HELLO, struct.pack("<BBHI", 1, 0, 0, 1 << 30)], "illegal frame"
    yield "no message", [HELLO, Control(b'{"type":"Nothing"}')], "illegal message"
    yield "path for a file name", [HELLO, OFFER, hostile_file()], "illegal frame"
    yield "damaged compressed pages", [HELLO, OFFER, Pages(1, 1, ((0, 1),), b"x" * 99, zstd=True)], "compressed pages"
    yield "the target's word", [HELLO, OFFER, Accept("m-1", {})], "illegal Accept"
    yield "another migration", [HELLO, OFFER, messages.PrepareTarget("m-2", False)], "this session about"
    yield "message cut", [HELLO, head + bytes(payload)[:-5]], "closed the connection"
    yield "header cut", [HELLO, head[:3]], "closed the connection"
    yield "nothing after hello", [HELLO], "closed the connection"


def hostile_file() -> bytes:
    body = struct.pack("<BBQ", 0, 16, 0) + b"../../etc/passwd" + b"root::0:0:::"
    return struct.pack("<BBHI", 5, 0, 0, len(body)) + body


@pytest.mark.parametrize(("words", "what"), [pytest.param(*rest, id=name) for name, *rest in illegal_words()])
async def test_illegal_words_end_the_conversation(
    pki: Path, words: list[Message | frames.Frame | bytes], what: str
) -> None:
    heard: list[Message | None] = []

    def act(raw: Raw) -> None:
        for word in words:
            raw.say(word)
            if word in (HELLO, OFFER) and word is not words[-1]:
                heard.append(raw.hear())
        if "closed" in what:
            socket.socket.shutdown(raw.connection, socket.SHUT_WR)  # SSLSocket's own would end TLS on this side
        else:
            while isinstance(heard[-1] if heard else None, Hello | Accept | None) and (word_heard := raw.hear()):
                heard.append(word_heard)

    async with serving(pki / "b") as target:
        await attack(pki, target, act)
        reported = await target.reported()
    assert what in str(reported)
    assert isinstance(reported, PeerLost if "closed" in what else PeerMisbehaved)
    if "closed" not in what:
        assert isinstance(heard[-1], PeerFailure), "the peer was not told why"


async def test_the_target_hears_of_another_protocol_and_so_does_the_source(pki: Path) -> None:
    heard: list[object] = []

    def act(raw: Raw) -> None:
        raw.say(Control(b'{"type":"Hello","protocol":99,"version":"9.9.9","new":1}'))
        heard.append(raw.hear())

    async with serving(pki / "b") as target:
        await attack(pki, target, act)
        reported = await target.reported()
    assert isinstance(reported, Refused)
    assert "9.9.9" in str(reported)
    assert __version__ in str(reported)
    assert heard == [Hello(PROTOCOL, __version__, "node-b")]


@asynccontextmanager
async def raw_server(
    pki: Path, act: Callable[[Raw], None], *, tls: bool = True, closes_first: int = 0
) -> AsyncIterator[str]:
    """node-b, which does as it likes with the first that connects, after `closes_first` whose connection it closes at once."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(NOTHING)

    def run() -> None:
        try:
            for _ in range(closes_first):
                listener.accept()[0].close()
            connection, _ = listener.accept()
        except OSError:  # the test is over
            return
        connection.settimeout(NOTHING)
        if tls:
            connection = Credentials.load(pki / "b").server().wrap_socket(connection, server_side=True)
        with connection, suppress(OSError):
            act(Raw(connection))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_sync, run)
        try:
            with anyio.fail_after(NOTHING):
                yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
    listener.close()


def greet(raw: Raw) -> None:
    raw.hear()
    raw.say(Hello(PROTOCOL, __version__, "node-b"))


def hang_up(raw: Raw) -> None:
    greet(raw)
    raw.hear()


def hold(raw: Raw) -> None:
    """Greet, and then neither speak nor hang up until the other does."""
    greet(raw)
    while raw.connection.recv(1 << 16):
        pass


async def test_a_server_of_another_protocol(pki: Path) -> None:
    def act(raw: Raw) -> None:
        raw.hear()
        raw.say(Control(b'{"type":"Hello","protocol":99,"version":"9.9.9"}'))
        raw.hear()

    async with raw_server(pki, act) as address:
        with pytest.raises(Refused, match=r"9\.9\.9"):
            async with dial("node-b", address, Credentials.load(pki / "a")):
                pytest.fail("was let in")


async def test_a_server_that_speaks_no_tls(pki: Path) -> None:
    def act(raw: Raw) -> None:
        raw.say(b"220 mail\r\n" * 100)
        while raw.connection.recv(1 << 16):
            pass

    async with raw_server(pki, act, tls=False) as address:
        with pytest.raises(PeerUntrusted, match="does not speak TLS"):
            async with dial("node-b", address, Credentials.load(pki / "a")):
                pytest.fail("was let in")


async def test_a_server_that_hangs_up_is_lost(pki: Path) -> None:
    async with raw_server(pki, hang_up) as address:
        with pytest.raises(PeerLost, match="node-b"):
            async with dial("node-b", address, Credentials.load(pki / "a")) as channel:
                await channel.send(OFFER)
                await channel.receive()


async def test_who_only_sends_learns_why_the_peer_hung_up(pki: Path) -> None:
    said, closed = threading.Event(), threading.Event()

    def act(raw: Raw) -> None:
        greet(raw)
        said.wait(NOTHING)  # what comes now stays unread: closing is a reset
        raw.say(PeerFailure(ErrorReport.of(Refused("the disk is full"))))
        raw.connection.close()
        closed.set()

    async def read(channel: Channel) -> None:
        with suppress(PodferryError):
            await channel.receive()

    async with (
        raw_server(pki, act) as address,
        dial("node-b", address, Credentials.load(pki / "a")) as channel,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(read, channel)
        await channel.send(OFFER)
        while not channel._link._reading:
            await anyio.sleep(0.01)
        said.set()
        assert closed.wait(NOTHING)  # the loop stands still: what the peer said waits to be read
        with pytest.raises(PeerLost, match="the disk is full"):
            await channel._link.write(bytes(1 << 20))  # as a frame of pages is: no other task runs before it fails


async def test_a_server_that_falls_silent_is_lost(pki: Path) -> None:
    async with raw_server(pki, hold) as address:
        with pytest.raises(PeerLost, match="nothing from node-b"):
            async with dial("node-b", address, Credentials.load(pki / "a"), timing=QUICK) as channel:
                await channel.receive()


async def test_a_slow_server_is_not_lost_while_its_kernel_answers(pki: Path) -> None:
    patient = Timing(beat=0.05, silence=0.1, hung=60.0)
    async with (
        raw_server(pki, hold) as address,
        dial("node-b", address, Credentials.load(pki / "a"), timing=patient) as channel,
    ):
        with anyio.move_on_after(10 * patient.silence) as waiting:
            await channel.receive()
        assert waiting.cancelled_caught


async def test_a_server_that_takes_nothing_is_lost_while_we_send(pki: Path) -> None:
    release = anyio.Event()

    def stall(raw: Raw) -> None:
        greet(raw)
        raw.hear()
        raw.say(Accept("m-1", {}), Beat(), Beat())  # the beats stay unread: we only send
        anyio.from_thread.run(release.wait)

    pages = Pages(1, 1, ((0, 256),), bytes(MAX_PAYLOAD))
    async with raw_server(pki, stall) as address:
        with pytest.raises(PeerLost):
            async with dial("node-b", address, Credentials.load(pki / "a"), timing=QUICK) as channel:
                await channel.send(OFFER)
                await channel.receive()
                while True:
                    await channel.send(pages)
        release.set()


async def test_a_living_peer_is_not_lost_while_we_do_not_read(pki: Path) -> None:
    async with serving(pki / "b", timing=LIVELY) as target:
        async with dial("node-b", target.address, Credentials.load(pki / "a"), timing=LIVELY) as channel:
            before = channel.traffic.sent
            await anyio.sleep(LIVELY.silence * 1.5)
            assert channel.traffic.sent == before, "a beat is no progress"
            await channel.send(OFFER)
            assert isinstance(await channel.receive(), Accept)
        assert isinstance(await target.reported(), PeerLost)


async def test_a_server_that_closes_a_connection_before_it_greets_is_dialled_again(pki: Path) -> None:
    async with (
        raw_server(pki, hold, closes_first=2) as address,
        dial("node-b", address, Credentials.load(pki / "a")) as channel,
    ):
        assert channel.peer == "node-b"


async def test_a_server_that_never_greets_is_lost(pki: Path) -> None:
    async with raw_server(pki, hold, closes_first=9) as address:
        with pytest.raises(PeerLost, match="node-b at"):
            async with dial("node-b", address, Credentials.load(pki / "a")):
                pytest.fail("was let in")


async def test_nobody_there(pki: Path) -> None:
    listener = listen("127.0.0.1:0")
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    with pytest.raises(PeerLost, match="cannot reach node-b"):
        async with dial("node-b", address, Credentials.load(pki / "a")):
            pytest.fail("somebody was there")


async def test_an_error_of_ours_is_told_to_the_peer(pki: Path) -> None:
    async with serving(pki / "b") as target:
        with pytest.raises(Failed, match="disk full"):
            async with dial("node-b", target.address, Credentials.load(pki / "a")) as channel:
                await channel.send(OFFER)
                raise Failed("disk full", remedy="make room")
        reported = await target.reported()
    assert isinstance(reported, PeerLost)
    assert "disk full" in str(reported)
    assert reported.remedy == "make room"


async def test_a_bug_in_a_handler_ends_that_conversation_alone(pki: Path) -> None:
    async def broken(channel: Channel) -> None:
        if isinstance(await channel.receive(), Offer):
            raise ZeroDivisionError

    async with serving(pki / "b", broken) as target:
        for _ in range(2):
            with pytest.raises(PeerLost):
                async with dial("node-b", target.address, Credentials.load(pki / "a")) as channel:
                    await channel.send(OFFER)
                    await channel.receive()
    assert [type(error) for error in target.errors] == [Bug, Bug]


async def test_an_error_out_of_a_handlers_tasks_is_named(pki: Path) -> None:
    errors = iter([ZeroDivisionError("by nought"), Refused("not today")])

    async def broken(channel: Channel) -> None:
        if isinstance(await channel.receive(), Offer):
            raise ExceptionGroup("tasks", [ExceptionGroup("tasks", [next(errors)])])

    async with serving(pki / "b", broken) as target:
        for _ in range(2):
            with pytest.raises(PodferryError):
                async with dial("node-b", target.address, Credentials.load(pki / "a")) as channel:
                    await channel.send(OFFER)
                    await channel.receive()
    assert [(type(error), str(error).partition(": ")[2]) for error in target.errors] == [
        (Bug, "ZeroDivisionError: by nought"),
        (Refused, ""),
    ]


async def test_an_illegal_word_of_ours_is_a_bug_and_is_not_sent(pki: Path) -> None:
    async with serving(pki / "b") as target, dial("node-b", target.address, Credentials.load(pki / "a")) as channel:
        with pytest.raises(Bug, match="illegal Go"):
            await channel.send(messages.Go("m-1"))
        await channel.send(OFFER)
        assert isinstance(await channel.receive(), Accept)


async def test_cancelling_does_no_harm_to_the_conversation(pki: Path) -> None:
    """Neither a send that is cancelled in the middle of its frame nor a receive loses or garbles anything."""
    pages = Pages(1, 1, ((0, 256),), bytes(MAX_PAYLOAD))
    async with serving(pki / "b") as target, dial("node-b", target.address, Credentials.load(pki / "a")) as channel:
        with anyio.move_on_after(0.01):
            await channel.receive()
        await channel.send(OFFER)
        assert isinstance(await channel.receive(), Accept)
        for number in range(1, 20):
            with anyio.move_on_after(0.001 * number):
                while True:
                    await channel.send(pages)
            await channel.send(RoundEnd(number, 1, 1))
            assert await channel.receive() == RoundAck(number)


async def test_a_cap_slows_data_and_lets_messages_pass(pki: Path) -> None:
    async with serving(pki / "b") as target, dial("node-b", target.address, Credentials.load(pki / "a")) as channel:
        await channel.send(OFFER)
        await channel.receive()
        channel.limit(1.0)  # byte per second: a second frame would take days
        pages = Pages(1, 1, ((0, 1),), bytes(PAGE))
        await channel.send(pages)
        with anyio.move_on_after(0.05) as stuck:
            await channel.send(pages)
        assert stuck.cancelled_caught
        await channel.send(RoundEnd(1, 1, 1))
        assert await channel.receive() == RoundAck(1)
        channel.limit(None)
        await channel.send(pages)


async def test_many_conversations_at_once(pki: Path) -> None:
    async def talk(target: Target) -> None:
        async with dial("node-b", target.address, Credentials.load(pki / "a")) as channel:
            await channel.send(OFFER)
            assert isinstance(await channel.receive(), Accept)
            await channel.send(messages.Abort("m-1", "enough"))
            assert isinstance(await channel.receive(), GaveUp)

    async with serving(pki / "b") as target, anyio.create_task_group() as tasks:
        for _ in range(40):
            tasks.start_soon(talk, target)
    assert target.errors == []


async def test_renewed_certificates_are_used_without_a_restart(pki: Path, tmp_path: Path) -> None:
    authority = Authority.load(pki / "ca")
    authority.issue("node-a", [], tmp_path, not_before=days(-2), not_after=days(-1))
    mine = Credentials.load(tmp_path)
    async with serving(pki / "b") as target:
        with pytest.raises(PeerUntrusted):
            async with dial("node-b", target.address, mine):
                pytest.fail("was let in")
        authority.issue("node-a", [], tmp_path)
        async with dial("node-b", target.address, mine) as channel:
            assert channel.peer == "node-b"


@pytest.mark.parametrize("address", ["", "host", "host:", "host:x", "host:65536", ":-1", "1.2.3.4:७"])
async def test_what_is_no_address(address: str, pki: Path) -> None:
    with pytest.raises(UsageError):
        parse_address(address)
    with pytest.raises(UsageError):
        async with dial("node-b", address, Credentials.load(pki / "a")):
            pytest.fail("was let in")


async def test_addresses() -> None:
    assert parse_address("10.0.0.1:7460") == ("10.0.0.1", 7460)
    assert parse_address("[fd00::1]:7460") == ("fd00::1", 7460)
    with pytest.raises(UsageError, match="cannot listen"):
        listen("192.0.2.1:0")


async def test_beats_are_no_messages(pki: Path) -> None:
    def act(raw: Raw) -> None:
        greet(raw)
        raw.say(Beat(), Beat())
        raw.hear()
        raw.say(Beat(), Accept("m-1", {}), Beat())
        raw.hear()

    async with raw_server(pki, act) as address, dial("node-b", address, Credentials.load(pki / "a")) as channel:
        await channel.send(OFFER)
        assert await channel.receive() == Accept("m-1", {})

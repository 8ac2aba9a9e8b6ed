"""What a node writes down of its pods' connections that go on, and when it forgets them; what a peer's agent takes."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from podferry.agent.connection_peers import Translator
from podferry.core.connections import TCP, End, KernelSocket, end_of
from podferry.core.translation import Translation
from podferry.errors import Failed, PeerMisbehaved, PeerUntrusted, PodferryError, Refused
from podferry.node.netlock import Namespace
from podferry.wire.messages import MovedConnection, Translate, Translated
from podferry.workload.pod import kept_connections, translations
from podferry.workload.pod.cluster_port import MigrationName, MovingPod, PeerPod
from podferry.workload.pod.kept_connections import KeptConnections
from podferry.workload.pod.translations import PodTranslations

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

OLD, NEW, NEWER, PEER = "10.0.0.5", "10.0.1.6", "10.0.2.7", "10.0.1.1"
ONE, OTHER = MigrationName("default", "one", "u-1"), MigrationName("default", "other", "u-2")
HERE, GONE = Namespace("/run/netns/p", 7), Namespace("/run/netns/q", 8)


def ends(port: int = 9000) -> tuple[End, End]:
    """As the peer sees its connection with the pod that moves."""
    return end_of(f"{PEER}:{port}"), end_of(f"{OLD}:40000")


def translated(now: str, port: int = 9000, local_now: str = PEER) -> Translation:
    return Translation(TCP, *ends(port), ipaddress.ip_address(local_now), ipaddress.ip_address(now))


class Node:
    """A node's pods, by the uids that it holds, and the rules in their namespaces."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.pods, self.open, self.rules = {"p"}, {ends()}, list[Translation]()
        self.here = PodTranslations(directory / "translations", directory, self)  # type: ignore[arg-type]
        patch.setattr(Namespace, "there", lambda network: network == HERE)
        patch.setattr(translations, "in_network_at", lambda path, call: call())
        patch.setattr(translations, "establish", self._establish)
        patch.setattr(translations, "open_here", lambda: self.open)
        patch.setattr(Namespace, "of", staticmethod(lambda spec, pid: HERE))

    def _establish(self, found: list[Translation]) -> None:
        self.rules = list(found)

    def holds_pod(self, uid: str) -> bool:
        return uid in self.pods

    def pod(self, uid: str) -> dict[str, Any]:
        record = SimpleNamespace(record=SimpleNamespace(spec_json=dict))
        return {"main": record} if uid in self.pods else {}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


def test_a_translation_is_written_down_as_it_is() -> None:
    one = translated(NEW)
    assert Translation.from_dict(one.to_dict()) == one
    assert one.other.other == one
    assert (one.other.local, one.other.local_now) == (one.remote, one.remote_now)
    assert one.is_needed
    assert not translated(OLD).is_needed
    for wrong in (
        {"protocol": "udp"},
        {"remote_now": "fd00::1"},
        {"local": "10.0.0.1"},
        {"local": "10.0.0.1:65536"},
        {"remote": "x:1"},
    ):
        with pytest.raises(ValueError):
            Translation.from_dict(one.to_dict() | wrong)


def test_what_a_migration_asked_for_holds_when_the_pod_has_moved(node: Node) -> None:
    node.here.take("p", HERE, [translated(NEW)], ONE)
    assert node.rules == [translated(NEW)]
    assert node.here.pending("p") == {ONE}
    node.open.clear()
    node.here.prune("p")
    assert node.rules, "the socket may be on its way"
    node.open.add(ends())
    node.here.settle("p", ONE, moved=True)
    node.here.prune("p")
    assert (node.rules, node.here.pending("p")) == ([translated(NEW)], set())
    node.here.take("p", HERE, [translated(NEWER)], OTHER)
    assert node.rules == [translated(NEWER)], "one translation, never a chain"
    node.here.settle("p", OTHER, moved=False)
    assert node.rules == [translated(NEW)]


def test_a_move_that_was_taken_back_leaves_nothing(node: Node) -> None:
    node.here.take("p", HERE, [translated(NEW)], ONE)
    node.here.take("p", HERE, [translated(NEWER)], ONE)
    node.here.settle("p", OTHER, moved=False)
    assert node.rules == [translated(NEWER)], "that is another one's"
    node.here.settle("p", ONE, moved=False)
    assert (node.rules, node.here.pods()) == ([], [])


def test_rules_go_with_their_connection_and_with_their_pod(node: Node) -> None:
    node.open.add(ends(9001))
    node.here.take("p", HERE, [translated(NEW), translated(NEW, 9001)], ONE)
    node.here.settle("p", ONE, moved=True)
    node.open.discard(ends())
    node.here.prune("p")
    assert node.rules == [translated(NEW, 9001)]
    node.pods.clear()
    node.here.prune("p")
    assert (node.rules, node.here.pods()) == ([], [])


def test_an_agents_start_makes_the_rules_what_they_must_be(node: Node) -> None:
    node.here.take("p", HERE, [translated(NEW)], ONE)
    node.here.take("q", GONE, [translated(NEW)], ONE)
    node.rules = []
    node.here.establish()
    assert node.rules == [translated(NEW)]
    node.here.prune("q")
    assert node.here.pods() == ["p"]


def test_podferry_takes_its_rules_along_when_it_goes(node: Node, tmp_path: Path) -> None:
    node.here.take("p", HERE, [translated(NEW)], ONE)
    (tmp_path / "translations" / "r").write_text("nonsense")
    said: list[str] = []
    translations.remove_all(tmp_path / "translations", said.append)
    assert node.rules == []
    assert len(said) == 1
    translations.remove_all(tmp_path / "nothing", said.append)


# The peer's agent.


class FakeCluster:
    """What the Migration says."""

    def __init__(self) -> None:
        self.addresses, self.peers, self.outcome = {OLD}, {"p"}, None

    async def moving(self, migration: MigrationName, target: str) -> MovingPod:
        if target != "c":
            raise Refused(f"{target} is not the target")
        return MovingPod(frozenset(self.addresses), frozenset(self.peers))

    async def moved(self, migration: MigrationName) -> bool | None:
        return self.outcome


class Wire:
    """A conversation of which one end is ours."""

    def __init__(self, peer: str, answer: Any = None) -> None:
        self.peer, self.said, self._answer = peer, list[Any](), answer

    async def send(self, message: Any) -> None:
        self.said.append(message)

    async def receive(self) -> Any:
        return self._answer


class Peer:
    def __init__(self, node: Node) -> None:
        self.cluster, self.leaving, self.asked = FakeCluster(), set[str](), list[bool]()
        self.wires: dict[str, Wire] = {}
        self.translator = Translator("b", self.cluster, node.here, self._dial, self._leaves)  # type: ignore[arg-type]

    def _leaves(self, uid: str) -> bool:
        return self.asked.pop(0) if self.asked else uid in self.leaving

    @asynccontextmanager
    async def _dial(self, node: str) -> Iterator[Wire]:  # type: ignore[misc]
        yield self.wires[node]

    async def told(self, *connections: MovedConnection, by: str = "c", migration: MigrationName = ONE) -> Wire:
        wire = Wire(by)
        asked = Translate(migration.uid, migration.namespace, migration.name, connections)
        await self.translator.answer(wire, asked)  # type: ignore[arg-type]
        return wire


def moved(now: str = NEW, port: int = 9000, pod: str = "p") -> MovedConnection:
    local, remote = ends(port)
    return MovedConnection(pod, str(local), str(remote), now)


@pytest.fixture
def peer(node: Node) -> Peer:
    return Peer(node)


async def test_a_peer_rewrites_what_its_pod_has_open_and_says_what_it_has_not(node: Node, peer: Peer) -> None:
    wire = await peer.told(moved(), moved(port=9001))
    assert wire.said == [Translated("u-1", (1,))]
    assert node.rules == [translated(NEW)]
    await peer.told(moved(NEWER))
    assert node.rules == [translated(NEWER)], "the same target may say it again"


async def test_a_pod_that_is_gone_has_no_connections(node: Node, peer: Peer) -> None:
    node.pods.clear()
    assert (await peer.told(moved())).said == [Translated("u-1", (0,))]


async def test_a_later_move_is_of_the_pod_that_has_the_newest_address(node: Node, peer: Peer) -> None:
    await peer.told(moved())
    with pytest.raises(Refused, match="about to change"):
        await peer.told(moved(NEWER), migration=OTHER)
    peer.cluster.outcome = True  # type: ignore[assignment]
    with pytest.raises(PeerUntrusted, match="another pod"):
        await peer.told(moved(NEWER), migration=OTHER)
    peer.cluster.addresses = {NEW}
    await peer.told(moved(NEWER), migration=OTHER)
    assert node.rules == [translated(NEWER)]


@pytest.mark.parametrize(
    ("connection", "by", "error"),
    [
        (moved(), "d", Refused),
        (moved(pod="stranger"), "c", PeerUntrusted),
        (MovedConnection("p", f"{PEER}:9000", "10.0.9.9:5432", NEW), "c", PeerUntrusted),
        (MovedConnection("p", "nonsense", f"{OLD}:1", NEW), "c", PeerMisbehaved),
        (MovedConnection("p", str(ends()[0]), str(ends()[1]), "nonsense"), "c", PeerMisbehaved),
    ],
)
async def test_nobody_turns_a_connection_away_who_may_not(
    node: Node, peer: Peer, connection: MovedConnection, by: str, error: type[PodferryError]
) -> None:
    node.open.add((end_of(f"{PEER}:9000"), end_of("10.0.9.9:5432")))
    with pytest.raises(error):
        await peer.told(connection, by=by)
    assert (node.rules, node.here.pods()) == ([], [])


@pytest.mark.parametrize("asked", [[True], [False, True]])
async def test_a_pod_that_is_about_to_leave_takes_nothing(node: Node, peer: Peer, asked: list[bool]) -> None:
    """Also where it began to stand still while the connection was taken."""
    peer.asked = asked
    with pytest.raises(Refused, match="moves at the same time"):
        await peer.told(moved())
    assert (node.rules, node.here.pods()) == ([], [])


async def test_each_node_is_told_of_its_own_pods_and_the_missing_are_known(node: Node, peer: Peer) -> None:
    peer.wires["d"] = Wire("d", Translated("u-1", (0,)))
    away = translated(NEW, 9002)
    found = [(PeerPod("p", "b"), translated(NEW)), (PeerPod("r", "d"), away)]
    peer.cluster.moving = _of_us  # type: ignore[method-assign]
    assert await peer.translator.tell(ONE, found) == {away.ends}
    assert node.rules == [translated(NEW)]
    assert peer.wires["d"].said[0].connections[0].remote_now == NEW
    peer.wires["d"] = Wire("d", Translated("u-1", (7,)))
    with pytest.raises(Failed, match="cannot be told"):
        await peer.translator.tell(ONE, found)


async def _of_us(migration: MigrationName, target: str) -> MovingPod:
    return MovingPod(frozenset({OLD}), frozenset({"p"}))


@pytest.mark.parametrize(("outcome", "left"), [(None, [translated(NEW)]), (True, [translated(NEW)]), (False, [])])
async def test_what_became_of_the_migration_is_asked(
    node: Node, peer: Peer, outcome: bool | None, left: list[Translation]
) -> None:
    await peer.told(moved())
    peer.cluster.outcome = outcome  # type: ignore[assignment]
    await peer.translator._look_after("p")
    assert node.rules == left
    assert bool(node.here.pending("p")) is (outcome is None)


# The source.


class Known:
    """The cluster of a source, which knows who is where."""

    outcome: bool | None = None

    async def moved(self, migration: MigrationName) -> bool | None:
        return self.outcome

    async def peers(self, id: str, wanted: frozenset[str]) -> tuple[MigrationName, dict[str, PeerPod]]:
        return ONE, {one: PeerPod(f"at {one}", "n") for one in wanted}


def open_to(remote: str, state: int = 1, *, held: bool = True) -> KernelSocket:
    return KernelSocket(TCP, ends()[0], end_of(remote), state, held)


async def test_those_go_on_whose_other_end_is_known(node: Node) -> None:
    kept = KeptConnections("u-1", "p", frozenset({OLD}), Known(), node.here)  # type: ignore[arg-type]
    sockets = [open_to(f"{OLD}:1"), open_to("10.9.9.9:1"), open_to(f"{OLD}:2", 2), open_to(f"{OLD}:3", held=False)]
    assert kept.of(sockets) == (), "nobody was asked yet"
    await kept.ask()
    assert [str(one.remote) for one in kept.of(sockets)] == [f"{OLD}:1"]


async def test_the_newest_address_of_the_other_end_counts(node: Node) -> None:
    node.here.take("p", HERE, [translated(NEW)], ONE)
    cluster = Known()
    kept = KeptConnections("u-2", "p", frozenset({NEW}), cluster, node.here)  # type: ignore[arg-type]
    await kept.ask()
    with pytest.raises(Failed, match="moves at the same time"):
        kept.of([open_to(f"{OLD}:40000")])
    cluster.outcome = True
    await kept.ask()
    assert kept.of([open_to(f"{OLD}:40000")]) == (translated(NEW),)


def test_what_travels_is_read_strictly(tmp_path: Path) -> None:
    assert kept_connections.read(tmp_path) == ()
    path = tmp_path / kept_connections.IMAGE
    path.write_bytes(kept_connections.encode([translated(NEW)]))
    assert kept_connections.read(tmp_path) == (translated(NEW),)
    for wrong in (b"", b"{}x", b"[1]", b'[{"protocol": "tcp"}]', kept_connections.encode([translated(NEW)] * 2001)):
        path.write_bytes(wrong)
        with pytest.raises(PeerMisbehaved):
            kept_connections.read(tmp_path)

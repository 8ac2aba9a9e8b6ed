"""Which peers may offer what to an agent, stand-alone and in a cluster."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from agent_rig import RECORD, Rig

from podferry.agent import peer_requests
from podferry.agent.admission import demand_allowed, demand_peer
from podferry.agent.kubernetes import Kubernetes
from podferry.core.phases import SourcePhase
from podferry.errors import PeerUntrusted, Refused
from podferry.model import Mode
from podferry.wire.messages import Offer
from podferry.workload.config import Config
from podferry.workload.offered import OfferedContainer, OfferedPod, PodPart
from podferry.workload.pod.cluster_port import Cluster, PodName

pytestmark = pytest.mark.unit

POD = PodName("ns", "job", "11111111-2222-3333-4444-555555555555")
OFFERED = OfferedPod(POD, (PodPart("main", "c0", ()),), ())


class Admitting:
    """A cluster that admits what the test says, and remembers what it was asked."""

    def __init__(self, refusal: Refused | None = None) -> None:
        self.refusal, self.asked = refusal, list[tuple[Any, ...]]()

    async def admit(self, id: str, pod: PodName, source: str, mode: Mode) -> None:
        self.asked.append((id, pod, source, mode))
        if self.refusal is not None:
            raise self.refusal


def config(*peers: str) -> Config:
    return Config("b", "b:1", Path(), dict.fromkeys(peers, "x:1"))


def offer(offered: OfferedContainer | OfferedPod, name: str) -> Offer:
    return Offer("m-1", name, Mode.LIVE, offered.to_dict(), {}, 1, 1)


def test_alone_a_certified_node_that_is_no_peer_is_refused() -> None:
    demand_peer(config("a", "c"), None, "a")
    with pytest.raises(PeerUntrusted, match="does not know d"):
        demand_peer(config("a", "c"), None, "d")
    with pytest.raises(PeerUntrusted):
        demand_peer(config(), None, "a")


def test_nobody_speaks_under_this_nodes_own_name() -> None:
    for cluster in (None, Admitting()):
        with pytest.raises(PeerUntrusted, match="own name"):
            demand_peer(config("a", "b"), cluster, "b")  # type: ignore[arg-type]


def test_in_a_cluster_plain_containers_are_refused_whoever_offers_them() -> None:
    cluster = Admitting()
    plain = OfferedContainer(RECORD, ())
    with pytest.raises(Refused, match="takes pods only"):
        anyio.run(demand_allowed, config("a"), cluster, "a", offer(plain, RECORD.id), plain)
    assert not cluster.asked


def test_in_a_cluster_the_migration_is_asked_of_each_pod() -> None:
    cluster = Admitting()
    anyio.run(demand_allowed, config(), cluster, "a", offer(OFFERED, str(POD)), OFFERED)
    assert cluster.asked == [("m-1", POD, "a", Mode.LIVE)]
    cluster.refusal = Refused("not this one")
    with pytest.raises(Refused, match="not this one"):
        anyio.run(demand_allowed, config(), cluster, "a", offer(OFFERED, str(POD)), OFFERED)


def test_alone_pods_are_refused() -> None:
    with pytest.raises(Refused, match="does not belong to a Kubernetes cluster"):
        anyio.run(demand_allowed, config("a"), None, "a", offer(OFFERED, str(POD)), OFFERED)


def test_the_agent_lets_no_unknown_node_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real `PeerRequests.converse`: nothing is looked at, nothing made, and the source hears why."""
    rig = Rig(tmp_path)
    rig.configs["b"] = dataclasses.replace(rig.configs["b"], peers={"c": "c:1"})
    rig.move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") in (SourcePhase.ROLLED_BACK, SourcePhase.REFUSED)
    assert not list(rig.configs["b"].migrations.iterdir())
    assert any("does not know a" in str(error) for error in rig.agents["b"].errors)


def test_the_agent_of_a_cluster_takes_no_plain_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, cluster=Admitting())
    rig.move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") == SourcePhase.REFUSED
    assert "takes pods only" in rig.records["a"]["reason"]
    assert not list(rig.configs["b"].migrations.iterdir())


def test_one_name_is_weighed_once_at_a_time(tmp_path: Path) -> None:
    """Two offers of one Migration at the same moment: the second may not slip in before the first has its journal."""
    agent = SimpleNamespace(_weighed={"m-1"})
    channel = SimpleNamespace(peer="a")
    plain = OfferedContainer(RECORD, ())

    async def twice() -> None:
        await peer_requests.PeerRequests._receive(agent, channel, offer(plain, RECORD.id))  # type: ignore[arg-type]

    with pytest.raises(Exception, match="twice at the same time"):
        anyio.run(twice)


def _stand_in() -> type:
    path = Path(__file__).parents[1] / "cluster/standin.py"
    spec = importlib.util.spec_from_file_location("standin", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type = module.Directory
    return found


@pytest.mark.parametrize("kind", [Kubernetes, _stand_in()], ids=["real", "stand-in"])
def test_whoever_plays_the_cluster_has_all_that_the_agent_asks(kind: type) -> None:
    """The port's methods, with their parameters: a stand-in that lacks one hides what the real one is asked."""
    for name, method in inspect.getmembers(Cluster, inspect.isfunction):
        if not name.startswith("_"):
            own = getattr(kind, name, None)
            assert own is not None, name
            assert list(inspect.signature(own).parameters) == list(inspect.signature(method).parameters), name
            assert inspect.iscoroutinefunction(own) == inspect.iscoroutinefunction(method), name

"""The layer store over a share that behaves as badly as a network file system may.

Every call of every node is one step of a scheduler that picks, at random, who goes next and how much time passes. The
simulated share shows old names for up to `STALE` seconds, loses replies of calls that took effect, and lets calls that
their caller gave up take effect later. Nodes die between any two steps. After every step the rules are checked.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from podferry.errors import PodferryError
from podferry.snapshotter import layout
from podferry.snapshotter.collect import Collector
from podferry.snapshotter.faults import LayerDamaged, ShareHung
from podferry.snapshotter.layer_ports import Payload
from podferry.snapshotter.layout import FormName, LayerRecord
from podferry.snapshotter.leases import Lease, Leases
from podferry.snapshotter.references import References
from podferry.snapshotter.store import Layer, LayerStore

pytestmark = pytest.mark.unit

STALE = 60.0  # seconds for which a client may go on seeing old names
SETTLE = 150.0
PERIOD = 90.0
CHAIN = "sha256:" + "a" * 64
NAME = layout.name_of(CHAIN)
CHUNKS = 3


class Died(BaseException):
    """The node lost power."""


class Entry:
    """An inode: a file's content, or a directory's entries. It outlives its name, as with NFS handles."""

    def __init__(self, data: bytes | None = None) -> None:
        self.data = data
        self.children: dict[str, Entry] = {}
        self.gone = False


class Scheduler:
    """Runs one actor at a time, each until its next step; `check` after every step."""

    def __init__(self, seed: int, check: Callable[[], None]) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.check = check
        self.actors: dict[str, tuple[threading.Thread, threading.Semaphore]] = {}
        self.wake: dict[str, float] = {}
        self.doomed: set[str] = set()
        self.later: list[Callable[[], None]] = []
        self.back = threading.Semaphore(0)
        self.errors: list[BaseException] = []

    def start(self, name: str, body: Callable[[], None]) -> None:
        go = threading.Semaphore(0)

        def run() -> None:
            go.acquire()
            try:
                body()
            except Died:
                pass
            except BaseException as error:  # noqa: BLE001  raised again by the test
                self.errors.append(error)
            del self.actors[name]
            self.back.release()

        thread = threading.Thread(target=run, daemon=True)
        self.actors[name] = (thread, go)
        self.wake[name] = 0.0
        thread.start()

    def step(self, name: str, pause: float = 0.0) -> None:
        """Called by an actor: let others go on."""
        self.wake[name] = self.now + pause
        go = self.actors[name][1]
        self.back.release()
        go.acquire()
        if name in self.doomed:
            raise Died

    def run(self, most: int = 20_000) -> None:
        for _ in range(most):
            if not self.actors:
                return
            self.now += self.random.choice((0.0, 0.01, 0.5, 3.0))
            if self.later and self.random.random() < 0.05:
                self.later.pop(self.random.randrange(len(self.later)))()
                self.check()
            ready = [name for name in self.actors if self.wake[name] <= self.now]
            if not ready:
                self.now = min(self.wake[name] for name in self.actors)
                continue
            self.actors[self.random.choice(sorted(ready))][1].release()
            self.back.acquire()
            if self.errors:
                raise self.errors[0]
            self.check()
        raise AssertionError(f"never ended: {sorted(self.actors)}")


class Clock:
    def __init__(self, world: Scheduler, name: str) -> None:
        self.world, self.name = world, name

    def monotonic(self) -> float:
        return self.world.now

    def wall(self) -> float:
        return self.world.now + sum(map(ord, self.name)) % 1000  # no two nodes agree on the time

    def pause(self, seconds: float, stop: threading.Event | None = None) -> bool:
        self.world.step(self.name, seconds)
        return stop is not None and stop.is_set()


class SimulatedShare:
    """One client's view of the server's tree `root`."""

    def __init__(self, world: Scheduler, name: str, root: Entry, *, stale: float, faults: float) -> None:
        self.world, self.name, self.root = world, name, root
        self.stale, self.faults = stale, faults
        self.cache: dict[int, tuple[float, dict[str, Entry]]] = {}

    def _entries(self, directory: Entry, *, fresh: bool = False) -> dict[str, Entry]:
        then, seen = self.cache.get(id(directory), (-1e9, {}))
        if fresh or self.world.now - then >= self.stale or self.world.random.random() < 0.5:
            seen = dict(directory.children)
            self.cache[id(directory)] = (self.world.now, seen)
        return seen

    def lookup(self, path: str, *, fresh: bool = False) -> Entry:
        entry = self.root
        for part in path.split("/"):
            found = self._entries(entry, fresh=fresh).get(part)
            if found is None or found.gone:
                found = entry.children.get(part) if found is not None else None  # a dead handle is looked up again
                if found is None:
                    raise FileNotFoundError(path)
            entry = found
        return entry

    def _parent(self, path: str) -> tuple[Entry, str]:
        folder, _, name = path.rpartition("/")
        parent = self.lookup(folder, fresh=True)  # changes are made by the server, on what it has
        self.cache.pop(id(parent), None)  # and a client sees its own
        return parent, name

    def _change(self, apply: Callable[[], None]) -> None:
        self.world.step(self.name)
        chance = self.world.random.random()
        if chance < self.faults / 2:  # given up: happens later, or never

            def late() -> None:
                try:
                    apply()
                except OSError:
                    return

            self.world.later.append(late)
            raise ShareHung("no answer", why="simulated")
        apply()
        if chance < self.faults:  # the reply is lost, the client asks again
            apply()

    def create(self, path: str, data: bytes) -> None:
        def apply() -> None:
            parent, name = self._parent(path)
            if name in parent.children:
                raise FileExistsError(path)
            parent.children[name] = Entry(data)

        self._change(apply)

    def rewrite(self, path: str, data: bytes) -> None:
        def apply() -> None:
            parent, name = self._parent(path)
            if name not in parent.children:
                raise FileNotFoundError(path)
            parent.children[name].data = data

        self._change(apply)

    def replace(self, path: str, data: bytes) -> None:
        def apply() -> None:
            parent, name = self._parent(path)
            if name in parent.children:
                parent.children[name].gone = True
            parent.children[name] = Entry(data)

        self._change(apply)

    def read(self, path: str) -> bytes:
        self.world.step(self.name)
        data = self.lookup(path).data
        assert data is not None
        return data

    def names(self, path: str) -> list[str]:
        self.world.step(self.name)
        try:
            return sorted(self._entries(self.lookup(path)))
        except FileNotFoundError:
            return []

    def refresh(self, path: str) -> None:
        self.world.step(self.name)
        self.lookup(path, fresh=True)
        self.cache.pop(id(self.lookup(path)), None)

    def make(self, path: str) -> None:
        def apply() -> None:
            parent, name = self._parent(path)
            if name in parent.children:
                raise FileExistsError(path)
            parent.children[name] = Entry()

        self._change(apply)

    def rename(self, old: str, new: str) -> None:
        def apply() -> None:
            source, name = self._parent(old)
            target, other = self._parent(new)
            if name not in source.children:
                raise FileNotFoundError(old)
            if other in target.children and target.children[other].children:
                raise FileExistsError(new)
            target.children[other] = source.children.pop(name)

        self._change(apply)

    def remove(self, path: str) -> None:
        def apply() -> None:
            try:
                parent, name = self._parent(path)
                parent.children.pop(name).gone = True
            except (FileNotFoundError, KeyError):
                return

        self._change(apply)

    def remove_tree(self, path: str) -> None:
        try:
            names = list(self.lookup(path, fresh=True).children)
        except FileNotFoundError:
            return
        for name in names:
            self.remove(f"{path}/{name}")
        self.remove(path)


class ThreeFiles:
    """A form whose layers are three files; each is a step, so that crashes and onlookers come in between."""

    name = FormName.DIR

    def __init__(self, share: SimulatedShare) -> None:
        self.share = share

    def write(self, source: Path, into: str) -> Payload:
        for number in range(CHUNKS):
            self.share.replace(f"{into}/{number}", b"%d" % number)
        return Payload("digest", CHUNKS, CHUNKS)

    def check(self, at: str, record: LayerRecord) -> None:
        for number in range(CHUNKS):
            if self.share.read(f"{at}/{number}") != b"%d" % number:
                raise LayerDamaged(at)

    def glance(self, at: str, record: LayerRecord) -> None:
        self.share.lookup(f"{at}/0")


class Cluster:
    """Nodes on one share, and the rules that must hold after every step."""

    def __init__(self, seed: int, *, stale: float = STALE, faults: float = 0.04, period: float = PERIOD) -> None:
        self.period = period
        self.root = Entry()
        for folder in layout.FOLDERS:
            self.root.children[folder] = Entry()
        self.world = Scheduler(seed, self.check)
        self.stale, self.faults = stale, faults
        self.mounted: dict[str, Entry] = {}
        self.made: list[str] = []
        self.served: list[str] = []

    def check(self) -> None:
        for name, directory in self.root.children[layout.LAYERS].children.items():
            assert self.whole(directory), f"half a layer {name} can be seen at {self.world.now}"
        for node, directory in self.mounted.items():
            assert self.whole(directory), f"a layer was removed under {node} at {self.world.now}"

    @staticmethod
    def whole(directory: Entry) -> bool:
        wanted = {layout.RECORD, *(str(number) for number in range(CHUNKS))}
        return set(directory.children) == wanted and not any(one.gone for one in directory.children.values())

    def share(self, node: str) -> SimulatedShare:
        return SimulatedShare(self.world, node, self.root, stale=self.stale, faults=self.faults)

    def store(self, node: str) -> LayerStore:
        share, clock = self.share(node), Clock(self.world, node)
        return LayerStore(
            share,
            clock,
            References(share, clock, node, "0"),
            Leases(share, clock, node, self.period),
            forms={FormName.DIR: ThreeFiles(share)},
            form=FormName.DIR,
        )

    def node(self, name: str, uses: int) -> None:
        """A node that uses the layer some times, making it where it has to."""
        store = self.store(name)

        def body() -> None:
            for _ in range(uses):
                while not self.use_once(name, store):
                    store.clock.pause(self.world.random.uniform(0, 20))
                store.clock.pause(self.world.random.uniform(0, 400))
                self.mounted.pop(name)
                store.references.drop(CHAIN)
                retried(store.references.heartbeat, store)
            self.served.append(name)

        self.world.start(name, body)

    def use_once(self, name: str, store: LayerStore) -> bool:
        lease = None
        try:
            claimed = store.claim(CHAIN)
            if isinstance(claimed, Lease):
                lease = claimed
                self.made.append(name)
                claimed = store.publish(CHAIN, Path())
            if not isinstance(claimed, Layer):
                return False
            self.world.step(name)
            assert isinstance(store.share, SimulatedShare)
            try:
                self.mounted[name] = store.share.lookup(store.need(CHAIN).at)  # a mount holds the directory itself
            except FileNotFoundError:
                return False
            return True
        except PodferryError:
            return False
        finally:
            if lease is not None:
                with suppress(PodferryError):
                    store.leases.release(lease)

    def collector(self, name: str, passes: int) -> None:
        share = self.share(name)
        collector = Collector(share, Clock(self.world, name), grace=0.0, settle=SETTLE, abandoned=1000.0)

        def body() -> None:
            for _ in range(passes):
                with suppress(PodferryError):
                    collector.collect()
                collector.clock.pause(self.world.random.uniform(0, 200))

        self.world.start(name, body)

    def kill(self, name: str, at: float) -> None:
        """Cut a node's power at a time."""

        def body() -> None:
            self.world.step(f"death of {name}", at)
            self.world.doomed.add(name)
            self.mounted.pop(name, None)

        self.world.start(f"death of {name}", body)


def retried(call: Callable[[], None], store: LayerStore) -> None:
    while True:
        try:
            return call()
        except PodferryError:
            store.clock.pause(1.0)


@pytest.mark.parametrize("block", range(10))
def test_two_publishers_and_removers_never_show_half_a_layer_nor_take_one_in_use(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        cluster = Cluster(seed)
        cluster.node("a", uses=3)
        cluster.node("b", uses=3)
        cluster.collector("c", passes=12)
        if seed % 2:
            cluster.collector("d", passes=12)
        if seed % 3 == 0:
            cluster.kill("a", cluster.world.random.uniform(0, 300))
        cluster.world.run()
        assert set(cluster.served) >= ({"b"} if seed % 3 == 0 else {"a", "b"}), seed


@pytest.mark.parametrize("seed", range(30))
def test_ten_nodes_at_once_make_a_layer_once(seed: int) -> None:
    cluster = Cluster(seed, faults=0.0, period=1e6)  # the owner lives and shows it
    for number in range(10):
        cluster.node(f"n{number}", uses=1)
    cluster.world.run()
    assert len(cluster.served) == 10
    assert len(cluster.made) == 1


@pytest.mark.parametrize("seed", range(50))
def test_a_dead_publishers_work_is_taken_over_and_its_leavings_go(seed: int) -> None:
    cluster = Cluster(seed, faults=0.0)
    cluster.node("dying", uses=1)
    cluster.kill("dying", cluster.world.random.uniform(0, 15))
    cluster.node("heir", uses=1)
    cluster.world.run()
    assert "heir" in cluster.served
    cluster.collector("c", passes=30)
    cluster.world.run()
    assert not cluster.root.children[layout.STAGING].children
    assert not cluster.root.children[layout.DOOMED].children


def test_an_unused_layer_is_removed_in_the_end() -> None:
    cluster = Cluster(1, faults=0.0)
    cluster.node("a", uses=1)
    cluster.world.run()
    assert NAME in cluster.root.children[layout.LAYERS].children
    cluster.collector("c", passes=20)
    cluster.world.run()
    for folder in (layout.LAYERS, layout.TRASH, layout.DOOMED, layout.UNUSED):
        assert not cluster.root.children[folder].children


def test_the_simulation_finds_a_node_that_does_not_refer_before_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are only worth something if breaking the protocol breaks them."""
    monkeypatch.setattr(References, "add", lambda self, *chains: None)
    with pytest.raises(AssertionError, match="removed under"):
        for seed in range(300):
            cluster = Cluster(seed)
            cluster.node("a", uses=3)
            cluster.node("b", uses=3)
            cluster.collector("c", passes=12)
            cluster.world.run()

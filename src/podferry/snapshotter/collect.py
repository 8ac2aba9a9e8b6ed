"""Removing layers that no node uses, without ever removing one that a node has begun to use.

Four steps, each of which a crash may interrupt and any node may go on with:

1. a layer without references gets a note in `unused/`; nothing happens for the grace period;
2. it is renamed into `trash/`: who wants it now moves it back;
3. after `settle` seconds, longer than any cache shows old names, the references are read again. If one has
   appeared the layer goes back;
4. otherwise it is renamed into `doomed/`, which decides it, and deleted.

The grace period goes by the wall clock and is a courtesy; that no used layer goes rests on step 3 alone, which
measures with the collector's own monotonic clock.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from podferry.errors import PodferryError
from podferry.snapshotter import layout
from podferry.snapshotter.faults import ShareTampered
from podferry.snapshotter.layer_ports import Clock, Share
from podferry.snapshotter.references import all_nodes

DAY = 86_400.0  # seconds


@dataclass(frozen=True)
class Collected:
    """What one pass did, by chain id or entry name."""

    noted: list[str]
    condemned: list[str]
    restored: list[str]
    removed: list[str]


@dataclass
class Collector:
    """Collects when `collect` is called, once every while. `grace`, `settle` and `abandoned` are in seconds."""

    share: Share
    clock: Clock
    grace: float = DAY
    settle: float = 150.0
    abandoned: float = DAY
    _first_seen: dict[str, float] = field(default_factory=dict)

    def collect(self) -> Collected:
        """One pass. Two at a time, on two nodes, do no harm."""
        used = self._used()
        done = Collected([], [], [], [])
        condemnable = self._note(used, done)
        self._judge(used, done)
        for name in condemnable:
            with suppress(FileNotFoundError, FileExistsError):
                self.share.rename(f"{layout.LAYERS}/{name}", f"{layout.TRASH}/{name}.{layout.new_token()}")
                done.condemned.append(name)
        self._sweep(done)
        return done

    def _used(self) -> frozenset[str]:
        return frozenset().union(*(node.layers for node in all_nodes(self.share).values()))

    def _note(self, used: frozenset[str], done: Collected) -> list[str]:
        """Keep the notes of step 1; the names whose grace is over."""
        over: list[str] = []
        notes = set(self.share.names(layout.UNUSED))
        layers = set(self.share.names(layout.LAYERS))
        for name in layers:
            chain = layout.chain_of(name)
            if chain is None or chain in used:
                continue
            if name not in notes:
                with suppress(FileExistsError):
                    self.share.create(f"{layout.UNUSED}/{name}", layout.encode({"since": self.clock.wall()}))
                    done.noted.append(name)
            if self._age(name) >= self.grace:
                over.append(name)
        for name in notes:
            if name not in layers or layout.chain_of(name) in used:
                self.share.remove(f"{layout.UNUSED}/{name}")
        return over

    def _age(self, name: str) -> float:
        try:
            return self.clock.wall() - layout.decode_unused(self.share.read(f"{layout.UNUSED}/{name}"))
        except FileNotFoundError:
            return -1.0
        except (ValueError, ShareTampered):
            self.share.remove(f"{layout.UNUSED}/{name}")  # torn by a crash: begin again
            return -1.0

    def _judge(self, used: frozenset[str], done: Collected) -> None:
        for entry in self.share.names(layout.TRASH):
            chain, condemned = layout.chain_of(entry), f"{layout.TRASH}/{entry}"
            if chain is not None and chain in used:
                with suppress(
                    FileNotFoundError, FileExistsError
                ):  # exists: made again; the old one may still be mounted
                    self.share.rename(condemned, f"{layout.LAYERS}/{layout.name_of(chain)}")
                    done.restored.append(entry)
            elif self._watched(condemned) >= self.settle and (chain is None or chain not in self._used()):
                with suppress(FileNotFoundError, FileExistsError):
                    self.share.rename(condemned, f"{layout.DOOMED}/{entry}")
                    done.removed.append(entry)

    def _sweep(self, done: Collected) -> None:
        """Delete what is doomed, what crashed publishers left, and lists of layers that are gone."""
        for entry in self.share.names(layout.STAGING):
            stage = f"{layout.STAGING}/{entry}"
            if self._watched(stage) >= self.abandoned:
                with suppress(FileNotFoundError, FileExistsError):
                    self.share.rename(stage, f"{layout.DOOMED}/{entry}")
        kept = {*self.share.names(layout.LAYERS), *(one.partition(".")[0] for one in self.share.names(layout.TRASH))}
        for name in set(self.share.names(layout.READ)) - kept:
            self.share.remove(f"{layout.READ}/{name}")
        for entry in self.share.names(layout.DOOMED):
            with suppress(PodferryError, FileExistsError):  # another collector is at it as well
                self.share.remove_tree(f"{layout.DOOMED}/{entry}")

    def _watched(self, path: str) -> float:
        """For how long this collector has seen `path`, in seconds."""
        now = self.clock.monotonic()
        return now - self._first_seen.setdefault(path, now)

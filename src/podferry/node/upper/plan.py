"""What turns the target's tree into the source's: a pure function of two manifests.

Non-directories are followed by their identity (inode), not by their name, so a rename moves the file on the target
instead of sending it again, and hard links stay hard links whenever and wherever their names were made. To be free of
the order in which names are exchanged (log rotation, two files swapped), every inode that keeps none of its old
names is first parked under a name of its own, then all names that must go are removed, then every name is filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from podferry.node.upper.entries import Entry, Manifest, parent_of

Identity = tuple[int, int, int, int, bytes]


class LinkVerb(Enum):
    """How a name comes to stand for its inode on the target."""

    KEEP = "keep"
    MAKE = "make"
    UNPARK = "unpark"
    LINK = "link"


class TreeStep(NamedTuple):
    """One name to fill. After KEEP, MAKE and UNPARK the inode's content and attributes follow; after LINK nothing."""

    verb: LinkVerb
    path: bytes
    entry: Entry
    slot: int = 0
    """UNPARK: where the inode was parked."""
    leader: bytes = b""
    """LINK: another name of the same inode, which exists by then."""


@dataclass(frozen=True)
class TreePlan:
    """One pass. `parks`, `removes`, `steps` and `seals` are carried out in this order."""

    fresh: bool
    """The target empties its tree first: nothing is known of it."""
    frozen: bool
    """The source's tree stands still; what changes or vanishes now is an error."""
    parks: tuple[tuple[bytes, int], ...]
    removes: tuple[bytes, ...]
    """Names that go; a directory goes with all below it."""
    steps: tuple[TreeStep, ...]
    """Parents before children."""
    seals: tuple[bytes, ...]
    """Directories whose attributes are set when everything else is done, because filling them changes their times."""
    bytes: int
    """At most so many bytes of content will be read; what is sent may be far less."""
    manifest: Manifest
    """The tree that the target will have."""

    @property
    def empty(self) -> bool:
        return not (self.fresh or self.parks or self.removes or self.steps or self.seals)


def diff(old: Manifest | None, new: Manifest, *, frozen: bool = False) -> TreePlan:
    """The plan that makes a tree described by `old` (None: any tree) equal to `new`.

    An entry counts as unchanged only if it is the same object in both, which is how `scan` says so: an equal size and
    mtime prove nothing, since a job may set the mtime back.
    """
    return _Diff(old.entries if old else {}, new.entries).plan(fresh=old is None, frozen=frozen, manifest=new)


class _Diff:
    def __init__(self, old: dict[bytes, Entry], new: dict[bytes, Entry]) -> None:
        self.old, self.new = old, new
        self.changed = [path for path, entry in new.items() if old.get(path) is not entry]
        self.gone = old.keys() - new.keys()
        self.parks: dict[bytes, int] = {}
        self.removes: set[bytes] = set()
        self.seals: set[bytes] = set()

    def plan(self, *, fresh: bool, frozen: bool, manifest: Manifest) -> TreePlan:
        leaders = self._kept()
        movable = self._movable(leaders)
        kept: set[Identity] = set()
        steps = []
        for path in self.changed:
            entry, before = self.new[path], self.old.get(path)
            if entry.is_directory:
                self.seals.add(path)
                if path and (before is None or not before.is_directory):
                    steps.append(TreeStep(LinkVerb.MAKE, path, entry))
                continue
            identity = entry.identity
            if before is not None and before.identity == identity:
                if identity not in kept:
                    kept.add(identity)
                    steps.append(TreeStep(LinkVerb.KEEP, path, entry))
            elif identity in leaders:
                steps.append(TreeStep(LinkVerb.LINK, path, entry, leader=leaders[identity]))
            elif identity in movable:
                slot = self.parks[movable[identity]] = len(self.parks)
                steps.append(TreeStep(LinkVerb.UNPARK, path, entry, slot=slot))
                leaders[identity] = path
            else:
                steps.append(TreeStep(LinkVerb.MAKE, path, entry))
                leaders[identity] = path
        for path in self._displaced():
            if path not in self.parks:
                self.removes.add(path)
        return TreePlan(
            fresh=fresh,
            frozen=frozen,
            parks=tuple(self.parks.items()),
            removes=tuple(sorted(path for path in self.removes if parent_of(path) not in self.removes)),
            steps=tuple(steps),
            seals=tuple(self._seals(steps)),
            bytes=sum(
                min(step.entry.size, step.entry.allocated)
                for step in steps
                if step.entry.is_regular and step.verb is not LinkVerb.LINK
            ),
            manifest=manifest,
        )

    def _displaced(self) -> Iterator[bytes]:
        """The old names that do not stand for their old inode any more."""
        yield from self.gone
        for path in self.changed:
            before, entry = self.old.get(path), self.new[path]
            if before is None or (before.is_directory and entry.is_directory):
                continue
            if before.identity != entry.identity:
                yield path

    def _kept(self) -> dict[Identity, bytes]:
        """A name that stays, for every inode that has got another one.

        Link counts and ctimes cannot tell which these are: the tree may have changed between the looks at two names.
        """
        inodes = set()
        for path in self.changed:
            entry, before = self.new[path], self.old.get(path)
            if not entry.is_directory and (before is None or before.identity != entry.identity):
                inodes.add(entry.ino)
        if not inodes:
            return {}
        kept: dict[Identity, bytes] = {}
        for path, entry in self.new.items():
            if entry.ino in inodes and not entry.is_directory:
                before = self.old.get(path)
                if before is not None and before.identity == entry.identity:
                    kept.setdefault(entry.identity, path)
        return kept

    def _movable(self, kept: dict[Identity, bytes]) -> dict[Identity, bytes]:
        """An old name of every inode that keeps none: where it can be parked from."""
        movable = {}
        for path in self._displaced():
            entry = self.old[path]
            if not entry.is_directory and entry.identity not in kept:
                movable[entry.identity] = path
        return movable

    def _seals(self, steps: list[TreeStep]) -> Iterator[bytes]:
        touched = {parent_of(path) for path in self.removes} | {parent_of(path) for path in self.parks}
        touched |= {parent_of(step.path) for step in steps if step.verb is not LinkVerb.KEEP}
        if self.parks:
            touched.add(b"")  # parked inodes lie there
        for path in self.seals | touched:
            entry = self.new.get(path)
            if entry is not None and entry.is_directory:
                yield path

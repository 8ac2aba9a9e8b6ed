"""What containerd calls snapshots, in a local sqlite file: names, kinds, parents, labels, and where the files are.

The rules are those of containerd's own metadata store (`core/snapshots/storage`): a name is unique over all kinds, a
parent is committed, what has children is not removed, labels of a commit replace those of the active snapshot.
Every method is one transaction; after a crash the file holds the state before or after it.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from podferry.errors import Failed, Refused
from podferry.snapshotter.filters import parse
from podferry.snapshotter.snapshot_row import Home, SnapshotKind, SnapshotRow

LABELS_LIMIT = 4096  # bytes of a label's key and value, containerd's pkg/labels


class SnapshotMissing(Refused):
    """There is no snapshot of that name."""

    code = "PF160"


class SnapshotExists(Refused):
    """The name is taken, or the layer asked for is already there."""

    code = "PF161"


class SnapshotInUse(Refused):
    """What is asked for does not fit the snapshot's state."""

    code = "PF162"


class SnapshotInvalid(Refused):
    """The request contradicts itself or the rules of snapshots."""

    code = "PF163"


class MetadataBroken(Failed):
    """The node's own snapshot database cannot be read."""

    code = "PF260"


_SCHEMA = """
CREATE TABLE IF NOT EXISTS snapshots (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT NOT NULL UNIQUE,
  kind INTEGER NOT NULL,
  parent_id INTEGER REFERENCES snapshots(id) ON DELETE RESTRICT,
  created INTEGER NOT NULL,
  updated INTEGER NOT NULL,
  labels TEXT NOT NULL,
  chain TEXT,
  home TEXT NOT NULL,
  bytes INTEGER NOT NULL DEFAULT 0,
  inodes INTEGER NOT NULL DEFAULT 0,
  moved_at INTEGER,
  note TEXT NOT NULL DEFAULT '',
  boot TEXT NOT NULL DEFAULT '',
  device INTEGER
);
CREATE INDEX IF NOT EXISTS snapshots_parent ON snapshots(parent_id);
CREATE INDEX IF NOT EXISTS snapshots_chain ON snapshots(chain);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

_ROWS = """
SELECT s.id, s.name, s.kind, coalesce(p.name, ''), s.created, s.updated, s.labels, s.chain, s.home, s.bytes, s.inodes,
       s.moved_at, s.note, s.boot, s.device
FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent_id
"""

_DESCENDANTS = """
WITH RECURSIVE below(id) AS (
  SELECT ? UNION SELECT s.id FROM snapshots s JOIN below ON s.parent_id = below.id
)
SELECT count(*) FROM snapshots WHERE id IN below AND kind != 3 AND id <= ?
"""


class Metadata:
    """The snapshots of one node. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise MetadataBroken.because(
                f"cannot read {path}", error, remedy="remove the snapshotter's root and pull the node's images again"
            ) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            self._db.close()

    def fact(self, name: str, default: Callable[[], str]) -> str:
        """A value that is kept, made by `default` the first time."""
        with self._transaction() as db:
            db.execute("INSERT INTO facts VALUES (?, ?) ON CONFLICT DO NOTHING", (name, default()))
            return str(db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0])

    def recall(self, name: str) -> str | None:
        """A fact, where it is known."""
        with self._transaction() as db:
            row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
            return None if row is None else str(row[0])

    def remember(self, name: str, value: str) -> None:
        """A fact, whatever it was before."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO facts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
            )

    def forget(self, name: str) -> None:
        """A fact that is none any more."""
        with self._transaction() as db:
            db.execute("DELETE FROM facts WHERE name = ?", (name,))

    def get(self, name: str) -> SnapshotRow:
        """The snapshot `name`. Raises `SnapshotMissing`."""
        found = self._one("WHERE s.name = ?", name)
        if found is None:
            raise SnapshotMissing(f"snapshot {name} does not exist")
        return found

    def lineage(self, parent: str) -> list[SnapshotRow]:
        """The committed snapshot `parent` and its ancestors, in this order; nothing for no parent.

        Raises `SnapshotMissing`, and `SnapshotInvalid` for one that is not committed.
        """
        with self._transaction():
            found: list[SnapshotRow] = []
            while parent:
                self._parent_id(parent)
                found.append(self.get(parent))
                parent = found[-1].parent
            return found

    def create(
        self,
        kind: SnapshotKind,
        name: str,
        parent: str,
        labels: Mapping[str, str],
        make: Callable[[SnapshotRow], None] = lambda made: None,
    ) -> SnapshotRow:
        """A new active snapshot or view; `make` does what goes with it, and if it fails there is none.

        Raises `SnapshotExists`, `SnapshotMissing`, `SnapshotInvalid`.
        """
        with self._transaction() as db:
            self._refuse_taken(name)
            made = self._insert(db, kind, name, self._parent_id(parent), labels)
            make(made)
            return made

    def refer(self, name: str, parent: str, chain: str, labels: Mapping[str, str]) -> SnapshotRow:
        """A committed snapshot for a layer that is on the share. Takes another name where `name` is taken."""
        with self._transaction() as db:
            parent_id = self._parent_id(parent)
            if self._one("WHERE s.name = ?", name):
                newest = db.execute("SELECT coalesce(max(id), 0) FROM snapshots").fetchone()[0]
                name = f"{name}@{newest + 1}"
            made = self._insert(db, SnapshotKind.COMMITTED, name, parent_id, labels)
            db.execute("UPDATE snapshots SET chain = ?, home = ? WHERE id = ?", (chain, Home.SHARE, made.id))
            return self.get(name)

    def commit(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str],
        *,
        size: tuple[int, int],
        chain: str | None,
        parent: str = "",
    ) -> SnapshotRow:
        """The active snapshot `key` becomes the committed `name`; `size` is bytes and inodes on disk.

        A snapshot without a parent may get one here (containerd 2.1 and later unpack layers in parallel that way).
        """
        with self._transaction() as db:
            self._refuse_taken(name)
            active = self.get(key)
            if active.kind is not SnapshotKind.ACTIVE:
                raise SnapshotInUse(f"snapshot {key} is not active")
            if parent and active.parent and parent != active.parent:
                raise SnapshotInvalid(f"cannot change the parent of {key} while it is committed")
            now = time.time_ns()
            _check_labels(labels)
            db.execute(
                "UPDATE snapshots SET name = ?, kind = ?, parent_id = ?, created = ?, updated = ?, labels = ?, chain = ?,"
                " bytes = ?, inodes = ?, boot = ? WHERE id = ?",
                (
                    *(name, SnapshotKind.COMMITTED, self._parent_id(parent or active.parent), now, now),
                    *(json.dumps(dict(labels)), chain, *size, this_boot(), active.id),
                ),
            )
            return self.get(name)

    def remove(self, name: str) -> SnapshotRow:
        """Forget a snapshot. Raises `SnapshotInUse` while others build on it."""
        with self._transaction() as db:
            found = self.get(name)
            if db.execute("SELECT 1 FROM snapshots WHERE parent_id = ?", (found.id,)).fetchone():
                raise SnapshotInUse(f"cannot remove snapshot {name}", why="others build on it")
            db.execute("DELETE FROM snapshots WHERE id = ?", (found.id,))
            return found

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str] = ()) -> SnapshotRow:
        """Change labels: all of them, or those that `paths` names. Raises `SnapshotInvalid` for any other path."""
        with self._transaction() as db:
            found = self.get(name)
            new = dict(found.labels) if paths else dict(labels)
            for path in paths:
                if path == "labels":
                    new = dict(labels)
                elif path.startswith("labels."):
                    label = path.removeprefix("labels.")
                    new[label] = labels.get(label, "")
                else:
                    raise SnapshotInvalid(f"cannot update {path!r} of snapshot {name}", why="it never changes")
            new = {label: value for label, value in new.items() if value}  # an empty value removes a label
            _check_labels(new)
            db.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?", (json.dumps(new), time.time_ns(), found.id)
            )
            return self.get(name)

    def all(self, filters: Sequence[str] = ()) -> list[SnapshotRow]:
        """The snapshots that a request's filters ask for, by age."""
        wanted = parse(filters)
        return [one for one in self._many("ORDER BY s.id") if wanted(partial(_field, one))]

    def layer(self, chain: str, parent: str) -> SnapshotRow | None:
        """A committed snapshot of this layer on this parent."""
        return self._one("WHERE s.chain = ? AND s.kind = 3 AND coalesce(p.name, '') = ?", chain, parent)

    def layers(self, home: Home | None = None) -> list[SnapshotRow]:
        """Committed snapshots that are layers, oldest first."""
        rows = self._many("WHERE s.chain IS NOT NULL AND s.kind = 3 ORDER BY s.id")
        return [row for row in rows if home is None or row.home is home]

    def move(self, identity: int, home: Home, *, note: str = "") -> None:
        """Note where a layer's files are from now on, and why they are not on the share."""
        with self._transaction() as db:
            db.execute(
                "UPDATE snapshots SET home = ?, note = ?, moved_at = (SELECT max(id) FROM snapshots) WHERE id = ?",
                (home, note, identity),
            )

    def note(self, identity: int, note: str) -> None:
        """Note why a layer is not on the share."""
        with self._transaction() as db:
            db.execute("UPDATE snapshots SET note = ? WHERE id = ?", (note, identity))

    def mounted(self, identity: int, device: int) -> None:
        """The layer's image has been mounted from the share that has this device number now."""
        with self._transaction() as db:
            db.execute("UPDATE snapshots SET device = ? WHERE id = ?", (device, identity))

    def emptied(self, identity: int) -> None:
        """The layer's copy on the node's disk is gone."""
        with self._transaction() as db:
            db.execute("UPDATE snapshots SET bytes = 0, inodes = 0, moved_at = NULL WHERE id = ?", (identity,))

    def users_of_copy(self, layer: SnapshotRow) -> int:
        """How many active snapshots and views may have the layer's copy on disk mounted."""
        with self._transaction() as db:
            newest = layer.moved_at if layer.moved_at is not None else 1 << 62
            return int(db.execute(_DESCENDANTS, (layer.id, newest)).fetchone()[0])

    def ids(self) -> set[int]:
        """Every snapshot's id."""
        with self._transaction() as db:
            return {int(row[0]) for row in db.execute("SELECT id FROM snapshots")}

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _insert(
        self, db: sqlite3.Connection, kind: SnapshotKind, name: str, parent_id: int | None, labels: Mapping[str, str]
    ) -> SnapshotRow:
        if not name:
            raise SnapshotInvalid("a snapshot needs a name")
        _check_labels(labels)
        now = time.time_ns()
        db.execute(
            "INSERT INTO snapshots (name, kind, parent_id, created, updated, labels, home) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (name, kind, parent_id, now, now, json.dumps(dict(labels)), Home.DISK),
        )
        return self.get(name)

    def _parent_id(self, parent: str) -> int | None:
        if not parent:
            return None
        found = self._one("WHERE s.name = ?", parent)
        if found is None:
            raise SnapshotMissing(f"parent snapshot {parent} does not exist")
        if found.kind is not SnapshotKind.COMMITTED:
            raise SnapshotInvalid(f"parent snapshot {parent} is not committed")
        return found.id

    def _refuse_taken(self, name: str) -> None:
        if self._one("WHERE s.name = ?", name):
            raise SnapshotExists(f"snapshot {name} already exists")

    def _one(self, where: str, *values: object) -> SnapshotRow | None:
        return next(iter(self._many(f"{where} LIMIT 1", *values)), None)

    def _many(self, where: str, *values: object) -> list[SnapshotRow]:
        with self._lock:
            rows = self._db.execute(_ROWS + where, values).fetchall()
        return [_snapshot(row) for row in rows]


def _snapshot(row: Sequence[Any]) -> SnapshotRow:
    identity, name, kind, parent, created, updated, labels, chain, home, *rest = row
    facts = (identity, name, SnapshotKind(kind), parent, created, updated, json.loads(labels), chain, Home(home))
    return SnapshotRow(*facts, *rest)


def this_boot() -> str:
    """The kernel's name for the time since the machine started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _check_labels(labels: Mapping[str, str]) -> None:
    for label, value in labels.items():
        if len(label.encode()) + len(value.encode()) > LABELS_LIMIT:
            raise SnapshotInvalid(f"the label {label[:64]!r} is too long", why=f"more than {LABELS_LIMIT} bytes")


def _field(snapshot: SnapshotRow, path: list[str]) -> str | None:
    match path:
        case ["name"]:
            return snapshot.name
        case ["parent"]:
            return snapshot.parent
        case ["kind"]:
            return snapshot.kind.name.lower()
        case ["labels", *rest]:
            return snapshot.labels.get(".".join(rest))
    return None

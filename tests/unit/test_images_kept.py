"""A layer is exchanged while this node uses it: by another record, by another payload, or in place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_images_share import CHAIN, Clock

from podferry.errors import PodferryError
from podferry.node.containerd import LAYER_MAKER
from podferry.snapshotter import initialise, layout, open_share
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.erofs import MAGIC, MAGIC_AT, ErofsForm
from podferry.snapshotter.faults import LayerDamaged, LayerExchanged
from podferry.snapshotter.kept import LayerWatch, NodeDigests
from podferry.snapshotter.layer_ports import Payload
from podferry.snapshotter.layout import FormName, LayerRecord
from podferry.snapshotter.leases import Lease, Leases
from podferry.snapshotter.metadata import Metadata
from podferry.snapshotter.publisher import Publisher
from podferry.snapshotter.references import References
from podferry.snapshotter.snapshotter import REF, Snapshotter
from podferry.snapshotter.store import LayerStore

pytestmark = pytest.mark.unit
NAME = layout.name_of(CHAIN)
AT = f"{layout.LAYERS}/{NAME}"


class Form(ErofsForm):
    """The real form, but for the program that packs an image."""

    def write(self, source: Path, into: str) -> Payload:
        packed = self.scratch / "packed"
        packed.write_bytes(image((source / "content").read_bytes()))
        return Payload(self.share.copy_in(packed, f"{into}/layer.erofs"), packed.stat().st_size, 1)


def image(content: bytes) -> bytes:
    return bytes(MAGIC_AT) + MAGIC + content


class Node:
    def __init__(self, base: Path, name: str = "a", *, read_only: bool = False) -> None:
        self.base = base / name
        (self.base / "source").mkdir(parents=True)
        (self.base / "source/content").write_bytes(b"as it was")
        self.metadata = Metadata(self.base / "metadata.db")
        self.share = open_share(base / "share", guard=Guard(20.0), read_only=read_only)
        clock = Clock()
        self.store = LayerStore(
            self.share,
            clock,
            References(self.share, clock, name, "0"),
            Leases(self.share, clock, name, 30.0),
            forms={FormName.EROFS: Form(self.share, self.base)},
            form=FormName.EROFS,
            read_only=read_only,
        )
        publisher = Publisher(self.base, self.metadata, self.store)
        self.snapshotter = Snapshotter(self.base, self.metadata, self.store, publisher)
        self.watch = LayerWatch(self.share, self.store, self.snapshotter.kept, lambda: [CHAIN])

    def publish(self) -> None:
        self.store.publish(CHAIN, self.base / "source")

    def pull(self) -> None:
        """As containerd does: there is nothing to download."""
        with pytest.raises(PodferryError, match="is there already"):
            self.snapshotter.prepare("pulling", "", {REF: CHAIN})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "share").mkdir()
    initialise(tmp_path / "share")
    return tmp_path


@pytest.fixture
def user(base: Path) -> Iterator[Node]:
    """A node that uses the layer which another has published."""
    Node(base, "publisher").publish()
    node = Node(base, "user")
    node.pull()
    yield node
    node.metadata.close()


def exchange(base: Path, content: bytes, **changes: object) -> None:
    """Payload and record anew, so that they fit each other."""
    at = base / "share" / AT
    (at / "layer.erofs").write_bytes(image(content))
    record = json.loads((at / layout.RECORD).read_bytes())
    record |= {"digest": hashlib.sha256(image(content)).hexdigest(), "bytes": len(image(content)), **changes}
    (at / layout.RECORD).write_bytes(json.dumps(record).encode())


def test_a_layer_that_is_exchanged_while_in_use_is_not_taken_for_it(base: Path, user: Node) -> None:
    exchange(base, b"something else")
    for use in (user.store.find, user.store.need, user.store.look):
        with pytest.raises(LayerExchanged, match="not the one") as caught:
            use(CHAIN)
        assert "crictl rmi IMAGE; crictl pull IMAGE" in caught.value.remedy
    with pytest.raises(LayerExchanged):
        user.snapshotter.prepare("container", CHAIN, {})
    assert user.share.names(layout.LAYERS) == [NAME]  # it may be a good one, to others
    newcomer = Node(base, "newcomer")
    assert newcomer.store.find(CHAIN) is not None


def test_who_removes_the_image_and_pulls_it_again_takes_what_is_there(base: Path, user: Node) -> None:
    exchange(base, b"something else")
    user.snapshotter.remove(CHAIN)
    user.pull()
    assert user.store.need(CHAIN).record.digest == hashlib.sha256(image(b"something else")).hexdigest()


def test_a_publisher_keeps_what_it_wrote_and_not_what_it_reads_back(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(base)
    rename = node.share.rename

    def exchanging(old: str, new: str) -> None:
        rename(old, new)
        if new == AT:
            exchange(base, b"something else")

    monkeypatch.setattr(node.share, "rename", exchanging)
    with pytest.raises(LayerExchanged):
        node.publish()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_layer_that_is_changed_in_place_is_noticed_by_its_times_and_read(base: Path, read_only: bool) -> None:
    Node(base, "publisher").publish()
    node = Node(base, "user", read_only=read_only)
    node.pull()
    failed: list[PodferryError] = []
    node.watch.failed = failed.append
    node.watch.look()
    payload = base / "share" / AT / "layer.erofs"
    about = payload.stat()
    with payload.open("r+b") as file:
        file.seek(MAGIC_AT + 4)
        file.write(b"AS IT WAS")
    os.utime(payload, ns=(about.st_atime_ns, about.st_mtime_ns))
    node.watch.look()
    assert [type(one) for one in failed] == [LayerDamaged]
    with pytest.raises(LayerExchanged, match="changed while"):
        node.snapshotter.prepare("container", CHAIN, {})
    assert node.share.names(layout.DAMAGED) == ([] if read_only else [node.share.names(layout.DAMAGED)[0]])


def test_a_layer_whose_times_changed_is_read_once_and_used_on(
    base: Path, user: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    digest = user.share.digest
    monkeypatch.setattr(user.share, "digest", lambda path: [reads.append(path), digest(path)][1])
    user.watch.look()
    assert reads == []  # it has just begun to use it
    (base / "share" / AT / "layer.erofs").touch()
    for _ in range(3):
        user.watch.look()
    assert len(reads) == 1
    user.snapshotter.kept.demand_whole(CHAIN)


def test_what_is_kept_goes_with_the_last_image(base: Path, user: Node) -> None:
    user.watch.look()
    user.snapshotter.remove(CHAIN)
    assert user.metadata.recall(f"digest {CHAIN}") is None
    assert user.metadata.recall(f"stamps {CHAIN}") is None


def test_damaged_stamps_are_none(tmp_path: Path) -> None:
    metadata = Metadata(tmp_path / "metadata.db")
    metadata.remember(f"stamps {CHAIN}", "{")
    kept = NodeDigests(metadata)
    assert kept.stamps(CHAIN) == []
    for number in range(20):
        kept.stamp(CHAIN, str(number))
    assert len(kept.stamps(CHAIN)) == 8
    record = LayerRecord(CHAIN, FormName.DIR, "d", 1, 1, "a", "00", 0.0)
    kept.keep(record)
    kept.demand(record)
    metadata.close()


def test_a_share_that_does_not_answer_ends_no_watch(user: Node) -> None:
    def hung(*_: object) -> None:
        raise LayerDamaged("hung")

    failed: list[PodferryError] = []
    store = cast(Any, SimpleNamespace(look=hung))
    LayerWatch(user.share, store, user.snapshotter.kept, lambda: [CHAIN, CHAIN], failed.append).look()
    assert len(failed) == 2


@pytest.mark.parametrize("read_only", [False, True])
def test_who_looks_for_a_layer_hears_who_is_making_it_and_how_far_that_is(base: Path, read_only: bool) -> None:
    """A target that looks for its image waits for a publication that goes on, however slow."""
    maker, asker = Node(base, "maker"), Node(base, "asker", read_only=read_only)
    asker.store.leases.period = 1e9  # it waits for a minute, and does not take over meanwhile
    lease = maker.store.claim(CHAIN)
    assert isinstance(lease, Lease)

    def heard() -> str | None:
        asker.snapshotter.prepare("podferry-find-1", "", {REF: CHAIN})
        found = asker.metadata.get("podferry-find-1").labels.get(LAYER_MAKER)
        asker.snapshotter.remove("podferry-find-1")
        return found

    first = heard()
    assert first is not None
    assert first.startswith("maker ")
    assert heard() == first, "no sign of life since"
    maker.store.leases.renew(lease)
    assert heard() not in (None, first)
    maker.store.leases.release(lease)
    assert heard() is None, "nobody but the asker"

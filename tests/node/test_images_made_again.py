"""A layer that is made again, on another node too, is the same bytes: whoever uses it takes the new one for it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from images_rig import LOCAL, Rig, scratch

from podferry.node.process import run
from podferry.snapshotter import layout
from podferry.snapshotter.layout import FormName

pytestmark = pytest.mark.node
CHAIN = f"sha256:{'ab' * 32}"
BEGAN = 1_500_000_000
FILES = {f"etc/{number % 7}/file{number}": random.Random(number).randbytes(40) * (number * 13) for number in range(400)}


def unpack(at: Path, order: int, *, now: int) -> None:
    """As containerd unpacks a tar that names no directory: those, and whiteouts, get the time at which it does so."""
    at.mkdir()
    for path in random.Random(order).sample(sorted(FILES), len(FILES)):
        file = at / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(FILES[path])
        os.utime(file, ns=(now, (BEGAN + len(path)) * 10**9 + len(FILES[path])))
    (at / "link").symlink_to("etc/0")
    os.utime(at / "link", (now, BEGAN - 5), follow_symlinks=False)
    os.link(at / "etc/0/file0", at / "etc/1/hard")
    os.mknod(at / "gone", 0o020000, 0)
    for found in (at, at / "etc", *(at / "etc").iterdir(), at / "gone"):
        os.utime(found, (now, now))


def trees(base: Path, tmp_path: Path) -> list[Path]:
    """One on the node's disk, one on a tmpfs, whose directories list their entries in other orders."""
    found = [base / "one", tmp_path / "two"]
    for number, at in enumerate(found):
        unpack(at, number, now=BEGAN + 10**7 * (number + 1))
    return found


@pytest.mark.parametrize("form", list(FormName))
def test_a_layer_that_two_nodes_make_is_the_same(form: FormName, tmp_path: Path) -> None:
    with scratch(LOCAL) as base:
        digests = []
        for number, source in enumerate(trees(base, tmp_path)):
            rig = Rig(base / f"node{number}", base / f"share{number}", name=f"n{number}", form=form)
            try:
                digests.append(rig.store.publish(CHAIN, source).record.digest)
            finally:
                rig.stop()
        assert digests[0] == digests[1]


def test_whoever_uses_a_layer_takes_one_that_another_node_made_again(tmp_path: Path) -> None:
    with scratch(LOCAL) as base:
        share = base / "share"
        user, maker = (Rig(base / name, share, name=name) for name in "ab")
        try:
            one, two = trees(base, tmp_path)
            used = user.store.publish(CHAIN, one)
            (share / used.at).rename(share / layout.DAMAGED / "it")
            again = maker.store.publish(CHAIN, two)
            assert again.record.token != used.record.token
            assert user.store.need(CHAIN).record == again.record
        finally:
            user.stop()
            maker.stop()


def test_files_keep_their_times(tmp_path: Path) -> None:
    with scratch(LOCAL) as base:
        one, _ = trees(base, tmp_path)
        rig = Rig(base / "node", base / "share")
        try:
            layer = rig.store.publish(CHAIN, one)
            run(["mount", "-t", "erofs", "-o", "ro,loop", base / "share" / layer.at / "layer.erofs", tmp_path])
            try:
                for path in FILES:
                    assert (tmp_path / path).stat().st_mtime_ns == (one / path).stat().st_mtime_ns
                assert (tmp_path / "link").lstat().st_mtime == BEGAN - 5
            finally:
                run(["umount", tmp_path])
        finally:
            rig.stop()

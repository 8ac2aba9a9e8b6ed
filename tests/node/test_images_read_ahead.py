"""Reading ahead over the network: the same pages that a container's mount reads, by the snapshotter's own calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from images_rig import LOCAL, NETWORK, Rig, refused, scratch, some_chain

from podferry.snapshotter import layout
from podferry.snapshotter.erofs import IMAGE
from podferry.snapshotter.prefetch import Prefetcher, cached
from podferry.snapshotter.snapshotter import REF

pytestmark = pytest.mark.node

MIB = 1 << 20


@pytest.fixture
def nodes() -> Iterator[list[Rig]]:
    with scratch(LOCAL) as home, scratch(NETWORK) as share, ExitStack() as stack:
        made = [Rig(home / name, share / "layers", name=name) for name in ("n1", "n2")]
        for one in made:
            stack.callback(one.close)
        yield made


def forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def test_what_a_container_read_is_there_when_the_next_one_starts(nodes: list[Rig]) -> None:
    first, second = nodes
    chain = some_chain()
    contents = os.urandom(2 * MIB)
    with first.mounted(first.prepare("unpacked", labels={REF: chain})) as at:
        (at / "program").write_bytes(contents)
        (at / "never-read").write_bytes(os.urandom(6 * MIB))
    first.commit(chain, "unpacked", {REF: chain})
    assert first.publisher.publish_all()
    image = second.share.path(f"{layout.LAYERS}/{layout.name_of(chain)}/{IMAGE}")
    with refused("ALREADY_EXISTS"):
        second.prepare("pulled", labels={REF: chain})
    forget(image)

    with second.mounted(second.prepare("container-1", chain)) as at:
        assert (at / "program").read_bytes() == contents
    prefetcher = Prefetcher(second.share, lambda: [chain])
    prefetcher.note()
    noted = prefetcher.known(chain)
    assert 2 * MIB <= noted.size < 6 * MIB

    forget(image)
    assert (noted & cached(image)).size < MIB
    second.snapshotter.starting = prefetcher.starting
    second.prepare("container-2", chain)
    prefetcher.stop()
    prefetcher.run()
    for _ in range(600):  # it comes in the background
        if not noted - cached(image):
            break
        threading.Event().wait(0.05)
    assert not noted - cached(image)

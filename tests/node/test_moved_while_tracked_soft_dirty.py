"""test_moved_while_tracked.py with soft-dirty bits, and with cgroup v2: see test_trackers_soft_dirty.py.

The emulated machine is a node without a lab: it has a containerd of its own for these tests, and images are not shared there.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_job import IMAGE, PLAIN, RUNTIME
from test_moved_while_tracked import *  # noqa: F403
from test_moved_while_tracked import KIND

from podferry.memory.tracking.tracker import TrackerKind
from podferry.node.cgroup import CgroupKind, cgroup_kind
from podferry.node.process import run, spawn

pytestmark = [pytest.mark.node, pytest.mark.slow, pytest.mark.anyio, pytest.mark.kernel("bookworm")]
IMAGES = Path("/opt/podferry/images")
WRAPPER = Path("/opt/podferry/src/podferry/node/podferry-runc")


@pytest.fixture(scope="module", autouse=True)
def containerd() -> Iterator[None]:
    """A node's containerd, with the image of jobs."""
    Path(RUNTIME).symlink_to(WRAPPER)
    log = Path("/var/log/containerd.log")
    with log.open("wb") as file:
        daemon = spawn(["containerd"], stdout=file, stderr=subprocess.STDOUT)
    try:
        run(["ctr", "--connect-timeout", "60s", "version"])
        run(["ctr", "image", "import", "--snapshotter", PLAIN, IMAGES / "job.tar"])
        assert IMAGE in run(["ctr", "image", "ls", "-q"]).stdout
        yield
    except BaseException as error:
        error.add_note(log.read_text()[-3000:])
        raise
    finally:
        daemon.terminate()
        daemon.wait()


def test_the_machine_has_soft_dirty_bits_and_freezes_by_cgroup_v2() -> None:
    assert KIND is TrackerKind.SOFT_DIRTY
    assert cgroup_kind() is CgroupKind.V2

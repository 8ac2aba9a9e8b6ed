"""test_images_conformance.py on Debian 12's kernel, which mounts images through loop devices only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from images_rig import LOCAL, Rig, scratch
from test_images_conformance import *  # noqa: F403

from podferry.node.process import run
from podferry.snapshotter.layout import FormName

pytestmark = [pytest.mark.node, pytest.mark.slow, pytest.mark.kernel("bookworm")]
del test_a_hundred_and_twenty_eight_layers_are_mounted  # type: ignore[name-defined]  # noqa: F821  the emulated machine takes ten minutes for it


@pytest.fixture(scope="module", autouse=True)
def loop_devices() -> None:
    """A node's own udev or systemd makes /dev/loop-control, and the emulated machine has neither."""
    run(["modprobe", "loop"])


@pytest.fixture  # type: ignore[no-redef]
def rig() -> Iterator[Rig]:
    LOCAL.mkdir(exist_ok=True)
    with scratch(LOCAL) as home, scratch(LOCAL) as share:
        rig = Rig(home, share, form=FormName.EROFS, share_all=True)
        yield rig
        rig.close()


def test_an_image_is_mounted_through_a_loop_device_that_goes_with_it(rig: Rig) -> None:
    assert tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 12)
    with rig.mounted(rig.prepare("a")) as at:
        (at / "file").write_text("kept")
    rig.commit("c", "a")
    with rig.mounted(rig.view("v", "c")) as at:
        assert (at / "file").read_text() == "kept"
        (line,) = (
            line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {rig.root}/images/" in line
        )
        kind, device = line.partition(" - ")[2].split()[:2]
        assert (kind, device.startswith("/dev/loop")) == ("erofs", True)
        assert device in run(["losetup", "--all"]).stdout
    rig.remove("v")
    rig.remove("c")
    assert device not in run(["losetup", "--all"]).stdout

"""What containerd, and so a pod's events, are told of an error."""

from __future__ import annotations

import pytest

from podferry.errors import CommandFailed
from podferry.snapshotter.faults import LayerMissing
from podferry.snapshotter.grpc_service import _sentence

pytestmark = pytest.mark.unit


def test_an_error_is_one_line_with_what_the_command_said_and_what_to_do() -> None:
    gone = LayerMissing("layer x is not on the share", why="it was set aside", remedy="pull it again")
    assert (
        _sentence(gone) == "podferry PF255: layer x is not on the share: it was set aside (what to do: pull it again)"
    )
    failed = CommandFailed(
        "failed: mount image",
        why="exit status 32",
        evidence=["earlier", "mount: no loop device", "  dmesg(1) has more"],
    )
    assert _sentence(failed) == (
        "podferry PF201: failed: mount image: exit status 32; mount: no loop device; dmesg(1) has more"
    )

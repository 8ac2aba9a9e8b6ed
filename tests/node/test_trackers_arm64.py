"""test_trackers_injection.py on arm64, in a machine that qemu emulates: system calls are injected through its registers."""

from __future__ import annotations

import os

import pytest
from test_trackers_injection import *  # noqa: F403

pytestmark = [pytest.mark.node, pytest.mark.slow, pytest.mark.kernel("trixie", "arm64")]


def test_the_machine_is_an_arm64() -> None:
    assert os.uname().machine == "aarch64"

"""test_trackers_cases.py with soft-dirty bits, see test_trackers_soft_dirty.py."""

from __future__ import annotations

import pytest
from test_trackers_cases import *  # noqa: F403
from test_trackers_cases import KIND

from podferry.memory.tracking.tracker import TrackerKind

pytestmark = [pytest.mark.node, pytest.mark.slow, pytest.mark.kernel("bookworm")]


def test_the_tracker_is_that_of_soft_dirty_bits() -> None:
    assert KIND is TrackerKind.SOFT_DIRTY

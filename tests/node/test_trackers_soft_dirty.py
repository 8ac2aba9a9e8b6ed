"""test_trackers.py with soft-dirty bits: on Debian 12's kernel, which has these and not what the other tracker needs."""

from __future__ import annotations

import pytest
from test_trackers import *  # noqa: F403
from test_trackers import KIND

from podferry.memory.tracking.tracker import TrackerKind

pytestmark = [pytest.mark.node, pytest.mark.slow, pytest.mark.kernel("bookworm")]
del test_the_copy_is_the_process_for_thousands  # type: ignore[name-defined]  # noqa: F821


def test_the_tracker_is_that_of_soft_dirty_bits() -> None:
    assert KIND is TrackerKind.SOFT_DIRTY

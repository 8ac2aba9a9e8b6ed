"""An agent that may lose no connection of a workload looks again before it refuses: some are open for a moment only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from podferry.agent import migrations
from podferry.agent.migrations import inspected
from podferry.core.connections import ConnectionsLost
from podferry.model import Connections

pytestmark = [pytest.mark.unit, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "BRIEF", (0.0, 0.0))


@pytest.mark.parametrize(
    ("asked", "open_for", "looks", "lost"),
    [
        (Connections.REQUIRE, 0, 1, False),
        (Connections.REQUIRE, 2, 3, False),
        (Connections.REQUIRE, 99, 3, True),
        (Connections.CLOSE, 99, 1, False),
    ],
)
async def test_what_is_open_for_a_moment_only_is_waited_for(
    asked: Connections, open_for: int, looks: int, lost: bool
) -> None:
    looked: list[Any] = []

    def look() -> Any:
        looked.append(None)
        why = ConnectionsLost("one") if len(looked) <= open_for else None
        return SimpleNamespace(lost=lambda connections: why if connections is Connections.REQUIRE else None)

    view = await inspected(look, asked)
    assert (len(looked), view.lost(asked) is not None) == (looks, lost)

"""What each port promises, written once: the tests of a class run over a fake, in the unit tier, and over the real thing.

A contract is a class whose tests use one fixture, the *case*, which a module of each tier provides: `tests/unit` over fakes,
`tests/node` and `tests/kube` over what they stand for. A fake that promises more or less than the real thing hides faults.
"""

from __future__ import annotations

import pytest


@pytest.mark.anyio
class Contract:
    """The tests of one port."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

"""The lazy-pages daemon's loop over tasks that are played: what must be tried again is, though no event ever says when."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from podferry.lazypages.criu_socket import CriuSocket
from podferry.lazypages.daemon_status import StatusFile
from podferry.lazypages.descriptor_holder import DescriptorHolder
from podferry.lazypages.loop import Loop
from podferry.lazypages.page_source import NoSource
from podferry.lazypages.task import FaultAnswer, FedTask

pytestmark = pytest.mark.unit

TRIES = 3


class NoHolder:
    def hold(self, fd: int) -> None: ...

    def release(self, fd: int) -> None: ...


@dataclass
class Played:
    """A task to which the kernel says `refusals` times that its address space is changing: at a fault, or when all is done."""

    fd: int
    faults: list[int]
    refusals: int = TRIES
    left: int = 0
    closed: bool = False
    gone: bool = False
    looks: list[str] = field(default_factory=list)

    def answer(self) -> FaultAnswer:
        self.looks.append("fault")
        if not self._refused():
            self.faults.clear()
            return FaultAnswer.DONE
        return FaultAnswer.BUSY

    def fill(self) -> FaultAnswer:
        return FaultAnswer.ABSENT

    @property
    def has_all(self) -> bool:
        return not self.faults

    def finished(self) -> bool:
        if self.faults:
            return False
        self.looks.append("end")
        return not self._refused()

    def close(self) -> None:
        self.closed = True

    def _refused(self) -> bool:
        self.refusals -= 1
        return self.refusals >= 0


@pytest.fixture
def quiet() -> Iterator[int]:
    """A descriptor on which nothing ever comes."""
    reader, writer = os.pipe()
    yield reader
    os.close(writer)
    with suppress(OSError):
        os.close(reader)


@pytest.mark.parametrize("faults", [[0x1000], []], ids=["at a fault", "when all is done"])
def test_what_finds_the_address_space_changing_is_tried_again(tmp_path: Path, quiet: int, faults: list[int]) -> None:
    class Criu:
        def fileno(self) -> int:
            return quiet

    def no_store() -> Any:
        raise AssertionError("CRIU does not connect")

    holder, report = cast(DescriptorHolder, NoHolder()), StatusFile(tmp_path / "status")
    loop = Loop(cast(CriuSocket, Criu()), tmp_path, no_store, NoSource(), holder, report)
    task = Played(os.dup(quiet), faults)
    loop._add(cast(FedTask, task))
    loop._filling = loop._more = True  # something has just been put in place
    run = threading.Thread(target=loop.run, daemon=True)
    run.start()
    run.join(10)
    assert not run.is_alive(), f"it waits for an event that never comes: {task}"
    assert task.closed
    assert len(task.looks) > TRIES
    os.close(task.fd)

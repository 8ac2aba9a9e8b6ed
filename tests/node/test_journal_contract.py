"""The contract of journals on a file system that really has no room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from contracts.journal import JournalCase, JournalContract

pytestmark = pytest.mark.node


@dataclass
class SmallDisk:
    root: Path

    def fill(self) -> None:
        with (self.root / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    def make_room(self) -> None:
        (self.root / "filler").unlink()


class TestJournalOnASmallDisk(JournalContract):
    @pytest.fixture
    def case(self, tmp_path: Path) -> Iterator[JournalCase]:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "journals", tmp_path], check=True)
        yield SmallDisk(tmp_path)
        subprocess.run(["umount", tmp_path], check=True)

"""A container alone: podferry has containerd make it on the target, and removes what is left of it on the source."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from podferry.engine.ports import Images
from podferry.node.cgroup import Cgroup
from podferry.node.containerd import Containerd, NotFound
from podferry.workload.frozen import FrozenContainer
from podferry.workload.helpers import remove_task
from podferry.workload.threads import at_once


class ContainerdOwner:
    """Nobody but containerd knows of the container; its output goes to the file `log`."""

    def __init__(self, containerd: Containerd, log: Path | None) -> None:
        self._containerd, self._log = containerd, log

    async def stand_by(self, cgroups: Sequence[Cgroup]) -> None:
        """Nobody asks for a sign of life."""

    async def before_freeze(self) -> None:
        """Nobody starts it again."""

    async def completed(self, images: Images) -> Images:
        """The target's container is made from what was offered."""
        return images

    async def before_commit(self) -> None:
        """There is nobody to ask."""

    async def after_commit(self, killed: Sequence[FrozenContainer]) -> None:
        """Remove its task, cgroup, record, snapshot and log."""
        for one in killed:
            await at_once(self._remove, one)

    def _remove(self, killed: FrozenContainer) -> None:
        record = killed.record
        remove_task(self._containerd, record.id)
        if killed.group is not None:
            killed.group.remove()
        with suppress(NotFound):
            self._containerd.delete_container(record.id)
        with suppress(NotFound):
            self._containerd.remove_snapshot(record.snapshotter, record.snapshot_key)
        if self._log is not None:
            self._log.unlink(missing_ok=True)

"""A tree of files on the source: a container's upper layer, or a volume of a pod."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

from podferry.errors import Failed
from podferry.node.upper import TreeSource
from podferry.wire.messages import TreeSum
from podferry.workload.threads import Scans


class SourceTree:
    """The tree at `path`. `suspects` names the files whose content may change without a trace: a process has them mapped."""

    def __init__(self, path: Path, suspects: Callable[[], set[bytes]]) -> None:
        self._tree, self._suspects, self._scans = TreeSource(path), suspects, Scans()

    async def changes(self, *, last: bool) -> AsyncIterator[bytes]:
        """One pass: the records of what changed since the pass before. In the last nothing may change."""
        plan = await self._scans.at_once(lambda: self._tree.plan(suspects=self._suspects(), frozen=last))
        for chunk in self._tree.send(plan):
            yield chunk

    def total(self, number: int) -> TreeSum:
        """What the last pass sent, as tree `number`. Raises `Failed` where it did not end."""
        summary = self._tree.summary
        if summary is None:
            raise Failed("the last pass over a tree of files did not end")
        return TreeSum(number, summary.entries, summary.bytes, summary.digest)

    async def close(self) -> None:
        """Let go of descriptors."""
        await self._scans.ended()
        self._tree.close()

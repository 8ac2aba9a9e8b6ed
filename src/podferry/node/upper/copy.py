"""One tree made equal to another on the same node: what was staged goes to its place."""

from __future__ import annotations

from pathlib import Path

from podferry.node.upper.receive import Receiver
from podferry.node.upper.send import TreeSource


def copy(source: Path, target: Path) -> None:
    """Make the tree below `target` what that below `source` is, hard links, holes and attributes included; what it held goes.

    The two may be on different file systems. Nothing may write to `source` meanwhile.
    """
    with TreeSource(source) as sender, Receiver(target) as receiver:
        for chunk in sender.send(sender.plan(frozen=True)):
            receiver.feed(memoryview(chunk))
        receiver.finish()

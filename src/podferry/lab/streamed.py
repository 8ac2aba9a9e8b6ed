"""Long commands that say what they do: their lines are passed on as they come."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from podferry.node.process import Arg, Completed, spawn

# What debootstrap and packages mount and start must not outlive us, least of all /proc inside a tree that is built anew.
ALONE = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def streamed(argv: Sequence[Arg], environment: Mapping[str, str], take: Callable[[str], None]) -> Completed:
    """Run `argv` to its end and pass each line that it prints, on stdout or stderr, to `take`; `stdout` has them all."""
    said: list[str] = []
    reader, writer = os.pipe()
    process = spawn(argv, env=environment, stdout=writer, stderr=writer)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as output:
        for line in output:
            said.append(line.strip())
            take(said[-1])
    return Completed([str(word) for word in argv], process.wait(), "\n".join(said), "")

"""A dump that does not touch private memory.

`criu dump --lazy-pages` looks at every page of the job, and has the job hand all of them to pipes (`vmsplice`, page by page) for
whoever may fetch them. Nobody does: pages are read from /proc/PID/mem. What spares CRIU both is a page map in which there are no
pages. So in a mount namespace of its own (`podferry.criu.gatekeeper`) the one dump finds, in place of /proc/PID/pagemap,
that of a process that has next to no memory, and none where jobs have theirs. Which pages there are, `podferry.criu.skipped_pages`
then puts into the images.

Nothing that is true depends on what is shown. A page that both processes have is spliced as ever, and where nothing can be shown
CRIU finds all pages by itself: completing the images comes to the same.

Sources: CRIU 4.1.1 and 4.2, criu/pagemap-cache.c and criu/mem.c (`generate_iovs`, `collect_madv_guards`), criu/util.c
(`open_pid_proc`); personality(2) and mm/util.c of the kernel (`mmap_is_legacy`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from podferry.node.process import spawn

BLANK = ["setarch", "--addr-compat-layout", "cat"]
"""What waits for the end of its input, with its libraries far below those of others: where the kernel put them of old."""


class MemorySkippingDump:
    """What one dump is to find. `list` is the file in which `podferry.criu.gatekeeper` looks for it."""

    def __init__(self, list: Path) -> None:
        """Start the process without memory; it ends with this one at the latest. Raises `CommandFailed`."""
        self._list = list
        input, self._lease = os.pipe()
        try:
            self._blank = spawn(BLANK, stdin=input)
        except BaseException:
            os.close(self._lease)
            raise
        finally:
            os.close(input)

    def environment(self) -> dict[str, str]:
        """What the gatekeeper needs in its environment."""
        return {"PODFERRY_SHOWN": str(self._list)}

    def claim(self, pids: Iterable[int]) -> None:
        """Have no memory be found in these processes. Raises `OSError`."""
        blank = f"/proc/{self._blank.pid}/pagemap"
        self._list.write_text("".join(f"{blank} /proc/{pid}/pagemap\n" for pid in pids))

    def close(self) -> None:
        """Once CRIU has looked, or will not."""
        os.close(self._lease)
        self._blank.kill()  # the job stands still: no polling for an end that is a matter of course
        self._blank.wait()

"""A dump that does not touch private memory.

`criu dump --lazy-pages` has the job hand all of its memory to pipes (`vmsplice`, page by page) for whoever may fetch it. Nobody
does: pages are read from /proc/PID/mem. What spares CRIU this are pages that it believes to be in a parent image, the dump
before this one: of these it writes only where they are, as PE_PARENT. So it is given a parent that claims to hold every page
of every process, and holds none. What to do with the images then, `podferry.memory.thin_images` knows.

CRIU believes so of a page that is not soft-dirty, and looks for a parent only where memory is tracked, which it refuses on
kernels that have no soft-dirty bits. There the bit is never set: every page counts as in the parent, which is what is wanted.
What stands in the way is CRIU's cache of facts about the kernel: the one dump is shown a copy in which one bool is true,
in a mount namespace of its own (`podferry.node.gatekeeper`). Where that bool is in the file is no promise of CRIU's. So the copy is
tried before it is used: `criu check` must find memory tracking with it, and everything else as before. A kernel that has
soft-dirty bits needs no such copy: there they are cleared while the job stands still.

Nothing that is true depends on the parent. What CRIU takes as dirty, or a process that the parent does not know, it splices as
ever; all other pages are read from the process itself.

Sources: CRIU 4.1.1 and 4.2, criu/mem.c (`generate_iovs`, `detect_pid_reuse`), criu/page-xfer.c (`check_pagehole_in_parent`),
criu/image.c (`get_parent_inventory`), criu/config.c (`check_options`), criu/kerndat.c and criu/include/kerndat.h.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from google.protobuf.message import Message

from podferry.errors import CommandFailed, TimedOut
from podferry.node import gate, outside
from podferry.node.process import run
from podferry.protos.pagemap_pb2 import InventoryEntry, PagemapEntry, PagemapHead

KERNDAT = Path("/run/criu.kdat")
CLEAR_REFS = Path("/proc/self/clear_refs")
TRACKING = "mem_dirty_track"
WITNESSES = ("uffd-noncoop", "memfd_hugetlb", "fdinfo_lock", "pagemap_scan")
"""Features, as `criu check` names them, whose facts lie around the one that is changed."""

_HAS_DIRTY_TRACK = 32  # after two u32, a dev_t, an int and a u64: the same in 4.1 and 4.2
_SOFT_DIRTY = "4"  # Documentation/admin-guide/mm/soft-dirty.rst; without such bits it does nothing
_CHECK_TIMEOUT = 10.0  # seconds
_INVENTORY_MAGIC, _COMMON_MAGIC, _PAGEMAP_MAGIC = 0x58313116, 0x54564319, 0x56084025
_IMAGES_V1_1 = 2
_NEVER = 1 << 62  # us after boot
_IN_PARENT = 1
_ADDRESSES = 1 << 52  # the largest address space of arm64; of x86 CRIU knows 47 bits
_LONGEST = 1 << 31  # pages; before CRIU 4.2 an entry counts them in 32 bits
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class View:
    """What makes CRIU track memory here: `kerndat`, the facts about the kernel to show it; None where its own will do."""

    kerndat: bytes | None

    @staticmethod
    def here() -> View | None:
        """Whether and how it can be had on this node. Takes some 100 ms when it is asked first."""
        try:
            if _supports(TRACKING):
                return View(None)
            with _one_at_a_time:
                return _doctored((outside.root() / KERNDAT.relative_to("/")).read_bytes())
        except (OSError, CommandFailed, TimedOut):
            return None


@lru_cache(maxsize=4)
def _doctored(facts: bytes) -> View | None:
    """The view with these facts changed, if CRIU takes it as it should. They name CRIU's build, so this holds for it only."""
    if len(facts) <= _HAS_DIRTY_TRACK or facts[_HAS_DIRTY_TRACK]:
        return None
    CLEAR_REFS.write_text(
        _SOFT_DIRTY
    )  # CRIU trusts that a kernel which tracks memory takes this, and breaks off the dump if not
    view = View(facts[:_HAS_DIRTY_TRACK] + b"\1" + facts[_HAS_DIRTY_TRACK + 1 :])
    with outside.scratch() as directory:
        shown = directory / KERNDAT.name
        shown.write_bytes(view.kerndat or b"")
        if not _supports(TRACKING, shown):
            return None
        return view if all(_supports(one, shown) == _supports(one) for one in WITNESSES) else None


def _supports(feature: str, shown: Path | None = None) -> bool:
    """What `criu check` says; with `shown` in place of CRIU's facts about the kernel."""
    through = [] if shown is None else gate.viewing(shown, KERNDAT)
    argv = outside.on_node([*through, "criu", "check", "--feature", feature])
    return run(argv, check=False, timeout=_CHECK_TIMEOUT).returncode == 0


class ThinDump:
    """One dump's parent, in a directory of its own."""

    def __init__(self, directory: Path, view: View) -> None:
        """Make the directory, and in it a parent that knows no process yet."""
        self._directory, self._view = directory, view
        directory.mkdir(mode=0o700)
        (directory / "inventory.img").write_bytes(
            struct.pack("<I", _INVENTORY_MAGIC) + _framed(InventoryEntry(img_version=_IMAGES_V1_1, dump_uptime=_NEVER))
        )
        entries = (PagemapHead(pages_id=1), *_everything())
        (directory / "everything").write_bytes(
            struct.pack("<II", _COMMON_MAGIC, _PAGEMAP_MAGIC) + b"".join(map(_framed, entries))
        )
        (directory / "pages-1.img").touch()

    def environment(self, conf: Path, images: Path) -> dict[str, str]:
        """What `podferry.node.gatekeeper` needs to know: CRIU's settings `conf` are extended for a dump into `images`."""
        thin = self._directory / "criu.conf"
        parent = os.path.relpath(self._directory, images)
        thin.write_text(f"{conf.read_text()}\n\ntrack-mem\nprev-images-dir {parent}\n")
        environment = {"PODFERRY_THIN": str(thin)}
        if self._view.kerndat is not None:
            shown = self._directory / KERNDAT.name
            shown.write_bytes(self._view.kerndat)
            environment |= {"PODFERRY_SHOWN": str(shown), "PODFERRY_INSTEAD_OF": str(KERNDAT)}
        return environment

    def claim(self, pids: Iterable[int]) -> None:
        """Claim all memory of these processes, which stand still and whose pages nobody tracks by soft-dirty bits any more.

        What cannot be claimed is dumped as ever.
        """
        for pid in pids:
            with suppress(OSError, ValueError):
                inside = int(
                    Path(f"/proc/{pid}/status").read_text().partition("\nNSpid:")[2].split("\n", 1)[0].split()[-1]
                )
                os.link(self._directory / "everything", self._directory / f"pagemap-{inside}.img")
                if self._view.kerndat is None:
                    Path(f"/proc/{pid}/clear_refs").write_text(_SOFT_DIRTY)


def _everything() -> Iterable[PagemapEntry]:
    """Entries that cover all addresses, for either generation of CRIU."""
    step = _LONGEST * mmap.PAGESIZE
    for start in range(0, _ADDRESSES, step):
        pages = min(step, _ADDRESSES - start) // mmap.PAGESIZE
        yield PagemapEntry(vaddr=start, compat_nr_pages=pages, nr_pages=pages, flags=_IN_PARENT)


def _framed(message: Message) -> bytes:
    data = message.SerializeToString()
    return struct.pack("<I", len(data)) + data

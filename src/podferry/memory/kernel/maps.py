"""The mappings of an address space: `/proc/PID/maps` and, where flags matter, `/proc/PID/smaps`.

Formats: proc_pid_maps(5), proc_pid_smaps(5), and `fs/proc/task_mmu.c` of the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from podferry.memory.ranges import Runs

# Mappings without a file that are the kernel's own. [vectors] and [sigpage] are arm's.
KERNEL_AREAS = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]", "[vectors]", "[sigpage]"})

_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([-r])([-w])([-x])([ps]) [0-9a-f]+ ([0-9a-f]+:[0-9a-f]+) (\d+)(?: +(.*))?$",
    re.MULTILINE,
)
_FLAGS = re.compile(rb"^VmFlags:(.*)$", re.MULTILINE)
_LOCKED = re.compile(rb"^VmLck:\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Area:
    """One mapping: [start, end) in bytes. `inode` is 0 without a file; `flags` are VmFlags, empty unless asked for.
    `device` is where the file is, MAJOR:MINOR in hexadecimal digits."""

    start: int
    end: int
    readable: bool
    writable: bool
    executable: bool
    private: bool
    inode: int
    name: str
    flags: frozenset[str] = frozenset()
    device: str = ""

    @property
    def size(self) -> int:
        """Bytes of address space."""
        return self.end - self.start

    @property
    def precopied(self) -> bool:
        """Whether its memory moves while the job runs.

        These are the areas whose pages CRIU leaves to its lazy-pages daemon: private and anonymous, not locked, not
        the kernel's own (`vma_entry_can_be_lazy` in `criu/include/vma.h`; private hugetlb memory has an inode). Unless
        `flags` were read a locked area counts as pre-copied: more than CRIU leaves, never less. Of what is left over
        CRIU also keeps the pages that hold a thread's stack pointer, and those of VM_DROPPABLE areas.
        """
        return self.private and self.inode == 0 and self.name not in KERNEL_AREAS and not self.flags & {"lo", "ht"}


def parse_maps(text: bytes) -> list[Area]:
    """The areas of a `/proc/PID/maps`, ascending. Lines that are not areas (the details in smaps) are passed over."""
    return [_area(match) for match in _LINE.finditer(text)]


def parse_smaps(text: bytes) -> list[Area]:
    """The areas of a `/proc/PID/smaps`, with their VmFlags."""
    heads = list(_LINE.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return [_area(head, _flags(text, head.end(), end)) for head, end in zip(heads, ends, strict=False)]


def read_areas(pid: int, *, flags: bool = False) -> list[Area]:
    """The areas of a live process; none if it has ended and is not yet waited for.

    `flags` reads VmFlags too, which walks the page tables: tens of milliseconds a GiB. Raises OSError (ProcessLookupError
    or FileNotFoundError if there is no such process).
    """
    if flags:
        return parse_smaps(Path(f"/proc/{pid}/smaps").read_bytes())
    return parse_maps(Path(f"/proc/{pid}/maps").read_bytes())


@dataclass(frozen=True, slots=True)
class Layout:
    """An address space, worked up for looking at it again and again."""

    text: bytes
    areas: tuple[Area, ...]
    """The pre-copied areas."""
    windows: tuple[tuple[int, int], ...]
    """See `spans`."""
    covered: Runs
    """The addresses of `areas`."""
    vdso: int
    """Where the vDSO is: as good as an address space's name, since every exec places it anew. 0 if there is none."""


def layout_of(text: bytes) -> Layout:
    """Work up a `/proc/PID/maps`."""
    areas = parse_maps(text)
    ours = private_anonymous(areas)
    vdso = next((area.start for area in areas if area.name == "[vdso]"), 0)
    return Layout(text, tuple(ours), tuple(spans(areas)), covered(ours), vdso)


def read_layout(pid: int, last: Layout | None = None) -> Layout:
    """The present layout of a live process; `last` itself if nothing has changed since. Raises as `read_areas`."""
    text = Path(f"/proc/{pid}/maps").read_bytes()
    return last if last and last.text == text else layout_of(text)


def locked_bytes(pid: int) -> int:
    """How much address space is locked (mlock): CRIU puts such memory into its images, during the freeze."""
    match = _LOCKED.search(Path(f"/proc/{pid}/status").read_bytes())
    return int(match[1]) * 1024 if match else 0


def private_anonymous(areas: Iterable[Area]) -> list[Area]:
    """The areas whose memory is pre-copied, see `Area.precopied`."""
    return [area for area in areas if area.precopied]


def spans(areas: Iterable[Area]) -> list[tuple[int, int]]:
    """Windows [start, end) that together hold every pre-copied area and no other one.

    Neighbours share a window, so that one system call looks at all of them; the address space between two areas of a
    window is unmapped.
    """
    return list(_spans(areas))


def covered(areas: Iterable[Area]) -> Runs:
    """The addresses of `areas`, which must be in order, as they are read."""
    areas = list(areas)
    return Runs.disjoint([area.start for area in areas], [area.end for area in areas])


def _spans(areas: Iterable[Area]) -> Iterator[tuple[int, int]]:
    window: tuple[int, int] | None = None
    for area in areas:
        if area.precopied:
            window = (window[0] if window else area.start, area.end)
        elif window:
            yield window
            window = None
    if window:
        yield window


def _area(match: re.Match[bytes], flags: frozenset[str] = frozenset()) -> Area:
    start, end, read, write, execute, sharing, device, inode, name = match.groups()
    return Area(
        start=int(start, 16),
        end=int(end, 16),
        readable=read == b"r",
        writable=write == b"w",
        executable=execute == b"x",
        private=sharing == b"p",
        inode=int(inode),
        name=(name or b"").decode(errors="surrogateescape"),
        flags=flags,
        device=device.decode(),
    )


def _flags(text: bytes, start: int, end: int) -> frozenset[str]:
    match = _FLAGS.search(text, start, end)
    return frozenset(match[1].decode().split()) if match else frozenset()

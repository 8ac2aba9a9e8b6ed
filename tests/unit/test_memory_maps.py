"""Reading address spaces from texts that kernels wrote."""

from __future__ import annotations

import pytest

from podferry.memory.kernel.maps import covered, parse_maps, parse_smaps, private_anonymous, spans
from podferry.memory.ranges import Runs

pytestmark = pytest.mark.unit

MAPS = b"""\
00400000-00401000 r-xp 00000000 fe:00 26723                              /opt/a program (deleted)
00600000-00602000 rw-p 00002000 fe:00 26723                              /opt/a program (deleted)
56442aea7000-56442b036000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 
7f0000021000-7f0004000000 ---p 00000000 00:00 0 
7f8928000000-7f8928200000 rw-p 00000000 00:10 1028                       /anon_hugepage (deleted)
7f89287e8000-7f89288e8000 rw-p 00000000 00:00 0                          [anon:arena of 9-0 rw-p]
7f89288e8000-7f89289e8000 rw-p 00000000 00:06 4                          /dev/zero
7f89289e8000-7f8928b1b000 rw-s 00000000 00:01 3075                       /dev/zero (deleted)
7f8928b1b000-7f8928b1c000 rw-p 00000000 00:00 0 
7f892983a000-7f892983e000 r--p 00000000 00:00 0                          [vvar]
7f892983e000-7f8929840000 r--p 00000000 00:00 0                          [vvar_vclock]
7f8929840000-7f8929842000 r-xp 00000000 00:00 0                          [vdso]
7ffed9796000-7ffed97b7000 rw-p 00000000 00:00 0                          [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""

SMAPS = b"""\
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 
Size:                132 kB
KernelPageSize:        4 kB
Rss:                   4 kB
THPeligible:           0
VmFlags: rd wr mr mw me lo ac 
7f8928000000-7f8928200000 rw-p 00000000 00:00 0                          [anon:cache]
Size:               2048 kB
VmFlags: rd wr mr mw me ac sd 
7ffed9796000-7ffed97b7000 rw-p 00000000 00:00 0                          [stack]
Size:                132 kB
Rss:                  16 kB
"""

PRECOPIED = [
    (0x56442AEA7000, 0x56442B036000),
    (0x7F0000000000, 0x7F0000021000),
    (0x7F0000021000, 0x7F0004000000),
    (0x7F89287E8000, 0x7F89288E8000),
    (0x7F8928B1B000, 0x7F8928B1C000),
    (0x7FFED9796000, 0x7FFED97B7000),
]


def test_areas_are_told_apart() -> None:
    areas = parse_maps(MAPS)
    assert len(areas) == len(MAPS.splitlines())
    program, heap, reserved = areas[0], areas[2], areas[4]
    assert (program.start, program.end, program.inode) == (0x400000, 0x401000, 26723)
    assert program.name == "/opt/a program (deleted)"
    assert (program.readable, program.writable, program.executable, program.private) == (True, False, True, True)
    assert (heap.name, heap.size, heap.flags) == ("[heap]", 0x18F000, frozenset())
    assert not reserved.readable
    assert not areas[8].private


def test_private_anonymous_memory_is_precopied_and_nothing_else() -> None:
    ours = private_anonymous(parse_maps(MAPS))
    assert [(area.start, area.end) for area in ours] == PRECOPIED
    assert covered(ours) == Runs(PRECOPIED)


def test_locked_memory_is_left_to_the_images_where_flags_are_known() -> None:
    locked, cache, stack = parse_smaps(SMAPS)
    assert "lo" in locked.flags
    assert cache.flags == {"rd", "wr", "mr", "mw", "me", "ac", "sd"}
    assert stack.flags == frozenset()
    assert private_anonymous([locked, cache, stack]) == [cache, stack]
    assert len(private_anonymous(parse_maps(SMAPS))) == 3


def test_spans_hold_what_is_precopied_and_never_anything_else() -> None:
    areas = parse_maps(MAPS)
    windows = spans(areas)
    assert windows == [
        (0x56442AEA7000, 0x7F0004000000),
        (0x7F89287E8000, 0x7F89288E8000),
        (0x7F8928B1B000, 0x7F8928B1C000),
        (0x7FFED9796000, 0x7FFED97B7000),
    ]
    others = covered(area for area in areas if not area.precopied)
    assert not others & Runs(windows)
    assert not covered(private_anonymous(areas)) - Runs(windows)


def test_a_process_without_memory_has_no_areas() -> None:
    assert parse_maps(b"") == []
    assert parse_smaps(b"") == []
    assert spans([]) == []

"""Sets of addresses as runs: what tracker, page store and lazy-pages daemon hand each other.

A `Runs` is an immutable set of bytes, kept as sorted, disjoint, non-touching half-open runs [start, end). It is stored
as the flat row of its boundaries, at which membership flips: the complement is the same row with the ends of the world
added, and difference and union follow from it and from the intersection, which costs as much as the smaller set. The
symmetric difference compares two almost equal sets, as a tracker does in every round, a block of boundaries at a time.

Bitmaps (pyroaring) were measured in its place: what is made of a set are its runs, and those a bitmap would have to look for
(docs/benchmarks/README.md, `scripts/ranges`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain, compress, islice
from operator import ne
from typing import Self

_BLOCK = 64  # boundaries compared at once: cheap to compare in vain, and to search for what differs
_AT_ONCE = 4096  # runs that are Python's objects at a time

_TOP = (1 << 64) - 1  # no address lies there


class Runs:
    """A set of addresses in bytes. Iterating yields its runs as (start, end) in ascending order.

    `|`, `&`, `-` and `^` are the set operations, `len` the number of runs, `size` the number of bytes, `in` asks for
    one address.
    """

    __slots__ = ("_bounds",)

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        """The union of `runs`, which may come in any order and overlap. Raises ValueError for a run that ends early."""
        bounds: array[int] = array("Q")
        last_start, last_end = 0, -1
        for start, end in sorted(runs):
            if end < start:
                raise ValueError(f"run ends before it starts: {start:#x}-{end:#x}")
            if start == end:
                continue
            if start <= last_end:
                last_end = max(last_end, end)
                continue
            if last_end > last_start:
                bounds.extend((last_start, last_end))
            last_start, last_end = start, end
        if last_end > last_start:
            bounds.extend((last_start, last_end))
        self._bounds = bounds

    @classmethod
    def of(cls, start: int, end: int) -> Self:
        """The one run [start, end); empty if `end` is not beyond `start`."""
        return cls._raw(array("Q", (start, end) if start < end else ()))

    @classmethod
    def disjoint(cls, starts: Iterable[int], ends: Iterable[int]) -> Self:
        """Runs known not to overlap, in any order; those that touch are joined. Faster than `Runs(...)`."""
        return cls.ascending(sorted(starts), sorted(ends))

    @classmethod
    def ascending(cls, starts: Iterable[int], ends: Iterable[int]) -> Self:
        """Runs known not to overlap, from the lowest to the highest; those that touch are joined. Needs no memory to speak of
        beside the result: numbers take four times as much as Python's objects."""
        bounds: array[int] = array("Q")
        starts, ends = iter(starts), iter(ends)
        while first := list(islice(starts, _AT_ONCE)):
            last = list(islice(ends, len(first)))
            apart = list(map(ne, first[1:], last))
            part = array("Q", bytes(16 * (sum(apart) + 1)))
            part[0::2] = array("Q", chain(first[:1], compress(first[1:], apart)))
            part[1::2] = array("Q", chain(compress(last, apart), last[-1:]))
            if bounds and bounds[-1] == part[0]:
                bounds.pop()
                del part[0]
            bounds.extend(part)
        return cls._raw(bounds)

    @classmethod
    def _raw(cls, bounds: array[int]) -> Self:
        new = cls.__new__(cls)
        new._bounds = bounds
        return new

    # --- what it holds -------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The number of bytes."""
        return sum(self._bounds[1::2]) - sum(self._bounds[0::2])

    @property
    def start(self) -> int:
        """The lowest address; 0 if the set is empty."""
        return self._bounds[0] if self._bounds else 0

    @property
    def end(self) -> int:
        """The first address above the set; 0 if it is empty."""
        return self._bounds[-1] if self._bounds else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._bounds[0::2], self._bounds[1::2], strict=True)

    def __len__(self) -> int:
        return len(self._bounds) // 2

    def __contains__(self, address: int) -> bool:
        return bool(bisect_right(self._bounds, address) % 2)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Runs) and self._bounds == other._bounds

    def __hash__(self) -> int:
        return hash(self._bounds.tobytes())

    def __repr__(self) -> str:
        shown = ", ".join(f"{start:#x}-{end:#x}" for start, end in islice(self, 4))
        return f"Runs({shown}{', ...' if len(self) > 4 else ''}; {self.size} bytes)"

    # --- set operations ------------------------------------------------------------------------------------------

    def __xor__(self, other: Runs) -> Runs:
        mine, theirs = self._bounds, other._bounds
        found: array[int] = array("Q")
        i, j, stride = 0, 0, _BLOCK
        while i < len(mine) and j < len(theirs):
            if mine[i : i + _BLOCK] == theirs[j : j + _BLOCK]:
                i, j, stride = i + _BLOCK, j + _BLOCK, _BLOCK
                continue
            pause = i + j + stride
            stride *= 2
            while i + j < pause and i < len(mine) and j < len(theirs):
                here, there = mine[i], theirs[j]
                if here <= there:
                    i += 1
                if there <= here:
                    j += 1
                if here != there:
                    found.append(min(here, there))
        found.extend(mine[i:])
        found.extend(theirs[j:])
        return Runs._raw(found)

    def __and__(self, other: Runs) -> Runs:
        few, many = (self, other) if len(self) <= len(other) else (other, self)
        theirs = many._bounds
        bounds: array[int] = array("Q")
        index, last = 0, len(theirs)
        for start, end in few:
            index = bisect_right(theirs, start, index)
            if index == last:
                break
            if end > theirs[index]:
                bounds.extend(many._between(start, end))
            elif index % 2:  # the common case: wholly inside
                bounds.append(start)
                bounds.append(end)
        return Runs._raw(bounds)

    def __sub__(self, other: Runs) -> Runs:
        return self & other._complement()

    def __or__(self, other: Runs) -> Runs:
        if not self or not other:
            return self or other
        return (self._complement() & other._complement())._complement()

    def _complement(self) -> Runs:
        bounds = array("Q", (0,)) + self._bounds + array("Q", (_TOP,))
        first = 2 if self and self.start == 0 else 0
        last = 2 if self.end == _TOP else 0
        return Runs._raw(bounds[first : len(bounds) - last])

    def clip(self, start: int, end: int) -> Runs:
        """What of the set lies in [start, end)."""
        return Runs._raw(self._between(start, end)) if start < end else Runs()

    def _between(self, start: int, end: int) -> array[int]:
        first = bisect_right(self._bounds, start)
        last = bisect_left(self._bounds, end)
        inner = self._bounds[first:last]
        if first % 2:
            inner.insert(0, start)
        if last % 2:
            inner.append(end)
        return inner

    # --- shapes --------------------------------------------------------------------------------------------------

    def gaps(self) -> Runs:
        """The holes between the first and the last address."""
        return Runs._raw(self._bounds[1:-1])

    def coalesce(self, gap: int) -> Runs:
        """The set grown over its holes of at most `gap` bytes: fewer, larger runs, some bytes too many."""
        return self | Runs(run for run in self.gaps() if run[1] - run[0] <= gap) if gap > 0 else self

    def pieces(self, size: int) -> Iterator[tuple[int, int]]:
        """The runs, cut into pieces of at most `size` bytes; a piece never spans a hole."""
        for start, end in self:
            for piece in range(start, end, size):
                yield piece, min(piece + size, end)


class Growing:
    """Runs that come one by one, in ascending order and not overlapping, and become a `Runs` when all are there."""

    def __init__(self) -> None:
        self._bounds: array[int] = array("Q")

    def add(self, start: int, end: int) -> None:
        """The next run [start, end), which may touch the last."""
        if self._bounds and self._bounds[-1] == start:
            self._bounds[-1] = end
        elif start < end:
            self._bounds.extend((start, end))

    def runs(self) -> Runs:
        """What came so far."""
        return Runs._raw(self._bounds[:])


def union(sets: Iterable[Runs]) -> Runs:
    """The union of many sets."""
    filled = [one for one in sets if one]
    if len(filled) <= 1:
        return filled[0] if filled else EMPTY
    return Runs(run for one in filled for run in one)


EMPTY = Runs()

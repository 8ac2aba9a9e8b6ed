"""A map from runs of addresses to numbers, compact and quick to search for hundreds of thousands of runs.

Three sorted arrays and bisection; a run costs 24 bytes. Runs are half-open, do not overlap, and join their neighbours
where that loses nothing.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple, Self

from podferry.memory.ranges import Runs


class Run(NamedTuple):
    """The addresses `start` up to `end`; `value` belongs to `start`."""

    start: int
    end: int
    value: int = 0


class RunMap:
    """Runs of addresses with a value each.

    With `slope` 0 every address of a run has the run's value; with `slope` 1 the value counts along, as in a
    translation of addresses: a run that starts at 0x1000 with value 0x9000 has 0x9004 at 0x1004.
    """

    __slots__ = ("_ends", "_slope", "_starts", "_values")

    def __init__(self, runs: Iterator[Run] | list[Run] | None = None, *, slope: int = 0) -> None:
        self._slope = slope
        self._starts = array("Q")
        self._ends = array("Q")
        self._values = array("Q")
        for run in runs or []:
            self.set(*run)

    def __iter__(self) -> Iterator[Run]:
        return map(Run._make, zip(self._starts, self._ends, self._values, strict=True))

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunMap) and list(self) == list(other) and self._slope == other._slope

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RunMap({list(self)!r}, slope={self._slope})"

    def copy(self) -> RunMap:
        """Another map with the same runs."""
        other = RunMap(slope=self._slope)
        other._starts, other._ends, other._values = self._starts[:], self._ends[:], self._values[:]
        return other

    def total(self) -> int:
        """The number of addresses in all runs."""
        return sum(self._ends) - sum(self._starts)

    def runs(self) -> Runs:
        """The addresses as a set, without their values."""
        return Runs(zip(self._starts, self._ends, strict=True))

    def at(self, address: int) -> int | None:
        """The value of one address, or None."""
        i = bisect_right(self._starts, address) - 1
        if i < 0 or address >= self._ends[i]:
            return None
        return self._values[i] + self._slope * (address - self._starts[i])

    def within(self, start: int, end: int) -> Iterator[Run]:
        """The runs inside `start` up to `end`, cut to it, in order. Do not change the map meanwhile."""
        i = bisect_right(self._ends, start)
        while i < len(self._starts) and self._starts[i] < end:
            yield self._clip(i, start, end)
            i += 1

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any run touches `start` up to `end`."""
        i = bisect_right(self._ends, start)
        return i < len(self._starts) and self._starts[i] < end

    def set(self, start: int, end: int, value: int = 0) -> None:
        """Give `start` up to `end` a value, over whatever was there."""
        starts, ends, slope = self._starts, self._ends, self._slope
        low = bisect_right(ends, start)
        if (
            low < len(starts)
            and starts[low] <= start
            and end <= ends[low]
            and self._clip(low, start, end).value == value
        ):
            return
        if low < len(starts) and starts[low] < end:
            self.cut(start, end)
            low = bisect_right(ends, start)
        high = low
        if high < len(starts) and starts[high] == end and self._values[high] == value + slope * (end - start):
            end = ends[high]
            high += 1
        if low and ends[low - 1] == start and self._values[low - 1] + slope * (start - starts[low - 1]) == value:
            low -= 1
            start, value = starts[low], self._values[low]
        self._replace(low, high, [Run(start, end, value)])

    def cut(self, start: int, end: int) -> list[Run]:
        """Take `start` up to `end` out; returns what was there."""
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end, low)
        if low >= high:
            return []
        taken = [self._clip(i, start, end) for i in range(low, high)]
        kept = []
        if self._starts[low] < start:
            kept.append(self._clip(low, self._starts[low], start))
        if end < self._ends[high - 1]:
            kept.append(self._clip(high - 1, end, self._ends[high - 1]))
        self._replace(low, high, kept)
        return taken

    def dump(self) -> bytes:
        """The runs as bytes; `load` is the inverse."""
        return self._starts.tobytes() + self._ends.tobytes() + self._values.tobytes()

    @classmethod
    def load(cls, data: bytes, *, slope: int = 0) -> Self:
        """Rebuild what `dump` wrote. Raises ValueError where the runs are not in order."""
        count, rest = divmod(len(data), 24)
        if rest:
            raise ValueError(f"{len(data)} bytes are no whole number of runs")
        result = cls(slope=slope)
        for i, part in enumerate((result._starts, result._ends, result._values)):
            part.frombytes(data[8 * count * i : 8 * count * (i + 1)])
        last = 0
        for start, end in zip(result._starts, result._ends, strict=True):
            if not last <= start < end:
                raise ValueError(f"the run {start:#x}-{end:#x} is empty or out of order")
            last = end
        return result

    def _clip(self, i: int, start: int, end: int) -> Run:
        first = max(start, self._starts[i])
        return Run(first, min(end, self._ends[i]), self._values[i] + self._slope * (first - self._starts[i]))

    def _replace(self, low: int, high: int, runs: list[Run]) -> None:
        self._starts[low:high] = array("Q", (run.start for run in runs))
        self._ends[low:high] = array("Q", (run.end for run in runs))
        self._values[low:high] = array("Q", (run.value for run in runs))

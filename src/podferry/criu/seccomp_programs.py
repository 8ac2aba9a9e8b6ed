"""The effect of a seccomp filter: its program (classic BPF, linux/filter.h) is followed symbolically, for all system calls at once.

A program jumps forwards only, so that every way through it ends. `walk` follows each way and tells what is then known of the call.
Where it cannot tell which way a call goes it follows both: what it reports is all that may happen, perhaps more, never less.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from podferry.errors import PeerMisbehaved

NUMBER, ARCH = 0, 4  # offsets in struct seccomp_data
MOST_INSTRUCTIONS = 4096  # BPF_MAXINSNS
_LENGTH = 64  # of struct seccomp_data

_LD_ABS, _AND, _RET_K = 0x20, 0x54, 0x06
_JA, _JEQ, _JGT, _JGE, _JSET = 0x05, 0x15, 0x25, 0x35, 0x45
_CLASS, _JMP, _RET = 0x07, 0x05, 0x06
_LEAVING_A = frozenset({0x01, 0x02, 0x03})  # LDX, ST, STX. What other instructions load is not followed.
ALL_BITS: Final = 0xFFFFFFFF

Values = tuple[int, ...]
"""A set of 32-bit numbers: the first and the last of each run, in order."""
ANY: Final[Values] = (0, ALL_BITS)
_Words = Mapping[tuple[int, int], Values]


class Instruction(NamedTuple):
    """struct sock_filter."""

    code: int
    if_true: int
    if_false: int
    k: int


class Way(NamedTuple):
    """One way through a filter: what it returns, None where that is not known, and what the words of such a call are.

    `words` has the possible values by (offset, mask), of a whole word by the mask of all bits; what is not in it may be anything.
    """

    returns: int | None
    words: Mapping[tuple[int, int], Values]


class _Place(NamedTuple):
    at: int
    loaded: tuple[int, int] | None
    words: _Words


class Budget:
    """How many instructions may be followed in all. Raises `PeerMisbehaved` when they are used up."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def spend(self) -> None:
        """One more."""
        self._left -= 1
        if self._left < 0:
            raise PeerMisbehaved("a seccomp filter has too many ways through it", why="what it allows cannot be told")


def program(data: bytes) -> list[Instruction]:
    """The instructions of a filter. Raises `PeerMisbehaved` for what the kernel would not take either."""
    count, rest = divmod(len(data), 8)
    if rest or not 0 < count <= MOST_INSTRUCTIONS:
        raise PeerMisbehaved("a seccomp filter is invalid", why=f"it has {len(data)} bytes")
    found = [Instruction(*one) for one in struct.iter_unpack("=HBBI", data)]
    for at, (code, if_true, if_false, k) in enumerate(found):
        furthest = (
            0 if code & _CLASS == _RET else k if code == _JA else max(if_true, if_false) if code & _CLASS == _JMP else 0
        )
        last = code & _CLASS == _RET or at + 1 + furthest < count
        if not last or (code == _LD_ABS and (k % 4 or k >= _LENGTH)):
            raise PeerMisbehaved("a seccomp filter is invalid", why=f"instruction {at} leads out of it")
    if found[-1].code & _CLASS != _RET:
        raise PeerMisbehaved("a seccomp filter is invalid", why="it does not end")
    return found


def walk(instructions: list[Instruction], start: _Words, budget: Budget) -> Iterator[Way]:
    """Every way that a call can take which is as `start` says."""
    waiting: list[_Place] = [_Place(0, None, start)]
    while waiting:
        at, loaded, words = waiting.pop()
        budget.spend()
        code, if_true, if_false, k = instructions[at]
        kind = code & _CLASS
        if kind == _RET:
            yield Way(k if code == _RET_K else None, words)
        elif code == _JA:
            waiting.append(_Place(at + 1 + k, loaded, words))
        elif kind == _JMP:
            true, false = _branch(code, k, loaded, words)
            waiting += [
                _Place(at + 1 + jump, loaded, known)
                for jump, known in ((if_false, false), (if_true, true))
                if known is not None
            ]
        else:
            waiting.append(_Place(at + 1, _loaded(code, k, loaded), words))


def _loaded(code: int, k: int, before: tuple[int, int] | None) -> tuple[int, int] | None:
    """What the register holds after an instruction: a word of the call behind a mask, or None for what is not known."""
    if code == _LD_ABS:
        return k, ALL_BITS
    if code == _AND and before is not None:
        return before[0], before[1] & k
    return before if code & _CLASS in _LEAVING_A else None


def _branch(code: int, k: int, loaded: tuple[int, int] | None, words: _Words) -> tuple[_Words | None, _Words | None]:
    """What is known where a condition holds, and where it does not; None where that cannot be."""
    if loaded is None or code not in (_JEQ, _JGT, _JGE, _JSET):
        return words, words
    if code == _JSET:
        bit_set = _with_bit(k)
        if loaded[1] == ALL_BITS and bit_set is not None:
            true, false = bit_set, without(bit_set)
        else:
            loaded = (loaded[0], loaded[1] & k)
            true, false = (1, ALL_BITS), (0, 0)
    else:
        true = {_JEQ: (k, k), _JGT: (k + 1, ALL_BITS) if k < ALL_BITS else (), _JGE: (k, ALL_BITS)}[code]
        false = without(true)
    return _narrowed(words, loaded, true), _narrowed(words, loaded, false)


def _narrowed(words: _Words, which: tuple[int, int], to: Values) -> _Words | None:
    before = values_of(words, which)
    after = both(before, to)
    if not after:
        return None
    if after == before:
        return words
    found = {**words, which: after}
    return found if all(values_of(found, one) for one in found if one[0] == which[0]) else None


def values_of(words: _Words, which: tuple[int, int]) -> Values:
    """What a word may be behind a mask."""
    known = words.get(which)
    if which[1] == ALL_BITS:
        return known or ANY
    whole = words.get((which[0], ALL_BITS))
    if whole is not None and whole[0] == whole[-1]:
        only = whole[0] & which[1]
        return both(known, (only, only)) if known is not None else (only, only)
    if known is not None:
        return known
    if which[1] == 0:
        return (0, 0)
    highest = whole[-1] if whole is not None else ALL_BITS
    return (0, min(highest, which[1]))


def both(one: Values, other: Values) -> Values:
    """What is in both."""
    if one == ANY:
        return other
    if len(other) == 2:
        return _cut(one, other[0], other[1])
    found: list[int] = []
    for place in range(0, len(other), 2):
        found += _cut(one, other[place], other[place + 1])
    return _joined(found)


def _cut(of: Values, first: int, last: int) -> Values:
    if first > last or not of:
        return ()
    low, high = bisect_left(of, first), bisect_left(of, last)
    # An odd place is inside a run, or at its last number.
    head: Values = (first,) if low % 2 else ()
    if high % 2:
        return (*head, *of[low:high], last)
    if high < len(of) and of[high] == last:
        return (*head, *of[low:high], last, last)
    return (*head, *of[low:high])


def _joined(found: list[int]) -> Values:
    joined: list[int] = []
    for place in range(0, len(found), 2):
        if joined and joined[-1] + 1 == found[place]:
            joined[-1] = found[place + 1]
        else:
            joined += found[place : place + 2]
    return tuple(joined)


def without(values: Values) -> Values:
    """All 32-bit numbers that are not in it."""
    found: list[int] = []
    first = 0
    for place in range(0, len(values), 2):
        if first < values[place]:
            found += (first, values[place] - 1)
        first = values[place + 1] + 1
    if first <= ALL_BITS:
        found += (first, ALL_BITS)
    return tuple(found)


def count(values: Values) -> int:
    """How many they are."""
    return sum(values[place + 1] - values[place] + 1 for place in range(0, len(values), 2))


def each(values: Values) -> Iterator[int]:
    """Every number in it."""
    for place in range(0, len(values), 2):
        yield from range(values[place], values[place + 1] + 1)


def _with_bit(k: int) -> Values | None:
    """The numbers with a bit, where it is one bit and a high one."""
    if k < 1 << 24 or k & (k - 1):
        return None
    found: list[int] = []
    for first in range(k, ALL_BITS + 1, 2 * k):
        found += (first, first + k - 1)
    return tuple(found)

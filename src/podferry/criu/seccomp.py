"""Do the seccomp filters in CRIU's images permit more than the profile of the container's spec?

CRIU loads as filters whatever its images hold. What runc makes of a profile differs from version to version (order, binary trees,
the calls that its libseccomp knows), so filters are compared by what they do, not by their bytes: each way through one must permit
no more than the profile does for every call that can take it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache

from podferry.core.allowed_syscalls import (
    ABOVE,
    ALLOW,
    AT_LEAST,
    AT_MOST,
    BELOW,
    EQUAL,
    ERRNO,
    NOT_EQUAL,
    ArgumentCondition,
    Profile,
)
from podferry.core.syscall_numbers import X32_BIT
from podferry.criu.seccomp_programs import (
    ALL_BITS,
    ARCH,
    NUMBER,
    Budget,
    Values,
    Way,
    both,
    count,
    each,
    program,
    values_of,
    walk,
)
from podferry.errors import PeerMisbehaved
from podferry.protos import rights_pb2 as pb

MOST_STEPS = 50_000
"""Through one filter. The largest that container engines make has 2,600."""
MOST_DIFFERENT = 8
"""Filters of one container that are looked through. Its runtime's is nearly always the first."""
_MOST_FILTERS, _LONGEST_CHAIN = 1024, 64
_PLAIN, _X32 = (0, X32_BIT - 1), (X32_BIT, ALL_BITS - 1)  # -1 is no call: a tracer has taken it away
_OPPOSITE = {EQUAL: NOT_EQUAL, NOT_EQUAL: EQUAL, AT_LEAST: BELOW, BELOW: AT_LEAST, ABOVE: AT_MOST, AT_MOST: ABOVE}
_FLAGS = 1 | 2  # SECCOMP_FILTER_FLAG_TSYNC, which CRIU itself sets, and _LOG
_ENOSYS = ERRNO | 38
_ARGUMENTS = 16  # the offset of the first


class Filters:
    """The filters of a container, and whether those that a thread has are as strict as `profile`."""

    def __init__(self, seccomp: pb.Seccomp, profile: Profile | None) -> None:
        self._all: Sequence[pb.SeccompFilter] = seccomp.seccomp_filters
        self._profile = profile
        self._seen: set[bytes] = set()
        self.against_last = cache(self._against_last)

    def odd(self) -> Iterator[str]:
        """What is wrong with any of them, whoever has it."""
        if len(self._all) > _MOST_FILTERS:
            yield f"there are {len(self._all)} seccomp filters"
        for place, one in enumerate(self._all[:_MOST_FILTERS]):
            if one.HasField("prev") and one.prev >= place:  # CRIU would follow them for ever
                yield "a seccomp filter comes before itself"
            if one.flags & ~_FLAGS:
                yield f"a seccomp filter has the flags {one.flags:#x}"

    def _against_last(self, last: int) -> str:
        """Why the filters of a thread, whose last is `last`, permit more than the profile; empty where they do not.

        A thread may have added filters of its own: they permit less. So one of them has to be as strict as the profile is.
        """
        if last >= min(len(self._all), _MOST_FILTERS):
            return "a thread has a seccomp filter that there is not"
        if self._profile is None:
            return ""
        chain = [last]
        while self._all[chain[-1]].HasField("prev") and len(chain) < _LONGEST_CHAIN:
            if self._all[chain[-1]].prev >= chain[-1]:
                return "a seccomp filter comes before itself"
            chain.append(self._all[chain[-1]].prev)
        reason = ""
        for place in reversed(chain):  # the runtime's comes first
            filter = self._all[place].filter
            self._seen.add(filter)
            if len(self._seen) > MOST_DIFFERENT:
                return f"none of {MOST_DIFFERENT} seccomp filters is as strict as the spec's profile"
            if not (found := reason_against(filter, self._profile)):
                return ""
            reason = reason or found
        return reason


@lru_cache(maxsize=32)  # what was found right is right for the next container with the same profile
def reason_against(filter: bytes, profile: Profile) -> str:
    """A call that a filter permits and the profile does not, in words; empty where there is none."""
    budget = Budget(MOST_STEPS)
    try:
        instructions = program(filter)
        for arch in profile.architectures:
            for way in walk(instructions, {(ARCH, ALL_BITS): (arch, arch)}, budget):
                if (number := _more(way, arch, profile)) is not None:
                    return f"a seccomp filter permits more than the spec's profile: system call {number} ({arch:#x})"
    except PeerMisbehaved as error:
        return str(error)
    return ""


def _more(way: Way, arch: int, profile: Profile) -> int | None:
    """A number that this way permits more for than the profile."""
    if way.returns == _ENOSYS:
        return None  # such a call is not made: what runc answers to calls that its libseccomp does not know
    action = ALLOW if way.returns is None else _signed(way.returns & 0xFFFF0000)
    possible = values_of(way.words, (NUMBER, ALL_BITS))
    for half in (_PLAIN, _X32):
        numbers = both(possible, half)
        listed = _within(profile.numbers[arch], numbers)
        for number in listed:
            if not _permits(profile, arch, number, action, way):
                return number
        if count(numbers) > len(listed) and profile.default_of(arch, half[0]) < action:
            return next(number for number in each(numbers) if number not in listed)
    return None


def _within(listed: Sequence[int], numbers: Values) -> Sequence[int]:
    found: list[int] = []
    for place in range(0, len(numbers), 2):
        found += listed[bisect_left(listed, numbers[place]) : bisect_right(listed, numbers[place + 1])]
    return found


def _permits(profile: Profile, arch: int, number: int, action: int, way: Way) -> bool:
    """Whether the profile permits `action` for every call of this number that takes this way."""
    rules, narrow = profile.rules[arch, number], profile.is_narrow(arch, number)
    if any(one.action >= action and all(_holds(each, way, narrow) for each in one.conditions) for one in rules):
        return True
    if profile.default < action:
        return False
    stricter = (one for one in rules if one.action < action)
    return all(any(_fails(each, way, narrow) for each in one.conditions) for one in stricter)


def _holds(condition: ArgumentCondition, way: Way, narrow: bool) -> bool:
    """Whether a condition is met by every call that takes this way. A wide argument has two words, the higher decides first."""
    offset, word = _ARGUMENTS + 8 * condition.argument, condition.mask & ALL_BITS
    low = values_of(way.words, (offset, word))
    high = (0, 0) if narrow else values_of(way.words, (offset + 4, condition.mask >> 32 & ALL_BITS))
    value, above = condition.value & ALL_BITS, 0 if narrow else condition.value >> 32 & ALL_BITS
    within = {
        AT_LEAST: high[0] > above or (high[0] == above and low[0] >= value),
        ABOVE: high[0] > above or (high[0] == above and low[0] > value),
        AT_MOST: high[-1] < above or (high[-1] == above and low[-1] <= value),
        BELOW: high[-1] < above or (high[-1] == above and low[-1] < value),
        EQUAL: low == (value, value) and high == (above, above),
        NOT_EQUAL: not both(low, (value, value)) or not both(high, (above, above)),
    }
    return within.get(condition.operator, False)


def _fails(condition: ArgumentCondition, way: Way, narrow: bool) -> bool:
    """Whether a condition is met by no call that takes this way."""
    return condition.operator in _OPPOSITE and _holds(
        replace(condition, operator=_OPPOSITE[condition.operator]), way, narrow
    )


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value

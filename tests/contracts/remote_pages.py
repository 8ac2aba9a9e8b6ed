"""`podferry.engine.ports.RemotePages`: the memory that the target has not got, in post-copy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import pytest

from podferry.engine.ports import OriginalGone, RemotePages
from podferry.wire.frames import PAGE, Drop, Pages

from . import Contract

OWED, WRITTEN, ALL = 36, 32, 40
"""Of the `ALL` pages of the process the first `OWED` are owed, of which the first `WRITTEN` are not zero."""
ADDRESS_SPACE, NOBODYS = 5, 99


class RemotePagesCase(Protocol):
    """A process of the space `ADDRESS_SPACE` with `ALL` pages from `base` on; `content` says what is in one."""

    base: int
    pages: RemotePages

    def content(self, number: int) -> bytes: ...

    def end(self) -> None:
        """The frozen original ends."""
        ...


class RemotePagesContract(Contract):
    """The fixture `case` is a `RemotePagesCase`."""

    def given(self, case: RemotePagesCase, frames: Iterable[Pages | Drop]) -> list[int]:
        """The numbers of the pages in `frames`, each of which must have the page's content."""
        numbers = []
        for frame in frames:
            assert frame.address_space == ADDRESS_SPACE
            if isinstance(frame, Drop):
                dropped = [at for start, end in frame.runs for at in range(start, end, PAGE)]
                for at in dropped:
                    assert case.content((at - case.base) // PAGE) == bytes(PAGE)
                numbers += [(at - case.base) // PAGE for at in dropped]
                continue
            for address, data in frame.pieces():
                for offset in range(0, len(data), PAGE):
                    number = (address + offset - case.base) // PAGE
                    assert bytes(data[offset : offset + PAGE]) == case.content(number)
                    numbers.append(number)
        return numbers

    def answer(self, case: RemotePagesCase, number: int) -> list[int]:
        return self.given(case, case.pages.answer(ADDRESS_SPACE, case.base + number * PAGE))

    async def test_the_rest_is_every_page_that_is_owed_once(self, case: RemotePagesCase) -> None:
        assert case.pages.bytes == OWED * PAGE
        assert sorted(self.given(case, case.pages.rest())) == list(range(OWED))
        assert case.pages.bytes == 0
        assert self.given(case, case.pages.rest()) == []

    async def test_a_wanted_page_comes_at_once_and_is_not_pushed_again(self, case: RemotePagesCase) -> None:
        first = self.answer(case, 20)
        assert 20 in first
        assert case.pages.bytes == (OWED - len(first)) * PAGE
        rest = self.given(case, case.pages.rest())
        assert sorted(first + rest) == list(range(OWED))

    async def test_a_page_that_is_on_its_way_is_not_given_again(self, case: RemotePagesCase) -> None:
        """What was given may be in the job already, which has written since."""
        assert 20 in self.answer(case, 20)
        assert self.answer(case, 20) == []

    async def test_a_page_of_zeros_is_told_as_such(self, case: RemotePagesCase) -> None:
        assert WRITTEN in self.answer(case, WRITTEN)

    async def test_what_is_not_owed_is_zero_to_the_target(self, case: RemotePagesCase) -> None:
        """CRIU lists pages that were never written; whatever the original has there, the target is told that nothing comes."""
        at = case.base + (ALL - 1) * PAGE
        assert list(case.pages.answer(ADDRESS_SPACE, at)) == [Drop(ADDRESS_SPACE, ((at, at + PAGE),))]
        assert list(case.pages.answer(NOBODYS, at)) == [Drop(NOBODYS, ((at, at + PAGE),))]
        assert case.pages.bytes == OWED * PAGE

    async def test_after_a_lost_connection_all_is_owed_again(self, case: RemotePagesCase) -> None:
        self.answer(case, 20)
        list(case.pages.rest())
        case.pages.start_over()
        assert case.pages.bytes == OWED * PAGE
        assert 20 in self.answer(case, 20)
        case.pages.start_over()
        assert sorted(self.given(case, case.pages.rest())) == list(range(OWED))

    async def test_an_original_that_has_ended_gives_no_zeros(self, case: RemotePagesCase) -> None:
        case.end()
        with pytest.raises(OriginalGone):
            self.answer(case, 3)
        with pytest.raises(OriginalGone):
            list(case.pages.rest())

    async def test_an_original_that_ends_meanwhile_gives_no_zeros(self, case: RemotePagesCase) -> None:
        first = self.answer(case, 3)
        case.end()
        with pytest.raises(OriginalGone):
            first += self.given(case, case.pages.rest())
        case.pages.start_over()
        with pytest.raises(OriginalGone):
            self.answer(case, 3)

    async def test_it_is_closed_once_more(self, case: RemotePagesCase) -> None:
        self.answer(case, 3)
        case.pages.close()
        case.pages.close()

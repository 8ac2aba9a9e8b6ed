"""Which pages the target holds, by their contents.

Shared memory reaches the target twice: its pages while the job runs, and CRIU's image of it, in which those pages lie in an order
that CRIU chooses. So the source remembers a digest of each page that it sent, and of an image it sends only the pages that the
target does not hold. Nothing rests on the digests alone: the image as a whole is compared with a digest of 128 bits in the end.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import xxhash

from podferry.wire.frames import INLINE, PAGE, ZEROS, Run

CHUNK = 1 << 20
"""Bytes that are compared at once. Chunks lie at multiples of it."""
MOST_PAGES = 1 << 20
"""4 GiB. A page costs some 130 bytes of the agent's memory; what is beyond them moves while the job stands still."""

_digest = xxhash.xxh3_64_intdigest
_ZERO_DIGEST = _digest(bytes(PAGE))


class HeldPages:
    """The pages that the target holds, each at an address of the caller's choice between `ZEROS` and `INLINE`."""

    def __init__(self, most: int = MOST_PAGES) -> None:
        """`most` is how many pages may be remembered."""
        self._digests: dict[int, array[int]] = {}
        self._addresses: dict[int, int] = {}
        self._most = most

    def __len__(self) -> int:
        return len(self._addresses)

    def changed(self, address: int, chunk: memoryview) -> list[Run]:
        """The parts (start, end) of `chunk`, in bytes, that the target is to be sent: it holds them at `address` from now on.

        `chunk` is whole pages, at most `CHUNK` bytes, and `address` a multiple of `CHUNK`.
        """
        before = self._digests.get(address, array("Q"))
        found = array("Q", map(_digest, pages(chunk)))
        found.extend(before[len(found) :])  # an object that has become shorter: the target holds its end all the same
        if found == before:
            return []
        runs: list[Run] = []
        for number, digest in enumerate(found):
            last = before[number] if number < len(before) else _ZERO_DIGEST
            if digest == last:
                continue
            if digest != _ZERO_DIGEST and last == _ZERO_DIGEST and len(self._addresses) >= self._most:
                found[number] = _ZERO_DIGEST
                continue
            self._forget(last, address + number * PAGE)
            if digest == _ZERO_DIGEST:
                continue
            self._addresses[digest] = address + number * PAGE
            start, end = number * PAGE, number * PAGE + PAGE
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, end))
        self._digests[address] = found
        return runs

    def drop(self, start: int, end: int) -> bool:
        """The target forgets what it holds from `start` to `end`, multiples of `CHUNK`. Whether it holds anything there."""
        gone = [address for address in self._digests if start <= address < end]
        for address in gone:
            for number, digest in enumerate(self._digests.pop(address)):
                self._forget(digest, address + number * PAGE)
        return bool(gone)

    def take(self, piece: memoryview) -> list[Run]:
        """What the whole pages of a piece of an image are to the target, in order: runs (address, pages) of what it holds, of zeros
        at `ZEROS`, and at `INLINE` of what it does not hold.

        Each page is given once: the target need not keep what it has put into an image.
        """
        runs: list[Run] = []
        for digest in map(_digest, pages(piece)):
            address = ZEROS if digest == _ZERO_DIGEST else self._addresses.pop(digest, INLINE)
            if runs and address == _after(*runs[-1]):
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((address, 1))
        return runs

    def _forget(self, digest: int, address: int) -> None:
        if self._addresses.get(digest) == address:
            del self._addresses[digest]


def _after(address: int, pages: int) -> int:
    """The address that continues a run."""
    return address if address in (ZEROS, INLINE) else address + pages * PAGE


def pages(memory: memoryview) -> Iterator[memoryview]:
    """The whole pages of `memory`, one by one."""
    return (memory[at : at + PAGE] for at in range(0, len(memory) - PAGE + 1, PAGE))

"""The demo's job: a computation in which every byte of its memory counts. It runs in a container, on the standard library alone.

Each step picks a block of memory by the checksum so far, takes the block into the checksum, and rewrites it from that; it
counts some primes, and appends a line to a file. A page that was lost, stale or torn would change every later line.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

BLOCK = 1 << 20
LEDGER = Path("/var/tmp/ledger")
FINAL = "result"


def primes(start: int, count: int) -> int:
    """How many of the odd numbers from `start`, `count` of them, are prime (Fermat's test to base 2 is enough here)."""
    return sum(pow(2, number - 1, number) == 1 for number in range(start | 1, start + 2 * count, 2))


def compute(blocks: int, steps: int, candidates: int, every: int) -> str:
    """Run `steps` steps over `blocks` MiB of memory; print a line at each `every`th and return the final checksum."""
    memory = bytearray(blocks * BLOCK)
    for block in range(blocks):
        memory[block * BLOCK : (block + 1) * BLOCK] = hashlib.shake_128(block.to_bytes(4, "big")).digest(BLOCK)
    checksum, found = bytes(32), 0
    with LEDGER.open("w") as ledger:
        for step in range(1, steps + 1):
            start = int.from_bytes(checksum[:4], "big") % blocks * BLOCK
            checksum = hashlib.sha256(checksum + memory[start : start + BLOCK]).digest()
            memory[start : start + BLOCK] = hashlib.shake_128(checksum).digest(BLOCK)
            found += primes(10**12 + 2 * candidates * step, candidates)
            ledger.write(f"{step} {found} {checksum.hex()}\n")
            ledger.flush()
            if step % every == 0:
                print(f"step {step} of {steps}: {found} primes, checksum {checksum.hex()[:16]}", flush=True)
        os.fsync(ledger.fileno())
    final = hashlib.sha256(checksum)
    final.update(memory)
    return final.hexdigest()


if __name__ == "__main__":
    print(FINAL, compute(*map(int, sys.argv[1:5])), flush=True)

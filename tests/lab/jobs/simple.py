"""Counts, a line each time, and rewrites its memory, of which it knows every byte. SIGUSR1: look at all of it; SIGTERM: exit 7."""

# ruff: noqa: SIM115

import signal
import sys
import time
from pathlib import Path

PAGE = 4096
pages = int(sys.argv[1]) * 256
memory = bytearray(pages * PAGE)
versions = [0] * pages
ledger = Path("/ledger").open("ab", buffering=0)


def content(page, version):
    return (b"%d:%d;" % (page, version) * (PAGE // 4))[:PAGE]


def write(page, version):
    memory[page * PAGE : (page + 1) * PAGE] = content(page, version)
    versions[page] = version


def check(page):
    if memory[page * PAGE : (page + 1) * PAGE] != content(page, versions[page]):
        print(f"page {page} is wrong", flush=True)
        sys.exit(3)


def check_all(number, frame):
    for page in range(pages):
        check(page)
    Path("/whole").write_text(f"{count}\n")


for page in range(pages):
    write(page, 0)
signal.signal(signal.SIGUSR1, check_all)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
count = 0
while True:
    for step in range(16):
        page = (count * 16 + step) * 7919 % pages
        check(page)
        write(page, count)
    ledger.write(b"%d\n" % count)
    print(count, time.monotonic_ns(), flush=True)
    count += 1
    time.sleep(0.02)

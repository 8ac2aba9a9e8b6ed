"""Counts together with `argv[1]` processes and `argv[2]` threads, each of which knows its own memory and answers when it is asked.
What is wrong is named, and ends it with status 3. SIGTERM: exit 7."""

# ruff: noqa: SIM115

import os
import signal
import sys
import threading
import time
from pathlib import Path

processes, threads = int(sys.argv[1]), int(sys.argv[2])
PAGE = 4096
TURN = 50  # counts until it is everybody's turn again: an interpreter that wakes up writes 200 KB


def need(truth, what):
    if not truth:
        print(f"{what} is wrong", flush=True)
        os._exit(3)


def answer(number, asked, answered):
    """A child's life: asked, it says how often it was, and has that in its memory."""
    memory, times = bytearray(16 * PAGE), 0
    while os.read(asked, 1):
        at = times % 16 * PAGE
        need(memory[at] == (max(0, times - 15) % 256 if times > 15 else 0), f"the memory of child {number}")
        times += 1
        memory[at] = times % 256
        os.write(answered, b"%04d%08d" % (number, times))
    os._exit(0)


children = []
results = os.pipe()
for number in range(processes):
    reader, writer = os.pipe()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in (*children, writer):
            os.close(other)
        answer(number, reader, results[1])
    os.close(reader)
    children.append(writer)

turns = [threading.Event() for _ in range(threads)]
said = [0] * threads
told = threading.Semaphore(0)


def live(number):
    mine = 0
    while True:
        turns[number].wait()
        turns[number].clear()
        mine += 1
        said[number] = mine
        told.release()


threading.stack_size(128 << 10)
for number in range(threads):
    threading.Thread(target=live, args=(number,), daemon=True).start()

signal.signal(signal.SIGTERM, lambda number, frame: os._exit(7))
ledger = Path("/ledger").open("ab", buffering=0)
count = 0
while True:
    for number in range(count % TURN, processes, TURN):
        os.write(children[number], b"?")
    for _ in range(count % TURN, processes, TURN):
        word = os.read(results[0], 12)
        number, times = int(word[:4]), int(word[4:])
        need(number % TURN == count % TURN and times == count // TURN + 1, f"child {number}")
    for number in range(count % TURN, threads, TURN):
        turns[number].set()
    for _ in range(count % TURN, threads, TURN):
        told.acquire()
    need(all(said[number] == count // TURN + 1 for number in range(count % TURN, threads, TURN)), "a thread")
    ledger.write(b"%d\n" % count)
    print(count, time.monotonic_ns(), flush=True)
    count += 1
    time.sleep(0.1)

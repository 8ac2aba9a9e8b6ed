"""Counts, and at each count asks everything that a process can hold: a thread, children by pipe and socket pair, a FIFO, open and
deleted files, a timer, shared memory. What does not answer as it should is named, and ends it with status 3. SIGTERM: exit 7."""

# ruff: noqa: SIM115, PLW0603

import mmap
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from queue import Queue


def need(truth, what):
    if not truth:
        print(f"{what} is wrong", flush=True)
        os._exit(3)


def pipe_child():
    to_child, to_parent = os.pipe(), os.pipe()
    if os.fork() == 0:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.close(to_child[1])
        while asked := os.read(to_child[0], 8):
            os.write(to_parent[1], bytes(reversed(asked)))
        os._exit(0)
    return lambda data: (os.write(to_child[1], data), os.read(to_parent[0], 8))[1]


def socket_child(kind):
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    if os.fork() == 0:
        ours.close()
        if os.fork() == 0:  # a grandchild answers
            while asked := theirs.recv(8):
                theirs.send(bytes(byte ^ 255 for byte in asked))
            os._exit(0)
        theirs.close()
        while True:
            os.wait()
    theirs.close()
    return lambda data: (ours.send(data), ours.recv(8))[1]


def thread():
    asked, answered = Queue(), Queue()

    def work():
        while True:
            answered.put(asked.get() * 2)

    threading.Thread(target=work, daemon=True).start()
    return lambda number: (asked.put(number), answered.get())[1]


by_pipe, by_stream, by_seqpacket = pipe_child(), socket_child(socket.SOCK_STREAM), socket_child(socket.SOCK_SEQPACKET)
os.mkfifo("/fifo")
fifo = os.open("/fifo", os.O_RDWR)
kept = Path("/kept").open("w+b", buffering=0)
deleted = tempfile.TemporaryFile(dir="/", buffering=0)
scratch = tempfile.NamedTemporaryFile(dir="/", buffering=0, delete=False)
Path(scratch.name).unlink()
append = Path("/ledger").open("ab", buffering=0)
shared = mmap.mmap(-1, 1 << 20)
bulk = bytearray(os.urandom(1 << 20) * 16)
digest = hash(bytes(bulk))
in_pipe = os.pipe()
os.write(in_pipe[1], b"waits across the move")
ticks = 0


def tick(number, frame):
    global ticks
    ticks += 1


signal.signal(signal.SIGALRM, tick)
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(7))
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
by_thread = thread()
count, seen, waited = 0, 0, 0
while True:
    word = b"%08d" % count
    need(by_pipe(word) == word[::-1], "the pipe to a child")
    need(by_stream(word) == bytes(byte ^ 255 for byte in word), "the socket pair to a grandchild")
    need(by_seqpacket(word) == bytes(byte ^ 255 for byte in word), "the packets to a grandchild")
    need(by_thread(count) == 2 * count, "the thread")
    os.write(fifo, word)
    need(os.read(fifo, 8) == word, "the FIFO")
    for file in (kept, deleted, scratch):
        file.write(word)
        need(os.pread(file.fileno(), 8, 8 * count) == word, f"the file {file}")
        need(count == 0 or os.pread(file.fileno(), 8, 8 * (count - 1)) == b"%08d" % (count - 1), f"the file {file}")
    append.write(b"%d\n" % count)
    need(shared[:8] == (b"%08d" % (count - 1) if count else bytes(8)), "the shared memory")
    shared[:8] = word
    waited = 0 if ticks != seen else waited + 1
    need(waited < 500, "the timer")
    seen = ticks
    if count % 50 == 0:
        need(hash(bytes(bulk)) == digest, "the memory")
        need(os.getpid() == 1 and threading.active_count() == 2, "the process itself")
    print(count, time.monotonic_ns(), flush=True)
    count += 1
    time.sleep(0.01)

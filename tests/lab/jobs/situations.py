"""A job in one situation, by name: it counts, `COUNT TIME` on a line, while all is well; else it says why, and exits 7.

Put after counting.py.
"""

# ruff: noqa: F821
import contextlib
import ctypes
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

INTERVAL = 0.01


# Timers.


def fires(timer, timeout=5.0):
    if not select.select([timer], [], [], timeout)[0]:
        bad("the timer does not fire")
    return int.from_bytes(os.read(timer, 8), sys.byteorder)


def periodic(clock, flags=0):
    timer = os.timerfd_create(clock)
    first = time.clock_gettime(clock) + INTERVAL if flags else INTERVAL
    os.timerfd_settime(timer, flags=flags, initial=first, interval=INTERVAL)
    count(lambda number: fires(timer))


@situation
def timerfd_monotonic():
    periodic(time.CLOCK_MONOTONIC)


@situation
def timerfd_boottime():
    periodic(time.CLOCK_BOOTTIME)


@situation
def timerfd_realtime():
    periodic(time.CLOCK_REALTIME)


@situation
def timerfd_monotonic_absolute():
    periodic(time.CLOCK_MONOTONIC, os.TFD_TIMER_ABSTIME)


@situation
def timerfd_realtime_absolute():
    periodic(time.CLOCK_REALTIME, os.TFD_TIMER_ABSTIME)


def never_early(clock):
    """Single points in time, a second apart: none comes before its time."""
    timer = os.timerfd_create(clock)

    def step(number):
        point = time.clock_gettime_ns(clock) + 700_000_000
        os.timerfd_settime_ns(timer, flags=os.TFD_TIMER_ABSTIME, initial=point)
        fires(timer, 10.0)
        if (early := point - time.clock_gettime_ns(clock)) > 0:
            bad("early by", early, "ns")

    count(step)


@situation
def timerfd_points_of_monotonic():
    never_early(time.CLOCK_MONOTONIC)


@situation
def timerfd_points_of_realtime():
    never_early(time.CLOCK_REALTIME)


@situation
def timerfd_disarmed():
    """An interval without a value: disarmed, and so it stays."""
    timer = os.timerfd_create(time.CLOCK_MONOTONIC)
    os.timerfd_settime(timer, initial=0, interval=INTERVAL)

    def step(number):
        if select.select([timer], [], [], 0)[0]:
            bad("a disarmed timer fired")

    count(step)


def signalled(arm):
    fired = [0]
    signal.signal(signal.SIGALRM, lambda number, frame: fired.__setitem__(0, fired[0] + 1))
    arm()

    def step(number):
        before, waited = fired[0], time.monotonic()
        while fired[0] == before:
            if time.monotonic() - waited > 5:
                bad("the timer does not fire")
            time.sleep(0.005)

    count(step)


@situation
def setitimer_real():
    signalled(lambda: signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL))


def posix_timer(clock):
    class Spec(ctypes.Structure):
        _fields_ = [(name, ctypes.c_long) for name in ("isec", "insec", "vsec", "vnsec")]

    def arm():
        id = ctypes.c_void_p()
        if libc.timer_create(clock, None, ctypes.byref(id)):  # no sigevent: SIGALRM
            bad("timer_create")
        nanoseconds = int(INTERVAL * 1e9)
        if libc.timer_settime(id, 0, ctypes.byref(Spec(0, nanoseconds, 0, nanoseconds)), None):
            bad("timer_settime")

    signalled(arm)


@situation
def posix_timer_monotonic():
    posix_timer(time.CLOCK_MONOTONIC)


@situation
def posix_timer_realtime():
    posix_timer(time.CLOCK_REALTIME)


@situation
def posix_timer_boottime():
    posix_timer(time.CLOCK_BOOTTIME)


# Memory.


@situation
def shared_mappings_by_the_thousand():
    """CRIU writes two images for each."""
    mappings = [mmap.mmap(-1, 8192) for _ in range(6000)]
    for number, mapping in enumerate(mappings):
        mapping[0] = number % 250
        libc.mprotect(ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + 4096, 4096, 0)

    def step(number):
        if mappings[number % 6000][0] != number % 6000 % 250:
            bad("another mapping")

    count(step)


@situation
def idle_with_shared_memory():
    """Much of it is in CRIU's images, so a dump takes a moment."""
    memory = mmap.mmap(-1, 192 << 20)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = at // mmap.PAGESIZE % 251

    def step(number):
        at = number * 7919 % (len(memory) // mmap.PAGESIZE)
        if memory[at * mmap.PAGESIZE] != at % 251:
            bad("another page", at)

    count(step)


# Processes.


@situation
def starts_programs_all_the_time():
    """A parent waits in vfork for a child that may be frozen before it has become another program."""

    def start():
        while True:
            subprocess.run(["/bin/true"], check=True)

    for _ in range(3):
        threading.Thread(target=start, daemon=True).start()
    count(nothing)


# The network.


def network():
    """What the kernel tells of the network namespace: interfaces with flags, addresses, routes and settings."""
    told = {}
    for interface in Path("/sys/class/net").iterdir():
        told[interface.name] = [read(interface / what) for what in ("flags", "mtu", "tx_queue_len")]
    for name in ("fib_trie", "route", "if_inet6"):
        told[name] = read(f"/proc/net/{name}")
    # Use counts and metrics of routes change by themselves.
    told["ipv6_route"] = sorted(
        line.split()[0] + line.split()[-1] for line in read("/proc/net/ipv6_route").splitlines()
    )
    for directory, _, files in os.walk("/proc/sys/net"):
        for name in files:
            told[f"{directory}/{name}"] = read(f"{directory}/{name}")
    return told


def read(path):
    with contextlib.suppress(OSError), Path(path).open() as file:
        return file.read()
    return ""


@situation
def network_namespace_as_it_was():
    before = network()

    def compare(number):
        now = network()
        differs = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
        if differs:
            bad("the network differs:", differs[:5], [(before.get(key), now.get(key)) for key in differs[:2]])

    count(compare, gap=0.1)


@situation
def loopback_listener():
    with socket.create_server(("127.0.0.1", 7003)) as server:

        def talk(number):
            with socket.create_connection(("127.0.0.1", 7003), timeout=5) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"x")
                    if accepted.recv(1) != b"x":
                        bad("the byte is another")

        count(talk, gap=0.5)


def pair(server, address, size=8):
    """Two processes that talk over one connection all the time, and count what they say."""
    if os.fork() == 0:
        with socket.create_connection(address) as client:
            while True:
                client.sendall(whole(client, size))
    connection, _ = server.accept()

    def talk(number):
        said = number.to_bytes(8, "big") * (size // 8)
        connection.sendall(said)
        if (heard := whole(connection, size)) != said:
            bad("said", number, "and heard", heard[:8])

    count(talk)


@situation
def tcp_loopback_pair():
    with socket.create_server(("127.0.0.1", 7010)) as server:
        pair(server, ("127.0.0.1", 7010))


@situation
def tcp_loopback_pair_with_much_to_say():
    with socket.create_server(("127.0.0.1", 7011)) as server:
        pair(server, ("127.0.0.1", 7011), size=1 << 20)


@situation
def tcp_loopback_pair_of_ipv6():
    with socket.create_server(("::1", 7012), family=socket.AF_INET6) as server:
        pair(server, ("::1", 7012))


@situation
def tcp_loopback_pair_of_both_versions():
    with socket.create_server(("::", 7013), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        pair(server, ("127.0.0.1", 7013))


@situation
def tcp_loopback_stream_that_waits_for_its_reader():
    """The queues of both ends are full at any moment."""
    words = 1 << 14
    with socket.create_server(("127.0.0.1", 7014)) as server:
        if os.fork() == 0:
            with socket.create_connection(("127.0.0.1", 7014)) as client:
                number = 0
                while True:
                    client.sendall(b"".join(word.to_bytes(8, "big") for word in range(number, number + words)))
                    number += words
        connection, _ = server.accept()

        def read(number):
            got = whole(connection, 8 * 64)
            for at in range(64):
                if int.from_bytes(got[8 * at : 8 * at + 8], "big") != 64 * number + at:
                    bad("the stream is broken at", 64 * number + at)

        count(read)


@situation
def tcp_half_closed():
    """One end has said all that it had to say, and listens on."""
    with socket.create_server(("127.0.0.1", 7015)) as server:
        if os.fork() == 0:
            with socket.create_connection(("127.0.0.1", 7015)) as client:
                while client.recv(1):  # its end, once
                    pass
                number = 0
                while True:
                    client.sendall(number.to_bytes(8, "big"))
                    number += 1
                    time.sleep(0.02)
        connection, _ = server.accept()
        connection.shutdown(socket.SHUT_WR)

        def listen(number):
            if (heard := int.from_bytes(whole(connection, 8), "big")) != number:
                bad("heard", heard, "instead of", number)

        count(listen)


@situation
def udp_loopback_pair():
    """Datagrams may be lost; then both go on with the next."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 7016))
        if os.fork() == 0:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.connect(("127.0.0.1", 7016))
                other.settimeout(0.2)
                other.send(b"first")
                while True:
                    with contextlib.suppress(TimeoutError):
                        other.send(other.recv(64))
        _, peer = one.recvfrom(64)
        one.settimeout(0.2)

        def talk(number):
            for _ in range(20):
                one.sendto(number.to_bytes(8, "big"), peer)
                with contextlib.suppress(TimeoutError):
                    if int.from_bytes(one.recv(64), "big") == number:
                        return
            bad("nobody answers")

        count(talk)


@situation
def tcp_client_that_is_none_of_ours():
    """Somebody else is connected, and says nothing. What was counted before that is all, until the connection ends."""
    with socket.create_server(("127.0.0.1", 7017)) as server:
        for number in range(5):
            print(number, time.monotonic_ns(), flush=True)
        connection, _ = server.accept()
        print("connected", flush=True)
        if heard := connection.recv(1):
            bad("heard", heard)
        count(nothing)


@situation
def tcp_short_connections():
    """One after another, so that at any moment one may wait to be accepted."""
    with socket.create_server(("127.0.0.1", 7019)) as server:

        def serve():
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(whole(connection, 8))

        threading.Thread(target=serve, daemon=True).start()

        def ask(number):
            with socket.create_connection(("127.0.0.1", 7019)) as client:
                client.sendall(number.to_bytes(8, "big"))
                if int.from_bytes(whole(client, 8), "big") != number:
                    bad("another number came back than", number)

        count(ask, gap=0)


@situation
def udp_corked():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("127.0.0.1", 7018))
        one.setsockopt(socket.IPPROTO_UDP, 1, 1)  # UDP_CORK
        one.send(b"not yet")
        count(nothing)


@situation
def mptcp_listener():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as server:  # IPPROTO_MPTCP
        server.bind(("127.0.0.1", 7004))
        server.listen()
        count(nothing)


SITUATIONS[sys.argv[1]]()

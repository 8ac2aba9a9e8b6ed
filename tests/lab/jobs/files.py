"""Files, directories and other descriptors in every state. Put after counting.py."""

# ruff: noqa: F821, PTH103, PTH104, PTH106, PTH108, PTH110, PTH116, PTH123, PTH208, SIM115
import ctypes
import fcntl
import os
import select
import shelve
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time


@situation
def appended():
    with open("/tmp/appended", "ab", buffering=0) as file:

        def step(number):
            file.write(number.to_bytes(8, "big"))
            if os.fstat(file.fileno()).st_size != 8 * (number + 1):
                bad("another size")

        count(step)


@situation
def position_shared_with_a_child():
    """Both write by one file description: no byte is over another."""
    fd = os.open("/tmp/shared", os.O_RDWR | os.O_CREAT)
    if os.fork() == 0:
        while True:
            os.write(fd, b"c")
            time.sleep(0.01)

    def step(number):
        before = os.lseek(fd, 0, os.SEEK_CUR)
        os.write(fd, b"p")
        if os.lseek(fd, 0, os.SEEK_CUR) <= before:
            bad("the position went back")
        if os.fstat(fd).st_size < before:
            bad("the file is shorter than the position")

    count(step)


@situation
def path_descriptor():
    os.makedirs("/tmp/place", exist_ok=True)
    fd = os.open("/tmp/place", os.O_PATH)

    def step(number):
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        if "file" not in os.listdir("/tmp/place"):
            bad("another place")

    count(step)


@situation
def directory_half_read():
    os.makedirs("/tmp/many", exist_ok=True)
    for number in range(300):
        open(f"/tmp/many/{number}", "w").close()
    listing = os.scandir("/tmp/many")
    seen = {next(listing).name for _ in range(10)}

    def step(number):
        if number == 1500:
            rest = {one.name for one in listing}
            if len(seen | rest) != 300:
                bad("names are missing", 300 - len(seen | rest))

    count(step, gap=0.01)


@situation
def working_directory_that_is_gone():
    os.makedirs("/tmp/cwd")
    os.chdir("/tmp/cwd")
    os.rmdir("/tmp/cwd")
    count(lambda number: os.path.exists("/tmp/cwd") and bad("it is there again"))


@situation
def directory_that_is_open_and_gone():
    os.makedirs("/tmp/gone")
    fd = os.open("/tmp/gone", os.O_RDONLY)
    os.rmdir("/tmp/gone")
    count(lambda number: os.listdir(fd) and bad("it has entries"))


@situation
def another_root():
    """chroot, as many servers do."""
    os.makedirs("/tmp/root/tmp", exist_ok=True)
    os.chroot("/tmp/root")
    os.chdir("/")
    keeps("the root", ["tmp"], lambda: os.listdir("/"))


@situation
def another_root_of_a_child():
    os.makedirs("/tmp/root/tmp", exist_ok=True)
    near, far = os.pipe()
    if os.fork() == 0:
        os.chroot("/tmp/root")
        os.chdir("/")
        while os.listdir("/") == ["tmp"]:
            os.write(far, b"x")
            time.sleep(0.01)
        os._exit(7)
    os.close(far)
    count(lambda number: os.read(near, 1) or bad("the root is another"))


@situation
def file_unlinked():
    file = open("/tmp/unlinked", "w+b", buffering=0)
    os.unlink("/tmp/unlinked")

    def step(number):
        file.write(number.to_bytes(8, "big"))
        if number and os.pread(file.fileno(), 8, 8 * (number - 1)) != (number - 1).to_bytes(8, "big"):
            bad("another word")

    count(step)


@situation
def file_unlinked_of_40_mib():
    with tempfile.TemporaryFile(dir="/tmp") as file:
        file.write(b"x" * (40 << 20))
        file.flush()
        count(lambda number: os.pread(file.fileno(), 1, number * 4096 % (40 << 20)) == b"x" or bad("another byte"))


@situation
def file_unlinked_of_80_mib():
    file = open("/tmp/large", "w+b")
    os.unlink("/tmp/large")
    file.write(b"x" * (80 << 20))
    file.flush()
    count(lambda number: os.pread(file.fileno(), 1, number * 4096 % (80 << 20)) == b"x" or bad("another byte"))


@situation
def file_without_a_name():
    """O_TMPFILE."""
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    count(lambda number: os.pwrite(fd, b"x", number) == 1 or bad("not written"))


@situation
def file_replaced_by_another_of_its_name():
    """The first is open and has no name any more; its name is another's."""
    with open("/tmp/config", "w") as file:
        file.write("old")
    old = open("/tmp/config")
    with open("/tmp/config.new", "w") as file:
        file.write("new")
    os.rename("/tmp/config.new", "/tmp/config")

    def step(number):
        old.seek(0)
        if (old.read(), open("/tmp/config").read()) != ("old", "new"):
            bad("other contents")

    count(step)


@situation
def names_of_every_kind():
    names = [b"line\nfeed", b"\xff\xfe", "größe".encode(), b"-rf", b" ", b"%s", b"q\"uo'te", b"x" * 250]
    files = []
    for name in names:
        files.append(open(b"/tmp/" + name, "w+b", buffering=0))

    def step(number):
        file = files[number % len(files)]
        file.write(b".")
        if os.stat(b"/tmp/" + names[number % len(files)]).st_ino != os.fstat(file.fileno()).st_ino:
            bad("another file")

    count(step)


@situation
def sparse_file():
    fd = os.open("/tmp/sparse", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1 << 40)
    os.pwrite(fd, b"end", (1 << 40) - 3)
    count(lambda number: os.pread(fd, 3, (1 << 40) - 3) == b"end" or bad("the end is another"))


@situation
def thousands_of_descriptors():
    files = [os.open("/dev/null", os.O_RDWR) for _ in range(1000)]
    count(lambda number: os.write(files[number % len(files)], b"x") == 1 or bad("not written"))


@situation
def descriptor_of_a_high_number():
    fd = os.dup2(os.open("/tmp/high", os.O_CREAT | os.O_RDWR), 1000)
    count(lambda number: os.pwrite(fd, b"x", 0) == 1 or bad("not written"))


@situation
def devices_of_every_container():
    files = {name: os.open(f"/dev/{name}", os.O_RDWR) for name in ("null", "zero", "full", "random", "urandom")}

    def step(number):
        if os.read(files["zero"], 4) != bytes(4) or len(os.read(files["urandom"], 4)) != 4:
            bad("another device")

    count(step)


@situation
def files_of_proc():
    """Of the process itself, of another, and of the machine."""
    child = os.fork()
    if child == 0:
        time.sleep(1e6)
    files = [
        open("/proc/self/status"),
        open(f"/proc/{child}/stat"),
        open("/proc/meminfo"),
        open("/proc/sys/kernel/hostname"),
    ]

    def step(number):
        for file in files:
            file.seek(0)
            if not file.read():
                bad("nothing is in", file.name)

    count(step)


@situation
def file_of_proc_whose_process_is_gone():
    child = os.fork()
    if child == 0:
        time.sleep(1e6)
    file = open(f"/proc/{child}/stat")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    count(lambda number: file.fileno())


@situation
def files_of_sys():
    file = open("/sys/devices/system/cpu/online")

    def step(number):
        file.seek(0)
        if not file.read():
            bad("nothing is in it")

    count(step)


@situation
def pipe_with_data():
    near, far = os.pipe()
    for number in range(100):
        os.write(far, number.to_bytes(8, "big"))

    def step(number):
        if int.from_bytes(os.read(near, 8), "big") != number:
            bad("another number")
        os.write(far, (number + 100).to_bytes(8, "big"))

    count(step)


@situation
def pipe_that_is_full():
    near, far = os.pipe()
    if os.fork() == 0:
        number = 0
        while True:
            os.write(far, number.to_bytes(8, "big"))
            number += 1

    def step(number):
        if int.from_bytes(os.read(near, 8), "big") != number:
            bad("another number")

    count(step)


@situation
def pipe_without_a_reader():
    near, far = os.pipe()
    os.write(far, b"x")
    os.close(near)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def step(number):
        try:
            os.write(far, b"x")
        except BrokenPipeError:
            return
        bad("there is a reader")

    count(step)


@situation
def named_pipe_with_data():
    os.mkfifo("/tmp/fifo")
    fd = os.open("/tmp/fifo", os.O_RDWR)
    os.write(fd, b"0123456789")

    def step(number):
        if os.read(fd, 1) != b"0123456789"[number % 10 : number % 10 + 1]:
            bad("another byte")
        os.write(fd, b"0123456789"[number % 10 : number % 10 + 1])

    count(step)


@situation
def named_pipe_that_is_gone():
    os.mkfifo("/tmp/gone.fifo")
    fd = os.open("/tmp/gone.fifo", os.O_RDWR)
    os.unlink("/tmp/gone.fifo")
    count(lambda number: (os.write(fd, b"x"), os.read(fd, 1)))


@situation
def epoll_of_an_epoll():
    near, far = os.pipe()
    inner, outer = select.epoll(), select.epoll()
    inner.register(near, select.EPOLLIN)
    outer.register(inner.fileno(), select.EPOLLIN)

    def step(number):
        os.write(far, b"x")
        if not outer.poll(5) or not inner.poll(5):
            bad("no event")
        os.read(near, 1)

    count(step)


@situation
def epoll_of_a_closed_descriptor():
    """The description lives on by a duplicate: epoll goes on telling of it under the number that is gone."""
    near, far = os.pipe()
    poll = select.epoll()
    poll.register(near, select.EPOLLIN)
    kept = os.dup(near)
    os.close(near)

    def step(number):
        os.write(far, b"x")
        if not poll.poll(5):
            bad("no event")
        os.read(kept, 1)

    count(step)


@situation
def signals_by_descriptor():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    mask = (1 << (signal.SIGUSR1 - 1)).to_bytes(8, "little")
    fd = call("signalfd", -1, mask, 0)

    def step(number):
        os.kill(os.getpid(), signal.SIGUSR1)
        if struct.unpack_from("I", os.read(fd, 128))[0] != signal.SIGUSR1:
            bad("another signal")

    count(step)


def watch(path, mask=0x100):
    fd = call("inotify_init1", 0o4000)
    call("inotify_add_watch", fd, os.fsencode(path), mask)
    return fd


@situation
def inotify_of_a_directory():
    os.makedirs("/tmp/watched")
    fd = watch("/tmp/watched")

    def step(number):
        open(f"/tmp/watched/{number}", "w").close()
        if not select.select([fd], [], [], 5)[0] or not os.read(fd, 4096):
            bad("no event")
        os.unlink(f"/tmp/watched/{number}")

    count(step)


@situation
def inotify_of_a_file_that_is_gone():
    open("/tmp/watched", "w").close()
    kept = open("/tmp/watched", "a")
    fd = watch("/tmp/watched", 2)
    os.unlink("/tmp/watched")

    def step(number):
        kept.write(".")
        kept.flush()
        if not select.select([fd], [], [], 5)[0] or not os.read(fd, 4096):
            bad("no event")

    count(step)


@situation
def inotify_with_unread_events():
    """Events are not saved; a reader that finds none is not harmed, and the next ones come."""
    os.makedirs("/tmp/events")
    fd = watch("/tmp/events")
    open("/tmp/events/first", "w").close()

    def step(number):
        open(f"/tmp/events/{number}", "w").close()
        if not select.select([fd], [], [], 5)[0]:
            bad("no event")
        os.read(fd, 4096)

    count(step)


@situation
def inotify_of_a_file_of_the_image():
    fd = watch("/etc/passwd", 0x20)

    def step(number):
        open("/etc/passwd").close()
        if not select.select([fd], [], [], 5)[0]:
            bad("no event")
        os.read(fd, 4096)

    count(step)


@situation
def descriptor_of_a_process():
    child = os.fork()
    if child == 0:
        time.sleep(1e6)
    fd = os.pidfd_open(child)
    count(lambda number: signal.pidfd_send_signal(fd, signal.SIGCONT))


@situation
def secret_memory():
    """memfd_secret, where the kernel has it."""
    fd = libc.syscall(447, 0)
    count(nothing if fd < 0 else lambda number: os.fstat(fd))


@situation
def rings_of_io():
    """io_uring_setup."""
    fd = libc.syscall(425, 8, ctypes.create_string_buffer(120))
    count(nothing if fd < 0 else lambda number: os.fstat(fd))


@situation
def faults_by_descriptor():
    """userfaultfd."""
    fd = libc.syscall(323, 1)
    count(nothing if fd < 0 else lambda number: os.fstat(fd))


@situation
def counters_of_performance():
    """perf_event_open of a software event of the process itself."""
    attributes = bytearray(128)
    struct.pack_into("IIQ", attributes, 0, 1, 128, 0)
    fd = libc.syscall(298, (ctypes.c_char * 128).from_buffer(attributes), 0, -1, -1, 0)
    count(nothing if fd < 0 else lambda number: os.fstat(fd))


@situation
def lock_inherited_by_a_child():
    file = open("/tmp/locked", "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    if os.fork() == 0:
        time.sleep(1e6)

    def step(number):
        with open("/tmp/locked") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        bad("the lock is gone")

    count(step)


@situation
def lock_that_somebody_waits_for():
    file = open("/tmp/wanted", "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    if os.fork() == 0:
        with open("/tmp/wanted") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
        os._exit(7)

    def step(number):
        if os.waitpid(-1, os.WNOHANG)[0]:
            bad("the other has got the lock")

    count(step)


@situation
def database_of_sqlite():
    with sqlite3.connect("/tmp/base", isolation_level=None) as base:
        base.execute("pragma journal_mode=wal")
        base.execute("create table t (n integer primary key)")

        def step(number):
            base.execute("insert into t values (?)", (number,))
            if base.execute("select count(*), max(n) from t").fetchone() != (number + 1, number):
                bad("rows are missing")

        count(step)


@situation
def shelf_of_dbm():
    with shelve.open("/tmp/shelf") as shelf:

        def step(number):
            shelf["n"] = number
            shelf.sync()
            if shelf["n"] != number:
                bad("another number")

        count(step)


@situation
def output_of_a_program():
    """A pipe to a child that is no Python."""
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def step(number):
        child.stdin.write(b"%d\n" % number)
        child.stdin.flush()
        if child.stdout.readline() != b"%d\n" % number:
            bad("another line")

    count(step)


@situation
def pipe_filled_by_splice():
    """It holds pages of a file, which is another one by now."""
    near, far = os.pipe()
    with open("/tmp/spliced", "wb+") as file:
        file.write(bytes(range(256)) * 64)
        file.flush()
        libc.splice(file.fileno(), ctypes.byref(ctypes.c_longlong(0)), far, None, ctypes.c_size_t(16384), 0)
    os.unlink("/tmp/spliced")

    def step(number):
        if number == 1500:
            got = b""
            while len(got) < 16384:
                got += os.read(near, 16384)
            if got != bytes(range(256)) * 64:
                bad("other data")

    count(step, gap=0.01)


@situation
def epoll_that_wakes_one_alone():
    """EPOLLEXCLUSIVE: it cannot be modified, which tells that it is still there."""
    event = os.eventfd(0)
    epoll = select.epoll()
    epoll.register(event, select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def step(number):
        try:
            epoll.modify(event, select.EPOLLIN)
        except OSError:
            return
        bad("it wakes all")

    count(step)


@situation
def signals_by_descriptor_unread():
    """Pending for a signalfd, with their values."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    one = call("signalfd", -1, ctypes.byref(ctypes.c_ulong(1 << signal.SIGUSR1 - 1)), 0)
    os.kill(os.getpid(), signal.SIGUSR1)

    def step(number):
        if number == 1500 and int.from_bytes(os.read(one, 128)[:4], "little") != signal.SIGUSR1:
            bad("another signal")

    count(step, gap=0.01)


SITUATIONS[sys.argv[1]]()

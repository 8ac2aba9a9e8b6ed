"""What a job has open, set to something unusual, and to stay so. Put after counting.py."""

# ruff: noqa: F821, PTH102, PTH103, PTH108, PTH110, PTH116, PTH123, PTH208
import ctypes
import fcntl
import mmap
import os
import pty
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

F_OFD_GETLK, F_OFD_SETLK = 36, 37

# Descriptors.


@situation
def locks_of_files():
    """A shared and an exclusive flock, a POSIX read and write lock, an OFD lock: a child that holds none tries each."""
    files = [open(f"/tmp/lock{number}", "w+b") for number in range(5)]  # noqa: SIM115
    fcntl.flock(files[0], fcntl.LOCK_SH)
    fcntl.flock(files[1], fcntl.LOCK_EX)
    fcntl.lockf(files[2], fcntl.LOCK_SH, 10, 5)
    fcntl.lockf(files[3], fcntl.LOCK_EX, 10, 5)
    fcntl.fcntl(files[4], F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 7, 0))

    def may(number, mode):
        with open(f"/tmp/lock{number}", "r+b") as again:
            if number < 2:
                with suppress(BlockingIOError):
                    fcntl.flock(again, mode | fcntl.LOCK_NB)
                    return True
                return False
            kind = fcntl.F_RDLCK if mode == fcntl.LOCK_SH else fcntl.F_WRLCK
            told = fcntl.fcntl(again, F_OFD_GETLK, struct.pack("hhqqi4x", kind, 0, 0, 0, 0))
            return struct.unpack("hhqqi4x", told)[:4]

    def tried():
        return {(number, mode): may(number, mode) for number in range(5) for mode in (fcntl.LOCK_SH, fcntl.LOCK_EX)}

    if (child := os.fork()) == 0:
        wanted = tried()
        while True:
            if (found := tried()) != wanted:
                bad("locks", wanted, found)
            time.sleep(0.02)

    def step(number):
        if os.waitpid(child, os.WNOHANG)[0]:
            bad("the child has found other locks")

    count(step)


@situation
def lease_of_a_file():
    with open("/tmp/leased", "w"):
        pass
    fd = os.open("/tmp/leased", os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    other = os.open("/tmp/leased2", os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(other, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    keeps("lease", (0, 1), lambda: (fcntl.fcntl(fd, fcntl.F_GETLEASE), fcntl.fcntl(other, fcntl.F_GETLEASE)))


@situation
def owner_and_signal_of_a_descriptor():
    near, _far = os.pipe()
    fcntl.fcntl(near, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(near, fcntl.F_SETSIG, signal.SIGUSR1)
    keeps("owner", (os.getpid(), 10), lambda: (fcntl.fcntl(near, fcntl.F_GETOWN), fcntl.fcntl(near, fcntl.F_GETSIG)))


@situation
def size_and_mode_of_a_pipe():
    near, far = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(far, 1031, 1 << 18)  # F_SETPIPE_SZ
    os.mkfifo("/tmp/fifo")
    fifo = os.open("/tmp/fifo", os.O_RDWR)
    fcntl.fcntl(fifo, 1031, 1 << 17)

    def read():
        sizes = [fcntl.fcntl(one, 1032) for one in (near, far, fifo)]
        return sizes, [fcntl.fcntl(one, fcntl.F_GETFL) for one in (near, far, fifo)], fcntl.fcntl(near, fcntl.F_GETFD)

    keeps("pipes", read(), read)


@situation
def attributes_of_a_file():
    os.mkdir("/tmp/tagged")
    for path in ("/tmp/tagged", "/tmp/tagged/file"):
        if not os.path.exists(path):
            os.close(os.open(path, os.O_CREAT))
        try:
            os.setxattr(path, "user.colour", b"green")
        except OSError as error:
            bad(path, error)
    keeps(
        "attributes", [b"green"] * 2, lambda: [os.getxattr(f"/tmp/tagged{end}", "user.colour") for end in ("", "/file")]
    )


@situation
def seals_of_memory():
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, 1033, 2 | 4)  # F_ADD_SEALS: SHRINK, GROW
    keeps("seals", 6, lambda: fcntl.fcntl(fd, 1034))


def options_of(sockets):
    """Every option of a whole number that each socket has: level and name up to 80."""

    def read():
        found = {}
        for number, one in enumerate(sockets):
            for level in (1, 0, 6, 41, 17):
                for name in range(1, 80):
                    if (level, name) in (
                        (1, 34),
                        (1, 56),
                        (1, 57),
                        (1, 4),
                        (6, 11),
                        (6, 24),
                        (1, 77),
                        (0, 14),
                        (41, 24),
                        (1, 16),
                    ):
                        continue  # the error and what the kernel measures or numbers
                    with suppress(OSError):
                        found[number, level, name] = one.getsockopt(level, name)
        return found

    return read


def with_options(sockets, options):
    for one in sockets:
        for level, name, value in options:
            try:
                one.setsockopt(level, name, value)
            except OSError as error:
                if error.errno not in (92, 95):
                    bad(level, name, error)
    read = options_of(sockets)
    keeps("socket options: socket, level, option", read(), read)


@situation
def options_of_a_listening_socket():
    listening = socket.create_server(("", 7000))
    listening6 = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listening6.bind(("::", 7001))
    listening6.listen()
    tcp = socket.IPPROTO_TCP
    options = [
        (tcp, 1, 1),
        (tcp, 4, 61),
        (tcp, 5, 11),
        (tcp, 6, 4),
        (tcp, 7, 3),
        (tcp, 8, 33),
        (tcp, 9, 10),
        (tcp, 18, 12345),
    ]
    options += [(tcp, 25, 65536), (tcp, 13, b"reno"), (tcp, 23, 5), (tcp, 10, 66000), (tcp, 3, 0), (tcp, 2, 1200)]
    options += [
        (1, 9, 1),
        (1, 15, 1),
        (1, 18, 2),
        (1, 13, struct.pack("ii", 1, 7)),
        (1, 8, 70000),
        (1, 7, 80000),
        (1, 12, 3),
    ]
    options += [(0, 1, 0x10), (0, 2, 77), (41, 67, 0x20), (41, 16, 66), (0, 10, 2)]
    with_options([listening, listening6], options)


@situation
def options_of_a_datagram_socket():
    first, second = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    first.bind(("", 7002))
    second.bind(("::", 7003))
    options = [(1, 6, 1), (1, 29, 1), (1, 35, 1), (1, 40, 1), (1, 42, 0), (1, 60, 1)]
    options += [
        (0, 1, 0x10),
        (0, 2, 77),
        (0, 8, 1),
        (0, 10, 2),
        (0, 11, 1),
        (0, 12, 1),
        (0, 13, 1),
        (0, 33, 9),
        (0, 34, 0),
    ]
    options += [
        (41, 16, 66),
        (41, 18, 5),
        (41, 19, 0),
        (41, 23, 2),
        (41, 25, 1),
        (41, 49, 1),
        (41, 51, 1),
        (41, 66, 1),
        (41, 67, 32),
    ]
    with_options([first, second], options)


@situation
def options_of_a_unix_socket():
    pair = socket.socketpair()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("/tmp/unix")
    listening.listen(17)
    options = [(1, 16, 1), (1, 29, 1), (1, 42, 5), (1, 7, 90000), (1, 18, 3)]
    with_options([*pair, listening], options)


@situation
def counts_of_events():
    """An eventfd, an epoll of edges and of one shot."""
    semaphore = os.eventfd(5, os.EFD_NONBLOCK)
    near, _far = os.pipe()
    poll = select.epoll()
    poll.register(semaphore, select.EPOLLIN | select.EPOLLET)
    poll.register(near, select.EPOLLIN | select.EPOLLONESHOT)
    poll.poll(0)

    def read():
        with open(f"/proc/self/fdinfo/{semaphore}") as one, open(f"/proc/self/fdinfo/{poll.fileno()}") as two:
            lines = [*one.read().splitlines(), *two.read().splitlines()]
        return sorted(line.split(" pos:")[0] for line in lines if line.startswith(("eventfd-count", "tfd", "flags")))

    keeps("events", read(), read)


@situation
def watches_its_own_root():
    """A directory of the container's own root, at a place that CRIU does not know."""
    os.makedirs("/srv/watched/deep")
    watch = libc.inotify_init1(os.O_NONBLOCK)
    if libc.inotify_add_watch(watch, b"/srv/watched/deep", 0x100) < 0:  # IN_CREATE
        bad("watch")

    def step(number):
        open(f"/srv/watched/deep/{number}", "w").close()
        if not select.select([watch], [], [], 5)[0] or len(os.read(watch, 4096)) != 32:  # with a name of up to 16 bytes
            bad("no event, or others")
        os.unlink(f"/srv/watched/deep/{number}")

    count(step)


@situation
def name_gone_and_another_left():
    """What is written by the one is read by the other; also of a file that is mapped."""
    with open("/srv/first", "a") as file:
        os.link("/srv/first", "/srv/second")
        os.unlink("/srv/first")

        def step(number):
            file.write("y")
            file.flush()
            there, here, again = os.stat("/srv/second"), os.fstat(file.fileno()), os.stat("/srv/second")
            if there.st_ino != again.st_ino:  # it moved in between: inodes are each node's own
                there, here = again, os.fstat(file.fileno())
            if (there.st_ino, there.st_size, here.st_nlink) != (here.st_ino, number + 1, 1):
                bad("another file", there, here)
            if left := [name for name in os.listdir("/srv") if name.startswith("link_remap")]:
                bad("left behind", left)

        count(step)


@situation
def file_of_the_image_unlinked():
    """As a library that was replaced while a program has it mapped."""
    path = os.path.realpath("/usr/bin/env")
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        before = mapped[:4]
    os.unlink(path)
    keeps("the file", before, lambda: mapped[:4])


@situation
def pipe_in_packet_mode():
    near, far = os.pipe2(os.O_DIRECT)
    count(lambda number: os.write(far, b"x") and os.read(near, 1))


@situation
def message_queue():
    if libc.mq_open(b"/queue", os.O_RDWR | os.O_CREAT, 0o600, None) < 0:
        bad("mq_open", os.strerror(ctypes.get_errno()))
    count(nothing)


@situation
def message_queue_closed():
    os.close(libc.mq_open(b"/queue", os.O_RDWR | os.O_CREAT, 0o600, None))
    count(nothing)


@situation
def bash_on_a_terminal_of_its_own():
    shell_on_a_terminal("bash", "--norc", "-i")


@situation
def dash_on_a_terminal_of_its_own():
    shell_on_a_terminal("dash", "-i")


def shell_on_a_terminal(*argv):
    """As tmux, script and sshd have it; the shell is interactive and has children in the foreground and in the background."""
    child, master = pty.fork()
    if child == 0:
        os.execvp(argv[0], argv)
    os.write(master, b"stty -echo; sleep 100000 & PS1=; echo ready\n")

    def said(word):
        found = b""
        while word not in found:
            if not select.select([master], [], [], 10)[0]:
                bad("the shell says", found)
            found += os.read(master, 4096)

    said(b"ready\r\n")

    def step(number):
        os.write(master, b"echo is $((%d + 1)); jobs\n" % number)
        said(b"is %d\r\n" % (number + 1))

    count(step)


@situation
def eventfd_as_a_semaphore():
    semaphore = os.eventfd(1 << 20, os.EFD_SEMAPHORE)
    count(lambda number: os.eventfd_read(semaphore) == 1 or bad("it is none any more"))


SITUATIONS[sys.argv[1]]()

"""Processes and threads in every relation and state. Put after counting.py."""

# ruff: noqa: F821, PTH104, PTH108, PTH123
import ctypes
import mmap
import os
import pty
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import tty
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Process, Queue

NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWNS, NEWCGROUP, NEWTIME = (
    *(0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x00020000, 0x02000000, 0x00000080),
)


def forked(work):
    """A child that does `work`, and then sleeps."""
    if (child := os.fork()) == 0:
        work()
        while True:
            time.sleep(1e6)
    return child


def state_of(pid):
    return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]


def unshared(flag):
    """A child in a namespace of its own, where the container may make one."""
    near, far = os.pipe()

    def work():
        failed = libc.unshare(flag)
        if not failed and flag == NEWPID:
            forked(lambda: None)
        os.write(far, b"x")

    forked(work)
    os.read(near, 1)
    count(nothing)


@situation
def own_names_of_the_host():
    unshared(NEWUTS)


@situation
def own_ipc():
    unshared(NEWIPC)


@situation
def own_mounts():
    unshared(NEWNS)


@situation
def own_network():
    unshared(NEWNET)


@situation
def own_pids():
    unshared(NEWPID)


@situation
def own_users():
    unshared(NEWUSER)


@situation
def own_cgroups():
    unshared(NEWCGROUP)


@situation
def own_clocks():
    unshared(NEWTIME)


@situation
def groups_and_sessions():
    def session():
        os.setsid()
        forked(lambda: os.setpgid(0, 0))

    child = forked(session)
    time.sleep(0.3)

    def read():
        return os.getsid(child), os.getpgid(child), os.getsid(0)

    keeps("sessions", read(), read)


@situation
def orphan():
    """Its parent is gone: the container's first process is its parent."""
    near, far = os.pipe()
    if (child := os.fork()) == 0:
        if os.fork() == 0:
            while True:
                time.sleep(0.02)
                os.write(far, b"%d" % (os.getppid() == 1))
        os._exit(0)
    os.waitpid(child, 0)
    os.read(near, 8)
    count(lambda number: os.read(near, 1) == b"1" or bad("another parent"))


@situation
def zombies():
    """Children that have ended, and whose parent has not asked yet."""
    children = [os.fork() or os._exit(7) for _ in range(5)]
    time.sleep(0.2)

    def step(number):
        if [state_of(one) for one in children] != ["Z"] * 5:
            bad("other states")
        if number == 1500 and [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children] != [7] * 5:
            bad("another exit status")
        if number == 1500:
            count(nothing)

    count(lambda number: step(number) if number < 1500 else None, gap=0.01)


@situation
def stopped_child():
    """It runs no instruction. Whoever lets go of it has it wake up, and stop again."""
    shared = mmap.mmap(-1, 4096)

    def work():
        while True:
            shared[:8] = (int.from_bytes(shared[:8], "big") + 1).to_bytes(8, "big")

    child = forked(work)
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    had = shared[:8]

    def step(number):
        if soon(True, lambda: state_of(child) in "Tt")() is not True or shared[:8] != had:
            bad("it runs")

    count(step)


@situation
def first_thread_gone():
    """The process lives on by another thread."""

    def go_on():
        time.sleep(0.2)
        count(nothing)

    threading.Thread(target=go_on).start()
    libc.syscall(60, 0)  # exit, of this thread alone


@situation
def first_thread_of_a_child_gone():
    near, far = os.pipe()

    def work():
        def write():
            while True:
                os.write(far, b"x")
                time.sleep(0.01)

        threading.Thread(target=write).start()
        time.sleep(0.1)
        libc.syscall(60, 0)

    forked(work)
    count(lambda number: os.read(near, 1))


@situation
def two_hundred_processes():
    children = [forked(lambda: None) for _ in range(200)]

    def step(number):
        # D: it waits for a page that has still to come. t: CRIU has not let go of it.
        if (state := state_of(children[number % 200])) not in "SRDt":
            bad("it is", state)

    count(step)


@situation
def three_hundred_threads():
    turns = [0] * 300

    def turn(which):
        while True:
            turns[which] += 1
            time.sleep(0.2)

    threading.stack_size(256 << 10)
    for which in range(300):
        threading.Thread(target=turn, args=(which,), daemon=True).start()
    last = list(turns)

    def step(number):
        if number % 200 == 199:
            if any(now == before for now, before in zip(turns, last, strict=True)):
                bad("a thread stands still")
            last[:] = turns

    count(step)


@situation
def chain_of_sixty():
    """Each the child of the one before."""
    near, far = os.pipe()

    def descend(depth):
        if depth:
            forked(lambda: descend(depth - 1))
        else:
            while True:
                os.write(far, b"x")
                time.sleep(0.01)

    descend(60)
    count(lambda number: os.read(near, 1))


@situation
def traced_child():
    child = os.fork()
    if child == 0:
        libc.ptrace(0, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1e6)
    os.waitpid(child, os.WUNTRACED)
    count(nothing)


@situation
def child_of_another_user():
    def work():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    forked(work)
    count(nothing)


@situation
def another_user():
    os.setgroups([])
    os.setgid(1000)
    os.setuid(1000)
    count(nothing)


@situation
def another_user_for_files_alone():
    """setfsuid of one thread."""
    libc.setfsuid(1000)
    keeps("the user for files", 1000, lambda: libc.setfsuid(-1))


@situation
def signals_queued_with_values():
    """Real-time signals, blocked, in their order and with their values."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
    libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    for value in range(5):
        libc.sigqueue(os.getpid(), signal.SIGRTMIN, value)

    def step(number):
        info = signal.sigwaitinfo({signal.SIGRTMIN})
        if info.si_pid != os.getpid():
            bad("another sender")
        libc.sigqueue(os.getpid(), signal.SIGRTMIN, number)

    count(step)


@situation
def stack_for_signals():
    class Stack(ctypes.Structure):
        _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    memory = ctypes.create_string_buffer(1 << 16)
    libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 1 << 16)), None)

    def read():
        found = Stack()
        libc.sigaltstack(None, ctypes.byref(found))
        return found.sp, found.size

    keeps("the stack for signals", (ctypes.addressof(memory), 1 << 16), read)


@situation
def timers_of_processor_time():
    fired = [0, 0]
    signal.signal(signal.SIGVTALRM, lambda *_: fired.__setitem__(0, fired[0] + 1))
    signal.signal(signal.SIGPROF, lambda *_: fired.__setitem__(1, fired[1] + 1))
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.01, 0.01)
    signal.setitimer(signal.ITIMER_PROF, 0.01, 0.01)

    def step(number):
        before, began = list(fired), time.monotonic()
        while fired[0] == before[0] or fired[1] == before[1]:
            sum(range(1000))
            if time.monotonic() - began > 20:
                bad("a timer does not fire", before, fired)

    count(step)


@situation
def timer_of_a_thread():
    """timer_create with SIGEV_THREAD_ID."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    event = struct.pack("QiiI52x", 0, signal.SIGUSR2, 4, threading.get_native_id())
    id = ctypes.c_int()
    if libc.syscall(222, 1, event, ctypes.byref(id)):
        bad("timer_create")
    libc.syscall(223, id, 0, struct.pack("llll", 0, 10_000_000, 0, 10_000_000), None)
    count(lambda number: signal.sigtimedwait({signal.SIGUSR2}, 10) or bad("the timer does not fire"))


@situation
def alarm_to_come():
    """alarm(2) that is far: it must neither come early nor be forgotten."""
    signal.signal(signal.SIGALRM, lambda *_: bad("early"))
    signal.alarm(5000)
    count(lambda number: 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 5000 or bad("the alarm is gone"))


@situation
def sleeper():
    """A sleep that is under way is no shorter for a move, by more than the clock's own step."""

    def step(number):
        began = time.monotonic_ns()
        time.sleep(0.5)
        if (slept := time.monotonic_ns() - began) < 499_000_000:
            bad("slept", slept)

    count(step, gap=0)


@situation
def futexes_between_processes():
    """A semaphore of POSIX in shared memory, for which a child waits."""
    import mmap

    memory = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ask, answer = ctypes.c_void_p(address), ctypes.c_void_p(address + 64)
    call("sem_init", ask, 1, 0)
    call("sem_init", answer, 1, 0)
    if os.fork() == 0:
        while True:
            if not libc.sem_wait(ask):
                libc.sem_post(answer)

    def step(number):
        libc.sem_post(ask)
        while libc.sem_wait(answer):
            pass

    count(step)


@situation
def mutex_that_inherits_priority():
    class Attributes(ctypes.Structure):
        _fields_ = [("data", ctypes.c_char * 64)]

    # In a page of its own, which nothing else brings to the target before the thread that waits asks for the mutex again.
    attributes, mutex = Attributes(), (ctypes.c_char * 64).from_buffer(mmap.mmap(-1, 4096, mmap.MAP_PRIVATE))
    libc.pthread_mutexattr_init(ctypes.byref(attributes))
    libc.pthread_mutexattr_setprotocol(ctypes.byref(attributes), 1)  # PTHREAD_PRIO_INHERIT
    libc.pthread_mutex_init(mutex, ctypes.byref(attributes))
    libc.pthread_mutex_lock(mutex)
    waiting = threading.Thread(target=lambda: libc.pthread_mutex_lock(mutex) or bad("got it"), daemon=True)
    waiting.start()
    count(nothing)


@situation
def robust_mutex():
    """A thread holds a robust mutex: the list that the kernel walks at its end."""
    attributes, mutex = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    libc.pthread_mutexattr_init(attributes)
    libc.pthread_mutexattr_setrobust(attributes, 1)
    libc.pthread_mutex_init(mutex, attributes)
    go = threading.Event()

    def hold():
        libc.pthread_mutex_lock(mutex)
        go.wait()
        libc.syscall(60, 0)

    threading.Thread(target=hold, daemon=True).start()
    time.sleep(0.2)

    def step(number):
        if number == 1500:
            go.set()
            if (found := libc.pthread_mutex_lock(mutex)) != 130:  # EOWNERDEAD
                bad("the mutex says", found)

    count(step, gap=0.01)


@situation
def limit_of_processor_time():
    resource.setrlimit(resource.RLIMIT_CPU, (100000, 200000))
    keeps("the limit", (100000, 200000), lambda: resource.getrlimit(resource.RLIMIT_CPU))


@situation
def filters_of_system_calls():
    """A seccomp filter of the job's own that forbids uname alone."""
    program = b"".join(
        struct.pack("HBBI", *one)
        for one in ((0x20, 0, 0, 0), (0x15, 0, 1, 63), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000))
    )
    buffer = ctypes.create_string_buffer(program)
    libc.prctl(38, 1, 0, 0, 0)
    if libc.prctl(22, 2, struct.pack("HxxxxxxQ", 4, ctypes.addressof(buffer))):
        bad("no filter")

    def step(number):
        with suppress(OSError):
            os.uname()
            bad("uname is allowed")

    count(step)


@situation
def pool_of_processes():
    with ProcessPoolExecutor(3) as pool:
        count(lambda number: pool.submit(pow, number, 2).result(60) == number**2 or bad("another square"))


@situation
def pool_of_threads():
    with ThreadPoolExecutor(8) as pool:
        count(lambda number: list(pool.map(abs, range(-20, 0))) == list(range(20, 0, -1)) or bad("other numbers"))


@situation
def queue_between_processes():
    questions, answers = Queue(), Queue()

    def work():
        while True:
            answers.put(questions.get() + 1)

    Process(target=work, daemon=True).start()

    def step(number):
        questions.put(number)
        if answers.get(timeout=60) != number + 1:
            bad("another answer")

    count(step)


@situation
def pipeline_of_programs():
    pipeline = subprocess.Popen(
        ["sh", "-c", "cat | sed -u s/x/y/ | cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def step(number):
        pipeline.stdin.write(b"x%d\n" % number)
        pipeline.stdin.flush()
        if pipeline.stdout.readline() != b"y%d\n" % number:
            bad("another line")

    count(step)


@situation
def program_replaced_by_another():
    """exec while it is moved: the address space is another each second."""
    script = (
        "import os,sys,time;n=int(sys.argv[1]);print(n,time.monotonic_ns(),flush=True);time.sleep(.05);"
        "os.execv(sys.executable,[sys.executable,'-S','-c',open('/tmp/again').read(),str(n+1)])"
    )
    with open("/tmp/again", "w") as file:
        file.write(script)
    os.execv(sys.executable, [sys.executable, "-S", "-c", script, "0"])


@situation
def program_that_is_gone():
    """Its file was unlinked, as by an upgrade of its package."""
    import shutil

    shutil.copy("/bin/sleep", "/tmp/sleep")
    child = subprocess.Popen(["/tmp/sleep", "1000000"])
    time.sleep(0.3)
    os.unlink("/tmp/sleep")
    count(lambda number: child.poll() is None or bad("it has ended"))


@situation
def program_replaced_on_disk():
    import shutil

    shutil.copy("/bin/sleep", "/tmp/sleep")
    child = subprocess.Popen(["/tmp/sleep", "1000000"])
    time.sleep(0.3)
    shutil.copy("/bin/cat", "/tmp/new")
    os.rename("/tmp/new", "/tmp/sleep")
    count(lambda number: child.poll() is None or bad("it has ended"))


# Terminals.


@situation
def terminal_without_a_user():
    """A pair of which the job holds both ends, in raw mode and of an odd size, with unread input."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    import fcntl

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    wanted = termios.tcgetattr(slave)

    def step(number):
        os.write(master, b"x")
        if os.read(slave, 1) != b"x":
            bad("another byte")
        if termios.tcgetattr(slave) != wanted:
            bad("other settings")
        if struct.unpack("HHHH", fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8)))[:2] != (33, 77):
            bad("another size")

    count(step)


@situation
def terminal_of_a_child():
    """A child with a session and a terminal of its own, as under script or tmux."""
    child, master = pty.fork()
    if child == 0:
        while True:
            line = sys.stdin.readline()
            print("heard", line.strip(), flush=True)

    def step(number):
        os.write(master, b"%d\n" % number)
        wanted, heard, deadline = b"heard %d\r\n" % number, b"", time.monotonic() + 60
        while wanted not in heard:
            if time.monotonic() > deadline:
                bad("heard", heard)
            if select.select([master], [], [], 1)[0]:
                heard += os.read(master, 1024)

    count(step)


@situation
def terminal_hung_up():
    master, slave = pty.openpty()
    os.close(master)
    count(lambda number: os.fstat(slave))


@situation
def standard_input_closed():
    os.close(0)
    count(nothing)


@situation
def standard_error_elsewhere():
    with open("/tmp/errors", "a") as file:
        os.dup2(file.fileno(), 2)
    count(lambda number: os.write(2, b"x") == 1 or bad("not written"))


@situation
def connected_by_its_own_address():
    """Not 127.0.0.1, but the address that the host's name has."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    with socket.create_server(("0.0.0.0", 7050)) as server:
        client = socket.create_connection((address, 7050))
        accepted, _ = server.accept()

    def step(number):
        client.sendall(b"x")
        if accepted.recv(1) != b"x":
            bad("the connection was closed")

    count(step)


SITUATIONS[sys.argv[1]]()

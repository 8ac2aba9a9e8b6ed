"""Injection: whatever the process does and whoever dies, the job goes on as if nothing had been. Needs root only."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trackers_zoo import PATIENCE, state_of, wait_for_state, wait_gone

from podferry.memory.tracking.inject import InjectionOutcome
from podferry.memory.tracking.injector import Injector, NotInjected
from podferry.memory.tracking.tracker import TrackerKind, choose, probe
from podferry.memory.tracking.userfaultfd_owner import owns_userfaultfd

X86_64 = os.uname().machine == "x86_64"
KILLS = 60 if X86_64 else 20  # an emulated processor takes seconds for each

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        choose(probe()).kind is not TrackerKind.UFFD, reason=f"no uffd tracker: {choose(probe()).reason}"
    ),
]

PRELUDE = """
import ctypes, os, select, signal, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def check(result):
    if result < 0: say("error", os.strerror(ctypes.get_errno())); os._exit(1)
    return result
"""


class Program:
    """A Python program that talks by lines."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-I", "-c", PRELUDE + textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that select knows
        )
        self.pid = self.process.pid

    def line(self) -> str:
        assert self.process.stdout
        assert not self.silent(PATIENCE), f"it says nothing; it is {state_of(self.pid)}"
        return self.process.stdout.readline().decode().strip()

    def tell(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def silent(self, seconds: float = 0) -> bool:
        return not select.select([self.process.stdout], [], [], seconds)[0]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def injector() -> Iterator[Injector]:
    with Injector() as made:
        yield made


@pytest.fixture
def program() -> Iterator[Callable[[str], Program]]:
    with contextlib.ExitStack() as stack:
        yield lambda code: stack.enter_context(contextlib.closing(Program(code)))


def inject(injector: Injector, pid: int, times: int = 1) -> None:
    for _ in range(times):
        opened = injector.open_userfaultfd(pid)
        assert Path(f"/proc/self/fd/{opened.uffd}").readlink().name == "anon_inode:[userfaultfd]"
        assert opened.stopped > 0
        os.close(opened.uffd)
        assert not owns_userfaultfd(pid)


def outcome(injector: Injector, pid: int, **options: float) -> InjectionOutcome:
    with pytest.raises(NotInjected) as caught:
        injector.open_userfaultfd(pid, **options)
    return caught.value.outcome


# Each waits in a system call for what the test does then, and says how that call ended. Calls that the kernel ends with
# EINTR after any stop (signal(7)) are not among them.
WAITS = {
    "read": "ready(); say('result', len(os.read(0, 1)))",
    "poll": "p = select.poll(); p.register(0, select.POLLIN); ready(); say('result', len(p.poll()))",
    "ppoll": "p = struct.pack('iHH', 0, 1, 0); ready(); say('result', check(libc.ppoll(p, ctypes.c_ulong(1), None, None, 8)))",
    "select": "ready(); say('result', len(select.select([0], [], [])[0]))",
    "nanosleep": """
        t = struct.pack('qq', 0, 400_000_000); ready(); say('result', 1 + check(libc.nanosleep(t, None)))""",
    "futex": """
        word = ctypes.c_int(5)
        def wake():
            os.read(0, 1); word.value = 6; libc.syscall(FUTEX, ctypes.byref(word), 1, 1)
        threading.Thread(target=wake).start()
        ready(); say('result', 1 + check(libc.syscall(FUTEX, ctypes.byref(word), 0, 5, None)))""",
    "futex with a limit": """
        word = ctypes.c_int(5); t = struct.pack('qq', 0, 400_000_000)
        ready(); libc.syscall(FUTEX, ctypes.byref(word), 0, 5, t); say('result', int(ctypes.get_errno() == 110))""",
    "sigsuspend": """
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); got = []
        signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
        def kill():
            os.read(0, 1); os.kill(os.getpid(), signal.SIGUSR1)
        threading.Thread(target=kill).start()
        ready(); libc.sigsuspend(bytes(128)); masked = signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        say('result', int(len(got) == 1 and masked))""",
    "waitpid": """
        child = os.fork()
        if not child: os.read(0, 1); os._exit(7)
        ready(); say('result', int(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7))""",
}
FUTEX = "FUTEX = 202 if os.uname().machine == 'x86_64' else 98\ndef ready(): say('ready')\n"


@pytest.mark.parametrize("how", sorted(WAITS))
def test_a_waiting_system_call_goes_on(injector: Injector, program: Callable[[str], Program], how: str) -> None:
    waiting = program(FUTEX + textwrap.dedent(WAITS[how]))
    assert waiting.line() == "ready"
    wait_for_state(waiting.pid, "S")
    for _ in range(15):
        with contextlib.suppress(NotInjected):  # the time is up
            inject(injector, waiting.pid)
    waiting.tell()
    assert waiting.line() == "result 1"
    assert waiting.process.wait(PATIENCE) == 0


def test_a_computing_thread_computes_on(injector: Injector, program: Callable[[str], Program]) -> None:
    """Every register matters to a checksum; signals arrive all the while."""
    job = program("""
        import zlib
        ticks = []
        signal.signal(signal.SIGALRM, lambda *_: ticks.append(1)); signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        block = bytes(range(256)) * 400
        expected = zlib.crc32(block)
        say('ready')
        while not select.select([0], [], [], 0)[0] or len(ticks) <= 100:
            for _ in range(20):
                if zlib.crc32(block) != expected or sum(x * 1.5 for x in range(50)) != 1837.5: say('wrong'); os._exit(1)
        say('right', signal.SIGALRM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
    """)
    assert job.line() == "ready"
    inject(injector, job.pid, 300)
    job.tell()
    assert job.line() == "right False"


def test_a_stopped_process_stays_stopped(injector: Injector, program: Callable[[str], Program]) -> None:
    job = program("say('ready'); os.read(0, 1); say('done')")
    assert job.line() == "ready"
    os.kill(job.pid, signal.SIGSTOP)
    wait_for_state(job.pid, "T")
    for _ in range(5):
        inject(injector, job.pid)
        wait_for_state(job.pid, "T")
    job.tell()
    assert job.silent()
    os.kill(job.pid, signal.SIGCONT)
    assert job.line() == "done"


def test_a_stop_in_the_middle_is_kept(injector: Injector, program: Callable[[str], Program]) -> None:
    job = program("say('ready')\nwhile True: pass")
    assert job.line() == "ready"
    stopper = subprocess.Popen(
        [sys.executable, "-c", f"import os, signal\nwhile True: os.kill({job.pid}, 19); os.kill({job.pid}, 18)"]
    )
    inject(injector, job.pid, 200)
    stopper.kill()
    stopper.wait()
    os.kill(job.pid, signal.SIGSTOP)
    wait_for_state(job.pid, "T")
    os.kill(job.pid, signal.SIGCONT)
    wait_for_state(job.pid, "R")


def test_a_seccomp_filter_does_not_see_it(injector: Injector, program: Callable[[str], Program]) -> None:
    """The filter kills at anything but read, write, exit and sigreturn."""
    job = program("""
        import platform
        allowed = {'x86_64': (0, 1, 60, 231, 15), 'aarch64': (63, 64, 93, 94, 139)}[platform.machine()]
        code = [(0x20, 0, 0, 0)] + [(0x15, len(allowed) - i, 0, nr) for i, nr in enumerate(allowed)]
        code += [(6, 0, 0, 0x80000000), (6, 0, 0, 0x7FFF0000)]
        filter = ctypes.create_string_buffer(b"".join(struct.pack('HBBI', *one) for one in code))
        program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', len(code), ctypes.addressof(filter)))
        say('ready'); check(libc.prctl(38, 1, 0, 0, 0)); check(libc.prctl(22, 2, program))
        say('filtered'); os.read(0, 1); say('alive'); os._exit(0)
    """)
    assert (job.line(), job.line()) == ("ready", "filtered")
    inject(injector, job.pid, 5)
    job.tell()
    assert job.line() == "alive"


@pytest.mark.skipif(not X86_64, reason="machine code for x86_64")
def test_a_restartable_sequence_is_aborted_not_torn(injector: Injector, program: Callable[[str], Program]) -> None:
    """A thread loops inside a sequence for good; only an abort, ours or the kernel's, gets it out."""
    job = program("""
        import mmap
        try: offset = ctypes.c_ssize_t.in_dll(libc, '__rseq_offset').value
        except ValueError: say('no rseq'); os._exit(0)
        base = ctypes.c_uint64(); libc.syscall(158, 0x1003, ctypes.byref(base))
        code = mmap.mmap(-1, 4096, prot=7)
        at = ctypes.addressof(ctypes.c_char.from_buffer(code))
        # mov [rdi], rsi; spin: jmp spin; signature; abort: mov eax, 42; ret
        code[:16] = b'\\x48\\x89\\x37\\xeb\\xfe' + struct.pack('<I', 0x53053053) + b'\\xb8\\x2a\\0\\0\\0\\xc3\\x90'
        cs = ctypes.create_string_buffer(struct.pack('<IIQQQ', 0, 0, at + 3, 2, at + 9) + bytes(64), 128)
        place = (ctypes.addressof(cs) + 31) // 32 * 32; ctypes.memmove(place, cs.raw, 32)
        spin = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(at)
        say('ready')
        while not select.select([0], [], [], 0)[0]:
            if spin(base.value + offset + 8, place) != 42: say('torn')
        say('whole')
    """)
    if job.line() != "ready":
        pytest.skip("the C library registers no rseq area")
    inject(injector, job.pid, 300)
    job.tell()
    assert job.line() == "whole"


def test_only_one_of_500_threads_stands_still(injector: Injector, program: Callable[[str], Program]) -> None:
    job = program("""
        stop = threading.Event(); threading.stack_size(256 << 10)
        threads = [threading.Thread(target=stop.wait) for _ in range(500)]
        for thread in threads: thread.start()
        say('ready'); os.read(0, 1); stop.set()
        for thread in threads: thread.join()
        say('joined')
    """)
    assert job.line() == "ready"
    inject(injector, job.pid, 20)
    job.tell()
    assert job.line() == "joined"


def test_a_process_without_a_free_descriptor_is_reported(injector: Injector, program: Callable[[str], Program]) -> None:
    job = program("""
        import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); say('ready'); os.read(0, 1); say('alive')
    """)
    assert job.line() == "ready"
    assert outcome(injector, job.pid) is InjectionOutcome.REFUSED
    job.tell()
    assert job.line() == "alive"


def test_who_is_not_there_is_gone(injector: Injector) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert outcome(injector, child) is InjectionOutcome.GONE  # a zombie
    os.waitpid(child, 0)
    assert outcome(injector, child) is InjectionOutcome.GONE


def test_a_debugger_is_not_disturbed(injector: Injector, program: Callable[[str], Program]) -> None:
    job = program("say('ready'); os.read(0, 1); say('alive')")
    assert job.line() == "ready"
    debugger = program(f"check(libc.ptrace(0x4206, {job.pid}, None, None)); say('seized'); os.read(0, 1)")
    assert debugger.line() == "seized"
    assert outcome(injector, job.pid) is InjectionOutcome.TRACED
    debugger.tell()
    assert debugger.process.wait(PATIENCE) == 0
    inject(injector, job.pid)
    job.tell()
    assert job.line() == "alive"


def test_who_sleeps_uninterruptibly_is_left_alone(injector: Injector, program: Callable[[str], Program]) -> None:
    """A parent waits for its vfork child so; the injector gives up on it, and goes on with others."""
    job = program("""
        stack = ctypes.create_string_buffer(1 << 16); CLONE_VM, CLONE_VFORK = 0x100, 0x4000
        say('ready')
        child = check(libc.clone(libc.pause, ctypes.c_void_p(ctypes.addressof(stack) + 60000), CLONE_VM | CLONE_VFORK | 17, None))
        say('back', os.WTERMSIG(os.waitpid(child, 0)[1]))
    """)
    assert job.line() == "ready"
    wait_for_state(job.pid, "D")
    assert outcome(injector, job.pid, timeout=0.05) is InjectionOutcome.STUCK
    other = program("say('ready'); os.read(0, 1)")
    assert other.line() == "ready"
    inject(injector, other.pid)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert job.line() == "back 9"


@pytest.mark.skipif(not X86_64, reason="32-bit code of x86")
def test_32_bit_code_is_refused(injector: Injector, tmp_path: Path) -> None:
    """A hand-made program: pause() for ever."""
    base, code = 0x8048000, b"\xb8\x1d\x00\x00\x00\xcd\x80\xeb\xf7"
    size = 52 + 32 + len(code)
    header = (
        b"\x7fELF\x01\x01\x01"
        + bytes(9)
        + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, base + 84, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    )
    segment = struct.pack("<IIIIIIII", 1, 0, base, base, size, size, 5, 4096)
    path = tmp_path / "pause32"
    path.write_bytes(header + segment + code)
    path.chmod(0o755)
    try:
        job = subprocess.Popen([path])
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error}")
    try:
        wait_for_state(job.pid, "S")
        assert outcome(injector, job.pid) in (InjectionOutcome.FOREIGN_CODE, InjectionOutcome.REFUSED)
        wait_for_state(job.pid, "S")
    finally:
        job.kill()
        assert job.wait() == -signal.SIGKILL


def agent(pids: list[int]) -> int:
    """Start a process that injects without pause, and return once it does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            injector = Injector()
            os.close(injector.open_userfaultfd(pids[0]).uffd)
            os.write(writing, b"go")
            while True:
                for pid in pids:
                    os.close(injector.open_userfaultfd(pid).uffd)
        finally:
            os._exit(1)
    os.close(writing)
    assert select.select([reading], [], [], PATIENCE)[0], "it never began"
    assert os.read(reading, 2) == b"go"
    os.close(reading)
    return child


@pytest.mark.parametrize("many", [1, 3])
def test_an_agent_killed_at_any_moment_leaves_the_job_unharmed(program: Callable[[str], Program], many: int) -> None:
    """The agent injects without pause and is killed, each time a few microseconds later."""
    code = """
        import zlib
        block = bytes(range(256)) * 40
        expected = zlib.crc32(block)
        say('ready')
        while not select.select([0], [], [], 0)[0]:
            for _ in range(200):
                if zlib.crc32(block) != expected: say('wrong'); os._exit(1)
            time.sleep(0.0002)
        say('right')
    """
    jobs = [program(code) for _ in range(many)]
    assert {job.line() for job in jobs} == {"ready"}
    rng = random.Random(many)
    for _ in range(KILLS // many):
        child = agent([job.pid for job in jobs])
        until = time.perf_counter() + rng.uniform(0, 0.003)
        while time.perf_counter() < until:
            pass
        orphans = [int(pid) for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
        assert len(orphans) == 1, "the agent has one injector"
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        wait_gone(orphans)  # after what it was about to do, by itself
        for job in jobs:
            assert "TracerPid:\t0\n" in Path(f"/proc/{job.pid}/status").read_text()
            assert state_of(job.pid) in "RS"
    for job in jobs:
        job.tell()
        assert job.line() == "right"
        assert not owns_userfaultfd(job.pid)

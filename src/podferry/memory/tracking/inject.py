"""A small program of its own that makes other processes open a userfaultfd and hands the descriptors over.

    python -SI inject.py FD        FD: one end of a SOCK_SEQPACKET socketpair

It is started ahead of need and waits. Each packet it gets names a process. It answers by a packet with the descriptor
(SCM_RIGHTS), if there is one, and then, when it holds no copy of that any more, by an `InjectionOutcome`, the nanoseconds for
which a thread of the process stood still, and a sentence if it went wrong. The end of the socket is its end.

It is a process of its own because nobody may die while a job's thread has registers that are not its own: whatever
happens to the agent meanwhile, the few hundred microseconds are finished here, and the job goes on unharmed. So it
imports little, allocates nothing large, ignores signals that ask it to end, and is the last to be chosen when memory
runs out. The kernel lets go of the tracee if this process ends before it has changed anything. Only SIGKILL to this
very process in these microseconds would harm a job: whoever stops an agent must not kill its whole group at once.

See ptrace(2), userfaultfd(2), pidfd_getfd(2). The order of steps is that of CRIU's compel.
"""

# ruff: noqa: PTH100, PTH118, PTH120, PTH123, PTH208
from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from enum import IntEnum

if __name__ == "__main__":  # started without a path to packages
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "..")))

from podferry.fs.libc import checked, libc, second_descriptor
from podferry.memory.tracking.registers import ARCHITECTURES, NT_ARM_SYSTEM_CALL, X86_64, UnsupportedCode, rseq_abort

REQUEST = struct.Struct("<id")  # process id; seconds that a thread may take to stop
ANSWER = struct.Struct("<iq")  # Outcome; nanoseconds stopped; then text
MAX_ANSWER = 4096

SEIZE, INTERRUPT, DETACH, SYSCALL, CONT = 0x4206, 0x4207, 17, 24, 7
GETREGSET, SETREGSET, GETSIGMASK, SETSIGMASK, GET_RSEQ = 0x4204, 0x4205, 0x420A, 0x420B, 0x420F
TRACESYSGOOD, SUSPEND_SECCOMP = 1 << 0, 1 << 21
EVENT_STOP = 128
NT_PRSTATUS = 1
WALL = 0x40000000
SYSCALL_STOP = signal.SIGTRAP | 0x80
USER_MODE_ONLY = 1
RSEQ_CS = struct.Struct("<IIQQQ")
STOPPING = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})

MACHINE = os.uname().machine
ARCHITECTURE = ARCHITECTURES.get(MACHINE, X86_64)  # `inject` refuses others


class InjectionOutcome(IntEnum):
    """How an injection ended."""

    OPENED = 0
    GONE = 1
    """The process has ended, or is a zombie."""
    TRACED = 2
    """Another tracer, such as a debugger, holds it."""
    FOREIGN_CODE = 3
    """It runs 32-bit code, or the processor is none that we know."""
    STUCK = 4
    """No thread of it came to a stop in time: all are in uninterruptible sleep."""
    REFUSED = 5
    """The kernel refused: no permission, or no descriptor free in the process."""


class Failure(Exception):
    """An injection that did not come off; the process goes on as if nothing had been."""

    def __init__(self, outcome: InjectionOutcome, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome
        self.why = why


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_ptrace = libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_registers = ctypes.create_string_buffer(1024)


def ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """ptrace(2), its error as OSError."""
    return checked(_ptrace(request, tid, address, data))


class Thread:
    """A seized thread. Between `stop` and `release` it stands still."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        try:
            ptrace(SEIZE, tid, 0, TRACESYSGOOD | SUSPEND_SECCOMP)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            ptrace(SEIZE, tid, 0, TRACESYSGOOD)  # a kernel without CHECKPOINT_RESTORE

    def stop(self, seconds: float) -> None:
        """Bring it to a stop between two instructions, its signals dealt with, within `seconds`."""
        ptrace(INTERRUPT, self.tid)
        deadline = time.monotonic() + seconds
        while True:
            event, number = self._wait(deadline)
            if event == EVENT_STOP:
                return
            ptrace(CONT, self.tid, 0, number)

    def syscall(self, before: bytes, number: int, where: int, *arguments: int) -> int:
        """Have the stopped thread make a system call; what it returned. Its registers are then to be put back."""
        self.set_registers(ARCHITECTURE.with_syscall(before, where, number, *arguments))
        stops, deliver = 0, 0
        while stops < 2:  # at the entry and at the exit of the call
            ptrace(SYSCALL, self.tid, 0, deliver)
            event, signal_number = self._wait(None)
            deliver = 0
            if event == EVENT_STOP:
                continue  # a stop of the whole process, which it falls back into when it is released
            if signal_number == SYSCALL_STOP:
                stops += 1
            elif signal_number in STOPPING:
                deliver = signal_number
            else:
                raise Failure(InjectionOutcome.REFUSED, f"the call ended in {signal.Signals(signal_number).name}")
        return ARCHITECTURE.result_of(self.registers())

    def release(self) -> None:
        """Let it go on."""
        ptrace(DETACH, self.tid)

    def registers(self) -> bytes:
        """Its general registers, as NT_PRSTATUS."""
        vector = _Vector(ctypes.addressof(_registers), len(_registers))
        ptrace(GETREGSET, self.tid, NT_PRSTATUS, ctypes.addressof(vector))
        return _registers.raw[: vector.length]

    def set_registers(self, regset: bytes, kind: int = NT_PRSTATUS) -> None:
        """Set a regset."""
        ctypes.memmove(_registers, regset, len(regset))
        vector = _Vector(ctypes.addressof(_registers), len(regset))
        ptrace(SETREGSET, self.tid, kind, ctypes.addressof(vector))

    def signal_mask(self) -> int:
        """The signals it blocks; what it waits with, as in sigsuspend(2), does not count."""
        mask = ctypes.c_uint64()
        ptrace(GETSIGMASK, self.tid, 8, ctypes.addressof(mask))
        return mask.value

    def set_signal_mask(self, mask: int) -> None:
        """Block these signals."""
        ptrace(SETSIGMASK, self.tid, 8, ctypes.addressof(ctypes.c_uint64(mask)))

    def rseq_area(self) -> int:
        """The address of its `struct rseq`; 0 if it has none or the kernel does not tell."""
        try:
            ptrace(GET_RSEQ, self.tid, 24, ctypes.addressof(_registers))
        except OSError:
            return 0
        return int.from_bytes(_registers.raw[:8], "little")

    def _wait(self, deadline: float | None) -> tuple[int, int]:
        """The next stop as (event, signal)."""
        while True:
            try:
                waited, status = os.waitpid(self.tid, WALL | os.WNOHANG)
            except ChildProcessError:
                raise Failure(InjectionOutcome.GONE, "the thread is gone") from None
            if waited and not os.WIFSTOPPED(status):
                raise Failure(InjectionOutcome.GONE, "the process ended")
            if waited:
                return status >> 16, (status >> 8) & 0xFF
            left = 60.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise Failure(InjectionOutcome.STUCK, "no thread of it stopped in time")
            signal.sigtimedwait({signal.SIGCHLD}, left)


def inject(pid: int, seconds: float) -> tuple[int, int]:
    """Open a userfaultfd in `pid`; returns our copy of it and the nanoseconds for which a thread stood still.

    The copy in the process is closed again. Raises `Failure`.
    """
    if MACHINE not in ARCHITECTURES:
        raise Failure(InjectionOutcome.FOREIGN_CODE, f"unknown processor {MACHINE}")
    try:
        pidfd = os.pidfd_open(pid)
        try:
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
                where = find_syscall(pid, mem.fileno())
                tid = choose_thread(pid)
                return _inject(tid, pidfd, mem.fileno(), where, seconds=seconds)
        finally:
            os.close(pidfd)
    except (ProcessLookupError, FileNotFoundError):
        raise Failure(InjectionOutcome.GONE, "no such process") from None
    except PermissionError as error:
        if tracer := _status(pid, "TracerPid"):
            raise Failure(InjectionOutcome.TRACED, f"process {tracer} traces it") from None
        raise Failure(InjectionOutcome.REFUSED, f"no permission: {error}") from None
    except UnsupportedCode as error:
        raise Failure(InjectionOutcome.FOREIGN_CODE, str(error)) from None


def _inject(tid: int, pidfd: int, mem: int, where: int, *, seconds: float) -> tuple[int, int]:
    thread = Thread(tid)
    thread.stop(seconds)
    began = time.perf_counter_ns()
    ours = -1
    try:
        if _ended(
            pidfd
        ):  # while it lives nobody else has its pid, and so the memory, the thread and the descriptors are its own
            raise Failure(InjectionOutcome.GONE, "the process ended")
        before = thread.registers()
        ARCHITECTURE.check(before)
        if os.pread(mem, len(ARCHITECTURE.syscall_instruction), where) != ARCHITECTURE.syscall_instruction:
            raise Failure(InjectionOutcome.GONE, "it became another program meanwhile")
        with _undisturbed(thread, before, mem):
            # The call runs with the job's own rights: without CAP_SYS_PTRACE the kernel grants a userfaultfd for faults of user
            # mode only (fs/userfaultfd.c, userfaultfd_syscall_allowed). Asynchronous write protection reports no faults at all.
            flags = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY
            theirs = thread.syscall(before, ARCHITECTURE.userfaultfd, where, flags)
            if theirs < 0:
                raise Failure(InjectionOutcome.REFUSED, f"userfaultfd: {os.strerror(-theirs)}")
            try:
                ours = _take(pidfd, theirs)
            finally:
                thread.syscall(before, ARCHITECTURE.close, where, theirs)
    except BaseException:
        if ours >= 0:
            os.close(ours)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile
            thread.release()
    return ours, time.perf_counter_ns() - began


def _ended(pidfd: int) -> bool:
    ends = select.poll()
    ends.register(pidfd, select.POLLIN)
    return bool(ends.poll(0))


@contextlib.contextmanager
def _undisturbed(thread: Thread, before: bytes, mem: int) -> Iterator[None]:
    """Inside, no signal is delivered and registers may be changed; afterwards all is as it was.

    The exception is a restartable sequence, which goes on where the kernel would have sent it.
    """
    after = before
    if area := thread.rseq_area():
        pointer = int.from_bytes(os.pread(mem, 8, area + 8), "little")  # rseq.rseq_cs
        descriptor = os.pread(mem, RSEQ_CS.size, pointer) if pointer else b""
        if len(descriptor) == RSEQ_CS.size:
            abort = rseq_abort(descriptor, ARCHITECTURE.instruction_pointer(before))
            after = before if abort is None else ARCHITECTURE.at(before, abort)
    mask = thread.signal_mask()
    thread.set_signal_mask((1 << 64) - 1)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            thread.set_registers(after)
            if ARCHITECTURE.interrupted is None:
                thread.set_registers(struct.pack("<i", -1), NT_ARM_SYSTEM_CALL)
            thread.set_signal_mask(mask)


def choose_thread(pid: int) -> int:
    """A thread that will stop soon: the main one unless it sleeps uninterruptibly, or has ended before the others."""
    states = {}
    for tid in [pid, *(int(name) for name in os.listdir(f"/proc/{pid}/task"))]:
        try:
            with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:
                states[tid] = file.read().rpartition(b")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if states[tid] in (b"R", b"S"):
            return tid
    for kind in (b"T", b"t", b"D"):
        for tid, state in states.items():
            if state == kind:
                return tid
    raise Failure(InjectionOutcome.GONE, "the process has ended")


def find_syscall(pid: int, mem: int) -> int:
    """The address of a system call instruction in the process: in the vDSO, or else anywhere."""
    with open(f"/proc/{pid}/maps", "rb") as file:
        lines = [line.split(None, 5) for line in file]
    executable = [line for line in lines if line[1][2:3] == b"x" and not line[-1].startswith(b"[vsyscall]")]
    executable.sort(key=lambda line: not line[-1].startswith(b"[vdso]"))
    for line in executable:
        start, end = (int(bound, 16) for bound in line[0].split(b"-"))
        for position in range(start, end, 1 << 20):
            try:
                offset = ARCHITECTURE.find_syscall(os.pread(mem, min(end - position, 1 << 20), position))
            except OSError:
                break
            if offset >= 0:
                return position + offset
    if not lines:
        raise Failure(InjectionOutcome.GONE, "the process has ended")
    raise Failure(InjectionOutcome.REFUSED, "no system call instruction in its code")


def _take(pidfd: int, theirs: int) -> int:
    try:
        return second_descriptor(pidfd, theirs)
    except OSError as error:
        raise Failure(InjectionOutcome.REFUSED, f"pidfd_getfd: {error.strerror}") from error


def _status(pid: int, field: str) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1])
    return 0


def serve(sock: socket.socket) -> None:
    """Answer requests until the other end is closed, or a thread is stuck: only our end lets go of such a one."""
    while packet := sock.recv(REQUEST.size):
        pid, seconds = REQUEST.unpack(packet)
        outcome, text, fds, stopped = InjectionOutcome.OPENED, "", [], 0
        try:
            fd, stopped = inject(pid, seconds)
            fds = [fd]
        except Failure as failure:
            outcome, text = failure.outcome, failure.why
        except OSError as error:
            outcome, text = InjectionOutcome.REFUSED, str(error)
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(sock, [b"-"], fds)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(BrokenPipeError):
            sock.send(ANSWER.pack(outcome, stopped) + text.encode()[: MAX_ANSWER - ANSWER.size])
        if outcome is InjectionOutcome.STUCK:
            return


def settle() -> None:
    """Make this process hard to disturb."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    gc.disable()


if __name__ == "__main__":
    settle()
    serve(socket.socket(fileno=int(sys.argv[1])))

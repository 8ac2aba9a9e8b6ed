"""The registers of a stopped thread: how to make it call the kernel, and how to leave no trace of that.

Pure functions on the bytes that PTRACE_GETREGSET gives for NT_PRSTATUS. Layouts: `struct user_regs_struct` of
`arch/x86/include/asm/user_64.h`, `struct user_pt_regs` of `arch/arm64/include/uapi/asm/ptrace.h`; system call numbers:
`arch/x86/entry/syscalls/syscall_64.tbl`, `include/uapi/asm-generic/unistd.h`.

A thread that was stopped inside a system call has that call restarted, or ended with EINTR, by the kernel when it goes
on; which of the two stands in the saved registers. So they are put back unchanged, and a call of ours must not look
like one to be restarted: on x86 `orig_rax` says so, on arm64 the regset NT_ARM_SYSTEM_CALL. (On arm64 the kernel has
prepared the restart before the thread stops: a relative sleep then begins anew with its full time.)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

NT_ARM_SYSTEM_CALL = 0x404
_NO_SYSCALL = -1


class UnsupportedCode(Exception):
    """The thread runs code of another kind than its kernel's own: its registers have another layout."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between processors. Indexes count eight-byte words of the regset."""

    name: str
    size: int
    """Bytes of the regset; a 32-bit thread has fewer."""
    syscall_instruction: bytes
    alignment: int
    """Where instructions may begin."""
    number: int
    arguments: tuple[int, ...]
    result: int
    counter: int
    """The instruction pointer."""
    interrupted: int | None
    """The word that names the system call a thread was stopped in; None where a regset of its own does."""
    stack: int
    userfaultfd: int
    close: int
    set_mempolicy: int
    personality: int

    def with_syscall(self, regset: bytes, where: int, number: int, *arguments: int) -> bytes:
        """`regset` changed so that the thread goes on at `where`, a system call instruction, with this call."""
        words = self._words(regset)
        words[self.counter] = where
        for index, value in zip(self.arguments, arguments, strict=False):
            words[index] = value
        words[self.number] = number
        if self.interrupted is not None:
            words[self.interrupted] = _NO_SYSCALL & _WORD
        return _pack(words)

    def result_of(self, regset: bytes) -> int:
        """What the call returned: negative errno or a result."""
        value = self._words(regset)[self.result]
        return value - (1 << 64) if value >> 63 else value

    def instruction_pointer(self, regset: bytes) -> int:
        """Where the thread goes on."""
        return self._words(regset)[self.counter]

    def stack_pointer(self, regset: bytes) -> int:
        """The top of its stack, which grows downwards."""
        return self._words(regset)[self.stack]

    def at(self, regset: bytes, where: int) -> bytes:
        """`regset` with another instruction pointer."""
        words = self._words(regset)
        words[self.counter] = where
        return _pack(words)

    def find_syscall(self, code: bytes) -> int:
        """The offset of a system call instruction in executable memory; -1 if there is none."""
        offset = code.find(self.syscall_instruction)
        while offset >= 0 and offset % self.alignment:
            offset = code.find(self.syscall_instruction, offset + 1)
        return offset

    def check(self, regset: bytes) -> None:
        """Raise `UnsupportedCode` unless `regset` is a 64-bit one."""
        if len(regset) != self.size:
            raise UnsupportedCode(f"{len(regset)} bytes of registers, {self.size} expected: 32-bit code")

    def _words(self, regset: bytes) -> list[int]:
        self.check(regset)
        return list(struct.unpack(f"<{self.size // 8}Q", regset))


_WORD = (1 << 64) - 1

X86_64 = Architecture(
    name="x86_64",
    size=27 * 8,
    syscall_instruction=b"\x0f\x05",
    alignment=1,
    number=10,  # rax
    arguments=(14, 13, 12),  # rdi, rsi, rdx
    result=10,
    counter=16,  # rip
    interrupted=15,  # orig_rax
    stack=19,  # rsp
    userfaultfd=323,
    close=3,
    set_mempolicy=238,
    personality=135,
)

ARM64 = Architecture(
    name="aarch64",
    size=34 * 8,
    syscall_instruction=b"\x01\x00\x00\xd4",  # svc #0
    alignment=4,
    number=8,
    arguments=(0, 1, 2),
    result=0,
    counter=32,  # pc, behind x0 to x30 and sp
    interrupted=None,
    stack=31,
    userfaultfd=282,
    close=57,
    set_mempolicy=237,
    personality=92,
)

ARCHITECTURES = {architecture.name: architecture for architecture in (X86_64, ARM64)}


def rseq_abort(descriptor: bytes, pointer: int) -> int | None:
    """Where a thread stopped at `pointer` inside a restartable sequence must go on; None if it is in none.

    `descriptor` is the `struct rseq_cs` that the thread announced (`include/uapi/linux/rseq.h`): version, flags, start,
    length, abort. The kernel itself would send the thread there when it goes on, but only looks at where it is then,
    in the call that we make it do; so we must, as CRIU does.
    """
    _, _, start, length, abort = struct.unpack("<IIQQQ", descriptor)
    return abort if start <= pointer < start + length else None


def _pack(words: list[int]) -> bytes:
    return struct.pack(f"<{len(words)}Q", *words)

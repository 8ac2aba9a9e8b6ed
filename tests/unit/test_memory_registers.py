"""Making a thread call the kernel, on registers of both architectures."""

from __future__ import annotations

import struct

import pytest

from podferry.memory.tracking.registers import ARM64, X86_64, Architecture, UnsupportedCode, rseq_abort

pytestmark = pytest.mark.unit

# A thread of sleep(1) on x86_64, stopped in clock_nanosleep: rax is -ERESTART_RESTARTBLOCK, orig_rax is 230.
X86_ASLEEP = struct.pack(
    "<27Q",
    *(0, 0x7FFD3C6C5A90, 1, 0x7FFD3C6C5A80, 0, 0, 0x246, 0x7FFD3C6C5AD0, 0, 0),
    *((1 << 64) - 516, 0x7F9A0E0D4545, 0x7FFD3C6C5A80, 0, 0, 230, 0x7F9A0E0D4545),
    *(0x33, 0x246, 0x7FFD3C6C5A48, 0x2B, 0x7F9A0DFD8740, 0, 0, 0, 0, 0),
)
# One on arm64, x0 to x30, sp, pc, pstate: the kernel has already set pc back to the svc.
ARM_ASLEEP = struct.pack("<34Q", *range(100, 108), 115, *range(109, 131), 0xFFFFE000, 0x4008, 0x60001000)

BOTH = pytest.mark.parametrize(("arch", "before"), [(X86_64, X86_ASLEEP), (ARM64, ARM_ASLEEP)], ids=["x86", "arm"])


def words(regset: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(regset) // 8}Q", regset))


@BOTH
def test_only_the_call_changes(arch: Architecture, before: bytes) -> None:
    after = arch.with_syscall(before, 0x7000, arch.userfaultfd, 0x80801)
    changed = {index for index, pair in enumerate(zip(words(before), words(after), strict=True)) if pair[0] != pair[1]}
    allowed = {arch.counter, arch.number, arch.arguments[0], arch.interrupted}
    assert changed <= allowed
    assert words(after)[arch.number] == arch.userfaultfd
    assert words(after)[arch.arguments[0]] == 0x80801
    assert arch.instruction_pointer(after) == 0x7000
    assert len(after) == len(before) == arch.size


def test_on_x86_the_call_does_not_look_interrupted() -> None:
    after = words(X86_64.with_syscall(X86_ASLEEP, 0x7000, 3, 9))
    assert after[15] == (1 << 64) - 1  # orig_rax
    assert (after[10], after[14], after[16]) == (3, 9, 0x7000)  # rax, rdi, rip


def test_on_arm_the_call_uses_x8_and_x0() -> None:
    after = words(ARM64.with_syscall(ARM_ASLEEP, 0x7000, 57, 9))
    assert (after[8], after[0], after[32]) == (57, 9, 0x7000)


@BOTH
def test_results_are_signed(arch: Architecture, before: bytes) -> None:
    row = words(before)
    for value in (0, 5, -1, -24, -516):
        row[arch.result] = value & (1 << 64) - 1
        assert arch.result_of(struct.pack(f"<{len(row)}Q", *row)) == value


@BOTH
def test_moving_the_instruction_pointer_changes_nothing_else(arch: Architecture, before: bytes) -> None:
    assert arch.at(arch.at(before, 1), arch.instruction_pointer(before)) == before
    assert arch.instruction_pointer(arch.at(before, 0x1234)) == 0x1234


@pytest.mark.parametrize(("arch", "size"), [(X86_64, 17 * 4), (ARM64, 18 * 4), (ARM64, 27 * 8)])
def test_registers_of_32_bit_code_are_refused(arch: Architecture, size: int) -> None:
    with pytest.raises(UnsupportedCode, match=f"{size} bytes"):
        arch.with_syscall(bytes(size), 0, 0)


def test_a_system_call_instruction_is_found_where_instructions_begin() -> None:
    svc = ARM64.syscall_instruction
    assert X86_64.find_syscall(b"\x90\x90\x90\x0f\x05\xc3") == 3
    assert X86_64.find_syscall(b"\x90\x0f\x90\x05") == -1
    assert ARM64.find_syscall(b"\0\0" + svc + b"\0\0" + svc) == 8
    assert ARM64.find_syscall(b"\0\0" + svc) == -1


def test_a_restartable_sequence_is_aborted_only_inside() -> None:
    descriptor = struct.pack("<IIQQQ", 0, 0, 0x1000, 0x20, 0x9000)
    assert [rseq_abort(descriptor, at) for at in (0xFFF, 0x1000, 0x101F, 0x1020)] == [None, 0x9000, 0x9000, None]

"""What a process and its threads have, set to something unusual, and to stay so. Put after counting.py."""

# ruff: noqa: F821, PTH123
import ctypes
import mmap
import os
import resource
import signal
import sys
import threading
import time

# What CRIU does not restore.

IOPRIO_SET, IOPRIO_GET = (251, 252) if os.uname().machine == "x86_64" else (30, 31)
IOPRIO = 2 << 13 | 5


@situation
def affinity():
    os.sched_setaffinity(0, {0})
    keeps("affinity", {0}, lambda: os.sched_getaffinity(0))


@situation
def affinity_of_each_thread():
    cpus = sorted(os.sched_getaffinity(0))

    def other(cpu):
        os.sched_setaffinity(0, {cpu})
        while os.sched_getaffinity(0) == {cpu}:
            time.sleep(0.01)
        bad("affinity of a thread", os.sched_getaffinity(0))

    for cpu in cpus:
        threading.Thread(target=other, args=(cpu,), daemon=True).start()
    keeps("affinity of the first", set(cpus), lambda: os.sched_getaffinity(0))


@situation
def io_priority():
    libc.syscall(IOPRIO_SET, 1, 0, IOPRIO)
    keeps("I/O priority", IOPRIO, lambda: libc.syscall(IOPRIO_GET, 1, 0))


@situation
def timer_slack():
    libc.prctl(29, 123456)  # PR_SET_TIMERSLACK
    keeps("timer slack", 123456, lambda: libc.prctl(30))


@situation
def batch_with_a_nice_value():
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    value = os.nice(5)
    keeps("scheduler", (os.SCHED_BATCH, value), lambda: (os.sched_getscheduler(0), os.nice(0)))


@situation
def reset_on_fork():
    os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    keeps("scheduler", os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, lambda: os.sched_getscheduler(0))


# What CRIU restores, and must.


def setting(name, set, get, value, *rest):
    """A situation: a prctl that is set to `value`, by its numbers."""

    def job():
        if libc.prctl(set, value, *(rest or (0, 0, 0))) != 0:
            bad("prctl", set, os.strerror(ctypes.get_errno()))
        keeps(name, value, lambda: libc.prctl(get, 0, 0, 0, 0))

    SITUATIONS[name] = job


def told(name, set, get, value):
    """A situation: a prctl whose value comes back by a pointer."""

    def read():
        found = ctypes.c_int()
        libc.prctl(get, ctypes.byref(found), 0, 0, 0)
        return found.value

    def job():
        if libc.prctl(set, value, 0, 0, 0) != 0:
            bad("prctl", set, os.strerror(ctypes.get_errno()))
        keeps(name, value, read)

    SITUATIONS[name] = job


setting("not_dumpable", 4, 3, 0)
setting("no_new_privileges", 38, 39, 1)
setting("keeps_capabilities", 8, 7, 1)
setting("no_huge_pages", 41, 42, 1)
told("parent_death_signal", 1, 2, 10)
told("child_subreaper", 36, 37, 1)


@situation
def no_speculation():
    libc.prctl(53, 0, 4, 0, 0)  # PR_SET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, PR_SPEC_DISABLE
    wanted = libc.prctl(52, 0, 0, 0, 0)
    keeps("speculation", wanted, lambda: libc.prctl(52, 0, 0, 0, 0))


@situation
def personality():
    libc.personality(0x0040000)  # ADDR_NO_RANDOMIZE
    keeps("personality", 0x0040000, soon(0x0040000, lambda: libc.personality(0xFFFFFFFF)))


@situation
def resource_limits():
    names = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
    for number in names.values():
        _, hard = resource.getrlimit(number)
        some = {resource.RLIMIT_NOFILE: 321, resource.RLIMIT_CORE: 0, resource.RLIMIT_NPROC: 4321}.get(number)
        if some is not None:
            resource.setrlimit(number, (some, hard))

    def limits():
        return {name: resource.getrlimit(number) for name, number in names.items()}

    keeps("limits", limits(), limits)


@situation
def core_dump_filter():
    def read():
        with open("/proc/self/coredump_filter") as file:
            return file.read().strip()

    with open("/proc/self/coredump_filter", "w") as file:
        file.write("0x7")
    keeps("core dump filter", read(), read)


@situation
def killed_first_without_memory():
    def read():
        with open("/proc/self/oom_score_adj") as file:
            return file.read().strip()

    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("345")
    keeps("oom_score_adj", "345", read)


@situation
def locked_memory():
    block = mmap.mmap(-1, 65536)
    if libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(block))), 65536):
        bad("mlock", os.strerror(ctypes.get_errno()))
    keeps("VmLck", status("VmLck"), lambda: status("VmLck"))


@situation
def ambient_capabilities():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    data[2] |= 1 << 5  # CAP_KILL is inheritable
    if libc.capset(header, data) or libc.prctl(47, 2, 5, 0, 0):
        bad("ambient", os.strerror(ctypes.get_errno()))
    fields = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    keeps("capabilities", status(*fields), lambda: status(*fields))


GET_POLICY, SET_POLICY = (239, 238) if os.uname().machine == "x86_64" else (236, 237)


def policy(address=0, flags=0):
    mode, nodes = ctypes.c_int(), ctypes.c_ulong()
    if libc.syscall(GET_POLICY, ctypes.byref(mode), ctypes.byref(nodes), 64, ctypes.c_void_p(address), flags):
        bad("get_mempolicy", os.strerror(ctypes.get_errno()))
    return mode.value, nodes.value


@situation
def memory_policy():
    if libc.syscall(SET_POLICY, 2, ctypes.byref(ctypes.c_ulong(1)), 64):  # MPOL_BIND to node 0
        bad("set_mempolicy", os.strerror(ctypes.get_errno()))
    keeps("memory policy", policy(), soon(policy(), policy))


@situation
def memory_policy_of_a_thread():
    def other():
        libc.syscall(SET_POLICY, 1, ctypes.byref(ctypes.c_ulong(1)), 64)  # MPOL_PREFERRED
        while soon(1, lambda: policy()[0])() == 1:
            time.sleep(0.01)
        bad("memory policy of a thread", policy())

    threading.Thread(target=other, daemon=True).start()
    keeps("memory policy", 0, lambda: policy()[0])


@situation
def advice_about_memory():
    """MADV_DONTFORK, DONTDUMP, HUGEPAGE, NOHUGEPAGE, MERGEABLE, SEQUENTIAL, RANDOM. CRIU before 4.2 drops WIPEONFORK."""
    blocks = [mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(7)]
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(block)) for block in blocks]
    for address, advice in zip(addresses, (10, 16, 14, 15, 12, 2, 1), strict=True):
        libc.madvise(ctypes.c_void_p(address), 1 << 16, advice)

    def flags():
        found, at = {}, None
        with open("/proc/self/smaps") as file:
            for line in file:
                if "-" in line.split(" ")[0] and not line.startswith("VmFlags"):
                    first, last = (int(one, 16) for one in line.split(" ")[0].split("-"))
                    at = [one for one in addresses if first <= one < last]
                elif line.startswith("VmFlags"):
                    kept = set(line.split()[1:]) & {"dc", "dd", "hg", "nh", "mg", "sr", "rr"}
                    for one in at:
                        found[addresses.index(one)] = sorted(kept)
        return found

    keeps("advice", flags(), flags)


# The rest of a process.


@situation
def mask_and_signals():
    os.umask(0o137)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGWINCH, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGRTMIN + 3})
    os.kill(os.getpid(), signal.SIGUSR2)
    fields = ("Umask", "SigBlk", "SigIgn", "SigCgt", "ShdPnd", "SigPnd")
    keeps("signals", status(*fields), lambda: status(*fields))


@situation
def name_of_each_thread():
    def other(name):
        libc.prctl(15, name)
        while True:
            found = ctypes.create_string_buffer(16)
            libc.prctl(16, found)
            if found.value != name:
                bad("name", found.value)
            time.sleep(0.01)

    for number in range(4):
        threading.Thread(target=other, args=(b"worker %d" % number,), daemon=True).start()
    count(nothing)


@situation
def secure_bits():
    if libc.prctl(28, 0x5, 0, 0, 0):  # PR_SET_SECUREBITS: no root, no set-uid fix-up
        bad("securebits", os.strerror(ctypes.get_errno()))
    keeps("secure bits", 5, lambda: libc.prctl(27, 0, 0, 0, 0))


SITUATIONS[sys.argv[1]]()

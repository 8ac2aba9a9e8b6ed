"""The situations of `jobs/`, and what becomes of each when it is to move."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

JOBS = Path(__file__).parent / "jobs"


@dataclass(frozen=True)
class Situation:
    """`name` is the function in the file or files `job` of `jobs/`, `what` what a reader of the docs would call it.

    It moves, unless `refused` names a part of what `check` says against it; `remedy` is then what to do, for the docs. With
    `sockets` it needs a CRIU that saves TCP and UDP sockets on the kernel it runs on, and is refused where there is none.
    `differs` is part of what the agents say that it has not kept. It shows whether it was harmed when it has counted to `tells_at`.
    With `other_user` it has a user that is not root, and is refused where the agents lack CAP_SYS_RESOURCE.
    """

    name: str
    what: str
    refused: str = ""
    remedy: str = ""
    sockets: bool = False
    job: str = "counting situations"
    differs: str = ""
    tells_at: int = 0
    other_user: bool = False

    @property
    def family(self) -> str:
        """The file that has it."""
        return self.job.split()[-1]


@dataclass(frozen=True)
class Refusal:
    """What `check` says against a situation, in part, and what is to be done."""

    says: str
    remedy: str


TIMERS = (
    Situation("timerfd_monotonic", "a periodic timerfd on CLOCK_MONOTONIC"),
    Situation("timerfd_boottime", "a periodic timerfd on CLOCK_BOOTTIME"),
    Situation("timerfd_realtime", "a periodic timerfd on CLOCK_REALTIME"),
    Situation("timerfd_monotonic_absolute", "a periodic timerfd that began at a point of CLOCK_MONOTONIC"),
    Situation("timerfd_realtime_absolute", "a periodic timerfd that began at a point of CLOCK_REALTIME"),
    Situation("timerfd_points_of_monotonic", "a timerfd that is set to points of CLOCK_MONOTONIC: none is early"),
    Situation("timerfd_points_of_realtime", "a timerfd that is set to points of CLOCK_REALTIME: none is early"),
    Situation("timerfd_disarmed", "a disarmed timerfd that has an interval"),
    Situation("setitimer_real", "a periodic setitimer(ITIMER_REAL)"),
    Situation("posix_timer_monotonic", "a periodic timer_create on CLOCK_MONOTONIC"),
    Situation("posix_timer_realtime", "a periodic timer_create on CLOCK_REALTIME"),
    Situation("posix_timer_boottime", "a periodic timer_create on CLOCK_BOOTTIME"),
)

MEMORY = (
    Situation("shared_mappings_by_the_thousand", "6000 shared anonymous mappings"),
    Situation("idle_with_shared_memory", "192 MiB of shared anonymous memory"),
)

PROCESSES = (Situation("starts_programs_all_the_time", "threads that start programs, one after another"),)

NETWORK = (
    Situation(
        "network_namespace_as_it_was", "interfaces, flags, addresses, routes and settings of the network namespace"
    ),
    Situation("loopback_listener", "a listening socket on 127.0.0.1 that is talked to now and then", sockets=True),
    Situation("tcp_loopback_pair", "two processes with a TCP connection over 127.0.0.1", sockets=True),
    Situation("tcp_loopback_pair_with_much_to_say", "the same, a megabyte at a time", sockets=True),
    Situation("tcp_loopback_pair_of_ipv6", "the same over ::1", sockets=True),
    Situation("tcp_loopback_pair_of_both_versions", "the same, a client of IPv4 at a server of IPv6", sockets=True),
    Situation("tcp_loopback_stream_that_waits_for_its_reader", "a TCP connection whose queues are full", sockets=True),
    Situation("tcp_half_closed", "a TCP connection that one end has closed for writing", sockets=True),
    Situation("tcp_short_connections", "TCP connections over 127.0.0.1, one after another", sockets=True),
    Situation("udp_loopback_pair", "two processes that exchange datagrams over 127.0.0.1", sockets=True),
    Situation(
        "udp_corked",
        "a UDP socket that holds a datagram back (UDP_CORK)",
        refused="corked",
        remedy="wait until it is sent, or send without UDP_CORK",
    ),
    Situation(
        "mptcp_listener",
        "a listening socket for multipath TCP (Go since 1.24)",
        refused="multipath TCP",
        remedy="GODEBUG=multipathtcp=0, or the sysctl net.mptcp.enabled=0 in the pod's securityContext",
    ),
)

_KEPT = {
    "affinity": "a CPU affinity (`taskset`, `numactl`, OMP_PROC_BIND)",
    "affinity_of_each_thread": "a CPU affinity for each thread",
    "io_priority": "an I/O priority (`ionice`)",
    "timer_slack": "a timer slack (PR_SET_TIMERSLACK)",
    "batch_with_a_nice_value": "SCHED_BATCH and a nice value",
    "reset_on_fork": "SCHED_RESET_ON_FORK",
    "not_dumpable": "PR_SET_DUMPABLE",
    "no_new_privileges": "PR_SET_NO_NEW_PRIVS",
    "keeps_capabilities": "PR_SET_KEEPCAPS",
    "no_huge_pages": "PR_SET_THP_DISABLE",
    "parent_death_signal": "PR_SET_PDEATHSIG",
    "child_subreaper": "PR_SET_CHILD_SUBREAPER",
    "no_speculation": "PR_SET_SPECULATION_CTRL",
    "personality": "a personality",
    "resource_limits": "resource limits",
    "core_dump_filter": "a core dump filter",
    "killed_first_without_memory": "an oom_score_adj",
    "locked_memory": "locked memory (mlock)",
    "ambient_capabilities": "ambient capabilities",
    "memory_policy": "a memory policy (`numactl`)",
    "memory_policy_of_a_thread": "a memory policy of a thread",
    "advice_about_memory": "advice about memory (madvise)",
    "mask_and_signals": "a umask, blocked, ignored and pending signals",
    "name_of_each_thread": "a name for each thread",
    "secure_bits": "secure bits",
}
_KEPT_OPEN = {
    "locks_of_files": "locks of files, shared and exclusive, of each kind",
    "lease_of_a_file": "leases of files",
    "owner_and_signal_of_a_descriptor": "F_SETOWN and F_SETSIG",
    "size_and_mode_of_a_pipe": "sizes and modes of pipes",
    "attributes_of_a_file": "user attributes of files",
    "seals_of_memory": "seals of a memfd",
    "options_of_a_listening_socket": "options of listening TCP sockets",
    "options_of_a_datagram_socket": "options of UDP sockets",
    "options_of_a_unix_socket": "options of unix sockets",
    "watches_its_own_root": "inotify on the container's own root",
    "name_gone_and_another_left": "an open hard link whose first name is gone",
    "file_of_the_image_unlinked": "a mapped file of the image that was unlinked",
    "bash_on_a_terminal_of_its_own": "an interactive bash on a pty of its own",
    "counts_of_events": "an eventfd, an epoll of edges and of one shot",
}
KEPT = (
    *(Situation(name, what, job="counting kept") for name, what in _KEPT.items()),
    *(
        Situation(name, what, job="counting kept_open", sockets="listening" in name or "datagram" in name)
        for name, what in _KEPT_OPEN.items()
    ),
    Situation(
        "dash_on_a_terminal_of_its_own",
        "an interactive dash on a pty of its own",
        refused="/dev/tty",
        remedy="bash",
        job="counting kept_open",
    ),
    Situation(
        "eventfd_as_a_semaphore",
        "an eventfd of EFD_SEMAPHORE",
        refused="EFD_SEMAPHORE",
        remedy="a POSIX or SysV semaphore; an eventfd that is none",
        job="counting kept_open",
    ),
    Situation(
        "pipe_in_packet_mode",
        "a pipe in packet mode (O_DIRECT)",
        refused="packet mode",
        remedy="a socketpair of SOCK_SEQPACKET",
        job="counting kept_open",
    ),
    *(
        Situation(
            name,
            what,
            refused="POSIX message queue",
            remedy="close and unlink it; a SysV queue moves",
            job="counting kept_open",
        )
        for name, what in (
            ("message_queue", "an open POSIX message queue"),
            ("message_queue_closed", "a POSIX message queue"),
        )
    ),
)

_THREADS = Refusal("first thread has ended", "have the first thread wait for the others")
REFUSED: dict[str, Refusal] = {
    **dict.fromkeys(
        ("unix_backlog", "unix_backlog_with_data", "tcp_backlog", "tcp_backlog_with_data"),
        Refusal("the listener does not accept", "accept the connection, or close either end"),
    ),
    "tcp_closed_with_more_data_than_its_reader_takes": Refusal("does not read all that was said", "read it"),
    "stopped_child": Refusal("stopped process (SIGSTOP)", "have it go on (SIGCONT)"),
    "traced_child": Refusal("another of its processes traces", "end the debugger"),
    "own_users": Refusal("user namespace of its own", "run the job without a sandbox of its own"),
    "faults_by_descriptor": Refusal("userfaultfd", "run the job without it"),
    "rings_of_io": Refusal("io_uring", "for Node.js UV_USE_IO_URING=0"),
    "secret_memory": Refusal("memfd_secret", "locked memory (mlock)"),
    "file_unlinked_of_80_mib": Refusal("deleted file of more than 64 MiB", "close it, or keep it under a name"),
    **dict.fromkeys(
        ("inotify_of_a_file_that_is_gone", "inotify_of_a_file_of_the_image"), Refusal("inotify", "watch the directory")
    ),
    "another_root": Refusal("chroot", "start it from a shell that stays where it is"),
    "first_thread_gone": _THREADS,
    "first_thread_of_a_child_gone": _THREADS,
}
"""Of the families below, those that `check` refuses."""
OTHER_USERS = frozenset({"another_user", "child_of_another_user"})
"""Of them those of which an agent without CAP_SYS_RESOURCE may not read all that it must."""


def family(file: str) -> Iterator[Situation]:
    """The situations of a file of `jobs/`: what each is called is what it is, and the first line of its docstring says more."""
    text = (JOBS / f"{file}.py").read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(one, ast.Name) and one.id == "situation" for one in node.decorator_list
        ):
            said, source = ast.get_docstring(node), ast.get_source_segment(text, node) or ""
            what = node.name.replace("_", " ") + (f": {said.splitlines()[0].rstrip('.')}" if said else "")
            refusal = REFUSED.get(node.name, Refusal("", ""))
            yield Situation(
                node.name,
                what,
                refused=refusal.says,
                remedy=refusal.remedy,
                sockets=needs_sockets(source),
                job=f"counting {file}",
                other_user=node.name in OTHER_USERS,
                tells_at=1510 if "1500" in source or "backlog(" in source else 0,
            )


def needs_sockets(source: str) -> bool:
    """Whether it has TCP or UDP sockets."""
    words = ("create_server", "AF_INET", "asyncio", "socket.socket()", "tcp_over()")
    return any(word in source for word in words)


FAMILIES = tuple(one for file in ("memory_shared", "sockets", "files", "processes") for one in family(file))
SITUATIONS = (*TIMERS, *MEMORY, *PROCESSES, *NETWORK, *KEPT, *FAMILIES)

"""May this container move from that node to this one? Facts in, refusals out: each with a reason and a remedy.

A refusal is said before anything is touched. What is only worth knowing is a warning. The checks are one function each and stand in
one list. `check` shows the refusals of all of them at once; a migration ends with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from podferry.core.facts import ContainerFacts, NodeFacts
from podferry.core.host import NO_UDP_LITE_REMEDY, NO_UDP_LITE_WHY, SELINUX_REMEDY, SELINUX_WHY, needs_later_criu
from podferry.core.processor_flags import for_programs
from podferry.errors import Refused
from podferry.model import Mode

OLDEST_CRIU = (4, 0)
OLDEST_RUNC = (1, 1)
GUARDING_CRIU = SOCKETS_CRIU = (4, 2)
GUARDS = "guard pages"
"""As `ContainerFacts.unsaved` names guards that madvise made (glibc has them below each thread's stack from 2.42 on)."""
LIMITS = "limits of other users"
"""As `ContainerFacts.unsaved` names the resource limits of processes that are not root's, where nobody may read them."""
TRACED, USER_NAMESPACE, FIRST_THREAD = "traced process", "nested user namespace", "first thread"
SECRET, GHOST, OTHER_ROOT, STOPPED = "secret memory", "deleted file", "another root", "stopped process"
GHOST_BYTES = 64 << 20
"""Of a file that is open and deleted: more CRIU does not copy into its images (`ghost-limit` in criu/criu.conf)."""
"""As `ContainerFacts.unsaved` names processes that CRIU cannot dump."""
PACKET_PIPE, MESSAGE_QUEUE = "pipe in packet mode", "POSIX message queue"
WATCHED, SEMAPHORE, CONTROLLING = "watched file", "semaphore", "controlling terminal"
"""As `ContainerFacts.unsaved` names what is open, and CRIU cannot save."""
SOCKETS = "internet sockets"
"""As `ContainerFacts.unsaved` names TCP, UDP and raw sockets, where the kernel does not let CRIU save them before 4.2."""
UNACCEPTED = "unaccepted connection"
"""As `ContainerFacts.unsaved` names connections within the job that nobody accepts."""
UNSENT = "unsent data"
"""As `ContainerFacts.unsaved` names connections within the job that were closed before the other end had read all."""
CORKED = "corked UDP socket"
"""As `ContainerFacts.unsaved` names datagram sockets with a datagram that is not sent yet."""
MPTCP = "MPTCP socket"
"""As `ContainerFacts.unsaved` names them, which no CRIU saves."""
SHARED_LOCK = "lock on a network file system"
"""As `ContainerFacts.unsaved` names locks that a server keeps, for all nodes that have the file system mounted."""
INTERFACE = "network interface"
"""As `ContainerFacts.unsaved` names, before their names, interfaces in a network namespace that runc has made."""
PIPE_BYTES = 4 << 20
MEMORY_RESERVE = 64 << 20
DISK_RESERVE = 256 << 20
CLOCKS_APART = 60.0
MUCH_IN_PIPES = 1 << 30
MUCH_IN_IMAGES = 64 << 20

# Bind mounts that containerd and the kubelet make for every container, each node for itself.
OWN_BINDS = frozenset({"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/termination-log", "/dev/shm"})


class NodeUnfit(Refused):
    """A node lacks what a migration needs."""

    code = "PF110"


class NodesDiffer(Refused):
    """The nodes differ so that the target could not run the container."""

    code = "PF111"


class NoRoom(Refused):
    """The target has too little memory or disk."""

    code = "PF112"


class ContainerBound(Refused):
    """The container holds something that belongs to its node."""

    code = "PF113"


@dataclass(frozen=True)
class Question:
    """May `container` move from `source` to `target` in `mode`? Where the target is not known yet, `target` is None."""

    container: ContainerFacts
    source: NodeFacts
    target: NodeFacts | None
    mode: Mode


def refusals(question: Question) -> list[Refused]:
    """Every reason against, the most basic first."""
    return [refusal for check in CHECKS for refusal in check(question)]


def warnings(question: Question) -> list[str]:
    """Warnings: properties of the move that do not prevent it."""
    found = []
    container, target = question.container, question.target
    in_images = container.shared + container.tmpfs
    if question.mode is Mode.LIVE and container.shared > MUCH_IN_IMAGES:
        in_images = container.tmpfs
        found.append(
            f"{container.shared >> 20} MiB are shared memory: they are copied while the job runs, but CRIU saves and restores them "
            "while it stands still"
        )
    if in_images > MUCH_IN_IMAGES:
        found.append(
            f"{in_images >> 20} MiB are shared memory or in memory file systems: podferry copies them while the job is frozen"
        )
    if container.anonymous > MUCH_IN_PIPES and not question.source.memory_skipping_dump:
        found.append(f"CRIU hands {container.anonymous >> 20} MiB of memory to pipes while the job is frozen")
    if container.connections:
        found.append(f"the move closes TCP connections to others: {', '.join(container.connections[:4])}")
    if target is not None and question.source.kernel != target.kernel:
        found.append(f"the kernels differ: {question.source.kernel} and {target.kernel}")
    return found


def unthrottled(why: str) -> str:
    """The warning for a container whose CPU time podferry cannot limit."""
    return f"podferry cannot throttle the job: {why}; allow post-copy where the job writes faster than the link carries"


def _programs(question: Question) -> Iterator[Refused]:
    for where, node in _nodes(question):
        for program, version, oldest in (("CRIU", node.criu, OLDEST_CRIU), ("runc", node.runc, OLDEST_RUNC)):
            wanted = ".".join(map(str, oldest))
            if not version:
                yield NodeUnfit(f"the {where} has no {program}", remedy=f"install {program} {wanted} or later there")
            elif numbers(version) < oldest:
                yield NodeUnfit(
                    f"the {where}'s {program} is too old",
                    why=f"it is {version}; {wanted} is the oldest that works",
                    remedy=f"install a later {program} there",
                )
    source = question.source
    if source.criu and needs_later_criu(source.kernel, numbers(source.criu)):
        yield NodeUnfit(
            "the source's CRIU cannot save a container on the source's kernel",
            why=f"they are CRIU {source.criu} and Linux {source.kernel}; {NO_UDP_LITE_WHY}",
            remedy=NO_UDP_LITE_REMEDY,
        )


def _kernels(question: Question) -> Iterator[Refused]:
    if question.target is not None and not question.target.lazy_pages:
        yield NodeUnfit(
            "the target's kernel cannot fill the memory of a restored job on demand",
            why="it has no userfaultfd that reports forks, moves and removals",
            remedy="use a kernel with CONFIG_USERFAULTFD",
        )
    source = question.source
    if question.mode is Mode.LIVE and not (source.soft_dirty or (source.pagemap_scan and source.wp_async)):
        yield NodeUnfit(
            "the source's kernel cannot track written memory",
            why="it has neither asynchronous userfaultfd protection with PAGEMAP_SCAN (Linux 6.7) nor soft-dirty bits",
            remedy="use --mode stop, or a later kernel",
        )
    if source.pipe_max_size < PIPE_BYTES:
        yield NodeUnfit(
            "the source's pipes are too small for CRIU's lazy dump",
            why=f"fs.pipe-max-size is {source.pipe_max_size}",
            remedy=f"sysctl -w fs.pipe-max-size={PIPE_BYTES}",
        )


def _selinux(question: Question) -> Iterator[Refused]:
    for where, node in _nodes(question):
        if node.selinux:
            yield NodeUnfit(f"SELinux enforces its policy on the {where}", why=SELINUX_WHY, remedy=SELINUX_REMEDY)


def _runtimes(question: Question) -> Iterator[Refused]:
    source, target = question.source, question.target
    if target is not None and source.runtime is not target.runtime:
        yield NodesDiffer(
            "the nodes have different container runtimes",
            why=f"{source.runtime} on the source, {target.runtime} on the target: they lay out a container's mounts differently, "
            "and CRIU restores a container only into the mounts that it was dumped with",
            remedy=f"choose a target with {source.runtime}",
        )


def _processors(question: Question) -> Iterator[Refused]:
    source, target = question.source, question.target
    if target is None:
        return
    if (source.machine, source.page_size) != (target.machine, target.page_size):
        yield NodesDiffer(
            "the nodes have different processors",
            why=f"{source.machine} with pages of {source.page_size}, {target.machine} with pages of {target.page_size}",
            remedy="choose a target of the same architecture",
        )
        return
    missing = sorted(for_programs(source.cpu_flags) - for_programs(target.cpu_flags))
    if missing:
        yield NodesDiffer(
            "the target's processor lacks features that the job may be using",
            why=", ".join(missing[:12]) + (" ..." if len(missing) > 12 else ""),
            remedy="choose a target with the same processor, or mask these features in virtual machines",
        )


def _criu_generations(question: Question) -> Iterator[Refused]:
    source, target = question.source, question.target
    if target and source.criu and target.criu and numbers(target.criu) < numbers(source.criu)[:2]:
        yield NodesDiffer(
            "the target's CRIU is older than the source's",
            why=f"{target.criu} may not read what {source.criu} writes",
            remedy="bring both nodes to one version of CRIU",
        )


def _clocks(question: Question) -> Iterator[Refused]:
    if question.target is not None and (apart := abs(question.source.clock - question.target.clock)) > CLOCKS_APART:
        yield NodesDiffer(
            "the nodes' clocks differ",
            why=f"they are {apart:.0f} s apart, and the job would see its time jump",
            remedy="synchronise the nodes' clocks",
        )


def _room(question: Question) -> Iterator[Refused]:
    container, target = question.container, question.target
    if target is None:
        return
    memory = container.anonymous + container.shared + container.tmpfs + MEMORY_RESERVE
    # Post-copy fetches memory as it is filled; CRIU's images wait there in every mode.
    waits = container.shared + container.tmpfs + (0 if question.mode is Mode.POSTCOPY else container.anonymous)
    if memory > target.memory_available:
        yield NoRoom(
            "the target has too little memory",
            why=f"the job needs {memory >> 20} MiB, {target.memory_available >> 20} MiB are available",
            remedy="free memory there, or choose another node",
        )
    elif waits > target.run_free:
        yield NoRoom(
            "the directory of the target's agent for memory on its way is too small (`run`, /run/podferry as a rule)",
            why=f"{waits >> 20} MiB of the job would wait there, {target.run_free >> 20} MiB are free",
            remedy="mount a larger tmpfs there (docs/agent.md), use postcopy, or choose another node",
        )
    disk = container.upper + DISK_RESERVE
    if disk > target.disk_free:
        yield NoRoom(
            "the target has too little disk",
            why=f"the changed files need {disk >> 20} MiB, {target.disk_free >> 20} MiB are free",
            remedy="free disk space there, or choose another node",
        )


def _bound(question: Question) -> Iterator[Refused]:
    container = question.container
    if shared := sorted(set(container.host_namespaces) - {"user", "time", "cgroup"}):
        yield ContainerBound(
            "the container shares namespaces with its node",
            why=", ".join(shared),
            remedy="run it with namespaces of its own (no hostNetwork, hostPID, hostIPC)",
        )
    if container.devices:
        yield ContainerBound(
            "the container uses devices of its node",
            why=", ".join(container.devices[:8]),
            remedy="a job with devices cannot move yet",
        )
    if binds := sorted(one.source for one in container.binds if one.destination not in OWN_BINDS):
        yield ContainerBound(
            "the container has directories of its node mounted",
            why=", ".join(binds[:8]),
            remedy="use a volume that both nodes have",
        )
    unsaved = {
        "io_uring": "an open io_uring",
        "userfaultfd": "a userfaultfd of its own",
        TRACED: "a process that another of its processes traces (a debugger, strace)",
        USER_NAMESPACE: "a process in a user namespace of its own (a sandbox, a rootless container)",
        FIRST_THREAD: "a process whose first thread has ended while other threads run; have the first thread wait for them",
        STOPPED: "a stopped process (SIGSTOP), which nobody can trace in a frozen cgroup of version 1; have it go on (SIGCONT)",
        SECRET: "secret memory (memfd_secret), which CRIU may not read; use locked memory (mlock)",
        GHOST: f"a deleted file of more than {GHOST_BYTES >> 20} MiB open; have the job close it, or keep it under a name",
        OTHER_ROOT: "a first process with another root directory (chroot); start the job from a shell that stays where it is",
        UNACCEPTED: "a connection within the job that the listener does not accept; accept the connection, or close either end",
        UNSENT: "a connection of its own, closed by one end, of which the other does not read all that was said; have it read that",
        PACKET_PIPE: "a pipe in packet mode (pipe2 with O_DIRECT); have the job use a socketpair(SOCK_SEQPACKET)",
        MESSAGE_QUEUE: "a POSIX message queue (mq_open, /dev/mqueue); have the job close it and mq_unlink it, or use another kind",
        CONTROLLING: "a shell on a pty of the container's own that has it open as /dev/tty, as dash does; use bash, which does not",
        SEMAPHORE: "an eventfd that is a semaphore (EFD_SEMAPHORE), which CRIU would make an ordinary one; use sem_open or semget",
        WATCHED: "a file that it watches with inotify and CRIU cannot find by its name; have it watch the directory instead",
        GUARDS: "guard pages (MADV_GUARD_INSTALL), which CRIU saves from 4.2 on",
    }
    old = min(numbers(node.criu) for node in (question.source, question.target) if node is not None) < GUARDING_CRIU
    if LIMITS in container.unsaved:
        yield NodeUnfit(
            "the source's agent may not read the resource limits of processes that are not root's",
            why="it has no CAP_SYS_RESOURCE, which prlimit(2) and so CRIU need for that",
            remedy="run the agent with all capabilities; where the node itself has not this one, run the job as root",
        )
    yield from _network(container, question.source)
    if SHARED_LOCK in container.unsaved:
        yield ContainerBound(
            "the container holds locks on files of a network file system",
            why="the file server refuses them to the restored job on the target as long as the frozen job holds them",
            remedy="try again when the job has released them; NFS keeps locks to the node where it is mounted with local_lock=all",
        )
    judged = {LIMITS, SOCKETS, CORKED, MPTCP, SHARED_LOCK} | (set() if old else {GUARDS})
    if lost := [one for one in container.unsaved if one not in judged and not one.startswith(INTERFACE)]:
        yield ContainerBound(
            "the container has something that CRIU cannot save",
            why=", ".join(unsaved.get(one, one) for one in lost),
            remedy="have the job close it, or run it without (for io_uring, most libraries have a switch)",
        )


def _network(container: ContainerFacts, source: NodeFacts) -> Iterator[Refused]:
    if SOCKETS in container.unsaved and numbers(source.criu) < SOCKETS_CRIU:
        yield NodeUnfit(
            "the source's CRIU cannot save TCP and UDP sockets on its kernel",
            why=f"CRIU {source.criu} asks them for SO_PASSCRED, which Linux 6.16 and later do not support (here {source.kernel})",
            remedy="install CRIU 4.2 or later there",
        )
    if CORKED in container.unsaved:
        yield ContainerBound(
            "the container has a UDP socket that is corked, which CRIU cannot save",
            why="it holds back a datagram until the job uncorks it (UDP_CORK)",
            remedy="try again when it has been sent, or have the job send without UDP_CORK",
        )
    if MPTCP in container.unsaved:
        yield ContainerBound(
            "the container has a socket for multipath TCP, which CRIU cannot save",
            why="programs in Go since 1.24 listen with such sockets unless they are told not to",
            remedy="run it with GODEBUG=multipathtcp=0 (Go), or set the sysctl net.mptcp.enabled to 0 in the pod (securityContext)",
        )
    if interfaces := [one.removeprefix(INTERFACE).strip() for one in container.unsaved if one.startswith(INTERFACE)]:
        yield ContainerBound(
            "the container has network interfaces of its own beside loopback",
            why=", ".join(interfaces),
            remedy="run it without them, or in a pod: there the network plugin makes them on the target",
        )


CHECKS: tuple[Callable[[Question], Iterator[Refused]], ...] = (
    _programs,
    _kernels,
    _selinux,
    _runtimes,
    _processors,
    _criu_generations,
    _clocks,
    _room,
    _bound,
)


def numbers(version: str) -> tuple[int, ...]:
    """A version's numbers, for comparing: `4.1.1` is (4, 1, 1)."""
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _nodes(question: Question) -> Iterator[tuple[str, NodeFacts]]:
    yield "source", question.source
    if question.target is not None:
        yield "target", question.target

"""Messages of CRIU's that end a dump or a restore: why, and what a person can do.

A list by hand from CRIU's sources (`READ_FROM`), the messages that public reports name most. What is not on it is told as CRIU says
it (`errors.UNEXPLAINED`), and counted. `like` is a message of each, as those sources have it. The list is searched from the top, so
it is one table, however long.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

READ_FROM = "4.2"
"""The version whose sources the messages were read from. Those of 4.1 are the same but for Go's hint about MPTCP."""


@dataclass(frozen=True)
class Cause:
    """A known cause. `{1}` in `why` and `remedy` is the first group of `pattern`."""

    pattern: re.Pattern[str]
    like: str
    why: str
    remedy: str


def _cause(pattern: str, like: str, why: str, remedy: str) -> Cause:
    return Cause(re.compile(pattern), like, why, remedy)


_CLOSE = "have the job close it before the migration"
_REPORT = "report it to podferry with the evidence: `check` should have said so"

CAUSES = (
    # Files that are none.
    _cause(
        r"anon_inode:\[io_uring\]|send_fds failed \(-22\)",  # since 6.7 the kernel does not even let it be handed over
        "Can't dump file 5 of that type [0] (unknown anon_inode:[io_uring])",
        "the job has an io_uring ring, which CRIU cannot save",
        "run the job without io_uring (for Node.js UV_USE_IO_URING=0)",
    ),
    _cause(
        r"Can't retrieve FD from socket",  # ETOOMANYREFS: RLIMIT_NOFILE bounds what a user has on its way in all of the machine
        "Can't retrieve FD from socket",
        "the kernel passes CRIU no descriptor of the job's, since processes of its user, on this node, have too many on "
        "their way over unix sockets (SCM_RIGHTS)",
        "migrate again; where it stays so, find who sends descriptors that nobody receives, or raise the job's limit of open files",
    ),
    _cause(
        r"anon_inode:\[userfaultfd\]",
        "Can't dump file 5 of that type [0] (unknown anon_inode:[userfaultfd])",
        "the job, or an agent that died while it tracked it, has a userfaultfd, which CRIU cannot save",
        "run the job without userfaultfd",
    ),
    _cause(
        r"of that type \[\w+\] \((?:chr|blk) (\S+)",
        "Can't dump file 7 of that type [20666] (chr 10:229)",
        "the job has device {1} open, which CRIU cannot save",
        "run the job without the device; CRIU has plugins for some GPUs",
    ),
    _cause(
        r"of that type \[\w+\] \(\S+ (.+)\)$",
        "Can't dump file 7 of that type [600] (unknown anon_inode:[perf_event])",
        "the job has {1} open, which CRIU cannot save",
        "run the job without it",
    ),
    _cause(
        r"packetized mode for pipes",
        "The packetized mode for pipes is not supported yet",
        "the job has a pipe in packet mode (O_DIRECT)",
        "have it use a socketpair(SOCK_SEQPACKET), or an ordinary pipe",
    ),
    _cause(
        r"Can't dump ghost file (\S+) of (\d+) size",
        "Can't dump ghost file /srv/x of 134217728 size, increase limit",
        "the job keeps the deleted file {1} of {2} bytes open, which is more than CRIU copies",
        "have the job close it, or keep it under a name in its root file system",
    ),
    _cause(
        r"Can't create link remap for|Can't link remap to (\S+)",
        "Can't link remap to srv/x",
        "a file is open under a name that is gone, and CRIU cannot give it another beside it",
        "use a volume that is writable and has hard links, or have the job close the file",
    ),
    _cause(
        r"Unaccessible path opened",
        "Unaccessible path opened 0:78, need 0:79",
        "the job has a file open whose name another file has by now",
        "have the job open the file again",
    ),
    _cause(
        r"The path \[(.*?)\] is not supported",
        "The path [proc/7/x] is not supported",
        "the job has {1} open, which CRIU cannot open again",
        _CLOSE,
    ),
    _cause(
        r"Can't dump that handle|Can't find suitable path for handle|Can't find path for .*inotify|irmap: Failed to resolve",
        "Can't dump that handle",
        "the job watches a file with inotify or fanotify, and CRIU cannot find the file's name",
        "do not watch what has been deleted, nor names with characters beyond letters, digits and ._+@:,=-",
    ),
    _cause(
        r"Some file locks are hold",
        "Some file locks are hold by dumping tasks! You can try --file-locks to dump them.",
        "the job holds file locks and the dump was asked for without --file-locks",
        "migrate with file locks allowed",
    ),
    _cause(
        r"Invalid file lease type|Incorrect lease type|Can't get lease type|Breaking lease",
        "Incorrect lease type",
        "the job holds a lease of a file (F_SETLEASE) that is being broken, or is of a kind that CRIU cannot restore",
        "have the job give up the lease",
    ),
    _cause(
        r"Sysv shmem \S+ with",
        "Sysv shmem 2a with a hole not supported",
        "a SysV shared memory segment is mapped in part only",
        "have the job map such segments whole",
    ),
    _cause(
        r"SysVIPC shmem map .* doesn't live in IPC ns",
        "Task 7 with SysVIPC shmem map @7f0000000000 doesn't live in IPC ns",
        "the container has SysV shared memory of its node's",
        "run it with an IPC namespace of its own (no hostIPC)",
    ),
    _cause(
        r"[Aa]io rings|aio iocbs",
        "Failed to check aio rings (pid: 7)",
        "the job has asynchronous I/O (io_setup) under way that CRIU cannot save",
        "run the job without Linux AIO, or with its requests finished",
    ),
    _cause(
        r"Process \d+ autofs pipe|autofs.*(?:not empty|fail)",
        "Process 7 autofs pipe fd 3 is not empty.",
        "the container mounts file systems by autofs",
        "mount nothing inside of the container",
    ),
    _cause(
        r"Control messages in queue|Unsupported scm|Can't find sender for",
        "Control messages in queue, not supported",
        "descriptors are on their way through a unix socket of the job's",
        "try again: they are there only until the other end reads",
    ),
    # Terminals.
    _cause(
        r"Found dangling tty|Found slave peer index|tty with sid",
        "Found dangling tty with sid 7 pgid 7 (pts) on peer fd 0.",
        "a process of the job has a terminal whose other end is outside of the container, as after `exec -it`",
        "end the `exec` or `attach` session, and let nothing that it started go on",
    ),
    _cause(
        r"ctty inheritance detected",
        "ctty inheritance detected sid/pgrp 7, no PTY peer with sid/pgrp needed",
        "a shell of the job's has its terminal open as /dev/tty, as dash does",
        "use bash, which does not, or let no interactive shell run",
    ),
    _cause(
        r"Don't have tty to inherit",
        "Don't have tty to inherit session from, aborting",
        "the job has its container's terminal as its controlling one",
        "run the container without a terminal (tty: false)",
    ),
    _cause(
        r"queued data overflow",
        "The tty (pts 0x7) queued data overflow 4096 bytes limit",
        "more is written to a terminal of the job's than CRIU reads back",
        "try again when its reader has caught up",
    ),
    _cause(
        r"session leader of .* is outside of its pid namespace",
        "A session leader of 7(7) is outside of its pid namespace",
        "a process of the job belongs to a session outside of the container, as after `exec`",
        "end the `exec` session first",
    ),
    _cause(
        r"The root process \d+ is not a session leader",
        "The root process 7 is not a session leader. Consider using --shell-job option",
        "the container's first process is in a session of somebody else",
        "start the container through containerd, without a terminal of the caller's",
    ),
    # Sockets.
    _cause(
        r"Unsupported proto (\d+) for socket",
        "Unsupported proto 262 for socket 7",
        "the job has a socket of the protocol {1}, which CRIU cannot save (262 is MPTCP, 132 SCTP)",
        "use TCP or UDP; for Go programs GODEBUG=multipathtcp=0",
    ),
    _cause(
        r"Can't dump corked dgram",
        "Can't dump corked dgram socket 7",
        "a UDP socket of the job's is corked",
        "try again: it is so only until its datagram is sent",
    ),
    _cause(
        r"In-flight connection|Found a closed in-flight socket|Non-empty write queue on an in-flight",
        "In-flight connection (l) for 7",
        "a connection waits at a listening socket of the job's for it to be accepted",
        "try again when the job has accepted its connections",
    ),
    _cause(
        r"unix: (?:Dangling connection|.*[Ee]xternal)|--ext-unix-sk|Can't dump half of stream unix connection|name-less external",
        "Can't dump half of stream unix connection. name: (null); peer name: (null)",
        "the job is connected to a unix socket whose other end is outside of the container",
        "close the connection before the migration, or do not mount the socket into the pod",
    ),
    _cause(
        r"Unix socket \d+ with(?:out| unreachable) peer",
        "Unix socket 7 without peer 8",
        "a unix socket of the job's is connected to one that CRIU cannot see",
        "close the connection before the migration",
    ),
    _cause(
        r"sockets: Can't get 1:(?:16|34) opt: Operation not supported",
        "sockets: Can't get 1:16 opt: Operation not supported",
        "the job has a TCP or UDP socket, which CRIU before 4.2 cannot save on Linux 6.16 and later",
        "install CRIU 4.2 or later",
    ),
    _cause(
        r"Connected TCP socket",
        "Connected TCP socket, consider using --tcp-established option.",
        "the job has an established TCP connection",
        "let the job close its connections first; they are not migrated yet",
    ),
    _cause(
        r"Can't dump \d+ inet socket|Unknown inet socket|Socket state \d+ obtained but expected",
        "Unknown inet socket 7 state 2",
        "a TCP connection of the job's was just being opened or closed",
        "try again",
    ),
    _cause(
        r"Failed to lock TCP connection|libsoccr_save",
        "Failed to lock TCP connection 7",
        "CRIU could not hold a TCP connection of the job's still",
        "see that the node has nft or iptables, and try again",
    ),
    _cause(
        r"[Uu]nable to dump a socket from an external network namespace|Unable to find a network namespace",
        "Unable to dump a socket from an external network namespace",
        "the job has a socket of another network namespace",
        _CLOSE,
    ),
    _cause(
        r"Can't bind (?:inet )?socket|Can't bind id|couldn't find ifindex for",
        "Can't bind inet socket (id 7)",
        "a socket of the job's is bound to an address or interface that the target has not",
        "have the job listen at 0.0.0.0 or ::",
    ),
    # Mounts and namespaces.
    _cause(
        r"Open files on overmounted|Can't lookup mount=|doesn't have a proper root mount|is overmounted so paths",
        "Open files on overmounted mounts are not supported yet; mount=7 fd=3 path=/x",
        "the job has a mount, or a file on one, that CRIU cannot describe",
        "do not mount over a path that the job has open, and mount nothing inside of the container",
    ),
    _cause(
        r"FS mnt (\S+) dev \S+ root \S+ unsupported id",
        "FS mnt ./x dev 0x26 root / unsupported id 7",
        "the container has mounted {1}, a file system that CRIU cannot mount again",
        "mount it from outside, as a volume",
    ),
    _cause(
        r"Mount \d+ (\S+) \(master_id|A few mount points can't be mounted|External slavery",
        "Mount 7 ./x (master_id: 3 shared_id: 0) has unreachable sharing. Try --enable-external-masters.",
        "a mount of the container receives mounts from the node (mountPropagation)",
        "use mountPropagation: None",
    ),
    _cause(
        r"Nested mount namespaces are not supported|Can't dump nested (\w+) namespace|Can't dump a pid namespace without",
        "Can't dump nested user namespace for 7",
        "a process of the job is in a namespace of its own",
        "run it without a sandbox of its own (Chromium: --no-sandbox; no nested containers)",
    ),
    _cause(
        r"Time namespaces are not supported",
        "Time namespaces are not supported",
        "the node's kernel has no time namespaces",
        "use a kernel with CONFIG_TIME_NS",
    ),
    # Processes.
    _cause(
        r"Unseizable non-zombie|SEIZE \d+: .*|[Uu]nable to seize|is already traced|has tracer",
        "Unseizable non-zombie 7 found, state S, err -1/1",
        "a process of the job is traced by another (a debugger, strace), or has just ended",
        "end the debugger, or try again",
    ),
    _cause(
        r"zombie \d+ \(comm (.*?)\) found while seizing|A root task is dead",
        "zombie 7 (comm cc1) found while seizing",
        "a process of the job has ended at this moment and nobody has asked for its status",
        "try again; where it stays so, have the parent wait for its children",
    ),
    _cause(
        r"Unable to freeze cgroup|Timeout reached|Unable to interrupt the current operation",
        "Timeout reached. Try to interrupt: 0",
        "a process of the job did not stop",
        "look for a process in uninterruptible sleep: often a file server that does not answer",
    ),
    _cause(
        r"Can't get rlimit \d+: Operation not permitted",
        "Can't get rlimit 7: Operation not permitted",
        "CRIU may not read the resource limits of a process that is not root's",
        "run the agent with all capabilities: this one is CAP_SYS_RESOURCE",
    ),
    _cause(
        r"has rseq but kernel lacks get_rseq_conf|unsupported RSEQ ABI|rseq_cs|Fixup rseq|fixup rseq|rseq: can't restore",
        "7 has rseq but kernel lacks get_rseq_conf feature",
        "the kernel does not tell CRIU of restartable sequences (glibc since 2.35 has them in each thread)",
        "use a kernel 5.13 or later, or run with GLIBC_TUNABLES=glibc.pthread.rseq=0",
    ),
    _cause(
        r"Can't infect \(pid|Can't dump misc|was killed by \d+ unexpectedly|Parasite failed|BUG: stack is not 16|Can't cure",
        "Can't infect (pid: 7) with parasite",
        "CRIU could not run its code in a process of the job",
        "look for seccomp filters or security modules that kill it; and in the evidence",
    ),
    _cause(
        r"failed to suspend seccomp|Can't collect seccomp|Unable to restore seccomp|seccomp.*(?:can't|failed)",
        "failed to suspend seccomp, restore will probably fail...",
        "the job has a seccomp filter that CRIU cannot suspend or read",
        "use a kernel with CONFIG_CHECKPOINT_RESTORE, and an agent with CAP_SYS_ADMIN",
    ),
    _cause(
        r"LSM specified but|Invalid selinux context|apparmor parsing failed|AA namespace|can't (?:write|set) lsm profile",
        "apparmor LSM specified but apparmor not supported by kernel",
        "the job has a profile of a security module (AppArmor, SELinux) that the target has not",
        "load the same profiles on both nodes",
    ),
    _cause(
        r"Groups above 32 are not supported",
        "Groups above 32 are not supported yet",
        "a process of the job has more groups than CRIU restores",
        "give it at most 32 supplementary groups",
    ),
    _cause(
        r"Conflict with a dead task|Can't fork for (\d+): File exists|Pid (\d+) do not match",
        "Pid 7 do not match expected 8",
        "a process id that the job has is taken on the target",
        "run the pod without shareProcessNamespace, and nothing else in its pid namespace",
    ),
    _cause(
        r"Can't restore sched|Inconsistent sched params|sched_setscheduler|Unable to set real-time",
        "Inconsistent sched params received (1.0.0)",
        "a thread's scheduler cannot be restored: SCHED_DEADLINE, or real time without CAP_SYS_NICE or bandwidth",
        "run the job with an ordinary scheduler",
    ),
    # Nodes.
    _cause(
        r"(?:tee|F_SETPIPE_SZ|resize).*Operation not permitted",
        "tee: 65536: Operation not permitted",
        "CRIU may not make its pipes large enough",
        "sysctl fs.pipe-max-size=4194304, or give the runtime CAP_SYS_RESOURCE",
    ),
    _cause(
        r"CPU (?:instruction )?capabilities do not match|CPU xsave .*mismatch|missing support fxsave|CPU xfeatures has unsupported",
        "CPU xfeatures has unsupported bits (0x600)",
        "the target's CPU lacks features that the job was started with",
        "choose a target with the same CPU model, or start jobs with a common set of features",
    ),
    _cause(
        r"CPU Feature .* not supported on host|Unsupported CPU vendor",
        "CPU Feature 3/8 not supported on host",
        "the target's CPU lacks features that the job was started with",
        "choose a target with the same CPU model",
    ),
    _cause(
        r"bad build-ID|has bad size|has bad mode|Can't open file (\S+) on restore",
        "File usr/bin/x has bad size 7 (expect 8)",
        "a file that the job has open is not the same on the target",
        "use the same image on both nodes, and volumes that both reach",
    ),
    _cause(
        r"vdso: .*(?:Can't|Failed)|Can't.*vdso|Failed to map vdso|Task had vdso, restorer doesn't",
        "Can't fixup vdso VMAs (pid: 7)",
        "this CRIU is too old for the kernel's vdso",
        "install CRIU 4.1 or later",
    ),
    _cause(
        r"No space left on device",
        "Can't write img: No space left on device",
        "the disk is full",
        "free space where the agent keeps its state",
    ),
    _cause(
        r"create_page_pipe: Can't allocate (\d+) bytes",
        "page-pipe: create_page_pipe: Can't allocate 34365462128 bytes",
        "CRIU's table of the job's address space would take {1} bytes: the job has reserved too much of it, used or not",
        "have the job reserve less (MariaDB 11.8 reserves 8 TiB unless it gets --innodb-buffer-pool-size-max)",
    ),
    _cause(
        r"Cannot allocate memory",
        "Can't fork for 7: Cannot allocate memory",
        "there is too little memory, or a limit on processes is reached",
        "free memory on the node, or raise the container's limits (memory, pids)",
    ),
    _cause(
        r"(?i)lazy.?pages.*(?:not supported|unsupported)|missing features|UFFD is not supported|Incompatible uffd API",
        "UFFD is not supported",
        "the kernel lacks what CRIU needs for lazy pages: userfaultfd",
        "use a kernel with CONFIG_USERFAULTFD, and set vm.unprivileged_userfaultfd or run as root",
    ),
    _cause(
        r"cgroupd: Can't move|Abort restore of existing cgroups|invalid cgroup configuration|Can't (?:create|open) cgroup",
        "cgroupd: Can't move thread 7 into cpu//x",
        "the job's control groups cannot be made on the target as they were",
        "use the same cgroup version and driver on both nodes, and no groups of the job's own",
    ),
    _cause(
        r"Aborting restore due to (\S+) script",
        "Aborting restore due to post-restore script ret code 1",
        "a script that CRIU ran before the job failed",
        _REPORT,
    ),
    _cause(
        r"read unixpacket \S*: EOF",  # what runc hears of a CRIU that is no more
        "read unixpacket @->@: EOF",
        "CRIU died in the middle of it",
        "see the last lines of its log, and whether the image's files can be read: their share may not answer",
    ),
)

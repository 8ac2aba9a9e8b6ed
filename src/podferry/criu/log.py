"""CRIU's log made readable: the lines that explain a failure, and for known causes the reason and the remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from podferry.errors import EVIDENCE_LINES, PodferryError
from podferry.node.process import last_lines

E = TypeVar("E", bound=PodferryError)

_HARMLESS = re.compile(r"RLIMIT_NOFILE|Dumping FAILED|Restoring FAILED|No parent image found, though")
_ERROR_LINE = re.compile(r"\b(Error|Warn) +\(")
_LOG_TAIL = 1 << 20  # bytes; at the log level of criu.conf a log is far smaller


@dataclass(frozen=True)
class Cause:
    """A known cause: what its line in the log looks like, why that stops CRIU, and what a person can do."""

    pattern: re.Pattern[str]
    why: str
    remedy: str


def _cause(pattern: str, why: str, remedy: str) -> Cause:
    return Cause(re.compile(pattern), why, remedy)


# The texts are those of CRIU 4.1 and 4.2. `{1}` is the first group of the pattern.
CAUSES = (
    _cause(
        r"anon_inode:\[io_uring\]|send_fds failed \(-22\)",  # since 6.7 the kernel does not even let it be handed over
        "the job has an io_uring ring, which CRIU cannot save",
        "run the job without io_uring (for Node.js UV_USE_IO_URING=0)",
    ),
    _cause(
        r"anon_inode:\[userfaultfd\]",
        "the job, or an agent that died while it tracked it, has a userfaultfd, which CRIU cannot save",
        "run the job without userfaultfd",
    ),
    _cause(
        r"of that type \[\w+\] \((?:chr|blk) (\S+)",
        "the job has device {1} open, which CRIU cannot save",
        "run the job without the device; CRIU has plugins for some GPUs",
    ),
    _cause(
        r"of that type \[\w+\] \(\S+ (.+)\)$",
        "the job has {1} open, which CRIU cannot save",
        "run the job without it",
    ),
    _cause(
        r"unix: (?:Dangling connection|.*[Ee]xternal)|--ext-unix-sk",
        "the job is connected to a unix socket whose other end is outside of the container",
        "close the connection before the migration, or do not mount the socket into the pod",
    ),
    _cause(
        r"sockets: Can't get 1:(?:16|34) opt: Operation not supported",
        "the job has a TCP or UDP socket, which CRIU before 4.2 cannot save on Linux 6.16 and later",
        "install CRIU 4.2 or later",
    ),
    _cause(
        r"Connected TCP socket",
        "the job has an established TCP connection",
        "let the job close its connections first; they are not migrated yet",
    ),
    _cause(
        r"Can't dump that handle|Can't find suitable path for handle|Can't find path for .*inotify",
        "the job watches a file with inotify or fanotify, and CRIU cannot find the file's name",
        "allow CRIU to look for it: `irmap-scan-path DIR` in /etc/criu/runc.conf, or do not watch deleted files",
    ),
    _cause(
        r"Some file locks are hold",
        "the job holds file locks and the dump was asked for without --file-locks",
        "migrate with file locks allowed",
    ),
    _cause(
        r"Can't dump ghost file (\S+) of (\d+) size",
        "the job keeps the deleted file {1} of {2} bytes open, which is more than CRIU copies",
        "raise `ghost-limit` in /etc/criu/runc.conf",
    ),
    _cause(
        r"Can't create link remap for",
        "the job keeps a file open that was renamed or unlinked",
        "put `link-remap` into /etc/criu/runc.conf",
    ),
    _cause(
        r"Open files on overmounted|Can't lookup mount=|doesn't have a proper root mount",
        "the job has a mount, or a file on one, that CRIU cannot describe",
        "do not mount over a path that the job has open, and mount nothing inside of the container",
    ),
    _cause(
        r"(?:tee|F_SETPIPE_SZ|resize).*Operation not permitted",
        "CRIU may not make its pipes large enough",
        "sysctl fs.pipe-max-size=4194304, or give the runtime CAP_SYS_RESOURCE",
    ),
    _cause(
        r"Can't get rlimit \d+: Operation not permitted",
        "CRIU may not read the resource limits of a process that is not root's",
        "run the agent with all capabilities: this one is CAP_SYS_RESOURCE",
    ),
    _cause(
        r"Unable to freeze cgroup",
        "a process of the job did not stop",
        "look for a process in uninterruptible sleep: often a file server that does not answer",
    ),
    _cause(
        r"CPU (?:instruction )?capabilities do not match|CPU xsave .*mismatch|missing support fxsave",
        "the target's CPU lacks features that the job was started with",
        "choose a target with the same CPU model, or start jobs with a common set of features",
    ),
    _cause(
        r"bad build-ID|has bad size|Can't open file (\S+) on restore",
        "a file that the job has open is not the same on the target",
        "use the same image on both nodes, and volumes that both reach",
    ),
    _cause(
        r"session leader of .* is outside of its pid namespace",
        "a process of the job belongs to a session outside of the container, as after `exec`",
        "end the `exec` session first",
    ),
    _cause(
        r"vdso: .*(?:Can't|Failed)|Can't.*vdso",
        "this CRIU is too old for the kernel's vdso",
        "install CRIU 4.1 or later",
    ),
    _cause(
        r"No space left on device",
        "the disk is full",
        "free space where the agent keeps its state",
    ),
    _cause(
        r"(?i)lazy.?pages.*(?:not supported|unsupported)|missing features",
        "the kernel lacks what CRIU needs for lazy pages: userfaultfd",
        "use a kernel with CONFIG_USERFAULTFD, and set vm.unprivileged_userfaultfd or run as root",
    ),
    _cause(
        r"read unixpacket \S*: EOF",  # what runc hears of a CRIU that is no more
        "CRIU died in the middle of it",
        "see the last lines of its log, and whether the image's files can be read: their share may not answer",
    ),
)


def error_lines(log: Path) -> list[str]:
    """The lines of a CRIU log that report errors and warnings, the last 20; the log's last lines where none tells anything."""
    lines = last_lines(log, _LOG_TAIL // 200)
    errors = [line for line in lines if _ERROR_LINE.search(line)]
    telling = [line for line in errors if not _HARMLESS.search(line)]
    return (errors if telling else lines)[-EVIDENCE_LINES:]


def explained(kind: type[E], what: str, log: Path, *, said: list[str] | None = None) -> E:
    """An error of `kind` with the reason that CRIU's `log`, or what runc `said`, gives for it."""
    evidence = error_lines(log) + [line for line in said or [] if line]
    for cause in CAUSES:
        for line in evidence:
            if found := cause.pattern.search(line):
                groups = ["", *(group or "" for group in found.groups())]
                return kind(what, why=cause.why.format(*groups), remedy=cause.remedy, evidence=evidence)
    errors = [line for line in evidence if "Error (" in line and not _HARMLESS.search(line)]
    why = (errors or said or evidence or ["it left no log"])[0]
    return kind(what, why=why, evidence=evidence)  # the log itself goes with what was tried

"""CRIU's log made readable: the lines that explain a failure, and for known causes the reason and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from podferry.core.host import NO_UDP_LITE_REMEDY, NO_UDP_LITE_WHY
from podferry.criu.causes import CAUSES
from podferry.errors import EVIDENCE_LINES, UNEXPLAINED, PodferryError
from podferry.node.process import last_lines

E = TypeVar("E", bound=PodferryError)

_HARMLESS = re.compile(r"RLIMIT_NOFILE|Dumping FAILED|Restoring FAILED|No parent image found, though")
_NO_UDP_LITE = "IPPROTO_UDPLITE: -2"
"""What CRIU says, as no error, where the kernel lists no sockets of that protocol (criu/sockets.c, `collect_err`)."""
_ERROR_LINE = re.compile(r"\b(Error|Warn) +\(")
_LOG_TAIL = 1 << 20  # bytes; at the log level of criu.conf a log is far smaller


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
                return kind(what, why=cause.why.format(*groups), remedy=cause.remedy.format(*groups), evidence=evidence)
    errors = [line for line in evidence if "Error (" in line and not _HARMLESS.search(line)]
    why = (said or evidence or ["it left no log"])[0]
    if errors:
        why = UNEXPLAINED + errors[0].strip()
    elif any(_NO_UDP_LITE in line for line in evidence):
        return kind(what, why=NO_UDP_LITE_WHY, remedy=NO_UDP_LITE_REMEDY, evidence=evidence)
    return kind(what, why=why, evidence=evidence)  # the log itself goes with what was tried

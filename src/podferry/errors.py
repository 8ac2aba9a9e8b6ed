"""Errors that say what happened, why, and what to do, under codes that do not change.

Every error a user can meet is a `PodferryError`. Its `code` is a contract: scripts match on it, the wire carries
it, and a test holds the list. Three families tell a caller what a retry would bring:

- `Refused`: a precondition does not hold; nothing was touched. Retry after the remedy.
- `Failed`: something outside us broke (a tool, a peer, a disk). A retry may help.
- `Bug`: we broke our own rules. A retry will not help; the report should reach us.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

UNEXPLAINED = "CRIU gives a reason that podferry has no remedy for: "
"""How the reason of an error begins where CRIU's message is not on our list of them."""
EVIDENCE_LINES = 20


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors themselves, out of the groups that tasks wrap them in."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error


class PodferryError(Exception):
    """What happened, why, what to do about it, and the lines of the log that show it.

    `code` is stable and unique to a kind of error; `what` is one sentence without a full stop; `why` and `remedy` may
    be empty; `evidence` holds the last lines of the log that explains it.
    """

    code: ClassVar[str] = "PF000"
    _codes: ClassVar[dict[str, type[PodferryError]]] = {}

    def __init__(self, what: str, *, why: str = "", remedy: str = "", evidence: list[str] | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.remedy = remedy
        self.evidence = list(evidence or [])[-EVIDENCE_LINES:]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "code" in cls.__dict__:
            if cls.code in cls._codes:
                raise TypeError(f"{cls.__name__} repeats the code {cls.code} of {cls._codes[cls.code].__name__}")
            cls._codes[cls.code] = cls

    def __str__(self) -> str:
        return self.what if not self.why else f"{self.what}: {self.why}"

    def report(self) -> str:
        """The error as a person reads it, several lines."""
        lines = [f"{self} [{self.code}]"]
        lines += [f"  | {line}" for line in self.evidence]
        if self.remedy:
            lines.append(f"  what to do: {self.remedy}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The error as JSON carries it; `from_dict` is its inverse."""
        return {
            "code": self.code,
            "what": self.what,
            "why": self.why,
            "remedy": self.remedy,
            "evidence": self.evidence,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PodferryError:
        """Rebuild an error that crossed a socket. One of a kind that is not loaded here keeps its code and its family."""
        code = str(data.get("code", ""))
        kind = PodferryError._codes.get(code) or {"PF1": Refused, "PF9": Bug}.get(code[:3], Failed)
        evidence = [str(line) for line in data.get("evidence", [])]
        error = kind(
            str(data.get("what", "unnamed error")),
            why=str(data.get("why", "")),
            remedy=str(data.get("remedy", "")),
            evidence=evidence,
        )
        if code and kind.code != code:
            error.code = code  # type: ignore[misc]
        return error

    @classmethod
    def because(cls, what: str, cause: BaseException, *, remedy: str = "") -> Self:
        """An error of this kind whose reason is `cause`, or the first of a group of them; its evidence and remedy come along."""
        cause = next(leaves(cause))
        if isinstance(cause, PodferryError):
            return cls(what, why=str(cause), remedy=remedy or cause.remedy, evidence=cause.evidence)
        return cls(
            what,
            why=f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__,
            remedy=remedy,
        )


class Refused(PodferryError):
    """A precondition does not hold; nothing was touched."""

    code = "PF100"


class UsageError(Refused):
    """The request itself makes no sense: an unknown name, a bad option, no root."""

    code = "PF101"


class Failed(PodferryError):
    """Something outside us broke."""

    code = "PF200"


class CommandFailed(Failed):
    """A command ended badly. `argv` and `returncode` say which and how."""

    code = "PF201"

    def __init__(
        self,
        what: str,
        *,
        why: str = "",
        remedy: str = "",
        evidence: list[str] | None = None,
        argv: list[str] | None = None,
        returncode: int | None = None,
    ) -> None:
        super().__init__(what, why=why, remedy=remedy, evidence=evidence)
        self.argv = argv or []
        self.returncode = returncode


class PeerLost(Failed):
    """The connection to the peer ended in the middle."""

    code = "PF210"


class PeerUntrusted(Failed):
    """The peer is not who the migration names: wrong certificate, authority or name."""

    code = "PF211"


class PeerMisbehaved(Failed):
    """The peer sent what the protocol does not allow. Nothing of it was used."""

    code = "PF212"


class Cancelled(Failed):
    """Somebody asked for the migration to stop."""

    code = "PF220"


class TimedOut(Failed):
    """A deadline passed."""

    code = "PF221"


class Bug(PodferryError):
    """One of our own rules does not hold."""

    code = "PF900"


class InvariantBroken(Bug):
    """A numbered rule (I1 to I7) is broken or would be by the next step."""

    code = "PF901"

"""The things podferry talks about, as frozen values. No behaviour beyond what a value knows of itself."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """How memory moves.

    `stop` freezes first and copies then: the baseline. `live` copies while the job runs and freezes for the last dirty
    pages. `postcopy` cuts over at once and fetches pages from the frozen source.
    """

    STOP = "stop"
    LIVE = "live"
    POSTCOPY = "postcopy"


class Connections(StrEnum):
    """What a move may do to connections whose other end stays: `Close` them, or nothing: `Require` refuses the move. `Preserve`, of
    pods alone, has those to pods on nodes with an agent live on, and closes the others."""

    CLOSE = "Close"
    PRESERVE = "Preserve"
    REQUIRE = "Require"


class Dump(StrEnum):
    """What CRIU's dump did not have to do while the job stood still; the values are part of the JSON contract.

    `ordinary`: nothing. `prepared`: runc was started before the freeze. `memory-skipping`: that, and CRIU skipped
    private memory, which stays where it is. Records of 0.1 call it `thin`.
    """

    ORDINARY = "ordinary"
    PREPARED = "prepared"
    MEMORY_SKIPPING = "memory-skipping"


class Outcome(StrEnum):
    """How a migration ended; the values are part of the JSON contract. `rehearsed`: it was a rehearsal, and
    nothing speaks against a move; the job runs on where it was."""

    COMPLETED = "completed"
    REFUSED = "refused"
    ROLLED_BACK = "rolled-back"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REHEARSED = "rehearsed"

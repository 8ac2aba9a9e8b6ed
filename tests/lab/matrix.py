"""The situations of `jobs/situations.py`, and what becomes of each when it is to move. docs/what-moves.md is made of this list."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Situation:
    """`name` is the function in `jobs/situations.py`, `what` what a reader of the docs would call it.

    It moves, unless `refused` names a part of what `check` says against it; `remedy` is then what to do, for the docs. With
    `sockets` it needs a CRIU that saves TCP and UDP sockets on the kernel it runs on, and is refused where there is none.
    """

    name: str
    what: str
    refused: str = ""
    remedy: str = ""
    sockets: bool = False


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

MEMORY = (Situation("shared_mappings_by_the_thousand", "6000 shared anonymous mappings"),)

PROCESSES = (Situation("starts_programs_all_the_time", "threads that start programs, one after another"),)

NETWORK = (
    Situation(
        "network_namespace_as_it_was", "interfaces, flags, addresses, routes and settings of the network namespace"
    ),
    Situation("loopback_listener", "a listening socket on 127.0.0.1 that is talked to now and then", sockets=True),
    Situation(
        "mptcp_listener",
        "a listening socket for multipath TCP (Go since 1.24)",
        refused="multipath TCP",
        remedy="GODEBUG=multipathtcp=0, or the sysctl net.mptcp.enabled=0 in the pod's securityContext",
    ),
)

SITUATIONS = (*TIMERS, *MEMORY, *PROCESSES, *NETWORK)

"""What is decided without I/O: when to stop copying, what may move, which rules hold, what is taken back."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.core.facts import Bind, CgroupKind, ContainerFacts, NodeFacts, RuntimeKind
from podferry.core.invariants import Sight, broken
from podferry.core.phases import SOURCE_MAY_RUN, TARGET_MAY_RUN, SourcePhase, TargetPhase
from podferry.core.precopy import PAGE, PreCopyPolicy, Round, Step, decide, link_rate, rest
from podferry.core.preflight import Question, refusals, warnings
from podferry.core.undo import Acquired, Ledger
from podferry.errors import Failed
from podferry.model import Mode
from podferry.workload.inspected import View

pytestmark = pytest.mark.unit
LINK = 118e6


def rounds(*left: float, first: float = 1000) -> list[Round]:
    """Rounds that left so many MB, each sending what the one before left, over a link of 118 MB/s."""
    sent = [first, *left]
    return [
        Round(n + 1, int(sent[n] * 1e6 / PAGE), int(sent[n] * 1e6), sent[n] * 1e6 / LINK, int(pending * 1e6))
        for n, pending in enumerate(left)
    ]


STEADY = (900, 910, 905, 900, 910, 905)
NEITHER = PreCopyPolicy(throttle=False)


@pytest.mark.parametrize(
    ("left", "quota", "policy", "step", "kept"),
    [
        ((5,), 1.0, PreCopyPolicy(), Step.CUT_OVER, 1.0),
        ((450, 190), 1.0, PreCopyPolicy(), Step.GO_ON, 1.0),
        ((60, 20, 9, 30, 8), 1.0, PreCopyPolicy(), Step.GO_ON, 1.0),
        ((60, 20, 9, 10, 9, 9, 10, 9), 1.0, PreCopyPolicy(), Step.THROTTLE, 0.556),
        ((1000,), 1.0, PreCopyPolicy(), Step.GO_ON, 1.0),
        ((1000, 1000), 1.0, PreCopyPolicy(), Step.THROTTLE, 0.2),
        ((930, 850), 1.0, PreCopyPolicy(), Step.THROTTLE, 0.547),
        ((930, 850), 0.05, PreCopyPolicy(), Step.GO_ON, 0.05),
        (STEADY, 0.05, PreCopyPolicy(), Step.GIVE_UP, 0.05),
        (STEADY, 1.0, PreCopyPolicy(throttle=False, postcopy=True), Step.POSTCOPY, 1.0),
        (STEADY, 1.0, NEITHER, Step.GIVE_UP, 1.0),
        ((900, 910, 20, 700, 800), 1.0, NEITHER, Step.GO_ON, 1.0),
        ((*range(300, 0, -10),), 1.0, PreCopyPolicy(max_downtime=0.01, throttle=False), Step.GIVE_UP, 1.0),
    ],
)
def test_the_table_of_examples(
    left: tuple[float, ...], quota: float, policy: PreCopyPolicy, step: Step, kept: float
) -> None:
    decision = decide(rounds(*left), policy, rate=LINK, quota=quota)
    assert (decision.step, decision.quota) == (step, kept)
    assert decision.reason


def test_the_rate_of_the_link_is_that_of_the_last_rounds_of_any_size() -> None:
    fast, slow, tiny = (Round(1, pages, 0, seconds, 0) for pages, seconds in ((100_000, 1.0), (10_000, 1.0), (10, 0.1)))
    assert link_rate([]) == link_rate([tiny]) == 0
    assert link_rate([fast]) == 100_000 * PAGE
    assert link_rate([fast, slow, tiny, slow, tiny, slow, tiny]) == 10_000 * PAGE
    assert link_rate([fast, slow, slow]) == 40_000 * PAGE


def test_a_rest_is_as_long_as_little_is_written_in_it() -> None:
    idle, busy, storm = (Round(1, 10, 0, 0.5, int(rate * 0.5e6)) for rate in (0, 50, 5000))
    assert rest([], LINK) == rest([idle], LINK) == 1.0
    assert rest([busy], LINK) == pytest.approx(0.236)
    assert rest([storm], LINK) == 0.05


def test_what_was_written_in_a_rest_is_not_taken_for_more() -> None:
    assert Round(1, 1, 1, 0.5, 100, rested=0.5).dirty_rate == 100


@given(st.integers(0, 1 << 32), st.booleans(), st.booleans(), st.floats(0, 1e10))
def test_whatever_the_job_does_copying_ends(seed: int, throttle: bool, postcopy: bool, rate: float) -> None:
    """As the source asks: about the rounds since the job was slowed down last."""
    policy, quota, seen, job = PreCopyPolicy(throttle=throttle, postcopy=postcopy), 1.0, [], Random(seed)
    largest = job.randint(1, 34)
    for number in range(1, 601):
        pages, pending = (1 << job.randint(0, 22)), job.randrange(1 << largest)
        seen.append(Round(number, pages, 1, 1.0, pending))
        decision = decide(seen, policy, rate=rate, quota=quota)
        assert (decision.quota < quota) == (decision.step is Step.THROTTLE)
        if decision.step is Step.THROTTLE:
            quota, seen = decision.quota, []
        if decision.step in (Step.CUT_OVER, Step.GIVE_UP, Step.POSTCOPY):
            return
    pytest.fail("it never ended")


NODE = NodeFacts(
    kernel="6.18.0",
    machine="x86_64",
    page_size=4096,
    boot="b",
    cpus=2,
    cpu_model="m",
    cpu_flags=("avx", "sse"),
    criu="4.1.1",
    runc="1.1.15",
    runtime=RuntimeKind.CONTAINERD,
    runtime_version="1.7.0",
    cgroup=CgroupKind.V2,
    memory_available=8 << 30,
    disk_free=8 << 30,
    run_free=8 << 30,
    lazy_pages=True,
    pagemap_scan=True,
    wp_async=True,
    soft_dirty=False,
    memory_skipping_dump=True,
    pipe_max_size=4 << 20,
    clock=1000.0,
    selinux=False,
)
JOB = ContainerFacts(
    id="job",
    image="i",
    binary="/usr/bin/podferry-runc",
    pids=(1,),
    host_namespaces=(),
    devices=(),
    unsaved=(),
    binds=(Bind("/var/lib/kubelet/x", "/etc/hosts"),),
    connections=(),
    stdio=("null",) * 3,
    memory=1 << 30,
    anonymous=1 << 30,
    shared=0,
    tmpfs=0,
    upper=1 << 20,
)


def test_what_fits_may_move() -> None:
    for mode in Mode:
        assert refusals(Question(JOB, NODE, NODE, mode)) == []
        assert refusals(Question(JOB, NODE, None, mode)) == []


@pytest.mark.parametrize(
    ("job", "source", "target", "code"),
    [
        ({}, {"criu": ""}, {}, "PF110"),
        ({}, {"criu": "3.17"}, {"criu": "4.1"}, "PF110"),
        ({}, {"kernel": "7.1.0-rc1", "criu": "4.2.1"}, {"criu": "4.2.1"}, "PF110"),
        ({}, {"kernel": "7.2.12+deb14-amd64"}, {}, "PF110"),
        ({}, {}, {"runc": "1.0.3"}, "PF110"),
        ({}, {}, {"lazy_pages": False}, "PF110"),
        ({}, {"wp_async": False}, {}, "PF110"),
        ({}, {"pipe_max_size": 1 << 20}, {}, "PF110"),
        ({}, {"selinux": True}, {}, "PF110"),
        ({}, {}, {"selinux": True}, "PF110"),
        ({}, {}, {"machine": "aarch64"}, "PF111"),
        ({}, {}, {"page_size": 65536}, "PF111"),
        ({}, {}, {"cpu_flags": ("sse",)}, "PF111"),
        ({}, {"criu": "4.2.1"}, {}, "PF111"),
        ({}, {}, {"clock": 1061.0}, "PF111"),
        ({}, {"runtime": RuntimeKind.CRIO}, {}, "PF111"),
        ({}, {}, {"runtime": RuntimeKind.CRIO}, "PF111"),
        ({}, {}, {"memory_available": 1 << 30}, "PF112"),
        ({}, {}, {"disk_free": 1 << 20}, "PF112"),
        ({}, {}, {"run_free": 800 << 20}, "PF112"),
        ({"host_namespaces": ("network",)}, {}, {}, "PF113"),
        ({"devices": ("/dev/nvidia0",)}, {}, {}, "PF113"),
        ({"binds": (Bind("/data", "/data"),)}, {}, {}, "PF113"),
        ({"unsaved": ("io_uring",)}, {}, {}, "PF113"),
        ({"unsaved": ("internet sockets",)}, {}, {}, "PF110"),
        ({"unsaved": ("corked UDP socket",)}, {}, {}, "PF113"),
        ({"unsaved": ("MPTCP socket",)}, {}, {}, "PF113"),
        ({"unsaved": ("lock on a network file system",)}, {}, {}, "PF113"),
        ({"unsaved": ("SCTP socket",)}, {}, {}, "PF113"),
        ({"unsaved": ("network interface eth0",)}, {}, {}, "PF113"),
        ({"unsaved": ("limits of other users",)}, {}, {}, "PF110"),
        ({"unsaved": ("guard pages",)}, {"criu": "4.1.1"}, {"criu": "4.2.1"}, "PF113"),
    ],
)
def test_what_does_not_fit_is_refused(
    job: dict[str, Any], source: dict[str, Any], target: dict[str, Any], code: str
) -> None:
    question = Question(replace(JOB, **job), replace(NODE, **source), replace(NODE, **target), Mode.LIVE)
    found = refusals(question)
    assert [one.code for one in found] == [code]
    assert all(one.what and one.remedy for one in found)


def test_a_kernel_without_udp_lite_is_no_obstacle_to_a_late_criu_or_to_a_target() -> None:
    late, old = replace(NODE, kernel="7.2.0", criu="4.3"), replace(NODE, kernel="7.2.0")
    assert refusals(Question(JOB, late, late, Mode.LIVE)) == []
    assert refusals(Question(JOB, NODE, old, Mode.LIVE)) == []
    [refused] = refusals(Question(JOB, old, None, Mode.LIVE))
    assert "UDP-Lite" in refused.why
    assert "CRIU 4.3" in refused.remedy


def test_guard_pages_move_where_criu_saves_them() -> None:
    new = replace(NODE, criu="4.2")
    guarded = replace(JOB, unsaved=("guard pages",))
    assert refusals(Question(guarded, new, new, Mode.LIVE)) == []
    assert [one.code for one in refusals(Question(guarded, NODE, None, Mode.LIVE))] == ["PF113"]
    assert (
        "io_uring" in refusals(Question(replace(JOB, unsaved=("guard pages", "io_uring")), new, new, Mode.LIVE))[0].why
    )


def test_internet_sockets_move_where_criu_saves_them() -> None:
    new, job = replace(NODE, criu="4.2"), replace(JOB, unsaved=("internet sockets",))
    assert refusals(Question(job, new, new, Mode.LIVE)) == []


def test_connections_to_others_are_told_and_do_not_stand_in_the_way() -> None:
    question = Question(replace(JOB, connections=("10.0.0.5:1 -> 10.0.0.9:80",)), NODE, NODE, Mode.LIVE)
    assert refusals(question) == []
    assert "10.0.0.5:1 -> 10.0.0.9:80" in " ".join(warnings(question))
    assert not any("connections" in one for one in warnings(Question(JOB, NODE, NODE, Mode.LIVE)))


def test_every_reason_is_said_at_once() -> None:
    job = replace(JOB, devices=("/dev/x",), unsaved=("MPTCP socket",), anonymous=1 << 40)
    assert [one.code for one in refusals(Question(job, NODE, NODE, Mode.LIVE))] == ["PF112", "PF113", "PF113"]


def test_a_container_without_a_cpu_controller_moves_and_that_is_said() -> None:
    seen: Any = {"offered": None, "tracker": None}
    member: Any = SimpleNamespace(why_unthrottled="the container has no cpu controller: /sys/fs/cgroup/x")
    view = View("job", (member,), facts=JOB, node=NODE, **seen)
    [told] = view.warnings(Mode.LIVE, NODE)
    assert "no cpu controller" in told and "/sys/fs/cgroup/x" in told
    assert view.warnings(Mode.STOP, NODE) == replace(view, members=()).warnings(Mode.LIVE, NODE) == []
    assert refusals(view.question(Mode.LIVE, NODE)) == []


def test_much_memory_in_pipes_is_worth_knowing() -> None:
    for size, thin, told in ((1 << 30, False, 0), (3 << 30, True, 0), (3 << 30, False, 1)):
        question = Question(replace(JOB, anonymous=size), replace(NODE, memory_skipping_dump=thin), NODE, Mode.LIVE)
        assert len(warnings(question)) == told


def test_stop_needs_no_tracker() -> None:
    blind = replace(NODE, wp_async=False, pagemap_scan=False)
    assert refusals(Question(JOB, blind, NODE, Mode.STOP)) == []


@pytest.mark.parametrize("phase", [*SourcePhase, *TargetPhase])
def test_where_the_job_may_execute(phase: SourcePhase | TargetPhase) -> None:
    allowed = SOURCE_MAY_RUN if isinstance(phase, SourcePhase) else TARGET_MAY_RUN
    assert broken(Sight(phase)) == []
    rules = broken(Sight(phase, executing=True))
    assert [rule[:2] for rule in rules] == ([] if phase in allowed else ["I1"])


def test_a_cold_start_and_what_is_left_are_broken_rules() -> None:
    assert broken(Sight(TargetPhase.FILL, executing=True, restored=False))[0].startswith("I2")
    assert broken(Sight(TargetPhase.DONE, ended=True, ledger=("task",)))[0].startswith("I5")
    assert broken(Sight(TargetPhase.FILL, ledger=("task",))) == []


def test_a_ledger_is_taken_back_newest_first_through_every_error() -> None:
    order = []

    async def take(facts: Any) -> None:
        order.append(facts["n"])
        if facts["n"] == 2:
            raise Failed("not now")

    ledger = Ledger([Acquired("a", {"n": 1})])
    ledger.add("b", {"n": 2})
    ledger.add("c", {"n": 3})
    ledger.add("a", {"n": 4})
    ledger.add("unknown", {})
    leftovers = anyio.run(ledger.unwind, {"a": take, "b": take, "c": take})
    assert order == [4, 3, 2]
    assert {one.kind for one in leftovers} == {"b", "unknown"}
    assert [entry.kind for entry in ledger.entries] == ["b", "unknown"]  # for another try


FOR_PROGRAMS = (
    "fpu",
    "tsc",
    "cx16",
    "sse4_2",
    "avx",
    "avx2",
    "avx512f",
    "bmi2",
    "aes",
    "sha_ni",
    "xsave",
    "xsavec",
    "fsgsbase",
    "rdtscp",
)
SAME_PROCESSOR = [
    ("constant_tsc nonstop_tsc tsc_known_freq arat", "a hypervisor that shows the clock"),
    ("ibrs ibpb stibp ssbd md_clear flush_l1d arch_capabilities", "other microcode"),
    ("vmx ept vpid tpr_shadow flexpriority", "nested virtualisation"),
    ("hypervisor cpuid_fault xtopology rep_good nopl", "another kernel"),
    ("hwp hwp_epp dtherm ida pln pts acpi est tm2", "what firmware does with power"),
]


@pytest.mark.parametrize(("flags", "why"), SAME_PROCESSOR)
def test_what_no_program_uses_does_not_part_equal_processors(flags: str, why: str) -> None:
    source = replace(NODE, cpu_flags=(*FOR_PROGRAMS, *flags.split()))
    assert refusals(Question(JOB, source, replace(NODE, cpu_flags=FOR_PROGRAMS), Mode.LIVE)) == [], why


@pytest.mark.parametrize("flag", FOR_PROGRAMS)
def test_an_instruction_that_the_target_has_not_parts_them(flag: str) -> None:
    source, target = replace(NODE, cpu_flags=FOR_PROGRAMS), tuple(one for one in FOR_PROGRAMS if one != flag)
    (refused,) = refusals(Question(JOB, source, replace(NODE, cpu_flags=target), Mode.LIVE))
    assert flag in refused.why


def test_a_feature_that_is_not_known_here_counts() -> None:
    source = replace(NODE, cpu_flags=(*FOR_PROGRAMS, "amx_quux"))
    assert refusals(Question(JOB, source, replace(NODE, cpu_flags=FOR_PROGRAMS), Mode.LIVE))

"""The session's table: both ends agree whatever crosses on the way, and nothing illegal changes anything."""

from __future__ import annotations

import hashlib
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.errors import Bug, Failed, PeerMisbehaved
from podferry.model import Mode
from podferry.wire.document import render, shape
from podferry.wire.frames import PAGE, Drop, File, Pages, Tree
from podferry.wire.messages import (
    PROTOCOL,
    SOURCE_MESSAGES,
    TARGET_MESSAGES,
    Abort,
    Accept,
    Crashed,
    Done,
    ErrorReport,
    Filled,
    GaveUp,
    Go,
    MovedConnection,
    Offer,
    PageRequest,
    PagesEnd,
    PagesLost,
    PrepareTarget,
    Progress,
    Query,
    Ready,
    Refuse,
    Restoring,
    RoundAck,
    RoundEnd,
    Running,
    StateEnd,
    StatePart,
    TargetPrepared,
    Translate,
    Translated,
    Unknown,
)
from podferry.wire.session import DATA, GONE_STATES, MEANING, TABLE, Event, EventType, Role, Session, SessionState

pytestmark = pytest.mark.unit

M = "m-1"
REPORT = ErrorReport.of(Failed("no"))
SAMPLES: dict[EventType, Event] = {
    type(event): event
    for event in (
        Pages(1, 1, ((0, 1),), bytes(PAGE)),
        Drop(1, ((0, PAGE),)),
        Tree(0, b"x"),
        File(0, "a", 0, b"x", True),
        Offer(M, "job", Mode.LIVE, {}, {}, 1, 1),
        RoundEnd(1, 1, 1),
        StatePart(M, (), ()),
        StateEnd(M, (), (), ()),
        PagesEnd(M, ()),
        PagesLost(M),
        Abort(M, "no"),
        Refuse(M, (REPORT,)),
        Accept(M, {}),
        RoundAck(1),
        Running(M, 1),
        PageRequest(1, 0),
        Progress("x", 1, 1),
        Filled(M, 1),
        Crashed(M, REPORT),
        GaveUp(M, REPORT),
        PrepareTarget(M, False),
        Translate(M, "default", "m", (MovedConnection("uid", "10.0.0.1:1", "10.0.0.2:2", "10.0.0.3"),)),
        Translated(M, (0,)),
        *(kind(M) for kind in (Go, Done, Query, TargetPrepared, Ready, Restoring, Unknown)),
    )
}
STATES = pytest.mark.parametrize("state", SessionState)


def in_state(role: Role, state: SessionState) -> Session:
    session = Session(role)
    session.state = state
    session.rounds_ended, session.rounds_acked = 5, 3
    session.migration = M
    return session


def fitting(kind: EventType, ended: int, acked: int) -> Event | None:
    """A sample of the event that fits the round numbers, if one does."""
    if kind is RoundEnd:
        return RoundEnd(ended + 1, 1, 1)
    if kind is RoundAck:
        return RoundAck(acked + 1) if acked < ended else None
    return SAMPLES[kind]


@STATES
def test_what_crosses_on_the_way_leads_to_the_same_state_in_either_order(state: SessionState) -> None:
    for said_by_source, after_source in TABLE[state][Role.SOURCE].items():
        for said_by_target, after_target in TABLE[state][Role.TARGET].items():
            one = TABLE[after_source][Role.TARGET].get(said_by_target)
            other = TABLE[after_target][Role.SOURCE].get(said_by_source)
            assert one is not None, f"{said_by_source.__name__} makes {said_by_target.__name__} illegal"
            assert one is other


@given(st.data())
def test_both_ends_agree_after_any_walk_with_any_delays(data: st.DataObject) -> None:
    ends = {role: Session(role) for role in Role}
    wires: dict[Role, deque[Event]] = {role: deque() for role in Role}
    for _ in range(data.draw(st.integers(0, 60))):
        moves: list[tuple[Role, EventType | None]] = [(role, None) for role in Role if wires[role]]
        moves += [(role, kind) for role in Role for kind in TABLE[ends[role].state][role] if kind not in DATA[1:]]
        if not moves:
            break
        role, kind = data.draw(st.sampled_from(moves))
        if kind is None:
            ends[role.other].receive(wires[role].popleft())
        elif event := fitting(kind, ends[role].rounds_ended, ends[role].rounds_acked):
            ends[role].send(event)
            wires[role].append(event)
    for role in Role:
        while wires[role]:
            ends[role.other].receive(wires[role].popleft())
    source, target = ends.values()
    assert source.state is target.state
    assert (source.rounds_ended, source.rounds_acked) == (target.rounds_ended, target.rounds_acked)


@STATES
@pytest.mark.parametrize("role", Role)
def test_what_is_not_in_the_table_raises_and_changes_nothing(state: SessionState, role: Role) -> None:
    for kind, sample in SAMPLES.items():
        session = in_state(role, state)
        before = vars(session).copy()
        if kind not in TABLE[state][role]:
            with pytest.raises(Bug, match="illegal"):
                session.send(sample)
            assert vars(session) == before
        if kind not in TABLE[state][role.other]:
            with pytest.raises(PeerMisbehaved, match="illegal"):
                session.receive(sample)
            assert vars(session) == before


@STATES
def test_what_is_in_the_table_leads_where_it_says(state: SessionState) -> None:
    for role in Role:
        for kind, after in TABLE[state][role].items():
            sender, receiver = in_state(role, state), in_state(role.other, state)
            event = fitting(kind, 5, 3)
            assert event is not None
            assert sender.send(event) is receiver.receive(event) is after


def reachable(start: SessionState) -> set[SessionState]:
    found, new = {start}, [start]
    while new:
        rows = TABLE[new.pop()].values()
        new += {after for row in rows for after in row.values()} - found
        found.update(new)
    return found


def test_every_state_can_be_reached_and_every_one_can_end() -> None:
    assert reachable(SessionState.IDLE) == set(SessionState) == set(MEANING)
    for state in SessionState:
        assert SessionState.ENDED in reachable(state)


def test_every_message_is_said_by_its_speaker_and_by_nobody_else() -> None:
    for role, spoken in ((Role.SOURCE, {*SOURCE_MESSAGES, *DATA}), (Role.TARGET, {*TARGET_MESSAGES})):
        assert {kind for rows in TABLE.values() for kind in rows[role]} == spoken


def test_after_go_the_source_has_no_way_back_but_the_targets_word() -> None:
    for state in GONE_STATES:
        for after in TABLE[state][Role.SOURCE].values():
            assert after in GONE_STATES | {SessionState.ENDED}
        for kind, after in TABLE[state][Role.TARGET].items():
            assert after in GONE_STATES or kind is GaveUp
    assert Abort not in TABLE[SessionState.GONE][Role.SOURCE]


def test_only_go_and_the_answers_to_query_pass_the_right_to_run() -> None:
    for state, rows in TABLE.items():
        for row in rows.values():
            for kind, after in row.items():
                if after in GONE_STATES and state not in GONE_STATES:
                    assert kind is Go or state is SessionState.ASKED


@pytest.mark.parametrize("migration", ["m-2", "", "m-1 "])
def test_a_message_about_another_migration_is_refused(migration: str) -> None:
    session = in_state(Role.TARGET, SessionState.READY)
    with pytest.raises(PeerMisbehaved, match="this session about"):
        session.receive(Go(migration))
    assert session.state is SessionState.READY


def test_rounds_end_and_are_acknowledged_in_order() -> None:
    target = Session(Role.TARGET)
    target.receive(SAMPLES[Offer])
    target.send(Accept(M, {}))
    for wrong in (0, 2):
        with pytest.raises(PeerMisbehaved, match="ended after round 0"):
            target.receive(RoundEnd(wrong, 1, 1))
    with pytest.raises(Bug, match="acknowledged"):
        target.send(RoundAck(1))
    target.receive(RoundEnd(1, 1, 1))
    target.receive(RoundEnd(2, 1, 1))
    with pytest.raises(Bug, match="acknowledged"):
        target.send(RoundAck(2))
    target.send(RoundAck(1))
    target.send(RoundAck(2))
    assert (target.rounds_ended, target.rounds_acked) == (2, 2)


def test_the_document_is_that_of_the_code() -> None:
    document = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    assert render(document) == document, "run: python -m podferry.wire.document docs/protocol.md"


def test_the_protocols_number_is_raised_with_what_may_travel() -> None:
    """Either end refuses a message with a field more or less: ends of different shapes must know it from their first word."""
    digest = hashlib.sha256(shape().encode()).hexdigest()[:16]
    assert (PROTOCOL, digest) == (8, "e8693494e89eb3f3"), (
        "raise PROTOCOL where the shape differs from main's, and write both here"
    )
    document = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    assert f"The `protocol` number, now {PROTOCOL}," in document

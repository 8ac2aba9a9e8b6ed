"""The transition table, alone and as the joint state of two nodes that may crash and a link that may lose anything."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from podferry.core.phases import (
    SOURCE,
    SOURCE_ENDS,
    SOURCE_MAY_RUN,
    TARGET,
    TARGET_ENDS,
    TARGET_MAY_RUN,
    SourceEvent,
    SourcePhase,
    TargetEvent,
    TargetPhase,
    source_machine,
    target_machine,
)
from podferry.errors import Bug

pytestmark = [pytest.mark.unit, pytest.mark.smoke]
S, SE, T, TE = SourcePhase, SourceEvent, TargetPhase, TargetEvent


@pytest.mark.parametrize("phase", S)
def test_what_the_source_table_does_not_list_raises_and_changes_nothing(phase: SourcePhase) -> None:
    for event in SE:
        machine = source_machine(phase)
        if event in SOURCE[phase]:
            assert machine.fire(event) == SOURCE[phase][event]
        else:
            with pytest.raises(Bug):
                machine.fire(event)
            assert machine.phase == phase


@pytest.mark.parametrize("phase", T)
def test_what_the_target_table_does_not_list_raises_and_changes_nothing(phase: TargetPhase) -> None:
    for event in TE:
        machine = target_machine(phase)
        if event in TARGET[phase]:
            assert machine.fire(event) == TARGET[phase][event]
        else:
            with pytest.raises(Bug):
                machine.fire(event)
            assert machine.phase == phase


def test_every_phase_is_reached_and_reaches_an_end() -> None:
    for table, start, ends in ((SOURCE, S.CHECK, SOURCE_ENDS), (TARGET, T.RECEIVE, TARGET_ENDS)):
        assert _reachable(table, start) == set(table)
        for phase in table:
            assert _reachable(table, phase) & ends


def test_go_is_the_only_way_past_the_point_of_no_return() -> None:
    crossings = [
        (phase, event)
        for phase, moves in SOURCE.items()
        for event, after in moves.items()
        if phase in SOURCE_MAY_RUN and after not in SOURCE_MAY_RUN
    ]
    assert crossings == [(S.CUTOVER, SE.GO)]


def test_the_right_comes_back_only_by_the_targets_word_or_an_arbiters() -> None:
    returns = {
        event
        for phase, moves in SOURCE.items()
        for event, after in moves.items()
        if phase not in SOURCE_MAY_RUN and after in SOURCE_MAY_RUN
    }
    assert returns == {SE.GAVE_UP, SE.RESOLVED_HERE}


@dataclass(frozen=True)
class Joint:
    """Both halves, what is on its way between them, and what the disk of each node remembers."""

    source: SourcePhase
    target: TargetPhase
    go_in_flight: bool = False
    word_in_flight: str = ""


def _successors(joint: Joint) -> set[Joint]:
    """Everything that can happen next: each half's events under their real preconditions, and loss.

    The arbiter's verdict is left out: a person who says "run here" vouches that the target does not.
    """
    found = set()
    for event, after in SOURCE[joint.source].items():
        step = replace(joint, source=after)
        if event is SE.GO and joint.target is T.READY:
            found.add(replace(step, go_in_flight=True))
        elif event in (SE.RUNNING, SE.RUNNING_SHORT):
            if joint.word_in_flight == "running" or (joint.source is S.LOST and joint.target in (T.FILL, T.DONE)):
                found.add(replace(step, word_in_flight=""))
        elif event is SE.GAVE_UP:
            if joint.word_in_flight == "gave up" or (joint.source is S.LOST and joint.target is T.GAVE_UP):
                found.add(replace(step, word_in_flight=""))
        elif event not in (SE.GO, SE.RESOLVED_HERE, SE.RESOLVED_THERE):
            found.add(step)
    for event, after in TARGET[joint.target].items():
        step = replace(joint, target=after)
        if event is TE.GO:
            if joint.go_in_flight:
                found.add(replace(step, go_in_flight=False))
        elif event is TE.RUNNING:
            found.add(replace(step, word_in_flight="running"))
        elif event is TE.GONE:
            found.add(replace(step, word_in_flight="gave up"))
        else:
            found.add(step)
    found.add(replace(joint, go_in_flight=False))
    found.add(replace(joint, word_in_flight=""))
    if joint.source is S.LOST and joint.target is T.READY:
        found.add(replace(joint, go_in_flight=True))
    return found


def test_no_joint_state_lets_both_nodes_run_the_job() -> None:
    start = Joint(S.CHECK, T.RECEIVE)
    seen, todo = {start}, [start]
    while todo:
        joint = todo.pop()
        assert not (joint.source in SOURCE_MAY_RUN and joint.target in TARGET_MAY_RUN), joint
        for after in _successors(joint):
            if after not in seen:
                seen.add(after)
                todo.append(after)
    assert {joint.source for joint in seen} == set(S)
    assert {joint.target for joint in seen} == set(T)


def _reachable(table, start):  # type: ignore[no-untyped-def]
    seen, todo = {start}, [start]
    while todo:
        for after in table[todo.pop()].values():
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return seen

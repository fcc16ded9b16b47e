"""The state table: pure data, its rules, and the documentation that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import lifecycle
from engine.errors import Busy
from engine.lifecycle import ALIVE, TRANSIENT, TRANSITIONS, VERBS, State, Verb


def test_every_state_and_every_verb_is_in_the_tables() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set(VERBS) == set(Verb)
    assert {to for steps in TRANSITIONS.values() for to in steps} == set(State) - {State.CREATED}


def test_removed_is_the_end_and_reachable_from_everywhere() -> None:
    assert not TRANSITIONS[State.REMOVED]
    for state in set(State) - {State.REMOVED}:
        seen, todo = {state}, [state]
        while todo:
            for to in TRANSITIONS[todo.pop()]:
                if to not in seen:
                    seen.add(to)
                    todo.append(to)
        assert State.REMOVED in seen, state


def test_whatever_has_a_process_can_stop() -> None:
    for state in ALIVE:
        assert State.STOPPED in TRANSITIONS[state]


@given(st.sampled_from(State), st.sampled_from(Verb))
def test_a_verb_is_legal_exactly_when_it_is_listed_and_leads_where_the_table_allows(state: State, verb: Verb) -> None:
    if verb in lifecycle.legal_verbs(state):
        to = lifecycle.after(state, verb)
        if to is not state:
            lifecycle.check(state, to)
    else:
        with pytest.raises(Busy) as caught:
            lifecycle.after(state, verb)
        assert str(state) in caught.value.reason
        for legal in lifecycle.legal_verbs(state):
            assert str(legal) in caught.value.reason


@given(st.sampled_from(State), st.sampled_from(State))
def test_a_step_outside_the_table_raises(before: State, to: State) -> None:
    if to in TRANSITIONS[before]:
        lifecycle.check(before, to)
    else:
        with pytest.raises(Busy, match=str(before)):
            lifecycle.check(before, to)


def test_only_hurrying_and_retrying_is_legal_in_transient_states() -> None:
    legal = {state: set(lifecycle.legal_verbs(state)) for state in TRANSIENT}
    assert legal == {State.STARTING: set(), State.STOPPING: {Verb.KILL}, State.REMOVING: {Verb.REMOVE}}


def test_the_diagram_has_every_transition_and_the_documentation_has_the_diagram() -> None:
    diagram = lifecycle.diagram()
    for before, steps in TRANSITIONS.items():
        for to in steps:
            assert f"    {before} --> {to}: " in diagram
    assert diagram in (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()

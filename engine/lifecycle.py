"""The states of a container and what may follow what: pure data, no I/O, no threads. Floor 1.

Only here: `TRANSITIONS` (what the catalog may ever record) and `VERBS` (which ctl verb is legal in which state).
`engine/containers.py` asks `check` before each change and `permit` before each verb; ARCHITECTURE.md's diagram is
`diagram()`, and a test keeps them equal.

The transient states starting, stopping and removing are also the lock: while one holds, no other verb is legal
(except `kill`, which hurries a stop, and `remove`, which takes up a removal that failed half way).
"""

from __future__ import annotations

from enum import StrEnum

from engine.errors import Busy


class State(StrEnum):
    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    REMOVING = "removing"
    REMOVED = "removed"


class Verb(StrEnum):
    START = "start"
    STOP = "stop"
    RESTART = "restart"
    KILL = "kill"
    PAUSE = "pause"
    RESUME = "resume"
    REMOVE = "remove"


S, V = State, Verb

# from -> to -> why; the order is the order of the diagram
TRANSITIONS: dict[State, dict[State, str]] = {
    S.CREATED: {S.STARTING: "start", S.REMOVING: "remove"},
    S.STARTING: {S.RUNNING: "started", S.STOPPED: "could not start"},
    S.RUNNING: {S.STOPPING: "stop", S.PAUSED: "pause", S.STOPPED: "ended by itself or was killed"},
    S.PAUSED: {S.RUNNING: "resume", S.STOPPING: "stop", S.STOPPED: "was killed"},
    S.STOPPING: {S.STOPPED: "ended", S.RUNNING: "stop refused"},
    S.STOPPED: {S.STARTING: "start", S.REMOVING: "remove"},
    S.REMOVING: {S.REMOVED: "gone"},
    S.REMOVED: {},
}

# verb -> states in which it is legal
VERBS: dict[Verb, frozenset[State]] = {
    V.START: frozenset({S.CREATED, S.STOPPED}),
    V.STOP: frozenset({S.RUNNING, S.PAUSED}),
    V.RESTART: frozenset({S.RUNNING, S.PAUSED, S.STOPPED}),
    V.KILL: frozenset({S.RUNNING, S.PAUSED, S.STOPPING}),
    V.PAUSE: frozenset({S.RUNNING}),
    V.RESUME: frozenset({S.PAUSED}),
    V.REMOVE: frozenset({S.CREATED, S.STOPPED, S.REMOVING}),
}

# the state a verb moves to first; kill only sends a signal
TARGET: dict[Verb, State] = {
    V.START: S.STARTING,
    V.STOP: S.STOPPING,
    V.PAUSE: S.PAUSED,
    V.RESUME: S.RUNNING,
    V.REMOVE: S.REMOVING,
}

TRANSIENT = frozenset({S.STARTING, S.STOPPING, S.REMOVING})  # a restarted daemon reconciles these
ALIVE = frozenset({S.RUNNING, S.PAUSED, S.STOPPING})  # a process should exist; a restarted daemon checks


def legal_verbs(state: State, *, restarting: bool = False) -> list[Verb]:
    """The verbs legal in `state`, in the order people read them. `restarting`: stopped, and its policy is about to
    start it again; `stop` ends the waiting and leaves it stopped."""
    waits = restarting and state is S.STOPPED
    return [verb for verb in Verb if state in VERBS[verb] or (waits and verb is V.STOP)]


def check(before: State, to: State) -> None:
    """Busy when the table has no step from `before` to `to`."""
    if to not in TRANSITIONS[before]:
        known = ", ".join(TRANSITIONS[before]) or "nothing"
        raise Busy(f"a container cannot go from {before} to {to}: after {before} comes {known}")


def permit(state: State, verb: Verb) -> None:
    """Busy, naming the state and the verbs legal in it, when `verb` is not."""
    if state in VERBS[verb]:
        return
    legal = ", ".join(legal_verbs(state))
    hint = None
    if verb is V.REMOVE and state is S.STOPPING:
        hint = "wait until it has stopped, or end it now: echo kill > ctl"
    elif verb is V.REMOVE and state in ALIVE:
        hint = "stop it first: echo stop > ctl"
    elif state in TRANSIENT:
        hint = f"wait until it is no longer {state}"
    raise Busy(f"cannot {verb}: the container is {state}; legal now: {legal or 'nothing'}", at=verb, hint=hint)


def after(state: State, verb: Verb) -> State:
    """The state `verb` moves a container in `state` to first. Busy when it is not legal there."""
    permit(state, verb)
    if verb is V.RESTART:
        return S.STARTING if state is S.STOPPED else S.STOPPING
    return TARGET.get(verb, state)


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> created: mkdir, run"]
    for before, steps in TRANSITIONS.items():
        lines += [f"    {before} --> {to}: {why}" for to, why in steps.items()]
    lines.append("    removed --> [*]")
    return "\n".join(lines) + "\n"

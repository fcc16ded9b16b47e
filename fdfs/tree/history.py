"""containers/<name>/history/<seq>/: state and config as they were after an event. Floor 5."""

from __future__ import annotations

from typing import Any

from fdfs.entry import Dir, File, Row
from fdfs.tree.text import line


def _id(engine: Any, name: str) -> str:
    return str(engine.containers.get(name).id)


def _names(engine: Any, name: str) -> list[str]:
    return [str(seq) for seq in engine.history.numbers(_id(engine, name))]


def _find(engine: Any, name: str, seq: str) -> Row | None:
    canonical = seq.isascii() and seq.isdecimal() and len(seq) < 19 and seq == str(int(seq))
    return ENTRY if canonical and engine.history.has(_id(engine, name), int(seq)) else None


def state(engine: Any, name: str, seq: str) -> str:
    return line(engine.history.at(_id(engine, name), int(seq)).state)


def config(engine: Any, name: str, seq: str) -> str:
    return str(engine.history.at(_id(engine, name), int(seq)).config)


def event(engine: Any, name: str, seq: str) -> bytes:
    return bytes(engine.history.at(_id(engine, name), int(seq)).event)


def time(engine: Any, name: str, seq: str) -> str:
    return line(engine.history.at(_id(engine, name), int(seq)).time)


ENTRY = Dir(
    name="<seq>",
    doc="after event <seq>",
    rows=(
        File(name="state", doc="the state it had then", show=state),
        File(name="config.yaml", doc="the whole spec as it was then", show=config),
        File(name="event", doc="the event's JSON line", show=event),
        File(name="time", doc="when that was", show=time),
    ),
)

HISTORY = Dir(
    name="history",
    doc="what it was after each event that changed its state or config, as long as the journal has it",
    names=_names,
    find=_find,
    kinds=(ENTRY,),
)

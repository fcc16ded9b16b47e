"""jobs/: what takes longer than a write may. Floor 5."""

from __future__ import annotations

from typing import Any

from engine.errors import Busy, InvalidArgument, NotFound
from fdfs.ctl import Call, Verb, table
from fdfs.entry import Dir, File, Row
from fdfs.tree.text import line


def object_of(engine: Any, number: str) -> str:
    return f"job/{number}"


def _job(engine: Any, number: str) -> Any:
    return engine.jobs.get(int(number))


def verb(engine: Any, number: str) -> str:
    return line(_job(engine, number).verb)


def state(engine: Any, number: str) -> str:
    return line(_job(engine, number).state)


def _block(text: str) -> str:
    return text if not text or text.endswith("\n") else f"{text}\n"


def progress(engine: Any, number: str) -> str:
    return _block(_job(engine, number).progress)


def log(engine: Any, number: str) -> str:
    return _block(_job(engine, number).log)


def error(engine: Any, number: str) -> str:
    return _block(_job(engine, number).error) + str(engine.failures.text(object_of(engine, number)))


def cancel(engine: Any, number: str, call: Call) -> None:
    state = _job(engine, number).state
    if state != "running":
        raise Busy(f"the job is {state}, not running", at="cancel")
    engine.jobs.cancel(int(number))


def valid(engine: Any, number: str) -> list[str]:
    return ["cancel"] if _job(engine, number).state == "running" else []


def _names(engine: Any) -> list[str]:
    return [str(job.id) for job in engine.jobs.all()]


def _find(engine: Any, name: str) -> Row | None:
    if not (name.isascii() and name.isdigit()) or name != str(int(name[:18])):
        return None
    try:
        _job(engine, name)
    except (NotFound, InvalidArgument):
        return None
    return JOB


JOB = Dir(
    name="<n>",
    doc="one job",
    rows=(
        File(name="verb", doc="the command as written", show=verb),
        File(name="state", doc="running done failed cancelled", show=state),
        File(name="progress", doc="how far it is, flat-keyed or one line", show=progress),
        File(name="log", doc="what it did", show=log),
        File(name="error", doc="why it failed; empty otherwise", show=error),
        File(
            name="ctl",
            doc="what to do with it",
            object=object_of,
            valid=valid,
            verbs=table(Verb(name="cancel", doc="end it; what it had fetched is kept for the next try", run=cancel)),
        ),
    ),
)

JOBS = Dir(name="jobs", doc="what takes longer: pulls, loads, checks", names=_names, find=_find, kinds=(JOB,))

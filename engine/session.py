"""What a session (`exec`) is to people, how it is asked for, and how it is kept in a file. Floor 3, no state."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from engine.errors import InvalidArgument
from engine.model import Frozen, one_line

log = logging.getLogger(__name__)

MAX_WORDS = 1 << 20  # bytes of arguments and variables
MAX_TOLD = 8 << 10  # bytes of arguments in an event


class Phase(StrEnum):
    CREATED = "created"
    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"


OVER = (Phase.STOPPED, Phase.FAILED)


@dataclass(frozen=True, slots=True)
class Session:
    """A session as of now."""

    container: str  # its id
    number: int
    argv: tuple[str, ...]
    user: str
    workdir: str
    tty: bool
    stdin: bool
    state: Phase = Phase.CREATED
    pid: int | None = None
    exit_code: int | None = None
    started_ns: int | None = None
    finished_ns: int | None = None
    reason: str = ""

    @property
    def object(self) -> str:
        return f"container/{self.container}/exec/{self.number}"


def checked(argv: Sequence[str], workdir: str, env: Sequence[str]) -> dict[str, str]:
    """The variables. InvalidArgument names what cannot be."""
    if not argv or not argv[0]:
        raise InvalidArgument("run: nothing to run", hint="run [user=…] [workdir=…] [env=K=V]* … ARGV…")
    if any("\0" in word for word in (*argv, *env, workdir)):
        raise InvalidArgument("run: contains a NUL byte")
    if sum(len(word.encode("utf-8", "surrogateescape")) for word in (*argv, *env)) > MAX_WORDS:
        raise InvalidArgument(f"run: more than {MAX_WORDS} bytes of arguments and variables")
    if workdir and not workdir.startswith("/"):
        raise InvalidArgument("workdir: must be an absolute path", at=workdir)
    variables = {}
    for item in env:
        key, equals, value = item.partition("=")
        if not equals or not re.fullmatch(r"[^\s=]+", key):
            raise InvalidArgument(f"env: KEY=VALUE expected, not {item[:80]!r}", at=item[:80])
        variables[key] = value
    return variables


def told(argv: Sequence[str]) -> list[str]:
    """What an event holds of them: an event has a bound (events.MAX_LINE), arguments have a larger one."""
    out: list[str] = []
    room = MAX_TOLD
    for word in argv[:64]:
        room -= len(json.dumps(word)) + 1
        if room < 0:
            return [*out, "…"]
        out.append(word)
    return out


class Request(Frozen):
    """A session as one JSON object: what does not fit on a line of words."""

    argv: tuple[str, ...]
    user: str | None = None
    workdir: str = ""
    env: tuple[str, ...] = ()
    tty: bool = False
    stdin: bool = False
    size: tuple[Annotated[int, Field(gt=0, lt=1 << 16)], Annotated[int, Field(gt=0, lt=1 << 16)]] | None = None
    attach: bool = False


def parse_request(text: str) -> Request:
    """InvalidArgument names the field at fault."""
    try:
        return Request.model_validate_json(text)
    except ValidationError as error:
        raise one_line(error, "spec") from error


def plain(session: Session) -> dict[str, Any]:
    """For JSON."""
    return asdict(session)


def load(path: Path, container: str, number: int) -> Session | None:
    """None when it is not there, or was not written whole."""
    try:
        data = json.loads(path.read_bytes())
        data["argv"] = tuple(map(str, data["argv"]))
        data["state"] = Phase(data["state"])
        session = Session(**data)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read: %s", path, error)
        return None
    return replace(session, container=container, number=number)

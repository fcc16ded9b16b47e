"""A container's own input and terminal: its files and verbs. Floor 5."""

from __future__ import annotations

from typing import Any

from engine.lifecycle import ALIVE
from fdfs.ctl import Call, Verb
from fdfs.entry import File
from fdfs.tree.sessions import screen
from fdfs.tree.text import line


def console_verbs(container: Any) -> list[str]:
    """Those that are valid now."""
    if container.state not in ALIVE:
        return []
    return ["eof"] * container.config.stdin + ["resize"] * container.config.tty


def _object(engine: Any, name: str) -> str:
    return str(engine.containers.get(name).object)


def _attach(engine: Any, name: str) -> str:
    return line(engine.containers.console.attach_path(name))


def _feed(engine: Any, name: str, data: bytes) -> int:
    return int(engine.containers.console.send(name, data))


def _eof(engine: Any, name: str, call: Call) -> None:
    engine.containers.console.end_input(name)


def _resize(engine: Any, name: str, call: Call) -> None:
    engine.containers.console.resize(name, *screen(call))


VERBS = (
    Verb(name="eof", doc="its input ends after what was written (on a terminal: ^D)", run=_eof),
    Verb(name="resize", args="COLUMNS ROWS", doc="the size of its terminal", run=_resize),
)
CONSOLE = (
    File(
        name="stdin",
        doc="what is written here its process reads (stdin: true); `eof` ends it; ETIMEDOUT when it does not read",
        feed=_feed,
        object=_object,
    ),
    File(name="attach", doc="a socket of this host with its input and output; for terminals", show=_attach),
)

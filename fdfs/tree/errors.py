"""The `error` file that stands beside every `ctl`. Floor 5."""

from __future__ import annotations

from typing import Any

from fdfs.entry import STARTED_NS, File, Handler
from fdfs.tree.text import clear_only


def error_file(object: Handler) -> File:
    """The last failures of the object that `object(engine, *keys)` names; an empty line clears them."""

    def error(engine: Any, *keys: str) -> str:
        return str(engine.failures.text(object(engine, *keys)))

    def clear(engine: Any, *arguments: str) -> None:
        clear_only(arguments[-1])
        engine.failures.clear(object(engine, *arguments[:-1]))

    def mtime(engine: Any, *keys: str) -> int:
        return int(engine.failures.mtime_ns(object(engine, *keys))) or STARTED_NS

    return File(
        name="error",
        doc="the last 8 failures, newest first, and what to do; writing an empty line clears them",
        show=error,
        set=clear,
        mtime=mtime,
        object=object,
    )

"""The top of the mount, and README.txt, which is generated from the rows. Floor 5."""

from __future__ import annotations

import os
import signal
import threading
from functools import lru_cache
from typing import Any

from fdfs.ctl import Call, Verb, table
from fdfs.entry import STARTED_NS, Dir, File, Link, Row
from fdfs.entry import table as documentation
from fdfs.tree.containers import CONTAINERS
from fdfs.tree.errors import error_file
from fdfs.tree.images import IMAGES
from fdfs.tree.jobs import JOBS
from fdfs.tree.kernels import KERNELS
from fdfs.tree.layers import LAYERS
from fdfs.tree.networks import NETWORKS
from fdfs.tree.registry import REGISTRY
from fdfs.tree.store import STORE
from fdfs.tree.text import flat, line
from fdfs.tree.volumes import VOLUMES

INTRODUCTION = """\
Flying Dutchman: a container engine that is a filesystem.
Everything it knows is a file; everything it does is a write.

  echo 'pull alpine:3.20' > images/ctl;  cat jobs/1/progress
  ls images/alpine:3.20/rootfs/etc
  mkdir containers/web;  echo alpine:3.20 > containers/web/config/image;  echo start > containers/web/ctl
  tail -f containers/web/logs/stdout
  cat containers/web/ctl        the verbs that are valid now
  cat containers/web/error      why the last command failed
  echo stop > containers/web/ctl;  rmdir containers/web

A command is one line written to a ctl; its errno comes back from that write, the reason is in `error` beside it.
Every write, mkdir and rmdir is an event in `events`, with who did it.

"""


def root_object(engine: Any) -> str:
    return ""


def readme(engine: Any) -> str:
    return _readme()


@lru_cache(1)
def _readme() -> str:
    rows = documentation(ROOT)
    width = min(46, max(len(path) for path, _ in rows))
    return INTRODUCTION + "".join(f"{path:<{width}}  {doc}\n" for path, doc in rows)


def version(engine: Any) -> str:
    return line(engine.version)


def status(engine: Any) -> str:
    return flat(engine.status())


def events_size(engine: Any) -> int:
    return int(engine.journal.size())


def events(engine: Any, offset: int, size: int) -> bytes:
    return bytes(engine.journal.read(offset, size))


def events_first(engine: Any) -> int:
    return int(engine.journal.first())


def empty(engine: Any) -> str:
    return ""


def down(engine: Any, call: Call) -> None:
    """A moment later, so that the write is answered first."""
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()


def halt(engine: Any, call: Call) -> None:
    engine.halt()


# --- logs -------------------------------------------------------------------------------------------------------


def _log_names(engine: Any) -> list[str]:
    return [f"{container.name}.log" for container in engine.containers.all()]


def _log(engine: Any, name: str) -> Row | None:
    return LOG_LINK if name in _log_names(engine) else None


def log_target(engine: Any, name: str) -> str:
    return f"../containers/{name.removesuffix('.log')}/logs/all.jsonl"


def _engine_log(engine: Any) -> str:
    return str(engine.store / "engine.log")


def engine_log_size(engine: Any) -> int:
    try:
        return os.stat(_engine_log(engine)).st_size
    except FileNotFoundError:
        return 0


def engine_log(engine: Any, offset: int, size: int) -> bytes:
    try:
        fd = os.open(_engine_log(engine), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def engine_log_mtime(engine: Any) -> int:
    try:
        return os.stat(_engine_log(engine)).st_mtime_ns
    except FileNotFoundError:
        return STARTED_NS


LOG_LINK = Link(name="<name>.log", doc="what a container printed, with times", target=log_target)

LOGS = Dir(
    name="logs",
    doc="all logs in one place",
    names=_log_names,
    find=_log,
    kinds=(LOG_LINK,),
    rows=(
        File(
            name="engine.log",
            doc="the engine's own log",
            read=engine_log,
            size=engine_log_size,
            mtime=engine_log_mtime,
        ),
    ),
)

ROOT = Dir(
    name="",
    doc="the mount",
    rows=(
        File(name="README.txt", doc="this text", show=readme),
        File(name="version", doc="of the engine", show=version),
        File(name="status", doc="what the engine is and does, flat-keyed", show=status),
        File(
            name="ctl",
            doc="commands to the engine itself",
            object=root_object,
            verbs=table(
                Verb(name="down", doc="unmount and end; containers go on running", run=down),
                Verb(
                    name="halt", doc="stop all containers; the next `up` starts those that policies keep up", run=halt
                ),
            ),
        ),
        error_file(root_object),
        File(
            name="events",
            doc="the journal: JSON Lines, gapless seq, survives restarts; grows",
            read=events,
            size=events_size,
            first=events_first,
        ),
        IMAGES,
        LAYERS,
        REGISTRY,
        CONTAINERS,
        LOGS,
        VOLUMES,
        KERNELS,
        NETWORKS,
        JOBS,
        STORE,
        File(name=".metadata_never_index", doc="keeps desktop search from reading images", show=empty),
    ),
)

"""volumes/: named directories that outlive containers. Floor 5."""

from __future__ import annotations

from typing import Any

from engine.errors import InvalidArgument, NotFound
from fdfs.ctl import Call, Verb, table
from fdfs.entry import BindSource, Dir, File, Row
from fdfs.loopback import Loopback
from fdfs.tree.caller import caller
from fdfs.tree.errors import error_file
from fdfs.tree.text import line, lines, stamp


def object_of(engine: Any, name: str) -> str:
    return f"volume/{name}"


def volumes_object(engine: Any) -> str:
    return "volumes"


def driver(engine: Any, name: str) -> str:
    return line(engine.volumes.get(name).driver)


def labels(engine: Any, name: str) -> str:
    return lines(f"{key}={value}" for key, value in engine.volumes.get(name).labels.items())


def set_labels(engine: Any, name: str, text: str) -> None:
    values = {}
    for item in text.splitlines():
        key, _, value = item.partition("=")
        if item.strip():
            values[key.strip()] = value
    engine.volumes.set_labels(name, values)


def created(engine: Any, name: str) -> str:
    return stamp(engine.volumes.get(name).created_ns)


def size_bytes(engine: Any, name: str) -> str:
    return line(engine.volumes.size(name))


def used_by(engine: Any, name: str) -> str:
    return lines(engine.volumes.users(name))


def data(engine: Any, name: str) -> Loopback:
    return Loopback(engine.volumes.path(name), writable=True, caller=caller)


def data_source(engine: Any, name: str) -> BindSource:
    return BindSource(directory=str(engine.volumes.path(name)))


def create(engine: Any, call: Call) -> str:
    options = dict(call.options)
    chosen = options.pop("driver", "local")
    engine.volumes.create(call.args[0], chosen, options)
    return call.args[0]


def make(engine: Any, name: str) -> None:
    engine.volumes.create(name)


def remove(engine: Any, name: str, call: Call | None = None) -> None:
    engine.volumes.remove(name)


def prune(engine: Any, call: Call) -> str:
    return "\n".join(engine.volumes.prune())


def _names(engine: Any) -> list[str]:
    return list(engine.volumes.names())


def _find(engine: Any, name: str) -> Row | None:
    try:
        engine.volumes.get(name)
    except (NotFound, InvalidArgument):
        return None
    return VOLUME


VOLUME = Dir(
    name="<name>",
    doc="one volume",
    rmdir=remove,
    object=object_of,
    rows=(
        Dir(name="data", doc="its files, writable", graft=data, bind=data_source),
        File(name="driver", doc="where its bytes are kept", show=driver),
        File(name="labels", doc="KEY=VALUE lines", show=labels, set=set_labels, object=object_of),
        File(name="created", doc="when it was created", show=created),
        File(name="size_bytes", doc="sum of its files, as last measured", show=size_bytes),
        File(name="used_by", doc="containers whose config mounts it, one per line", show=used_by),
        File(
            name="ctl",
            doc="what to do with it",
            object=object_of,
            verbs=table(Verb(name="remove", doc="delete it and its data, as rmdir does", run=remove)),
        ),
        error_file(object_of),
    ),
)

VOLUMES = Dir(
    name="volumes",
    doc="volumes; mkdir creates one, rmdir removes it",
    names=_names,
    find=_find,
    kinds=(VOLUME,),
    mkdir=make,
    object=volumes_object,
    rows=(
        File(
            name="ctl",
            doc="create and clean up volumes",
            object=volumes_object,
            verbs=table(
                Verb(
                    name="create",
                    args="NAME [driver=…] [KEY=VALUE…]",
                    doc="an empty volume, with options for its driver",
                    run=create,
                ),
                Verb(name="prune", doc="remove every volume no container uses", run=prune),
            ),
        ),
        error_file(volumes_object),
    ),
)

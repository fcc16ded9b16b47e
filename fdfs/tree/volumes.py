"""volumes/: named directories that outlive containers. Floor 5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import pruneplan, volumetar
from engine.errors import AlreadyExists, InvalidArgument, NotFound
from engine.model import check_name
from engine.volumedrivers import shown
from fdfs.ctl import Call, Verb, table
from fdfs.entry import BindSource, Dir, File, Link, Row
from fdfs.loopback import Loopback
from fdfs.tree.caller import caller
from fdfs.tree.errors import error_file
from fdfs.tree.images import host_path, vacant
from fdfs.tree.text import line, lines, pairs, stamp


def object_of(engine: Any, name: str) -> str:
    return f"volume/{name}"


def volumes_object(engine: Any) -> str:
    return "volumes"


def driver(engine: Any, name: str) -> str:
    return line(engine.volumes.get(name).driver)


def labels(engine: Any, name: str) -> str:
    return lines(f"{key}={value}" for key, value in engine.volumes.get(name).labels.items())


def set_labels(engine: Any, name: str, text: str) -> None:
    engine.volumes.set_labels(name, pairs(text))


def created(engine: Any, name: str) -> str:
    return stamp(engine.volumes.get(name).created_ns)


def size_bytes(engine: Any, name: str) -> str:
    return line(engine.volumes.size(name))


def options(engine: Any, name: str) -> str:
    return lines(f"{key}={value}" for key, value in shown(engine.volumes.get(name).options).items())


def mounted(engine: Any, name: str) -> str:
    return line(engine.volumes.mounted(engine.volumes.get(name)))


def _users(engine: Any, name: str) -> list[str]:
    return list(engine.volumes.users(name))


def _user(engine: Any, name: str, container: str) -> Row | None:
    return USER if container in _users(engine, name) else None


def user_target(engine: Any, name: str, container: str) -> str:
    return f"../../../containers/{container}"


def data(engine: Any, name: str) -> Loopback:
    """What is not mounted cannot be written to: it would be hidden by the mount."""
    volume = engine.volumes.get(name)

    def writable() -> bool:  # asked at each change: it comes and goes while this view is in use
        return not volume.read_only and bool(engine.volumes.mounted(volume))

    return Loopback(volume.path, writable=writable, caller=caller)


def data_source(engine: Any, name: str) -> BindSource:
    """Not of what a driver mounts: a bind would keep it mounted after its last use."""
    volume = engine.volumes.get(name)
    plain = not engine.volumes.mounts(volume) and not volume.read_only
    return BindSource(directory=str(volume.path) if plain else "")


def create(engine: Any, call: Call) -> str:
    """`opt.KEY=VALUE` and `KEY=VALUE` are the same: the first also for keys this verb has itself."""
    given = dict(call.options)
    chosen, labels = given.pop("driver", "local"), pairs(given.pop("label", ""))
    options = {key.removeprefix("opt."): value for key, value in given.items()}
    engine.volumes.create(call.args[0], chosen, options, labels)
    return call.args[0]


# --- jobs -------------------------------------------------------------------------------------------------------


def _job(engine: Any, name: str, verb: str, work: Callable[[Any], str]) -> str:
    engine.volumes.get(name)
    return f"jobs/{engine.jobs.start(f'volumes/{name} {verb}', work)}"


def _copy(engine: Any, name: str, call: Call, verb: str, *, read_only: bool) -> str:
    new = call.args[0]
    check_name(new, "volume")
    if new in engine.volumes.names():
        raise AlreadyExists(f"a volume named {new} exists", at=new)

    def work(task: Any) -> str:
        return str(engine.volumes.clone(name, new, task, read_only=read_only).name)

    return _job(engine, name, f"{verb} {new}", work)


def clone(engine: Any, name: str, call: Call) -> str:
    return _copy(engine, name, call, "clone", read_only=False)


def snapshot(engine: Any, name: str, call: Call) -> str:
    return _copy(engine, name, call, "snapshot", read_only=True)


def export(engine: Any, name: str, call: Call) -> str:
    path = vacant(call.args[0])

    def work(task: Any) -> str:
        with engine.volumes.using(name) as volume:
            return f"exported {name} to {path}, {volumetar.export(volume.path, Path(path), task)} bytes"

    return _job(engine, name, f"export {path}", work)


def import_(engine: Any, name: str, call: Call) -> str:
    path = Path(host_path(call.args[0]))

    def work(task: Any) -> str:
        count = 0

        def produce(target: Path) -> None:
            nonlocal count
            count = volumetar.unpack(path, target, engine.store / "tmp", task)

        engine.volumes.fill(name, produce)
        return f"imported {count} members into {name}"

    return _job(engine, name, f"import {path}", work)


def plan(engine: Any) -> str:
    return pruneplan.of_volumes(engine.volumes).text()


def make(engine: Any, name: str) -> None:
    engine.volumes.create(name)


def remove(engine: Any, name: str, call: Call | None = None) -> None:
    engine.volumes.remove(name)


def prune(engine: Any, call: Call) -> str:
    """The hash is checked now, so that the writer hears of a changed plan, and again when the job runs."""
    digest = call.arg(0) or ""
    plan = pruneplan.of_volumes(engine.volumes)
    plan.check(digest)
    return f"jobs/{engine.jobs.start(f'prune-volumes {digest}', lambda task: plan.run(digest, task))}"


def _names(engine: Any) -> list[str]:
    return list(engine.volumes.names())


def _find(engine: Any, name: str) -> Row | None:
    try:
        engine.volumes.get(name)
    except (NotFound, InvalidArgument):
        return None
    return VOLUME


USER = Link(name="<container>", doc="a container that uses it", target=user_target)

VOLUME = Dir(
    name="<name>",
    doc="one volume",
    rmdir=remove,
    object=object_of,
    rows=(
        Dir(name="data", doc="its files, writable", graft=data, bind=data_source),
        File(name="driver", doc="where its bytes are kept: local, ext4, or a program", show=driver),
        File(name="options", doc="KEY=VALUE lines: what its driver was given; passwords are not shown", show=options),
        File(name="mounted", doc="1 when its files are at data/; 0 for a driver that mounts on use", show=mounted),
        File(name="labels", doc="KEY=VALUE lines", show=labels, set=set_labels, object=object_of),
        File(name="created", doc="when it was created", show=created),
        File(name="size_bytes", doc="sum of its files, as last measured", show=size_bytes),
        Dir(name="used_by", doc="a link to each container that uses it", names=_users, find=_user, kinds=(USER,)),
        File(
            name="ctl",
            doc="what to do with it",
            object=object_of,
            verbs=table(
                Verb(name="clone", args="NEW", doc="a new volume with what is in this one (a job)", run=clone),
                Verb(name="snapshot", args="NEW", doc="the same, to be read only (a job)", run=snapshot),
                Verb(name="export", args="PATH", doc="write its files to a new tar of this host (a job)", run=export),
                Verb(
                    name="import",
                    args="PATH",
                    doc="fill it, empty as it is, from a tar of this host (a job)",
                    run=import_,
                ),
                Verb(name="remove", doc="delete it and its data, as rmdir does", run=remove),
            ),
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
                    args="NAME [driver=…] [label=…]* [KEY=VALUE…]",
                    doc="an empty volume, with options for its driver (opt.KEY= too); label is KEY=VALUE",
                    run=create,
                ),
                Verb(name="prune", args="[HASH]", doc="remove what the plan with this hash lists (a job)", run=prune),
            ),
        ),
        error_file(volumes_object),
        File(name="plan", doc="what prune would remove: volumes no container uses; ends with what runs it", show=plan),
    ),
)

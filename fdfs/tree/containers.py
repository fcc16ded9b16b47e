"""containers/: create with mkdir, configure by files, command by ctl. Floor 5."""

from __future__ import annotations

import threading
from typing import Any

from engine import fields
from engine.commit import COMMITTABLE
from engine.commit import commit as commit_container
from engine.config import parse_config
from engine.errors import Busy, InvalidArgument, NotFound
from engine.images.newimage import check as check_change
from engine.images.reference import parse as parse_reference
from engine.records import PINNED
from fdfs.ctl import Call, Verb, table
from fdfs.entry import STARTED_NS, Dir, File, Link, Row
from fdfs.tree.console import CONSOLE, VERBS, console_verbs
from fdfs.tree.containerfiles import changes, changes_size, diff, rootfs, rootfs_source
from fdfs.tree.containerlist import LIST
from fdfs.tree.errors import error_file
from fdfs.tree.history import HISTORY
from fdfs.tree.networks import CONTAINER_FILES
from fdfs.tree.sessions import EXEC
from fdfs.tree.tar import TAR
from fdfs.tree.text import flat, line, stamp
from fdfs.tree.upkeep import UPKEEP
from fdfs.tree.usage import USAGE

WAIT_SECONDS = 0.9  # a blocked handler makes its caller unkillable: short
MAX_WAITING = 128  # reads of `wait` that wait at the same time: half of the mount's threads

_waiting = threading.BoundedSemaphore(MAX_WAITING)


def object_of(engine: Any, name: str) -> str:
    return str(engine.containers.get(name).object)


def containers_object(engine: Any) -> str:
    return "containers"


# --- values -----------------------------------------------------------------------------------------------------


def state(engine: Any, name: str) -> str:
    return line(engine.containers.get(name).state)


def id_(engine: Any, name: str) -> str:
    return line(engine.containers.get(name).id)


def image(engine: Any, name: str) -> str:
    return line(engine.containers.get(name).image)


def pid(engine: Any, name: str) -> str:
    return line(engine.containers.get(name).pid)


def exit_code(engine: Any, name: str) -> str:
    return line(engine.containers.get(name).exit_code)


def created_at(engine: Any, name: str) -> str:
    return stamp(engine.containers.get(name).created_ns)


def started_at(engine: Any, name: str) -> str:
    return stamp(engine.containers.get(name).started_ns)


def finished_at(engine: Any, name: str) -> str:
    return stamp(engine.containers.get(name).finished_ns)


def restarts(engine: Any, name: str) -> str:
    return line(engine.containers.get(name).restarts)


def oom(engine: Any, name: str) -> str:
    return line(bool(engine.containers.get(name).oom))


def runtime(engine: Any, name: str) -> str:
    return line(engine.containers.get(name).runtime)


def machine(engine: Any, name: str) -> str:
    return flat(engine.containers.guests.machine(engine.containers.get(name)))


# --- configuration ----------------------------------------------------------------------------------------------


def config_yaml(engine: Any, name: str) -> str:
    return fields.config_text(engine.containers.get(name).config)


def commit_config(engine: Any, name: str, document: bytes) -> None:
    engine.containers.configure(name, parse_config(document))


def _field_names(engine: Any, name: str) -> tuple[str, ...]:
    return fields.FIELDS


def _field(engine: Any, name: str, field: str) -> Row | None:
    return FIELD if field in fields.FIELDS else None


def field_text(engine: Any, name: str, field: str) -> str:
    return fields.field_text(field, engine.containers.get(name).config)


def set_field(engine: Any, name: str, field: str, text: str) -> None:
    engine.containers.set_field(name, field, text)


def field_object(engine: Any, name: str, field: str) -> str:
    return object_of(engine, name)


# --- files ------------------------------------------------------------------------------------------------------


def events_size(engine: Any, name: str) -> int:
    return int(engine.journal.size(object_of(engine, name)))


def events(engine: Any, name: str, offset: int, size: int) -> bytes:
    return bytes(engine.journal.read(offset, size, object_of(engine, name)))


def events_first(engine: Any, name: str) -> int:
    return int(engine.journal.first(object_of(engine, name)))


def log_first(engine: Any, name: str, view: str) -> int:
    return int(engine.containers.logs(name).first(view))


def _log_names(engine: Any, name: str) -> tuple[str, ...]:
    return ("stdout", "stderr", "all.jsonl")


def _log(engine: Any, name: str, view: str) -> Row | None:
    return LOG if view in _log_names(engine, name) else None


def log_size(engine: Any, name: str, view: str) -> int:
    return int(engine.containers.logs(name).size(view))


def log_bytes(engine: Any, name: str, view: str, offset: int, size: int) -> bytes:
    return bytes(engine.containers.logs(name).read(view, offset, size))


def log_mtime(engine: Any, name: str, view: str) -> int:
    return int(engine.containers.logs(name).mtime_ns()) or STARTED_NS


def wait(engine: Any, name: str) -> str:
    if not _waiting.acquire(blocking=False):  # too many already: the rest of the mount must go on being served
        code = engine.containers.wait(name, 0)
        return "" if code is None else line(code)
    try:
        code = engine.containers.wait(name, WAIT_SECONDS)
    finally:
        _waiting.release()
    return "" if code is None else line(code)


def _mounts(engine: Any, name: str) -> list[Any]:
    return list(engine.containers.mount_specs(name))


def _mount_names(engine: Any, name: str) -> list[str]:
    return [str(number) for number, mount in enumerate(_mounts(engine, name)) if mount.source]


def _mount(engine: Any, name: str, number: str) -> Row | None:
    return MOUNT if number in _mount_names(engine, name) else None


def mount_target(engine: Any, name: str, number: str) -> str:
    mount = _mounts(engine, name)[int(number)]
    return f"../../../volumes/{mount.source}/data" if mount.type == "volume" else str(mount.source)


# --- verbs ------------------------------------------------------------------------------------------------------


def valid(engine: Any, name: str) -> list[str]:
    """`commit` and `rename` are no verbs of the lifecycle: they leave the state as it is."""
    verbs = [str(verb) for verb in engine.containers.verbs(name)]
    container = engine.containers.get(name)
    if container.state in COMMITTABLE and (container.image or container.config.image):
        verbs.append("commit")
    if container.state != "removing":
        verbs.append("rename")
    return verbs + console_verbs(container)


def _seconds(call: Call) -> float | None:
    text = call.arg(0)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400:
        raise InvalidArgument("seconds expected, 0 to 86400", at=text)
    return value


def start(engine: Any, name: str, call: Call) -> None:
    engine.containers.start(name)


def stop(engine: Any, name: str, call: Call) -> None:
    engine.containers.stop(name, _seconds(call))


def restart(engine: Any, name: str, call: Call) -> None:
    engine.containers.restart(name, _seconds(call))


def kill(engine: Any, name: str, call: Call) -> None:
    engine.containers.kill(name, call.arg(0) or "KILL")


def pause(engine: Any, name: str, call: Call) -> None:
    engine.containers.pause(name)


def resume(engine: Any, name: str, call: Call) -> None:
    engine.containers.resume(name)


def rename(engine: Any, name: str, to: str | Call) -> None:
    engine.containers.rename(name, to if isinstance(to, str) else to.args[0])


def pin(engine: Any, name: str) -> tuple[str, ...]:
    return (PINNED + engine.containers.get(name).id,)


def remove(engine: Any, name: str, call: Call | None = None) -> None:
    engine.containers.remove(name)


def run(engine: Any, call: Call) -> str:
    platform = {"platform": call.options["platform"]} if "platform" in call.options else {}
    argv = list(call.rest) if call.rest else None
    container = engine.containers.run(call.args[0], call.options.get("name"), argv, **platform)
    return str(container.name)


def commit(engine: Any, name: str, call: Call) -> str:
    reference, options = call.args[0], call.options
    parse_reference(reference)
    changes = tuple(filter(None, options.get("change", "").split("\n")))
    for change in changes:
        check_change(change)
    container = engine.containers.get(name)
    if container.state not in COMMITTABLE:
        raise Busy(f"the container is {container.state}", at="commit")

    def work(task: Any) -> str:
        image = commit_container(
            engine.containers,
            engine.images,
            engine.trees,
            name,
            reference,
            task,
            author=options.get("author", ""),
            message=options.get("message", ""),
            changes=changes,
        )
        return str(image.digest)

    return f"jobs/{engine.jobs.start(f'commit {name} {reference}', work)}"


def create(engine: Any, name: str) -> None:
    engine.containers.create(name, None)


# --- rows -------------------------------------------------------------------------------------------------------


def _names(engine: Any) -> list[str]:
    return [container.name for container in engine.containers.all()]


def _find(engine: Any, name: str) -> Row | None:
    if name.startswith(PINNED):
        return None
    try:
        engine.containers.get(name)
    except (NotFound, InvalidArgument):
        return None
    return CONTAINER


FIELD = File(
    name="<field>",
    doc="one field of config.yaml, applied at the write",
    show=field_text,
    set=set_field,
    object=field_object,
)
LOG = File(
    name="<stream>",
    doc="stdout, stderr, or all.jsonl (JSON Lines with times): one ever-growing file over rotated segments",
    read=log_bytes,
    size=log_size,
    first=log_first,
    mtime=log_mtime,
)
MOUNT = Link(name="<n>", doc="a volume or bind mount in use", target=mount_target)

CONTAINER = Dir(
    name="<name>",
    doc="one container",
    rmdir=remove,
    rename=rename,
    pin=pin,
    object=object_of,
    scratch=True,
    rows=(
        File(
            name="ctl",
            doc="what to do with it",
            object=object_of,
            valid=valid,
            verbs=table(
                Verb(name="start", doc="run it", run=start),
                Verb(name="stop", args="[SECONDS]", doc="its stop signal, then SIGKILL after the seconds", run=stop),
                Verb(name="restart", args="[SECONDS]", doc="stop and start", run=restart),
                Verb(name="kill", args="[SIGNAL]", doc="a signal to its first process; KILL if not given", run=kill),
                Verb(name="pause", doc="freeze its processes", run=pause),
                Verb(name="resume", doc="thaw them", run=resume),
                Verb(
                    name="commit",
                    args="REF [author=…] [message=…] [change=…]*",
                    doc="make an image of it, paused meanwhile; change is a Dockerfile line: CMD, ENV… (a job)",
                    run=commit,
                ),
                *VERBS,
                Verb(name="rename", args="NAME", doc="another name, as mv gives it; it may run", run=rename),
                Verb(name="remove", doc="delete it and its changes, as rmdir does", run=remove),
            ),
        ),
        error_file(object_of),
        File(name="state", doc="created starting running paused stopping stopped removing", show=state),
        File(
            name="config.yaml",
            doc="the whole spec; validated and applied when it is closed",
            show=config_yaml,
            commit=commit_config,
            object=object_of,
        ),
        Dir(name="config", doc="the same, one value per file", names=_field_names, find=_field, kinds=(FIELD,)),
        File(name="id", doc="64 hex digits", show=id_),
        File(name="image", doc="manifest digest of the image it was started from; empty before", show=image),
        File(name="pid", doc="its first process on the host while it runs", show=pid),
        File(name="exit_code", doc="exit status of the last run; empty before", show=exit_code),
        File(name="created_at", doc="when it was created", show=created_at),
        File(name="started_at", doc="when it was last started", show=started_at),
        File(name="finished_at", doc="when its last run ended", show=finished_at),
        File(name="restarts", doc="how often it was restarted", show=restarts),
        File(name="oom", doc="1 when its last run was ended for want of memory", show=oom),
        *UPKEEP,
        File(name="runtime", doc="the driver that runs it", show=runtime),
        File(
            name="machine",
            doc="its virtual machine while it runs, flat-keyed: arch accelerator kernel transport …",
            show=machine,
        ),
        *USAGE,
        *CONTAINER_FILES,
        File(
            name="events",
            doc="its part of the journal: JSON Lines; grows",
            read=events,
            size=events_size,
            first=events_first,
        ),
        File(
            name="wait", doc="its exit code once it has stopped; empty after a second, read again to go on", wait=wait
        ),
        *CONSOLE,
        EXEC,
        Dir(name="logs", doc="what it printed", names=_log_names, find=_log, kinds=(LOG,)),
        Dir(name="rootfs", doc="its files, live and writable", graft=rootfs, bind=rootfs_source),
        Dir(name="diff", doc="only what differs from the image, read-only", graft=diff),
        TAR,
        File(name="changes", doc="A, M or D and a path per line, against the image", show=changes, size=changes_size),
        HISTORY,
        Dir(name="mounts", doc="volumes and bind mounts in use", names=_mount_names, find=_mount, kinds=(MOUNT,)),
    ),
)

CONTAINERS = Dir(
    name="containers",
    doc="containers; mkdir creates one, rmdir removes it",
    names=_names,
    find=_find,
    kinds=(CONTAINER,),
    mkdir=create,
    object=containers_object,
    rows=(
        File(
            name="ctl",
            doc="create and start in one line; the reply is the container's name",
            object=containers_object,
            verbs=table(
                Verb(
                    name="run",
                    args="IMAGE [name=…] [platform=…] [-- ARGV…]",
                    doc="create a container from an image and start it",
                    run=run,
                ),
            ),
        ),
        error_file(containers_object),
        LIST,
    ),
)

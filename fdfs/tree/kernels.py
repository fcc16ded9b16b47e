"""kernels/: the kernels of guests, several at once, one of them the default. Floor 5."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import pruneplan
from engine.errors import AlreadyExists, Damaged, NotFound
from engine.kernelfetch import KATA, Wanted
from engine.kernelfetch import fetch as fetch_kernel
from engine.kernels import Kernel, check_kernel_name
from engine.model import check_digest
from engine.runtimes.vm import standbys, templates
from fdfs.ctl import Call, Verb, table
from fdfs.entry import STARTED_NS, Dir, File, Link, Row
from fdfs.tree.errors import error_file
from fdfs.tree.images import host_path, job_reply
from fdfs.tree.text import line, lines


def object_of(engine: Any, name: str) -> str:
    return f"kernel/{name}"


def kernels_object(engine: Any) -> str:
    return "kernels"


# --- values -----------------------------------------------------------------------------------------------------


def _value(field: str) -> Callable[[Any, str], str]:
    return lambda engine, name: line(getattr(engine.kernels.get(name), field))


def features(engine: Any, name: str) -> str:
    return lines(engine.kernels.get(name).features)


def modules(engine: Any, name: str) -> str:
    return lines(engine.kernels.get(name).modules)


def templates_of(engine: Any, name: str) -> str:
    directory = engine.kernels.get(name).directory / "templates"
    return lines([*templates.listing(directory), *standbys.listing(directory)])


def forget(engine: Any, name: str, call: Call) -> None:
    directory = engine.kernels.get(name).directory / "templates"
    templates.forget(directory)
    standbys.forget(directory)


def used_by(engine: Any, name: str) -> str:
    return lines(engine.kernels.users(name))


def default_target(engine: Any) -> str:
    found = engine.kernels.default()
    if found is None:
        raise NotFound("no guest kernel is here")
    return str(found)


# --- files ------------------------------------------------------------------------------------------------------


def _image(engine: Any, name: str) -> Path:
    return Path(engine.kernels.get(name).image)


def _initfs(engine: Any, name: str) -> Path | None:
    """The one in use: made last, else fetched."""
    kernel = engine.kernels.get(name)
    made = [*kernel.made(), kernel.directory / "initfs"]
    return made[0] if made[0].exists() else None


def _pread(path: Path, offset: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def vmlinux(engine: Any, name: str, offset: int, size: int) -> bytes:
    return _pread(_image(engine, name), offset, size)


def vmlinux_size(engine: Any, name: str) -> int:
    return _image(engine, name).stat().st_size


def vmlinux_mtime(engine: Any, name: str) -> int:
    return _image(engine, name).stat().st_mtime_ns


def initfs(engine: Any, name: str, offset: int, size: int) -> bytes:
    path = _initfs(engine, name)
    return b"" if path is None else _pread(path, offset, size)


def initfs_size(engine: Any, name: str) -> int:
    path = _initfs(engine, name)
    return 0 if path is None else path.stat().st_size


def initfs_mtime(engine: Any, name: str) -> int:
    path = _initfs(engine, name)
    return STARTED_NS if path is None else path.stat().st_mtime_ns


# --- verbs ------------------------------------------------------------------------------------------------------


def import_(engine: Any, call: Call) -> str:
    path, name = Path(host_path(call.args[0])), call.arg(1)
    if name is not None and check_kernel_name(name) in engine.kernels.names():
        raise AlreadyExists(f"a kernel {name} is here", at=name)
    digest = call.options.get("digest", "")
    if digest:
        check_digest(digest)
    if not path.exists():
        raise NotFound("no such file", at=str(path))
    arch = call.options.get("arch") or None

    def work(task: Any) -> str:
        return _usable(engine, engine.kernels.import_(path, name, arch, task.check, digest))

    return job_reply(engine.jobs.start(f"kernels import {path}", work))


def fetch(engine: Any, call: Call) -> str:
    given = {"tag": call.args[0], "digest": "", **call.options}
    given["repository"] = given.pop("repo", KATA)
    wanted = Wanted(**given).check()
    if wanted.name and check_kernel_name(wanted.name) in engine.kernels.names():
        raise AlreadyExists(f"a kernel {wanted.name} is here", at=wanted.name)

    def work(task: Any) -> str:
        return _usable(engine, fetch_kernel(engine.kernels, wanted, task))

    return job_reply(engine.jobs.start(f"kernels fetch {wanted.tag}", work))


def _usable(engine: Any, kernel: Kernel) -> str:
    """A first kernel may be all the runtime was waiting for: `status` is to say so."""
    engine.probe()
    return kernel.name


def choose(engine: Any, call: Call) -> None:
    engine.kernels.choose(call.args[0])


def choose_this(engine: Any, name: str, call: Call) -> None:
    engine.kernels.choose(name)


def plan(engine: Any) -> str:
    return pruneplan.of_kernels(engine.kernels).text()


def prune(engine: Any, call: Call) -> str:
    """The hash is checked now, so that the writer hears of a changed plan, and again when the job runs."""
    digest = call.arg(0) or ""
    plan = pruneplan.of_kernels(engine.kernels)
    plan.check(digest)
    return job_reply(engine.jobs.start(f"kernels prune {digest}", lambda task: plan.run(digest, task)))


def remove(engine: Any, name: str, call: Call | None = None) -> None:
    engine.kernels.remove(name)


# --- rows -------------------------------------------------------------------------------------------------------


def _names(engine: Any) -> list[str]:
    found = list(engine.kernels.names())
    return [*found, "default"] if found else []


def _find(engine: Any, name: str) -> Row | None:
    try:
        if name == "default":
            return None if engine.kernels.default() is None else DEFAULT
        engine.kernels.get(name)
    except NotFound:
        return None
    except Damaged:
        return KERNEL  # it can be removed
    return KERNEL


def default_link(engine: Any, name: str) -> str:
    return default_target(engine)


DEFAULT = Link(name="default", doc="the kernel of guests whose config names none", target=default_link)

KERNEL = Dir(
    name="<version>",
    doc="one kernel",
    rmdir=remove,
    object=object_of,
    rows=(
        File(
            name="vmlinux",
            doc="the kernel as guests boot it, unpacked",
            read=vmlinux,
            size=vmlinux_size,
            mtime=vmlinux_mtime,
        ),
        File(
            name="initfs",
            doc="the initial file system guests booted with last (agent and modules); empty before",
            read=initfs,
            size=initfs_size,
            mtime=initfs_mtime,
        ),
        File(name="version", doc="as uname -r says it in a guest", show=_value("version")),
        File(name="arch", doc="as uname -m says it", show=_value("arch")),
        File(name="format", doc="of the file it came from: bzImage, vmlinux, Image, zboot", show=_value("format")),
        File(name="digest", doc="sha256 of the file it came from", show=_value("digest")),
        File(name="image_digest", doc="sha256 of vmlinux", show=_value("image_digest")),
        File(name="source", doc="where it came from", show=_value("source")),
        File(name="verified", doc="the digest its file had to have, if any", show=_value("verified")),
        File(name="features", doc="what its guests can do, one per line; empty: not known", show=features),
        File(name="modules", doc="modules in its initfs, in the order they are loaded", show=modules),
        File(name="used_by", doc="containers that name it or run with it", show=used_by),
        File(
            name="templates",
            doc="snapshots that machines start from, one per shape; those that did not work; what stands by",
            show=templates_of,
        ),
        File(
            name="ctl",
            doc="what to do with it",
            object=object_of,
            verbs=table(
                Verb(name="default", doc="let guests whose config names none have this one", run=choose_this),
                Verb(name="forget", doc="remove its templates; new ones are made as machines start", run=forget),
                Verb(name="remove", doc="delete it, as rmdir does; refused while a container uses it", run=remove),
            ),
        ),
        error_file(object_of),
    ),
)

KERNELS = Dir(
    name="kernels",
    doc="kernels of guests; rmdir removes one",
    names=_names,
    find=_find,
    kinds=(DEFAULT, KERNEL),
    object=kernels_object,
    rows=(
        File(
            name="ctl",
            doc="get, choose and clean up kernels",
            object=kernels_object,
            verbs=table(
                Verb(
                    name="fetch",
                    args="TAG [digest=…] [repo=…] [asset=…] [member=…] [name=…] [arch=…] [initfs=…]",
                    doc="a kernel of a GitHub release, Kata's unless repo=; its sha256 must be given (a job)",
                    run=fetch,
                ),
                Verb(
                    name="import",
                    args="PATH [VERSION] [digest=…] [arch=…]",
                    doc="a vmlinux, vmlinuz, Image or Debian kernel package of this host (a job)",
                    run=import_,
                ),
                Verb(name="default", args="VERSION", doc="the kernel of guests whose config names none", run=choose),
                Verb(name="prune", args="[HASH]", doc="remove what the plan with this hash lists (a job)", run=prune),
            ),
        ),
        error_file(kernels_object),
        File(
            name="plan",
            doc="what prune would remove: kernels no container uses, but for the default; ends with what runs it",
            show=plan,
        ),
    ),
)

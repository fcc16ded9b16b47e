"""images/: what was pulled, loaded and imported; tags are symlinks, images are named by manifest digest. Floor 5.

A reference such as ghcr.io/o/r:tag becomes nested directories that end in a symlink; images of docker.io/library are
called by their short name, as people type them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any

from engine.errors import AlreadyExists, InvalidArgument, NotFound
from engine.images import platforms
from engine.images.archive import import_rootfs
from engine.images.archive import load as load_archive
from engine.images.export import export as export_tree
from engine.images.gc import Scope
from engine.images.manifests import Platform, parse_platform
from engine.images.pull import pull as pull_image
from engine.images.push import check as check_push
from engine.images.push import push as push_image
from engine.images.reference import parse as parse_reference
from engine.images.save import FORMATS
from engine.images.save import save as save_image
from fdfs import svg
from fdfs.ctl import Call, Verb, table
from fdfs.entry import BindSource, Dir, File, Link, Row
from fdfs.rootfs import TreeGraft
from fdfs.tree.diffs import DIFFS
from fdfs.tree.diffs import origins as origins  # the binder asks for them here
from fdfs.tree.errors import error_file
from fdfs.tree.store import run_plan
from fdfs.tree.tags import names
from fdfs.tree.text import line, lines, stamp

# --- tags -------------------------------------------------------------------------------------------------------


def _tag_names(engine: Any, *parts: str) -> Iterable[str]:
    return names(engine).below.get("/".join(parts), ())


def _tag_row(engine: Any, *parts: str) -> Row | None:
    path, known = "/".join(parts), names(engine)
    if path in known.below:
        return TAG_DIR
    return TAG if path in known.digests else None


def tag_target(engine: Any, *parts: str) -> str:
    digest = names(engine).digests.get("/".join(parts))
    if digest is None:
        raise NotFound("no such tag", at="/".join(parts))
    return "../" * (len(parts) - 1) + f"by-digest/{digest}"


# --- an image ---------------------------------------------------------------------------------------------------


def _image(engine: Any, digest: str) -> Row | None:
    try:
        engine.images.get(digest)
    except (NotFound, InvalidArgument):
        return None
    return IMAGE


def object_of(engine: Any, digest: str) -> str:
    return f"image/{digest}"


def manifest(engine: Any, digest: str) -> bytes:
    return bytes(engine.images.manifest(digest))


def config(engine: Any, digest: str) -> bytes:
    return bytes(engine.images.config_bytes(digest))


def references(engine: Any, digest: str) -> str:
    return lines(engine.images.references(digest))


def platform(engine: Any, digest: str) -> str:
    return line(engine.images.get(digest).platform)


def created(engine: Any, digest: str) -> str:
    return line(engine.images.get(digest).created)


def pulled(engine: Any, digest: str) -> str:
    return stamp(engine.images.get(digest).pulled_ns)


def size_bytes(engine: Any, digest: str) -> str:
    return line(engine.images.get(digest).size)


def unique_bytes(engine: Any, digest: str) -> str:
    return f"{engine.images.unique_bytes(digest)}\n"


def shared_bytes(engine: Any, digest: str) -> str:
    return f"{engine.images.shared_bytes(digest)}\n"


def history(engine: Any, digest: str) -> str:
    """A line per step, oldest first: bytes of its layer's files (`-` without a layer), when, and the instruction."""
    steps = engine.images.history(digest)
    width = max((len(str(step.size)) for step in steps), default=1)
    out = []
    for step in steps:
        size = step.size if step.diff_id else "-"
        out.append(f"{size:>{width}}  {_second(step.created):<20}  {' '.join(step.text.split())}".rstrip() + "\n")
    return "".join(out)


def _second(created: str | None) -> str:
    """A time to the second as RFC 3339; `-` for none."""
    return re.sub(r"\.\d+", "", created or "") or "-"


def history_json(engine: Any, digest: str) -> str:
    """JSON Lines, oldest first, as the image config has them, with the layer each made."""
    out = []
    diffs = iter(engine.images.layers(digest))
    for step in engine.images.config(digest).history or ():
        entry = step.model_dump(exclude_defaults=True)
        if not step.empty_layer and (layer := next(diffs, None)) is not None:
            entry["layer"] = layer.diff_id
        out.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(out)


def used_by(engine: Any, digest: str) -> str:
    return lines(engine.images.users(digest))


def rootfs(engine: Any, digest: str) -> TreeGraft:
    chain = engine.images.get(digest).chain_id
    return TreeGraft(engine.trees.open(chain), chain, origins(engine, digest))


def rootfs_source(engine: Any, digest: str) -> BindSource:
    return BindSource(chain=engine.images.get(digest).chain_id)


def _layer_names(engine: Any, digest: str) -> list[str]:
    return [f"{index:02d}" for index in range(len(engine.images.layers(digest)))]


def _layer_link(engine: Any, digest: str, number: str) -> Row | None:
    return LAYER if number in _layer_names(engine, digest) else None


def layer_target(engine: Any, digest: str, number: str) -> str:
    return f"../../../../layers/{engine.images.layers(digest)[int(number)].diff_id}"


def _platform_names(engine: Any, digest: str) -> list[str]:
    return [entry.name for entry in platforms.listed(engine.images, digest)]


def _entry(engine: Any, digest: str, name: str) -> platforms.Entry:
    for entry in platforms.listed(engine.images, digest):
        if entry.name == name:
            return entry
    raise NotFound("the index lists no such platform", at=name)


def _platform(engine: Any, digest: str, name: str) -> Row | None:
    try:
        return PLATFORM if _entry(engine, digest, name).present else ABSENT
    except NotFound:
        return None


def platform_target(engine: Any, digest: str, name: str) -> str:
    return f"../../{_entry(engine, digest, name).digest}"


def platform_digest(engine: Any, digest: str, name: str) -> str:
    return line(_entry(engine, digest, name).digest)


def platform_size(engine: Any, digest: str, name: str) -> str:
    return line(_entry(engine, digest, name).size)


def platform_present(engine: Any, digest: str, name: str) -> str:
    return line(_entry(engine, digest, name).present)


# --- verbs ------------------------------------------------------------------------------------------------------


def job_reply(number: int) -> str:
    return f"jobs/{number}"


def pull(engine: Any, call: Call) -> str:
    reference = parse_reference(call.args[0])
    wanted = _asked_for(call)

    def work(task: Any) -> str:
        return str(pull_image(engine.images, reference, wanted, task).digest)

    return job_reply(engine.jobs.start(_line("pull", call), work))


def _asked_for(call: Call) -> Platform | None:
    wanted = call.options.get("platform")
    return None if wanted is None else parse_platform(wanted)


def _line(verb: str, call: Call) -> str:
    return " ".join((verb, *call.args, *(f"{key}={value}" for key, value in call.options.items())))


def host_path(text: str) -> str:
    """A file of the host by absolute path (the daemon has no working directory of the writer's)."""
    if not text.startswith("/"):
        raise InvalidArgument("an absolute path expected", at=text, hint='echo "load $PWD/FILE" > ctl')
    return text


def load(engine: Any, call: Call) -> str:
    path = host_path(call.args[0])
    wanted = _asked_for(call)

    def work(task: Any) -> str:
        return " ".join(image.digest for image in load_archive(engine.images, path, task, wanted))

    return job_reply(engine.jobs.start(_line("load", call), work))


def import_(engine: Any, call: Call) -> str:
    path = host_path(call.args[0])
    reference = call.args[1]
    parse_reference(reference)

    def work(task: Any) -> str:
        return str(import_rootfs(engine.images, path, reference, task).digest)

    return job_reply(engine.jobs.start(_line("import", call), work))


def plan(engine: Any) -> str:
    return str(engine.gc.text(Scope.PRUNE))


def prune(engine: Any, call: Call) -> str:
    return run_plan(engine, Scope.PRUNE, call)


def layers_svg(engine: Any, digest: str) -> str:
    rows = engine.meta.query(
        "SELECT l.diff_id, l.size, count(DISTINCT o.image) - 1 AS others FROM image_layers i"
        " JOIN layers l ON l.diff_id = i.diff_id JOIN image_layers o ON o.diff_id = i.diff_id"
        " WHERE i.image = ? GROUP BY l.diff_id",
        (digest,),
    )
    known = {row["diff_id"]: (row["size"], row["others"]) for row in rows}
    stack = [
        svg.Layer(layer.diff_id, *known.get(layer.diff_id, (0, 0)), layer.created_by)
        for layer in engine.images.layers(digest)
    ]
    names = [parse_reference(name).familiar() for name in engine.images.references(digest)]
    return svg.layers(", ".join(names) or digest[:19], stack)


def tag(engine: Any, digest: str, call: Call) -> None:
    engine.images.tag(digest, call.args[0])


def untag(engine: Any, digest: str, call: Call) -> None:
    name = parse_reference(call.args[0]).normalised()
    if engine.images.tags().get(name) != digest:
        raise NotFound("this image has no such tag", at=call.args[0])
    engine.images.untag(call.args[0])


def verify(engine: Any, digest: str, call: Call) -> str:
    def work(task: Any) -> str | None:
        result = engine.images.verify(digest, task)
        return None if result is None else str(result)

    return job_reply(engine.jobs.start(f"verify {digest}", work))


def push(engine: Any, digest: str, call: Call) -> str:
    named = check_push(engine.images, digest, call.args[0])

    def work(task: Any) -> str:
        return str(push_image(engine.images, digest, named, task))

    return job_reply(engine.jobs.start(f"push {digest} {call.args[0]}", work))


def vacant(text: str) -> str:
    """A file of the host that is to be made: refused now rather than in the job when it is there."""
    if os.path.lexists(host_path(text)) and not (os.path.isdir(text) and not os.listdir(text)):
        raise AlreadyExists("the file exists", at=text, hint="give another name, or remove it first")
    return text


def save(engine: Any, digest: str, call: Call) -> str:
    path, form = vacant(call.args[0]), call.options.get("format", "oci")
    if form not in FORMATS:
        raise InvalidArgument(f"format: one of {', '.join(FORMATS)} expected", at=form)
    return job_reply(
        engine.jobs.start(
            f"save {digest} {path} format={form}", lambda task: save_image(engine.images, digest, path, form, task)
        )
    )


def export(engine: Any, digest: str, call: Call) -> str:
    path = vacant(call.args[0])
    return job_reply(
        engine.jobs.start(f"export {digest} {path}", lambda task: export_tree(engine.images, digest, path, task))
    )


def remove(engine: Any, digest: str, call: Call | None = None) -> None:
    engine.images.remove(digest)


# --- rows -------------------------------------------------------------------------------------------------------

LAYER = Link(name="<NN>", doc="one layer, 00 the lowest", target=layer_target)
TAG = Link(name="<name>:<tag>", doc="a tag: the image it names", target=tag_target)
TAG_DIR = Dir(name="<host or path>", doc="references with a path", names=_tag_names, find=_tag_row)

PLATFORM = Link(name="<os-arch>", doc="the image of another platform that is here", target=platform_target)
ABSENT = Dir(
    name="<os-arch[-variant]>",
    doc="one that is not here: pull REF platform=OS/ARCH fetches it",
    rows=(
        File(name="digest", doc="of its manifest", show=platform_digest),
        File(name="size_bytes", doc="of its manifest, all that the index says", show=platform_size),
        File(name="present", doc="0: it is not in the store", show=platform_present),
    ),
)

IMAGE = Dir(
    name="sha256:<manifest>",
    doc="one image, by the digest of its manifest",
    rmdir=remove,
    object=object_of,
    rows=(
        File(
            name="ctl",
            doc="what to do with it",
            object=object_of,
            verbs=table(
                Verb(name="tag", args="REF", doc="give it one more name", run=tag),
                Verb(name="untag", args="REF", doc="take a name away", run=untag),
                Verb(name="push", args="REF", doc="send it to a registry under this name (a job)", run=push),
                Verb(
                    name="save",
                    args="PATH [format=…]",
                    doc="write it to a new file of this host: oci (a directory, or .tar) or docker (a job)",
                    run=save,
                ),
                Verb(name="export", args="PATH", doc="write its rootfs to a new tar of this host (a job)", run=export),
                Verb(name="verify", doc="read all of it again and check every digest (a job)", run=verify),
                Verb(name="remove", doc="delete it, its tags, and layers nothing else needs", run=remove),
            ),
        ),
        error_file(object_of),
        File(name="manifest.json", doc="its manifest, byte for byte", show=manifest),
        File(name="config.json", doc="its configuration, byte for byte", show=config),
        File(name="reference", doc="its tags, one per line", show=references),
        File(name="platform", doc="os/architecture[/variant]", show=platform),
        File(name="created", doc="when it was built, as its configuration says", show=created),
        File(name="pulled", doc="when it came into the store", show=pulled),
        File(name="size_bytes", doc="sum of the files of its layers", show=size_bytes),
        File(name="unique_bytes", doc="of these, in layers no other image has", show=unique_bytes),
        File(name="shared_bytes", doc="of these, in layers other images have too", show=shared_bytes),
        File(name="history", doc="how it was built, oldest first: bytes of files, time, instruction", show=history),
        File(name="history.jsonl", doc="the same as its configuration has it, with layers", show=history_json),
        File(name="used_by", doc="containers made from it, one per line", show=used_by),
        File(name="layers.svg", doc="a picture of its layers: how large, and which others share them", show=layers_svg),
        Dir(name="rootfs", doc="the merged tree, read-only", graft=rootfs, bind=rootfs_source),
        Dir(
            name="platforms",
            doc="what else the index it came from lists",
            names=_platform_names,
            find=_platform,
            kinds=(PLATFORM, ABSENT),
        ),
        Dir(name="layers", doc="its layers in order", names=_layer_names, find=_layer_link, kinds=(LAYER,)),
        DIFFS,
    ),
)


def _digests(engine: Any) -> list[str]:
    return [image.digest for image in engine.images.all()]


def images_object(engine: Any) -> str:
    return "images"


IMAGES = Dir(
    name="images",
    doc="images: what was pulled, loaded, imported",
    names=_tag_names,
    find=_tag_row,
    kinds=(TAG, TAG_DIR),
    object=images_object,
    rows=(
        File(
            name="ctl",
            doc="get and clean up images; the reply names the job",
            object=images_object,
            verbs=table(
                Verb(name="pull", args="REF [platform=…]", doc="fetch from a registry (a job)", run=pull),
                Verb(
                    name="load",
                    args="PATH [platform=…]",
                    doc="an OCI layout or docker-archive of this host (a job)",
                    run=load,
                ),
                Verb(name="import", args="PATH REF", doc="a tar of a root file system (a job)", run=import_),
                Verb(name="prune", args="[HASH]", doc="delete what the plan with this hash lists (a job)", run=prune),
            ),
        ),
        error_file(images_object),
        File(
            name="plan",
            doc="what prune would delete: images without a tag that no container uses; ends with what runs it",
            show=plan,
        ),
        Dir(name="by-digest", doc="the images themselves", names=_digests, find=_image, kinds=(IMAGE,)),
    ),
)

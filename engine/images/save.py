"""Images to files: an OCI layout (a directory, or a tar by its suffix), or an archive as `docker save` writes. Floor 2.

Only here: what such files look like and how they come to be. Manifests, configurations and layer blobs are those that
were pulled, byte for byte; every digest is checked while it is written. What is written stands aside under a name of
its own until it is whole; nothing that exists is replaced.

Sources: image-spec image-layout.md; Docker image spec v1.2 (manifest.json, repositories).
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from engine import host
from engine.errors import AccessDenied, AlreadyExists, EngineError, InvalidArgument, NotFound, ReadOnly
from engine.images import content, manifests, tarout
from engine.images.archive import CONTAINERD_NAME, REF_NAME
from engine.images.catalog import Images
from engine.images.reference import parse
from engine.jobs import Task
from engine.model import canonical_json, hex_of
from engine.store.blobs import no_space, write_all

FORMATS = ("oci", "docker")
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'

Body = Callable[[], Iterable[bytes]]


def save(images: Images, digest: str, path: Path | str, form: str = "oci", task: Task | None = None) -> str:
    """Write an image to `path`; returns what was written, in a line.

    `form` oci: a layout, in a directory unless `path` ends in .tar. docker: always a tar. AlreadyExists when `path` is
    there; NotFound naming the blob that is not in the store; NoSpace. Nothing is left when it fails.
    """
    task, path = task or Task(), Path(path)
    if form not in FORMATS:
        raise InvalidArgument(f"format: one of {', '.join(FORMATS)} expected", at=form)
    with images.lease():
        files = _docker(images, digest, task) if form == "docker" else _layout(images, digest, task)
        if form == "docker" or path.suffix == ".tar":
            with new_file(path) as write:
                for piece in tarout.archive(_members(files)):
                    write(piece)
        else:
            _directory(path, files)
    return f"saved {digest} as {form} to {path}"


# --- what is in it --------------------------------------------------------------------------------------------------

File = tuple[str, int, Body]  # name, size, content


def _one(data: bytes) -> Body:
    return lambda: (data,)


def _names(images: Images, digest: str) -> list[tuple[str, str]]:
    """(tag, full name) of an image's names."""
    return [(parse(name).tag, name) for name in images.references(digest) if parse(name).tag]


def _layout(images: Images, digest: str, task: Task) -> list[File]:
    raw, manifest = content.manifest_of(images, digest)
    config = images.config_bytes(digest)
    layers = images.layers(digest)
    for layer in layers:
        if not content.has_blob(images, layer):
            raise content.missing(layer)
    entry = {"mediaType": manifest.media_type, "digest": digest, "size": len(raw)}
    platform = images.get(digest).platform.split("/")
    entry["platform"] = dict(zip(("os", "architecture", "variant"), platform, strict=False))
    named = [{**entry, "annotations": {REF_NAME: tag, CONTAINERD_NAME: name}} for tag, name in _names(images, digest)]
    index = {"schemaVersion": 2, "mediaType": manifests.OCI_INDEX, "manifests": named or [entry]}
    text = canonical_json(index)
    files: dict[str, File] = {}
    blobs = [f"blobs/sha256/{hex_of(layer.blob)}" for layer in layers]
    listing = _listing(images, digest, f"blobs/sha256/{hex_of(manifest.config.digest)}", blobs)

    def add(name: str, size: int, body: Body) -> None:
        files.setdefault(name, (name, size, body))

    for layer in layers:
        body = partial(content.blob, images, layer, task)
        add(f"blobs/sha256/{hex_of(layer.blob)}", layer.size, _told(task, layer.blob, layer.size, body))
    add(f"blobs/sha256/{hex_of(manifest.config.digest)}", len(config), _one(config))
    add(f"blobs/sha256/{hex_of(digest)}", len(raw), _one(raw))
    add("oci-layout", len(LAYOUT), _one(LAYOUT))
    add("index.json", len(text), _one(text))
    add("manifest.json", len(listing), _one(listing))  # `docker load` goes by it, as Docker's own layouts have it
    return sorted(files.values())


def _docker(images: Images, digest: str, task: Task) -> list[File]:
    """As Docker's: `<config>.json`, `<diff_id>.tar` for each layer, manifest.json and repositories, which come last."""
    _, manifest = content.manifest_of(images, digest)
    config = images.config_bytes(digest)
    files: dict[str, File] = {}
    names = []
    for layer in images.layers(digest):
        content.tar(images, layer, task)  # says now what is missing
        name = f"{hex_of(layer.diff_id)}.tar"
        size = images.store_layers.info(layer.diff_id).tar_size
        names.append(name)
        files[name] = (name, size, _told(task, layer.diff_id, size, partial(content.tar, images, layer, task)))
    title = f"{hex_of(manifest.config.digest)}.json"
    listing = _listing(images, digest, title, names)
    repositories: dict[str, dict[str, str]] = {}
    top = hex_of(images.layers(digest)[-1].diff_id) if names else ""
    for tag, name in _names(images, digest) if top else ():
        repositories.setdefault(parse(name).familiar_name(), {})[tag] = top
    out = [*files.values(), (title, len(config), _one(config)), ("manifest.json", len(listing), _one(listing))]
    if repositories:
        text = canonical_json(repositories)
        out.append(("repositories", len(text), _one(text)))
    return out


def _listing(images: Images, digest: str, config: str, layers: list[str]) -> bytes:
    """manifest.json: the names in the archive of the configuration and of the layers, lowest first."""
    tags = [parse(name).familiar() for _, name in _names(images, digest)]
    return json.dumps([{"Config": config, "RepoTags": tags or None, "Layers": layers}], separators=(",", ":")).encode()


def _told(task: Task, digest: str, size: int, body: Body) -> Body:
    """A body that says how far it is."""

    def pieces() -> Iterator[bytes]:
        done = 0
        for piece in body():
            yield piece
            done += len(piece)
            task.advance(digest[:19], done, size, "writing")
        task.advance(digest[:19], size, size, "done")

    task.advance(digest[:19], 0, size, "waiting")
    return pieces


# --- where it goes --------------------------------------------------------------------------------------------------


def _members(files: list[File]) -> Iterator[tuple[tarout.Member, Iterable[bytes]]]:
    folders = sorted({"/".join(name.split("/")[:n]) for name, _, _ in files for n in range(1, name.count("/") + 1)})
    for folder in folders:
        yield tarout.Member(folder.encode(), tarout.DIRECTORY, 0o755), ()
    for name, size, body in files:
        yield tarout.Member(name.encode(), tarout.REGULAR, 0o644, size=size), body()


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A file of the host in the making: `path` appears, durable, when the block ends well; else nothing does.

    AlreadyExists when it is there; NotFound when its directory is not; AccessDenied, ReadOnly, NoSpace.
    """
    _vacant(path)
    try:
        fd, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    try:
        try:
            yield lambda data: write_all(fd, data)
            os.fchmod(fd, 0o644)
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(aside, path)
        except FileExistsError as error:
            raise AlreadyExists("the file exists", at=str(path)) from error
    except OSError as error:
        if full := no_space(error):
            raise full from error
        raise
    finally:
        os.unlink(aside)
    host.fsync_dir(path.parent)


def _vacant(path: Path) -> None:
    if not path.is_absolute():
        raise InvalidArgument("an absolute path expected", at=str(path))
    if os.path.lexists(path):
        raise AlreadyExists("the file exists", at=str(path), hint="give another name, or remove it first")
    if not path.parent.is_dir():
        raise NotFound("no such directory", at=str(path.parent))


def _unwritable(directory: Path, error: OSError) -> EngineError:
    if full := no_space(error):
        return full
    kind = ReadOnly if error.errno == errno.EROFS else AccessDenied
    return kind(f"nothing can be written there: {error.strerror}", at=str(directory), hint="give another path")


def _directory(path: Path, files: list[File]) -> None:
    """The files as a directory: made aside, renamed when whole. An empty directory may be there."""
    if path.is_dir() and not path.is_symlink() and not os.listdir(path):
        os.rmdir(path)
    _vacant(path)
    try:
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:100]}."))
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    try:
        os.chmod(aside, 0o755)
        for name, _, body in files:
            target = aside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb", buffering=0) as file:
                for piece in body():
                    write_all(file.fileno(), piece)
                os.fsync(file.fileno())
        for directory in {(aside / name).parent for name, _, _ in files}:
            host.fsync_dir(directory)
        try:
            os.rename(aside, path)
        except OSError as error:
            raise AlreadyExists("the directory exists", at=str(path)) from error
    except BaseException:
        host.remove_tree(aside)
        raise
    host.fsync_dir(path.parent)

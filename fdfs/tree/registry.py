"""registry/: images in registries, looked at before they are pulled. Floor 5.

registry/<host>/<repository, which may have slashes>/<tag>/ exists when it is looked up; what was looked up is listed.
A name below a repository is a tag when the registry has it, else a step further down. Nothing here waits for a
registry longer than a moment: then the errno says so (ETIMEDOUT, EHOSTUNREACH) and the answer, when it comes, is kept.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import AccessDenied, DeadlineExceeded, InvalidArgument, NotFound, ReadOnly, Unreachable
from engine.images.chunked import source
from engine.images.manifests import Index
from engine.images.reference import parse
from fdfs.entry import STARTED_NS, Attr, Dir, File, Row, inode, is_litter
from fdfs.readonly import STATFS, ReadHandle
from fdfs.rootfs import TreeGraft
from fdfs.tree.text import line

MAX_DEPTH = 8  # components of a repository
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_OUT_OF_REACH = (DeadlineExceeded, Unreachable, AccessDenied, NotFound)

# --- names ------------------------------------------------------------------------------------------------------


def _hosts(engine: Any) -> list[str]:
    return list(engine.remotes.hosts())


def _host(engine: Any, name: str) -> Row | None:
    if is_litter(name.encode()):
        return None
    try:
        if parse(f"{name}/x").domain != name:
            return None
    except InvalidArgument:
        return None
    engine.remotes.visit(name)
    return HOST


def _below(engine: Any, host: str, *parts: str) -> set[str]:
    """The next components of known repositories below `parts`."""
    prefix = "".join(f"{part}/" for part in parts)
    return {
        name[len(prefix) :].split("/")[0]
        for name in engine.remotes.repositories(host)
        if name.startswith(prefix) and len(name) > len(prefix)
    }


def _host_names(engine: Any, host: str) -> set[str]:
    try:
        engine.remotes.catalog(host)
    except _OUT_OF_REACH:
        pass  # most registries list nothing; what is known stands
    return _below(engine, host)


def _host_child(engine: Any, host: str, name: str) -> Row | None:
    if not _COMPONENT.fullmatch(name) or is_litter(name.encode()):
        return None
    engine.remotes.visit(host, name)
    return REPOSITORY


def _names(engine: Any, host: str, *parts: str) -> set[str]:
    repository, further = "/".join(parts), _below(engine, host, *parts)
    try:
        return {name for name in engine.remotes.tags(host, repository) if "/" not in name} | further
    except (AccessDenied, NotFound):
        return further
    except (DeadlineExceeded, Unreachable):
        if further:
            return further
        raise


def _child(engine: Any, host: str, *parts: str) -> Row | None:
    """A tag, else a longer repository name, else nothing. DeadlineExceeded and Unreachable while it cannot be known."""
    repository, name = "/".join(parts[:-1]), parts[-1]
    if is_litter(name.encode()):
        return None
    try:
        parse(f"{host}/{repository}{'@' if name.startswith('sha256:') else ':'}{name}")
    except InvalidArgument:
        return None
    remotes = engine.remotes
    if remotes.is_tag(host, repository, name):
        remotes.visit(host, repository)
        return TAG
    if not _COMPONENT.fullmatch(name) or len(parts) > MAX_DEPTH:
        return None
    longer = f"{repository}/{name}"
    if remotes.is_repository(host, longer):
        remotes.visit(host, longer)
        return REPOSITORY
    # neither a tag nor a repository: a step on the way to one, unless it stands below one that is
    return None if remotes.known_tags(host, repository) else REPOSITORY


# --- a remote image ---------------------------------------------------------------------------------------------


class _At:
    """Which image the keys of a row lead to: those of a tag, or with one more, of a platform of it."""

    def __init__(self, extra: int) -> None:
        self.extra = extra

    def split(self, keys: tuple[str, ...]) -> tuple[str, str, str]:
        """(host, repository, tag)."""
        end = len(keys) - self.extra
        return keys[0], "/".join(keys[1 : end - 1]), keys[end - 1]

    def image(self, engine: Any, keys: tuple[str, ...]) -> Any:
        host, repository, tag = self.split(keys)
        digest = ""
        if self.extra:
            digest = _platforms(engine, host, repository, tag).get(keys[-1], "")
            if not digest:
                raise NotFound("no such platform", at=keys[-1])
        return engine.remotes.image(host, repository, tag, digest)


def _platforms(engine: Any, host: str, repository: str, tag: str) -> dict[str, str]:
    """os-architecture[-variant] -> digest; empty for an image that is no index."""
    document = engine.remotes.tagged(host, repository, tag).document
    if not isinstance(document, Index):
        return {}
    found: dict[str, str] = {}
    for entry in document.manifests:
        if entry.platform is not None and entry.platform.os not in ("", "unknown"):
            found.setdefault(str(entry.platform).replace("/", "-"), entry.digest)
    return found


def _platform_names(engine: Any, *keys: str) -> Iterable[str]:
    return _platforms(engine, *TAG_AT.split(keys))


def _platform(engine: Any, *keys: str) -> Row | None:
    return PLATFORM if keys[-1] in _platforms(engine, *PLATFORM_AT.split(keys)) else None


def index(engine: Any, *keys: str) -> bytes:
    """The index a tag leads to; empty for an image without platforms."""
    tagged = engine.remotes.tagged(*TAG_AT.split(keys))
    return bytes(tagged.raw) if isinstance(tagged.document, Index) else b""


def _rows(at: _At) -> tuple[Row, ...]:
    """The files of a remote image, the same for a tag and for each of its platforms."""

    def digest(engine: Any, *keys: str) -> str:
        return line(at.image(engine, keys).digest)

    def manifest(engine: Any, *keys: str) -> bytes:
        return bytes(at.image(engine, keys).raw)

    def config(engine: Any, *keys: str) -> bytes:
        return bytes(at.image(engine, keys).config_raw)

    def platform(engine: Any, *keys: str) -> str:
        found = at.image(engine, keys).config
        return line("/".join(filter(None, (found.os, found.architecture, found.variant))))

    def created(engine: Any, *keys: str) -> str:
        return line(at.image(engine, keys).config.created)

    def history(engine: Any, *keys: str) -> str:
        image = at.image(engine, keys)
        layers = iter(image.manifest.layers)
        out = []
        for step in image.config.history or ():
            entry = step.model_dump(exclude_defaults=True)
            if not step.empty_layer and (layer := next(layers, None)) is not None:
                entry |= {"blob": layer.digest, "compressed_bytes": layer.size}
            out.append(json.dumps(entry, ensure_ascii=False) + "\n")
        return "".join(out)

    def size_bytes(engine: Any, *keys: str) -> str:
        return line(sum(layer.size for layer in at.image(engine, keys).manifest.layers))

    def missing_bytes(engine: Any, *keys: str) -> str:
        image = at.image(engine, keys)
        wanted = {entry.digest: (entry.size, diff_id) for entry, diff_id in _pairs(image)}
        return line(sum(size for size, diff_id in wanted.values() if not engine.layers.has(diff_id)))

    def layers(engine: Any, *keys: str) -> str:
        out = []
        for number, (entry, diff_id) in enumerate(_pairs(at.image(engine, keys))):
            how = source(entry)
            words = (f"{number:02d}", entry.digest, entry.size, entry.media_type, how.kind if how else "plain", diff_id)
            out.append(" ".join(map(str, words)) + "\n")
        return "".join(out)

    def unavailable(engine: Any, *keys: str) -> str:
        keys = keys[:-1]
        host, repository, tag = at.split(keys)
        why = engine.remotes.unavailable(at.image(engine, keys))
        name = f"{host}/{repository}{'@' if tag.startswith('sha256:') else ':'}{tag}"
        option = f" platform={keys[-1].replace('-', '/', 2)}" if at.extra else ""
        how = f"echo 'pull {name}{option}' > images/ctl"
        return f"The files of this image cannot be read by parts: {why}.\nTo see them: {how}\n"

    def files(engine: Any, *keys: str) -> LazyGraft:
        return LazyGraft(engine, at, keys[:-1])

    rootfs = Dir(name="rootfs", doc="its merged tree, fetched as it is read (eStargz, zstd:chunked)", graft=files)
    plain = File(name="rootfs.unavailable", doc="instead of rootfs: why not, and how to pull", show=unavailable)

    def names(engine: Any, *keys: str) -> list[str]:
        try:
            return [plain.name if engine.remotes.unavailable(at.image(engine, keys)) else rootfs.name]
        except NotFound:
            return []  # nothing for this host's platform; `platforms` has the others

    def find(engine: Any, *keys: str) -> Row | None:
        if keys[-1] not in (rootfs.name, plain.name) or keys[-1] not in names(engine, *keys[:-1]):
            return None
        return rootfs if keys[-1] == rootfs.name else plain

    at_names[at.extra] = (names, find, (rootfs, plain))
    return (
        File(name="digest", doc="of its manifest", show=digest),
        File(name="manifest.json", doc="its manifest, byte for byte", show=manifest),
        File(name="config.json", doc="its configuration, byte for byte", show=config),
        File(name="platform", doc="os/architecture[/variant]", show=platform),
        File(name="created", doc="when it was built, as its configuration says", show=created),
        File(name="history", doc="how it was built: JSON Lines, oldest first", show=history),
        File(name="layers", doc="lowest first, one per line: NN BLOB BYTES MEDIA_TYPE KIND DIFF_ID", show=layers),
        File(name="size_bytes", doc="of its layers as compressed", show=size_bytes),
        File(name="missing_bytes", doc="of these, what a pull would fetch", show=missing_bytes),
    )


at_names: dict[int, tuple[Any, Any, tuple[Row, ...]]] = {}


def _pairs(image: Any) -> list[tuple[Any, str]]:
    return list(zip(image.manifest.layers, image.config.rootfs.diff_ids, strict=True))


class LazyGraft:
    """The tree of a remote image, which may take a while to be there: every operation on what is in it may say so."""

    def __init__(self, engine: Any, at: _At, keys: tuple[str, ...]) -> None:
        self._engine, self._at, self._keys = engine, at, keys

    def _tree(self) -> TreeGraft:
        image = self._at.image(self._engine, self._keys)
        host, repository, _ = self._at.split(self._keys)
        tree = self._engine.remotes.tree(host, repository, image)
        extra = {diff_id: {"media_type": entry.media_type} for entry, diff_id in _pairs(image)}
        return TreeGraft(tree, image.digest, extra)

    def getattr(self, path: bytes) -> Attr:
        if path:
            return self._tree().getattr(path)
        mode = stat.S_IFDIR | 0o555  # known without asking
        return Attr(mode=mode, ino=inode("/".join(self._keys).encode()), nlink=2, mtime_ns=STARTED_NS)

    def readdir(self, path: bytes) -> Iterable[tuple[bytes, int, int]]:
        return self._tree().readdir(path)

    def readlink(self, path: bytes) -> bytes:
        return self._tree().readlink(path)

    def open(self, path: bytes, flags: int) -> ReadHandle:
        return self._tree().open(path, flags)

    def listxattr(self, path: bytes) -> list[bytes]:
        return self._tree().listxattr(path) if path else []

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        return self._tree().getxattr(path, name)

    def statfs(self) -> Mapping[str, int]:
        return STATFS

    def change(self, operation: str, path: bytes, *arguments: Any) -> Any:
        raise ReadOnly("an image in a registry is read-only")


# --- rows -------------------------------------------------------------------------------------------------------

TAG_AT, PLATFORM_AT = _At(0), _At(1)
_PLATFORM_ROWS, _TAG_ROWS = _rows(PLATFORM_AT), _rows(TAG_AT)

PLATFORM = Dir(
    name="<os>-<architecture>",
    doc="the image of one platform",
    rows=_PLATFORM_ROWS,
    names=at_names[1][0],
    find=at_names[1][1],
    kinds=at_names[1][2],
)

TAG = Dir(
    name="<tag>",
    doc="one image of a registry; of several platforms, this host's",
    rows=(
        *_TAG_ROWS,
        File(name="index.json", doc="the index of its platforms, byte for byte; empty without one", show=index),
        Dir(name="platforms", doc="its platforms", names=_platform_names, find=_platform, kinds=(PLATFORM,)),
    ),
    names=at_names[0][0],
    find=at_names[0][1],
    kinds=at_names[0][2],
)

REPOSITORY = Dir(
    name="<repository>", doc="part of a repository's name; holds its tags", names=_names, find=_child, kinds=(TAG,)
)

HOST = Dir(name="<host>", doc="one registry", names=_host_names, find=_host_child, kinds=(REPOSITORY,))

REGISTRY = Dir(
    name="registry",
    doc="images in registries, to look at before pulling: registry/HOST/REPOSITORY/TAG; lists what was looked at",
    names=_hosts,
    find=_host,
    kinds=(HOST,),
)

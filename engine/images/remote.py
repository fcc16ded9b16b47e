"""Images in registries, looked at without pulling them. Floor 2.

Only here: what is known of hosts, repositories and tags that somebody asked for, the documents of a remote image, and
its merged tree where every layer can be read by ranges (chunked.py). Nothing here waits for a registry longer than a
moment (flights.py). Trees and fetched parts are kept below `<store>/remote`, bounded, least recently used first out:

    remote/layers/<hex of the blob>/   index chunks data       (toc.py, ranges.py)
    remote/trees/<hex>/                erofs prov              one per list of layers

Threading: all methods from any thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from engine.errors import AccessDenied, Damaged, InvalidArgument, NotFound, Unsupported
from engine.images import chunked, manifests, registries, toc
from engine.images.flights import Flights
from engine.images.manifests import Descriptor, Index, Manifest
from engine.images.ranges import RemoteLayer
from engine.images.reference import Reference, parse
from engine.images.registry import Registry
from engine.images.transport import Policy
from engine.jobs import Task
from engine.model import ImageConfig, hex_of
from engine.store import erofs
from engine.store.index import read_index
from engine.store.merge import Merger
from engine.store.tree import Handle, Provenance, Stat, Tree

log = logging.getLogger(__name__)

TAG_SECONDS = 60.0  # what a tag stands for, and which tags there are
FOREVER = 1e9  # what a digest stands for
MAX_TAGS = 10_000
MAX_PAGE = 4 << 20  # bytes of one page of tags or repositories
MAX_PAGES = 20
CONNECTED = 60.0  # seconds a connection is used: logins and rules in files may change
MAX_REGISTRIES = 64  # connections to repositories kept
MAX_IMAGES = 64  # documents kept
MAX_TREES = 16  # open at a time
MAX_BYTES = 4 << 30  # of the disk below remote/
POLICY = Policy(attempts=2, connect=5.0, read=15.0, answer=30.0, budget=60.0)


@dataclass(frozen=True, slots=True)
class Tagged:
    """What a tag (or digest) leads to. `index` is None for an image without platforms."""

    digest: str
    raw: bytes
    document: Manifest | Index


@dataclass(frozen=True, slots=True)
class RemoteImage:
    digest: str
    raw: bytes
    manifest: Manifest
    config_raw: bytes
    config: ImageConfig


class RemoteTree:
    """A merged tree whose files are fetched when they are read. As engine.store.tree.Tree, as far as people read."""

    def __init__(self, directory: Path, layers: dict[str, RemoteLayer]) -> None:
        self._by_fd: dict[int, RemoteLayer] = {}
        self._layers = layers
        self._tree = Tree(directory, self._open)
        self.root = self._tree.root

    def _open(self, digest: str) -> Handle:
        layer = self._layers.get(digest)
        if layer is None:
            raise Damaged("the tree refers to a layer the image has not", at=digest)
        handle = Handle(layer.path)
        self._by_fd[handle.fd] = layer
        return handle

    def lookup(self, path: bytes) -> int:
        return self._tree.lookup(path)

    def stat(self, nid: int) -> Stat:
        return self._tree.stat(nid)

    def readdir(self, nid: int) -> list[tuple[bytes, int, int]]:
        return self._tree.readdir(nid)

    def readlink(self, nid: int) -> bytes:
        return self._tree.readlink(nid)

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        return self._tree.xattrs(nid)

    def provenance(self, nid: int) -> Provenance:
        return self._tree.provenance(nid)

    def pread(self, nid: int, size: int, offset: int) -> bytes:
        """As Tree.pread; DeadlineExceeded when the registry takes long (reading again goes on)."""
        fd, base, length = self._tree.extent(nid)
        count = min(size, length - offset)
        if count <= 0 or offset < 0:
            return b""
        return self._by_fd[fd].read(base + offset, count)


class Remotes:
    """All registries somebody looks into. `store` is the store's directory; `connect` makes a Registry (for tests)."""

    def __init__(self, store: Path, connect: Callable[[Reference, Task], Registry] | None = None) -> None:
        self._store, self._root = store, store / "remote"
        self._tmp = store / "tmp"
        self._connect = connect or self._by_rules
        self._flights = Flights()
        self._lock = threading.Lock()
        self._registries: OrderedDict[str, tuple[Registry, float]] = OrderedDict()  # and until when it is used
        self._images: OrderedDict[str, RemoteImage] = OrderedDict()
        self._trees: OrderedDict[str, RemoteTree] = OrderedDict()
        self._layers: dict[str, RemoteLayer] = {}
        self._visited: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._tasks: WeakValueDictionary[int, Task] = WeakValueDictionary()  # one per connection, to break it

    def close(self) -> None:
        """Break what is under way. Idempotent."""
        self._flights.close()
        for task in list(self._tasks.values()):
            task.cancel()
        with self._lock:
            layers, self._layers = list(self._layers.values()), {}
            connections, self._registries = list(self._registries.values()), OrderedDict()
        for layer in layers:
            layer.close()
        for registry, _ in connections:
            registry.__exit__()

    def _by_rules(self, reference: Reference, task: Task) -> Registry:
        rules = registries.load(self._store).rules(reference.domain)
        return Registry(reference, task, policy=POLICY, rules=rules)

    # --- names ------------------------------------------------------------------------------------------------------

    def visit(self, host: str, repository: str = "") -> None:
        """Remember that somebody looked: it is listed from now on."""
        key = (host, repository)
        with self._lock:
            self._visited[key] = None
            self._visited.move_to_end(key)
            while len(self._visited) > 1024:
                self._visited.popitem(last=False)

    def hosts(self) -> list[str]:
        with self._lock:
            return sorted({host for host, _ in self._visited})

    def repositories(self, host: str) -> set[str]:
        """Repositories known on a host: those looked at, and what the registry lists, where it does."""
        with self._lock:
            known = {repository for place, repository in self._visited if place == host and repository}
        return known | set(self._flights.known((host, "catalog")) or ())

    def catalog(self, host: str) -> None:
        """Ask the registry for its repositories; most public ones refuse. As `tags`."""

        def ask() -> list[str]:
            return self._pages(self._registry(host, "catalog"), "/v2/_catalog?n=1000", "repositories")

        self._flights.ask(host, (host, "catalog"), ask, TAG_SECONDS)

    def tags(self, host: str, repository: str) -> list[str]:
        """The tags of a repository. NotFound, AccessDenied, DeadlineExceeded, Unreachable."""

        def ask() -> list[str]:
            registry = self._registry(host, repository)
            path = f"/v2/{registry.reference.path}/tags/list?n=1000"
            return self._pages(registry, path, "tags")

        found = self._flights.ask(host, (host, repository, "tags"), ask, TAG_SECONDS)
        return list(found)

    def known_tags(self, host: str, repository: str) -> list[str]:
        return list(self._flights.known((host, repository, "tags")) or ())

    def _pages(self, registry: Registry, path: str, key: str) -> list[str]:
        out: list[str] = []
        for _ in range(MAX_PAGES):
            raw, link = registry.document(path, f"the list of {key}", MAX_PAGE)
            document = manifests.load_json(raw, f"the list of {key}")
            names = document.get(key) if isinstance(document, dict) else None
            out += [name for name in names or () if isinstance(name, str) and len(name) <= 255]
            target = link.partition("<")[2].partition(">")[0]
            target = target[target.find("/v2/") :] if "/v2/" in target else ""
            if len(out) >= MAX_TAGS or 'rel="next"' not in link or not target:
                break
            path = target
        return out[:MAX_TAGS]

    def is_tag(self, host: str, repository: str, name: str) -> bool:
        """Whether a tag or digest is there. DeadlineExceeded, Unreachable."""
        if name in self.known_tags(host, repository):
            return True
        try:
            self.tagged(host, repository, name)
        except (NotFound, AccessDenied, InvalidArgument):
            return False
        return True

    def is_repository(self, host: str, repository: str) -> bool:
        """Whether it is one, or known repositories lie below it. DeadlineExceeded, Unreachable."""
        known = self.repositories(host)
        if repository in known or any(name.startswith(f"{repository}/") for name in known):
            return True
        try:
            self.tags(host, repository)
        except (NotFound, AccessDenied, InvalidArgument):
            return False
        return True

    # --- documents --------------------------------------------------------------------------------------------------

    def _registry(self, host: str, repository: str) -> Registry:
        """A connection to a repository, kept for the next question."""
        key = f"{host}/{repository}"
        reference = parse(key)
        with self._lock:
            known = self._registries.get(key)
            if known is not None and known[1] > time.monotonic():
                self._registries.move_to_end(key)
                return known[0]
        task = Task()
        made = self._connect(reference, task)
        with self._lock:
            self._tasks[id(task)] = task
            self._registries[key] = made, time.monotonic() + CONNECTED
            while len(self._registries) > MAX_REGISTRIES:
                self._registries.popitem(last=False)  # closed when its last user lets go
        return made

    def tagged(self, host: str, repository: str, name: str) -> Tagged:
        """What a tag or digest stands for. NotFound, AccessDenied, DeadlineExceeded, Unreachable, Damaged."""
        digest = name.startswith("sha256:")
        parse(f"{host}/{repository}{'@' if digest else ':'}{name}")

        def ask() -> Tagged:
            raw, media_type, found = self._registry(host, repository).manifest(name)
            return Tagged(found, raw, manifests.parse(raw, media_type))

        found: Tagged = self._flights.ask(
            host, (host, repository, "tag", name), ask, FOREVER if digest else TAG_SECONDS
        )
        return found

    def image(self, host: str, repository: str, name: str, digest: str = "") -> RemoteImage:
        """The image `digest`, or the one of this host's platform that `name` leads to."""
        tagged = self.tagged(host, repository, name)
        if isinstance(tagged.document, Index):
            digest = digest or manifests.select(tagged.document, manifests.host()).digest
        else:
            digest = tagged.digest
        with self._lock:
            known = self._images.get(digest)
            if known is not None:
                self._images.move_to_end(digest)
                return known

        def ask() -> RemoteImage:
            registry = self._registry(host, repository)
            raw, media_type = tagged.raw, ""
            if digest != tagged.digest:
                raw, media_type, _ = registry.manifest(digest)
            manifest = manifests.parse(raw, media_type)
            if not isinstance(manifest, Manifest):
                raise Unsupported("an index within an index: pull it to look into it", at=digest)
            config_raw = registry.small_blob(manifest.config)
            config = manifests.parse_config(config_raw)
            manifests.check_pair(manifest, config)
            image = RemoteImage(digest, raw, manifest, config_raw, config)
            with self._lock:
                self._images[digest] = image
                while len(self._images) > MAX_IMAGES:
                    self._images.popitem(last=False)
            return image

        found: RemoteImage = self._flights.ask(host, (host, "image", digest), ask, 1.0)
        return found

    # --- trees ------------------------------------------------------------------------------------------------------

    @staticmethod
    def unavailable(image: RemoteImage) -> str:
        """Why the files cannot be looked at without pulling; "" when they can."""
        plain = [entry for entry in image.manifest.layers if chunked.source(entry) is None]
        if not plain:
            return ""
        return f"{len(plain)} of {len(image.manifest.layers)} layers are neither eStargz nor zstd:chunked"

    def tree(self, host: str, repository: str, image: RemoteImage) -> RemoteTree:
        """The merged tree. Unsupported, Damaged, DeadlineExceeded (it is being made), Unreachable."""
        key = _tree_key(image)
        with self._lock:
            known = self._trees.get(key)
            if known is not None:
                self._trees.move_to_end(key)
                return known
        found: RemoteTree = self._flights.ask(
            host, (host, "tree", key), lambda: self._build(host, repository, image, key), 1.0
        )
        return found

    def _build(self, host: str, repository: str, image: RemoteImage, key: str) -> RemoteTree:
        if why := self.unavailable(image):
            raise Unsupported(why)
        layers = {entry.digest: self._layer(host, repository, entry) for entry in image.manifest.layers}
        target = self._root / "trees" / key
        if not target.exists():
            merger = Merger()
            for entry, diff_id in zip(image.manifest.layers, image.config.rootfs.diff_ids, strict=True):
                merger.apply(diff_id, read_index(self._layer_dir(entry) / "index", entry.digest))
            with self._aside(target) as work, open(work / "erofs", "xb") as out, open(work / "prov", "xb") as prov:
                erofs.write(
                    merger.root, out, prov, merger.layers, bytes.fromhex(key),
                    lambda digest: layers[digest].data_size // erofs.BLOCK,
                )  # fmt: skip
        os.utime(target)
        tree = RemoteTree(target, layers)
        with self._lock:
            self._trees[key] = tree
            while len(self._trees) > MAX_TREES:
                self._trees.popitem(last=False)
        self._evict()
        return tree

    def _layer_dir(self, entry: Descriptor) -> Path:
        return self._root / "layers" / hex_of(entry.digest)

    def _layer(self, host: str, repository: str, entry: Descriptor) -> RemoteLayer:
        with self._lock:
            known = self._layers.get(entry.digest)
        if known is not None:
            return known
        directory = self._layer_dir(entry)
        if not directory.exists():
            how = chunked.source(entry)
            assert how is not None
            raw, stop = chunked.fetch(self._registry(host, repository), entry, how)
            with self._aside(directory) as work:
                toc.convert(raw, entry.digest, stop, work)
        os.utime(directory)
        try:
            layer = RemoteLayer(directory, entry, lambda: self._registry(host, repository))
        except Damaged:
            shutil.rmtree(directory, ignore_errors=True)  # the next try makes it anew
            raise
        with self._lock:
            return self._layers.setdefault(entry.digest, layer)

    def _aside(self, target: Path) -> _Aside:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _Aside(self._tmp, target)

    def _evict(self) -> None:
        """Least recently opened first, until what is below remote/ fits; what is open stays."""
        with self._lock:
            keep = set(self._trees) | {hex_of(digest) for tree in self._trees.values() for digest in tree._layers}
            self._layers = {digest: layer for digest, layer in self._layers.items() if hex_of(digest) in keep}
        found = []
        for folder in ("trees", "layers"):
            for path in (self._root / folder).glob("*"):
                size = sum(file.stat().st_blocks * 512 for file in path.iterdir())
                found.append((path.stat().st_mtime, size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= MAX_BYTES:
                return
            if path.name not in keep:
                log.info("remote/%s/%s is dropped to make room", path.parent.name, path.name)
                shutil.rmtree(path, ignore_errors=True)
                total -= size


class _Aside:
    """A directory made in tmp/ that takes its place when the block succeeds."""

    def __init__(self, tmp: Path, target: Path) -> None:
        self._tmp, self._target = tmp, target

    def __enter__(self) -> Path:
        self._work = Path(tempfile.mkdtemp(dir=self._tmp, prefix="remote-"))
        return self._work

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self._target.exists():
                os.rename(self._work, self._target)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)


def _tree_key(image: RemoteImage) -> str:
    pairs: list[Any] = [
        [entry.digest, diff_id]
        for entry, diff_id in zip(image.manifest.layers, image.config.rootfs.diff_ids, strict=True)
    ]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

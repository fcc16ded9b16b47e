"""Pulling an image: from a name to rows in the catalog. Floor 2.

Only here: the order of things. Name -> manifest (verified) -> platform -> configuration -> layers, several at a time,
each ingested as it streams and kept as a blob -> one transaction that makes the image visible. Until then nothing of it
can be seen, and whatever a failed, cancelled or killed pull has finished is found again by the next: whole layers by
their rows, a broken download by its part file.

Threading: runs in a job's thread, with up to WORKERS threads of its own; two pulls at once fetch a shared layer once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import chain

from engine.errors import Damaged, EngineError, InvalidArgument
from engine.images import manifests, platforms
from engine.images.catalog import Image, Images
from engine.images.manifests import Descriptor, Index, Manifest, Platform
from engine.images.mirrors import Mirrored
from engine.images.reference import DEFAULT_TAG, Reference, parse
from engine.images.registry import Registry
from engine.images.transport import Policy
from engine.jobs import Cancelled, Task
from engine.model import ImageConfig
from engine.store.merge import Merger

WORKERS = 3  # layers of one pull under way at a time, as Docker
MAX_UNDER_WAY = 6  # layers of all pulls
MAX_DEPTH = 3  # indexes within indexes


class _Keyed:
    """One lock per key, there only while wanted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, key: str, task: Task) -> Iterator[None]:
        with self._lock:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            while not lock.acquire(timeout=0.2):
                task.check()
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._lock:
                lock, users = self._locks[key]
                if users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, users - 1)


_under_way = _Keyed()
_turns = threading.BoundedSemaphore(MAX_UNDER_WAY)


@contextmanager
def _turn(task: Task, stop: threading.Event) -> Iterator[None]:
    while not _turns.acquire(timeout=0.2):
        task.check()
        if stop.is_set():
            raise Cancelled
    try:
        yield
    finally:
        _turns.release()


def resumed(images: Images, line: str) -> Callable[[Task], str] | None:
    """The work of a job `pull REF [platform=…]` that another daemon began; None for any other line."""
    words = line.split()
    options = dict(word.partition("=")[::2] for word in words[2:])
    if len(words) < 2 or words[0] != "pull" or set(options) - {"platform"}:
        return None
    try:
        reference = parse(words[1])
    except InvalidArgument:
        return None
    return lambda task: pull(images, reference, options.get("platform"), task).digest


def pull(
    images: Images,
    reference: Reference | str,
    platform: Platform | str | None = None,
    task: Task | None = None,
    *,
    insecure: bool = False,
    policy: Policy | None = None,
) -> Image:
    """Fetch an image and everything it needs. `platform` None: the one of this host.

    Raises what the parts raise: InvalidArgument, AccessDenied, NotFound, Unreachable, DeadlineExceeded, Damaged,
    TooLarge, Unsupported, NoSpace; Cancelled when the task is.
    """
    task = task or Task()
    named = parse(reference) if isinstance(reference, str) else reference
    if not named.path:
        raise InvalidArgument("a name is needed to pull, a digest alone says not from where", at=named.digest)
    wanted = manifests.parse_platform(platform) if isinstance(platform, str) else platform
    name = named.normalised()
    store = images.blobs.root
    with images.lease(), Mirrored(store, named, task, insecure=insecure, policy=policy) as registry:
        task.progress(f"resolving {name}")
        raw, media_type, digest = registry.manifest(named.digest or named.tag or DEFAULT_TAG)
        task.log(f"{name} is {digest}")
        raw, media_type, manifest, index = _choose(images, registry, raw, media_type, wanted)
        config_raw = _config(images, registry, manifest.config)
        config = manifests.parse_config(config_raw)
        manifests.check_pair(manifest, config)
        platforms.check(config, wanted)
        images.blobs.put(config_raw, manifest.config.media_type)
        task.progress(f"pulling {name}")
        merger = _layers(images, registry, manifest, config, task)
        task.check()
        task.progress(f"building the tree of {name}")
        takes = platforms.takes_name(images, name, index, wanted)
        image = images.add(raw, manifest.media_type, name if takes else None, merger)
        task.progress(f"pulled {name} {image.digest}")
        return image


def _choose(
    images: Images, registry: Registry, raw: bytes, media_type: str, wanted: Platform | None
) -> tuple[bytes, str, Manifest, str]:
    """Down through indexes to the manifest of the wanted platform, and the digest of the index that lists it ('')."""
    index = ""
    for _ in range(MAX_DEPTH + 1):
        document = manifests.parse(raw, media_type)
        if isinstance(document, Manifest):
            return raw, document.media_type, document, index
        index = platforms.keep(images, raw, document)
        raw, media_type = _entry(registry, document, wanted)
    raise Damaged(f"more than {MAX_DEPTH} indexes within one another", at=registry.reference.normalised())


def _entry(registry: Registry, index: Index, wanted: Platform | None) -> tuple[bytes, str]:
    entry = manifests.select(index, wanted or manifests.host(), strict=wanted is not None)
    raw, _, _ = registry.manifest(entry.digest)
    if len(raw) != entry.size:
        raise Damaged(f"{len(raw)} bytes of manifest where {entry.size} were announced", at=entry.digest)
    return raw, entry.media_type


def _config(images: Images, registry: Registry, entry: Descriptor) -> bytes:
    if images.blobs.has(entry.digest):
        try:
            return images.blobs.read(entry.digest, manifests.MAX_CONFIG)
        except EngineError:
            registry.task.log(f"{entry.digest} is damaged in the store and is fetched again")
            images.blobs.remove(entry.digest)
    return registry.small_blob(entry)


def _layers(images: Images, registry: Registry, manifest: Manifest, config: ImageConfig, task: Task) -> Merger | None:
    """Every layer into the store; the first failure ends the others. Returns the merge of those that came early."""
    pairs: dict[str, tuple[Descriptor, str]] = {}
    for entry, diff_id in zip(manifest.layers, config.rootfs.diff_ids, strict=True):
        if pairs.setdefault(entry.digest, (entry, diff_id))[1] != diff_id:
            raise Damaged("one blob stands for two different diff_ids", at=entry.digest)
    for entry, _ in pairs.values():
        task.advance(entry.digest[:19], 0, entry.size, "waiting")
    begun = images.trees.begin(config.rootfs.diff_ids)
    stop = threading.Event()
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="pull")
    try:
        futures: set[Future[None]] = {
            pool.submit(_layer, images, registry, entry, diff_id, task, stop) for entry, diff_id in pairs.values()
        }
        while futures:
            done, futures = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            task.check()
            begun.advance()
    finally:
        stop.set()
        pool.shutdown(wait=not task.cancelled.is_set(), cancel_futures=True)
        if task.cancelled.is_set():
            # reads under way have been broken; only a connection being made is not waited for
            wait(futures, timeout=2.0)
    return begun.merger


def _layer(
    images: Images, registry: Registry, entry: Descriptor, diff_id: str, task: Task, stop: threading.Event
) -> None:
    label = entry.digest[:19]

    def going(chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            if stop.is_set():
                raise Cancelled
            task.check()
            yield chunk

    with _under_way.hold(diff_id, task):
        if images.store_layers.has(diff_id):
            task.advance(label, entry.size, entry.size, "present")
            return
        with _turn(task, stop):
            _store(images, registry, entry, diff_id, task, going)
        with suppress(Damaged):  # it may link to files of those below it
            images.trees.build([diff_id])  # wanted anyway, and cheap while others download
        task.advance(label, entry.size, entry.size, "done")


def _store(
    images: Images,
    registry: Registry,
    entry: Descriptor,
    diff_id: str,
    task: Task,
    going: Callable[[Iterable[bytes]], Iterator[bytes]],
) -> None:
    """One layer into the store: from its blob where that is here already, else downloaded."""
    label = entry.digest[:19]
    if images.blobs.has(entry.digest):
        try:
            task.advance(label, entry.size, entry.size, "unpacking")
            images.store_layers.ingest(
                going(images.blobs.chunks(entry.digest)),
                entry.media_type,
                diff_id=diff_id,
                digest=entry.digest,
                size=entry.size,
            )
            return
        except Damaged as error:
            task.log(f"{entry.digest} in the store: {error.reason}; it is fetched again")
            images.blobs.remove(entry.digest)
    if _fetch(
        images, registry, entry, diff_id, task, going, again=True
    ):  # the part that was here may be what is wrong: once more, from the start
        _fetch(images, registry, entry, diff_id, task, going, again=False)
    task.log(f"{entry.digest} is layer {diff_id}")


def _fetch(
    images: Images,
    registry: Registry,
    entry: Descriptor,
    diff_id: str,
    task: Task,
    going: Callable[[Iterable[bytes]], Iterator[bytes]],
    *,
    again: bool,
) -> bool:
    """Download and ingest one layer. True when it failed on top of a resumed part and shall be tried `again`."""
    label, resumed = entry.digest[:19], 0
    try:
        with images.blobs.writer(entry.media_type, entry.digest, entry.size) as keep:
            resumed = keep.offset
            if resumed:
                task.log(f"{entry.digest}: resuming at byte {resumed} of {entry.size}")
            images.store_layers.ingest(
                going(chain(keep.replay(), registry.blob(entry, resumed))),
                entry.media_type,
                diff_id=diff_id,
                digest=entry.digest,
                size=entry.size,
                keep=keep,
                progress=lambda done: task.advance(label, done, entry.size, "downloading"),
            )
    except Damaged as error:
        if not (again and resumed):
            raise
        task.log(f"{entry.digest}: {error.reason}; once more from the start")
        return True
    return False

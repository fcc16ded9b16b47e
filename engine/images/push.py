"""Pushing an image: what the registry lacks of its blobs, then its manifest. Floor 2.

Only here: uploads. For each blob: is it there (HEAD), can it be mounted from another repository of the same registry,
else it is sent: in one request, or for big ones in chunks, resumed where the registry says it stopped. The manifest
goes last, byte for byte as it was pulled, so that its digest stays; a tag never names an image whose blobs are not
there.

Threading: runs in a job's thread, with up to WORKERS threads of its own.

Source: distribution-spec "Push" (monolithic, chunked, mounting a blob from another repository).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from engine.errors import Damaged, EngineError, InvalidArgument, Unreachable
from engine.images import content, registries
from engine.images.catalog import Images
from engine.images.documents import ImageLayer
from engine.images.reference import DEFAULT_TAG, Reference, parse
from engine.images.registry import Registry
from engine.images.transport import Backoff, Content, Policy, Retry
from engine.jobs import Cancelled, Task

if TYPE_CHECKING:
    import httpx

WORKERS = 3
CHUNK = 16 << 20  # bytes of one PATCH; registries ask for at least 5 MiB
MONOLITHIC = 32 << 20  # blobs up to this go in one request
MAX_MOUNTS = 8  # repositories tried for one image
PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A blob to be sent; `data` begins anew at each call, at the given offset."""

    digest: str
    size: int
    data: Callable[[int], Iterator[bytes]]
    sources: tuple[str, ...]  # repositories of the same registry that have it, as far as we know


def push(
    images: Images, digest: str, reference: Reference | str, task: Task | None = None, *, policy: Policy | None = None
) -> str:
    """Send an image to the repository (and under the tag or digest) `reference` says; returns a line saying what was.

    NotFound naming a blob that is neither here nor there; AccessDenied, Unreachable, DeadlineExceeded as a pull has.
    """
    task = task or Task()
    named = parse(reference) if isinstance(reference, str) else reference
    if not named.path:
        raise InvalidArgument("a name is needed to push to", at=named.digest)
    if named.digest and named.digest != digest:
        raise InvalidArgument(f"the image's digest is {digest}", at=named.digest)
    rules = registries.load(images.blobs.root).rules(named.domain)
    raw, manifest = content.manifest_of(images, digest)
    with images.lease(), Registry(named, task, policy=policy, rules=rules, actions="pull,push") as registry:
        task.progress(f"pushing {named.normalised()}")
        parts = _parts(images, digest, named, task)
        for source in sorted({source for part in parts for source in part.sources}):
            registry.scopes.append(f"repository:{source}:pull")
        uploads = Uploads(registry, task, policy or Policy())
        _all(uploads, parts, task)
        name = named.digest or named.tag or DEFAULT_TAG
        uploads.manifest(name, raw, manifest.media_type, digest)
        return f"pushed {named.normalised()} {digest}"


def _parts(images: Images, digest: str, named: Reference, task: Task) -> list[Part]:
    """Every distinct blob of an image."""
    _, manifest = content.manifest_of(images, digest)
    config = images.config_bytes(digest)
    out: dict[str, Part] = {}
    sources = _sources(images, digest, named)
    for layer in images.layers(digest):
        data = partial(_from, partial(_blob, images, layer, task))
        out[layer.blob] = Part(layer.blob, layer.size, data, sources.get(layer.blob, ()))
    entry = manifest.config
    out[entry.digest] = Part(entry.digest, len(config), partial(_from, lambda: iter((config,))), ())
    return list(out.values())


def _blob(images: Images, layer: ImageLayer, task: Task) -> Iterator[bytes]:
    return content.blob(images, layer, task)


def _from(pieces: Callable[[], Iterator[bytes]], offset: int) -> Iterator[bytes]:
    """What `pieces` gives from `offset` on. Read whole, so that its digest is checked at the end."""
    skip = offset
    for piece in pieces():
        if skip >= len(piece):
            skip -= len(piece)
            continue
        yield piece[skip:] if skip else piece
        skip = 0


def _sources(images: Images, digest: str, named: Reference) -> dict[str, tuple[str, ...]]:
    """Blob -> other repositories of the same registry whose images have it, by the names known here."""
    rows = images.meta.query(
        "SELECT DISTINCT o.blob AS blob, t.reference AS reference FROM image_layers i JOIN image_layers o USING (blob)"
        " JOIN tags t ON t.digest = o.image WHERE i.image = ? ORDER BY 1, 2",
        (digest,),
    )
    out: dict[str, list[str]] = {}
    known: set[str] = set()
    for row in rows:
        other = parse(row["reference"])
        if other.domain != named.domain or other.path == named.path:
            continue
        if other.path not in known and len(known) >= MAX_MOUNTS:
            continue
        known.add(other.path)
        paths = out.setdefault(row["blob"], [])
        if other.path not in paths:
            paths.append(other.path)
    return {blob: tuple(paths) for blob, paths in out.items()}


def _all(uploads: Uploads, parts: list[Part], task: Task) -> None:
    """Every part, several at a time; the first failure ends the others."""
    for part in parts:
        task.advance(part.digest[:19], 0, part.size, "waiting")
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="push")
    try:
        futures: set[Future[None]] = {pool.submit(uploads.blob, part) for part in parts}
        while futures:
            done, futures = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            task.check()
    finally:
        uploads.stop.set()
        pool.shutdown(wait=not task.cancelled.is_set(), cancel_futures=True)


class Uploads:
    """What is sent to one repository. Used by several threads at once."""

    def __init__(self, registry: Registry, task: Task, policy: Policy) -> None:
        self._registry, self._task, self._policy = registry, task, policy
        self.stop = threading.Event()

    def blob(self, part: Part) -> None:
        """See to it that the registry has a blob."""
        label = part.digest[:19]
        if self._there(part):
            self._task.advance(label, part.size, part.size, "exists")
            return
        backoff = Backoff(self._policy, self._task)
        while True:
            try:
                url = self._begin(part)
                if url is None:
                    self._task.advance(label, part.size, part.size, "mounted")
                    return
                if part.size <= MONOLITHIC:
                    self._finish(url, part, 0)
                elif not self._chunks(url, part, backoff):
                    continue
                self._task.advance(label, part.size, part.size, "done")
                return
            except Retry as retry:
                backoff.pause(retry)
                if self._there(part):  # it was all there, only the answer was lost
                    self._task.advance(label, part.size, part.size, "done")
                    return

    def manifest(self, name: str, raw: bytes, media_type: str, digest: str) -> None:
        """Put the manifest under a tag or its digest."""
        what = f"manifest {name} of {self._registry.reference.name}"
        backoff = Backoff(self._policy, self._task)
        headers = {"Content-Type": media_type, "Content-Length": str(len(raw))}
        url = f"{self._registry.base}/manifests/{quote(name, safe=':')}"
        while True:
            try:
                with self._registry.request("PUT", url, headers, what, {201, 202, 200}, lambda: raw) as response:
                    said = response.headers.get("docker-content-digest", digest)
                break
            except Retry as retry:
                backoff.pause(retry)
        if said != digest:
            raise Damaged(f"the registry stored the manifest as {said[:80]}", at=digest)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _there(self, part: Part) -> bool:
        what = f"blob {part.digest} of {self._registry.reference.name}"
        backoff = Backoff(self._policy, self._task)
        while True:
            try:
                with self._registry.request(
                    "HEAD", f"{self._registry.base}/blobs/{part.digest}", {}, what, {200, 404}
                ) as response:
                    return bool(response.status_code == 200)
            except Retry as retry:
                backoff.pause(retry)

    def _begin(self, part: Part) -> str | None:
        """The address of a new upload; None when the blob could be mounted instead."""
        what = f"uploads of {self._registry.reference.name}"
        base = f"{self._registry.base}/blobs/uploads/"
        for source in part.sources:
            query = urlencode({"mount": part.digest, "from": source})
            try:
                with self._registry.request(
                    "POST", f"{base}?{query}", {"Content-Length": "0"}, what, {201, 202}
                ) as response:
                    if response.status_code == 201:
                        return None
                    return self._location(response)
            except EngineError as error:  # not allowed to read it there, or no such repository: just send it
                self._task.log(f"{part.digest} is not mounted from {source}: {error.reason}")
        with self._registry.request("POST", base, {"Content-Length": "0"}, what, {202}) as response:
            return self._location(response)

    def _finish(self, url: str, part: Part, offset: int) -> None:
        """The rest of a blob and its end, in one request."""
        what = f"blob {part.digest} of {self._registry.reference.name}"
        left = part.size - offset
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(left)}
        joined = f"{url}{'&' if '?' in url else '?'}{urlencode({'digest': part.digest})}"
        body: Content = (lambda: self._told(part, offset, left)) if left else (lambda: b"")
        with self._registry.request("PUT", joined, headers, what, {201, 204}, body) as response:
            said = response.headers.get("docker-content-digest", part.digest)
        if said != part.digest:
            raise Damaged(f"the registry stored the blob as {said[:80]}", at=part.digest)

    def _chunks(self, url: str, part: Part, backoff: Backoff) -> bool:
        """A blob in chunks. False when the registry has forgotten the upload, and it must begin anew."""
        what = f"blob {part.digest} of {self._registry.reference.name}"
        offset = 0
        while offset < part.size:
            size = min(CHUNK, part.size - offset)
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(size),
                "Content-Range": f"{offset}-{offset + size - 1}",
            }
            body = partial(self._told, part, offset, size)
            try:
                with self._registry.request("PATCH", url, headers, what, {202, 204}, body) as response:
                    url = self._location(response)
                    offset = _received(response, offset + size)
                backoff.progressed()
            except Retry as retry:
                backoff.pause(retry)
                with self._registry.request("GET", url, {}, what, {204, 202, 404}) as response:
                    if response.status_code == 404:
                        return False
                    offset = _received(response, 0)
                    url = self._location(response, url)
            if offset > part.size:
                raise Damaged("the registry says it has more than was sent", at=part.digest)
        self._finish(url, part, offset)
        return True

    def _told(self, part: Part, offset: int, size: int) -> Iterator[bytes]:
        """`size` bytes from `offset` on, saying how far they are."""
        label, left = part.digest[:19], size
        for piece in part.data(offset):
            for at in range(0, len(piece), PIECE):
                if self.stop.is_set():
                    raise Cancelled
                self._task.check()
                chunk = piece[at : at + min(PIECE, left)]
                left -= len(chunk)
                yield chunk
                self._task.advance(label, offset + size - left, part.size, "sending")
                if not left:
                    if offset + size < part.size:
                        return
                    break
        if left:
            raise Damaged("the stored blob is shorter than its size", at=part.digest)

    def _location(self, response: httpx.Response, known: str = "") -> str:
        """Where an upload goes on: absolute, or relative to where it was asked for."""
        where = response.headers.get("location", "")
        if not where and known:
            return known
        if not where:
            raise Unreachable("the registry does not say where to send a blob", at=response.url.host)
        target = response.url.join(where)
        if target.scheme not in ("https", "http") or not target.host or target.userinfo:
            raise Unreachable("the registry names no web address to send a blob to", at=where[:200])
        if response.url.scheme == "https" and target.scheme == "http":
            if target.host != response.url.host:
                raise Unreachable("the registry wants a blob sent without TLS", at=target.host)
            target = target.copy_with(scheme="https")  # behind a proxy that ends TLS, some say http of themselves
        return str(target)


def _received(response: httpx.Response, otherwise: int) -> int:
    """How many bytes an upload has, by the answer's Range: 0-<last>."""
    start, dash, last = response.headers.get("range", "").removeprefix("bytes=").partition("-")
    if start != "0" or not dash or not last.isdigit() or len(last) > 18:
        return otherwise
    # an empty upload says 0-0, as does one of a single byte: sending that byte again is refused, so it never is
    return int(last) + 1 if int(last) else 0


def check(images: Images, digest: str, reference: str) -> Reference:
    """What can be said of a push before it begins. InvalidArgument, NotFound."""
    images.get(digest)
    named = parse(reference)
    if named.digest and named.digest != digest:
        raise InvalidArgument(f"the image's digest is {digest}", at=named.digest)
    return named

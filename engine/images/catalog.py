"""The catalog of images: what is here, under which names, made of which layers, used by whom.

Only here: the tables `images`, `image_layers`, `tags`, and what short names mean. An image is the manifest of one
platform, never an index. Reading is SQL snapshots plus a small cache of parsed documents by digest (immutable, so never
stale); writing is one transaction with its event. What removal leaves unreferenced is collected in collect.py.

Threading: all methods from any thread; readers never wait for a writer.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import Busy, Damaged, EngineError, InvalidArgument, NotFound
from engine.images import collect, documents, manifests
from engine.images.documents import Documents, HistoryLine, ImageLayer
from engine.images.reference import Reference, parse, parse_any
from engine.jobs import Task
from engine.model import ImageConfig, check_digest
from engine.store.blobs import Blobs
from engine.store.layers import Layers
from engine.store.merge import Merger
from engine.store.meta import Meta
from engine.store.trees import Trees

CACHED = 256  # parsed images kept
_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})")


class Events(Protocol):
    """What the catalog needs of the journal (engine/events.py)."""

    def append(self, type: str, object: str, data: dict[str, Any], *, who: str = "") -> int: ...


@dataclass(frozen=True, slots=True)
class Image:
    """`size`: bytes of the regular files of all layers. `created`: RFC 3339, '' when the image does not say."""

    digest: str
    media_type: str
    config: str  # digest of the configuration: what Docker calls the image ID
    platform: str
    chain_id: str
    size: int
    created: str
    pulled_ns: int


class Images:
    """The images of a store."""

    def __init__(self, meta: Meta, blobs: Blobs, layers: Layers, trees: Trees, journal: Events) -> None:
        self.meta, self.blobs, self.store_layers, self.trees, self.journal = meta, blobs, layers, trees, journal
        self._cache: OrderedDict[str, Documents] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._gate = threading.Lock()  # leases and collection
        self._leases = 0
        self._uncollected = False
        self.after_store: Callable[[], None] | None = None  # called when nothing is being stored any more

    # --- reading ----------------------------------------------------------------------------------------------------

    def all(self) -> list[Image]:
        """Every image, oldest pull first."""
        return [_image(row) for row in self.meta.query("SELECT * FROM images ORDER BY pulled_ns, digest")]

    def get(self, digest: str) -> Image:
        """NotFound."""
        row = self.meta.row("SELECT * FROM images WHERE digest = ?", (check_digest(digest),))
        if row is None:
            raise NotFound("no such image", at=digest)
        return _image(row)

    def tags(self) -> dict[str, str]:
        """Every name (normalised) and the digest it stands for, sorted by name."""
        rows = self.meta.query("SELECT reference, digest FROM tags ORDER BY reference")
        return {row["reference"]: row["digest"] for row in rows}

    def references(self, digest: str) -> list[str]:
        """The names of an image, sorted."""
        rows = self.meta.query("SELECT reference FROM tags WHERE digest = ? ORDER BY reference", (digest,))
        return [row["reference"] for row in rows]

    def resolve(self, text: str) -> Image:
        """The image people mean: nginx, nginx:1.27, host/path:tag, name@sha256:…, sha256:…, or 4 to 64 digits of an id.

        An id is the digest of the manifest or, as Docker has it, of the configuration. NotFound; InvalidArgument when
        the text is no reference or the digits fit several images.
        """
        text = text.strip()
        match = _PREFIX.fullmatch(text)
        named = None
        if match is None or (len(match[1]) < 64 and not text.startswith("sha256:")):
            named = parse_any(text)
            row = self.meta.row("SELECT digest FROM tags WHERE reference = ?", (named.normalised(),))
            if row is not None:
                return self.get(row["digest"])
        if match is not None:
            found = self._by_prefix(match[1])
            if len(found) == 1:
                return self.get(found[0])
            if found:
                raise InvalidArgument(
                    f"{len(found)} images have an id that starts so", at=text, hint="give more digits"
                )
        if named is not None and named.digest:
            row = self.meta.row("SELECT digest FROM images WHERE digest = ?", (named.digest,))
            if row is not None:
                return self.get(row["digest"])
        if named is None or not named.path:
            raise NotFound("no such image", at=text, hint="ls images/by-digest shows what is here")
        raise NotFound("no such image", at=text, hint=f"pull it: echo 'pull {named.familiar()}' > images/ctl")

    def _by_prefix(self, digits: str) -> list[str]:
        """Digests of images whose manifest's or configuration's digest starts with `digits`."""
        low, high = f"sha256:{digits}", f"sha256:{digits}g"  # 'g' sorts after every hex digit
        rows = self.meta.query(
            "SELECT digest FROM images WHERE (digest >= ? AND digest < ?) OR (config >= ? AND config < ?) LIMIT 9",
            (low, high, low, high),
        )
        return [row["digest"] for row in rows]

    def manifest(self, digest: str) -> bytes:
        """The manifest as it was pulled. NotFound, Damaged."""
        self.get(digest)
        return self.blobs.read(digest, manifests.MAX_MANIFEST)

    def config_bytes(self, digest: str) -> bytes:
        """The configuration as it was pulled. NotFound, Damaged."""
        return self.blobs.read(self.get(digest).config, manifests.MAX_CONFIG)

    def config(self, digest: str) -> ImageConfig:
        return self._documents(digest).config

    def layers(self, digest: str) -> list[ImageLayer]:
        """Lowest first. NotFound."""
        return list(self._documents(digest).layers)

    def history(self, digest: str) -> list[HistoryLine]:
        """How the image was made, oldest step first, in a Dockerfile's words."""
        rows = self.meta.query(
            "SELECT l.diff_id, l.size FROM image_layers i JOIN layers l USING (diff_id) WHERE i.image = ?", (digest,)
        )
        return self._documents(digest).history({row["diff_id"]: row["size"] for row in rows})

    def unique_bytes(self, digest: str) -> int:
        """Bytes of layers no other image has: what removing it would free at most."""
        row = self.meta.row(
            "SELECT coalesce(sum(l.size), 0) AS n FROM layers l WHERE l.diff_id IN"
            " (SELECT diff_id FROM image_layers WHERE image = ?1) AND NOT EXISTS"
            " (SELECT 1 FROM image_layers o WHERE o.diff_id = l.diff_id AND o.image <> ?1)",
            (digest,),
        )
        return int(row["n"]) if row is not None else 0

    def shared_bytes(self, digest: str) -> int:
        """Bytes of its layers other images have too. NotFound."""
        return self.get(digest).size - self.unique_bytes(digest)

    def users(self, digest: str) -> list[str]:
        """Names of containers made from it, or configured to be (by whatever name), sorted."""
        return self.used().get(digest, [])

    def used(self) -> dict[str, list[str]]:
        """Every image that has users, and their names."""
        from engine.images.platforms import named  # made of this module

        wanted = "json_extract(config, '$.image', '$.platform') AS wanted"
        meant, out = dict[str, str](), dict[str, list[str]]()
        for row in self.meta.query(f"SELECT name, image, {wanted} FROM containers ORDER BY name"):
            (text, platform), image = json.loads(row["wanted"]), row["image"]
            if not image and text:
                if row["wanted"] not in meant:
                    try:
                        meant[row["wanted"]] = named(self, text, platform or "").digest
                    except EngineError:
                        meant[row["wanted"]] = ""  # a container may name an image that is not here
                image = meant[row["wanted"]]
            if image:
                out.setdefault(image, []).append(row["name"])
        return out

    def _documents(self, digest: str) -> Documents:
        image = self.get(digest)
        with self._cache_lock:
            parsed = self._cache.get(digest)
            if parsed is not None:
                self._cache.move_to_end(digest)
                return parsed
        parsed = documents.read(
            self.blobs.read(digest, manifests.MAX_MANIFEST), image.media_type, self.config_bytes(digest)
        )
        with self._cache_lock:
            self._cache[digest] = parsed
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return parsed

    # --- writing ----------------------------------------------------------------------------------------------------

    def add(
        self, manifest: bytes, media_type: str, reference: str | None, merger: Merger | None = None,
        *, event: str = "imagePulled",
    ) -> Image:  # fmt: skip
        """Make an image visible whose blobs and layers are in the store: trees, rows, name and event.

        `reference` is normalised or None, `merger` the merge of its layers as far as it has gone. Idempotent; a name
        that stood for another image moves. NotFound for a missing layer or configuration, Damaged when manifest and
        configuration disagree.
        """
        named = None if reference is None else parse(reference).normalised()
        with self.lease():
            digest = self.blobs.put(manifest, media_type)
            document = manifests.parse(manifest, media_type)
            if not isinstance(document, manifests.Manifest):
                raise InvalidArgument("an index is not an image", at=digest)
            parsed = documents.read(manifest, media_type, self.blobs.read(document.config.digest, manifests.MAX_CONFIG))
            diff_ids = [layer.diff_id for layer in parsed.layers]
            infos = [self.store_layers.info(diff_id) for diff_id in diff_ids]
            try:
                chain = self.trees.build(diff_ids, merger)
                for diff_id in dict.fromkeys(diff_ids):
                    with suppress(Damaged):  # it may link to files of those below it
                        self.trees.build([diff_id])
            except EngineError:
                self._uncollected = True  # layers that cannot be merged are of no use to anyone
                raise
            config = parsed.config
            platform = manifests.normalise(
                manifests.Platform(config.os or "linux", config.architecture or "unknown", config.variant)
            )
            values = (digest, parsed.manifest.media_type, parsed.manifest.config.digest, str(platform), chain,
                      sum(info.size for info in infos), documents.moment(config.created), time.time_ns())  # fmt: skip
            rows = [(digest, n, layer.diff_id, layer.blob) for n, layer in enumerate(parsed.layers)]
            with self.meta.tx() as tx:
                collect.account(self.meta, tx, digest, [layer.diff_id for layer in parsed.layers], event)
                tx.execute(
                    "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
                    " ON CONFLICT (digest) DO UPDATE SET pulled_ns = excluded.pulled_ns",
                    values,
                )
                tx.executemany("INSERT OR IGNORE INTO image_layers VALUES (?, ?, ?, ?)", rows)
                data: dict[str, Any] = {"platform": str(platform)}
                if named is not None:
                    data["reference"] = named
                    previous = self._name(tx, named, digest)
                    if previous:
                        data["previous"] = previous
                self.journal.append(event, f"image/{digest}", data)
        return self.get(digest)

    @staticmethod
    def _name(tx: Any, reference: str, digest: str) -> str:
        """Let `reference` stand for `digest`; returns the other digest it stood for, or ''."""
        before = tx.execute("SELECT digest FROM tags WHERE reference = ?", (reference,)).fetchone()
        tx.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?)", (reference, digest, time.time_ns()))
        return "" if before is None or before["digest"] == digest else str(before["digest"])

    def tag(self, digest: str, reference: str) -> str:
        """Give an image a name; returns it normalised. NotFound; InvalidArgument for a name with a digest."""
        parsed = parse(reference)
        if parsed.digest:
            raise InvalidArgument("a tag cannot have a digest", at=reference)
        named = parsed.normalised()
        with self.meta.tx() as tx:
            self.get(digest)
            previous = self._name(tx, named, digest)
            data = {"reference": named, **({"previous": previous} if previous else {})}
            self.journal.append("imageTagged", f"image/{digest}", data)
        return named

    def untag(self, reference: str) -> None:
        """Take a name away; the image stays (without a name, until `prune`). NotFound."""
        named = self._named(reference)
        with self.meta.tx() as tx:
            row = tx.execute("SELECT digest FROM tags WHERE reference = ?", (named,)).fetchone()
            if row is None:
                raise NotFound("no image has this name", at=reference)
            tx.execute("DELETE FROM tags WHERE reference = ?", (named,))
            self.journal.append("imageUntagged", f"image/{row['digest']}", {"reference": named})

    @staticmethod
    def _named(reference: str | Reference) -> str:
        return parse(reference).normalised() if isinstance(reference, str) else reference.normalised()

    def remove(self, text: str) -> None:
        """As `docker rmi`: a name is taken away, and the image goes with its last name; an id takes all names along.

        Busy while a container uses the image (unless only one of several names goes). NotFound.
        """
        image = self.resolve(text)
        match = _PREFIX.fullmatch(text)
        with self.meta.tx() as tx:
            names = self.references(image.digest)
            named = "" if match and (text.startswith("sha256:") or len(match[1]) == 64) else self._named(text)
            if named in names and len(names) > 1:
                self.untag(named)
                return
            self._delete(tx, image.digest, names)
        self.collect()

    def _delete(self, tx: Any, digest: str, names: list[str]) -> None:
        users = self.users(digest)
        if users:
            more = f" and {len(users) - 1} more" if len(users) > 1 else ""
            raise Busy(f"container {users[0]}{more} uses the image", at=digest, hint="remove the container first")
        for name in names:
            self.journal.append("imageUntagged", f"image/{digest}", {"reference": name})
        tx.execute("DELETE FROM tags WHERE digest = ?", (digest,))
        tx.execute("DELETE FROM pulled WHERE image = ?", (digest,))
        tx.execute("DELETE FROM image_layers WHERE image = ?", (digest,))
        tx.execute("DELETE FROM images WHERE digest = ?", (digest,))
        self.journal.append("imageRemoved", f"image/{digest}", {})

    def forget(self, digests: Sequence[str]) -> None:
        """Take many images and their names out of the catalog, all or none; their bytes are the caller's (gc.py)."""
        with self.meta.tx() as tx:
            users = self.used()
            for digest in digests:
                if digest in users:
                    raise Busy(f"container {users[digest][0]} uses the image", at=digest)
                self._delete(tx, digest, self.references(digest))

    # --- bytes ------------------------------------------------------------------------------------------------------

    @contextmanager
    def lease(self) -> Iterator[None]:
        """While held, nothing unreferenced is deleted: a pull's layers have no image yet."""
        with self._gate:
            self._leases += 1
        try:
            yield
        finally:
            with self._gate:
                self._leases -= 1
                due = self._leases == 0 and self._uncollected
                idle = self._leases == 0
            if due:
                self.collect()
            if idle and self.after_store is not None:
                self.after_store()

    @contextmanager
    def gate(self) -> Iterator[None]:
        """While held nothing can be stored. Busy while something is."""
        with self._gate:
            if self._leases:
                raise Busy("something is being stored: a pull, a load or a build", hint="wait: cat jobs/*/verb")
            yield

    def collect(self) -> int:
        """Delete trees, layers and blobs no image needs; returns the bytes freed. Put off while a lease is held."""
        with self._gate:
            if self._leases:
                self._uncollected = True
                return 0
            self._uncollected = False
            return collect.unreferenced(self.meta, self.blobs, self.store_layers, self.trees)

    def verify(self, digest: str, progress: Task | Callable[[str], None] | None = None) -> str:
        """Read everything of an image again and check every digest: blobs and the bodies of its layers' files.

        Returns a line saying what was checked. Damaged naming the first fault; NotFound for a blob that is gone.
        """
        self.get(digest)
        return collect.verify(self.meta, self.blobs, self.store_layers, self._documents(digest).manifest, digest,
                              [layer.diff_id for layer in self._documents(digest).layers], progress)  # fmt: skip


def _image(row: Any) -> Image:
    return Image(*row)

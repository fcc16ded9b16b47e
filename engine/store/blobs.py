"""Content-addressed blobs: `blobs/sha256/<hex>` beside a row in `blobs`.

Only here: how bytes become a blob. Written aside in tmp/, fsync, digest checked, rename, fsync directory, then the
row; so a row always has its file, and a file without a row (a crash between the two) is not visible and is adopted
or replaced by the next writer. All methods are thread-safe; a BlobWriter belongs to one thread.

Source: image-spec descriptor.md (digests); write order as containerd's content/local/writer.go.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from engine.errors import Damaged, NoSpace, NotFound, TooLarge
from engine.host import fsync_dir
from engine.model import check_digest, hex_of
from engine.store.meta import Meta

CHUNK = 1 << 20


def no_space(error: OSError) -> NoSpace | None:
    """The EngineError for a full disk or quota, None for any other failure."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace("the disk that holds the store is full", at=str(error.filename or ""), hint="remove images")
    return None


def write_all(fd: int, data: bytes | memoryview) -> None:
    """write(2) until all is written. NoSpace when the disk is full."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        if full := no_space(error):
            raise full from error
        raise


class Blobs:
    """The blob store below `root`. Creates its directories."""

    def __init__(self, root: Path, meta: Meta) -> None:
        self.root = root
        self.meta = meta
        self._dir = root / "blobs" / "sha256"
        self._tmp = root / "tmp"
        self._dir.mkdir(parents=True, exist_ok=True)
        self._tmp.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the blob is or would be. InvalidArgument for a malformed digest."""
        return self._dir / hex_of(digest)

    def has(self, digest: str) -> bool:
        """True when the blob has its row and its file."""
        row = self.meta.row("SELECT 1 FROM blobs WHERE digest = ?", (check_digest(digest),))
        return row is not None and self.path(digest).exists()

    def size(self, digest: str) -> int:
        """Bytes of the blob. NotFound."""
        row = self.meta.row("SELECT size FROM blobs WHERE digest = ?", (check_digest(digest),))
        if row is None:
            raise NotFound("no such blob", at=digest)
        return int(row["size"])

    def all(self) -> list[str]:
        """Digests of all blobs, sorted."""
        return [str(row["digest"]) for row in self.meta.query("SELECT digest FROM blobs ORDER BY digest")]

    def read(self, digest: str, limit: int = 4 << 20) -> bytes:
        """The whole blob, its digest verified. NotFound; TooLarge above `limit` bytes; Damaged when it rotted."""
        size = self.size(digest)
        if size > limit:
            raise TooLarge(f"blob of {size} bytes where at most {limit} are read", at=digest)
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError as error:
            raise NotFound("the blob's file is gone", at=digest, hint="pull the image again") from error
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest[7:]:
            raise Damaged("the stored blob does not match its digest", at=digest, hint="pull the image again")
        return data

    def chunks(self, digest: str, size: int = CHUNK) -> Iterator[bytes]:
        """The blob in pieces, unverified (ingest verifies what it reads). NotFound."""
        self.size(digest)
        try:
            handle = open(self.path(digest), "rb", buffering=0)  # noqa: SIM115 (closed by the with below)
        except FileNotFoundError as error:
            raise NotFound("the blob's file is gone", at=digest, hint="pull the image again") from error
        with handle:
            while piece := handle.read(size):
                yield piece

    def verify(self, digest: str) -> None:
        """Read and hash the whole blob. NotFound, Damaged."""
        digester, total = hashlib.sha256(), 0
        for piece in self.chunks(digest):
            digester.update(piece)
            total += len(piece)
        if total != self.size(digest) or digester.hexdigest() != digest[7:]:
            raise Damaged("the stored blob does not match its digest", at=digest, hint="pull the image again")

    def put(self, data: bytes, media_type: str) -> str:
        """Store small `data`; returns its digest. Idempotent."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if self.has(digest):
            self.meta.count("blobs_hits")
            return digest
        with self.writer(media_type, digest, len(data)) as writer:
            writer.restart()
            writer.write(data)
            return writer.commit()

    def writer(self, media_type: str, expected: str | None = None, size: int | None = None) -> BlobWriter:
        """A writer; with `expected` it continues an earlier attempt at `offset`."""
        if expected is not None:
            check_digest(expected)
        return BlobWriter(self, media_type, expected, size)

    def remove_many(self, digests: Sequence[str]) -> None:
        """`remove` of many in one transaction; those that are gone already do not matter."""
        with self.meta.tx() as tx:
            tx.executemany("DELETE FROM blobs WHERE digest = ?", [(digest,) for digest in digests])
        for digest in digests:
            self.path(digest).unlink(missing_ok=True)

    def remove(self, digest: str) -> int:
        """Row, then file; returns the bytes freed. NotFound. Whoever calls knows that nothing refers to it."""
        size = self.size(digest)
        with self.meta.tx() as tx:
            tx.execute("DELETE FROM blobs WHERE digest = ?", (digest,))
        self.path(digest).unlink(missing_ok=True)
        return size


class BlobWriter:
    """Bytes of one blob in the making. A context manager: leaving it without `commit` aborts.

    With `expected` the part file is tmp/partial-<hex>; it outlives an abort (not a wrong digest), and the next writer
    for that digest starts at `offset`. Only one writer holds a part file; a second one at the same time starts at 0
    in a file of its own.
    """

    def __init__(self, blobs: Blobs, media_type: str, expected: str | None, size: int | None) -> None:
        self._blobs, self._media_type, self._expected, self._size = blobs, media_type, expected, size
        self.offset = 0
        self._hash = hashlib.sha256()
        self._fd = -1
        self._resumable = False
        if expected is not None:
            self._open_part(blobs._tmp / f"partial-{hex_of(expected)}")
        if self._fd < 0:
            self._fd, name = tempfile.mkstemp(dir=blobs._tmp, prefix="blob-")
            self._path = Path(name)

    def _open_part(self, path: Path) -> None:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return
            try:
                same = os.stat(path).st_ino == os.fstat(fd).st_ino  # its last holder may have renamed it just now
            except FileNotFoundError:
                same = False
            if same:
                break
            os.close(fd)
        self._fd, self._path, self._resumable = fd, path, True
        for piece in self.replay():
            self._hash.update(piece)
            self.offset += len(piece)
        if self._size is not None and self.offset > self._size:
            self.restart()

    def replay(self) -> Iterator[bytes]:
        """The bytes already there, from the start (up to the file's end when called)."""
        position = 0
        while piece := os.pread(self._fd, CHUNK, position):
            position += len(piece)
            yield piece

    def restart(self) -> None:
        """Forget what is there: the next write is at offset 0 (a server that does not honour Range)."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self.offset = 0
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Append. Damaged when more than the announced size comes; NoSpace."""
        if self._size is not None and self.offset + len(data) > self._size:
            self.restart()
            raise Damaged(f"more than the announced {self._size} bytes", at=self._expected)
        if self.offset == 0 or os.lseek(self._fd, 0, os.SEEK_CUR) != self.offset:
            os.lseek(self._fd, self.offset, os.SEEK_SET)
        write_all(self._fd, data)
        self._hash.update(data)
        self.offset += len(data)

    def digest(self) -> str:
        """The digest of what was written so far."""
        return "sha256:" + self._hash.hexdigest()

    def commit(self) -> str:
        """Verify, make durable, publish; returns the digest. Damaged (and the part is dropped) on a mismatch."""
        digest = self.digest()
        if self._size is not None and self.offset != self._size:
            self.abort(keep=self.offset < self._size)
            raise Damaged(f"{self.offset} bytes where {self._size} were announced", at=self._expected)
        if self._expected is not None and digest != self._expected:
            self.abort()
            raise Damaged(f"the content's digest is {digest}, not the expected one", at=self._expected)
        blobs = self._blobs
        target = blobs.path(digest)
        try:
            os.fchmod(self._fd, 0o644)
            os.fsync(self._fd)
            os.rename(self._path, target)
            fsync_dir(target.parent)
        except OSError as error:
            self.abort()
            if full := no_space(error):
                raise full from error
            raise
        with blobs.meta.tx() as tx:
            tx.execute(
                "INSERT OR REPLACE INTO blobs (digest, size, media_type, created_ns) VALUES (?, ?, ?, ?)",
                (digest, self.offset, self._media_type, time.time_ns()),
            )
        blobs.meta.count("blobs_misses")
        self._close()
        return digest

    def abort(self, keep: bool = False) -> None:
        """Give up; `keep` leaves the part file for a later writer (only with `expected`). Idempotent."""
        if self._fd < 0:
            return
        if not (keep and self._resumable):
            self._path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abort(keep=not isinstance(error, Damaged | TooLarge | NoSpace))

"""One segment of a log: its bytes, plain or compressed, and the index from view offsets to raw offsets. Floor 1.

    ctr.log            what conmon writes; it grows
    ctr.log.<n>        rotated, n counts up from 1; frozen once a newer ctr.log exists
    ctr.log.<n>.zst    the same, compressed: independent zstd frames of about 1 MiB, then a seek table
    ctr.log.<n>.idx    totals (first line) and checkpoints (second line), both JSON; can always be made again

Checkpoints lie at ends of lines, about every 64 KiB of raw bytes, so a read at any offset parses at most one such piece
too much. Compressed files follow facebook/zstd contrib/seekable_format ("zstd_seekable_compression_format.md" 0.1.0),
so other tools read them too. Not thread-safe: ContainerLogs' lock guards every call.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

from engine.errors import Damaged
from engine.logformat import JSONL, STDERR, STDOUT, VIEWS, measure, render

PIECE = 64 << 10  # raw bytes between checkpoints
FRAME = 1 << 20  # raw bytes of a compressed frame
MAX_LINE = 1 << 20  # more bytes than this without a newline are not a log: they count as nothing
_SEEK_MAGIC, _SKIPPABLE = 0x8F92EAB1, 0x184D2A5E


class Segment:
    def __init__(self, path: Path, number: int | None) -> None:
        """`path` is the plain file's name (compressed: `path`.zst). `number` is None for the current one."""
        self.path = path
        self.number = number
        self.frozen = False
        self.raw = 0  # bytes indexed: whole lines
        self.marks = array("Q", [0])  # raw offset of each checkpoint
        self.outs = {view: array("Q", [0]) for view in VIEWS}  # view offset of each; all.jsonl may lag behind
        self.sizes = dict.fromkeys(VIEWS, 0)
        self.json_raw = 0  # raw bytes of which all.jsonl's size is known
        self.complete = False  # frozen, and indexed to its end
        self.dropped = False  # bytes are gone by retention; reads as newlines
        self._loaded = True  # marks and outs are in memory
        self._saved: tuple[bool, bool] = (False, False)  # the sidecar has this; and all.jsonl's part
        self._fd = -1
        self._frames: tuple[array[int], array[int]] | None = None  # raw and compressed offset of each frame
        self._frame: tuple[int, bytes] = (-1, b"")  # the one decompressed last

    # --- bytes --------------------------------------------------------------------------------------------------

    @property
    def packed(self) -> Path:
        return self.path.with_name(self.path.name + ".zst")

    @property
    def sidecar(self) -> Path:
        return self.path.with_name(self.path.name + ".idx")

    def open(self) -> bool:
        """Have the file open; False while there is none. Keeps its descriptor through renames."""
        if self._fd >= 0 or self.dropped:
            return True
        for path, packed in ((self.path, False), (self.packed, True)):
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            if packed:
                self._frames = _seek_table(self._fd, path)
            return True
        return False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._frames, self._frame = -1, None, (-1, b"")

    def file_size(self) -> int:
        """Raw bytes in the file now, whole lines or not."""
        if not self.open() or self.dropped:
            return self.raw
        if self._frames is not None:
            return self._frames[0][-1]
        return os.fstat(self._fd).st_size

    def disk_size(self) -> int:
        """Bytes of its files."""
        total = 0
        for path in (self.path, self.packed):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        return total

    def mtime_ns(self) -> int:
        return os.fstat(self._fd).st_mtime_ns if self.open() and self._fd >= 0 else 0

    def pread(self, size: int, offset: int) -> bytes:
        if not self.open():
            return b""
        if self._frames is None:
            return os.pread(self._fd, size, offset)
        raws, places = self._frames
        out = []
        while size > 0 and offset < raws[-1]:
            number = bisect_right(raws, offset) - 1
            if self._frame[0] != number:
                data = os.pread(self._fd, places[number + 1] - places[number], places[number])
                length = raws[number + 1] - raws[number]
                try:
                    text = zstandard.ZstdDecompressor().decompress(data, max_output_size=length)
                except zstandard.ZstdError as error:
                    raise Damaged(f"{self.packed}: frame {number}: {error}") from error
                if len(text) != length:
                    raise Damaged(f"{self.packed}: frame {number} holds {len(text)} bytes instead of {length}")
                self._frame = (number, text)
            part = self._frame[1][offset - raws[number] :][:size]
            out.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(out)

    # --- index --------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Index the next piece of new whole lines; False when there is none now."""
        if self.complete:
            return False
        last = self.marks[-1]
        data = self.pread(max(PIECE - (self.raw - last), 4096), self.raw)
        end = data.rfind(b"\n") + 1
        if not end and data:
            data = self.pread(MAX_LINE, self.raw)
            end = data.find(b"\n") + 1
            if not end and len(data) == MAX_LINE:
                end = len(data)
        if not end:
            self.complete = self.frozen
            return False
        out, err = measure(_as_lines(data[:end]))
        self.raw += end
        self.sizes[STDOUT] += out
        self.sizes[STDERR] += err
        if self.raw - last >= PIECE:
            self.marks.append(self.raw)
            self.outs[STDOUT].append(self.sizes[STDOUT])
            self.outs[STDERR].append(self.sizes[STDERR])
        return True

    def advance_json(self) -> bool:
        """The same for all.jsonl, up to what `advance` has reached."""
        if self.json_raw >= self.raw:
            return False
        self.load()
        known = len(self.outs[JSONL])  # checkpoints of all.jsonl so far
        end = self.marks[known] if known < len(self.marks) else self.raw
        self.sizes[JSONL] += len(render(JSONL, self._lines(self.json_raw, end)))
        self.json_raw = end
        if known < len(self.marks) and end == self.marks[known]:
            self.outs[JSONL].append(self.sizes[JSONL])
        return True

    def known(self, view: str) -> bool:
        """Whether the total of `view` is final."""
        return self.complete and (view != JSONL or self.json_raw == self.raw)

    def piece(self, view: str, offset: int) -> tuple[int, int, int]:
        """(raw start, raw end, view offset of the start) of the piece that holds view offset `offset`."""
        self.load()
        outs = self.outs[view]
        number = bisect_right(outs, offset) - 1
        limit = self.json_raw if view == JSONL else self.raw
        end = self.marks[number + 1] if number + 1 < len(outs) else limit
        return self.marks[number], end, outs[number]

    def rendered(self, view: str, start: int, end: int) -> bytes:
        return render(view, self._lines(start, end))

    def _lines(self, start: int, end: int) -> bytes:
        data = self.pread(end - start, start)
        if len(data) != end - start:
            raise Damaged(f"{self.path}: ends at {start + len(data)}, before the indexed {end}")
        return _as_lines(data)

    # --- sidecar ------------------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Complete, and the sidecar does not know all of it."""
        return self.complete and not self.dropped and self._saved != (True, self.json_raw == self.raw)

    def save(self) -> None:
        """Write the index beside the segment. Not fsynced: it can be made again."""
        self.load()
        known_json = self.json_raw == self.raw
        head = {
            "raw": self.raw,
            STDOUT: self.sizes[STDOUT],
            STDERR: self.sizes[STDERR],
            JSONL: self.sizes[JSONL] if known_json else None,
            "first": self._first(),
        }
        body = {"raw": self.marks.tolist()} | {
            view: self.outs[view].tolist() for view in VIEWS if known_json or view != JSONL
        }
        aside = self.sidecar.with_name(self.sidecar.name + ".tmp")
        aside.write_text(f"{json.dumps(head)}\n{json.dumps(body)}\n")
        aside.rename(self.sidecar)
        self._saved = (True, known_json)

    def _first(self) -> str:
        """What tells this file from others of its name: its first record's header."""
        return self.pread(45, 0).decode("latin-1")

    def restore_current(self) -> None:
        """Go on from the index that was saved of a segment which still grows, if it is of this very file."""
        if self.restore(self._first()):
            self.load()
            self.complete = False
        self.sidecar.unlink(missing_ok=True)  # it is only good once: from now on the file may change under it

    def restore(self, first: str | None = None) -> bool:
        """Take the totals from the sidecar; the checkpoints follow when needed. False when it does not fit.

        `first`: the header of the file's first record, where a number does not already tell whose index it is.
        """
        try:
            with self.sidecar.open("rb") as file:
                head = json.loads(file.readline(4096))
            raw, out, err, lines = (head[key] for key in ("raw", STDOUT, STDERR, JSONL))
            if not all(isinstance(value, int) and value >= 0 for value in (raw, out, err, lines or 0)):
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if raw > self.file_size() or (first is not None and head.get("first") != first):
            return False
        self.raw = raw
        self.sizes = {STDOUT: out, STDERR: err, JSONL: lines or 0}
        self.json_raw = raw if lines is not None else 0
        self.complete = True
        self._loaded = False
        self._saved = (True, lines is not None)
        return True

    def restore_dropped(self) -> bool:
        """Take the totals of a segment whose bytes are gone: the sidecar is all there is of it."""
        self.raw = 1 << 62  # any total fits
        return self.restore() and self.known(JSONL)

    def drop(self, before: Segment | None) -> None:
        """Give up the bytes, keep the totals. `before` is the dropped segment it takes in; its index goes.

        A crash in between: while the bytes are there an index that says more than they hold does not count, and
        `before` still has its own; once they are gone this index stands for both.
        """
        self.load()
        if before is not None:
            self.raw += before.raw
            self.sizes = {view: size + before.sizes[view] for view, size in self.sizes.items()}
            self.json_raw = self.raw
        aside = self.sidecar.with_name(self.sidecar.name + ".tmp")
        with aside.open("w") as file:
            file.write(json.dumps({"raw": self.raw, **self.sizes, "first": ""}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # nothing can make it again
        aside.rename(self.sidecar)
        self.close()
        self.packed.unlink()
        if before is not None:
            before.sidecar.unlink()
        self.dropped = True

    def load(self) -> None:
        """Have the checkpoints in memory; made again from the bytes when the sidecar is damaged."""
        if self._loaded:
            return
        self._loaded = True
        try:
            with self.sidecar.open("rb") as file:
                file.readline(4096)
                body = json.loads(file.read())
            marks = array("Q", body["raw"])
            outs = {view: array("Q", body.get(view, [0])) for view in VIEWS}
            fits = len(marks) == len(outs[STDOUT]) == len(outs[STDERR]) and marks[0] == 0 and marks[-1] <= self.raw
            if fits and len(outs[JSONL]) in (1, len(marks)):
                self.marks, self.outs = marks, outs
                return
        except (OSError, ValueError, KeyError, TypeError, OverflowError, IndexError):
            pass
        raw, sizes, json_raw = self.raw, self.sizes, self.json_raw
        self.raw = self.json_raw = 0
        self.complete, self.sizes = False, dict.fromkeys(VIEWS, 0)
        while self.advance():
            pass
        while json_raw and self.advance_json():
            pass
        if (self.raw, self.sizes) != (raw, sizes):
            raise Damaged(f"{self.path}: does not hold what its index says")
        self.complete = True

    def unload(self) -> None:
        """Forget checkpoints and file of a segment that is not being read."""
        self.close()
        if self.complete and self._loaded and not self.dirty and self.json_raw in (0, self.raw):
            self.marks = array("Q", [0])
            self.outs = {view: array("Q", [0]) for view in VIEWS}
            self._loaded = False

    # --- compression --------------------------------------------------------------------------------------------

    def pack(self, stop: Callable[[], bool]) -> bool:
        """Write `packed` beside the plain file, whole and synced. False when `stop` said so; then nothing is left.

        Reads through a descriptor of its own, so it may run without the lock while others read.
        """
        aside = self.packed.with_name(self.packed.name + ".tmp")
        try:
            with self.path.open("rb") as source, aside.open("wb") as target:
                raws, places = array("Q", [0]), array("Q", [0])
                left = self.raw
                compressor = zstandard.ZstdCompressor(level=3, write_content_size=True, write_checksum=True)
                while left:
                    if stop():
                        return False
                    data = source.read(min(FRAME, left))
                    if not data:
                        raise Damaged(f"{self.path}: is shorter than its index says")
                    frame = compressor.compress(data)
                    target.write(frame)
                    left -= len(data)
                    raws.append(raws[-1] + len(data))
                    places.append(places[-1] + len(frame))
                target.write(_seek_footer(raws, places))
                target.flush()
                os.fsync(target.fileno())
            aside.rename(self.packed)
        finally:
            aside.unlink(missing_ok=True)
        return True

    def switch(self) -> Path:
        """From the plain file to the compressed one, which is there. Returns where the plain one is now, to be removed:
        that may take long for a large file, and needs no lock."""
        self.close()
        old = self.path.with_name(self.path.name + ".old.tmp")
        self.path.rename(old)
        return old


@contextmanager
def in_background() -> Iterator[None]:
    """Give this thread the lowest priority (Linux has one per thread): containers and readers come first."""
    if not sys.platform.startswith("linux"):
        yield
        return
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, 19)
    try:
        yield
    finally:
        try:
            os.setpriority(os.PRIO_PROCESS, thread, before)
        except OSError as error:  # only root may go up again: then this helper stays slow, and goes when it is done
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise


def _as_lines(data: bytes) -> bytes:
    return data if data.endswith(b"\n") else data + b"\n"  # only for what MAX_LINE has cut


def _seek_footer(raws: array[int], places: array[int]) -> bytes:
    entries = b"".join(
        struct.pack("<II", places[n + 1] - places[n], raws[n + 1] - raws[n]) for n in range(len(raws) - 1)
    )
    footer = struct.pack("<IBI", len(raws) - 1, 0, _SEEK_MAGIC)
    return struct.pack("<II", _SKIPPABLE, len(entries) + len(footer)) + entries + footer


def _seek_table(fd: int, path: Path) -> tuple[array[int], array[int]]:
    size = os.fstat(fd).st_size
    footer = os.pread(fd, 9, max(0, size - 9))
    if len(footer) == 9:
        count, flags, magic = struct.unpack("<IBI", footer)
        start = size - 9 - 8 * count
        if magic == _SEEK_MAGIC and flags == 0 and start >= 8:
            raws, places = array("Q", [0]), array("Q", [0])
            for packed, raw in struct.iter_unpack("<II", os.pread(fd, 8 * count, start)):
                if raw > FRAME:
                    break
                raws.append(raws[-1] + raw)
                places.append(places[-1] + packed)
            if places[-1] == start - 8 and len(raws) == count + 1:
                return raws, places
    raise Damaged(f"{path}: no seek table at its end")

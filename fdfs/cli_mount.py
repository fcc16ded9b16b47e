"""The CLI's view of the engine: the files of a live mount, nothing else.

Floor 7. Only here: finding the mount, writing commands, turning a failed write into the words of the object's `error`.
Used by short-lived processes with one thread; nothing of the engine is imported, so a command starts quickly.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 256 << 10
FOLLOWED = 1 << 20  # of a growing file, which a follower far behind reads at twice the speed of 128 KiB


class Failure(Exception):
    """What the person at the keyboard is told: the reason, further lines, and the exit code."""

    def __init__(self, reason: str, *more: str, code: int = 1) -> None:
        super().__init__(reason)
        self.reason = reason
        self.more = more
        self.code = code


def default_mount() -> Path:
    """$DUTCHMAN_MOUNT, else ~/FlyingDutchman: the same answer as engine.host gives, without loading it."""
    return Path(os.environ.get("DUTCHMAN_MOUNT") or Path.home() / "FlyingDutchman")


def default_store() -> Path:
    from engine import host

    return host.default_store()


def absolute(path: str | Path) -> Path:
    """An absolute path without touching the file system: a dead mount would answer with an error."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def explain(text: str) -> tuple[str, tuple[str, ...]]:
    """The newest failure in an `error` file: its reason in one line, and the lines that show where and what to do.

    An entry is a line with time and errno, the indented command with a caret line, the reason, a hint; the `error` of
    a job is the reason alone.
    """
    lines = text.strip().split("\n\n", 1)[0].splitlines()
    name = ""
    if lines and (head := re.match(r"\d{4}-\d\d-\S+Z (\w+)$", lines[0])):
        name = head[1]
        del lines[0]
    shown = [line for line in lines if line.startswith("    ")]
    told = [line for line in lines if not line.startswith("    ")]
    context = shown if any(set(line.strip()) == {"^"} for line in shown) else []
    return told[0] if told else name, (*context, *told[1:])


class Mount:
    """A live mount at `root`. Every method raises Failure for people, with what to do next."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def find(cls, named: str | None = None) -> Mount:
        """The mount at `named`, else the default one; Failure when no daemon serves it."""
        mount = cls(absolute(named) if named else absolute(default_mount()))
        where = f" --mount {named}" if named else ""
        try:
            (mount.root / "version").read_bytes()
        except FileNotFoundError:
            hint = f"hint: start the engine: dutchman up{where}"
            raise Failure(f"nothing is mounted at {mount.root}", hint) from None
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ENODEV):
                raise Failure(
                    f"the daemon behind {mount.root} is gone ({error.strerror})",
                    f"hint: bring it back: dutchman up{where}",
                ) from None
            raise Failure(f"{mount.root}: {error.strerror}", "hint: dutchman doctor") from None
        return mount

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(*parts)

    def has(self, *parts: str) -> bool:
        return os.path.lexists(self.path(*parts))

    def read(self, *parts: str) -> str:
        """A file's text without its last newline; OSError as it comes."""
        return self.path(*parts).read_text(encoding="utf-8", errors="replace").rstrip("\n")

    def field(self, *parts: str) -> str:
        """As `read`; empty when the file cannot be read, as for an object that just went away."""
        try:
            return self.read(*parts)
        except OSError:
            return ""

    def names(self, *parts: str) -> list[str]:
        """The directories in a directory: its objects, without the files that lie beside them."""
        try:
            with os.scandir(self.path(*parts)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def containers(self) -> list[dict[str, Any]]:
        """All containers by name, with the keys of containers/list.jsonl: one read however many there are."""
        try:
            raw = self.path("containers", "list.jsonl").read_bytes()
        except FileNotFoundError:  # nothing is mounted there
            return []
        return [json.loads(line) for line in raw.split(b"\n") if line]

    def container(self, name: str) -> str:
        """`name`, checked: Failure when there is no such container or the text cannot be a name."""
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", name) or not self.has("containers", name, "state"):
            raise Failure(f"there is no container {name!r}", "hint: dutchman ps -a lists them")
        return name

    def failure(self, error: OSError, *objects: tuple[str, ...], what: str) -> Failure:
        """A Failure for a refused operation: the newest words in the first `error` file that has any of this errno.

        Others are of something earlier: the kernel refuses by itself, too, and then nothing is written down.
        """
        for parts in objects:
            text = self.field(*parts, "error")
            head = re.match(r"\d{4}-\d\d-\S+Z (\w+)\n", text)
            if text and (head is None or getattr(errno, head[1], error.errno) == error.errno):
                reason, more = explain(text)
                return Failure(f"{what}: {reason}", *more)
        return Failure(f"{what}: {error.strerror}")

    def command(self, directory: tuple[str, ...], line: str, *, what: str) -> list[str]:
        """Write one line to a ctl; the lines of its reply. Failure with the object's words when it is refused."""
        if "\n" in line or "\0" in line:
            raise Failure(f"{what}: an argument holds a newline")
        try:
            fd = os.open(self.path(*directory, "ctl"), os.O_RDWR)
        except FileNotFoundError:
            hint = (f"hint: ls {self.path(*directory[:-1])}",) if directory else ()
            raise Failure(f"{what}: there is no {'/'.join(directory) or 'ctl'}", *hint) from None
        try:
            os.write(fd, line.encode() + b"\n")
            return os.read(fd, 64 << 10).decode(errors="replace").splitlines()
        except OSError as error:
            raise self.failure(error, directory, what=what) from None
        finally:
            os.close(fd)

    def write(self, directory: tuple[str, ...], name: str, data: bytes, *, what: str) -> None:
        """Write a whole document; it is applied when the file is closed."""
        fd = -1
        try:
            fd = os.open(self.path(*directory, name), os.O_WRONLY | os.O_TRUNC)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise self.failure(error, directory, what=what) from None
        try:
            os.close(fd)
        except OSError as error:
            raise self.failure(error, directory, what=what) from None


class Follower:
    """A growing file read from an offset on, as often as asked. A file that is not there yet reads as empty."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path, self._offset, self._fd = path, offset, -1

    def read(self) -> Iterator[bytes]:
        """What is new since the last call."""
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDONLY)
            while chunk := os.pread(self._fd, FOLLOWED, self._offset):
                self._offset += len(chunk)
                yield chunk
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # not yet; no longer
                raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def tail_offset(path: Path, lines: int) -> int:
    """Where the last `lines` lines of a file begin, in bytes; read from the end in blocks."""
    with open(path, "rb") as handle:
        end = handle.seek(0, os.SEEK_END)
        position, wanted = end, lines
        while position > 0 and wanted >= 0:
            start = max(0, position - CHUNK)
            handle.seek(start)
            block = handle.read(position - start)
            at = len(block)
            while (found := block.rfind(b"\n", 0, at)) >= 0:
                at = found
                if start + at == end - 1:  # the newline that ends the last line
                    continue
                wanted -= 1
                if wanted == 0:
                    return start + at + 1
            position = start
        return 0 if wanted > 0 else end

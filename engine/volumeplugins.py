"""Volume drivers of others: programs in `<store>/volume-drivers/`. Floor 2, no state in memory.

Only here: how such a program is found, trusted, asked and understood; README "Volume drivers" is the protocol. A driver
is asked by `NAME VERB` with one JSON object on standard input, and answers one on standard output. Whatever it makes
has an id of ours, noted in `.made/` before the driver hears of it and struck out after it removed it: `clean` finds
what a crash cut off, and the driver is asked again. So every verb may come twice, and never two for one volume at once:
the kernel kills a driver with the thread that asked it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import host, hostmounts
from engine.errors import Damaged, DeadlineExceeded, EngineError, InvalidArgument, NotFound, RuntimeFailure, Unsupported
from engine.programs import run_helper

log = logging.getLogger(__name__)

PROTOCOL = 1
SECONDS = 60.0  # a driver's time for one answer
MAX_ANSWER = 64 << 10  # bytes of either output
MAX_OPTIONS = 32 << 10  # bytes of the options as JSON: what is asked must fit a pipe
MAX_WORDS = 300  # characters of a driver's own words that are passed on
MOST_MOUNTS = 8  # of one on top of another at a `data/`
DIRECTORY = "volume-drivers"
TOLD = ("id", "volume", "options")

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_KINDS = {kind.errno: kind for kind in EngineError.__subclasses__()}

Options = Mapping[str, str]


class Plugin:
    """A driver (volumedrivers.Driver) that is a program. It need not be there: volumes outlive their drivers."""

    keys: tuple[str, ...] | None = None  # its options are its own matter

    def __init__(self, place: Path, name: str) -> None:
        self.name = name
        self._place = place

    def check(self, options: Options) -> None:
        """InvalidArgument when there is no such driver, or in its words."""
        if not _NAME.fullmatch(self.name) or not os.path.lexists(self._place / self.name):
            raise InvalidArgument(
                f"driver: unknown driver {self.name[:80]!r}", at=self.name[:80],
                hint=f"local, ext4, or a program in {self._place}",
            )  # fmt: skip
        if len(json.dumps(dict(options))) > MAX_OPTIONS:
            raise InvalidArgument(f"options: more than {MAX_OPTIONS} bytes for a driver of others", at="options")
        self._ask("check", options=dict(options))

    def create(self, directory: Path, name: str, options: Options) -> None:
        made = {"driver": self.name, "id": uuid.uuid4().hex, "volume": name, "options": dict(options)}
        notes = self._place / ".made"
        notes.mkdir(mode=0o700, exist_ok=True)
        host.write_atomic(notes / str(made["id"]), json.dumps(made).encode(), 0o600)
        host.write_atomic(directory / "id", str(made["id"]).encode(), 0o600)
        (directory / "driver").mkdir(mode=0o700)
        self._ask("create", **self._volume(directory))

    def mounts(self, options: Options) -> bool:
        return True

    def mount(self, directory: Path, options: Options) -> None:
        """The driver mounts over `data/` itself, or names a directory that is bound there."""
        data = directory / "data"
        source = self._ask("mount", **self._volume(directory), mountpoint=str(data)).get("source")
        mounted = hostmounts.is_mounted(Path(os.path.realpath(directory)) / "data")
        if source is None:
            if not mounted:
                raise RuntimeFailure(f"volume driver {self.name}: it answered to mount, but nothing is mounted")
            return
        if mounted or not isinstance(source, str) or not source.startswith("/") or not os.path.isdir(source):
            why = "something is mounted as well" if mounted else "an absolute path of a directory expected"
            raise RuntimeFailure(f"volume driver {self.name}: source: {why}", at=str(source)[:MAX_WORDS])
        hostmounts.mount(source, data, "none", hostmounts.MS_BIND)

    def unmount(self, directory: Path) -> None:
        for _ in range(MOST_MOUNTS):
            if not hostmounts.is_mounted(Path(os.path.realpath(directory)) / "data"):
                break
            hostmounts.unmount_unused(directory / "data")
        self._ask("unmount", **self._volume(directory))

    def remove(self, directory: Path, options: Options) -> None:
        try:
            volume = self._volume(directory)
        except (Damaged, OSError):
            return  # nothing was asked of the driver yet
        self.remove_made(volume)

    def remove_made(self, made: Mapping[str, Any]) -> None:
        told = {key: made.get(key) for key in (*TOLD, "directory")}
        self._ask("remove", **told)
        (self._place / ".made" / made["id"]).unlink(missing_ok=True)

    def usage(self, directory: Path, options: Options) -> int:
        used = self._ask("usage", **self._volume(directory)).get("bytes")
        if not isinstance(used, int) or used < 0:
            raise RuntimeFailure(f"volume driver {self.name}: bytes: a number expected", at=str(used)[:MAX_WORDS])
        return used

    # --- asking -------------------------------------------------------------------------------------------------

    def _volume(self, directory: Path) -> dict[str, Any]:
        """What every verb but `check` is told of its volume. Damaged when that is lost."""
        try:
            id = (directory / "id").read_text()
            made = _note(self._place / ".made" / id)
        except FileNotFoundError as error:
            reason = f"what volume driver {self.name} made is not known any more"
            raise Damaged(reason, at=str(error.filename)) from None
        return {**{key: made[key] for key in TOLD}, "directory": str(directory / "driver")}

    def _ask(self, verb: str, **told: Any) -> dict[str, Any]:
        """The driver's answer; its error as the EngineError of the errno it names, in its words."""
        argv = [str(self._trusted()), verb]
        if killer := shutil.which("setpriv"):
            argv = [killer, "--pdeathsig", "KILL", "--", *argv]
        environ = {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": os.environ.get("HOME", "/")}
        stdin = json.dumps({"protocol": PROTOCOL, **told}).encode()
        try:
            code, out, said = run_helper(argv, stdin, SECONDS, MAX_ANSWER, environ)
        except TimeoutError as error:
            raise DeadlineExceeded(f"volume driver {self.name}: {verb}: {error}") from error
        except (OverflowError, OSError) as error:
            raise RuntimeFailure(f"volume driver {self.name}: {verb}: {error}") from error
        answer: Any = None
        try:
            answer = json.loads(out) if out.strip() else {}
        except ValueError:  # also what is no UTF-8
            pass
        if isinstance(answer, dict) and not code and "error" not in answer:
            return answer
        if isinstance(answer, dict) and (code or "error" in answer):
            kind = _KINDS.get(getattr(errno, str(answer.get("errno")), 0), RuntimeFailure)
            words = _words(str(answer.get("error", ""))) or _words(said.decode(errors="replace")) or f"exit code {code}"
            raise kind(f"volume driver {self.name}: {verb}: {words}")
        words = _words(out.decode(errors="replace")) if not code else _words((said or out).decode(errors="replace"))
        what = f"exit code {code}" if code else "no JSON object was answered"
        raise RuntimeFailure(f"volume driver {self.name}: {verb}: {what}: {words}")

    def _trusted(self) -> Path:
        """The program. NotFound; Unsupported unless only this user (or root) can have written it."""
        path = self._place / self.name
        for each, kind in ((self._place, stat.S_ISDIR), (path, stat.S_ISREG)):
            try:
                status = os.lstat(each)
            except FileNotFoundError:
                raise NotFound(f"volume driver {self.name}: it is not there", at=str(path)) from None
            if not kind(status.st_mode):
                raise Unsupported(f"volume driver {self.name}: not a {'file' if each is path else 'directory'}",
                                  at=str(each), hint="a symlink is not followed: copy the program there")  # fmt: skip
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                raise Unsupported(f"volume driver {self.name}: others could write it", at=str(each),
                                  hint=f"chown to yourself; chmod go-w {each}")  # fmt: skip
        if not os.access(path, os.X_OK):
            raise Unsupported(f"volume driver {self.name}: not executable", at=str(path), hint=f"chmod +x {path}")
        return path


def clean(volumes: Path, drivers: Mapping[str, str]) -> None:
    """Have removed what belongs to no volume: a creation or removal was cut short, or its driver failed then.

    `volumes` holds their directories, `drivers` is their names and drivers. Nobody waits: a driver may take its time,
    and what it is asked about is of no volume.
    """
    place = volumes.parent / DIRECTORY
    notes = place / ".made"
    ids = {name: _id_of(volumes / name) for name in drivers}
    left = []
    for path in sorted(notes.iterdir()) if notes.is_dir() else ():
        if path.name in ids.values() or not re.fullmatch("[0-9a-f]{32}", path.name):
            continue
        try:
            made = _note(path)
        except (Damaged, OSError):
            log.exception("volume drivers: %s cannot be read", path)
            continue
        if drivers.get(made["volume"]) == made["driver"] and not ids[made["volume"]]:
            log.warning("volume %s has lost its id: what its driver keeps is left alone", made["volume"])
        else:
            left.append((Plugin(place, made["driver"]), made))
    if left:
        threading.Thread(target=_remove_all, args=(left,), name="driver-rest", daemon=True).start()


def _remove_all(left: list[tuple[Plugin, dict[str, Any]]]) -> None:
    """Ask each driver. What fails stays noted for the next start."""
    for plugin, made in left:
        try:
            plugin.remove_made(made)
            log.warning("volume driver %s removed what was left of volume %s", plugin.name, made["volume"])
        except (EngineError, OSError) as error:
            log.warning("volume %s, removed, still lies with its driver: %s", made["volume"], error)


def _id_of(directory: Path) -> str:
    """The id in a volume's directory; '' where none is, as for drivers of ours."""
    try:
        return (directory / "id").read_text()
    except (OSError, ValueError):
        return ""


def _note(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_bytes())
        if all(isinstance(made[key], str) for key in ("driver", "id", "volume")) and isinstance(made["options"], dict):
            return dict(made)
    except (ValueError, KeyError, TypeError):
        pass
    raise Damaged("a note of what a volume driver made is broken", at=str(path))


def _words(text: str) -> str:
    """One line of it, bounded, without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))[:MAX_WORDS]

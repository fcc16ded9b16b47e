"""Volumes: named directories that outlive containers. Floor 2.

Only here: the rows of `volumes` and the directories `volumes/<name>/data`. The row is the truth: it is written before
the directory counts and deleted before the directory goes, so what has no row (a crash between the two) is litter that
`reconcile` clears. Thread-safe; readers never wait: sizes are measured by a thread of their own and remembered.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import host
from engine.config import MountKind
from engine.errors import AlreadyExists, Busy, InvalidArgument, NotFound, TooLarge
from engine.events import Journal
from engine.model import check_name
from engine.store.meta import Meta
from engine.walk import usage

log = logging.getLogger(__name__)

DRIVERS = ("local",)
MAX_LABELS = 256
MAX_TEXT = 64 << 10  # bytes of all options and labels of a volume
SIZE_FRESH = 5.0  # seconds a measured size is good for
SIZE_PATIENCE = 0.2  # seconds a reader waits for a first measurement


@dataclass(frozen=True, slots=True)
class Volume:
    name: str
    driver: str
    options: Mapping[str, str]
    labels: Mapping[str, str]
    created_ns: int
    path: Path  # of its data directory


@dataclass(slots=True)
class _Size:
    value: int | None = None
    at: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
    running: bool = False


class Volumes:
    """The volumes of the store at `store`."""

    def __init__(self, store: Path, meta: Meta, journal: Journal) -> None:
        self._root = store / "volumes"
        self._tmp = store / "tmp"
        self._meta = meta
        self._journal = journal
        self._guard = threading.Lock()
        self._sizes: dict[str, _Size] = {}
        for path in (self._root, self._tmp):
            path.mkdir(parents=True, exist_ok=True)

    def create(
        self,
        name: str,
        driver: str = "local",
        options: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """Make an empty volume. AlreadyExists when the name is taken; InvalidArgument names what cannot be."""
        check_name(name, "volume")
        if driver not in DRIVERS:
            raise InvalidArgument(f"driver: unknown driver {driver!r}", at=driver, hint=f"one of {', '.join(DRIVERS)}")
        options, labels = dict(options or {}), dict(labels or {})
        for key in options:
            raise InvalidArgument(f"the local driver takes no option {key!r}", at=key)
        _check_labels(labels)
        path = self._root / name
        with self._meta.tx() as db:
            if db.execute("SELECT 1 FROM volumes WHERE name = ?", (name,)).fetchone():
                raise AlreadyExists(f"a volume named {name} exists", at=name)
            now = time.time_ns()
            db.execute(
                "INSERT INTO volumes (name, driver, options, labels, created_ns) VALUES (?, ?, ?, ?, ?)",
                (name, driver, json.dumps(options), json.dumps(labels), now),
            )
            data: dict[str, Any] = {"name": name, "driver": driver}
            if labels:
                data["labels"] = labels
            self._journal.append("volumeCreated", f"volume/{name}", data)
            self._discard(name)  # litter of a crash must not become content
            path.mkdir(mode=0o700)
            (path / "data").mkdir()
            os.chmod(path / "data", 0o755)  # whatever the umask
            host.fsync_dir(path)
            host.fsync_dir(self._root)
        return self.get(name)

    def get(self, name: str) -> Volume:
        """NotFound when there is none of that name."""
        row = self._meta.row("SELECT * FROM volumes WHERE name = ?", (name,))
        if row is None:
            raise NotFound(f"no volume named {name[:140]!r}", at=name[:140], hint="mkdir volumes/NAME creates one")
        return self._volume(row)

    def all(self) -> list[Volume]:
        """Sorted by name."""
        return [self._volume(row) for row in self._meta.query("SELECT * FROM volumes ORDER BY name")]

    def names(self) -> list[str]:
        return [row["name"] for row in self._meta.query("SELECT name FROM volumes ORDER BY name")]

    def _volume(self, row: Any) -> Volume:
        return Volume(
            row["name"],
            row["driver"],
            json.loads(row["options"]),
            json.loads(row["labels"]),
            row["created_ns"],
            self._root / row["name"] / "data",
        )

    def path(self, name: str) -> Path:
        """The data directory."""
        return self.get(name).path

    def set_labels(self, name: str, labels: Mapping[str, str]) -> None:
        _check_labels(labels)
        with self._meta.tx() as db:
            changed = db.execute("UPDATE volumes SET labels = ? WHERE name = ?", (json.dumps(dict(labels)), name))
            if not changed.rowcount:
                raise NotFound(f"no volume named {name[:140]!r}", at=name[:140])
            self._journal.append("volumeConfigured", f"volume/{name}", {"name": name, "labels": dict(labels)})

    def users(self, name: str) -> list[str]:
        """Names of the containers whose config mounts it, sorted."""
        rows = self._meta.query("SELECT name, config FROM containers WHERE instr(config, ?) ORDER BY name", (name,))
        return [row["name"] for row in rows if _mounts(row["config"], name)]

    def remove(self, name: str) -> None:
        """Delete a volume and its data. Busy, naming the containers, while a container's config mounts it."""
        with self._meta.tx() as db:
            if not db.execute("DELETE FROM volumes WHERE name = ?", (name,)).rowcount:
                raise NotFound(f"no volume named {name[:140]!r}", at=name[:140])
            rows = db.execute("SELECT name, config FROM containers WHERE instr(config, ?)", (name,)).fetchall()
            users = sorted(row["name"] for row in rows if _mounts(row["config"], name))
            if users:
                raise Busy(
                    f"volume {name} is used by {', '.join(users[:10])}{' …' if len(users) > 10 else ''}",
                    at=name,
                    hint="remove those containers, or take it out of their config/volumes",
                )
            db.execute("DELETE FROM failures WHERE object = ?", (f"volume/{name}",))
            self._journal.append("volumeRemoved", f"volume/{name}", {"name": name})
        with self._guard:
            self._sizes.pop(name, None)
        self._discard(name)

    def prune(self) -> list[str]:
        """Remove every volume no container's config mounts; their names."""
        removed = []
        for name in self.names():
            if self.users(name):
                continue
            try:
                self.remove(name)
            except (Busy, NotFound):
                continue  # taken into use, or removed, since we looked
            removed.append(name)
        return removed

    def _discard(self, name: str) -> None:
        """Delete the directory of a name without a row: out of the way first, so that the name is free at once."""
        path = self._root / name
        aside = self._tmp / f"volume-{time.time_ns()}-{name}"
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return
        try:
            host.remove_tree(aside)
        except OSError:
            log.warning("could not delete all of %s; the next start clears tmp/", aside, exc_info=True)

    def reconcile(self) -> None:
        """Clear directories without a row; make the directory of a row that lost it."""
        names = set(self.names())
        for path in list(self._root.iterdir()):
            if path.name not in names:
                log.warning("volumes/%s has no row: an unfinished creation or removal is cleared", path.name)
                self._discard(path.name)
        for name in names:
            data = self._root / name / "data"
            if not data.is_dir():
                log.warning("volume %s lost its data directory: made anew, empty", name)
                data.mkdir(parents=True, mode=0o755)

    def size(self, name: str) -> int:
        """Bytes of its regular files. Readers wait a fifth of a second at most; a large volume's is the last known.

        The first answer for a volume that takes longer to measure is 0.
        """
        path = self.path(name)
        with self._guard:
            size = self._sizes.setdefault(name, _Size())
            fresh = size.value is not None and time.monotonic() - size.at < SIZE_FRESH
            if not fresh and not size.running:
                size.running = True
                size.done.clear()
                threading.Thread(target=self._measure, args=(path, size), name=f"size-{name}"[:15], daemon=True).start()
        if not fresh:
            size.done.wait(SIZE_PATIENCE)
        return size.value or 0

    def _measure(self, path: Path, size: _Size) -> None:
        try:
            size.value = usage(path)
        except (OSError, TooLarge) as error:
            log.info("size of %s: %s", path, error)
        finally:
            size.at = time.monotonic()
            with self._guard:
                size.running = False
            size.done.set()

    def free_bytes(self) -> int:
        """Room on the file system that holds the volumes."""
        return shutil.disk_usage(self._root).free


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise TooLarge(f"labels: more than {MAX_LABELS}")
    for key, value in labels.items():
        if not key or "=" in key or not key.isprintable() or "\0" in value:
            raise InvalidArgument(f"labels: bad key or value at {key!r}", at=key[:80])
    if sum(len(key) + len(value) for key, value in labels.items()) > MAX_TEXT:
        raise TooLarge(f"labels: more than {MAX_TEXT} characters")


def _mounts(config: str, name: str) -> bool:
    return any(
        mount.get("type") == MountKind.VOLUME and mount.get("source") == name
        for mount in json.loads(config).get("volumes", ())
    )

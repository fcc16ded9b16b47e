"""Volumes: named directories that outlive containers. Floor 2.

Only here: the rows of `volumes` and the directories `volumes/<name>/data`. The row is the truth: it is written before
the directory counts and deleted before the directory goes, so what has no row (a crash between the two) is litter that
`reconcile` clears. Thread-safe; readers never wait: sizes are measured by a thread of their own and remembered.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import host, volumedrivers, volumefill, volumeplugins, volumeusers
from engine.errors import AlreadyExists, Busy, EngineError, InvalidArgument, NotFound, ReadOnly, TooLarge
from engine.events import Journal
from engine.jobs import Task
from engine.model import check_name
from engine.store.meta import Meta
from engine.treecopy import copy_tree
from engine.volumefill import covered
from engine.volumesizes import Sizes
from engine.walk import usage

log = logging.getLogger(__name__)

MAX_LABELS = 256
MAX_TEXT = 64 << 10  # bytes of all options of a volume
MAX_LABEL_TEXT = 32 << 10  # bytes of all labels as JSON: an event holds them (events.MAX_LINE)


@dataclass(frozen=True, slots=True)
class Volume:
    name: str
    driver: str
    options: Mapping[str, str]
    labels: Mapping[str, str]
    created_ns: int
    path: Path  # of its data directory

    @property
    def read_only(self) -> bool:
        return self.options.get(volumedrivers.READ_ONLY) == "true"


class Volumes:
    """The volumes of the store at `store`."""

    def __init__(self, store: Path, meta: Meta, journal: Journal) -> None:
        self._root = store / "volumes"
        self._tmp = store / "tmp"
        self._meta = meta
        self._journal = journal
        self._guard = threading.Lock()
        self._sizes = Sizes(self._measure)
        self._locks: dict[str, threading.RLock] = {}
        self._held: Counter[str] = Counter()  # by jobs
        self._filling: set[str] = set()
        for path in (self._root, self._tmp):
            path.mkdir(parents=True, exist_ok=True)
        (store / volumeplugins.DIRECTORY).mkdir(mode=0o700, exist_ok=True)

    def create(
        self,
        name: str,
        driver: str = "local",
        options: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """Make an empty volume. AlreadyExists when the name is taken; InvalidArgument names what cannot be."""
        check_name(name, "volume")
        found = self._driver(driver)
        options, labels = dict(options or {}), dict(labels or {})
        volumedrivers.check(found, options)
        check_labels(labels)
        if sum(len(key) + len(value) for key, value in options.items()) > MAX_TEXT:
            raise TooLarge(f"options: more than {MAX_TEXT} characters")
        return self._create(name, found, options, labels)

    def _create(
        self,
        name: str,
        driver: volumedrivers.Driver,
        options: Mapping[str, str],
        labels: Mapping[str, str],
        *,
        owner: str = "",
        fill: Callable[[Path], None] | None = None,
    ) -> Volume:
        """Its directory is made aside, filled, and in place with the row: a crash leaves both or litter."""
        same = "name = ?" if host.LINUX else "name = ? COLLATE NOCASE"  # as most disks of a Mac see it
        if row := self._meta.row(f"SELECT name FROM volumes WHERE {same}", (name,)):
            raise AlreadyExists(f"a volume named {row['name']} exists", at=name)
        aside = self._tmp / f"volume-new-{time.time_ns()}-{name}"
        aside.mkdir(mode=0o700)
        try:
            (aside / "data").mkdir()
            os.chmod(aside / "data", 0o755)  # whatever the umask
            driver.create(aside, name, _of_driver(options))
            if fill is not None:
                self._fill_aside(driver, aside, options, fill)
            host.fsync_dir(aside)
            with self._meta.tx() as db:
                if db.execute(f"SELECT 1 FROM volumes WHERE {same}", (name,)).fetchone():
                    raise AlreadyExists(f"a volume named {name} exists", at=name)
                db.execute(
                    "INSERT INTO volumes (name, driver, options, labels, created_ns) VALUES (?, ?, ?, ?, ?)",
                    (name, driver.name, json.dumps(dict(options)), json.dumps(dict(labels)), time.time_ns()),
                )
                if owner:
                    volumeusers.own(db, name, owner)
                data: dict[str, Any] = {"name": name, "driver": driver.name}
                if labels:
                    data["labels"] = dict(labels)
                self._journal.append("volumeCreated", f"volume/{name}", data)
                self._discard(name)  # litter of a crash must not become content
                os.rename(aside, self._root / name)
                host.fsync_dir(self._root)
        except BaseException:
            _undo(driver, aside, options)
            host.remove_tree(aside)
            raise
        return self.get(name)

    def _fill_aside(
        self, driver: volumedrivers.Driver, aside: Path, options: Mapping[str, str], fill: Callable[[Path], None]
    ) -> None:
        mounts = driver.mounts(options)
        if mounts:
            driver.mount(aside, options)
        try:
            fill(aside / "data")
            with host.directory_fd(aside / "data") as fd:
                host.sync_file_system(fd)
        finally:
            if mounts:
                driver.unmount(aside)

    def clone(self, name: str, new: str, task: Task, *, read_only: bool = False) -> Volume:
        """A volume with what is in `name` now. Options go along, but for those of a place that both would share."""
        check_name(new, "volume")
        with self.using(name) as source:
            driver = self._driver(source.driver)
            options = _of_driver(source.options)
            if driver.name == "local":
                options = {}
            if read_only:
                options[volumedrivers.READ_ONLY] = "true"
            labels = {key: value for key, value in source.labels.items() if key != "anonymous"}
            skip = volumefill.OURS
            return self._create(
                new, driver, options, labels, fill=lambda data: void(copy_tree(source.path, data, task, skip=skip))
            )

    def fill(self, name: str, produce: Callable[[Path], None]) -> None:
        """Have `produce` make the content of an empty volume: all of it is there afterwards, or nothing. Busy when it
        is not empty, or while a container runs with it; ReadOnly. Nobody else gets at it meanwhile."""
        with self._guard:
            if name in self._filling:
                raise Busy(f"volume {name} is being filled", at=name, hint="see jobs/")
            self._filling.add(name)
        try:
            with self._using(name, self._acquire) as volume:
                if volume.read_only:
                    raise ReadOnly(f"volume {name} is to be read only", at=name)
                if running := volumeusers.users(self._meta.query, name, alive=True):
                    raise Busy(f"volume {name} is in use by {', '.join(running[:10])}", at=name, hint="stop them first")
                volumefill.fill(volume.path, produce)
        finally:
            with self._guard:
                self._filling.discard(name)

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
        check_labels(labels)
        with self._meta.tx() as db:
            changed = db.execute("UPDATE volumes SET labels = ? WHERE name = ?", (json.dumps(dict(labels)), name))
            if not changed.rowcount:
                raise NotFound(f"no volume named {name[:140]!r}", at=name[:140])
            self._journal.append("volumeConfigured", f"volume/{name}", {"name": name, "labels": dict(labels)})

    # --- who uses it --------------------------------------------------------------------------------------------

    def users(self, name: str) -> list[str]:
        """Names of the containers that mount it, by their configs; sorted."""
        return volumeusers.users(self._meta.query, name)

    def ensure(self, name: str) -> Volume:
        """The volume, made empty when it is not there."""
        with self.changing(name):
            try:
                return self.get(name)
            except NotFound:
                return self._create(check_name(name, "volume"), self._driver("local"), {}, {})

    def anonymous(self, id: str, target: str) -> Volume:
        """The volume of the container `id` at `target`, made when it is not there."""
        name = volumeusers.anonymous_name(id, target)
        with self.changing(name):
            try:
                return self.get(name)
            except NotFound:
                return self._create(name, self._driver("local"), {}, {"anonymous": "true"}, owner=id)

    def remove_anonymous(self, id: str) -> list[str]:
        """With the container `id`, which is gone: its anonymous volumes that no other container uses."""
        removed = []
        for name in volumeusers.owned(self._meta.query, id):
            try:
                self.remove(name)
                removed.append(name)
            except NotFound:
                with self._meta.tx() as db:
                    volumeusers.disown(db, name)
            except Busy as error:
                log.info("anonymous volume %s stays: %s", name, error.reason)
        return removed

    def remove_orphans(self) -> None:
        """The same for all containers that are gone: their removal was cut short, or the volumes were in use then."""
        for id in volumeusers.gone_owners(self._meta.query):
            self.remove_anonymous(id)

    # --- in use -------------------------------------------------------------------------------------------------

    def _driver(self, name: str) -> volumedrivers.Driver:
        return volumedrivers.find(self._root.parent, name)

    def mounts(self, volume: Volume) -> bool:
        """Whether its driver mounts its files on the first use."""
        return self._driver(volume.driver).mounts(volume.options)

    def mounted(self, volume: Volume) -> bool:
        """Whether its files are at `path` now."""
        return not self.mounts(volume) or covered(volume.path)

    def acquire(self, name: str) -> Volume:
        """The volume with its files at `path`. `settle` after the use. Busy while it is being filled."""
        if name in self._filling:
            raise Busy(f"volume {name} is being filled", at=name, hint="see jobs/")
        return self._acquire(name)

    def _acquire(self, name: str) -> Volume:
        with self.changing(name):
            volume = self.get(name)
            driver = self._driver(volume.driver)
            if driver.mounts(volume.options) and not covered(volume.path):
                driver.mount(volume.path.parent, volume.options)
                log.info("volume %s (%s) is mounted", name, volume.driver)
            volumefill.recover(volume.path)
            return volume

    def settle(self, name: str) -> None:
        """After a use: take down what the driver mounted when nobody uses it any more. Raises nothing."""
        try:
            with self.changing(name):
                volume = self.get(name)
                driver = self._driver(volume.driver)
                if not driver.mounts(volume.options) or not covered(volume.path) or self._held[name]:
                    return
                if volumeusers.users(self._meta.query, name, alive=True):
                    return
                driver.unmount(volume.path.parent)
                log.info("volume %s is unmounted", name)
        except NotFound:
            pass
        except (EngineError, OSError) as error:
            log.warning("volume %s stays mounted: %s", name, error)

    def using(self, name: str) -> AbstractContextManager[Volume]:
        """Its files, for the time of the block. Removing it is Busy meanwhile."""
        return self._using(name, self.acquire)

    @contextmanager
    def _using(self, name: str, acquire: Callable[[str], Volume]) -> Iterator[Volume]:
        with self._guard:
            self._held[name] += 1
        try:
            yield acquire(name)
        finally:
            with self._guard:
                self._held[name] -= 1
            self.settle(name)

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """One change of a volume at a time."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.RLock())
        with lock:
            yield

    # --- removing -----------------------------------------------------------------------------------------------

    def remove(self, name: str) -> None:
        """Delete a volume and its data. Busy, naming the containers, while a container's config mounts it."""
        volume = self.get(name)
        driver = self._driver(volume.driver)
        users = self.users(name)
        if users:
            raise Busy(
                f"volume {name} is used by {', '.join(users[:10])}{' …' if len(users) > 10 else ''}",
                at=name,
                hint="remove those containers, or take it out of their config/volumes",
            )
        with self.changing(name):
            if self._held[name]:  # counted before a use looks for the volume, which it does under this lock
                raise Busy(f"volume {name} is being copied, read or filled", at=name, hint="see jobs/")
            if driver.mounts(volume.options) and covered(volume.path):
                try:
                    driver.unmount(volume.path.parent)
                except OSError as error:
                    raise Busy(f"volume {name}: {error.strerror}", at=name, hint="close what is open in it") from error
            with self._meta.tx() as db:
                if users := self.users(name):
                    raise Busy(f"volume {name} is used by {', '.join(users[:10])}", at=name)
                db.execute("DELETE FROM volumes WHERE name = ?", (name,))
                db.execute("DELETE FROM failures WHERE object = ?", (f"volume/{name}",))
                volumeusers.disown(db, name)
                self._journal.append("volumeRemoved", f"volume/{name}", {"name": name})
            try:
                driver.remove(volume.path.parent, volume.options)
            except EngineError as error:
                hint = "the volume is gone here; the next start asks the driver again"
                raise type(error)(error.reason, at=error.at, hint=hint) from error
            finally:
                self._sizes.forget(name)
                self._discard(name)

    def unused(self) -> list[Volume]:
        """What no container uses and no job works on."""
        used = volumeusers.used(self._meta.query)
        return [volume for volume in self.all() if volume.name not in used and not self._held[volume.name]]

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
        """Clear directories without a row; make the directory of a row that lost it; finish what was being filled."""
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
            if not self._driver(self.get(name).driver).mounts(self.get(name).options):
                volumefill.recover(data)
        volumeplugins.clean(self._root, {volume.name: volume.driver for volume in self.all()})

    def known_size(self, name: str) -> int | None:
        """As last measured, without waiting; measured anew by the way. None: never measured yet."""
        return self._sizes.known(self.get(name).name)

    def size(self, name: str) -> int:
        """Bytes of its regular files. Readers wait a fifth of a second at most; a large volume's is the last known.

        The first answer for a volume that takes longer to measure is 0.
        """
        return self._sizes.soon(self.get(name).name)

    def _measure(self, name: str) -> int:
        volume = self.get(name)
        if self.mounted(volume):
            return usage(volume.path)
        return self._driver(volume.driver).usage(volume.path.parent, volume.options)


def _of_driver(options: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in options.items() if key != volumedrivers.READ_ONLY}


def _undo(driver: volumedrivers.Driver, aside: Path, options: Mapping[str, str]) -> None:
    """What a driver made for a volume that does not come to be goes; raises nothing."""
    try:
        driver.remove(aside, _of_driver(options))
    except (EngineError, OSError) as error:
        log.warning("%s: left with its driver until the next start: %s", aside.name, error)


def check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise TooLarge(f"labels: more than {MAX_LABELS}")
    for key, value in labels.items():
        if not key or "=" in key or not key.isprintable() or "\0" in value:
            raise InvalidArgument(f"labels: bad key or value at {key!r}", at=key[:80])
    if len(json.dumps(dict(labels))) > MAX_LABEL_TEXT:
        raise TooLarge(f"labels: more than {MAX_LABEL_TEXT} bytes as JSON")


def void(_: object) -> None:
    """For a callable whose answer nobody wants."""

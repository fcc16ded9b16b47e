"""The engine as one object: the only thing the mount talks to. Floor 4.

Only here: how a store directory is opened, locked, checked and closed, and what `status` says. Everything else is in
the parts it holds. Thread-safe; `close` leaves containers running and takes less than two seconds.
"""

from __future__ import annotations

import errno
import logging
import logging.handlers
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

from engine import connecting, discreet, guestagent, host, hostfiles, userids
from engine.connections import Connections, state_directory
from engine.containers import Containers
from engine.drivers import Drivers
from engine.errors import Busy, EngineError, Gone, NoSpace
from engine.events import Journal, acting
from engine.failures import Failures
from engine.history import History
from engine.images.catalog import Images
from engine.images.diff import Diffs
from engine.images.gc import Collector
from engine.images.pull import resumed
from engine.images.remote import Remotes
from engine.jobs import Job, Jobs
from engine.kernelbook import KernelBook
from engine.kernels import Kernels
from engine.lifecycle import ALIVE, State
from engine.mounts import RootfsMounts
from engine.networks import Networks
from engine.reconcile import reconcile
from engine.reserve import FREEING, Reserve
from engine.retention import Retention
from engine.runtimes.netavark import Netavark
from engine.runtimes.netbase import Backend
from engine.runtimes.usernet import UserNetworks
from engine.runtimes.vm import report, standbys
from engine.runtimes.vm.usernetworks import GuestNetworks
from engine.scheduler import Clock
from engine.store import check
from engine.store.blobs import Blobs
from engine.store.contents import Contents
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.policy import PolicyFile
from engine.store.trees import Trees
from engine.store.usage import Usage
from engine.unmounted import Unmounted
from engine.volumefill import unmount_litter
from engine.volumes import Volumes

log = logging.getLogger(__name__)

LOG_SIZE, LOG_KEPT = 4 << 20, 3  # bytes of engine.log, and how many older ones
DATABASE = ("db.sqlite", "db.sqlite-wal", "db.sqlite-shm")  # the database, then its side files
DIRECTORIES = ("blobs", "layers", "trees", "containers", "volumes", "run", "tmp")
MAX_LINE = 2000  # characters of a command line kept in its event


def version() -> str:
    """Of the installed project; `unknown` when it runs from a bare tree."""
    try:
        return metadata.version("flying-dutchman")
    except metadata.PackageNotFoundError:
        return "unknown"


def _make_private(path: Path, *, create: bool) -> None:
    """Mode 0600, whatever the umask and the mode of the store's directory (someone may have made it before us)."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        return
    try:
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


class Engine:
    """Open the store at `store`: create what is missing, lock it, reconcile with what really runs, start the threads.

    `runtime` is one of runtimes.select.NAMES; `mount` is only written into the lock and `status`, for people; `clock`
    is for tests. Busy, naming the holder, when another daemon has the store.
    """

    def __init__(
        self, store: Path, *, runtime: str = "auto", mount: Path | None = None, clock: Clock | None = None
    ) -> None:
        self.store = Path(os.path.abspath(store))
        self.mount = mount
        self._clock = clock
        self.version = version()
        self._started = time.monotonic()
        self._closed = False
        self.drivers = Drivers(runtime, self.store / "containers")
        with ExitStack() as undo:
            self._open(undo)
            self._stack = undo.pop_all()

    def _open(self, undo: ExitStack) -> None:
        """Everything, in order; what has been opened is closed again when a later step fails."""
        self.store.mkdir(parents=True, exist_ok=True, mode=0o700)
        holder = f"pid {os.getpid()}" + (f", mount {self.mount}" if self.mount else "")
        undo.callback(hostfiles.lock_file(self.store / "lock", holder).close)
        for name in DIRECTORIES:
            (self.store / name).mkdir(mode=0o700, exist_ok=True)
        undo.callback(self._log_to_file())
        unmount_litter(self.store)
        check.empty_tmp(self.store)
        for name in DATABASE:  # SQLite gives its side files the mode of the database: that is set before, not after
            _make_private(self.store / name, create=name == DATABASE[0])
        self.meta = Meta(self.store / DATABASE[0])
        undo.callback(self.meta.close)
        self.reserve = Reserve(self.store)
        self.reserve.keep()
        self.journal = Journal(self.meta)
        undo.callback(self.journal.close)
        self.failures = Failures(self.meta)
        self.blobs = Blobs(self.store, self.meta)
        self.layers = Layers(self.store, self.meta)
        self.trees = Trees(self.store, self.meta, self.layers)
        self.images = Images(self.meta, self.blobs, self.layers, self.trees, self.journal)
        self.diffs = Diffs(self.trees)
        undo.callback(self.diffs.close)
        self.remotes = Remotes(self.store)
        undo.callback(self.remotes.close)
        self.volumes = Volumes(self.store, self.meta, self.journal)
        self.mounts = (Unmounted if host.MACOS else RootfsMounts)(self.store, self.trees)
        self.jobs = Jobs(self.meta, self.journal, on_failure=self._job_failed)
        undo.callback(self.jobs.close)
        self.policy, self.usage = PolicyFile(self.store), Usage(self.store)
        self.history = History(self.meta, self.journal)
        self.retention = Retention(self.meta, self.journal, self.policy.get)
        undo.callback(self.retention.close)
        self.contents = Contents(self.meta, self.layers, self.trees)
        self.gc = Collector(self.images, self.policy, self.usage, self.jobs)
        self.images.after_store = self.gc.after_store
        self.networks = Networks(self.meta, self.journal)
        place = state_directory(self.store)
        backend: Backend = Netavark(place / "netavark")
        if userids.rootless() is not None:
            backend = UserNetworks(place / "netavark", host.runtime_dir())
        elif host.MACOS:
            backend = GuestNetworks()
        self.connections = Connections(self.meta, self.journal, self.networks, backend, place)
        self.containers = Containers(
            self.store,
            self.meta,
            self.journal,
            self.failures,
            self.images,
            self.trees,
            self.volumes,
            self.mounts,
            self.drivers,
            self.connections,
            self._clock,
        )
        self.agents = guestagent.Agents(self.jobs)
        self.containers.execution.before_machine = self.agents.ready
        book = KernelBook(
            self.meta, self.journal, self.store / "containers", self.containers.all, lambda: self.drivers.default
        )
        self.kernels = Kernels(self.store / "kernels", book.users, book.record)
        undo.callback(self.drivers.close)
        undo.callback(self.connections.close)
        undo.callback(self.containers.close)
        self.guests = self.containers.guests
        self._check_files()
        self.volumes.reconcile()
        self.kernels.clean()
        book.reconcile(self.kernels)
        self.probe()
        self.journal.append(
            "engineStarted", "engine", {"version": self.version, "pid": os.getpid(), "runtime": self._runtime}
        )
        reconcile(self.containers)
        self.volumes.remove_orphans()
        self.containers.execution.attachments.settle_all()
        self.connections.reconcile({container.id for container in self.containers.all() if container.state in ALIVE})
        connecting.finish(self.containers, self.networks, self.connections)
        if self.drivers.default != "fake" and self.connections.usable:
            self.networks.ensure_default()
        self.history.adopt()
        self.retention.start()
        self.containers.monitor.start()
        self.containers.health.begin()
        self.containers.restarts.begin()
        if again := self.jobs.resume(lambda line: resumed(self.images, line)):
            log.info("jobs %s of the last daemon go on", ", ".join(map(str, again)))
        log.info("store %s open; runtime %s", self.store, self._runtime)

    def _job_failed(self, job: Job, error: EngineError) -> None:
        """Whoever wrote the verb has long returned: the reason stands where it was written, and at the job."""
        self.failures.record(f"job/{job.id}", job.verb, error)
        if job.verb.startswith("volumes/"):
            self.failures.record(f"volume/{job.verb.split()[0].partition('/')[2]}", job.verb, error)
            return
        if job.verb.startswith(f"{guestagent.VERB} "):
            return  # and in the errors of the containers that wait for it
        if job.verb.startswith("kernels "):
            self.failures.record("kernels", job.verb, error)
            return
        if job.verb.startswith("prune-volumes"):
            self.failures.record("volumes", job.verb, error)
            return
        self.failures.record(
            "store" if job.verb == "verify" or job.verb.startswith("gc") else "images", job.verb, error
        )

    def _log_to_file(self) -> Callable[[], None]:
        """engine.log gets what the engine's and the mount's loggers say; returns how to end that."""
        _make_private(self.store / "engine.log", create=True)
        handler = logging.handlers.RotatingFileHandler(
            self.store / "engine.log", maxBytes=LOG_SIZE, backupCount=LOG_KEPT, encoding="utf-8"
        )
        formatter = logging.Formatter(
            "%(asctime)s.%(msecs)03dZ %(levelname)s %(threadName)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        loggers = [logging.getLogger(name) for name in ("engine", "fdfs")]
        for logger in loggers:
            logger.addHandler(handler)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)

        def end() -> None:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()

        return end

    def _check_files(self) -> None:
        """A quick check that what the catalog lists is there; a miss is a warning, found again where it is used."""
        for name in check.remove_strays(self.store, self.meta):
            log.info("removed %s, which a crash left behind", name)
        for layer in self.layers.all():
            if not self.layers.data_path(layer.diff_id).exists():
                log.warning("layer %s has lost its data file: pull its images again", layer.diff_id)

    def probe(self) -> None:
        """Look what the default runtime can do here, for `status`. Takes seconds the first time after a boot."""
        name, probe = self.drivers.probe()
        self._runtime = f"{name}: {probe.reason}" if probe.ok else f"{name}, not usable here: {probe.reason}"

    # --- what people read ---------------------------------------------------------------------------------------

    def status(self) -> dict[str, str]:
        """Flat keys, in the order people read them."""
        counts = self.containers.records.counts()
        out = {
            "version": self.version,
            "pid": str(os.getpid()),
            "uptime_seconds": str(int(time.monotonic() - self._started)),
            "store": str(self.store),
            "mount": str(self.mount or ""),
            "runtime": self._runtime,
            **report.summaries(),
            **standbys.summary(self.kernels.directory),
            "rootfs": self._rootfs(),
            "networks": self.connections.summary(),
            "images": str(self._count("images")),
            "layers": str(self._count("layers")),
            "volumes": str(self._count("volumes")),
            "containers": str(sum(counts.values())),
        }
        for state in State:
            if state is not State.REMOVED:
                out[f"containers_{state}"] = str(counts.get(state, 0))
        out["jobs_running"] = str(self._count("jobs", "WHERE state = 'running'"))
        out["events"] = str(self.journal.last)
        try:
            room = os.statvfs(self.store)
            out["free_bytes"] = str(room.f_bavail * room.f_frsize)
        except OSError:
            pass
        return out

    def _rootfs(self) -> str:
        try:
            self.mounts.supported()
        except EngineError as error:
            return f"not mountable here: {error.reason}"
        return "EROFS and overlay" if userids.rootless() is None else "plain files and overlay, in a user namespace"

    def _count(self, table: str, where: str = "") -> int:
        row = self.meta.row(f"SELECT count(*) AS n FROM {table} {where}")
        return int(row["n"]) if row else 0

    # --- commands -----------------------------------------------------------------------------------------------

    @contextmanager
    def command(self, object: str, line: str, *, who: str = "") -> Iterator[None]:
        """Around carrying out one line written to a ctl (or a field, or a document) of `object`.

        Events in the block carry `who` (such as `uid=0 pid=4711`), a `verb` event records the line without its secrets,
        and an EngineError is recorded in `error` before it goes on. On a full disk nothing is carried out (NoSpace) but
        what makes room or ends something: for that the store's reserve is given up.
        """
        line = discreet.command(line)
        with acting(who):
            try:
                try:
                    self.journal.append("verb", object or "engine", {"command": line[:MAX_LINE]})
                except NoSpace:
                    if line.partition(" ")[0] not in FREEING or not self.reserve.give_up():
                        raise
                    self.journal.append("verb", object or "engine", {"command": line[:MAX_LINE]})
                yield
                self.reserve.keep()
            except EngineError as error:
                self.failures.record(object, line, error)
                raise
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    full = NoSpace("the disk that holds the store is full", at=str(error.filename or "") or None)
                    self.failures.record(object, line, full)
                    raise full from error
                wrapped = EngineError(f"{error.strerror}: {error.filename}" if error.filename else str(error))
                self.failures.record(object, line, wrapped)
                raise

    def halt(self) -> None:
        """Stop all that runs, as a host that goes down would: what its policy keeps up starts with the next engine."""
        for container in self.containers.all():
            if container.state in (State.RUNNING, State.PAUSED):
                try:
                    now = self.containers.records.move(container.id, State.STOPPING, reason="stopped with the engine")
                except (Busy, Gone):
                    continue  # it ended meanwhile
                self.containers.resume_stop(now, paused=container.state is State.PAUSED)

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self, *, unmount: bool = False) -> None:
        """Stop the threads and let go of the store; containers go on running. Idempotent.

        `unmount`: also take down the root filesystems of containers that do not run.
        """
        if self._closed:
            return
        self._closed = True
        self.mounts.blanks.close()
        if unmount and host.LINUX and host.is_root():
            keep = {
                container.id
                for container in self.containers.all()
                if container.state in ALIVE or container.state is State.STARTING
            }
            try:
                self.mounts.release_all(keep)
            except (EngineError, OSError):
                log.warning("not everything could be unmounted", exc_info=True)
        log.info("store %s closes", self.store)
        self._stack.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Starting, stopping and ending: the part of a container's life that a runtime driver takes part in. Floor 3.

Only here: calls of drivers. `containers.py` decides whether a verb is legal and records the transient state; these
methods carry it out and record how it ended. A run that ends by itself is reported by the driver to `exited`.

Threading: every container has a lock, held around calls of its driver, so that one slow container stops no other. It is
never held while waiting for an exit. `exited` runs on the driver's thread and takes no lock but the catalog's.
"""

from __future__ import annotations

import logging
import re
import signal as signals
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.attach import Attachments
from engine.config import ContainerConfig
from engine.connections import Connections
from engine.drivers import Drivers
from engine.errors import Busy, EngineError, Gone, InvalidArgument, NoSpace, NotFound, RuntimeFailure, Unsupported
from engine.giving import relabel
from engine.images import platforms
from engine.images.catalog import Image, Images
from engine.lifecycle import ALIVE, State
from engine.model import ImageConfig
from engine.mounts import RootfsMounts
from engine.mountspec import MountKind
from engine.records import Container, Records
from engine.runtimes import base, selinux
from engine.runtimes.base import Exit, Runtime, make_spec, parse_signal
from engine.runtimes.selinux import Labels
from engine.store.meta import Meta
from engine.store.trees import Trees
from engine.unmounted import Unmounted
from engine.volumefill import empty
from engine.volumes import Volumes

log = logging.getLogger(__name__)

LOCK_PATIENCE = 1.0  # seconds a verb waits for another's call of the driver
KILL_PATIENCE = 10.0  # seconds after SIGKILL before a stop counts as refused
COULD_NOT_START = 128  # exit codes as Docker has them (moby daemon/start.go, setExitCodeFromError)
NOT_EXECUTABLE, NOT_FOUND = 126, 127
LOST = 255  # nobody saw how it ended


@dataclass(slots=True)
class Handle:
    """What is known of a container only while the daemon lives."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    run: int = 0  # counts runs, so that a late report of an earlier one is told apart
    early: Exit | None = None  # the run ended before `running` was recorded; guarded by the write transaction


def start_failure_code(reason: str) -> int:
    """126, 127 or 128 from the runtime's words, as Docker takes them."""
    text = reason.lower()
    if re.search(r"executable file not found|no such file or directory|not found in \$?path", text):
        return NOT_FOUND
    if re.search(r"permission denied|exec format error|is a directory|not a directory", text):
        return NOT_EXECUTABLE
    return COULD_NOT_START


def one_line(text: str) -> str:
    return " ".join(text.split())[:1000]


class Execution:
    def __init__(
        self,
        store: Path,
        meta: Meta,
        records: Records,
        images: Images,
        volumes: Volumes,
        mounts: RootfsMounts,
        trees: Trees,
        drivers: Drivers,
        connections: Connections,
    ) -> None:
        self._directory = store / "containers"
        self._meta = meta
        self._records = records
        self._images = images
        self._volumes = volumes
        self._mounts = mounts
        self._trees = trees
        self._drivers = drivers
        self.attachments = Attachments(store, records, volumes, self.image_config)
        self._connections = connections
        self._guard = threading.Lock()
        self._handles: dict[str, Handle] = {}
        self._again: deque[Callable[[], None]] = deque()  # what could not be recorded; the monitor tries again
        self.before_exit: Callable[[str], None] = lambda id: None  # the monitor's: last output is told of first
        self.after_exit: Callable[[str], None] = lambda id: None
        self.before_start: Callable[[str], None] = lambda id: None
        # what only a virtual machine needs
        self.before_machine: Callable[[str, ImageConfig], None] = lambda id, image: None

    # --- handles ------------------------------------------------------------------------------------------------

    def handle(self, id: str) -> Handle:
        with self._guard:
            return self._handles.setdefault(id, Handle())

    @contextmanager
    def locked(self, id: str, patience: float = LOCK_PATIENCE) -> Iterator[Handle]:
        """The container's lock. Busy when another call of its driver takes longer than `patience` seconds."""
        handle = self.handle(id)
        if not handle.lock.acquire(timeout=patience):
            raise Busy("another command on this container is being carried out", hint="try again in a moment")
        try:
            yield handle
        finally:
            handle.lock.release()

    def forget(self, id: str) -> None:
        with self._guard:
            self._handles.pop(id, None)
        self._connections.forget(id)

    def driver_of(self, container: Container) -> Runtime:
        """The driver it runs (or last ran) on."""
        return self._drivers.get(container.runtime or container.config.runtime)

    def delete_anywhere(self, id: str) -> None:
        """Clear whatever the default driver has of `id`."""
        self._drivers.get().delete(id)

    # --- what a run needs ---------------------------------------------------------------------------------------

    def image_of(self, container: Container) -> Image:
        """The image it was started from, else the one its config names now. NotFound says how to get it."""
        if container.image:
            try:
                return self._images.get(container.image)
            except NotFound:
                pass
        return self.find_image(container.config)

    def image_env(self, container: Container) -> tuple[str, ...]:
        """The variables of its image; none when that is gone."""
        try:
            return self._images.config(self.image_of(container).digest).runtime.env or ()
        except EngineError:
            return ()

    def find_image(self, config: ContainerConfig) -> Image:
        text = config.image
        if not text:
            raise InvalidArgument(
                "image: none is set", at="image", hint="echo IMAGE > config/image, then start it again"
            )
        try:
            return platforms.named(self._images, text, config.platform)
        except NotFound as error:
            raise NotFound(
                error.reason, at=error.at or text, hint=error.hint or f"echo 'pull {text}' > images/ctl"
            ) from error

    def image_config(self, container: Container) -> ImageConfig:
        """Of the image it was started from."""
        return self._images.config(self.image_of(container).digest)

    def rootfs(self, id: str, chain_id: str, driver: Runtime | None = None, label: str | None = None) -> Path:
        """The merged root filesystem, mounted. The fake driver does without one where this host cannot mount."""
        try:
            return self._mounts.ensure(id, chain_id, label)
        except Unsupported:
            if driver is None or driver.name != "fake":
                raise
            return self._mounts.merged(id)

    # --- start --------------------------------------------------------------------------------------------------

    def start(self, id: str) -> None:
        """Carry out a start; the state is `starting`. Afterwards it is running (or has ended already), else stopped
        with the reason, and the error goes to the caller."""
        container = self._records.by_id(id)
        known: dict[str, Any] = {}
        try:
            with self.locked(id, LOCK_PATIENCE * 10) as handle:
                self._launch(container, handle, known)
        except BaseException as error:
            reason = error.reason if isinstance(error, EngineError) else str(error) or type(error).__name__
            code = start_failure_code(reason) if isinstance(error, RuntimeFailure) else COULD_NOT_START
            self.recorded(
                lambda: self._records.move(
                    id,
                    State.STOPPED,
                    only=State.STARTING,
                    reason=one_line(reason),
                    exit_code=code,
                    oom=0,
                    pid=None,
                    finished_ns=time.time_ns(),
                    **known,
                )
            )
            self.attachments.release(container)
            raise

    def _launch(self, container: Container, handle: Handle, known: dict[str, Any]) -> None:
        id = container.id
        self.before_start(id)
        image = self.image_of(container)
        known["image"] = image.digest
        self._meta.used(image.digest)
        driver = self._drivers.get(container.config.runtime)
        known["runtime"] = driver.name
        if container.runtime and container.runtime != driver.name:
            self._drivers.get(container.runtime).delete(id)  # what an earlier run left there
        config = self._images.config(image.digest)
        if driver.name == "vm":
            self.before_machine(id, config)
        fresh = driver.name == "vm" and self._mounts.use_disk(id, image.chain_id, container.config.disk_size)
        # a guest's kernel has a policy of its own, or none
        labels = Labels() if driver.name == "vm" else selinux.of(self._directory / id, container.config)
        if labels.private and self._mounts.label(id) != labels.private:  # what was written before it had one
            self._mounts.release(id)
            if (upper := self._mounts.upper(id)).exists():
                relabel(upper, labels.private)
        user = container.config.user or config.runtime.user
        with ExitStack() as stack:
            # nothing is made or copied there then, and mounting a disk takes longer than all else
            if not self._mounts.shows or (fresh and not self.attachments.specs(container, config)):
                rootfs = stack.enter_context(self._mounts.only_image(image.chain_id, id))
                self._lay_out(container, config, image.chain_id, rootfs)
            else:
                rootfs = self.rootfs(id, image.chain_id, driver, labels.private)
            attached = stack.enter_context(self.attachments.attached(container, config, rootfs, user, labels))
            spec = make_spec(
                id=id,
                name=container.name,
                directory=self._directory / id,
                rootfs=rootfs,
                config=container.config,
                image=config,
                mounts=attached.mounts,
                layers=(self._trees.meta_path(image.chain_id), *self._trees.devices(image.chain_id)),
                labels=labels,
                release=lambda: self._mounts.give_disk(id),
            )
            handle.run += 1
            handle.early = None
            run = handle.run
            try:
                pid = self._connections.create(driver, spec)
            finally:
                self._mounts.given(id)
        try:
            driver.watch(id, lambda _, result: self.exited(id, run, result))
            began = time.time_ns()
            driver.start(id)
            after = self._records.move(
                id,
                State.RUNNING,
                only=State.STARTING,
                then=lambda _: None if handle.early is None else (State.STOPPED, _ended(handle.early)),
                pid=pid,
                started_ns=began,
                finished_ns=None,
                exit_code=None,
                oom=0,
                reason=one_line("; ".join(attached.notes)),
                **known,
            )
        except BaseException:
            handle.run += 1  # nothing it still reports counts
            try:
                driver.delete(id)
            except EngineError as left:
                log.error("container %s could not be cleared after a failed start: %s", id, left)
            self._connections.release(id)
            raise
        if after.state is State.STOPPED:
            self.attachments.release(after)
            self._connections.release_later(id)
            self.after_exit(id)

    def _lay_out(self, container: Container, config: ImageConfig, chain_id: str, rootfs: Path) -> None:
        """Where the root file system is not mounted: what new volumes get of it."""
        if not isinstance(self._mounts, Unmounted):
            return
        for item in self.attachments.specs(container, config):
            if item.type is MountKind.VOLUME:
                try:
                    new = empty(self._volumes.path(item.source))
                except NotFound:
                    new = True
                if new:
                    self._mounts.lay_out(chain_id, rootfs, item.target)

    def watch(self, container: Container) -> None:
        """Re-attach to a container that runs since before this daemon."""
        with self.locked(container.id) as handle:
            handle.run += 1
            run = handle.run
            self.driver_of(container).watch(container.id, lambda _, result: self.exited(container.id, run, result))

    # --- the end ------------------------------------------------------------------------------------------------

    def exited(self, id: str, run: int, result: Exit) -> None:
        """The process of run number `run` has ended. On the driver's thread; never raises what is worth a retry."""
        self.before_exit(id)
        self.recorded(lambda: self._record_exit(id, run, result))

    def _record_exit(self, id: str, run: int, result: Exit) -> None:
        handle = self.handle(id)
        with self._meta.tx():
            if handle.run != run:
                return
            state = self._records.by_id(id).state  # the last commit, and no other can come between
            if state is State.STARTING:
                handle.early = result
                return
            if state not in ALIVE:
                return
            after = self._records.move(id, State.STOPPED, **_ended(result))
        self.attachments.release(after)
        self._connections.release_later(id)
        self.after_exit(id)

    def recorded(self, write: Callable[[], object]) -> None:
        """Write a state that is a fact already. On a full disk it is tried again until it succeeds."""
        try:
            write()
        except Gone:
            pass  # removed meanwhile
        except (NoSpace, sqlite3.OperationalError) as error:
            log.error("could not record a change of state, will try again: %s", error)
            self._again.append(lambda: self.recorded(write))
        except Busy as error:
            log.info("a change of state came too late: %s", error)

    def try_again(self) -> bool:
        """Whether something still waits to be recorded, after another try."""
        for _ in range(len(self._again)):
            self._again.popleft()()
        return bool(self._again)

    # --- signals ------------------------------------------------------------------------------------------------

    def stop_signal(self, container: Container) -> int:
        if container.config.stop_signal:
            return parse_signal(container.config.stop_signal)
        try:
            named = self._images.config(container.image).runtime.stop_signal if container.image else ""
            return parse_signal(named) if named else int(signals.SIGTERM)
        except EngineError:  # the image is gone, or names a signal that does not exist: Docker's default
            return int(signals.SIGTERM)

    def signal(self, container: Container, signum: int) -> None:
        with self.locked(container.id):
            self.driver_of(container).signal(container.id, signum)

    def stop(self, container: Container, signum: int, grace: float, *, paused: bool) -> None:
        """Carry out a stop; the state is `stopping`. RuntimeFailure when it survives SIGKILL; then it is running again.

        Returns early, still `stopping`, when the engine closes: the next one takes the stop up again.
        """
        id = container.id
        driver = self.driver_of(container)
        try:
            with self.locked(id, LOCK_PATIENCE * 10):
                try:
                    driver.signal(id, signum)
                    if paused and signum != signals.SIGKILL:
                        driver.resume(id)  # a frozen process sees the signal once it goes on
                except (Busy, NotFound) as error:
                    log.info("container %s ended before it was signalled: %s", id, error)
        except EngineError as error:
            failed = error
            self.recorded(lambda: self._refused(id, failed))
            raise
        try:
            self._records.note_stop(id, time.time_ns() + int(grace * 1e9))
        except NoSpace as full:
            log.warning("that container %s was signalled is not noted: %s", id, full)
        self.await_end(container, grace)

    def await_end(self, container: Container, grace: float) -> None:
        """The second half of a stop: the signal has been sent; SIGKILL after `grace` seconds."""
        id = container.id
        driver = self.driver_of(container)
        if self._ended_within(id, grace):
            return
        log.info("container %s did not stop within %g s: SIGKILL", id, grace)
        try:
            with self.locked(id, LOCK_PATIENCE * 10):
                driver.signal(id, signals.SIGKILL)
        except (Busy, NotFound):
            pass
        if self._ended_within(id, KILL_PATIENCE):
            return
        now = driver.status(id)
        if now.state in (base.State.STOPPED, base.State.ABSENT):  # it ended, and nobody told
            run = self.handle(id).run
            code = LOST if now.exit_code is None else now.exit_code
            self.exited(id, run, Exit(code, now.oom, now.finished_ns or time.time_ns()))
            return
        refusal = RuntimeFailure(
            f"still running {KILL_PATIENCE:.0f} s after SIGKILL", hint="its process may hang in I/O"
        )
        self.recorded(lambda: self._refused(id, refusal))
        raise refusal

    def _refused(self, id: str, error: EngineError) -> None:
        self._records.move(id, State.RUNNING, only=State.STOPPING, reason=one_line(f"stop refused: {error.reason}"))

    def _ended_within(self, id: str, seconds: float) -> bool:
        """True also when the engine closes."""
        try:
            found = self._records.wait(id, lambda now: now.state is not State.STOPPING, seconds)
        except Gone:
            return True
        return found is not None or self._records.closing


def _ended(result: Exit) -> dict[str, Any]:
    return {
        "exit_code": result.exit_code,
        "oom": int(result.oom),
        "finished_ns": result.finished_ns or time.time_ns(),
        "reason": one_line(result.reason),
        "pid": None,
    }

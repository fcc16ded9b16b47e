"""The engine as one object: the only thing the mount talks to. Floor 4.

Only here: how a store directory is opened, locked, checked and closed, and what `status` says. Everything else is in
the parts it holds. Thread-safe; `close` leaves containers running and takes less than two seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine import host
from engine.containers import Containers
from engine.events import Journal, acting
from engine.failures import Failures
from engine.images.catalog import Images
from engine.jobs import Jobs
from engine.mounts import RootfsMounts
from engine.store.blobs import Blobs
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Trees
from engine.volumes import Volumes

log = logging.getLogger(__name__)


class Engine:
    """Open the store at `store`: create what is missing, lock it, reconcile with what really runs, start the threads.

    `runtime` is `auto`, `oci` or `fake`; `mount` is only written into the lock and `status`, for people. Busy, naming
    the holder, when another daemon has the store.
    """

    store: Path
    meta: Meta
    blobs: Blobs
    layers: Layers
    trees: Trees
    images: Images
    containers: Containers
    volumes: Volumes
    mounts: RootfsMounts
    jobs: Jobs
    journal: Journal
    failures: Failures
    version: str

    def __init__(self, store: Path, *, runtime: str = "auto", mount: Path | None = None) -> None: ...

    def status(self) -> dict[str, str]:
        """Flat keys, in the order people read them: version, pid, store, mount, runtime, containers, …"""
        ...

    @contextmanager
    def command(self, object: str, line: str, *, who: str = "") -> Iterator[None]:
        """Around carrying out one line written to a ctl (or a field, or a document) of `object`.

        Events in the block carry `who` (such as `uid=0 pid=4711`), a `verb` event records the line, and an EngineError
        is recorded in `error` before it goes on.
        """
        ...

    def close(self, *, unmount: bool = False) -> None:
        """Stop the threads and let go of the store; containers go on running. `unmount`: also take down the root
        filesystems of containers that do not run. Idempotent."""
        ...

"""A mounted engine on a host that has either runc or crun, for tests that are run with each (tests/system)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines import add_busybox
from mounting import Daemon

from engine import hostmounts
from engine.engine import Engine


@contextmanager
def only_runtime(program: str, place: Path) -> Iterator[Daemon]:
    """With the image `busybox`, below `place`, while the block runs; the other program is hidden until then."""
    other = shutil.which({"runc": "crun", "crun": "runc"}[program])
    assert other is not None
    hostmounts.bind(Path("/dev/null"), Path(other))
    try:
        daemon = Daemon(place, runtime="oci")
        with Engine(daemon.store, runtime="oci") as engine:
            add_busybox(engine)
        with daemon:
            yield daemon
    finally:
        hostmounts.unmount(Path(other))

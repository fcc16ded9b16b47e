"""An engine on a host that has either runc or crun, for tests that are run with each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engines import add_busybox
from mounting import Daemon

from engine import hostmounts
from engine.engine import Engine

RUNTIMES = ("runc", "crun")


@contextmanager
def _alone(program: str) -> Iterator[None]:
    """The other one is hidden while the block runs."""
    other = shutil.which({"runc": "crun", "crun": "runc"}[program])
    assert other is not None
    hostmounts.bind(Path("/dev/null"), Path(other))
    try:
        yield
    finally:
        hostmounts.unmount(Path(other))


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Iterator[str]:
    with _alone(request.param):
        yield request.param


@pytest.fixture(scope="module", params=RUNTIMES)
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Mounted, with the image `busybox`."""
    with _alone(request.param):
        daemon = Daemon(tmp_path_factory.mktemp(request.param), runtime="oci")
        with Engine(daemon.store, runtime="oci") as engine:
            add_busybox(engine)
        with daemon:
            assert f"runtime oci: {request.param} works here" in daemon.sh("cat status")
            yield daemon

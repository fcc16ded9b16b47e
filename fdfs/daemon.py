"""The daemon: one engine, its control mount, what is mounted over it; from start to a clean end. Floor 7.

`python -m fdfs.daemon --store DIR --mount DIR --runtime NAME [--ready-fd N]`. On the ready descriptor it writes
`ready` once requests are served, or the reason (and a hint) why it could not. SIGTERM and SIGINT unmount and close;
containers go on running. The main thread only waits: it must outlive the process that mounts, which dies with it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from engine.engine import Engine
from engine.errors import EngineError
from fdfs.binder import Binder
from fdfs.mount import Mount, context
from fdfs.ops import Operations
from fdfs.outside import Outside
from fdfs.tree import caller
from fdfs.tree.root import ROOT

log = logging.getLogger(__name__)


def _say(ready_fd: int | None, text: str) -> None:
    """Tell who started us, once."""
    if ready_fd is None:
        return
    try:
        os.write(ready_fd, text.encode())
        os.close(ready_fd)
    except OSError:
        pass  # who asked is gone


def _logging(foreground: bool) -> None:
    """The engine keeps <store>/engine.log; warnings also go to the terminal in the foreground."""
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[console] if foreground else [logging.NullHandler()], force=True)
    logging.getLogger("fuse").setLevel(logging.CRITICAL)  # failures are logged once, by our guard


def serve(
    store: Path,
    mount: Path,
    *,
    runtime: str = "auto",
    foreground: bool = False,
    ready_fd: int | None = None,
    allow_other: bool = False,
) -> int:
    """Serve the engine at `store` on `mount`; 0 after a signal or an unmount, 1 when it cannot start."""
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    _logging(foreground)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ending.set())
    engine = control = binder = None
    try:
        engine = Engine(store, runtime=runtime, mount=mount)
        caller.source = context
        binder = Binder(engine, ROOT, mount)
        operations = Operations(engine, ROOT, context, binder.on_graft, binder.before_follow)
        control = Mount(operations, mount, allow_other=allow_other, outside=Outside.find())
        control.start()
        binder.start()
    except (EngineError, OSError) as error:
        log.error("cannot start: %s", error)
        hint = getattr(error, "hint", None)
        _say(ready_fd, f"{error}\n" + (f"hint: {hint}\n" if hint else ""))
        if ready_fd is None:
            print(f"{error}" + (f"\nhint: {hint}" if hint else ""), file=sys.stderr)
        _close(engine, control, binder)
        return 1
    log.info("serving %s at %s", store, mount)
    _say(ready_fd, "ready\n")
    while not ending.wait(0.5):
        if control.wait(0):
            log.warning("%s was unmounted by someone else", mount)
            break
    log.info("ending")
    _close(engine, control, binder)
    return 0


def _close(engine: Engine | None, control: Mount | None, binder: Binder | None) -> None:
    if binder is not None:
        binder.stop()
    if control is not None:
        control.stop()
    if engine is not None:
        engine.close(unmount=True)  # what runs stays as it is


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fdfs.daemon", description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--mount", type=Path, required=True)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--allow-other", action="store_true")
    options = parser.parse_args(arguments)
    return serve(
        Path(os.path.abspath(options.store)),
        Path(os.path.abspath(options.mount)),
        runtime=options.runtime,
        foreground=options.ready_fd is None,
        ready_fd=options.ready_fd,
        allow_other=options.allow_other,
    )


if __name__ == "__main__":
    sys.exit(main())

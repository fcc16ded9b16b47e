"""A daemon that is killed by SIGKILL at a named point: `python tests/killing.py` takes the daemon's options.

It looks for the file $DUTCHMAN_TEST_KILL; a line in it arms a point, which is told by emptying the file:

    before MODULE:NAME    when that function is called, in place of it (NAME may be CLASS.METHOD)
    after MODULE:NAME     when it has returned
    here PATTERN          as soon as a file below the store matches and is not empty

What a point does is the daemon's own end, as from outside: nothing of the product knows of it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mounting import Daemon

from fdfs import daemon

ASK = "DUTCHMAN_TEST_KILL"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def hook(when: str, where: str) -> None:
    module, _, name = where.partition(":")
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    real: Callable[..., Any] = getattr(holder, last)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            die()
        result = real(*args, **kwargs)
        die()
        return result

    setattr(holder, last, hooked)


def await_file(store: Path, pattern: str) -> None:
    while True:
        for path in store.glob(pattern):
            try:
                if path.is_dir() or path.stat().st_size:
                    die()
            except FileNotFoundError:
                continue
        time.sleep(0.001)


def listen(asked: Path, store: Path) -> None:
    while True:
        time.sleep(0.01)
        if not asked.exists() or not (line := asked.read_text()).endswith("\n"):
            continue
        when, _, what = line.strip().partition(" ")
        if when == "here":
            threading.Thread(target=await_file, args=(store, what), daemon=True).start()
        else:
            hook(when, what)
        os.truncate(asked, 0)
        return


class Mortal(Daemon):
    """Such a daemon."""

    def __init__(self, place: Path, **options: Any) -> None:
        super().__init__(place, **options)
        self._asked = place / "kill"
        self._env[ASK] = str(self._asked)
        self._program = [str(Path(__file__).resolve())]

    def die_at(self, point: str) -> None:
        """From here on it ends there."""
        self._asked.write_text(f"{point}\n")
        until = time.monotonic() + 30
        while self._asked.stat().st_size:
            assert time.monotonic() < until and self.process is not None and self.process.poll() is None
            time.sleep(0.01)
        self._asked.unlink()

    def await_death(self, seconds: float = 120) -> None:
        assert self.process is not None
        assert self.process.wait(seconds) == -signal.SIGKILL
        self.process = None


if __name__ == "__main__":
    options = sys.argv[1:]
    store = Path(options[options.index("--store") + 1])
    threading.Thread(target=listen, args=(Path(os.environ[ASK]), store), daemon=True).start()
    sys.exit(daemon.main(options))

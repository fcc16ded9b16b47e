"""One short command inside a running container, for its output and exit code: how health is found out. Floor 2.

`run` starts the runtime's own `exec` (runc, crun: `exec --process SPEC ID`) with the container's user, environment,
directory and limits, keeps the first bytes of what is printed, and after the deadline kills the command with everything
it started. Blocks its thread for at most the deadline and a few seconds. What a killed daemon was asking a container is
found by the file with its process, and ended before the next command begins.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import Busy, DeadlineExceeded, RuntimeFailure
from engine.runtimes import pids
from engine.upkeep import MAX_OUTPUT

LAST_WORDS = 5.0  # seconds for the runtime to end once the command was killed
_asking: set[str] = set()  # the files of this process's commands under way


def run(
    runtime: Sequence[str], bundle: Path, place: Path, id: str, argv: Sequence[str], deadline: float
) -> tuple[int, bytes]:
    """(exit code, up to MAX_OUTPUT bytes of stdout and stderr). DeadlineExceeded after `deadline` seconds.

    `runtime` is its command line up to the verb, `bundle` holds the container's config.json, `place` takes a file.
    Busy when the container is not there to be asked. As with Docker, what the command leaves running in the background
    is waited for as long as it holds stdout or stderr.
    """
    try:
        process = json.loads((bundle / "config.json").read_bytes())["process"]
    except (OSError, ValueError, KeyError) as error:
        raise Busy("the container is not running") from error
    _end_strays(place)
    file = place / f"probe-{os.urandom(8).hex()}.json"
    _asking.add(str(file))
    try:
        with open(file, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as spec:
            json.dump(_process(process, argv), spec)
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            try:
                child = subprocess.Popen(
                    [*runtime, "exec", "--process", str(file), id],
                    stdin=subprocess.DEVNULL,
                    stdout=writing,
                    stderr=writing,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                raise RuntimeFailure(f"cannot run {runtime[0]}: {error}") from error
            finally:
                os.close(writing)
            return _follow(child, reading, deadline)
        finally:
            os.close(reading)
    finally:
        file.unlink(missing_ok=True)
        _asking.discard(str(file))


def _process(process: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """The container's own process with another command line (runtime-spec config.md#process)."""
    out = {key: value for key, value in process.items() if key not in ("consoleSize", "commandLine")}
    return {**out, "args": list(argv), "terminal": False}


def _follow(child: subprocess.Popen[bytes], reading: int, deadline: float) -> tuple[int, bytes]:
    output = bytearray()
    until = time.monotonic() + deadline
    held = pids.hold(child.pid)
    try:
        poll = select.poll()
        poll.register(held, select.POLLIN)
        poll.register(reading, select.POLLIN)
        while True:
            left = until - time.monotonic()
            if left <= 0:
                kill_tree(child)
                raise DeadlineExceeded(f"Health check exceeded timeout ({deadline:g}s)")
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if reading in ready and not _take(reading, output):
                poll.unregister(reading)  # all have closed it
            if held in ready:
                _take(reading, output)
                return child.wait(), bytes(output)
    finally:
        os.close(held)
        if child.poll() is None:
            kill_tree(child)


def _take(reading: int, output: bytearray) -> bool:
    """Read what is there, keep its beginning; False at the end of the pipe."""
    for _ in range(64):  # a command that prints without end does not hold up its own deadline
        try:
            data = os.read(reading, 1 << 16)
        except BlockingIOError:
            return True
        if not data:
            return False
        output += data[: MAX_OUTPUT - len(output)]
    return True


def _end_strays(place: Path) -> None:
    """Kill what a killed daemon was asking: nobody counts its time any more."""
    files = {os.fsencode(path) for path in place.glob("probe-*.json") if str(path) not in _asking}
    if not files:
        return
    for pid in pids.everybody():
        started, words = pids.start_time(pid), pids.words(pid)
        held = None
        if started is not None and b"exec" in words and not files.isdisjoint(words):
            held = pids.open_process(pid, started)
        if held is not None:
            try:
                _kill_below(pid)
                _send(held, signal.SIGKILL)
            finally:
                os.close(held)
    for file in files:
        Path(os.fsdecode(file)).unlink(missing_ok=True)


def kill_tree(child: subprocess.Popen[bytes]) -> None:
    """Kill everything below `child`, then `child` itself if it does not end with that."""
    try:
        child.wait(LAST_WORDS if _kill_below(child.pid) else 0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _kill_below(root: int) -> bool:
    """Kill everything below `root`; False when there is nothing.

    Stopped first, one generation after the other, so that none forks away meanwhile. A process that has made itself
    a daemon (its parent has ended) is the container's, and stays.
    """
    held: dict[int, pids.Held | None] = {}
    try:
        while fresh := [pid for pid in descendants(root) if pid not in held]:
            for pid in fresh:
                started = pids.start_time(pid)
                held[pid] = None if started is None else pids.open_process(pid, started)
                _send(held[pid], signal.SIGSTOP)
        for fd in held.values():
            _send(fd, signal.SIGKILL)
    finally:
        for fd in held.values():
            if fd is not None:
                os.close(fd)
    return bool(held)


def _send(held: pids.Held | None, number: int) -> None:
    if held is not None:
        try:
            pids.send(held, number)
        except ProcessLookupError:
            pass


def children() -> dict[int, list[int]]:
    """The pids of all processes by that of their parent."""
    found: dict[int, list[int]] = defaultdict(list)
    for pid in pids.everybody():
        found[pids.parent(pid)].append(pid)
    return found


def descendants(root: int) -> list[int]:
    """The pids of all processes below `root`."""
    parents = children()
    out: list[int] = []
    todo = [root]
    while todo:
        below = parents.get(todo.pop(), [])
        out += below
        todo += below
    return out

"""`dutchman logs`, and what a container prints passed on until it has stopped.

Floor 7. Only here: how a log is followed, and when its container has stopped for good. One thread, and one more for
each Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from fdfs.cli_mount import Failure, Follower, Mount, tail_offset
from fdfs.cli_options import mount_option

POLL = 0.05, 0.5  # seconds between two looks at a log: at first, and when nothing happens
ENDED = ("created", "stopped", "removing", "removed", "")


def follow(mount: Mount, name: str, *, fresh: bool = True) -> int:
    """Pass on what the container prints (`fresh`: and has printed) until it has stopped; its exit code.

    A signal to us stops it if it is ours (`fresh`), else the container gets that signal.
    """
    asked = [0]

    def write(line: str) -> None:
        with contextlib.suppress(OSError), open(mount.path("containers", name, "ctl"), "w") as ctl:
            ctl.write(line)

    def stop(number: int, _: object) -> None:
        # `stop` takes up to its grace period, and output goes on meanwhile; a second Ctrl-C kills
        asked[0] += 1
        line = f"kill {number}\n" if not fresh else "stop\n" if asked[0] == 1 else "kill\n"
        threading.Thread(target=write, args=(line,), daemon=True).start()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        paths = [mount.path("containers", name, "logs", stream) for stream in ("stdout", "stderr")]
        offsets = [0 if fresh else path.stat().st_size for path in paths]
        outputs = sys.stdout.buffer, sys.stderr.buffer
        streams = [(Follower(path, at), out) for path, at, out in zip(paths, offsets, outputs, strict=True)]
        for _ in _until_ended(mount, name, [follower for follower, _ in streams], [out for _, out in streams]):
            pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    code = mount.field("containers", name, "exit_code")
    if not code.lstrip("-").isdigit():
        error = mount.field("containers", name, "error")
        raise Failure(f"{name} ended without an exit code", *error.splitlines()[:6])
    return int(code)


def _ended(mount: Mount, name: str) -> bool:
    """Whether it has stopped for good, with no restart to come. (Asked in this order, as one may just have begun.)"""
    waits = mount.field("containers", name, "restarting") == "1"
    return not waits and mount.field("containers", name, "state") in ENDED


def _until_ended(mount: Mount, name: str, followers: list[Follower], outputs: list[Any]) -> Iterator[None]:
    """Copy what is new, again and again; stops after what was there once the container had ended."""
    pause = POLL[0]
    while True:
        state = mount.field("containers", name, "state")
        busy = False
        for follower, output in zip(followers, outputs, strict=True):
            for chunk in follower.read():
                output.write(chunk)
                output.flush()
                busy = True
        if state in ENDED and _ended(mount, name):
            return
        pause = POLL[0] if busy else min(POLL[1], pause * 1.2)
        yield
        time.sleep(pause)


def _moment(text: str) -> datetime:
    """A point in time. One without a zone is this host's."""
    try:
        if ago := re.fullmatch(r"(\d{1,9})([smhd])", text):
            unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[ago[2]]
            when = datetime.now(UTC) - timedelta(**{unit: int(ago[1])})
        elif re.fullmatch(r"\d{1,11}(\.\d+)?", text):
            when = datetime.fromtimestamp(float(text), UTC)
        else:
            when = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise click.UsageError(f"--since: {text!r} is no time, such as 2026-01-31T12:00:00Z or 10m") from None
    return when


class _Decoded:
    """An output for all.jsonl: each record's line to stdout or stderr, optionally with its time."""

    def __init__(self, times: bool, since: datetime | None = None) -> None:
        """What is earlier than `since` is left out."""
        self._rest, self._times, self._fresh = b"", times, {"stdout": True, "stderr": True}
        self._since = since

    def write(self, chunk: bytes) -> None:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            record = json.loads(line)
            if self._since is not None and datetime.fromisoformat(record["time"]) < self._since:
                continue
            stream = record["stream"]
            output = sys.stderr if stream == "stderr" else sys.stdout
            if self._times and self._fresh[stream]:
                output.write(record["time"] + " ")
            self._fresh[stream] = not record.get("partial")
            output.write(record["line"] + ("\n" if self._fresh[stream] else ""))

    def flush(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()


@click.command("logs")
@mount_option
@click.option("-f", "--follow", is_flag=True, help="Go on until the container stops.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@click.option("--since", metavar="TIME", help="Only later lines: 2026-01-31T12:00:00Z, a date, or 10m ago.")
@click.option("-t", "--timestamps", is_flag=True, help="When each line arrived.")
@click.option("--stdout", "only", flag_value="stdout", help="Only its stdout, byte for byte.")
@click.option("--stderr", "only", flag_value="stderr", help="Only its stderr, byte for byte.")
@click.argument("name")
def logs_command(
    mount: str | None,
    follow: bool,
    tail: int | None,
    since: str | None,
    timestamps: bool,
    only: str | None,
    name: str,
) -> None:
    """What a container printed: its stdout on stdout, its stderr on stderr, in order of arrival."""
    where = Mount.find(mount)
    where.container(name)
    if only and (timestamps or since):
        raise click.UsageError(f"{'--timestamps' if timestamps else '--since'} needs both streams")
    path = where.path("containers", name, "logs", only or "all.jsonl")
    offset = tail_offset(path, tail) if tail is not None and path.exists() else 0
    follower = Follower(path, offset)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    output: Any = sys.stdout.buffer if only else _Decoded(timestamps, _moment(since) if since else None)
    if follow:
        for _ in _until_ended(where, name, [follower], [output]):
            pass
        return
    for chunk in follower.read():
        output.write(chunk)
    output.flush()

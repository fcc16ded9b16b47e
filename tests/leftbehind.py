"""What outlives its tests: processes, mounts and namespaces, and how they are known for this session's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from engine import host, hostmounts
from engine.connections import state_directory
from engine.runtimes import netns

MARK = ("DUTCHMAN_TEST_SESSION", f"{os.getpid()}-{time.time_ns()}")  # in the environment of all that is started


def processes_at(place: str) -> list[str]:
    """Those whose command line names a path below `place`; this one is none."""
    found = []
    for entry in Path("/proc").iterdir() if host.LINUX else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has just ended
                continue
            if place in command:
                found.append(f"process {entry.name}: {command[:300]}")
    return found


def processes_of_session() -> list[str]:
    """Those whose environment has this session's mark; not this one, whose environment was another when it began."""
    wanted, found = "=".join(MARK).encode(), []
    for entry in Path("/proc").iterdir() if host.LINUX else ():
        if entry.name.isdigit():
            try:
                if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has just ended
                continue
            found.append(f"process {entry.name}: {command[:300]}")
    return found


def stores_below(place: Path, depth: int = 4) -> Iterator[Path]:
    for entry in place.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if (entry / "db.sqlite").exists():
                yield entry
            elif depth:
                yield from stores_below(entry, depth - 1)


def mounts_below(place: Path) -> list[tuple[str, str]]:
    """(mount point, kind), the highest first."""
    found = (
        [(point, kind) for point, kind, _ in hostmounts.mounts() if point.startswith(f"{place}/")] if host.LINUX else []
    )
    return sorted(found, key=lambda item: len(item[0]))


def left_behind(base: Path) -> list[str]:
    """What outlives its tests: mounts and processes of pytest's directory, namespaces of its stores' networks.

    Mounts are taken down, or they would outlive the session. Processes get a moment: they end as their parent has.
    """
    left = [f"{kind} mount {point}" for point, kind in mounts_below(base)]
    while points := mounts_below(base):
        hostmounts.unmount(Path(points[0][0]))  # what is mounted below goes with it
    deadline = time.monotonic() + 10
    while (running := sorted({*processes_at(f"{base}/"), *processes_of_session()})) and time.monotonic() < deadline:
        time.sleep(0.1)
    for store in stores_below(base):
        place = state_directory(store)
        netns.leave(place / "netns")  # empty: of a daemon that was killed
        if place.exists():
            left.append(f"directory {place} of {store}")
    return left + running

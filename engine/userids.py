"""Who runs the engine, and what its ids mean to the rest of the host. Floor 0, no state.

Only here: an engine without root lives in a user namespace of its user (engine/runtimes/rootless.py makes it), where
the user is uid 0 and ids from 1 on are the subordinate ids of /etc/subuid and /etc/subgid, if there are any. What it
shows through the mount is seen by processes outside, so ids are shown as they are there. Everywhere else nothing is
translated.

Source: user_namespaces(7), "User and group ID mappings".
"""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path

VARIABLE = "DUTCHMAN_ROOTLESS"  # uid:gid outside; set for the daemon by who puts it into the namespace
NOBODY = 65534  # what the kernel shows for an id without a place in the namespace
Range = tuple[int, int, int]  # first id inside, first id outside, how many


@functools.cache
def rootless() -> tuple[int, int] | None:
    """(uid, gid) outside of the user in whose own namespace this process is uid 0; None everywhere else."""
    uid, _, gid = os.environ.get(VARIABLE, "").partition(":")
    if not (uid.isdigit() and gid.isdigit()) or os.geteuid() != 0:
        return None
    return None if _ranges("uid")[:1] == ((0, 0, (1 << 32) - 1),) else (int(uid), int(gid))


def alone() -> bool:
    """Whether the user's namespace has their own id and no other: they have no subordinate ids."""
    return rootless() is not None and sum(count for _, _, count in _ranges("uid")) == 1


def owner() -> tuple[int, int]:
    """(uid, gid) of the engine's user, as the host sees them: what the files of the mount belong to."""
    return rootless() or (os.getuid(), os.getgid())


@functools.cache
def _ranges(kind: str) -> tuple[Range, ...]:
    rows = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
    return tuple((int(row[0]), int(row[1]), int(row[2])) for row in rows)


def outward(inside: int, ranges: tuple[Range, ...]) -> int:
    """The host's id of an id in the namespace; NOBODY when it has none."""
    for first, base, count in ranges:
        if first <= inside < first + count:
            return base + inside - first
    return NOBODY


def inward(outside: int, ranges: tuple[Range, ...]) -> int:
    """The id in the namespace of one of the host's; EPERM when it has no place there. -1 stays -1."""
    if outside == -1:
        return -1
    for first, base, count in ranges:
        if base <= outside < base + count:
            return first + outside - base
    raise PermissionError(errno.EPERM, f"id {outside} is not one of yours (see /etc/subuid and /etc/subgid)")


def shown(uid: int, gid: int) -> tuple[int, int]:
    """The owner of a file as processes outside see it."""
    if rootless() is None:
        return uid, gid
    return outward(uid, _ranges("uid")), outward(gid, _ranges("gid"))


def given(uid: int, gid: int) -> tuple[int, int]:
    """An owner named by a process outside, as this process must name it. EPERM for ids of others; -1: unchanged."""
    if rootless() is None:
        return uid, gid
    return inward(uid, _ranges("uid")), inward(gid, _ranges("gid"))

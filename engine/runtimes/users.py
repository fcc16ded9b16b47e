"""Who a container's process runs as: `user[:group]` looked up in the root filesystem's own passwd and group.

Floor 2. The rules are Docker's (runc libcontainer/user, GetExecUser). The root filesystem is hostile: its files are
opened below its root only (openat2 RESOLVE_IN_ROOT), must be regular, and are read up to a bound. No state.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import host
from engine.errors import InvalidArgument

MAX_FILE = 4 << 20  # bytes of /etc/passwd or /etc/group that are read
MAX_ID = (1 << 31) - 1
MAX_GROUPS = 1024


@dataclass(frozen=True, slots=True)
class Identity:
    uid: int
    gid: int
    groups: tuple[int, ...]  # supplementary, the primary one first (as Docker since 20.10.18)
    home: str


def read_in_root(rootfs: Path, path: str, limit: int = MAX_FILE) -> bytes:
    """Up to `limit` bytes of a regular file below `rootfs`; empty when there is none."""
    with host.directory_fd(rootfs) as root:
        try:
            fd = host.open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return b""  # absent, a loop, no directory: for a container all of these mean "no such file"
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return b""
            return file.read(limit)


def _rows(data: bytes, fields: int) -> Iterator[list[str]]:
    for line in data.split(b"\n"):
        if not line or line.startswith(b"#"):
            continue
        row = line.decode(errors="surrogateescape").split(":")
        yield row + [""] * (fields - len(row))


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None


def _checked(number: int, what: str, text: str) -> int:
    if number > MAX_ID:
        raise InvalidArgument(f"user: {what} {number} is above {MAX_ID}", at=text)
    return number


def identify(rootfs: Path, text: str) -> Identity:
    """The identity of `text` ("", user, user:group, :group; names or numbers). InvalidArgument for unknown names."""
    user, _, group = text.strip().partition(":")
    user = user or "0"
    passwd = read_in_root(rootfs, "/etc/passwd")
    uid, gid, home, name = _number(user), 0, "/", ""
    for row in _rows(passwd, 7):
        row_uid, row_gid = _number(row[2]), _number(row[3])
        if row_uid is None or row_gid is None:
            continue
        if row[0] == user or row_uid == uid:
            uid, gid, home, name = row_uid, row_gid, row[5] or "/", row[0]
            break
    else:
        if uid is None:
            raise InvalidArgument(f"user: no user {user!r} in the image's /etc/passwd", at=user[:80])
    assert uid is not None
    _checked(uid, "uid", user)
    _checked(gid, "gid", user)
    if group and (number := _number(group)) is not None:
        gid = _checked(number, "gid", group)
        groups = [gid]
        for row in _rows(read_in_root(rootfs, "/etc/group"), 4):
            if row[0] == group and (named := _number(row[2])) is not None:  # a group whose name is digits
                gid, groups = _checked(named, "gid", group), [named]
                break
    elif group:
        for row in _rows(read_in_root(rootfs, "/etc/group"), 4):
            if row[0] == group and (named := _number(row[2])) is not None:
                gid = _checked(named, "gid", group)
                break
        else:
            raise InvalidArgument(f"user: no group {group!r} in the image's /etc/group", at=group[:80])
        groups = [gid]
    else:
        groups = [gid]
        for row in _rows(read_in_root(rootfs, "/etc/group"), 4):
            member = _number(row[2])
            if name and member is not None and member <= MAX_ID and name in row[3].split(",") and member not in groups:
                groups.append(member)
                if len(groups) >= MAX_GROUPS:
                    break
    if "\0" in home or not home.startswith("/"):
        home = "/"
    return Identity(uid, gid, tuple(groups), home)


def user_names(rootfs: Path) -> dict[int, str]:
    """The names of uids in the root filesystem; the first of several wins. Empty when it is not there."""
    try:
        passwd = read_in_root(rootfs, "/etc/passwd")
    except OSError:
        return {}
    out: dict[int, str] = {}
    for row in _rows(passwd, 7):
        uid = _number(row[2])
        if uid is not None and row[0].isprintable() and " " not in row[0]:
            out.setdefault(uid, row[0])
    return out


def extra_groups(rootfs: Path, names: Sequence[str]) -> list[int]:
    """The gids of `group_add`: numbers, or names in the root filesystem's /etc/group. InvalidArgument if unknown."""
    out: list[int] = []
    rows = list(_rows(read_in_root(rootfs, "/etc/group"), 4)) if names else []
    for name in names:
        gid = next((_number(row[2]) for row in rows if row[0] == name), None)
        gid = _number(name) if gid is None else gid
        if gid is None or gid > MAX_ID:
            raise InvalidArgument(f"group_add: no group {name!r} in the image's /etc/group", at=name[:80])
        if gid not in out:
            out.append(gid)
    return out


def with_extra_groups(rootfs: Path, who: Identity, names: Sequence[str]) -> list[int]:
    """All supplementary groups of a process of `who`: its own, then those of `group_add`. As `extra_groups`."""
    return list(who.groups) + [gid for gid in extra_groups(rootfs, names) if gid not in who.groups]


def make_directory(rootfs: Path, path: str, mode: int = 0o755) -> None:
    """mkdir -p of `path` inside `rootfs`, following symlinks only within it. What cannot be is left to the runtime."""
    with host.directory_fd(rootfs) as root:
        here = os.dup(root)
        try:
            walked = ""
            for part in path.split("/"):
                if part in ("", "."):
                    continue
                walked += "/" + part
                try:
                    below = host.open_in_root(root, walked, os.O_RDONLY | os.O_DIRECTORY)
                except FileNotFoundError:
                    try:
                        os.mkdir(part, mode, dir_fd=here)
                        below = host.open_in_root(root, walked, os.O_RDONLY | os.O_DIRECTORY)
                    except OSError:
                        return  # a dangling link, or `..` out of it: the runtime names the fault when it enters it
                except OSError:
                    return
                os.close(here)
                here = below
        finally:
            os.close(here)

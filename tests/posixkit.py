"""What the POSIX cases share: users, files of every kind, and what can be seen of a directory."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OLD = 1_000_000_000  # seconds: what times are set to before an operation
ALICE, BOB, STAFF = 61001, 61002, 61009  # no such users: numbers are enough
USERS: dict[str, tuple[int, int, list[int]]] = {
    "root": (0, 0, []),
    "alice": (ALICE, ALICE, [STAFF]),
    "bob": (BOB, BOB, [STAFF]),
}
libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def user(name: str) -> Iterator[None]:
    uid, gid, groups = USERS[name]
    os.setgroups(groups)
    os.setresgid(gid, gid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups([])


def answer(call: Callable[[], Any]) -> Any:
    """What a call returns, or the name of its errno."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def facts(top: str = ".") -> dict[str, Any]:
    """Everything below `top` that a program can see of it, without what differs between any two directories."""
    found: dict[str, Any] = {}
    numbers: dict[int, str] = {}
    for directory, names, files in os.walk(top):
        for name in sorted(names + files):
            path = os.path.join(directory, name)
            st = os.lstat(path)
            row: list[Any] = [oct(st.st_mode), st.st_nlink, st.st_uid, st.st_gid, st.st_rdev]
            if not stat.S_ISDIR(st.st_mode):
                row += [st.st_size, numbers.setdefault(st.st_ino, name)]
            row.append("old" if st.st_mtime_ns == OLD * 10**9 else "new")
            if stat.S_ISLNK(st.st_mode):
                row.append(os.readlink(path))
            else:
                row += sorted(os.listxattr(path))
            found[path] = row
    return found


def make(kind: str, name: str, owner: int) -> None:
    if kind == "file":
        with open(name, "w") as file:
            file.write("content")
        os.chmod(name, 0o644)
    elif kind == "suid":
        with open(name, "w") as file:
            file.write("content")
        os.chmod(name, 0o6777)
    elif kind == "secret":
        with open(name, "w") as file:
            file.write("content")
        os.chmod(name, 0o000)
    elif kind in ("dir", "full"):
        os.mkdir(name, 0o755)
        if kind == "full":
            os.mkdir(f"{name}/in")
    elif kind == "link":
        os.symlink("target", name)
    elif kind == "dangling":
        os.symlink("nowhere", name)
    elif kind == "loop":
        os.symlink(name, name)
    elif kind == "fifo":
        os.mkfifo(name, 0o644)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(name)
    elif kind == "device":
        os.mknod(name, stat.S_IFCHR | 0o644, os.makedev(1, 3))
    if kind != "none":
        if kind == "suid":
            os.chown(name, owner, owner)
            os.chmod(name, 0o6777)
        else:
            os.lchown(name, owner, owner)
        os.utime(name, (OLD, OLD), follow_symlinks=False)


def opened(flags: int, mode: int = 0o666, then: Callable[[int], Any] | None = None, name: str = "f") -> Any:
    fd = os.open(name, flags | os.O_NONBLOCK, mode)
    try:
        return then(fd) if then else "opened"
    finally:
        os.close(fd)

"""What a directory answers to POSIX calls, as JSON: run on a view and on a plain directory, the answers must be equal.

    python tests/posixcases.py DIRECTORY MATRIX EVERY

Prints {case: answer}. MATRIX is "single" (an operation on a file of each type, by several users in several kinds of
directory), "pairs" (rename and link from each type to each type) or "scenes" (of posixscenes.py). EVERY n takes each
n-th case. Run as root: users are taken on by setresuid, in this process.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

import posixscenes
from posixkit import ALICE, BOB, OLD, STAFF, answer, facts, make, opened, user

KINDS = ["none", "file", "suid", "secret", "dir", "full", "link", "dangling", "loop", "fifo", "socket", "device"]


LONG = "n" * 255
OPERATIONS: dict[str, Callable[[], Any]] = {
    "open r": lambda: opened(os.O_RDONLY),
    "open w": lambda: opened(os.O_WRONLY),
    "open rw": lambda: opened(os.O_RDWR),
    "open path": lambda: opened(os.O_PATH | os.O_NOFOLLOW),
    "open nofollow": lambda: opened(os.O_RDONLY | os.O_NOFOLLOW),
    "open dir": lambda: opened(os.O_RDONLY | os.O_DIRECTORY),
    "open creat": lambda: opened(os.O_WRONLY | os.O_CREAT, 0o6751),
    "open creat excl": lambda: opened(os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666),
    "open creat 0": lambda: opened(os.O_RDWR | os.O_CREAT, 0, lambda fd: os.write(fd, b"x")),
    "open creat ro": lambda: opened(os.O_RDONLY | os.O_CREAT, 0o200),
    "open trunc": lambda: opened(os.O_WRONLY | os.O_TRUNC),
    "write": lambda: opened(os.O_WRONLY, then=lambda fd: os.write(fd, b"ab")),
    "append": lambda: opened(os.O_WRONLY | os.O_APPEND, then=lambda fd: os.write(fd, b"ab")),
    "read": lambda: opened(os.O_RDONLY, then=lambda fd: os.read(fd, 100).hex()),
    "fchmod": lambda: opened(os.O_RDONLY, then=lambda fd: os.fchmod(fd, 0o4711)),
    "fchown": lambda: opened(os.O_RDONLY, then=lambda fd: os.fchown(fd, -1, STAFF)),
    "ftruncate": lambda: opened(os.O_RDWR, then=lambda fd: os.ftruncate(fd, 5000)),
    "fsync": lambda: opened(os.O_RDONLY, then=os.fsync),
    "fstat": lambda: opened(os.O_RDONLY, then=lambda fd: oct(os.fstat(fd).st_mode)),
    "mkdir": lambda: os.mkdir("f", 0o7777),
    "mkdir slash": lambda: os.mkdir("f/", 0o751),
    "rmdir": lambda: os.rmdir("f"),
    "unlink": lambda: os.unlink("f"),
    "unlink slash": lambda: os.unlink("f/"),
    "mkfifo": lambda: os.mkfifo("f", 0o666),
    "mknod file": lambda: os.mknod("f", stat.S_IFREG | 0o4666),
    "mknod device": lambda: os.mknod("f", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "symlink": lambda: os.symlink("x" * 1000, "f"),
    "readlink": lambda: os.readlink("f"),
    "link": lambda: os.link("f", "new", follow_symlinks=False),
    "rename": lambda: os.rename("f", "new"),
    "rename long": lambda: os.rename("f", LONG),
    "rename too long": lambda: os.rename("f", LONG + "n"),
    "rename into itself": lambda: os.rename("f", "f/in/deeper"),
    "chmod 0": lambda: os.chmod("f", 0),
    "chmod all": lambda: os.chmod("f", 0o7777),
    "chown to bob": lambda: os.chown("f", BOB, BOB),
    "chown to staff": lambda: os.chown("f", -1, STAFF),
    "lchown": lambda: os.lchown("f", -1, STAFF),
    "chown nothing": lambda: os.chown("f", -1, -1),
    "truncate 0": lambda: os.truncate("f", 0),
    "truncate 100": lambda: os.truncate("f", 100),
    "truncate negative": lambda: os.truncate("f", -1),
    "utime now": lambda: os.utime("f"),
    "utime": lambda: os.utime("f", ns=(OLD * 10**9 + 1, OLD * 10**9 + 123456789)),
    "lutime": lambda: os.utime("f", ns=(5, 999999999), follow_symlinks=False),
    "access r": lambda: os.access("f", os.R_OK),
    "access w": lambda: os.access("f", os.W_OK),
    "access x": lambda: os.access("f", os.X_OK),
    "listdir": lambda: sorted(os.listdir("f")),
    "into": lambda: os.mkdir("f/sub"),
    "below": lambda: os.stat("f/none"),
    "setxattr": lambda: os.setxattr("f", "user.a", b"1"),
    "setxattr trusted": lambda: os.setxattr("f", "trusted.a", b"1", follow_symlinks=False),
    "getxattr": lambda: os.getxattr("f", "user.none").hex(),
    "removexattr": lambda: os.removexattr("f", "user.none"),
    "statvfs": lambda: os.statvfs("f").f_namemax,
}
# who acts, on a file of whom, in a directory of this mode that belongs to root with group STAFF
PLACES = [
    ("root", ALICE, 0o755),
    ("alice", ALICE, 0o777),
    ("bob", ALICE, 0o777),
    ("bob", ALICE, 0o1777),
    ("alice", ALICE, 0o755),
    ("alice", ALICE, 0o2775),
    ("bob", BOB, 0o1770),
    ("bob", ALICE, 0o700),
]


def single(place: tuple[str, int, int], kind: str, operation: str) -> Any:
    who, owner, mode = place
    with open("target", "w") as file:
        file.write("pointed at")
    make(kind, "f", owner)
    os.chown(".", 0, STAFF)
    os.chmod(".", mode)
    with user(who):
        said = answer(OPERATIONS[operation])
    return [said, facts()]


# --- two names ----------------------------------------------------------------------------------------------------

PAIRS: dict[str, Callable[[], Any]] = {
    "rename": lambda: os.rename("f", "g"),
    "link": lambda: os.link("f", "g", follow_symlinks=False),
    "link follow": lambda: os.link("f", "g", follow_symlinks=True),
    "rename into": lambda: os.rename("f", "g/f"),
}


def pair(operation: str, kind: str, onto: str, who: str) -> Any:
    with open("target", "w") as file:
        file.write("pointed at")
    make(kind, "f", ALICE)
    make(onto, "g", ALICE if who == "alice" else BOB)
    os.chmod(".", 0o1777)
    with user(who):
        said = answer(PAIRS[operation])
    return [said, facts()]


# --- running ------------------------------------------------------------------------------------------------------


def cases(matrix: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    if matrix == "single":
        for place, kind, operation in itertools.product(PLACES, KINDS, OPERATIONS):
            name = f"{place[0]} in {place[2]:o} of {place[1]}: {operation} on {kind}"
            yield name, lambda p=place, k=kind, o=operation: single(p, k, o)  # type: ignore[misc]
    elif matrix == "pairs":
        for operation, kind, onto, who in itertools.product(PAIRS, KINDS, KINDS, ("root", "alice", "bob")):
            name = f"{who}: {operation} {kind} to {onto}"
            yield name, lambda o=operation, k=kind, n=onto, w=who: pair(o, k, n, w)  # type: ignore[misc]
    else:
        for name, call in list(vars(posixscenes).items()):
            if name.startswith("scene_"):
                yield name.removeprefix("scene_"), call


def main() -> None:
    top, matrix, every = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.chdir(top)
    os.umask(0o022)
    base = os.open(".", os.O_RDONLY)
    said = {}
    for number, (name, call) in enumerate(cases(matrix)):
        if (number * 7) % every:  # 7: so that a sample does not take the same column of every row
            continue
        place = f"{matrix}{number}"
        os.mkdir(place, mode=0o755)
        os.chdir(place)
        try:
            said[name] = answer(call)
        except Exception as error:  # a broken case is an answer too: it must be equal, and it shows
            said[name] = f"{type(error).__name__}: {error}"
        finally:
            os.fchdir(base)
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()

"""Trees of many small files, and all there is to know of a tree, for tests and benchmarks of copying."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

FOLDERS = 100
Fact = tuple[int, int, int, int, bytes]  # mode, uid, gid, mtime in ns, content


def make(place: Path, count: int) -> None:
    """`count` files of 1 to 4 KiB in FOLDERS directories; modes and times differ, every twentieth is a symlink."""
    chance = random.Random(count)
    for number in range(min(FOLDERS, count)):
        (place / f"d{number}").mkdir(parents=True)
    for number in range(count):
        path = place / f"d{number % FOLDERS}" / f"f{number}"
        if number % 20 == 19:
            path.symlink_to(f"../d{number % 7}/f{number % 7}")
        else:
            path.write_bytes(chance.randbytes(chance.randrange(1 << 10, 4 << 10)))
            path.chmod(chance.choice((0o600, 0o640, 0o644, 0o755, 0o4711, 0o444)))
        os.utime(path, ns=(10**18, 10**18 + chance.randrange(10**15)), follow_symlinks=False)
    for number, path in enumerate([*place.iterdir(), place]):
        path.chmod((0o755, 0o700, 0o2750)[number % 3])
        os.utime(path, ns=(10**18, 10**18 + number))


def facts(place: Path) -> dict[str, Fact]:
    """By path: what `cp -a` keeps."""
    out: dict[str, Fact] = {}
    waiting = [place]
    while waiting:
        path = waiting.pop()
        st = os.lstat(path)
        content = b""
        if stat.S_ISDIR(st.st_mode):
            waiting += path.iterdir()
        elif stat.S_ISLNK(st.st_mode):
            content = os.fsencode(os.readlink(path))
        else:
            content = path.read_bytes()
        out[str(path.relative_to(place))] = st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns, content
    return out

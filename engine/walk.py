"""Walking a directory that someone else may be writing to: never out of it, never without bound. Floor 1.

Only here: the one loop over such trees (volumes, container uppers). Each directory is opened beneath the root without
following any symlink, so a container that swaps a directory for a link meanwhile gains nothing. Stateless, thread-safe.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from engine import host
from engine.errors import TooLarge

MAX_ENTRIES = 5_000_000
FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
RESOLVE = host.RESOLVE_BENEATH | host.RESOLVE_NO_SYMLINKS | host.RESOLVE_NO_XDEV


GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)  # not there any more, or another file system


def walk(
    root: Path | int, limit: int = MAX_ENTRIES, *, whole: bool = False
) -> Iterator[tuple[bytes, int, list[tuple[bytes, os.stat_result]]]]:
    """(path relative to `root`, b'' first, an open fd of it, its entries sorted by name), parents before children.

    The fd is valid until the next step. Directories that vanish meanwhile, that cannot be opened, or whose path is
    beyond PATH_MAX are left out. TooLarge beyond `limit` entries. `root` may be an open directory. `whole` is for
    copies: only what vanishes, and other file systems, are left out; TooLarge beyond PATH_MAX, else OSError.
    """
    count = 0
    with ExitStack() as stack:
        top = os.dup(root) if isinstance(root, int) else os.open(root, FLAGS)
        stack.callback(os.close, top)
        pending = [b""]
        while pending:
            path = pending.pop()
            try:
                here = host.open_in_root(top, path, FLAGS, resolve=RESOLVE)
            except OSError as error:
                if not whole or error.errno in GONE:
                    continue
                if error.errno == errno.ENAMETOOLONG:
                    raise TooLarge(f"a path is too long to be copied: {os.fsdecode(path[:80])}…") from error
                raise
            try:
                entries = []
                for name in sorted(os.listdir(here)):
                    count += 1
                    if count > limit:
                        raise TooLarge(f"more than {limit} entries below {root}")
                    raw = os.fsencode(name)
                    try:
                        entries.append((raw, os.stat(raw, dir_fd=here, follow_symlinks=False)))
                    except FileNotFoundError:
                        continue
                yield path, here, entries
            finally:
                os.close(here)
            below = [name for name, info in entries if stat.S_ISDIR(info.st_mode)]
            pending += [path + b"/" + name if path else name for name in reversed(below)]


def usage(root: Path, limit: int = MAX_ENTRIES) -> int:
    """Bytes of the regular files below `root`, each hard-linked file once."""
    total = 0
    seen: set[tuple[int, int]] = set()
    for _, _, entries in walk(root, limit):
        for _, info in entries:
            if not stat.S_ISREG(info.st_mode):
                continue
            if info.st_nlink > 1:
                key = (info.st_dev, info.st_ino)
                if key in seen:
                    continue
                seen.add(key)
            total += info.st_size
    return total

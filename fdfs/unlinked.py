"""Files of host directories that lost their name while they were open. Floor 5.

libfuse 2 knows open files by their path: when one is removed, or another is renamed over it, it renames the old one to
`.fuse_hidden…` beside it and goes on with that name until the last close. On the host the name is taken away at once,
as it would be without us, and the file is kept by a descriptor under the name libfuse made up: nothing lies about, a
directory can be removed, the link count is right, and a killed daemon leaves nothing behind.

Names are unique in a mount (libfuse counts them), and a process has one mount. Thread-safe.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from engine import host

_NAME = re.compile(rb"(?:.*/)?(\.fuse_hidden[0-9a-f]{16})", re.DOTALL)  # hide_node() in libfuse's fuse.c

Identity = tuple[int, int]  # st_dev, st_ino

_lock = threading.Lock()
_open: Counter[Identity] = Counter()
_kept: dict[bytes, tuple[int, Identity]] = {}  # name -> O_PATH descriptor, what it is of


def name_in(path: bytes) -> bytes | None:
    """The made-up name a path ends in."""
    found = _NAME.fullmatch(path)
    return found[1] if found else None


def opened(fd: int) -> Identity:
    """Count an open file; `closed` with what this returns takes it back."""
    st = os.fstat(fd)
    identity = st.st_dev, st.st_ino
    with _lock:
        _open[identity] += 1
    return identity


def closed(identity: Identity) -> None:
    """One open file less. With the last goes what was kept for it, whether or not libfuse still removes the name."""
    with _lock:
        _open[identity] -= 1
        if _open[identity] > 0:
            return
        del _open[identity]
        for name in [name for name, (_, kept) in _kept.items() if kept == identity]:
            os.close(_kept.pop(name)[0])


def keep(name: bytes, fd: int) -> bool:
    """Take over the O_PATH descriptor of a file whose name goes; False, and nothing, when it is not open."""
    if not host.LINUX:  # it cannot be opened by its descriptor there: it keeps the name libfuse made up
        return False
    st = os.fstat(fd)
    identity = st.st_dev, st.st_ino
    with _lock:
        if not _open[identity]:
            del _open[identity]
            return False
        _kept[name] = os.dup(fd), identity
        return True


def drop(name: bytes) -> bool:
    """Whether something was kept under this name; it no longer is."""
    with _lock:
        found = _kept.pop(name, None)
        if found is not None:
            os.close(found[0])
        return found is not None


@contextmanager
def held(path: bytes) -> Iterator[int | None]:
    """An O_PATH descriptor of what a made-up name stands for; None for every other path."""
    name = name_in(path)
    fd = None
    if name is not None:
        with _lock:
            if name in _kept:
                fd = os.dup(_kept[name][0])
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)

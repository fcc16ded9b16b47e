"""Files of this host: small ones that a config names, read whole and with care; fallocate; shared locks; the addresses
of sockets. Floor 0."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from engine import host
from engine.errors import AccessDenied, Busy, InvalidArgument, NotFound, TooLarge, Unsupported

MAX_ADDRESS = 104  # bytes of sockaddr_un.sun_path on macOS, its NUL included
SHORT = Path("/tmp")  # not $TMPDIR, which is long on macOS


def read(text: str, field: str, limit: int) -> bytes:
    """The bytes of a regular file at an absolute path (`~/` is expanded). Never blocks on what is none.

    NotFound, InvalidArgument or TooLarge (more than `limit` bytes) begins with `field` and names the path.
    """
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise InvalidArgument(f"{field}: {text}: an absolute path expected", at=text)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{field}: {path} does not exist", at=text) from error
    except OSError as error:
        raise InvalidArgument(f"{field}: {path}: {error.strerror}", at=text) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgument(f"{field}: {path}: not a regular file", at=text)
        data = b""
        while len(data) <= limit and (piece := os.read(fd, limit + 1 - len(data))):
            data += piece
    finally:
        os.close(fd)
    if len(data) > limit:
        raise TooLarge(f"{field}: {path}: larger than {limit} bytes", at=text)
    return data


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its `mode`; bytes. Unsupported elsewhere than on Linux."""
    if not host.LINUX:
        raise Unsupported("fallocate needs Linux")
    host.call("fallocate", fd, mode, offset, length)


def lock_file(path: Path, holder: str) -> IO[str]:
    """Take the exclusive lock at `path` and write `holder` (one line) into it; it is held while the file is open.

    Raises Busy with what the present holder wrote. The lock goes with its process, so a killed holder never blocks.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    handle = os.fdopen(fd, "r+")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        text = handle.read(4096).strip()
        handle.close()
        raise Busy(
            f"the store {path.parent} is held by another daemon: {text or 'starting'}",
            hint="use it through its mount, or run `dutchman down` first",
        ) from error
    handle.seek(0)
    handle.truncate()
    handle.write(holder + "\n")
    handle.flush()
    return handle


def share(fd: int, seconds: float) -> None:
    """Take a shared flock(2) on `fd`, waiting up to `seconds` for who has it alone. Busy."""
    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise Busy("the host has the file system mounted") from None
        time.sleep(0.005)


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """What bind(2) and connect(2) take for the socket `path`, good within the block: an address holds 108 bytes (104 on
    macOS), a path may be longer. FileNotFoundError without its directory.

    Linux reaches the directory by a descriptor; elsewhere a short link in the runtime directory leads there
    and stays, in /tmp where that directory's own path is too long. AccessDenied when that is somebody else's.
    """
    if host.LINUX:
        with host.directory_fd(path.parent) as place:
            yield f"/proc/self/fd/{place}/{path.name}"
        return
    if len(os.fsencode(path)) < MAX_ADDRESS:
        yield str(path)
        return
    import hashlib  # takes a while, and few need it

    name = hashlib.sha256(os.fsencode(path.parent)).hexdigest()[:12]
    links = host.runtime_dir() / "s"
    if len(os.fsencode(links / name / path.name)) >= MAX_ADDRESS:
        links = SHORT / f"dutchman-{os.geteuid()}-s"
    links.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = os.lstat(links)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        hint = "somebody made it first: remove it, or have a shorter XDG_RUNTIME_DIR"
        raise AccessDenied(f"{links}, where sockets of long paths are reached, is not yours alone", hint=hint)
    link = links / name
    with suppress(FileExistsError):  # made for the same directory
        link.symlink_to(path.parent)
    yield str(link / path.name)

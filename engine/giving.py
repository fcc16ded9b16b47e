"""What a bind mount's source is changed to for a container: owners (`U`), SELinux contexts (`z`, `Z`). Floor 3.

Only here: which of the host's directories are never changed, and the walk over the others. Links are not followed, and
no other file system is entered. Stateless, thread-safe.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from engine.errors import InvalidArgument, TooLarge, Unsupported
from engine.runtimes.users import identify
from engine.walk import FLAGS, walk

MAX_CHANGED = 1_000_000  # entries of one source
# of the host's own: podman refuses the same (`U`: pkg/chown; `z`, `Z`: go-selinux Relabel)
_SYSTEM = """/ /bin /boot /dev /etc /home /lib /lib64 /media /mnt /opt /proc /root /run /sbin /srv /sys /tmp /usr
    /usr/bin /usr/lib /usr/local /usr/sbin /usr/share /var /var/cache /var/lib /var/log /var/run /var/tmp
    /etc/passwd /etc/pki /etc/shadow /etc/ssh /etc/selinux"""
NOT_OURS = frozenset(_SYSTEM.split())
SELINUX = "security.selinux"


def _each(source: Path, change: Callable[[bytes, int], None]) -> None:
    """`change(name, directory)` for `source` and everything below it on its file system; links are not followed."""
    parent = os.open(source.resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = os.fsencode(source.resolve().name)
        info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            top = os.open(name, FLAGS, dir_fd=parent)
            try:
                for _, fd, entries in walk(top, MAX_CHANGED):
                    for below, _ in entries:
                        try:
                            change(below, fd)
                        except FileNotFoundError:
                            continue
            finally:
                os.close(top)
        change(name, parent)
    finally:
        os.close(parent)


def check_ours(option: str, path: str) -> None:
    """InvalidArgument for a directory of the system or, of labels, a user's whole home: services would lose it."""
    home = option != "U" and (path == str(Path.home()) or os.path.dirname(path) == "/home")
    if path in NOT_OURS or home:
        whose = "is a whole home" if home else "belongs to the system"
        raise InvalidArgument(
            f"volumes: {option}: {path} {whose} and stays its own",
            at=path,
            hint="mount a directory of your own below it",
        )


def give(source: Path, rootfs: Path, user: str) -> None:
    """`U`: make the container's user the owner of all of `source`. InvalidArgument for a directory of the system."""
    check_ours("U", str(source.resolve()))
    who = identify(rootfs, user)

    def change(name: bytes, fd: int) -> None:
        info = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if (info.st_uid, info.st_gid) != (who.uid, who.gid):
            os.chown(name, who.uid, who.gid, dir_fd=fd, follow_symlinks=False)

    try:
        _each(source, change)
    except TooLarge as error:
        raise TooLarge(f"volumes: U: {error.reason}", at=str(source), hint="chown -R it yourself") from error
    except OSError as error:
        raise Unsupported(f"volumes: U: {source}: {error.strerror}", at=str(source)) from error


def context_of(path: bytes | Path) -> str:
    return os.getxattr(path, SELINUX, follow_symlinks=False).rstrip(b"\0").decode(errors="replace")


def shares(data: Path, context: str) -> bool:
    """Whether a volume's directory has the type of `context`, as what is made in it gets by itself."""
    try:
        return context_of(data).split(":")[2:3] == context.split(":")[2:3]
    except OSError:
        return True  # its file system keeps none


def relabel(source: Path, context: str) -> bool:
    """Give all of `source` this SELinux context. False: its file system keeps none."""
    wanted = context.encode() + b"\0"

    def change(name: bytes, fd: int) -> None:
        place = b"/proc/self/fd/%d/" % fd + name
        if context_of(place) != context:  # its times stay when nothing is to be done
            os.setxattr(place, SELINUX, wanted, follow_symlinks=False)

    try:
        _each(source, change)
    except TooLarge as error:
        raise TooLarge(f"volumes: z: {error.reason}", at=str(source), hint="chcon -R it yourself") from error
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EROFS):  # as podman does: what it is mounted with counts
            return False
        raise Unsupported(f"volumes: z: {source}: {error.strerror}", at=str(source)) from error
    return True

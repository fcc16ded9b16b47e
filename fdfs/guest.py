"""The root of a running virtual machine's container shown through the mount: live, writable, every wait bounded.

Floor 5. Only here: POSIX operations by FUSE names as verbs of the guest's agent (engine/runtimes/vm/guestfiles.py); as
loopback.py for directories of the host. The agent resolves every path below its root in the guest, so nothing of the
guest is resolved here. New files belong to the caller; permission checks are the kernel's above us.

A removed file that is open: libfuse renames it to `.fuse_hidden…` (unlinked.py). In the guest its name is taken away at
once; the open handle of the agent keeps the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Mapping
from typing import Any

from engine import userids
from engine.errors import ReadOnly
from engine.runtimes.vm.guestfiles import GuestFiles
from engine.runtimes.vm.openfile import GuestFile
from engine.runtimes.vm.protocol import Attr as Found
from engine.runtimes.vm.protocol import ProtocolError, parse_attr
from fdfs import unlinked
from fdfs.entry import Attr
from fdfs.loopback import UTIME_NOW, UTIME_OMIT, Caller

OVERLAY = b"trusted.overlay."
WHOLE = 0o7777
INODES = (1 << 39) - 1
SPREAD = 0x9E3779B97F4A7C15  # of devices: /proc, /sys and every tmpfs of a guest begin with inode 1 (Knuth, 6.4)

_lock = threading.Lock()
_kept: dict[bytes, tuple[GuestFiles, tuple[int, int]]] = {}  # name libfuse made up -> the file, by its identity


def to_attr(found: Found, mix: int) -> Attr:
    uid, gid = userids.shown(found.uid, found.gid)
    return Attr(
        mode=found.mode,
        size=found.size,
        ino=mix + ((found.ino ^ found.dev * SPREAD) & INODES),
        nlink=found.nlink,
        uid=uid,
        gid=gid,
        mtime_ns=found.mtime_ns,
        ctime_ns=found.ctime_ns,
        atime_ns=found.atime_ns,
        rdev=os.makedev(found.rdev_major, found.rdev_minor),
        blocks=found.blocks,
    )


class OpenFile:
    """A handle of the mount on an open file of the guest."""

    direct = False
    keep = False

    def __init__(self, file: GuestFile, mix: int, *, append: bool = False) -> None:
        self._file, self._mix, self._append = file, mix, append

    def read(self, size: int, offset: int) -> bytes:
        return self._file.read(size, offset)

    def write(self, data: bytes, offset: int) -> int:
        return self._file.write(data, offset, append=self._append)

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def flush(self) -> None:
        self._file.settle()

    def fsync(self) -> None:
        self._file.sync()

    def allocate(self, mode: int, offset: int, length: int) -> None:
        self._file.allocate(mode, offset, length)

    def attr(self) -> Attr | None:
        return to_attr(self._file.attr(), self._mix)

    def close(self) -> None:
        if self._file.close():
            with _lock:
                for name in [name for name, kept in _kept.items() if kept == (self._file.files, self._file.identity)]:
                    del _kept[name]


class GuestGraft:
    """`root` (container or upper) of a guest. With `upper` whiteouts are not shown."""

    fleeting = True  # once the machine has ended its files are elsewhere: not to be kept for a moment (ops.py)

    def __init__(self, files: GuestFiles, root: str, *, writable: bool, caller: Caller | None = None) -> None:
        self._files, self._root = files, root
        self._writable, self._caller = writable, caller
        self._upper = root == "upper"
        self._mix = int.from_bytes(hashlib.blake2b(f"{id(files)}{root}".encode(), digest_size=3).digest(), "little")
        self._mix <<= 39

    # --- reading --------------------------------------------------------------------------------------------------

    def _shown(self, found: Found) -> bool:
        return not (self._upper and stat.S_ISCHR(found.mode) and found.rdev_major == found.rdev_minor == 0)

    def _held(self, path: bytes) -> int | None:
        """The agent's handle of a removed file that is open."""
        name = unlinked.name_in(path)
        if name is None:
            return None
        with _lock:
            kept = _kept.get(name)
        return None if kept is None else kept[0].handle_of(kept[1])

    def getattr(self, path: bytes) -> Attr:
        handle = self._held(path)
        if handle is not None:
            values = self._files.call("STAT", {"handle": handle})
            attr = to_attr(parse_attr(values.need("attr")), self._mix)
            return attr._replace(nlink=attr.nlink + 1)  # libfuse takes the name it made up off again
        found = self._files.stat(self._root, path)
        if not path:  # one number, whether or not the guest has told its own yet
            return to_attr(found, self._mix)._replace(ino=self._mix + INODES)
        if not self._shown(found):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
        return to_attr(found, self._mix)

    def readdir(self, path: bytes) -> list[tuple[bytes, int, int]]:
        return [
            (name, to_attr(found, self._mix).ino, found.mode)
            for name, found in self._files.list(self._root, path)
            if self._shown(found)
        ]

    def readlink(self, path: bytes) -> bytes:
        target = self._files.call("READLINK", {"root": self._root, "path": path}).need("target")
        if not 0 < len(target) < 4096 or b"\0" in target:
            raise ProtocolError("a symlink's target that is none")
        return target

    def open(self, path: bytes, flags: int) -> OpenFile:
        if not self._writable and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise ReadOnly("this view is read-only")
        if self._held(path) is not None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return OpenFile(
            self._files.open(self._root, path, _letters(flags)), self._mix, append=bool(flags & os.O_APPEND)
        )

    def _overlay(self, name: bytes) -> bool:
        return name.startswith(OVERLAY)

    def listxattr(self, path: bytes) -> list[bytes]:
        if unlinked.name_in(path):
            return []
        root = self._caller is None or self._caller()[0] == 0
        names = self._files.xattr_names(self._root, path)
        return [n for n in names if not self._overlay(n) and (root or not n.startswith(b"trusted."))]

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        if self._overlay(name) or unlinked.name_in(path) or name not in self._files.xattr_names(self._root, path):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return self._files.call("GETXATTR", {"root": self._root, "path": path, "name": name}).need("value")

    def statfs(self) -> Mapping[str, int]:
        values = self._files.call("STATFS", {"root": self._root, "path": b""})
        told = {name: values.number(name) for name in ("bsize", "blocks", "bfree", "bavail", "files", "ffree")}
        return {
            **{f"f_{name}": value for name, value in told.items()},
            "f_frsize": told["bsize"],
            "f_favail": told["ffree"],
            "f_namemax": 255,
        }

    # --- changing -------------------------------------------------------------------------------------------------

    def change(self, operation: str, path: bytes, *arguments: Any) -> Any:
        """Every modifying operation by its FUSE name. EROFS on a read-only view."""
        if not self._writable:
            raise ReadOnly("this view is read-only")
        return _CHANGES[operation](self, path, *arguments)

    def _ask(self, verb: str, path: bytes, *others: bytes, **words: Any) -> None:
        self._files.change(verb, self._root, path, words, *others)

    def _owner(self, path: bytes) -> dict[str, int]:
        """Who gets what is made at `path`: the caller; in a set-group-id directory the group stays the directory's."""
        if self._caller is None:
            return {}
        uid, gid, _ = self._caller()
        if userids.rootless() is not None:
            uid, gid = userids.given(uid, gid)
        if (uid, gid) == (0, 0):
            return {}
        if self._files.stat(self._root, path.rpartition(b"/")[0]).mode & stat.S_ISGID:
            return {"uid": uid}
        return {"uid": uid, "gid": gid}

    def _create(self, path: bytes, mode: int, flags: int, umask: int = 0) -> OpenFile:
        letters = _letters(flags) + "c" + ("x" if flags & os.O_EXCL else "")
        words: dict[str, str | int] = {"mode": f"{mode & WHOLE & ~umask:o}", **self._owner(path)}
        return OpenFile(self._files.open(self._root, path, letters, words), self._mix, append=bool(flags & os.O_APPEND))

    def _mknod(self, path: bytes, mode: int, device: int, umask: int = 0) -> None:
        kind = stat.S_IFMT(mode)
        words: dict[str, str | int] = {"mode": f"{kind | mode & WHOLE & ~umask:o}", **self._owner(path)}
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            words |= {"rdev_major": str(os.major(device)), "rdev_minor": str(os.minor(device))}
        self._ask("MKNOD", path, **words)

    def _mkdir(self, path: bytes, mode: int, umask: int = 0) -> None:
        parent = self._files.stat(self._root, path.rpartition(b"/")[0])
        inherited = parent.mode & stat.S_ISGID
        self._ask("MKDIRAT", path, mode=f"{mode & WHOLE & ~umask | inherited:o}", **self._owner(path))

    def _unlink(self, path: bytes) -> None:
        name = unlinked.name_in(path)
        if name is not None:
            with _lock:
                if _kept.pop(name, None) is not None:
                    return
        self._ask("UNLINK", path)

    def _rmdir(self, path: bytes) -> None:
        self._ask("RMDIR", path)

    def _symlink(self, path: bytes, target: bytes) -> None:
        self._ask("SYMLINK", path, target=target, **self._owner(path))

    def _rename(self, path: bytes, to: bytes) -> None:
        name = unlinked.name_in(to)
        if name is not None:
            found = self._files.stat(self._root, path)
            identity = found.dev, found.ino
            if self._files.handle_of(identity) is not None:
                with _lock:
                    _kept[name] = self._files, identity
                try:
                    self._ask("UNLINK", path)
                except BaseException:
                    with _lock:
                        _kept.pop(name, None)
                    raise
                return
        self._ask("RENAME", path, to, to=to)

    def _link(self, path: bytes, to: bytes) -> None:
        self._ask("LINK", path, to, to=to)

    def _chmod(self, path: bytes, mode: int) -> None:
        if self._held(path) is None:
            self._ask("CHMOD", path, mode=f"{mode & WHOLE:o}")

    def _chown(self, path: bytes, uid: int, gid: int) -> None:
        uid, gid = userids.given(uid, gid)
        if self._held(path) is None:
            self._ask("CHOWN", path, uid=_signed(uid), gid=_signed(gid))

    def _truncate(self, path: bytes, size: int) -> None:
        handle = self._held(path)
        if handle is not None:
            self._files.call("TRUNCATE", {"handle": handle, "size": size})
            return
        self._ask("TRUNCATE", path, size=size)

    def _utimens(self, path: bytes, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        """Seconds and nanoseconds each; UTIME_NOW and UTIME_OMIT as in utimensat(2)."""
        words: dict[str, str | int] = {}
        for name, (seconds, nanos) in (("atime", atime), ("mtime", mtime)):
            if nanos != UTIME_OMIT:
                words[name] = "now" if nanos == UTIME_NOW else seconds * 1_000_000_000 + nanos
        if self._held(path) is None:
            self._ask("UTIMENS", path, **words)

    def _setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None:
        self._settable(name)
        self._ask("SETXATTR", path, name=name, value=value, flags=flags)

    def _removexattr(self, path: bytes, name: bytes) -> None:
        self._settable(name)
        self._ask("REMOVEXATTR", path, name=name)

    def _settable(self, name: bytes) -> None:
        if self._overlay(name):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


_CHANGES: Mapping[str, Callable[..., Any]] = {
    "create": GuestGraft._create,
    "mknod": GuestGraft._mknod,
    "mkdir": GuestGraft._mkdir,
    "unlink": GuestGraft._unlink,
    "rmdir": GuestGraft._rmdir,
    "symlink": GuestGraft._symlink,
    "rename": GuestGraft._rename,
    "link": GuestGraft._link,
    "chmod": GuestGraft._chmod,
    "chown": GuestGraft._chown,
    "truncate": GuestGraft._truncate,
    "utimens": GuestGraft._utimens,
    "setxattr": GuestGraft._setxattr,
    "removexattr": GuestGraft._removexattr,
}


def _signed(id: int) -> int:
    """chown(2)'s `-1: unchanged`, which libfuse may hand through as an unsigned number."""
    return -1 if id in (-1, 0xFFFFFFFF) else id


def _letters(flags: int) -> str:
    """open(2)'s flags as verb OPEN has them."""
    access = flags & os.O_ACCMODE
    letters = {os.O_RDONLY: "r", os.O_WRONLY: "w"}.get(access, "rw")
    return letters + ("a" if flags & os.O_APPEND else "") + ("t" if flags & os.O_TRUNC else "")

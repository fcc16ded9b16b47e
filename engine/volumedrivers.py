"""Where a volume's bytes are kept: the drivers. Floor 2, no state.

Only here: what the options of each driver mean and how its `data/` comes to be. A driver is an object with the methods
of `Driver` and a row in `DRIVERS`. It gets the volume's directory (`volumes/<name>`, private to it; `data/` is there)
and the options as they were checked at creation, and keeps nothing in memory: the kernel's mount table is the truth,
also after a restart. volumes.py calls `mount` before the first use and `unmount` after the last, never two methods of
one volume at the same time.

    local               a plain directory of the store
    local type=… device=… o=…   whatever mount(8) would mount there, as Docker's driver of that name does: tmpfs, a
                        directory (o=bind), nfs, cifs, a block device
    ext4 size=…         a file system of its own in one sparse file: full at `size`, whatever the disk still holds
    any other name      a program of that name in the store: volumeplugins.py

Sources of `local`: moby daemon/volume/local/local_linux.go and moby/sys/mount flags_linux.go.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from engine import discreet, hostmounts, loops
from engine.errors import EngineError, InvalidArgument, NotFound, RuntimeFailure, Unreachable, Unsupported
from engine.model import parse_size
from engine.programs import advice, run_helper
from engine.programs import find as find_program
from engine.volumeplugins import DIRECTORY, Plugin
from engine.walk import usage

READ_ONLY = "read_only"  # an option of every driver: containers and people only read the volume
MIN_EXT4, MAX_EXT4 = 2 << 20, 1 << 44  # bytes; mke2fs refuses less
MKFS_SECONDS = 60.0

Options = Mapping[str, str]
Resolver = Callable[[str], str]  # a host's name -> one address


class Driver(Protocol):
    name: str
    keys: tuple[str, ...] | None  # the options it takes, READ_ONLY aside; None: `check` knows

    def check(self, options: Options) -> None: ...  # InvalidArgument names what is wrong; touches nothing
    def create(self, directory: Path, name: str, options: Options) -> None: ...  # `data/` is there, empty
    def mounts(self, options: Options) -> bool: ...  # whether `data/` is nothing until it is mounted
    def mount(self, directory: Path, options: Options) -> None: ...  # over `data/`; it is not mounted
    def unmount(self, directory: Path) -> None: ...  # OSError EBUSY while something in it is open
    def remove(self, directory: Path, options: Options) -> None: ...  # what lies elsewhere; the directory goes after it
    def usage(self, directory: Path, options: Options) -> int: ...  # bytes; may take long


# --- local ------------------------------------------------------------------------------------------------------------

_FLAGS = {  # word -> (set, clear) of mount(2) flags: <sys/mount.h>
    "defaults": (0, 0), "ro": (1, 0), "rw": (0, 1), "nosuid": (2, 0), "suid": (0, 2), "nodev": (4, 0), "dev": (0, 4),
    "noexec": (8, 0), "exec": (0, 8), "sync": (16, 0), "async": (0, 16), "mand": (64, 0), "nomand": (0, 64),
    "dirsync": (128, 0), "noatime": (1024, 0), "atime": (0, 1024), "nodiratime": (2048, 0), "diratime": (0, 2048),
    "bind": (4096, 0), "rbind": (4096 | 16384, 0), "relatime": (1 << 21, 0), "norelatime": (0, 1 << 21),
    "strictatime": (1 << 24, 0), "nostrictatime": (0, 1 << 24),
}  # fmt: skip
_NEEDS = {"device": ("type",), "type": ("device",), "o": ("device", "type")}


def split_options(text: str) -> tuple[int, str]:
    """The words of `o=` as mount(2) takes them: flags, and what is left as data."""
    flags, data = 0, []
    for word in text.split(","):
        known = _FLAGS.get(word)
        if known is None:
            data.append(word)
        else:
            flags = (flags | known[0]) & ~known[1]
    return flags, ",".join(word for word in data if word)


def value_of(options: str, key: str) -> str:
    """The value of `key=` among the words of `o=`; '' when it is not there."""
    return next((word.partition("=")[2] for word in options.split(",") if word.partition("=")[0] == key), "")


def first_address(name: str) -> str:
    return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])


def source_and_options(options: Options, resolve: Resolver = first_address) -> tuple[str, str]:
    """Device and `o=` as mount(2) takes them: the kernel resolves no names of hosts. Unreachable when none can."""
    kind, device, words = options.get("type", ""), options.get("device", ""), options.get("o", "")
    named = value_of(words, "addr")
    try:
        if kind in ("nfs", "nfs4", "cifs") and named:
            words = ",".join(f"addr={resolve(named)}" if word == f"addr={named}" else word for word in words.split(","))
        elif kind == "cifs":
            server, slash, path = device[2:].partition("/")
            device = f"//{resolve(server)}{slash}{path}"
    except OSError as error:
        raise Unreachable(f"the name of its server cannot be resolved: {error}", at=named or device) from error
    return device, words


class Local:
    name = "local"
    keys: tuple[str, ...] | None = ("type", "device", "o", "size")

    def check(self, options: Options) -> None:
        if "size" in options:
            if not _is_size(options["size"]):
                raise InvalidArgument(f"invalid size: {options['size']!r}", at="size")
            raise InvalidArgument(
                "size: quota size requested but no quota support in the local driver", at="size",
                hint="driver=ext4 size=… has a size of its own; o=size=… bounds a tmpfs",
            )  # fmt: skip
        for key, needed in _NEEDS.items():
            for other in needed:
                if options.get(key) and not options.get(other):
                    raise InvalidArgument(f"missing required option: {other!r} (it goes with {key})", at=key)
        device = options.get("device", "")
        if options.get("type") == "cifs":
            server = re.fullmatch(r"//([^/:]+)(:\d*)?(/.*)?", device)
            if server is None:
                raise InvalidArgument("error parsing mount device url: //SERVER/SHARE expected", at=device)
            if server[2]:
                raise InvalidArgument("port not allowed in CIFS device URL, include 'port' in 'o='", at=device)
        flags, _ = split_options(options.get("o", ""))
        if flags & hostmounts.MS_BIND and not device.startswith("/"):
            raise InvalidArgument("device: an absolute path of a directory expected", at=device)

    def create(self, directory: Path, name: str, options: Options) -> None:
        pass

    def mounts(self, options: Options) -> bool:
        return "device" in options

    def mount(self, directory: Path, options: Options) -> None:
        device, words = source_and_options(options)
        kind, data = options["type"], directory / "data"
        flags, text = split_options(words)
        if flags & hostmounts.MS_BIND and not os.path.isdir(device):
            raise NotFound("the directory of the volume is not there", at=device, hint="make it, or remove the volume")
        try:
            hostmounts.mount(device, data, kind, flags, text)
            if flags & hostmounts.MS_BIND and flags & hostmounts.MS_RDONLY:
                hostmounts.mount(
                    "none", data, "none", hostmounts.MS_BIND | hostmounts.MS_REMOUNT | hostmounts.MS_RDONLY
                )
        except OSError as error:
            raise _cannot(error, kind, device) from error

    def unmount(self, directory: Path) -> None:
        hostmounts.unmount_unused(directory / "data")

    def remove(self, directory: Path, options: Options) -> None:
        pass  # what was mounted belongs to others

    def usage(self, directory: Path, options: Options) -> int:
        return usage(directory / "data")


def _cannot(error: OSError, kind: str, device: str) -> EngineError:
    text = f"the kernel cannot mount {device} ({kind}): {error.strerror}"
    hints = {
        errno.ENODEV: f"this kernel has no file system {kind!r}: grep {kind} /proc/filesystems; modprobe {kind}",
        errno.EINVAL: "it takes no such options: see the last lines of dmesg",
        errno.EPERM: "run the daemon as root",
        errno.ECONNREFUSED: "nothing listens there: is the server up, is its port right?",
        errno.ETIMEDOUT: "no answer: is the server up, does a firewall stand between?",
        errno.EACCES: "the server refuses: see its exports",
        errno.ENOENT: "it is not there",
    }
    remote = error.errno in (errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
    kind_of = Unreachable if remote else NotFound if error.errno == errno.ENOENT else Unsupported
    return kind_of(text, at=device, hint=hints.get(error.errno or 0))


# --- ext4 -------------------------------------------------------------------------------------------------------------


class Ext4:
    name = "ext4"
    keys: tuple[str, ...] | None = ("size",)

    def check(self, options: Options) -> None:
        text = options.get("size", "")
        if not text:
            raise InvalidArgument("missing required option: 'size'", at="size", hint="create NAME driver=ext4 size=1g")
        if not _is_size(text) or not MIN_EXT4 <= int(parse_size(text)) <= MAX_EXT4:
            raise InvalidArgument(f"invalid size: {text!r} (from 2m to 16t)", at="size")

    def create(self, directory: Path, name: str, options: Options) -> None:
        make_ext4(directory / "image", int(parse_size(options["size"])))

    def mounts(self, options: Options) -> bool:
        return True

    def mount(self, directory: Path, options: Options) -> None:
        image = directory / "image"
        try:
            mount_image(image, directory / "data", "ext4", hostmounts.MS_NODEV)
        except OSError as error:
            raise _cannot(error, "ext4", str(image)) from error
        try:
            os.rmdir(directory / "data" / "lost+found")  # initdb and others want an empty directory; e2fsck makes it
        except OSError:
            pass

    def unmount(self, directory: Path) -> None:
        hostmounts.unmount_unused(directory / "data")

    def remove(self, directory: Path, options: Options) -> None:
        pass

    def usage(self, directory: Path, options: Options) -> int:
        """Of its disk: what is allocated when it is not mounted."""
        return os.stat(directory / "image").st_blocks * 512


def make_ext4(image: Path, size: int, *, options: Sequence[str] = (), extended: str = "") -> None:
    """A new sparse file of `size` bytes with an empty ext4 file system, durable. `options` and `extended` (-E) are more
    of mkfs.ext4's. Unsupported where that is not installed; RuntimeFailure with its words."""
    fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)
    program = find_program("mkfs.ext4") or "mkfs.ext4"
    argv = [program, "-q", "-F", "-m", "0", *options, "-E", f"root_owner=0:0{extended}", str(image)]
    try:
        code, _, said = run_helper(argv, b"", MKFS_SECONDS, 1 << 16)
    except FileNotFoundError as error:
        raise Unsupported("mkfs.ext4 is not installed", hint=advice("e2fsprogs")) from error
    except (TimeoutError, OverflowError) as error:
        raise RuntimeFailure(f"mkfs.ext4: {error}") from error
    if code:
        raise RuntimeFailure(f"mkfs.ext4: {' '.join(said.decode(errors='replace').split())[:300]}", at=str(image))
    fd = os.open(image, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def mount_image(image: Path, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    """Mount the file system in the file `image`, writable, through a loop device that goes away with the mount.

    A device that has it already (the mount lives on in some container's namespace) is used again: two over one file
    would destroy it.
    """
    device, name = loops.of(image) or loops.attach(image, 0, 512)
    try:
        hostmounts.mount(name, target, kind, flags, data)
    finally:
        os.close(device)


def _is_size(text: str) -> bool:
    try:
        return isinstance(parse_size(text), int)
    except ValueError:
        return False


_ALL: tuple[Driver, ...] = (Local(), Ext4())
DRIVERS: Mapping[str, Driver] = {driver.name: driver for driver in _ALL}


def find(store: Path, name: str) -> Driver:
    """A driver of ours, or the program of that name in the store, which `check` looks for."""
    return DRIVERS.get(name) or Plugin(store / DIRECTORY, name)


def check(driver: Driver, options: Options) -> None:
    """Every option known, values bounded, and what the driver itself says."""
    for key, value in options.items():
        if driver.keys is not None and key not in (*driver.keys, READ_ONLY):
            raise InvalidArgument(
                f"invalid option: {key!r} of the {driver.name} driver", at=key,
                hint=f"it takes {', '.join((*driver.keys, READ_ONLY))}",
            )  # fmt: skip
        if "\0" in value or len(value) > 4000:
            raise InvalidArgument(f"{key}: a NUL, or longer than 4000 characters", at=key)
    if options.get(READ_ONLY, "false") not in ("true", "false"):
        raise InvalidArgument(f"{READ_ONLY}: true or false expected", at=options[READ_ONLY])
    driver.check({key: value for key, value in options.items() if key != READ_ONLY})


def shown(options: Options) -> dict[str, str]:
    """Options as people may see them: passwords of `o=` are not."""
    return {key: discreet.mount_options(value) if key == "o" else value for key, value in options.items()}

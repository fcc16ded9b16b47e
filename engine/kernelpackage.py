"""A Debian kernel package (.deb): its vmlinuz, configuration and modules. Floor 1.

Only here: ar(5), and which members of the package matter. The package is read once, front to back; modules that can be
of use are set aside in one temporary file until it is known which are needed. Names in it decide nothing but
what a member is: nothing is unpacked to a path of the package's choosing. Source: deb(5).
"""

from __future__ import annotations

import io
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from engine import kernelimage, kernelmodules
from engine.errors import Damaged, InvalidArgument, TooLarge
from engine.kernelmodules import Chosen
from engine.store.inflate import inflate

MAGIC = b"!<arch>\n"
CHUNK = 1 << 18
MAX_MODULES = 2 << 30  # bytes of all modules set aside
MAX_CONFIG = 4 << 20
_IMAGE = re.compile(r"(?:\./)?boot/(?:vmlinuz|vmlinux)-(.+)\Z")
_CONFIG = re.compile(r"(?:\./)?boot/config-(.+)\Z")
_MODULES = re.compile(r"(?:\./)?(?:usr/)?lib/modules/([^/]+)/(.+)\Z")
_NEVER = re.compile(  # the bulk of a package, of no use without the hardware
    r"kernel/(sound|drivers/(gpu|media|staging|infiniband|scsi|usb|iio|hwmon|isdn|input|bluetooth|net/(ethernet|wireless|"
    r"can|usb|wan|phy|hamradio|dsa)))/"
)


@dataclass(frozen=True, slots=True)
class Packaged:
    image: bytes  # the file as it is in the package
    config: str
    chosen: Chosen


def is_package(head: bytes) -> bool:
    return head.startswith(MAGIC)


def read(path: Path, tmp: Path, arch: str | None, check: Callable[[], None] = lambda: None) -> Packaged:
    """Kernel and modules of the package at `path`; modules are set aside in `tmp`. Damaged, InvalidArgument, TooLarge.

    `check` is called often, to end early by raising.
    """
    image, config, builtin = b"", "", list[str]()
    version = ""
    with open(path, "rb") as file, tempfile.TemporaryFile(dir=tmp) as aside:
        places: dict[str, tuple[int, int]] = {}
        for member, body in members(_data(file, path, check), path):
            name = member.name
            if match := _IMAGE.match(name):
                image, version = whole(body, member, kernelimage.MAX_PACKED), match[1]
            elif _CONFIG.match(name):
                config = whole(body, member, MAX_CONFIG).decode(errors="replace")
            elif match := _MODULES.match(name):
                if match[2] == "modules.builtin":
                    builtin = whole(body, member, MAX_CONFIG).decode(errors="replace").split()
                elif (found := kernelmodules.name_of(match[2])) and not _NEVER.match(match[2]):
                    places[found] = aside.tell(), member.size
                    aside.write(whole(body, member, kernelmodules.MAX_MODULE))
                    if aside.tell() > MAX_MODULES:
                        raise TooLarge(f"the package has more than {MAX_MODULES} bytes of modules", at=str(path))
        if not image:
            raise InvalidArgument(
                "this package has no kernel (boot/vmlinuz-…)",
                at=path.name,
                hint="of the packages named linux-image-…, take the one with the version in its name",
            )
        if not places and not config:
            raise InvalidArgument(f"the package has kernel {version} without modules and configuration", at=path.name)
        kernel = kernelimage.read(image, arch)

        def module(name: str) -> bytes:
            offset, length = places[name]
            aside.seek(offset)
            return aside.read(length)

        names = [kernelmodules.name_of(line) or "" for line in builtin]
        return Packaged(image, config, kernelmodules.choose(places, module, names, config, kernel.arch))


def whole(body: IO[bytes], member: tarfile.TarInfo, limit: int) -> bytes:
    if member.size > limit:
        raise TooLarge(f"{member.name[:200]} has {member.size} bytes; at most {limit} are taken", at=member.name[:200])
    return body.read(limit)


def members(
    data: Iterator[bytes], path: Path, links: dict[str, str] | None = None
) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Regular files of the tar, in order; each is to be read before the next. `links` gets the targets of symlinks."""
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", _Stream(data)), mode="r|") as tar:
            for member in tar:
                if links is not None and member.issym():
                    links[member.name] = member.linkname
                if member.isreg() and (body := tar.extractfile(member)) is not None:
                    yield member, body
    except (tarfile.TarError, EOFError) as error:
        raise Damaged(f"the package's archive of files is damaged: {error}", at=path.name) from error


class _Stream(io.RawIOBase):
    """Pieces as a file that can only be read on."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        out = bytearray()
        while len(out) < size:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
                if not self._rest:
                    break
            taken = self._rest[: size - len(out)]
            out += taken
            self._rest = self._rest[len(taken) :]
        return bytes(out)


def _data(file: IO[bytes], path: Path, check: Callable[[], None]) -> Iterator[bytes]:
    """The inflated tar of the member data.tar.*."""
    if file.read(8) != MAGIC:
        raise InvalidArgument("no Debian package", at=path.name)
    while header := file.read(60):
        if len(header) < 60 or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            raise Damaged("the package is damaged: a member without a header", at=f"byte {file.tell() - len(header)}")
        size = int(header[48:58])
        if header[:16].decode("ascii", "replace").strip().rstrip("/").startswith("data.tar"):

            def pieces(left: int) -> Iterator[bytes]:
                while left:
                    check()
                    piece = file.read(min(CHUNK, left))
                    if not piece:
                        raise Damaged("the package is cut short", at=f"byte {file.tell()}")
                    left -= len(piece)
                    yield piece

            return inflate(pieces(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise Damaged("the package has no data.tar", at=path.name)

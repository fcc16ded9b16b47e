"""What a kernel file is: its format, architecture and version, read from its headers. Floor 1.

Only here: the headers of bzImage (Linux, Documentation/arch/x86/boot.rst), EFI zboot (drivers/firmware/efi/libstub/
zboot-header.S), arm64 Image (Documentation/arch/arm64/booting.rst), ELF vmlinux and the PE header the first three may
carry, and the compressions a kernel's payload may have. A file is never judged by its name or size. Input is foreign:
everything read is bounded, `Damaged` names the byte. Pure.
"""

from __future__ import annotations

import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import zstandard

from engine.errors import Damaged, InvalidArgument, TooLarge

MAX_KERNEL = 512 << 20  # bytes of an unpacked kernel
MAX_PACKED = 256 << 20  # bytes of a kernel file
X86_64, AARCH64 = "x86_64", "aarch64"  # as uname -m has them
ARCHITECTURES = (X86_64, AARCH64)
ELF_MACHINES = {62: X86_64, 183: AARCH64}  # <elf.h>: EM_X86_64, EM_AARCH64
_PE_MACHINES = {0x8664: X86_64, 0xAA64: AARCH64}  # IMAGE_FILE_MACHINE_*
_BANNER = re.compile(rb"Linux version (\d+\.\d+[0-9A-Za-z.+~_-]*) \(")
_SETUP_VERSION = re.compile(rb"(\d+\.\d+[0-9A-Za-z.+~_-]*)[ \0]")
_IKCONFIG = (b"IKCFG_ST", b"IKCFG_ED")  # kernel/configs.c


@dataclass(frozen=True, slots=True)
class KernelFile:
    """A kernel as a guest gets it: `data` is an ELF vmlinux (x86_64) or an arm64 Image."""

    data: bytes
    arch: str
    version: str  # as `uname -r` says it in the guest
    format: str  # of the file it came from: bzImage, vmlinux, Image, zboot; `+gzip` … when it was packed once more
    config: str  # CONFIG_ lines built into it (IKCONFIG); empty when there are none


def read(data: bytes, arch: str | None = None) -> KernelFile:
    """What `data` is. Damaged: none, or cut short. InvalidArgument: for another machine than `arch`."""
    if len(data) > MAX_PACKED:
        raise TooLarge(f"a kernel file of {len(data)} bytes; at most {MAX_PACKED} are taken")
    packed = ""
    if (name := compression(data)) is not None:  # Image.gz, vmlinux.zst
        data, packed = decompress(data, name), f"+{name}"
    try:
        found, kind, payload = _open(data)
    except struct.error as error:  # a header that points beyond the end
        raise Damaged(f"the kernel is cut short: {error}", at=f"byte {len(data)}") from error
    if arch is not None and found != arch:
        raise InvalidArgument(f"this kernel is for {found}, not for {arch}", at=found, hint=f"take one for {arch}")
    banner = _BANNER.search(payload)
    if banner is None:
        raise Damaged(f"this {kind} has no version (`Linux version …`) in it", hint="is it a Linux kernel, and whole?")
    version = banner[1].decode()
    if kind == "bzImage" and (told := _setup_version(data)) != version:
        raise Damaged(f"the header says version {told}, the kernel in it {version}", at=told)
    return KernelFile(payload, found, version, kind + packed, _config(payload))


def _open(data: bytes) -> tuple[str, str, bytes]:
    """(architecture, format, what QEMU boots)."""
    if data[:4] == b"\x7fELF":
        return _elf(data), "vmlinux", data
    if data[0x202:0x206] == b"HdrS" and data[0x1FE:0x200] == b"\x55\xaa":
        payload = _bzimage(data)
        _agree(data, _elf(payload))
        return _elf(payload), "bzImage", payload
    if data[:2] == b"MZ" and data[4:8] == b"zimg":
        payload = _zboot(data)
        arch, _, _ = _open(payload)
        _agree(data, arch)
        return arch, "zboot", payload
    if data[0x38:0x3C] == b"ARM\x64":
        _agree(data, AARCH64)
        size = struct.unpack_from("<Q", data, 0x10)[0]  # in memory, so with what is zeroed at the start
        if not 0 < size <= MAX_KERNEL:
            raise Damaged(f"an arm64 Image of {size} bytes", at="image_size, byte 0x10")
        return AARCH64, "Image", data
    if data[:2] == b"MZ":
        raise Damaged("a PE program that is no Linux kernel", at="byte 0")
    raise Damaged(
        f"no kernel: it begins with {data[:4].hex() or 'nothing'}",
        at="byte 0",
        hint="a vmlinux (ELF), bzImage (vmlinuz) or arm64 Image is expected",
    )


# --- headers ----------------------------------------------------------------------------------------------------


def _elf(data: bytes) -> str:
    """Architecture of a whole 64-bit little-endian ELF program."""
    if len(data) < 64 or data[:4] != b"\x7fELF":
        raise Damaged("what is packed in this kernel is no ELF file", at="byte 0 of the payload")
    if data[4:6] != b"\x02\x01":
        raise InvalidArgument("a kernel must be 64-bit and little-endian", at="e_ident, byte 4")
    kind, machine = struct.unpack_from("<HH", data, 16)
    if machine not in ELF_MACHINES:
        raise InvalidArgument(f"ELF machine {machine} is neither x86_64 nor aarch64", at="e_machine, byte 18")
    if kind not in (2, 3):
        raise Damaged(f"an ELF file of type {kind} is no program", at="e_type, byte 16")
    table = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    if size != 56 or not 0 < count < 1000:
        raise Damaged("an ELF file without program headers", at="e_phnum, byte 56")
    for place in range(table, table + size * count, size):
        if place + size > len(data):
            raise Damaged("the ELF file ends within its program headers", at=f"byte {len(data)}")
        offset, length = struct.unpack_from("<Q", data, place + 8)[0], struct.unpack_from("<Q", data, place + 32)[0]
        if offset + length > len(data):
            raise Damaged(
                f"the ELF file is cut short: a segment ends at byte {offset + length}, the file at {len(data)}",
                at=f"byte {len(data)}",
            )
    return ELF_MACHINES[machine]


def _bzimage(data: bytes) -> bytes:
    """The vmlinux in a bzImage, protocol 2.08 or newer."""
    sectors = data[0x1F1] or 4
    protocol = struct.unpack_from("<H", data, 0x206)[0]
    if protocol < 0x020C or len(data) < 0x250:
        raise InvalidArgument(f"boot protocol {protocol >> 8}.{protocol & 255:02}; 2.12 or newer is needed", at="0x206")
    if not struct.unpack_from("<H", data, 0x236)[0] & 1:  # XLF_KERNEL_64
        raise InvalidArgument("a 32-bit x86 kernel; x86_64 is needed", at="xloadflags, byte 0x236")
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (sectors + 1) * 512 + offset
    if start + length > len(data) or length < 16:
        raise Damaged(f"the kernel is cut short: its payload ends at byte {start + length}, the file at {len(data)}")
    return _unpacked(data[start : start + length], f"payload at byte {start}")


def _zboot(data: bytes) -> bytes:
    offset, length = struct.unpack_from("<II", data, 8)
    if offset + length > len(data) or length < 16:
        raise Damaged(f"the kernel is cut short: its payload ends at byte {offset + length}, the file at {len(data)}")
    return _unpacked(data[offset : offset + length], f"payload at byte {offset}")


def _unpacked(payload: bytes, where: str) -> bytes:
    name = compression(payload)
    if name is None:
        raise Damaged(f"the kernel's payload has an unknown compression ({payload[:4].hex()})", at=where)
    return decompress(payload, name)


def _agree(data: bytes, arch: str) -> None:
    """The PE header of a kernel with an EFI stub names the same machine as the kernel itself."""
    if data[:2] != b"MZ":
        return
    place = struct.unpack_from("<I", data, 0x3C)[0]
    if data[place : place + 4] != b"PE\0\0":
        if place == 0 or place >= len(data):
            return  # no EFI stub: "MZ" is also the first instruction of some
        raise Damaged("the PE header of this kernel is damaged", at=f"byte {place}")
    machine = struct.unpack_from("<H", data, place + 4)[0]
    if _PE_MACHINES.get(machine) != arch:
        raise Damaged(
            f"the PE header says machine {machine:#x}, the kernel in it is for {arch}", at=f"byte {place + 4}"
        )


def _setup_version(data: bytes) -> str:
    place = struct.unpack_from("<H", data, 0x20E)[0] + 0x200
    match = _SETUP_VERSION.match(data[place : place + 256])
    if match is None:
        raise Damaged("the header of this kernel has no version", at="kernel_version, byte 0x20e")
    return match[1].decode()


def _config(payload: bytes) -> str:
    start = payload.find(_IKCONFIG[0])
    end = payload.find(_IKCONFIG[1], start)
    if start < 0 or end < 0:
        return ""
    text = decompress(payload[start + len(_IKCONFIG[0]) : end], "gzip", limit=4 << 20)
    return text.decode(errors="replace")


# --- compressions -----------------------------------------------------------------------------------------------

_MAGIC = {
    "gzip": b"\x1f\x8b\x08",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh",
    "lz4": b"\x02\x21\x4c\x18",
    "lzma": b"\x5d\0\0",
}


def compression(data: bytes) -> str | None:
    """Name of the compression `data` begins with."""
    return next((name for name, magic in _MAGIC.items() if data.startswith(magic)), None)


def decompress(data: bytes, name: str, limit: int = MAX_KERNEL) -> bytes:
    """One compressed stream; what follows is left (a bzImage's payload ends in the unpacked size). Damaged."""
    out = bytearray()
    try:
        for piece in _pieces(data, name):
            out += piece
            if len(out) > limit:
                raise TooLarge(f"unpacked it has more than {limit} bytes")
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, IndexError, struct.error) as error:
        raise Damaged(f"its {name} stream is damaged: {error}") from error
    return bytes(out)


def _pieces(data: bytes, name: str) -> Iterator[bytes]:
    if name == "lz4":
        yield from _lz4(data)
        return
    if name == "zstd":
        yield from _zstd(data)
        return
    if name == "gzip":
        inflater = zlib.decompressobj(wbits=31)
        rest = data
        while not inflater.eof and rest:
            yield inflater.decompress(rest, 1 << 20)
            rest = inflater.unconsumed_tail
        yield inflater.flush() if inflater.eof else b""
        ended = inflater.eof
    else:
        unpacker = bz2.BZ2Decompressor() if name == "bzip2" else lzma.LZMADecompressor()
        yield unpacker.decompress(data, 1 << 20)
        while not unpacker.eof and not unpacker.needs_input:
            yield unpacker.decompress(b"", 1 << 20)
        ended = unpacker.eof
    if not ended:
        raise Damaged(f"its {name} stream is cut short", at=f"byte {len(data)}")


def _zstd(data: bytes) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    for place in range(0, len(data), 1 << 16):
        if unpacker.eof:
            return
        yield unpacker.decompress(data[place : place + (1 << 16)])
    if not unpacker.eof:
        raise Damaged("its zstd stream is cut short", at=f"byte {len(data)}")


def _lz4(data: bytes) -> Iterator[bytes]:
    """The legacy frame (`lz4 -l`): magic, then blocks of at most 8 MiB, each with its length (lz4_Frame_format.md)."""
    place = 4
    while place + 4 <= len(data):
        length = struct.unpack_from("<I", data, place)[0]
        place += 4
        if length == 0 or place + length > len(data):
            # a payload ends in the unpacked size, which is no block; anything more than that is missing bytes
            if len(data) - place > 0:
                raise Damaged("its lz4 stream is cut short", at=f"byte {len(data)}")
            return
        yield _lz4_block(data[place : place + length])
        place += length


def _lz4_block(block: bytes) -> bytes:
    """Sequences of literals and matches (lz4_Block_format.md)."""
    out = bytearray()
    place, end = 0, len(block)
    while place < end:
        token = block[place]
        place += 1
        if count := token >> 4:
            if count == 15:
                while (more := block[place]) == 255:
                    count += 255
                    place += 1
                count += more
                place += 1
            if place + count > end:
                raise Damaged("an lz4 block is damaged: literals beyond its end")
            out += block[place : place + count]
            place += count
        if place >= end:
            break
        distance = block[place] | block[place + 1] << 8
        place += 2
        count = (token & 15) + 4
        if count == 19:
            while (more := block[place]) == 255:
                count += 255
                place += 1
            count += more
            place += 1
        start = len(out) - distance
        if distance == 0 or start < 0 or len(out) + count > 8 << 20:
            raise Damaged("an lz4 block is damaged: a match outside of it")
        if distance >= count:
            out += out[start : start + count]
        else:  # it overlaps itself: a pattern repeated
            out += (out[start:] * (count // distance + 1))[:count]
    return bytes(out)

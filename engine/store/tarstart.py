"""What a file is that should be a tar: said before anything is read of it. Floor 1, no state.

Only here: the first bytes of what people take for a tar.
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import Damaged, InvalidArgument, TooLarge
from engine.store.inflate import NONE, detect, inflate
from engine.store.tar import BLOCK, TarReader

_KNOWN = (
    (b"PK\x03\x04", "a zip archive"),
    (b"\x7fELF", "a program (ELF)"),
    (b"!<arch>\n", "an ar archive, such as a .deb"),
    (b"\xed\xab\xee\xdb", "an rpm"),
    (b"0707", "a cpio archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"hsqs", "a squashfs image"),
    (b"QFI\xfb", "a qcow2 disk"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "a picture (PNG)"),
)


def check_start(path: Path) -> None:
    """InvalidArgument that says what was found when a file, uncompressed, does not begin as a tar does.

    Damaged when its compression is broken. A tar that breaks off or is broken further on is for the reader to find.
    """
    with open(path, "rb") as file:
        packing = detect(file.read(8))
        file.seek(0)
        head = bytearray()
        for piece in inflate(iter(lambda: file.read(1 << 16), b"")):
            head += piece
            if len(head) >= BLOCK:
                break
    try:
        next(iter(TarReader(iter([bytes(head[:BLOCK])]))), None)
        broken = not head
    except TooLarge:
        broken = False  # it is a tar, whose reader will say what is too much in it
    except Damaged as error:
        broken = error.at == "byte 0" or len(head) < BLOCK
    if broken:
        inside = "" if packing == NONE else f", compressed with {packing}"
        raise InvalidArgument(f"not a tar archive but {_what(bytes(head))}{inside}", at=str(path))


def _what(head: bytes) -> str:
    for magic, name in _KNOWN:
        if head.startswith(magic):
            return name
    if not head:
        return "nothing: the file is empty"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start > len(head) - 4 else "\0"  # cut within a letter
    if all(letter.isprintable() or letter in "\n\r\t" for letter in text):
        return f"text that begins with {text[:40]!r}"
    return f"bytes that begin with {head[:8].hex(' ')}"

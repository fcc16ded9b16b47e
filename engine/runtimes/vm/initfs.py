"""The initial file system of a guest: a cpio archive with the agent as /init, and a kernel's modules. Floor 2. Pure.

Source: Documentation/driver-api/early-userspace/buffer-format.rst (newc).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

DIRECTORY, FILE, DEVICE = 0o40755, 0o100000, 0o20600


class _Archive:
    def __init__(self) -> None:
        self.data = bytearray()
        self._inode = 0
        self._seen = {""}

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        above = os.path.dirname(name)
        if above not in self._seen:
            self.add(above, DIRECTORY)
            self._seen.add(above)
        self._inode += 1
        path = name.encode() + b"\0"
        # inode mode uid gid links mtime size dev_major dev_minor rdev_major rdev_minor name_size checksum
        numbers = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        self.data += b"070701" + b"".join(b"%08X" % number for number in numbers) + path
        self.data += bytes(-len(self.data) % 4)
        self.data += content
        self.data += bytes(-len(self.data) % 4)

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self.data) + bytes(-len(self.data) % 512)


def build(agent: bytes, modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """The archive. `modules`: names and .ko files, in the order they are to be loaded in."""
    archive = _Archive()
    archive.add("dev/console", DEVICE, device=(5, 1))
    archive.add("init", FILE | 0o755, agent)
    for name, content in modules:
        archive.add(f"modules/{name}.ko", FILE | 0o644, content)
    archive.add("modules.list", FILE | 0o644, "".join(f"/modules/{name}.ko\n" for name, _ in modules).encode())
    return archive.finish()

"""The file verbs of an agent, one method each, for tests: paths below a root of the guest, results in plain types."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from engine.runtimes.vm import protocol
from engine.runtimes.vm.client import AgentClient
from engine.runtimes.vm.protocol import BULK, Attr, ProtocolError, Value


class Statfs(NamedTuple):
    type: int
    bsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    namelen: int


class GuestFiles:
    """Below `root`: "container", or a name given to the agent by ROOT. Paths are relative to it; "" is the root."""

    def __init__(self, client: AgentClient, root: str = "container", *, deadline: float = 5.0) -> None:
        self._client, self._root, self._deadline = client, root, deadline

    def _call(self, verb: str, words: dict[str, Value]) -> protocol.Values:
        return self._client.call(verb, words, deadline=self._deadline)

    def _at(self, verb: str, path: str, words: dict[str, Value] | None = None) -> protocol.Values:
        return self._call(verb, {"root": self._root, "path": path, **(words or {})})

    @staticmethod
    def _owner(uid: int | None, gid: int | None) -> dict[str, Value]:
        return {key: value for key, value in (("uid", uid), ("gid", gid)) if value is not None}

    def forget_handles(self) -> None:
        """Closes what an earlier owner of the connection left open."""
        self._call("CLOSE", {"all": 1})

    def stat(self, path: str) -> Attr:
        return protocol.parse_attr(self._at("STAT", path).need("attr"))

    def entries(self, path: str) -> Iterator[tuple[str, Attr]]:
        """Names and attributes, without . and ..; asks for more as it goes."""
        values = self._at("LIST", path)
        while True:
            handle = values.get("handle")
            if handle is not None and not values.all("entry"):
                raise ProtocolError("LIST goes on without an entry")
            try:
                for entry in values.all("entry"):
                    name, attr, _ = protocol.parse_entry(entry)
                    yield os.fsdecode(name), attr
            except GeneratorExit:
                if handle is not None:
                    self._call("CLOSE", {"handle": handle})
                raise
            if handle is None:
                return
            values = self._call("LIST", {"handle": handle})

    def readlink(self, path: str) -> str:
        target = self._at("READLINK", path).need("target")
        if not target or b"\0" in target or len(target) > 4096:
            raise ProtocolError(f"a link to {target[:40]!r}")
        return os.fsdecode(target)

    def open(
        self, path: str, flags: str, mode: int = 0o644, *, uid: int | None = None, gid: int | None = None
    ) -> tuple[int, Attr]:
        """A regular file. Flags: letters of OPEN in verbs.py. -> handle, attributes."""
        words = {"flags": flags, "mode": f"{mode & 0o7777:o}", **self._owner(uid, gid)}
        values = self._at("OPEN", path, words)
        return values.number("handle"), protocol.parse_attr(values.need("attr"))

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        out: list[bytes] = []
        while size > 0:
            wanted = min(size, BULK)
            data = self._call("READ", {"handle": handle, "offset": offset, "size": wanted}).need("data")
            if len(data) > wanted:
                raise ProtocolError(f"READ of {wanted} bytes gave {len(data)}")
            out.append(data)
            offset, size = offset + len(data), size - len(data)
            if len(data) < wanted:
                break
        return out[0] if len(out) == 1 else b"".join(out)

    def write(self, handle: int, offset: int, data: bytes | memoryview) -> int:
        """Bytes written; fewer than given only when a part was and then the guest could no more."""
        view, done = memoryview(data), 0
        while done < len(view):
            part = bytes(view[done : done + BULK])
            count = self._call("WRITE", {"handle": handle, "offset": offset + done, "data": part}).number(
                "size", most=len(part)
            )
            done += count
            if count < len(part):
                break
        return done

    def close(self, handle: int) -> None:
        self._call("CLOSE", {"handle": handle})

    def fsync(self, handle: int, *, data_only: bool = False) -> None:
        self._call("FSYNC", {"handle": handle, **({"data": 1} if data_only else {})})

    def fallocate(self, handle: int, mode: int, offset: int, size: int) -> None:
        self._call("FALLOCATE", {"handle": handle, "mode": mode, "offset": offset, "size": size})

    def fstat(self, handle: int) -> Attr:
        return protocol.parse_attr(self._call("STAT", {"handle": handle}).need("attr"))

    def ftruncate(self, handle: int, size: int) -> None:
        self._call("TRUNCATE", {"handle": handle, "size": size})

    def truncate(self, path: str, size: int) -> None:
        self._at("TRUNCATE", path, {"size": size})

    def mkdir(self, path: str, mode: int, *, uid: int | None = None, gid: int | None = None) -> Attr:
        words = {"mode": f"{mode & 0o7777:o}", **self._owner(uid, gid)}
        return protocol.parse_attr(self._at("MKDIRAT", path, words).need("attr"))

    def mknod(
        self, path: str, mode: int, rdev: tuple[int, int] = (0, 0), *, uid: int | None = None, gid: int | None = None
    ) -> Attr:
        words = {"mode": f"{mode:o}", "rdev_major": rdev[0], "rdev_minor": rdev[1], **self._owner(uid, gid)}
        return protocol.parse_attr(self._at("MKNOD", path, words).need("attr"))

    def symlink(self, path: str, target: str, *, uid: int | None = None, gid: int | None = None) -> Attr:
        words = {"target": target, **self._owner(uid, gid)}
        return protocol.parse_attr(self._at("SYMLINK", path, words).need("attr"))

    def link(self, path: str, to: str) -> Attr:
        """`to` becomes another name of `path`."""
        return protocol.parse_attr(self._at("LINK", path, {"to": to}).need("attr"))

    def unlink(self, path: str) -> None:
        self._at("UNLINK", path)

    def rmdir(self, path: str) -> None:
        self._at("RMDIR", path)

    def rename(self, path: str, to: str, flags: int = 0) -> None:
        self._at("RENAME", path, {"to": to, "flags": flags})

    def chmod(self, path: str, mode: int) -> None:
        self._at("CHMOD", path, {"mode": f"{mode & 0o7777:o}"})

    def chown(self, path: str, uid: int, gid: int) -> None:
        """-1 keeps one."""
        self._at("CHOWN", path, {"uid": uid, "gid": gid})

    def utimens(self, path: str, atime_ns: int | str | None, mtime_ns: int | str | None) -> None:
        """ns since 1970, "now", or None: kept."""
        times = (("atime", atime_ns), ("mtime", mtime_ns))
        self._at("UTIMENS", path, {key: value for key, value in times if value is not None})

    def getxattr(self, path: str, name: str) -> bytes:
        return self._at("GETXATTR", path, {"name": name}).need("value")

    def listxattr(self, path: str) -> list[str]:
        return [os.fsdecode(name) for name in self._at("LISTXATTR", path).all("name")]

    def setxattr(self, path: str, name: str, value: bytes, flags: int = 0) -> None:
        self._at("SETXATTR", path, {"name": name, "value": value, "flags": flags})

    def removexattr(self, path: str, name: str) -> None:
        self._at("REMOVEXATTR", path, {"name": name})

    def statfs(self, path: str = "") -> Statfs:
        values = self._at("STATFS", path)
        return Statfs(*(values.number(name, least=-(1 << 63)) for name in Statfs._fields))

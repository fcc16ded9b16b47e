"""Idmapped mounts: a directory shown with its owners exchanged for others, nothing in it changed. Floor 2, no state.

Only here: a user namespace for its maps alone. A program sleeps in it until this process holds
the namespace; then the mount does. Linux 5.12 or later, root. Thread-safe.

Source: mount_setattr(2), "ID-mapped mounts"; user_namespaces(7), "User and group ID mappings".
"""

from __future__ import annotations

import errno
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine import hostmounts, userids
from engine.errors import Unsupported
from engine.mountspec import ALL_IDS, IdRange, id_ranges
from engine.runtimes.rootless import tool
from engine.runtimes.users import Identity

SECONDS = 10.0  # for the namespace to be made


def exchanged(one: int, other: int) -> tuple[IdRange, ...]:
    """Every id as it is, but these two for each other."""
    low, high = sorted((one, other))
    if low == high:
        return (ALL_IDS,)
    rows = ((0, 0, low), (low, high, 1), (low + 1, low + 1, high - low - 1), (high, low, 1),
            (high + 1, high + 1, ALL_IDS[2] - high - 1))  # fmt: skip
    return tuple(row for row in rows if row[2])


@contextmanager
def _namespace(maps: dict[str, tuple[IdRange, ...]]) -> Iterator[int]:
    """An fd of a user namespace with these maps. OSError when the kernel refuses."""
    program, sleeper = tool("unshare"), tool("cat")
    if program is None or sleeper is None:
        raise OSError(0, "no user namespace: unshare or cat is not installed")
    argv = [program, "--user", sleeper]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        assert child.stdin and child.stdout
        try:
            with suppress(BrokenPipeError):  # it ended, and says why
                os.write(child.stdin.fileno(), b"\n")
            answer = select.poll()
            answer.register(child.stdout, select.POLLIN)
            said = os.read(child.stdout.fileno(), 4096) if answer.poll(SECONDS * 1000) else b"no answer"
            if said != b"\n":  # not cat, which is in the namespace once it answers
                raise OSError(0, f"no user namespace: {said.decode(errors='replace').strip()}")
            for kind, rows in maps.items():
                text = "".join(f"{first} {inside} {count}\n" for first, inside, count in rows)
                Path(f"/proc/{child.pid}/{kind}_map").write_text(text)
            fd = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            child.kill()
            child.stdin.close()
    try:
        yield fd
    finally:
        os.close(fd)


def bind_tree(source: int, target: Path, namespace: int | None, *, shared: bool = False) -> None:
    """Bind what the fd `source` is, and what is mounted below it, over `target`, with owners mapped as the user
    namespace of the fd `namespace` maps them: its inner ids are those on the disk. EINVAL: a file system cannot.

    A slave of the original: taking it down takes down nothing that is mounted below `source`. With `shared` what is
    mounted in it appears in the original, too, where that is a shared mount: make it private before it is taken down.
    """
    tree = hostmounts.open_tree(source)
    try:
        hostmounts.set_attributes(tree, slave=not shared, owners=namespace)
        hostmounts.move_mount(tree, target)
    finally:
        os.close(tree)


def bind(source: int, target: Path, wanted: bool | str, user: Identity, name: str) -> None:
    """Bind what the fd `source` is over `target`, with owners as `wanted` (MountSpec.idmap) says.

    True: the owner of `source` and `user` for each other. Unsupported names `name`, the path people know it by.
    """
    if isinstance(wanted, str):
        maps = {kind: rows or (ALL_IDS,) for kind, rows in id_ranges(wanted).items()}
    else:
        info = os.fstat(source)
        maps = {"uid": exchanged(info.st_uid, user.uid), "gid": exchanged(info.st_gid, user.gid)}
    try:
        if all(rows == (ALL_IDS,) for rows in maps.values()):
            bind_tree(source, target, None)  # works on every file system
        elif userids.rootless() is not None:
            raise OSError(errno.EPERM, "an engine without root may not")
        else:
            with _namespace(maps) as namespace:
                bind_tree(source, target, namespace)
    except OSError as error:
        why = "a file system there cannot" if error.errno == errno.EINVAL else error.strerror
        raise Unsupported(
            f"volumes: idmap: {name}: its owners cannot be mapped: {why}", at=name,
            hint="U instead of idmap changes the owners themselves: it gives the files to the container's user",
        ) from error  # fmt: skip

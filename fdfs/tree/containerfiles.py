"""A container's files: rootfs/, diff/ and changes, on this host or in a running virtual machine. Floor 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.changes import changes_text, hidden_places
from fdfs.entry import BindSource
from fdfs.guest import GuestGraft
from fdfs.loopback import Loopback
from fdfs.tree.caller import caller


def rootfs(engine: Any, name: str) -> Loopback | GuestGraft:
    container = engine.containers.get(name)
    guest = engine.guests.files(container)
    if guest is not None:
        return GuestGraft(guest, "container", writable=True, caller=caller)
    root, mounted = Path(engine.containers.rootfs(name)), engine.mounts.mounted(container.id)
    return Loopback(root, writable=lambda: True, caller=caller, mounted=mounted)


def rootfs_source(engine: Any, name: str) -> BindSource:
    """Only what is mounted already: looking at a container must not mount it. Never a disk that a guest will want."""
    container = engine.containers.get(name)
    mounted = engine.mounts.mounted(container.id) and not engine.mounts.has_disk(container.id)
    return BindSource(directory=str(engine.mounts.merged(container.id)) if mounted else "")


def diff(engine: Any, name: str) -> Loopback | GuestGraft:
    container = engine.containers.get(name)
    guest = engine.guests.files(container)
    if guest is not None:
        return GuestGraft(guest, "upper", writable=False)
    hidden = hidden_places(lambda: engine.trees.open(engine.containers.execution.image_of(container).chain_id))
    return Loopback(Path(engine.containers.upper(name)), writable=lambda: False, overlay_upper=True, hidden=hidden)


def changes(engine: Any, name: str) -> bytes:
    return changes_text(iter(engine.containers.changes(name)))


def changes_size(engine: Any, name: str) -> int:
    """0 while a guest would have to be asked: stat(2) waits for none, and what is open knows its size."""
    return 0 if engine.guests.has(engine.containers.get(name)) else len(changes(engine, name))

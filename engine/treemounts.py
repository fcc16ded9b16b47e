"""The trees of images (EROFS), each mounted once for all that lie on it. Floor 2.

Only here: run/trees/<hex of chain id>, read-only, and who needs each: containers whose overlay lies on it, and who has
only a look. Without root (in a user namespace) EROFS cannot be mounted: it is then the tree written out as plain files,
kept as long as a container lies on it, mounted or not.

Threading: one lock per tree; mounting one never waits for another.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine import host, hostmounts, userids
from engine.errors import Unsupported
from engine.hostmounts import mounted_at
from engine.model import hex_of
from engine.runtimes import selinux
from engine.store.trees import Trees
from engine.unpack import unpack


class TreeMounts:
    def __init__(self, directory: Path, trees: Trees) -> None:
        self._directory = directory
        self._trees = trees
        self._guard = threading.Lock()  # of the locks; never held over I/O
        self._locks: dict[str, threading.RLock] = {}  # by chain id
        self._users: dict[str, set[str]] = {}  # chain id -> ids of containers whose overlay lies on it
        self._looking: Counter[str] = Counter()  # by chain id: who has only a look at the tree
        self.written = userids.rootless() is not None  # trees are plain files, not mounts
        directory.mkdir(parents=True, exist_ok=True)

    def adopt(self, users: Mapping[str, set[str]]) -> None:
        """What an earlier daemon left: `users`, ids of containers by what they lie on. Other trees are taken down."""
        self._users = {chain: set(ids) for chain, ids in users.items()}
        for tree in self._directory.iterdir():
            if tree.name.startswith("."):  # half written
                host.remove_tree(tree)
                continue
            chain = f"sha256:{tree.name}"
            if chain not in self._users:
                self._drop(chain)

    def users(self) -> set[str]:
        """Ids of containers that lie on any."""
        with self._guard:
            return set().union(*self._users.values())

    def locked(self, chain_id: str) -> threading.RLock:
        """Its lock, to be held for what follows."""
        with self._guard:
            return self._locks.setdefault(chain_id, threading.RLock())

    def use(self, chain_id: str, id: str) -> None:
        """Container `id` lies on it. Its lock is held."""
        with self._guard:
            self._users.setdefault(chain_id, set()).add(id)

    def left(self, chain_id: str, id: str) -> None:
        """Container `id` does not lie on it any more."""
        with self.locked(chain_id):
            with self._guard:
                self._users.get(chain_id, set()).discard(id)
            self.leave(chain_id)

    def leave(self, chain_id: str) -> None:
        """Take it down when nothing lies on it. Its lock is held."""
        if not self._users.get(chain_id) and not self._looking[chain_id]:
            with self._guard:
                self._users.pop(chain_id, None)
            self._looking.pop(chain_id, None)
            self._drop(chain_id)

    @contextmanager
    def look(self, chain_id: str) -> Iterator[Path]:
        """The tree, mounted while the block runs."""
        with self.locked(chain_id):
            tree = self.ensure(chain_id)
            self._looking[chain_id] += 1
        try:
            yield tree
        finally:
            # aside: the kernel takes its time, and a machine is about to start
            threading.Thread(target=self._looked, args=(chain_id,), name="unmount", daemon=True).start()

    def _looked(self, chain_id: str) -> None:
        with self.locked(chain_id):
            self._looking[chain_id] -= 1
            if not self.written:
                self.leave(chain_id)

    def ensure(self, chain_id: str) -> Path:
        """The tree, mounted. Its lock is held."""
        target = self._directory / hex_of(chain_id)
        if self.written:
            if not target.is_dir():
                unpack(self._trees.open(chain_id), target)
            return target
        if mounted_at(target):
            return target
        meta, devices = self._trees.meta_path(chain_id), self._trees.devices(chain_id)
        target.mkdir(exist_ok=True)
        try:
            hostmounts.mount_erofs(meta, devices, target, label=selinux.of_images())
        except OSError as error:
            os.rmdir(target)
            if error.errno in (errno.ENODEV, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTBLK, errno.ENOSYS):
                raise Unsupported(
                    f"EROFS: {error.strerror} at {error.filename}",
                    hint="Linux 6.12 or newer, or 5.19 with loop devices and the erofs module (modprobe erofs)",
                ) from error
            raise
        return target

    def _drop(self, chain_id: str) -> None:
        target = self._directory / hex_of(chain_id)
        if self.written:
            return host.remove_tree(target)
        if mounted_at(target):
            hostmounts.unmount(target)
        try:
            os.rmdir(target)
        except FileNotFoundError:
            pass

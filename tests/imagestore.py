"""A store with its catalog of images in a directory, for tests of images: everything real, nothing mounted."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from engine.events import Journal
from engine.images.catalog import Images
from engine.images.gc import Collector
from engine.store.blobs import Blobs
from engine.store.check import check
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.policy import PolicyFile
from engine.store.trees import Trees
from engine.store.usage import Usage


class ImageStore:
    """Open (again) the store at `root`. Leaving the block checks it deeply and closes it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.meta = Meta(root / "db.sqlite")
        self.blobs = Blobs(root, self.meta)
        self.layers = Layers(root, self.meta)
        self.trees = Trees(root, self.meta, self.layers)
        self.journal = Journal(self.meta)
        self.images = Images(self.meta, self.blobs, self.layers, self.trees, self.journal)
        self.policy = PolicyFile(root)
        self.gc = Collector(self.images, self.policy, Usage(root))

    def read(self, digest: str, path: str) -> bytes:
        """A file of the image's merged tree."""
        tree = self.trees.open(self.images.get(digest).chain_id)
        nid = tree.lookup(path.encode())
        return tree.pread(nid, tree.stat(nid).size, 0)

    def events(self) -> list[tuple[str, str]]:
        return [(event.type, event.object) for event in self.journal.replay(0, 1000)]

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                problems = check(self.root, self.meta, deep=True)
                assert problems == []
        finally:
            self.meta.close()

"""A repository as a pull sees it: mirrors first, then the registry itself. Floor 2.

Only here: what counts as a mirror's failure (everything: it is only a help), and that a mirror is given up sooner than
a registry. One that breaks off in a blob is followed by the next, from the byte it came to. Digests are checked as
ever: a mirror can say what a tag names, and nothing else. Threading: as Registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from engine.errors import EngineError
from engine.images import registries
from engine.images.manifests import Descriptor
from engine.images.reference import Reference
from engine.images.registry import Registry
from engine.images.transport import Policy
from engine.jobs import Task


class Mirrored(Registry):
    """The repository `reference`, by the rules of the store's registries.yaml."""

    def __init__(
        self, store: Path, reference: Reference, task: Task, *, insecure: bool = False, policy: Policy | None = None
    ) -> None:
        known = registries.load(store)
        super().__init__(reference, task, insecure=insecure, policy=policy, rules=known.rules(reference.domain))
        policy = policy or Policy()
        hasty = replace(policy, attempts=min(2, policy.attempts), connect=min(5.0, policy.connect), budget=15.0)
        self._stack = ExitStack()
        self._mirrors = []
        for mirror in known.mirrors(reference):
            one = Registry(mirror, task, policy=hasty, rules=known.rules(mirror.domain))
            self._mirrors.append(self._stack.enter_context(one))

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        super().__exit__(*error)

    def _failed(self, mirror: Registry, error: EngineError) -> None:
        self.task.log(f"mirror {mirror.reference.domain}: {error.reason}; the next is asked")

    def manifest(self, name: str) -> tuple[bytes, str, str]:
        for mirror in self._mirrors:
            try:
                return mirror.manifest(name)
            except EngineError as error:
                self._failed(mirror, error)
        return super().manifest(name)

    def blob(self, entry: Descriptor, offset: int) -> Iterator[bytes]:
        for mirror in self._mirrors:
            try:
                for chunk in mirror.blob(entry, offset):
                    offset += len(chunk)
                    yield chunk
            except EngineError as error:
                self._failed(mirror, error)
            else:
                return
        yield from super().blob(entry, offset)

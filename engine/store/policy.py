"""`policy.yaml`: how large the store may grow and what stays in it. Floor 1.

Only here: what the document may say, its units and defaults, and where it lies (`<store>/policy.yaml`, as people wrote
it, comments included). Thread-safe: read anew when the file has changed.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from engine.errors import InvalidArgument
from engine.host import write_atomic
from engine.model import Frozen, Seconds, Size, load_yaml, one_line, parse_text

MAX_KEEP = 1000
Pattern = Annotated[str, Field(min_length=1, max_length=400), BeforeValidator(parse_text)]

DEFAULT = """\
# How large the store may grow. Nothing a container, a kept name or a running job uses is ever evicted.
max_size: 10GiB     # of blobs, layers and trees together, on disk; max: no limit
low_water: 0.8      # eviction goes on until the store is this part of max_size
max_age: 30d        # a tagged image that no container uses may be evicted once unused this long; max: never
events_max_age: 7d  # older events leave the journal; max: never
events_max: 1000000 # so many events stay at most; max: no limit
keep: []            # names or patterns of images that stay: nginx:1.27, ghcr.io/me/*
"""


class Policy(Frozen):
    """`max_size` in bytes, ages in seconds; None is no limit (no eviction; tagged images never; all events stay)."""

    max_size: Size = 10 << 30
    low_water: float = Field(default=0.8, gt=0, le=1)
    max_age: Seconds = 30 * 86400.0
    events_max_age: Seconds = 7 * 86400.0
    events_max: Annotated[int, Field(ge=1, lt=1 << 62)] | None = 1_000_000
    keep: tuple[Pattern, ...] = Field(default=(), max_length=MAX_KEEP)

    @field_validator("max_age", "events_max_age", "events_max", mode="before")
    @classmethod
    def _no_age(cls, value: object) -> object:
        return None if value == "max" else value

    @field_validator("keep", mode="before")
    @classmethod
    def _empty(cls, value: object) -> object:
        return () if value is None else value


def parse_policy(text: str | bytes) -> Policy:
    """The document, whole; InvalidArgument names the line or the field. An empty document is the defaults."""
    value = load_yaml(text, "policy.yaml")
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise InvalidArgument("policy.yaml: a mapping of max_size, low_water, max_age, events_max… is expected")
    try:
        return Policy.model_validate(value)
    except ValidationError as error:
        raise one_line(error, "policy.yaml") from error


class PolicyFile:
    """The policy of the store at `root`."""

    def __init__(self, root: Path) -> None:
        self.path = root / "policy.yaml"
        self._lock = threading.Lock()
        self._known: tuple[tuple[int, int], Policy] | None = None

    def text(self) -> str:
        """As it was written; the defaults with their explanation when nobody has written one."""
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return DEFAULT

    def write(self, content: bytes) -> Policy:
        """Validate, then replace it durably. InvalidArgument changes nothing."""
        policy = parse_policy(content)
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"policy.yaml: not UTF-8 at byte {error.start}") from error
        write_atomic(self.path, content if content.endswith(b"\n") or not content else content + b"\n")
        return policy

    def get(self) -> Policy:
        """What holds now. InvalidArgument for a file damaged behind the daemon's back."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return Policy()
        stamp = (stat.st_mtime_ns, stat.st_ino)
        with self._lock:
            if self._known is None or self._known[0] != stamp:
                self._known = (stamp, parse_policy(self.path.read_bytes()))
            return self._known[1]

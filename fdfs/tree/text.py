"""How values read in files: one value per line, flat-keyed lines, times. Floor 5, pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import InvalidArgument
from engine.events import rfc3339


def line(value: Any) -> str:
    """One value with its newline; empty for None and ''; booleans as 1 and 0."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        value = int(value)
    return f"{value}\n"


def lines(values: Iterable[Any]) -> str:
    return "".join(f"{value}\n" for value in values)


def pairs(text: str) -> dict[str, str]:
    """KEY=VALUE lines, as written to a `labels` file; empty lines say nothing."""
    found = (item.partition("=") for item in text.split("\n") if item.strip())
    return {key.strip(): value for key, _, value in found}


def flat(values: Mapping[str, Any]) -> str:
    """Flat-keyed: `KEY VALUE` lines."""
    return "".join(f"{key} {value}\n" for key, value in values.items())


def stamp(time_ns: int | None) -> str:
    """A time as RFC 3339 with nanoseconds; empty for none."""
    return line(rfc3339(time_ns)) if time_ns else ""


def paths(values: Iterable[bytes]) -> bytes:
    """One path per line; backslash and newline in names written as \\\\ and \\n."""
    return b"".join(value.replace(b"\\", b"\\\\").replace(b"\n", b"\\n") + b"\n" for value in values)


def clear_only(text: str) -> None:
    """The `error` files take an empty line only: it clears them."""
    if text.strip():
        raise InvalidArgument("an empty line clears the errors; nothing else can be written", at=text.strip()[:80])

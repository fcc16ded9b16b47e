"""`-v` and `--mount` of `dutchman run` as entries of config.yaml's `volumes`. Floor 7. Pure but for our directory.

Only here: Docker's words of `--mount` (docker/cli opts/mount.go) and what they are called in the long form.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

import click

from fdfs.cli_mount import absolute

_PLACES: dict[str, tuple[str, ...]] = {
    "type": ("type",), "source": ("source",), "src": ("source",), "target": ("target",), "destination": ("target",),
    "dst": ("target",), "readonly": ("read_only",), "ro": ("read_only",), "consistency": ("consistency",),
    "bind-propagation": ("bind", "propagation"), "bind-create-src": ("bind", "create_host_path"),
    "bind-selinux": ("bind", "selinux"), "volume-nocopy": ("volume", "nocopy"), "volume-subpath": ("volume", "subpath"),
    "tmpfs-size": ("tmpfs", "size"), "tmpfs-mode": ("tmpfs", "mode"), "chown": ("own",), "U": ("own",),
    "idmap": ("idmap",),
}  # fmt: skip
_FLAGS = ("readonly", "ro", "bind-create-src", "volume-nocopy", "chown", "U")


MOUNT_WORDS = "As -v, in words: type=, source=, target=, readonly …; or a directory: where the engine is mounted."


def mount_options(values: Sequence[str]) -> tuple[str | None, list[str]]:
    """What `--mount` was given: the engine's directory, as for every command, and mounts for the container."""
    specs = [text for text in values if text.partition(",")[0].partition("=")[0] in _PLACES]
    directories = [text for text in values if text not in specs]
    return (directories[-1] if directories else None), specs


def short_mount(text: str) -> str:
    """A -v argument with its host path made absolute: the daemon runs elsewhere."""
    source, colon, rest = text.partition(":")
    return f"{absolute(source)}{colon}{rest}" if source[:1] in (".", "~") else text


def long_mount(text: str) -> dict[str, Any]:
    """`type=bind,source=/x,target=/y,readonly` as a mapping. UsageError names the word that is none."""
    out: dict[str, Any] = {}
    for word in next(csv.reader([text]), []):
        key, equals, value = word.partition("=")
        place = _PLACES.get(key)
        if place is None or (not equals and key not in (*_FLAGS, "idmap")):
            raise click.UsageError(f"--mount: {word!r}: one of {', '.join(_PLACES)} expected, as KEY=VALUE")
        here = out
        for part in place[:-1]:
            here = here.setdefault(part, {})
        flag = value in ("", "true", "1") if value in ("", "true", "1", "false", "0") else None
        if key in _FLAGS and flag is None:
            raise click.UsageError(f"--mount: {word!r}: true or false expected")
        here[place[-1]] = flag if key in _FLAGS else value if equals or key != "idmap" else True
    if "idmap" in out:  # an option of either type
        out.setdefault(out.get("type", "volume"), {})["idmap"] = out.pop("idmap")
    if out.get("type") == "bind" and str(out.get("source", ""))[:1] in (".", "~"):
        out["source"] = str(absolute(out["source"]))
    return out

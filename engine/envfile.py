"""Files of environment variables, as `docker run --env-file` reads them. Floor 1, stateless.

Only here: their format. One KEY=VALUE per line; blanks before a line do not count, blanks after it belong to the value;
lines that are empty or start with # are skipped; nothing is unquoted or expanded. KEY alone passes on the engine's own
variable of that name, if it has one. Source: docker/cli pkg/kvfile.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from engine import hostfiles
from engine.errors import InvalidArgument

MAX_FILE = 1 << 20  # bytes


def parse(data: bytes, where: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of one file; later lines win. InvalidArgument names the file and the line."""
    out: dict[str, str] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            line = raw.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"env_file: {where}: line {number}: not UTF-8", at=where) from error
        line = line.lstrip()
        if not line or line.startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not key or any(char.isspace() for char in key) or "\0" in line:
            raise InvalidArgument(
                f"env_file: {where}: line {number}: not the name of a variable: {key[:80]!r}", at=where
            )
        if equals:
            out[key] = value
        elif key in environ:
            out[key] = environ[key]
    return out


def read(paths: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of several files on this host, later files winning. NotFound or InvalidArgument names the path."""
    out: dict[str, str] = {}
    for text in paths:
        out.update(parse(hostfiles.read(text, "env_file", MAX_FILE), text, environ))
    return out

"""What can be said of a container's config before it runs. Floor 3. Pure.

Only here: fields whose meaning another module knows: references, platforms, signals, mounts.
"""

from __future__ import annotations

from pathlib import Path

from engine.attach import check_mounts
from engine.config import ContainerConfig
from engine.errors import InvalidArgument
from engine.images.manifests import parse_platform
from engine.images.reference import parse as parse_reference
from engine.runtimes.base import check_names_of_host, parse_signal
from engine.runtimes.select import NAMES as RUNTIMES
from engine.runtimes.spec import capabilities


def check(config: ContainerConfig) -> None:
    """InvalidArgument names the field."""
    if config.image:
        try:
            parse_reference(config.image)
        except InvalidArgument as error:
            raise InvalidArgument(f"image: {error.reason}", at=error.at or config.image, hint=error.hint) from error
    if config.platform:
        parse_platform(config.platform)
    if config.stop_signal:
        try:
            parse_signal(config.stop_signal)
        except InvalidArgument as error:
            raise InvalidArgument(f"stop_signal: {error.reason}", at=error.at, hint=error.hint) from error
    if config.runtime and config.runtime not in RUNTIMES:
        raise InvalidArgument(
            f"runtime: unknown runtime {config.runtime!r}", at=config.runtime, hint=f"one of {', '.join(RUNTIMES)}"
        )
    check_names_of_host(config.hostname or "", config.domainname or "")
    capabilities(config)
    for path in config.env_file:
        if not Path(path).expanduser().is_absolute():
            raise InvalidArgument(f"env_file: {path}: an absolute path expected", at=path)
    check_mounts(config)

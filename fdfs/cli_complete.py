"""Names a shell completes: containers, images, networks, volumes. Floor 7.

Only here: which argument means which kind of thing. Loaded only while a shell asks (click's `_DUTCHMAN_COMPLETE`), and
silent then, whatever is wrong. One thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial

import click
from click.shell_completion import CompletionItem

from fdfs.cli_images import names_of_images
from fdfs.cli_mount import Failure, Mount

IMAGES = frozenset({"run", "create", "rmi", "tag", "push", "save", "export", "history"})
FILES = frozenset({"load", "import", "cp", "pull", "up", "down"})  # what they take is not there, or a path


def dress(command: click.Command, kind: str = "") -> None:
    """Have the arguments of a command complete. `kind` is the directory of the mount its group is about."""
    if isinstance(command, click.Group):
        for below in command.commands.values():
            dress(below, f"{command.name}s")
        return
    if command.name in FILES:
        return
    for param in command.params:
        if isinstance(param, click.Argument) and param.name not in ("argv", "path", "new", "reference"):
            directory = "containers" if param.name == "container" else kind or _kind(command.name or "")
            setattr(param, "shell_complete", partial(_complete, directory))  # noqa: B010  # click has no other way in


def _kind(name: str) -> str:
    return "images" if name in IMAGES else "containers"


def _complete(kind: str, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    taken = ctx.params.get("names") or ()
    return [CompletionItem(name) for name in _names(kind, ctx) if name.startswith(incomplete) and name not in taken]


def _names(kind: str, ctx: click.Context) -> Iterable[str]:
    find: dict[str, Callable[[Mount], Iterable[str]]] = {"images": names_of_images}
    try:
        where = Mount.find(ctx.params.get("mount") or os.environ.get("DUTCHMAN_MOUNT"))
        return sorted(find[kind](where) if kind in find else where.names(kind))
    except (Failure, OSError):
        return ()

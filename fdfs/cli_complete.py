"""What a shell completes: containers, images, networks, volumes, and paths in a container for `cp`. Floor 7.

Only here: which argument means which kind of thing. Loaded only while a shell asks (click's `_DUTCHMAN_COMPLETE`), and
silent then, whatever is wrong. One thread.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from engine import host
from fdfs.cli_images import names_of_images
from fdfs.cli_mount import Failure, Mount

IMAGES = frozenset({"run", "create", "rmi", "tag", "push", "save", "export", "history"})
FILES = frozenset({"load", "import", "pull", "up", "down"})  # what they take is not there, or a path
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK
MOST = 1000  # paths offered at once
UNSAFE = re.compile(r"[^\w@%+=:,./~-]")  # to a shell


@add_completion_class
class Bash(BashComplete):
    """bash ends words at `:` (COMP_WORDBREAKS), and replaces what comes after the last one only: `web:/et` comes as
    three words. A `part` is what goes on: nothing is put behind it."""

    name = "bash"
    source_template = BashComplete.source_template.replace("read type", "read -r type").replace(
        """            COMPREPLY+=($value)
""",
        """            COMPREPLY+=("$value")
        elif [[ $type == 'part' ]]; then
            COMPREPLY+=("$value")
            compopt -o nospace
""",
    )
    _before = ""  # of the word, what bash keeps

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        for word in (*args, incomplete):
            if words and word and (word == ":" or words[-1].endswith(":")):
                words[-1] += word
            else:
                words.append(word)
        whole = words.pop()
        if whole != incomplete:
            self._before = whole[: whole.rindex(":") + 1]
        return words, whole

    def format_completion(self, item: CompletionItem) -> str:
        value = str(item.value).removeprefix(self._before)
        kind = "part" if item.type == "plain" and value.endswith((":", "/")) else item.type
        return f"{kind},{UNSAFE.sub(lambda found: chr(92) + found[0], value)}"


def dress(command: click.Command, kind: str = "") -> None:
    """Have the arguments of a command complete. `kind` is the directory of the mount its group is about."""
    if isinstance(command, click.Group):
        for below in command.commands.values():
            dress(below, f"{command.name}s")
        return
    if command.name in FILES:
        return
    for param in command.params:
        if command.name == "cp" and isinstance(param, click.Argument):
            setattr(param, "shell_complete", _places)  # noqa: B010
        elif isinstance(param, click.Argument) and param.name not in ("argv", "path", "new", "reference"):
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


# --- cp ---------------------------------------------------------------------------------------------------------------


def _places(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """A container's name, a path in it, or one of the host: what the shell itself completes where no name fits."""
    name, colon, path = incomplete.partition(":")
    if "/" not in name and colon:
        return [CompletionItem(found) for found in _inside(ctx, name, path)]
    names = [] if "/" in name or not name.isprintable() else [f"{word}:" for word in _names("containers", ctx)]
    fitting = [word for word in names if word.startswith(incomplete)]
    if not fitting:
        return [CompletionItem(incomplete, type="file")]
    here = os.open(".", DIRECTORY)
    try:
        return [CompletionItem(word) for word in (*fitting, *_entries(here, incomplete, None))]
    finally:
        os.close(here)


def _inside(ctx: click.Context, name: str, path: str) -> Iterator[str]:
    """NAME:PATH of what is in a container, which may be hostile: its links lead nowhere outside."""
    directory, _, start = path.rpartition("/")
    shown = f"{name}:{directory}/" if directory or path.startswith("/") else f"{name}:/"
    root = below = -1
    try:
        where = Mount.find(ctx.params.get("mount"))
        root = os.open(where.path("containers", where.container(name), "rootfs"), DIRECTORY)
        below = host.open_in_root(root, directory or "/", DIRECTORY)
        yield from (shown + entry for entry in _entries(below, start, (root, directory)))
    except (Failure, OSError):
        return
    finally:
        for fd in (root, below):
            if fd >= 0:
                os.close(fd)


def _entries(here: int, start: str, inside: tuple[int, str] | None) -> list[str]:
    """Names in a directory that begin with `start`, those of directories with a `/`; none a terminal could choke on."""
    found: list[str] = []
    with os.scandir(here) as entries:
        for entry in entries:
            if not entry.name.startswith(start) or not entry.name.isprintable() or len(found) == MOST:
                continue
            if entry.name.startswith(".") and not start:
                continue
            directory = entry.is_dir(follow_symlinks=inside is None)
            if inside is not None and entry.is_symlink():
                directory = _is_directory(inside[0], f"{inside[1]}/{entry.name}")
            found.append(entry.name + "/" if directory else entry.name)
    return sorted(found)


def _is_directory(root: int, path: str) -> bool:
    try:
        fd = host.open_in_root(root, path, getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return False
    try:
        return stat.S_ISDIR(os.fstat(fd).st_mode)
    finally:
        os.close(fd)

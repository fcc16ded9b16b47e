"""`dutchman prune gc`: read a plan, show it, and execute exactly that. Floor 7.

Only here: what people see of a plan and the question. One thread.
"""

from __future__ import annotations

import re
import sys

import click

from fdfs.cli_images import follow
from fdfs.cli_mount import Failure, Mount
from fdfs.cli_options import columns, human, mount_option

SHOWN = 50  # lines of a plan shown before it is cut short


def execute_plan(mount: str | None, verb: str, directory: str, yes: bool) -> None:
    where = Mount.find(mount)
    try:
        *items, total, command = where.read(directory, "plan").split("\n")
    except (OSError, ValueError) as error:
        raise Failure(f"{verb}: {directory}/plan cannot be read: {error}") from None
    if not items:
        click.echo("nothing to delete")
        return
    rows = [line.split(" ", 3) for line in items]
    shown = [(a, b[7:19] if b.startswith("sha256:") else b, human(c), d) for a, b, c, d in rows[:SHOWN]]
    columns(("CLASS", "DIGEST" if directory in ("images", "store") else "NAME", "SIZE", "REASON"), shown)
    if len(rows) > SHOWN:
        click.echo(f"and {len(rows) - SHOWN} more: cat {where.path(directory, 'plan')}")
    found = re.fullmatch(r"total (\d+) (?:objects|volumes|kernels) (\d+) bytes", total)
    freed = human(found[2]) if found else ""
    if not yes:
        if not sys.stdin.isatty():
            raise Failure(f"{verb}: nothing was deleted", "hint: --yes executes the plan without asking")
        if not click.confirm(f"Delete these {len(items)} objects ({freed})?"):
            return
    reply = where.command((directory,), command, what=verb)
    click.echo(follow(where, reply, verb))


@click.command("prune")
@mount_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def prune_command(mount: str | None, yes: bool) -> None:
    """Delete images without a name that no container uses."""
    execute_plan(mount, "prune", "images", yes)


@click.command("gc")
@mount_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def gc_command(mount: str | None, yes: bool) -> None:
    """Delete what no image needs and, when the store is too large, what its policy.yaml lets go."""
    execute_plan(mount, "gc", "store", yes)

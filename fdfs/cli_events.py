"""`dutchman events`: the journal, or one container's part of it. Floor 7; one thread."""

from __future__ import annotations

import re
import sys
import time

import click

from fdfs.cli_mount import Follower, Mount
from fdfs.cli_options import mount_option

PAUSE = 0.1  # seconds between two looks
SEQ = re.compile(rb'\{"seq":(\d+),')


@click.command("events")
@mount_option
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on.")
@click.option("--since", type=click.IntRange(min=0), metavar="SEQ", help="Only events after this sequence number.")
@click.argument("name", required=False)
def events_command(mount: str | None, follow: bool, since: int | None, name: str | None) -> None:
    """What happened, as JSON Lines: of everything, or of the container NAME. For grep and jq."""
    where = Mount.find(mount)
    path = where.path("events") if name is None else where.path("containers", where.container(name), "events")
    follower = Follower(path)
    rest, skipping = b"", since is not None
    while True:
        for chunk in follower.read():
            *lines, rest = (rest + chunk).split(b"\n")
            if skipping:  # they are in order: after the first that is wanted all are
                wanted = next((n for n, line in enumerate(lines) if _seq(line) > (since or 0)), len(lines))
                skipping, lines = wanted == len(lines), lines[wanted:]
            sys.stdout.buffer.write(b"".join(line + b"\n" for line in lines if line))
            sys.stdout.buffer.flush()
        if not follow:
            return
        time.sleep(PAUSE)


def _seq(line: bytes) -> int:
    match = SEQ.match(line)
    return int(match[1]) if match else 0

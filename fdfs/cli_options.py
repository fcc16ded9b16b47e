"""Options several commands share, and plain column output. Floor 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from fdfs.cli_mount import Failure

F = TypeVar("F", bound=Callable[..., Any])


MOUNT_HELP = "The mount (default: $DUTCHMAN_MOUNT, ~/FlyingDutchman)."
STORE_HELP = "Where images and containers are kept (default: $DUTCHMAN_STORE, this platform's place)."


def mount_option(function: F) -> F:
    return click.option("--mount", metavar="DIR", help=MOUNT_HELP)(function)


def store_option(function: F) -> F:
    return click.option("--store", metavar="DIR", help=STORE_HELP)(function)


def network_options(function: F) -> F:
    """Of `run`: each named as its field of config.yaml."""
    for option in reversed(
        (
            click.option("-p", "--publish", "ports", multiple=True, metavar="[IP:][HOST:]PORT[/udp]", help="A port."),
            click.option("--network", "--net", "networks", multiple=True, metavar="NAME", help="Or host, none."),
            click.option("--network-alias", multiple=True, metavar="NAME", help="A further name in its networks."),
            click.option("--dns", multiple=True, metavar="ADDRESS", help="A resolver instead of the host's."),
            click.option(
                "--dns-search", multiple=True, metavar="DOMAIN", help="A search domain instead of the host's."
            ),
            click.option("--dns-option", "dns_options", multiple=True, metavar="OPTION"),
            click.option(
                "--add-host", "extra_hosts", multiple=True, metavar="NAME:ADDRESS", help="A line of /etc/hosts."
            ),
        )
    ):
        function = option(function)
    return function


def each_told(names: Sequence[str], act: Callable[[str], object]) -> int:
    """Do `act` to each and name those it was done to; a Failure is told, and makes the exit code 1."""
    failed = 0
    for name in names:
        try:
            act(name)
            click.echo(name)
        except Failure as failure:
            failed = 1
            click.echo("\n".join((f"dutchman: {failure.reason}", *failure.more)), err=True)
    return failed


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people and for awk: columns two spaces apart, no lines; `-` where there is nothing."""
    table = [list(header), *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def human(size: str) -> str:
    """Bytes in the unit a person would use; the text as it is when it is not a number."""
    if not size.isdigit():
        return size
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"

"""`dutchman volume ls inspect create rm prune clone snapshot export import`: volumes through their files.

Floor 7. Only here: how the command line becomes lines for volumes/ctl. One thread.
"""

from __future__ import annotations

import os
import shlex
from typing import Any

import click

from fdfs.cli_about import inspector, volume
from fdfs.cli_images import follow
from fdfs.cli_mount import Failure, Mount, absolute
from fdfs.cli_options import columns, each_told, human, mount_option
from fdfs.cli_store import execute_plan


@click.group("volume")
def volume_command() -> None:
    """Volumes: directories that outlive containers."""


@volume_command.command("ls")
@mount_option
@click.option("-q", "--quiet", is_flag=True, help="Names only.")
def ls(mount: str | None, quiet: bool) -> None:
    """List volumes."""
    where = Mount.find(mount)
    names = where.names("volumes")
    names = [name for name in names if where.has("volumes", name, "driver")]
    if quiet:
        for name in names:
            click.echo(name)
        return
    rows = []
    for name in names:
        size = human(where.field("volumes", name, "size_bytes"))
        try:
            users = ",".join(sorted(os.listdir(where.path("volumes", name, "used_by"))))
        except FileNotFoundError:
            continue  # removed meanwhile
        rows.append((name, where.field("volumes", name, "driver"), size, users))
    columns(("NAME", "DRIVER", "SIZE", "USED BY"), rows)


volume_command.add_command(inspector(volume, "volumes"))


@volume_command.command("create")
@mount_option
@click.option("-d", "--driver", metavar="NAME", default="local", help="local (default), ext4, or a program.")
@click.option("-o", "--opt", multiple=True, metavar="KEY=VALUE", help="An option for the driver, such as size=1g.")
@click.option("-l", "--label", multiple=True, metavar="KEY=VALUE")
@click.argument("name")
def create(mount: str | None, driver: str, opt: tuple[str, ...], label: tuple[str, ...], name: str) -> None:
    """Make an empty volume."""
    words = [f"driver={driver}", *(f"opt.{item}" for item in opt), *(f"label={item}" for item in label)]
    line = " ".join(["create", shlex.quote(name), *map(shlex.quote, words)])
    Mount.find(mount).command(("volumes",), line, what=f"volume create {name}")
    click.echo(name)


@volume_command.command("rm")
@mount_option
@click.argument("names", nargs=-1, required=True)
def rm(mount: str | None, names: tuple[str, ...]) -> int:
    """Remove volumes no container uses."""
    where = Mount.find(mount)

    def remove(name: str) -> None:
        try:
            os.rmdir(where.path("volumes", name))
        except FileNotFoundError:
            raise Failure(f"there is no volume {name!r}", "hint: dutchman volume ls lists them") from None
        except OSError as error:
            raise where.failure(error, ("volumes", name), ("volumes",), what=f"volume rm {name}") from None

    return each_told(names, remove)


@volume_command.command("prune")
@mount_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def prune(mount: str | None, yes: bool) -> None:
    """Remove every volume that no container uses, named ones too."""
    execute_plan(mount, "prune", "volumes", yes)


def _job(mount: str | None, name: str, line: str, what: str, told: str) -> None:
    where = Mount.find(mount)
    if not where.has("volumes", name, "ctl"):
        raise Failure(f"{what}: no volume named {name}", "hint: dutchman volume ls")
    follow(where, where.command(("volumes", name), line, what=what), what)
    click.echo(told)


@volume_command.command("clone")
@mount_option
@click.option("--snapshot", is_flag=True, help="The new one is to be read only.")
@click.argument("name")
@click.argument("new")
def clone(mount: str | None, snapshot: bool, name: str, new: str) -> None:
    """Make a volume NEW with what is in NAME."""
    _job(mount, name, f"{'snapshot' if snapshot else 'clone'} {shlex.quote(new)}", f"volume clone {name}", new)


@volume_command.command("export")
@mount_option
@click.argument("name")
@click.argument("path", type=click.Path())
def export(mount: str | None, name: str, path: Any) -> None:
    """Write a volume's files to a new tar."""
    _job(mount, name, f"export {shlex.quote(str(absolute(path)))}", f"volume export {name}", str(path))


@volume_command.command("import")
@mount_option
@click.argument("name")
@click.argument("path", type=click.Path(exists=True))
def import_(mount: str | None, name: str, path: Any) -> None:
    """Fill an empty volume from a tar, plain or compressed."""
    _job(mount, name, f"import {shlex.quote(str(absolute(path)))}", f"volume import {name}", name)

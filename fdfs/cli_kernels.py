"""`dutchman kernels ls import default rm prune`: kernels of guests through their files.

Floor 7. Only here: how the command line becomes lines for kernels/ctl. One thread.
"""

from __future__ import annotations

import os
import shlex
from typing import Any

import click

from fdfs.cli_images import follow
from fdfs.cli_mount import Mount, absolute
from fdfs.cli_options import columns, human, mount_option
from fdfs.cli_store import execute_plan


@click.group("kernels")
def kernels_command() -> None:
    """Kernels that virtual machines run."""


@kernels_command.command("ls")
@mount_option
@click.option("-q", "--quiet", is_flag=True, help="Names only.")
def ls(mount: str | None, quiet: bool) -> None:
    """List kernels; the default one has a star."""
    where = Mount.find(mount)
    names = [name for name in where.names("kernels") if name != "default" and where.has("kernels", name, "digest")]
    if quiet:
        for name in names:
            click.echo(name)
        return
    chosen = os.path.basename(os.readlink(where.path("kernels", "default"))) if names else ""
    rows = []
    for name in names:
        version, arch = (where.field("kernels", name, word) for word in ("version", "arch"))
        users = ",".join(where.field("kernels", name, "used_by").split())
        size = human(str(os.stat(where.path("kernels", name, "vmlinux")).st_size))
        rows.append((name + (" *" if name == chosen else ""), version, arch, size, users))
    columns(("NAME", "VERSION", "ARCH", "SIZE", "USED BY"), rows)


@kernels_command.command("import")
@mount_option
@click.option("--digest", metavar="sha256:HEX", help="Refuse the file unless it has this digest.")
@click.option("--arch", metavar="NAME", help="x86_64 or aarch64, instead of this machine's.")
@click.argument("path", type=click.Path(exists=True, dir_okay=False))
@click.argument("name", required=False)
def import_(mount: str | None, digest: str | None, arch: str | None, path: Any, name: str | None) -> None:
    """Take a vmlinux, vmlinuz, Image or Debian's linux-image-….deb as kernel NAME (its version unless given)."""
    words = ["import", str(absolute(path)), *([name] if name else [])]
    words += [f"digest={digest}"] if digest else []
    words += [f"arch={arch}"] if arch else []
    where, what = Mount.find(mount), f"kernels import {path}"
    click.echo(follow(where, where.command(("kernels",), shlex.join(words), what=what), what))


@kernels_command.command("fetch")
@mount_option
@click.option("--digest", metavar="sha256:HEX", required=True, help="Of the asset that is downloaded.")
@click.option("--repo", metavar="OWNER/NAME", help="A GitHub repository, instead of Kata Containers'.")
@click.option("--asset", metavar="NAME", help="An asset, instead of the one that is named as ours or Kata's are.")
@click.option("--member", metavar="PATH", help="The kernel in an archive of several.")
@click.option("--name", metavar="NAME", help="What it is called here, instead of its version.")
@click.option("--arch", metavar="NAME", help="x86_64 or aarch64, instead of this machine's.")
@click.option("--initfs", metavar="sha256:HEX", help="Of an initfs-<arch>.cpio to fetch with it.")
@click.argument("tag")
def fetch(mount: str | None, tag: str, **options: str | None) -> None:
    """Download the kernel of a GitHub release; $DUTCHMAN_GITHUB_TOKEN of the daemon is used where it is set."""
    words = ["fetch", tag, *(f"{key}={value}" for key, value in options.items() if value)]
    where, what = Mount.find(mount), f"kernels fetch {tag}"
    click.echo(follow(where, where.command(("kernels",), shlex.join(words), what=what), what))


@kernels_command.command("default")
@mount_option
@click.argument("name")
def default(mount: str | None, name: str) -> None:
    """Let containers that name no kernel have this one."""
    Mount.find(mount).command(("kernels",), f"default {shlex.quote(name)}", what=f"kernels default {name}")
    click.echo(name)


@kernels_command.command("rm")
@mount_option
@click.argument("names", nargs=-1, required=True)
def rm(mount: str | None, names: tuple[str, ...]) -> int:
    """Remove kernels no container uses."""
    where, failed = Mount.find(mount), 0
    for name in names:
        try:
            os.rmdir(where.path("kernels", name))
            click.echo(name)
        except OSError as error:
            failure = where.failure(error, ("kernels", name), ("kernels",), what=f"kernels rm {name}")
            click.echo("\n".join((f"dutchman: {failure.reason}", *failure.more)), err=True)
            failed = 1
    return failed


@kernels_command.command("prune")
@mount_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def prune(mount: str | None, yes: bool) -> None:
    """Remove every kernel no container uses, but for the default."""
    execute_plan(mount, "prune", "kernels", yes)

"""`dutchman pull load import images rmi tag push save export commit`: images and their jobs.

Floor 7. Only here: how a job is waited for and shown. One thread.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from typing import Any

import click

from fdfs.cli_mount import Failure, Mount, absolute, explain
from fdfs.cli_options import columns, human, mount_option

FIRST, POLL = 0.01, 0.1  # seconds between two looks at a job, growing
AMOUNT = re.compile(r"^(?!total )(\S+) (\d+)/(\d+|\?)")  # LABEL DONE/TOTAL, in bytes
DONE = ("done", "failed", "cancelled")


class _Bars:
    """A job's progress on a terminal: a bar per layer. On anything else, nothing until the end."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bars.start()

    def show(self, progress: str) -> None:
        if self._bars is None:
            return
        for line in progress.splitlines():
            match = AMOUNT.match(line)
            if match is None:
                continue
            label, done, total = match[1], int(match[2]), None if match[3] == "?" else int(match[3])
            if label not in self._tasks:
                self._tasks[label] = self._bars.add_task(label.removeprefix("sha256:")[:20], total=total)
            self._bars.update(self._tasks[label], completed=done, total=total)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()


def follow(mount: Mount, reply: list[str], what: str) -> str:
    """Wait for the job a reply names (`jobs/3`); its last line of progress. Failure when it failed. Ctrl-C cancels."""
    number = next((line.rpartition("/")[2] for line in reply if re.fullmatch(r"jobs/\d+", line.strip())), None)
    if number is None:
        return "\n".join(reply)
    job = ("jobs", number.strip())
    bars, pause = _Bars(), FIRST
    try:
        while (state := mount.field(*job, "state")) not in DONE:
            if not state:
                raise Failure(f"{what}: the job went away", "hint: dutchman status says whether the daemon runs")
            bars.show(mount.field(*job, "progress"))
            time.sleep(pause)
            pause = min(POLL, pause * 1.3)
    except KeyboardInterrupt:
        mount.command(job, "cancel", what="cancel")
        raise
    finally:
        bars.close()
    if state in ("failed", "cancelled"):
        reason, more = explain(mount.field(*job, "error"))
        raise Failure(f"{what}: {reason or state}", *more)
    lines = mount.field(*job, "progress").splitlines()
    return lines[-1] if lines else ""


platform_option = click.option(
    "--platform", metavar="OS/ARCH", help="Another platform than this host's, such as linux/arm64."
)


@click.command("pull")
@mount_option
@platform_option
@click.argument("reference")
def pull_command(mount: str | None, platform: str | None, reference: str) -> None:
    """Fetch an image from a registry."""
    pull(Mount.find(mount), reference, platform)
    click.echo(reference)


def pull(where: Mount, reference: str, platform: str | None = None) -> None:
    """Fetch an image and wait for it, with a bar for each layer. Failure."""
    _get(where, "pull", reference, platform)


def _get(where: Mount, verb: str, source: str, platform: str | None) -> None:
    line = f"{verb} {shlex.quote(source)}" + (f" platform={shlex.quote(platform)}" if platform else "")
    follow(where, where.command(("images",), line, what=f"{verb} {source}"), f"{verb} {source}")


def names_of_images(mount: Mount) -> dict[str, str]:
    """Every name in images/ and the digest directory it refers to."""
    names = {}
    for directory, below, files in os.walk(mount.path("images")):
        if "by-digest" in below:
            below.remove("by-digest")
        for name in (*below, *files):
            path = os.path.join(directory, name)
            if os.path.islink(path):
                names[os.path.relpath(path, mount.path("images"))] = os.path.basename(os.readlink(path))
    return names


def _told(mount: Mount, before: dict[str, str], there: set[str]) -> None:
    """The names that are new, and the digests of what is new and has none."""
    after = names_of_images(mount)
    for name in sorted(name for name, digest in after.items() if before.get(name) != digest):
        click.echo(name)
    for digest in sorted(set(mount.names("images", "by-digest")) - there - set(after.values())):
        click.echo(digest)


@click.command("load")
@mount_option
@platform_option
@click.argument("path", type=click.Path(exists=True))
def load_command(mount: str | None, platform: str | None, path: str) -> None:
    """Take in images from an OCI layout or a docker-archive (as `docker save` writes)."""
    where = Mount.find(mount)
    before = names_of_images(where)
    there = set(where.names("images", "by-digest"))
    _get(where, "load", str(absolute(path)), platform)
    _told(where, before, there)


@click.command("import")
@mount_option
@click.argument("path", type=click.Path(exists=True))
@click.argument("reference")
def import_command(mount: str | None, path: str, reference: str) -> None:
    """Make an image from a tar of a root filesystem."""
    where = Mount.find(mount)
    line = f"import {shlex.quote(str(absolute(path)))} {shlex.quote(reference)}"
    follow(where, where.command(("images",), line, what=f"import {path}"), f"import {path}")
    click.echo(reference)


@click.command("images")
@mount_option
@click.option("-q", "--quiet", is_flag=True, help="Digests only, shortened as in the list.")
def images_command(mount: str | None, quiet: bool) -> None:
    """List images."""
    where = Mount.find(mount)
    named = names_of_images(where)
    rows = []
    for name, digest in sorted(named.items()):
        rows.append((name, digest))
    rows += [("", digest) for digest in where.names("images", "by-digest") if digest not in named.values()]
    if quiet:
        for digest in dict.fromkeys(digest for _, digest in rows):
            click.echo(digest[7:19])
        return
    table = []
    for name, digest in rows:
        image = ("images", "by-digest", digest)
        size = human(where.field(*image, "size_bytes"))
        table.append((name, digest[7:19], where.field(*image, "platform"), size, where.field(*image, "created")[:19]))
    columns(("NAME", "DIGEST", "PLATFORM", "SIZE", "CREATED"), table)


@click.command("rmi")
@mount_option
@click.argument("references", nargs=-1, required=True)
def rmi_command(mount: str | None, references: tuple[str, ...]) -> None:
    """Remove names of images; an image without names goes with its last one."""
    where = Mount.find(mount)
    for reference in references:
        named = names_of_images(where)
        if reference not in named and f"{reference}:latest" in named:
            reference = f"{reference}:latest"
        if reference in named:
            digest, names = named[reference], [name for name in named if named[name] == named[reference]]
        else:
            found = [d for d in where.names("images", "by-digest") if reference and d[7:].startswith(reference)]
            found = found or [d for d in where.names("images", "by-digest") if d == reference]
            if len(found) != 1:
                raise Failure(f"there is no image {reference!r}", "hint: dutchman images lists them")
            digest, names = found[0], []
        image = ("images", "by-digest", digest)
        line = f"untag {shlex.quote(reference)}" if len(names) > 1 else "remove"
        where.command(image, line, what=f"rmi {reference}")
        click.echo(reference)


def image_directory(mount: Mount, text: str) -> tuple[str, ...]:
    """The directory of the image people mean by a name, a digest or its first digits."""
    named = names_of_images(mount)
    digests = mount.names("images", "by-digest")
    digest = named.get(text) or named.get(f"{text}:latest")
    if digest is None:
        found = [one for one in digests if text and (one == text or one[7:].startswith(text))]
        if len(found) != 1:
            raise Failure(f"there is no image {text!r}", "hint: dutchman images lists them")
        digest = found[0]
    return ("images", "by-digest", digest)


@click.command("tag")
@mount_option
@click.argument("image")
@click.argument("reference")
def tag_command(mount: str | None, image: str, reference: str) -> None:
    """Give an image one more name."""
    where = Mount.find(mount)
    where.command(image_directory(where, image), f"tag {shlex.quote(reference)}", what=f"tag {image}")


@click.command("push")
@mount_option
@click.argument("image")
@click.argument("reference", required=False)
def push_command(mount: str | None, image: str, reference: str | None) -> None:
    """Send an image to a registry: to the one its name says, or as REFERENCE."""
    where = Mount.find(mount)
    name = reference or image
    line = f"push {shlex.quote(name)}"
    follow(where, where.command(image_directory(where, image), line, what=f"push {name}"), f"push {name}")
    click.echo(name)


@click.command("save")
@mount_option
@click.option("--format", "form", type=click.Choice(["oci", "docker"]), help="Default: oci with -o, else docker.")
@click.option("-o", "--output", "path", metavar="PATH", help="A new directory (oci) or .tar; default: a tar on stdout.")
@click.argument("image")
def save_command(mount: str | None, form: str | None, path: str | None, image: str) -> None:
    """Write an image to files: an OCI layout, or an archive as docker save writes."""
    where = Mount.find(mount)

    def save(target: str, form: str) -> None:
        line = f"save {shlex.quote(str(absolute(target)))} format={form}"
        follow(where, where.command(image_directory(where, image), line, what=f"save {image}"), f"save {image}")

    if path is not None and path != "-":
        save(path, form or "oci")
        return
    if sys.stdout.isatty():
        raise Failure(f"save {image}: an archive is nothing for a terminal", "hint: -o FILE.tar, or a pipe")
    import shutil
    import tempfile

    # the engine writes whole files; it has another working directory, and may have other namespaces, but this /tmp
    with tempfile.TemporaryDirectory(prefix="dutchman-save-") as place:
        save(f"{place}/image.tar", form or "docker")
        with open(f"{place}/image.tar", "rb") as archive:
            shutil.copyfileobj(archive, sys.stdout.buffer, 1 << 20)
        sys.stdout.buffer.flush()


@click.command("export")
@mount_option
@click.option("-o", "--output", "path", required=True, metavar="PATH", help="A new file.")
@click.argument("image")
def export_command(mount: str | None, path: str, image: str) -> None:
    """Write the root filesystem of an image to a tar."""
    where = Mount.find(mount)
    line = f"export {shlex.quote(str(absolute(path)))}"
    follow(where, where.command(image_directory(where, image), line, what=f"export {image}"), f"export {image}")


@click.command("commit")
@mount_option
@click.option("-a", "--author", default="", metavar="NAME", help="Who made it.")
@click.option("-m", "--message", default="", metavar="TEXT", help="What was done.")
@click.option("-c", "--change", multiple=True, metavar="INSTRUCTION", help="A Dockerfile line; may be given again.")
@click.argument("container")
@click.argument("reference")
def commit_command(
    mount: str | None, author: str, message: str, change: tuple[str, ...], container: str, reference: str
) -> None:
    """Make an image of a container and what it changed."""
    where = Mount.find(mount)
    words = [reference, *(f"{key}={value}" for key, value in (("author", author), ("message", message)) if value)]
    line = shlex.join(("commit", *words, *(f"change={item}" for item in change))).replace("\n", " ")
    follow(where, where.command(("containers", container), line, what=f"commit {container}"), f"commit {container}")
    try:
        click.echo(image_directory(where, reference)[-1])
    except Failure:  # a name that is shown shorter, such as docker.io/library/…
        click.echo(reference)

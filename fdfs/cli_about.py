"""`dutchman version info history inspect`, and `network inspect`, `volume inspect`: what there is, as documents.

Floor 7. Only here: which files make up the document of a thing, and the small language of --format: text with dotted
paths between double braces. A path is looked up in the document as it is printed, whatever the case of its letters;
Docker's usual paths for containers are known too. No other part of Go's templates is. One thread.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import click

from fdfs.cli_images import image_directory
from fdfs.cli_mount import Failure, Mount
from fdfs.cli_options import columns, human, mount_option

Document = dict[str, Any]

FORMAT = (
    "Only this: text with {{.path.to.value}} in it, such as {{.State.Status}}, {{.config.env}} or {{json .config}}. "
    "Paths are those of the whole document, or Docker's usual ones for containers; no other parts of Go's templates."
)
SHOWN = (
    "id", "state", "reason", "image", "pid", "exit_code", "oom", "restarts", "created_at", "started_at",
    "finished_at", "runtime",
)  # fmt: skip
MORE = ("health", "ip", "addresses", "ports")  # of containers, for --format
ALIASES = {  # Docker's paths in lower case -> ours
    "state.status": "state", "state.pid": "pid", "state.exitcode": "exit_code", "state.error": "reason",
    "state.oomkilled": "oom", "state.startedat": "started_at", "state.finishedat": "finished_at",
    "state.health.status": "health", "created": "created_at", "restartcount": "restarts",
    "config.cmd": "config.command", "config.workingdir": "config.workdir", "hostconfig.memory": "config.memory",
    "hostconfig.restartpolicy.name": "config.restart", "hostconfig.binds": "config.volumes",
    "hostconfig.privileged": "config.privileged", "networksettings.ipaddress": "ip",
    "networksettings.networks": "config.networks", "networksettings.ports": "ports",
}  # fmt: skip
WIDE = 80  # characters of an instruction `history` shows unless asked for all
PATH = re.compile(r"\{\{\s*(json\s+)?\.([A-Za-z0-9_.-]*)\s*\}\}")
NUMBERS = re.compile(r"-?\d{1,15}")


# --- documents --------------------------------------------------------------------------------------------------------


def _number(text: str) -> int | str:
    return int(text) if NUMBERS.fullmatch(text) else text


def _pairs(text: str) -> dict[str, str]:
    """KEY=VALUE lines."""
    return dict(line.partition("=")[::2] for line in text.splitlines())


def _flat(text: str) -> Document:
    """KEY VALUE lines."""
    return {key: _number(value.strip()) for key, _, value in (line.partition(" ") for line in text.splitlines())}


def container(where: Mount, name: str) -> Document:
    """NotFound is a Failure. `config` as config.yaml has it."""
    import yaml

    place = ("containers", where.container(name))
    out: Document = {"name": name, **{key: _number(where.field(*place, key)) for key in (*SHOWN, *MORE)}}
    for key in ("addresses", "ports"):
        out[key] = str(out[key]).splitlines()
    out["machine"] = _flat(where.field(*place, "machine"))
    out["config"] = yaml.safe_load(where.read(*place, "config.yaml"))
    return out


def network(where: Mount, name: str) -> Document:
    place = ("networks", name)
    if "/" in name or not where.has(*place, "driver"):
        raise Failure(f"there is no network {name!r}", "hint: dutchman network ls lists them")
    connected = where.path(*place, "containers")
    return {
        "name": name,
        **{key: where.field(*place, key) for key in ("driver", "bridge", "created")},
        "internal": where.field(*place, "internal") == "true",
        "subnets": where.field(*place, "subnet").splitlines(),
        "gateways": where.field(*place, "gateway").splitlines(),
        "labels": _pairs(where.field(*place, "labels")),
        "containers": {
            other: [
                address
                for line in where.field("containers", other, "addresses").splitlines()
                for here, _, address in [line.partition(" ")]
                if here == name
            ]
            for other in sorted(os.listdir(connected))
        },
        "used_by": where.field(*place, "used_by").splitlines(),
    }


def volume(where: Mount, name: str) -> Document:
    place = ("volumes", name)
    if "/" in name or not where.has(*place, "driver"):
        raise Failure(f"there is no volume {name!r}", "hint: dutchman volume ls lists them")
    return {
        "name": name,
        **{key: where.field(*place, key) for key in ("driver", "created")},
        "options": _pairs(where.field(*place, "options")),
        "labels": _pairs(where.field(*place, "labels")),
        "mounted": where.field(*place, "mounted") == "1",
        "mountpoint": str(where.path(*place, "data")),
        "size_bytes": _number(where.field(*place, "size_bytes")),
        "used_by": sorted(os.listdir(where.path(*place, "used_by"))),
    }


def image(where: Mount, name: str) -> Document:
    place = image_directory(where, name)
    return {
        "digest": place[-1],
        "references": where.field(*place, "reference").splitlines(),
        **{key: where.field(*place, key) for key in ("platform", "created", "pulled")},
        "size_bytes": _number(where.field(*place, "size_bytes")),
        "used_by": where.field(*place, "used_by").splitlines(),
        "config": json.loads(where.read(*place, "config.json")),
    }


# --- --format ---------------------------------------------------------------------------------------------------------


def formatted(template: str, document: Mapping[str, Any]) -> str:
    """Failure for a path that leads nowhere, and for anything else between braces."""
    if left := re.search(r"\{\{.*?(?:\}\}|$)", PATH.sub("", template)):
        raise Failure(f"--format: {left[0]!r} is not understood", "hint: only {{.a.path}} and {{json .a.path}} are")
    text = template.replace("\\n", "\n").replace("\\t", "\t")
    return PATH.sub(lambda match: _text(_lookup(document, match[2]), bool(match[1])), text)


def _lookup(document: Mapping[str, Any], path: str) -> Any:
    """A list's item is its number. Failure names the part that is not there, and what is."""
    if "state" in document and "pid" in document:
        path = ALIASES.get(path.lower(), path)
        if path.lower() == "state.running":
            return document["state"] in ("running", "paused")
    here: Any = document
    for part in filter(None, path.split(".")):
        if isinstance(here, Mapping):
            keys = {str(key).lower(): key for key in reversed(list(here))}
            found = part if part in here else keys.get(part.lower())
            if found is not None:
                here = here[found]
                continue
            known = ", ".join(map(str, list(here)[:30]))
        elif isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
            continue
        else:
            known = "nothing"
        raise Failure(f"--format: .{path}: there is no {part!r}", f"hint: there is {known or 'nothing'}")
    return here


def _text(value: Any, as_json: bool) -> str:
    if as_json or isinstance(value, (dict, list, bool)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


def show(documents: list[Document], template: str | None) -> None:
    """As YAML, each after a line of `---`; or by --format, a line for each."""
    import yaml

    for document in documents:
        if template is not None:
            click.echo(formatted(template, document))
        else:
            click.echo("---\n" + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120).rstrip())


# --- commands ---------------------------------------------------------------------------------------------------------


def inspector(find: Callable[[Mount, str], Document], what: str) -> click.Command:
    """The command `inspect` of a group."""

    @click.command("inspect", help=f"Everything about {what}, as YAML.")
    @mount_option
    @click.option("-f", "--format", "template", metavar="TEXT", help=FORMAT)
    @click.argument("names", nargs=-1, required=True)
    def inspect(mount: str | None, template: str | None, names: tuple[str, ...]) -> None:
        where = Mount.find(mount)
        show([find(where, name) for name in names], template)

    return inspect


@click.command("inspect")
@mount_option
@click.option("-f", "--format", "template", metavar="TEXT", help=FORMAT)
@click.argument("names", nargs=-1, required=True)
def inspect_command(mount: str | None, template: str | None, names: tuple[str, ...]) -> None:
    """Everything about containers or images, as YAML: what they are now, and their whole config."""
    where = Mount.find(mount)
    for name in names:
        if not where.has("containers", name, "state"):
            try:
                found = image(where, name)
            except Failure:
                raise Failure(f"there is no container or image {name!r}", "hint: dutchman ps -a, dutchman images") \
                    from None  # fmt: skip
            show([found], template)
            continue
        if template is not None:
            show([container(where, name)], template)
            continue
        place = ("containers", where.container(name))
        config = where.read(*place, "config.yaml")
        click.echo(f"---\nname: {name}")
        for key in SHOWN:
            value = where.field(*place, key)
            click.echo(f"{key}: {value if value.isdigit() and len(value) < 16 else json.dumps(value)}")
        if machine := where.field(*place, "machine"):
            lines = (f"  {key}: {json.dumps(value)}" for key, value in _flat(machine).items())
            click.echo("machine:\n" + "\n".join(lines))
        click.echo("config:\n" + "\n".join(f"  {line}" for line in config.splitlines()))


@click.command("version")
@mount_option
def version_command(mount: str | None) -> None:
    """The versions of this command and of the engine that is up."""
    from importlib.metadata import version

    click.echo(f"client {version('flying-dutchman')}")
    try:
        click.echo(f"engine {Mount.find(mount).read('version')}")
    except Failure as failure:
        click.echo(f"engine - ({failure.reason})")


@click.command("info")
@mount_option
@click.option("-f", "--format", "template", metavar="TEXT", help=FORMAT)
def info_command(mount: str | None, template: str | None) -> None:
    """The engine and what it has: the same as `status`, with this host."""
    where = Mount.find(mount)
    system = os.uname()
    document = _flat(where.read("status"))
    document |= {
        "kernel": system.release,
        "machine": system.machine,
        "cpus": os.cpu_count() or 0,
        "host": system.nodename,
    }
    show([document], template)


@click.command("history")
@mount_option
@click.option("--no-trunc", is_flag=True, help="Whole instructions.")
@click.argument("image_name", metavar="IMAGE")
def history_command(mount: str | None, no_trunc: bool, image_name: str) -> None:
    """How an image was built, the newest step first."""
    where = Mount.find(mount)
    rows = []
    for line in reversed(where.read(*image_directory(where, image_name), "history").splitlines()):
        size, created, text = (*line.split(maxsplit=2), "", "")[:3]
        rows.append((created, human(size), text if no_trunc or len(text) <= WIDE else text[: WIDE - 1] + "…"))
    columns(("CREATED", "SIZE", "CREATED BY"), rows)

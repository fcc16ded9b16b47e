"""`dutchman run create ps start`: containers through their files.

Floor 7. Only here: how a command line becomes a config.yaml, and how the end of a start is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from fdfs.cli_images import pull
from fdfs.cli_limits import fields_of, spec_options
from fdfs.cli_logs import ENDED, POLL, follow
from fdfs.cli_mount import Failure, Mount, explain
from fdfs.cli_mounts import MOUNT_WORDS, long_mount, mount_options, short_mount
from fdfs.cli_options import columns, mount_option, network_options

PATIENCE = 10.0  # seconds of the first kind, for a start
PULL = ("missing", "always", "never")
NO_IMAGE = "no such image"  # the engine's words
ID = re.compile(r"(sha256:)?[0-9a-f]{12,64}")  # what no registry is asked for
NOT_EXECUTED = ("126", "127")  # exit codes of a program that cannot be executed, and of one that is not there
NOT_STARTED = ("125", *NOT_EXECUTED)
ADJECTIVES = ("bold", "brisk", "calm", "deep", "fleet", "grey", "keen", "loud", "quiet", "salty", "sleepy", "swift")
NOUNS = ("anchor", "beacon", "brig", "buoy", "cutter", "dinghy", "galley", "gull", "keel", "lantern", "mast", "skiff")


def _create(mount: Mount, name: str | None, what: str) -> str:
    """mkdir containers/<name>, under a free invented name when none is given."""
    if name is not None and "/" in name:
        raise Failure(f"{what}: {name!r} cannot be a name: no / in it")
    for _ in range(20):
        chosen = name or f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}-{random.randrange(100)}"
        try:
            os.mkdir(mount.path("containers", chosen))
            return chosen
        except FileExistsError as error:
            if name:
                if mount.has("containers", chosen, "state"):
                    more = f"hint: dutchman rm -f {chosen} removes it, dutchman start {chosen} starts it again"
                    raise Failure(f"{what}: the name {chosen} is taken", more) from None
                raise mount.failure(error, ("containers",), what=what) from None
        except OSError as error:
            raise mount.failure(error, ("containers",), what=what) from None
    raise Failure(f"{what}: no free name found", "hint: give one with --name")


# -h is the host name, as Docker has it
@click.command("run", context_settings={"allow_interspersed_args": False, "help_option_names": ["--help"]})
@click.option("--name", help="Its name (default: an invented one).")
@click.option("-d", "--detach", is_flag=True, help="Print the name and return; do not follow the log.")
@click.option("-i", "--interactive", is_flag=True, help="Keep its input open, and pass on this command's.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("--rm", "remove", is_flag=True, help="Remove the container when it has stopped.")
@click.option("-e", "--env", multiple=True, metavar="KEY=VALUE", help="An environment variable.")
@click.option("-v", "--volume", multiple=True, metavar="SRC:DST[:OPTS]", help="A volume or host directory to mount.")
@click.option("--mount", "mounts", multiple=True, metavar="KEY=VALUE,…|DIR", help=MOUNT_WORDS)
@click.option("--volumes-from", multiple=True, metavar="NAME[:ro]", help="Mount what another container mounts.")
@click.option("-w", "--workdir", metavar="DIR", help="Working directory inside.")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Whom to run as.")
@click.option("-h", "--hostname", metavar="NAME")
@click.option("--entrypoint", metavar="WORDS", help="Replaces the image's ENTRYPOINT.")
@click.option("-l", "--label", multiple=True, metavar="KEY=VALUE")
@spec_options
@click.option("--read-only", is_flag=True, help="Mount the root filesystem read-only.")
@click.option("--privileged", is_flag=True, help="All capabilities, no seccomp: as root on this host.")
@click.option("--restart", metavar="POLICY", help="no, on-failure[:n], always or unless-stopped.")
@click.option("--health-cmd", metavar="COMMAND", help="Run by the container's shell; exit code 0 is healthy.")
@click.option("--health-interval", metavar="TIME", help="Between two checks, such as 30s (the default).")
@click.option("--health-timeout", metavar="TIME", help="After which a check has failed (30s).")
@click.option("--health-retries", type=click.IntRange(min=0), metavar="N", help="Failures in a row to unhealthy (3).")
@click.option("--health-start-period", metavar="TIME", help="Time at first in which failures do not count (none).")
@click.option("--health-start-interval", metavar="TIME", help="Between two checks in that time (5s).")
@click.option("--no-healthcheck", is_flag=True, help="Not the image's health check either.")
@network_options
@click.option("--pull", "policy", type=click.Choice(PULL), default="missing", help="Fetch the image first.")
@click.option("--platform", metavar="OS/ARCH", help="Of the image, such as linux/arm64: emulated by runtime vm.")
@click.option("--kernel", metavar="NAME", help="The kernel of its virtual machine, instead of the default.")
@click.option("--runtime", metavar="NAME", help="oci, vm or fake, instead of the engine's default.")
@click.argument("image")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED)
def run_command(
    name: str | None,
    detach: bool,
    interactive: bool,
    tty: bool,
    remove: bool,
    env: tuple[str, ...],
    volume: tuple[str, ...],
    mounts: tuple[str, ...],
    volumes_from: tuple[str, ...],
    label: tuple[str, ...],
    image: str,
    argv: tuple[str, ...],
    policy: str = "never",
    starts: bool = True,
    **fields: Any,
) -> int:
    """Create a container from IMAGE and start it; ARGV (after --) replaces the image's command.

    Without -d its output is followed and its exit code becomes that of this command; Ctrl-C stops it. 127: there is no
    such program; 126: it cannot be executed.
    """
    mount, specs = mount_options(mounts)
    where = Mount.find(mount)
    config: dict[str, Any] = {"image": image}
    if interactive or tty:
        config.update(stdin=interactive, tty=tty)
    if check := _healthcheck(fields):
        config["healthcheck"] = check
    aliases = fields.pop("network_alias")
    if aliases:
        fields["networks"] = {item: {"aliases": aliases} for item in fields["networks"] or ("dutchman",)}
    config.update(fields_of(fields))
    # -e KEY without a value passes on ours, as Docker does
    variables = [
        item if "=" in item else f"{item}={os.environ[item]}" for item in env if "=" in item or item in os.environ
    ]
    for key, value in (
        ("env", variables),
        ("labels", list(label)),
        ("volumes", [*map(short_mount, volume), *map(long_mount, specs)]),
        ("volumes_from", list(volumes_from)),
        ("command", list(argv[1:] if argv[:1] == ("--",) else argv)),
    ):
        if value:
            config[key] = value
    what = f"{'run' if starts else 'create'} {image}"
    if tty and interactive and not detach and not os.isatty(0):
        raise Failure(f"{what}: the input is not a terminal", "hint: leave out -t")
    if policy == "always":
        pull(where, image, config.get("platform"))
    chosen = _create(where, name, what)
    container = ("containers", chosen)
    try:
        where.write(container, "config.yaml", json.dumps(config, ensure_ascii=False).encode(), what=what)
        if starts:
            _start(where, chosen, what, image if policy == "missing" else "", config.get("platform"))
    except Failure as failure:
        ended = where.field(*container, "exit_code")
        with contextlib.suppress(OSError):  # it never ran: nothing is kept of it
            os.rmdir(where.path(*container))
        if ended in NOT_EXECUTED:
            raise Failure(failure.reason, *failure.more, code=int(ended)) from None
        if NO_IMAGE in failure.reason:
            more = [line for line in failure.more if not line.startswith("hint: pull")]  # said in the CLI's own words
            raise Failure(failure.reason, *more, f"hint: dutchman pull {image}") from None
        raise
    if detach:
        click.echo(chosen)
        return 0
    if interactive or tty:
        from fdfs.cli_exec import join

        code = join(where, chosen, fresh=True)
        remove = remove and where.field(*container, "state") in ENDED  # not when it was only detached from
    else:
        code = follow(where, chosen)
    if remove:
        with contextlib.suppress(OSError):
            os.rmdir(where.path(*container))
    return code


def _start(where: Mount, name: str, what: str, missing: str, platform: str | None) -> None:
    """`missing` is the image to pull, of `platform`, if that is what the start is refused for."""
    try:
        where.command(("containers", name), "start", what=what)
        await_start(where, name, what)
    except Failure as failure:
        if not missing or NO_IMAGE not in failure.reason or ID.fullmatch(missing):
            raise
        pull(where, missing, platform)
        _start(where, name, what, "", platform)


@click.pass_context
def _create_only(context: click.Context, /, **given: Any) -> int:
    assert run_command.callback is not None
    code: int = context.invoke(run_command.callback, detach=True, remove=False, starts=False, **given)
    return code


create_command = click.Command(
    "create",
    callback=_create_only,
    params=[option for option in run_command.params if option.name not in ("detach", "remove", "policy")],
    help="Create a container from IMAGE as `run` does, and do not start it.",
    context_settings=run_command.context_settings,
)


def _healthcheck(fields: dict[str, Any]) -> dict[str, Any]:
    """The --health-… options as the config's field; they are taken out of `fields`."""
    check = {
        name: value
        for name in ("interval", "timeout", "retries", "start_period", "start_interval")
        if (value := fields.pop(f"health_{name}")) is not None
    }
    if command := fields.pop("health_cmd"):
        check["test"] = command
    if fields.pop("no_healthcheck"):
        if check:
            raise click.UsageError("--no-healthcheck and --health-… exclude each other")
        check["disable"] = True
    return check


@click.command("ps")
@mount_option
@click.option("-a", "--all", "everything", is_flag=True, help="Also those that do not run.")
@click.option("-q", "--quiet", is_flag=True, help="Names only.")
def ps_command(mount: str | None, everything: bool, quiet: bool) -> None:
    """List containers."""
    rows = []
    for container in Mount.find(mount).containers():
        state, code = container["state"], container["exit_code"]
        if not everything and state in ENDED:
            continue
        shown = f"{state} ({code})" if state == "stopped" and code is not None else state
        if container["health"] != "none":
            shown = f"{state} ({container['health']})"
        elif container["restarting"]:
            shown = f"restarting ({code})"
        pid = "" if state in ENDED else str(container["pid"] or "")
        ports = ", ".join("->".join(reversed(port.split(" "))) for port in container["ports"])
        rows.append((container["name"], container["image"], shown, pid, container["started_at"][:19], ports))
    if quiet:
        for row in rows:
            click.echo(row[0])
        return
    columns(("NAME", "IMAGE", "STATE", "PID", "STARTED", "PORTS"), rows)


def each(mount: str | None, names: tuple[str, ...], line: str, what: str) -> int:
    """One command to several containers; each failure is told, the exit code says whether there was one."""
    where = Mount.find(mount)
    return for_each(where, names, lambda name: where.command(("containers", name), line, what=f"{what} {name}"))


def for_each(where: Mount, names: tuple[str, ...], *acts: Callable[[str], object]) -> int:
    """Do each act to all of them before the next one; those that fail are told and left out, the others named."""
    left, failed = list(names), 0
    for act in acts:
        for name in list(left):
            try:
                act(where.container(name))
                if act is acts[-1]:
                    click.echo(name)
            except Failure as failure:
                failed = 1
                left.remove(name)
                click.echo("\n".join((f"dutchman: {failure.reason}", *failure.more)), err=True)
    return failed


@click.command("start")
@mount_option
@click.argument("names", nargs=-1, required=True)
def start_command(mount: str | None, names: tuple[str, ...]) -> int:
    """Start containers that are created or stopped. Returns when they have started."""
    where = Mount.find(mount)
    before: dict[str, str] = {}

    def ask(name: str) -> None:
        before[name] = where.field("containers", name, "started_at")
        where.command(("containers", name), "start", what=f"start {name}")

    return for_each(where, names, ask, lambda name: await_start(where, name, f"start {name}", before[name]))


@contextlib.contextmanager
def _shown(what: str) -> Iterator[Callable[[str], None]]:
    """On a terminal, while the block lasts: `what`, and what it was told last."""
    if not sys.stderr.isatty():
        yield lambda why: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)) as status:
        yield lambda why: status.update(Text(f"{what} {why}"))


def await_start(where: Mount, name: str, what: str, before: str = "") -> None:
    """`start` returns after five seconds; this waits for the rest, as of a virtual machine on a busy host. Failure with
    the reason when it did not start: `before` was its `started_at`. Says on a terminal what it waits for."""
    container, since = ("containers", name), time.monotonic()
    if (state := where.field(*container, "state")) == "starting":
        with _shown(f"{name} is starting …") as show:
            while (state := where.field(*container, "state")) == "starting":
                show(where.field(*container, "reason"))
                time.sleep(POLL[time.monotonic() - since > PATIENCE])
    if state != "stopped" or where.field(*container, "started_at") != before:
        return
    reason, more = explain(where.field(*container, "error"))
    if reason and where.field(*container, "exit_code") in NOT_STARTED:
        raise Failure(f"{what}: {reason}", *more)

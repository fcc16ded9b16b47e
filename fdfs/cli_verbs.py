"""Short commands on containers: `stop`, `rm`, `restart`, `port`, `update`, `stats` and their like.

Floor 7. Only here: these short commands. One thread.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import click

from fdfs.cli_containers import each, for_each
from fdfs.cli_limits import fields_of, limit_options
from fdfs.cli_logs import ENDED
from fdfs.cli_mount import Failure, Mount, explain
from fdfs.cli_options import columns, human, mount_option

FORCE = 30.0  # seconds `rm -f` goes on killing and removing
PATIENCE, POLL = 10.0, 0.05  # seconds: between stop and start of a restart; between two looks
SAMPLE = 1.0  # seconds over which CPU use is measured


def _await_stop(where: Mount, name: str) -> None:
    """`stop` returns after a second; this waits for the rest of the grace period. Failure when it would not end."""
    while (state := where.field("containers", name, "state")) == "stopping":
        time.sleep(POLL)
    if state in ("running", "paused"):
        reason, more = explain(where.field("containers", name, "error"))
        raise Failure(f"stop {name}: it is {state}" + (f": {reason}" if reason else ""), *more)


@click.command("stop")
@mount_option
@click.option("-t", "--time", "seconds", type=click.IntRange(min=0), help="Seconds of grace before SIGKILL.")
@click.argument("names", nargs=-1, required=True)
def stop_command(mount: str | None, seconds: int | None, names: tuple[str, ...]) -> int:
    """Stop running containers: the stop signal, a grace period, SIGKILL. Returns when they have stopped."""
    line = "stop" if seconds is None else f"stop {seconds}"
    where = Mount.find(mount)
    ask = lambda name: where.command(("containers", name), line, what=f"stop {name}")  # noqa: E731
    return for_each(where, names, ask, lambda name: _await_stop(where, name))


@click.command("rm")
@mount_option
@click.option("-f", "--force", is_flag=True, help="Kill what runs first.")
@click.option("-v", "--volumes", is_flag=True, help="Nothing more: anonymous volumes go with it anyway.")
@click.argument("names", nargs=-1, required=True)
def rm_command(mount: str | None, force: bool, volumes: bool, names: tuple[str, ...]) -> int:
    """Remove containers with everything they wrote."""
    if not force:
        return each(mount, names, "remove", "rm")
    where = Mount.find(mount)
    return for_each(where, names, lambda name: _remove(where, name))


def _remove(where: Mount, name: str) -> None:
    """Kill and remove it, in whatever state it is, also in one that passes."""
    container, until = ("containers", name), time.monotonic() + FORCE
    while True:
        ended = where.field(*container, "state") in ENDED
        if not ended:
            with contextlib.suppress(Failure):  # it may end by itself meanwhile; removing says what is wrong
                where.command(container, "kill", what="rm")
        try:
            where.command(container, "remove", what=f"rm {name}")
            return
        except Failure:
            if ended or time.monotonic() > until:
                raise
        time.sleep(POLL)


@click.command("kill")
@mount_option
@click.option("-s", "--signal", default="KILL", metavar="SIGNAL", help="Another signal than KILL.")
@click.argument("names", nargs=-1, required=True)
def kill_command(mount: str | None, signal: str, names: tuple[str, ...]) -> int:
    """Send a signal to the first process of containers."""
    return each(mount, names, f"kill {signal}", "kill")


@click.command("pause")
@mount_option
@click.argument("names", nargs=-1, required=True)
def pause_command(mount: str | None, names: tuple[str, ...]) -> int:
    """Freeze the processes of containers."""
    return each(mount, names, "pause", "pause")


@click.command("resume")
@mount_option
@click.argument("names", nargs=-1, required=True)
def resume_command(mount: str | None, names: tuple[str, ...]) -> int:
    """Let paused containers go on."""
    return each(mount, names, "resume", "resume")


unpause_command = resume_command


@click.command("restart")
@mount_option
@click.option("-t", "--time", "seconds", type=click.IntRange(min=0), help="Seconds of grace before SIGKILL.")
@click.argument("names", nargs=-1, required=True)
def restart_command(mount: str | None, seconds: int | None, names: tuple[str, ...]) -> int:
    """Stop containers that run, and start them. Returns when they have started."""
    where = Mount.find(mount)
    before: dict[str, str] = {}
    line = "restart" if seconds is None else f"restart {seconds}"

    def ask(name: str) -> None:
        before[name] = where.field("containers", name, "restarts")
        where.command(("containers", name), line, what=f"restart {name}")

    return for_each(where, names, ask, lambda name: _await_restart(where, name, before[name]))


def _await_restart(where: Mount, name: str, before: str) -> None:
    """`restart` returns after a second; this waits for the rest: the count goes up when it starts again."""
    container, between = ("containers", name), time.monotonic() + PATIENCE
    while True:
        state = where.field(*container, "state")  # before the count: running and not counted is a stop that was refused
        if again := where.field(*container, "restarts") != before:
            state = where.field(*container, "state")  # it may have been that of before it was counted
        if state in ("running", "paused", "") or (state == "stopped" and (again or time.monotonic() > between)):
            break
        if state != "stopped":
            between = time.monotonic() + PATIENCE
        time.sleep(POLL)
    if not again or (state == "stopped" and not where.field(*container, "exit_code")):
        reason, more = explain(where.field(*container, "error"))
        raise Failure(f"restart {name}: it is {state or 'gone'}" + (f": {reason}" if reason else ""), *more)


@click.command("port")
@mount_option
@click.argument("name")
def port_command(mount: str | None, name: str) -> None:
    """The published ports of a container, and where they are on this host."""
    where = Mount.find(mount)
    for line in where.field("containers", where.container(name), "ports").splitlines():
        click.echo(line.replace(" ", " -> ", 1))


@click.command("rename")
@mount_option
@click.argument("name")
@click.argument("new")
def rename_command(mount: str | None, name: str, new: str) -> None:
    """Give a container another name; it may run."""
    where = Mount.find(mount)
    where.command(("containers", where.container(name)), f"rename {new}", what=f"rename {name}")


@click.command("update")
@mount_option
@limit_options
@click.option("--restart", metavar="POLICY", help="no, on-failure[:n], always or unless-stopped.")
@click.argument("names", nargs=-1, required=True)
def update_command(mount: str | None, names: tuple[str, ...], **options: Any) -> int:
    """Change limits and the restart policy of containers, at once where they run."""
    import yaml

    where = Mount.find(mount)
    fields = fields_of(options)
    if not fields:
        raise click.UsageError("nothing to change: give a limit, such as --memory 512m")

    def change(name: str) -> None:
        container = ("containers", name)
        config = yaml.safe_load(where.read(*container, "config.yaml")) | fields
        document = json.dumps(config, ensure_ascii=False).encode()
        where.write(container, "config.yaml", document, what=f"update {name}")

    return for_each(where, names, change)


@click.command("wait")
@mount_option
@click.argument("names", nargs=-1, required=True)
def wait_command(mount: str | None, names: tuple[str, ...]) -> None:
    """Wait until containers have stopped; print their exit codes."""
    where = Mount.find(mount)
    for name in names:
        path = ("containers", where.container(name), "wait")
        while not (code := where.read(*path)):  # each read waits about a second
            pass
        click.echo(code)


@click.command("top")
@mount_option
@click.argument("name")
def top_command(mount: str | None, name: str) -> None:
    """The processes of a container: pid on the host and inside, user, CPU time, memory, command."""
    where = Mount.find(mount)
    text = where.read("containers", where.container(name), "top")
    if not text:
        raise Failure(f"top: {name} does not run", f"hint: dutchman start {name}")
    click.echo(text)


@click.command("diff")
@mount_option
@click.argument("name")
def diff_command(mount: str | None, name: str) -> None:
    """What differs from its image: A added, M modified, D deleted."""
    where = Mount.find(mount)
    text = where.read("containers", where.container(name), "changes")
    if text:
        click.echo(text)


@click.command("stats")
@mount_option
@click.option("--no-stream", is_flag=True, expose_value=False, help="Once; it is never more than that.")
@click.argument("names", nargs=-1)
def stats_command(mount: str | None, names: tuple[str, ...]) -> None:
    """What containers use: CPU over a second, memory, network and disk since their start, processes."""
    where = Mount.find(mount)
    running = [container["name"] for container in where.containers() if container["state"] not in ENDED]
    chosen = [where.container(name) for name in names] or running
    before = {name: (time.monotonic(), _stats(where, name)) for name in chosen}
    if chosen:
        time.sleep(SAMPLE)
    rows = []
    for name in chosen:
        now, (then, old) = _stats(where, name), before[name]
        cpu = ""
        if "cpu_usec" in now and "cpu_usec" in old:
            used = int(now["cpu_usec"]) - int(old["cpu_usec"])
            cpu = f"{max(0, used) / (time.monotonic() - then) / 1e4:.1f} %"

        def pair(first: str, second: str, now: dict[str, str] = now) -> str:
            return f"{human(now[first])} / {human(now[second])}" if first in now and second in now else ""

        memory = human(now.get("memory_bytes", ""))
        limit = human(now.get("memory_limit_bytes", ""))
        network = pair("network_received_bytes", "network_sent_bytes")
        disk = pair("io_read_bytes", "io_written_bytes")
        rows.append((name, cpu, memory, limit, network, disk, now.get("pids", "")))
    columns(("NAME", "CPU", "MEMORY", "LIMIT", "NET IN / OUT", "DISK R / W", "PIDS"), rows)


def _stats(where: Mount, name: str) -> dict[str, str]:
    lines = where.field("containers", name, "stats").splitlines()
    return dict(line.split(" ", 1) for line in lines if " " in line)

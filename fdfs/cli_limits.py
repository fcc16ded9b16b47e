"""Options of `run` and `update` that are fields of a container's config: limits, security, devices. Floor 7.

Only here: how they are named on a command line (as Docker names them) and which field each one is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from fdfs.cli_mount import absolute

F = TypeVar("F", bound=Callable[..., Any])

LIMITS = (
    click.option("-m", "--memory", metavar="SIZE", help="Memory limit, such as 512m; max for none."),
    click.option("--memory-swap", metavar="SIZE", help="Memory and swap together; -1 for no limit."),
    click.option("--memory-reservation", metavar="SIZE", help="Kept for it when memory is short."),
    click.option("--cpus", metavar="N", help="CPU limit, such as 1.5."),
    click.option("-c", "--cpu-shares", metavar="N", help="Weight against others; 1024 is usual."),
    click.option("--cpuset-cpus", "cpuset", metavar="LIST", help="The CPUs it may run on, such as 0-3,7."),
    click.option("--pids", "--pids-limit", "pids", metavar="N", help="Limit of processes."),
)
SPEC = (
    click.option("--domainname", metavar="NAME"),
    click.option("--env-file", multiple=True, metavar="FILE", help="KEY=VALUE lines, read at each start."),
    click.option("--group-add", multiple=True, metavar="GROUP", help="A further group, name or number."),
    click.option("--init", is_flag=True, help="A small init as process 1: reaps zombies, passes signals on."),
    click.option("--tmpfs", multiple=True, metavar="PATH[:OPTIONS]", help="A tmpfs, such as /run:size=1m."),
    click.option("--shm-size", metavar="SIZE", help="Size of /dev/shm (64m)."),
    click.option("--ulimit", "ulimits", multiple=True, metavar="NAME=SOFT[:HARD]"),
    click.option("--oom-score-adj", type=click.IntRange(-1000, 1000), metavar="N"),
    click.option("--device", "devices", multiple=True, metavar="HOST[:PATH[:rwm]]", help="A device of this host."),
    click.option("--device-cgroup-rule", "device_cgroup_rules", multiple=True, metavar="RULE"),
    click.option("--cap-add", multiple=True, metavar="CAP"),
    click.option("--cap-drop", multiple=True, metavar="CAP"),
    click.option("--security-opt", multiple=True, metavar="OPTION", help="no-new-privileges, seccomp=FILE, …"),
    click.option("--sysctl", "sysctls", multiple=True, metavar="NAME=VALUE"),
    click.option("--pid", metavar="MODE", help="host: it sees the host's processes."),
    click.option("--ipc", metavar="MODE", help="host: shared memory of the host."),
    click.option("--uts", metavar="MODE", help="host: the host's name."),
    click.option("--stop-signal", metavar="SIGNAL"),
    click.option("--stop-timeout", "stop_grace_period", metavar="SECONDS", help="From the stop signal to SIGKILL."),
    click.option("--storage-opt", multiple=True, metavar="size=SIZE", help="Of what it writes in a virtual machine."),
    click.option(
        "--log-opt", multiple=True, metavar="KEY=VALUE", help="What is kept of its output: max-size, max-file, max-age."
    ),
)


def _applied(function: F, options: tuple[Callable[[F], F], ...]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def limit_options(function: F) -> F:
    return _applied(function, LIMITS)


def spec_options(function: F) -> F:
    return _applied(limit_options(function), SPEC)


def fields_of(options: dict[str, Any]) -> dict[str, Any]:
    """The config fields that were given. Paths of this host become absolute: the daemon runs elsewhere."""
    given = {key: value for key, value in options.items() if value not in (None, False, ())}
    if "env_file" in given:
        given["env_file"] = [str(absolute(path)) for path in given["env_file"]]
    if "security_opt" in given:
        given["security_opt"] = [_security(option) for option in given["security_opt"]]
    for option in given.pop("storage_opt", ()):
        key, _, given["disk_size"] = option.partition("=")
        if key != "size":
            raise click.UsageError(f"--storage-opt {option}: there is size=SIZE, of a virtual machine's disk")
    if "log_opt" in given:
        given |= _kept(dict(option.partition("=")[::2] for option in given.pop("log_opt")))
    return given


def _kept(options: dict[str, str]) -> dict[str, Any]:
    """Docker's options of its json-file driver; a number of files is a total here, for segments differ in size."""
    fields = {"max-size": "log_max_size", "max-total": "log_max_total", "max-age": "log_max_age"}
    if unknown := sorted(options.keys() - fields.keys() - {"max-file"}):
        raise click.UsageError(f"--log-opt {unknown[0]}: not known; there are {', '.join(fields)} and max-file")
    if "max-file" in options:
        from engine.config import ContainerConfig  # takes a while; other commands do without
        from engine.model import parse_size

        try:
            size = parse_size(options.get("max-size", ContainerConfig.model_fields["log_max_size"].default))
            options["max-total"] = str(int(options["max-file"]) * size)
        except (ValueError, TypeError):  # the latter: size is `max`
            raise click.UsageError(
                "--log-opt max-file: a number of files of max-size bytes each, such as max-size=10m and max-file=3"
            ) from None
    return {field: options[key] for key, field in fields.items() if key in options}


def _security(option: str) -> str:
    key, sign, value = option.partition("=")
    if key == "seccomp" and sign and value not in ("unconfined", "builtin"):
        return f"seccomp={absolute(value)}"
    return option

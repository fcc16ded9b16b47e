"""`dutchman network ls inspect create rm connect disconnect`: networks through their files. Floor 7, one thread."""

from __future__ import annotations

import shlex

import click

from fdfs.cli_about import inspector, network
from fdfs.cli_mount import Mount
from fdfs.cli_options import columns, each_told, mount_option


@click.group("network")
def network_command() -> None:
    """Networks that containers share."""


@network_command.command("ls")
@mount_option
@click.option("-q", "--quiet", is_flag=True, help="Names only.")
def ls(mount: str | None, quiet: bool) -> None:
    """List networks."""
    where = Mount.find(mount)
    names = where.names("networks")
    if quiet:
        for name in names:
            click.echo(name)
        return
    rows = []
    for name in names:
        connected = where.path("networks", name, "containers")
        try:
            containers = ",".join(sorted(path.name for path in connected.iterdir()))
        except FileNotFoundError:
            continue  # removed meanwhile
        subnet = where.field("networks", name, "subnet").replace("\n", ",")
        kind = "internal" if where.field("networks", name, "internal") == "true" else ""
        rows.append((name, where.field("networks", name, "driver"), subnet, kind, containers))
    columns(("NAME", "DRIVER", "SUBNET", "ACCESS", "CONTAINERS"), rows)


network_command.add_command(inspector(network, "networks"))


@network_command.command("create")
@mount_option
@click.option("--subnet", multiple=True, metavar="CIDR", help="Its addresses, such as 10.1.2.0/24; one of IPv6 too.")
@click.option("--gateway", metavar="ADDRESS", help="The host's address in it (default: the first).")
@click.option("--internal", is_flag=True, help="No way out.")
@click.option("--ipv6", is_flag=True, help="With IPv6 addresses too.")
@click.option("--label", multiple=True, metavar="KEY=VALUE")
@click.argument("name")
def create(
    mount: str | None,
    subnet: tuple[str, ...],
    gateway: str | None,
    internal: bool,
    ipv6: bool,
    label: tuple[str, ...],
    name: str,
) -> None:
    """Make a network."""
    words = [name, *(f"subnet={item}" for item in subnet), *(f"label={item}" for item in label)]
    words += [f"gateway={gateway}"] if gateway else []
    words += ["internal=true"] if internal else []
    words += ["ipv6=true"] if ipv6 else []
    Mount.find(mount).command(("networks",), _line("create", words), what=f"network create {name}")
    click.echo(name)


@network_command.command("rm")
@mount_option
@click.argument("names", nargs=-1, required=True)
def rm(mount: str | None, names: tuple[str, ...]) -> int:
    """Remove networks no container uses."""
    where = Mount.find(mount)
    return each_told(names, lambda name: where.command(("networks", name), "remove", what=f"network rm {name}"))


@network_command.command("connect")
@mount_option
@click.option("--alias", multiple=True, metavar="NAME", help="A further name of the container there.")
@click.option("--ip", metavar="ADDRESS", help="The address it shall have.")
@click.argument("network")
@click.argument("container")
def connect(mount: str | None, alias: tuple[str, ...], ip: str | None, network: str, container: str) -> None:
    """Put a container into a network, at once when it runs."""
    words = [container, *(f"alias={item}" for item in alias), *([f"ip={ip}"] if ip else [])]
    where = Mount.find(mount)
    where.command(("networks", network), _line("connect", words), what=f"network connect {network}")


@network_command.command("disconnect")
@mount_option
@click.argument("network")
@click.argument("container")
def disconnect(mount: str | None, network: str, container: str) -> None:
    """Take a container out of a network."""
    where = Mount.find(mount)
    where.command(("networks", network), _line("disconnect", [container]), what=f"network disconnect {network}")


def _line(verb: str, words: list[str]) -> str:
    """One line of a ctl."""
    return shlex.join([verb, *words])

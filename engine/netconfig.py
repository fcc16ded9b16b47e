"""The network part of a container's spec: published ports, networks and their options, extra hosts. Floor 0, pure.

Only here: the short forms people write, as frozen models and back. Sources: Docker's `-p` grammar (go-connections nat)
and the Compose specification's `ports`, `networks` and `extra_hosts`. Everything that ends up in a file of a resolver
or in a firewall rule is checked here: names, aliases and addresses hold nothing that could end a line or a word.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping as AnyMapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from engine.model import NAME, Frozen

HOST, NONE = "host", "none"  # what takes the place of networks: the host's own, or loopback alone
HOST_GATEWAY = "host-gateway"  # in extra_hosts: the address at which the container reaches the host
PROTOCOLS = ("tcp", "udp", "sctp")
LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\Z")  # a host name or alias, as lax as Docker
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")
WORD = re.compile(r"[!-~]{1,255}\Z")  # one word of resolv.conf


def is_v6(address: str) -> bool:
    return ":" in address


def parse_address(text: str) -> str:
    """An IP address in its usual spelling, brackets dropped. ValueError otherwise; a zone is no part of it."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if "%" in bare:
        raise ValueError(f"not an IP address: {text[:80]!r}")
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        raise ValueError(f"not an IP address: {text[:80]!r}") from None


# --- ports ------------------------------------------------------------------------------------------------------


class PortSpec(Frozen):
    """Published ports: `[HOSTIP:][HOST[-LAST]:]CONTAINER[-LAST][/tcp|udp|sctp]`, or Compose's long mapping.

    `host` 0: the engine chooses at start. As many host ports as container ports; or a range of host ports for one
    container port: the first free one is taken.
    """

    host_ip: str = ""
    host: Annotated[int, Field(ge=0, le=65535)] = 0
    host_last: Annotated[int, Field(ge=0, le=65535)] = 0
    container: Annotated[int, Field(ge=1, le=65535)]
    container_last: Annotated[int, Field(ge=1, le=65535)]
    protocol: str = "tcp"

    @property
    def count(self) -> int:
        return self.container_last - self.container + 1

    @model_validator(mode="after")
    def _ranges(self) -> PortSpec:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {self.protocol[:40]!r}: one of {', '.join(PROTOCOLS)}")
        if self.container_last < self.container or self.host_last < self.host:
            raise ValueError("a range of ports ends before it begins")
        hosts = self.host_last - self.host + 1
        if self.host and hosts != self.count and self.count != 1:
            raise ValueError(f"{hosts} host ports cannot be published to {self.count} container ports")
        if not self.host and self.host_last:
            raise ValueError("a range of host ports cannot begin with 0")
        return self

    def __str__(self) -> str:
        def between(first: int, last: int) -> str:
            return f"{first}-{last}" if last > first else str(first)

        address = f"[{self.host_ip}]" if is_v6(self.host_ip) else self.host_ip
        text = between(self.container, self.container_last)
        if address or self.host:
            text = f"{between(self.host, self.host_last) if self.host else ''}:{text}"
        if address:
            text = f"{address}:{text}"
        return text if self.protocol == "tcp" else f"{text}/{self.protocol}"


def parse_range(text: str, what: str) -> tuple[int, int]:
    """First and last of `8000` or `8000-9000`. ValueError says what is wrong."""
    first, dash, last = text.partition("-")
    numbers = []
    for part in (first, last) if dash else (first, first):
        if not part.isascii() or not part.isdigit() or len(part) > 9 or int(part) > 65535:
            raise ValueError(f"{what} port: a number up to 65535, or a range of two, expected, not {text[:80]!r}")
        numbers.append(int(part))
    if numbers[1] < numbers[0]:
        raise ValueError(f"{what} port: the range {text[:80]} ends before it begins")
    return numbers[0], numbers[1]


def parse_port(text: str) -> dict[str, Any]:
    """The short form as fields of PortSpec. ValueError says what is wrong."""
    body, _, protocol = text.strip().partition("/")
    *front, container = body.split(":")
    if not container:
        raise ValueError(f"no container port in {text[:80]!r}")
    out: dict[str, Any] = {"protocol": protocol.lower() or "tcp"}
    out["container"], out["container_last"] = parse_range(container, "container")
    if front and front[-1]:
        out["host"], out["host_last"] = parse_range(front[-1], "host")
    address = ":".join(front[:-1])
    if address:
        out["host_ip"] = parse_address(address)
    return out


LONG = {"target", "published", "protocol", "host_ip", "mode", "name", "app_protocol"}  # Compose's long form


def _long_port(item: AnyMapping[str, Any]) -> dict[str, Any]:
    """Compose's mapping as fields of PortSpec; its `mode`, `name` and `app_protocol` mean nothing on one machine."""
    for key in item:
        if key not in LONG:
            raise ValueError(f"unknown key {str(key)[:80]!r}: one of {', '.join(sorted(LONG))}")
    published = item.get("published")
    front = f"{'' if published is None else published}:"
    return parse_port(f"{item.get('host_ip') or ''}:{front}{item.get('target', '')}/{item.get('protocol') or ''}")


def parse_ports(value: Any) -> Any:
    """Lines or a list of short forms and mappings, as PortSpec's fields. ValueError names the item at fault."""
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list | tuple):
        return value
    out: list[Any] = []
    for item in value:
        if isinstance(item, dict) and "container" not in item:
            out.append(_long_port(item))
        elif isinstance(item, str | int) and not isinstance(item, bool):
            out.append(parse_port(str(item)))
        else:
            out.append(item)
    return out


MAX_PORTS = 65535  # of a container, ranges counted whole: each is tried on the host by every start


def _not_too_many(ports: tuple[PortSpec, ...]) -> tuple[PortSpec, ...]:
    if sum(port.count for port in ports) > MAX_PORTS:
        raise ValueError(f"more than {MAX_PORTS} ports")
    return ports


Ports = Annotated[
    tuple[PortSpec, ...], BeforeValidator(parse_ports), Field(max_length=256), AfterValidator(_not_too_many)
]


# --- networks ---------------------------------------------------------------------------------------------------


class Endpoint(Frozen):
    """How a container is in one network: further names there, and addresses it insists on."""

    aliases: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    ipv4_address: str = ""
    ipv6_address: str = ""
    mac_address: str = ""

    @field_validator("aliases")
    @classmethod
    def _aliases(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_alias(item) for item in value)

    @field_validator("ipv4_address", "ipv6_address")
    @classmethod
    def _address(cls, value: str, info: Any) -> str:
        if not value:
            return ""
        address = parse_address(value)
        if is_v6(address) != (info.field_name == "ipv6_address"):
            raise ValueError(f"{value[:80]} is of the other address family")
        return address

    @field_validator("mac_address")
    @classmethod
    def _mac(cls, value: str) -> str:
        mac = value.lower().replace("-", ":")
        if mac and (not MAC.match(mac) or int(mac[:2], 16) & 1):
            raise ValueError(f"not the address of one interface: {value[:80]!r} (02:42:ac:11:00:02, say)")
        return mac


def check_alias(text: str) -> str:
    if not LABEL.match(text):
        raise ValueError(f"not a host name: {text[:80]!r}")
    return text


def parse_networks(value: Any) -> Any:
    """Names (lines, a list) or a mapping of name -> options, as a mapping."""
    if isinstance(value, str):
        value = value.split()
    if isinstance(value, list | tuple):
        if not all(isinstance(item, str) for item in value):
            raise ValueError("names, or a mapping of name to options, expected")
        if len(set(value)) != len(value):
            raise ValueError("a network is named twice")
        value = dict.fromkeys(value)
    if not isinstance(value, dict):
        return value
    for name in value:
        if not isinstance(name, str) or not NAME.match(name):
            raise ValueError(f"not a network's name: {str(name)[:80]!r}")
        options = value[name]
        if isinstance(options, Endpoint):
            options = options.model_dump()
        if name in (HOST, NONE) and (
            len(value) > 1 or (any(options.values()) if isinstance(options, dict) else options)
        ):
            raise ValueError(f"{name} stands alone, without options")
    return {name: {} if item is None else item for name, item in value.items()}


Networks = Annotated[dict[str, Endpoint], BeforeValidator(parse_networks), Field(max_length=64)]


def plain_networks(networks: AnyMapping[str, Endpoint]) -> list[str] | dict[str, Any]:
    """As people write it: names alone where there are no options."""
    if not any(item != Endpoint() for item in networks.values()):
        return list(networks)
    shown = {name: item.model_dump(mode="json", exclude_defaults=True) for name, item in networks.items()}
    return {name: item or None for name, item in shown.items()}


# --- names and resolvers ------------------------------------------------------------------------------------------


def parse_hosts(value: Any) -> Any:
    """`NAME:ADDRESS` or `NAME=ADDRESS[,ADDRESS…]` items, or a mapping, as NAME:ADDRESS texts. ValueError names them."""
    if isinstance(value, str):
        value = value.split()
    if isinstance(value, dict):
        value = [
            f"{name}={item}"
            for name, found in value.items()
            for item in (found if isinstance(found, list | tuple) else [found])
        ]
    if not isinstance(value, list | tuple):
        return value
    out = []
    for item in value:
        if not isinstance(item, str):
            raise ValueError(f"NAME:ADDRESS expected, not {item!r}")
        name, _, addresses = item.partition("=") if "=" in item else item.partition(":")
        if not LABEL.match(name):
            raise ValueError(f"not a host name: {name[:80]!r} in {item[:80]!r}")
        out += [f"{name}:{one if one == HOST_GATEWAY else parse_address(one)}" for one in addresses.split(",")]
    return out


def _addresses(value: Any) -> Any:
    value = value.split() if isinstance(value, str) else value
    return [parse_address(item) if isinstance(item, str) else item for item in value] if _listed(value) else value


def _words(value: Any) -> Any:
    value = value.split() if isinstance(value, str) else value
    for item in value if _listed(value) else ():
        if isinstance(item, str) and not WORD.match(item):
            raise ValueError(f"one word expected, not {item[:80]!r}")
    return value


def _listed(value: Any) -> bool:
    return isinstance(value, list | tuple)


ExtraHosts = Annotated[tuple[str, ...], BeforeValidator(parse_hosts)]
Addresses = Annotated[tuple[str, ...], BeforeValidator(_addresses)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]

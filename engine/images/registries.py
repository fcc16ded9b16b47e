"""registries.yaml: how each registry is reached: mirrors, plain HTTP, certificate authorities. Floor 2.

Only here: the document, beside the catalog in the store, and which registries stand in for another. It is read at each
pull and push, so a change counts from the next one on. Stateless, thread-safe.

    default: {mirrors: []}                     # for registries without an entry of their own
    registries:
      docker.io: {mirrors: [mirror.example.com, 10.0.0.1:5000/hub]}
      10.0.0.1:5000: {insecure: true}          # plain HTTP; a loopback address needs no entry
      registry.example.com: {ca_file: /etc/ssl/example.pem}
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from engine import host
from engine.errors import InvalidArgument
from engine.images.reference import DOMAIN, NAME, Reference
from engine.model import Frozen, load_yaml, one_line

NAME_OF_FILE = "registries.yaml"
MAX_MIRRORS = 8
EMPTY = """\
# How registries are reached; counts from the next pull or push on.
# default:                          # for registries without an entry of their own
#   mirrors: []
# registries:
#   docker.io:
#     mirrors: [mirror.example.com, 10.0.0.1:5000/hub]   # asked first, in order
#   10.0.0.1:5000:
#     insecure: true                # plain HTTP
#   registry.example.com:
#     ca_file: /etc/ssl/example.pem # trusted besides the system's
"""


class Rules(Frozen):
    """How one registry is reached. A mirror is host[:port][/path]; it is reached by the rules of its own entry."""

    mirrors: tuple[str, ...] = Field(default=(), max_length=MAX_MIRRORS)
    insecure: bool = False
    ca_file: str = ""

    @field_validator("mirrors")
    @classmethod
    def _mirrors(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            domain, _, path = item.partition("/")
            if not DOMAIN.fullmatch(domain) or (path and not NAME.fullmatch(f"x.y/{path}")):
                raise ValueError(f"host[:port][/path] expected, not {item[:80]!r}")
        return value

    @field_validator("ca_file")
    @classmethod
    def _ca_file(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("an absolute path expected")
        return value


class Registries(Frozen):
    """The whole document."""

    default: Rules = Rules()
    registries: dict[str, Rules] = Field(default_factory=dict, max_length=1000)

    @field_validator("registries")
    @classmethod
    def _hosts(cls, value: dict[str, Rules]) -> dict[str, Rules]:
        for name in value:
            if not DOMAIN.fullmatch(name):
                raise ValueError(f"host[:port] expected, not {name[:80]!r}")
        return value

    def rules(self, domain: str) -> Rules:
        """How `domain` is reached."""
        return self.registries.get(domain, self.default)

    def mirrors(self, reference: Reference) -> list[Reference]:
        """Where the repository is looked for before its own registry, in order."""
        out = []
        for mirror in self.rules(reference.domain).mirrors:
            domain, _, prefix = mirror.partition("/")
            path = f"{prefix.strip('/')}/{reference.path}" if prefix else reference.path
            if domain != reference.domain or path != reference.path:
                out.append(replace(reference, domain=domain, path=path))
        return out


def parse(text: str | bytes) -> Registries:
    """The document, validated whole. InvalidArgument names the line or the field; TooLarge."""
    data = load_yaml(text, NAME_OF_FILE)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InvalidArgument(f"{NAME_OF_FILE}: a mapping with default and registries expected")
    try:
        return Registries.model_validate(data)
    except ValidationError as error:
        raise one_line(error, NAME_OF_FILE) from error


def text(store: Path) -> str:
    """The document as it was written; an explanation when there is none."""
    try:
        return (store / NAME_OF_FILE).read_text()
    except FileNotFoundError:
        return EMPTY


def load(store: Path) -> Registries:
    """What counts now. InvalidArgument when somebody has broken the file by hand."""
    return parse(text(store))


def write(store: Path, document: bytes) -> None:
    """Replace the document, as written. InvalidArgument, TooLarge; nothing changes then."""
    found = parse(document)
    for name, rules in (("default", found.default), *found.registries.items()):
        if rules.ca_file and not Path(rules.ca_file).is_file():
            raise InvalidArgument(f"{NAME_OF_FILE}: {name}.ca_file: no such file", at=rules.ca_file)
        if rules.ca_file and not re.search(rb"-----BEGIN [A-Z ]*CERTIFICATE-----", Path(rules.ca_file).read_bytes()):
            raise InvalidArgument(f"{NAME_OF_FILE}: {name}.ca_file: no certificate in it", at=rules.ca_file)
    host.write_atomic(store / NAME_OF_FILE, document if not document or document.endswith(b"\n") else document + b"\n")

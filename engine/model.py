"""What crosses the edge, parsed once and frozen: the container spec, image config, descriptors, digests.

Floor 0. Parse with `parse_config` / pydantic's `model_validate`; errors become one line that names the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.errors import InvalidArgument, TooLarge

DIGEST = re.compile(r"^sha256:[0-9a-f]{64}\Z")
NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}\Z")  # container and volume names, as Docker's
MAX_DOCUMENT = 1 << 20  # bytes of a config.yaml
MAX_NODES = 1 << 20  # values in it, once its aliases are written out


def check_digest(text: str) -> str:
    """`text` when it is a well-formed sha256 digest; EINVAL otherwise. Safe to use as a file name afterwards."""
    if not DIGEST.match(text):
        raise InvalidArgument("not a sha256 digest", at=text[:100])
    return text


def hex_of(digest: str) -> str:
    """The 64 hex digits of a checked digest."""
    return check_digest(digest)[7:]


def check_name(text: str, kind: str) -> str:
    if not NAME.match(text):
        raise InvalidArgument(
            f"{kind} names are letters, digits, '_', '.' and '-', start with a letter or digit, at most 128",
            at=text[:140],
        )
    return text


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


def parse_size(value: Any) -> Any:
    """Bytes from 1024-based human sizes as Docker takes them: 512m, 1.5g, 64KiB, 4096, `max` (None)."""
    if value is None or value == "max":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a size is a number of bytes or a text such as 512m")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(?:i?b)?\s*", str(value).lower())
    if not match:
        raise ValueError(f"not a size: {value!r} (a number of bytes, or 512m, 1.5g, max)")
    return int(float(match[1]) * UNITS[match[2]]) if "." in match[1] else int(match[1]) * UNITS[match[2]]


def parse_seconds(value: Any) -> Any:
    """Seconds from a number or a duration such as 10s, 1m30s, 500ms, 7d."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    text = str(value).strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|us|d|h|m|s)", text)
    if not parts or "".join(a + b for a, b in parts) != text:
        raise ValueError(f"not a duration: {text!r} (seconds, or 10s, 1m30s, 500ms)")
    unit = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    return sum(float(a) * unit[b] for a, b in parts)


def parse_mapping(value: Any) -> Any:
    """KEY=VALUE lines (text or list) or a mapping, as a mapping of strings; KEY alone means an empty value."""
    if isinstance(value, str):
        value = [line for line in value.splitlines() if line]
    if isinstance(value, list):
        out: dict[str, str] = {}
        for item in value:
            if not isinstance(item, str):
                raise ValueError(f"KEY=VALUE expected, not {item!r}")
            key, _, rest = item.partition("=")
            if not key:
                raise ValueError(f"KEY=VALUE expected, not {item!r}")
            out[key] = rest
        return out
    if isinstance(value, dict):
        plain: dict[Any, Any] = {}
        for key, item in value.items():
            if isinstance(item, bool):
                plain[key] = "true" if item else "false"
            elif isinstance(item, int | float):
                plain[key] = str(item)
            else:
                plain[key] = "" if item is None else item
        return plain
    return value


def parse_argv(value: Any) -> Any:
    """A list of arguments; a text is split as a POSIX shell would split words (never run by one)."""
    if isinstance(value, str):
        import shlex

        return shlex.split(value)
    return value


Size = Annotated[Annotated[int, Field(ge=0, lt=1 << 63)] | None, BeforeValidator(parse_size)]
Seconds = Annotated[Annotated[float, Field(ge=0, le=1e9)] | None, BeforeValidator(parse_seconds)]
Mapping = Annotated[dict[str, str], BeforeValidator(parse_mapping)]
Argv = Annotated[tuple[str, ...] | None, BeforeValidator(parse_argv)]


def parse_text(value: Any) -> Any:
    """YAML reads `user: 1000` as a number; a text field takes it as written."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(parse_text)]


class MountKind(StrEnum):
    VOLUME = "volume"
    BIND = "bind"
    TMPFS = "tmpfs"


class MountSpec(Frozen):
    """One mount: short form `source:target[:ro|rw]` (a source starting with / . or ~ is a bind) or a mapping."""

    type: MountKind = MountKind.VOLUME
    source: str = ""
    target: str
    read_only: bool = False

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        path = PurePosixPath(value)
        if not path.is_absolute() or ".." in path.parts or str(path) == "/" or "\0" in value:
            raise ValueError("must be an absolute path inside the container, without '..', and not /")
        return str(path)

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        if value.startswith("~") and value[1:2] not in ("", "/"):
            raise ValueError("only ~/ is expanded, not another user's home")
        return value


def parse_mounts(value: Any) -> Any:
    if isinstance(value, str):
        value = [line for line in value.splitlines() if line]
    if not isinstance(value, list | tuple):
        return value
    out: list[Any] = []
    for item in value:
        if not isinstance(item, str):
            out.append(item)
            continue
        parts = item.split(":")
        if len(parts) not in (2, 3) or not all(parts) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
            raise ValueError(f"source:target[:ro|rw] expected, not {item!r}")
        kind = MountKind.BIND if parts[0][0] in "/.~" else MountKind.VOLUME
        read_only = len(parts) == 3 and parts[2] == "ro"
        out.append({"type": kind, "source": parts[0], "target": parts[1], "read_only": read_only})
    return out


class SeccompMode(StrEnum):
    DEFAULT = "default"
    UNCONFINED = "unconfined"


class ContainerConfig(Frozen):
    """The whole spec of a container: `config.yaml`, and one file per field under `config/`.

    Unset fields (None, empty) take the image's value where the image has one, Docker's default otherwise.
    """

    image: Text = ""
    command: Argv = Field(None, description="arguments; replaces the image's CMD")
    entrypoint: Argv = Field(None, description="replaces the image's ENTRYPOINT (and drops its CMD)")
    env: Mapping = Field(default_factory=dict, description="KEY=VALUE lines, added to the image's")
    workdir: str | None = None
    user: Text | None = Field(None, description="user[:group], names or numbers")
    hostname: Text | None = Field(None, description="default: the first 12 digits of the id")
    labels: Mapping = Field(default_factory=dict)
    stop_signal: Text | None = Field(None, description="default: the image's, else SIGTERM")
    stop_grace_period: Seconds = Field(10.0, description="seconds between the stop signal and SIGKILL")
    tty: bool = False
    read_only: bool = Field(False, description="mount the root filesystem read-only")
    memory: Size = Field(None, description="limit in bytes; max for none")
    cpus: Annotated[float, Field(gt=0, le=4096)] | None = None
    pids: Annotated[int, Field(gt=0)] | None = None
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    privileged: bool = False
    seccomp: SeccompMode = SeccompMode.DEFAULT
    volumes: Annotated[tuple[MountSpec, ...], BeforeValidator(parse_mounts)] = ()
    runtime: Text = Field("", description="oci or fake; empty: the engine's default")
    log_max_size: Size = Field(16 << 20, description="bytes of a log segment before it is rotated")
    log_max_age: Seconds = Field(86400.0, description="seconds before a log segment is rotated")

    @field_validator("workdir")
    @classmethod
    def _workdir(cls, value: str | None) -> str | None:
        if value and not value.startswith("/"):
            raise ValueError("must be an absolute path")
        return value or None

    @field_validator("env", "labels")
    @classmethod
    def _no_nul(cls, value: dict[str, str]) -> dict[str, str]:
        for key, item in value.items():
            if "\0" in key or "\0" in item or "=" in key or not key:
                raise ValueError(f"bad key {key!r}")
        return value

    @model_validator(mode="after")
    def _plain_texts(self) -> ContainerConfig:
        """What can neither be stored nor handed to a process or the kernel is refused where it is written."""
        for name, value in self.model_dump().items():
            for text in _texts(value):
                if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
                    raise ValueError(f"{name}: contains a NUL or half a surrogate pair")
        return self


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _expanded(node: Any, sizes: dict[int, int]) -> int:
    """Nodes that `node` stands for once every alias in it is written out; the memo makes this linear."""
    known = sizes.get(id(node))
    if known is not None:
        return known
    sizes[id(node)] = MAX_NODES  # met again below itself, it has no end
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_expanded(item, sizes) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_expanded(key, sizes) + _expanded(item, sizes) for key, item in node.value)
    sizes[id(node)] = min(total, MAX_NODES)
    return sizes[id(node)]


def load_yaml(text: str | bytes, document: str) -> Any:
    """Plain data from YAML. E2BIG above 1 MiB; EINVAL says what else is wrong: also aliases that stand
    for more than could be written."""
    if len(text) > MAX_DOCUMENT:
        raise TooLarge(f"{document} is larger than {MAX_DOCUMENT} bytes")
    try:
        loader = yaml.SafeLoader(text.decode() if isinstance(text, bytes) else text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _expanded(node, {}) >= MAX_NODES:
                raise InvalidArgument(f"{document}: its aliases stand for more than {MAX_NODES} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise InvalidArgument(f"{document}: nested too deeply") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # PyYAML's constructors let Python's own errors through: `2024-13-45`, `!!bool x`, 5000 digits
        raise InvalidArgument(f"{document}: not YAML: {' '.join(str(error).split())[:300]}") from error


def one_line(error: ValidationError, document: str) -> InvalidArgument:
    """The first fault of a pydantic error as one line that names the field."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-")) or document
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return InvalidArgument(f"{document}: {where}: {message}{more}", at=where)


def parse_config(text: str | bytes) -> ContainerConfig:
    """A config.yaml, validated whole. EINVAL names the line or the field; E2BIG above 1 MiB."""
    data = load_yaml(text, "config.yaml")
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InvalidArgument("config.yaml: a mapping of fields expected")
    try:
        return ContainerConfig.model_validate(data)
    except ValidationError as error:
        raise one_line(error, "config.yaml") from error


class ImageRuntime(BaseModel):
    """The `config` object of an OCI image configuration (image-spec config.md); unknown keys are kept out."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)
    user: str = Field("", alias="User")
    env: tuple[str, ...] | None = Field(None, alias="Env")
    entrypoint: tuple[str, ...] | None = Field(None, alias="Entrypoint")
    cmd: tuple[str, ...] | None = Field(None, alias="Cmd")
    working_dir: str = Field("", alias="WorkingDir")
    labels: dict[str, str] | None = Field(None, alias="Labels")
    stop_signal: str = Field("", alias="StopSignal")
    volumes: dict[str, Any] | None = Field(None, alias="Volumes")
    exposed_ports: dict[str, Any] | None = Field(None, alias="ExposedPorts")


class History(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    created: str = ""
    created_by: str = ""
    comment: str = ""
    author: str = ""
    empty_layer: bool = False


class RootFs(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    type: str = "layers"
    diff_ids: tuple[str, ...] = ()


class ImageConfig(BaseModel):
    """An OCI image configuration, the part the engine acts on; the raw bytes stay in the blob store."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)
    architecture: str = ""
    os: str = ""
    variant: str = ""
    created: str | None = None
    author: str = ""
    config: ImageRuntime | None = None
    rootfs: RootFs = Field(default_factory=lambda: RootFs())
    history: tuple[History, ...] | None = None

    @property
    def runtime(self) -> ImageRuntime:
        return self.config or ImageRuntime()  # type: ignore[call-arg]


def canonical_json(value: Any) -> bytes:
    """Compact JSON with sorted keys, as the store writes documents it makes itself."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

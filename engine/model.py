"""What crosses the edge, parsed once and frozen: names, digests, sizes, YAML documents, image configs.

Floor 0. Parse with pydantic's `model_validate`; errors become one line that names the field. The container's own spec
is in config.py.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engine.errors import InvalidArgument, TooLarge

DIGEST = re.compile(r"^sha256:[0-9a-f]{64}\Z")
NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}\Z")  # container and volume names, as Docker's
MAX_DOCUMENT = 1 << 20  # bytes of a config.yaml
MAX_NODES = 1 << 20  # values in it, once its aliases are written out
_NUMBERS = {  # what counts as a number: YAML 1.1 but for base 60
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)\Z"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))\Z"
        r"|\.(?:nan|NaN|NAN)\Z"
    ),
}


def check_digest(text: str) -> str:
    """`text` when it is a well-formed sha256 digest; EINVAL otherwise. Safe to use as a file name afterwards."""
    if not DIGEST.match(text):
        raise InvalidArgument("not a sha256 digest", at=text[:100])
    return text


def hex_of(digest: str) -> str:
    """The 64 hex digits of a checked digest."""
    return check_digest(digest)[7:]


TAKEN = frozenset({"ctl", "error", "plan", "list.jsonl"})  # files beside containers, volumes and networks in the mount


def check_name(text: str, kind: str) -> str:
    if text in TAKEN:
        raise InvalidArgument(f"{text} is a file beside every {kind} and cannot be the name of one", at=text)
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


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as its users know it from Docker: numbers of base 60 are none, so the port `22:22` stays a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in rows]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str | bytes, document: str) -> Any:
    """Plain data from YAML. E2BIG above 1 MiB; EINVAL says what else is wrong: also aliases that stand
    for more than could be written."""
    if len(text) > MAX_DOCUMENT:
        raise TooLarge(f"{document} is larger than {MAX_DOCUMENT} bytes")
    try:
        loader = _Loader(text.decode() if isinstance(text, bytes) else text)
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
    told = f"{where}: " if first["loc"] else ""  # else the message itself names the field
    return InvalidArgument(f"{document}: {told}{message}{more}", at=where)


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
    healthcheck: dict[str, Any] | None = Field(None, alias="Healthcheck")  # Docker's; see upkeep.check_of
    shell: tuple[str, ...] | None = Field(None, alias="Shell")
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

"""A container's config as files: `config.yaml` whole, and `config/<field>` one value each. Floor 1.

Only here: how each field reads and is written back (`parse_field(f, field_text(f, v)) == v`, tested). Pure.

    text, number, duration      the value; `max` is no limit; empty is the default
    flag                        true or false
    command, entrypoint         one argument per line; a single line is split into words as a shell would; a JSON list
                                where an argument holds a newline. Empty: the image's; [] is none at all
    env, labels, sysctls        KEY=VALUE lines; a JSON object where a value holds a newline; ulimits likewise
    cap_add, devices, tmpfs …   one per line
    memory_swap                 as a limit, but empty is the default and `max` no limit
    healthcheck                 YAML: a mapping of test, interval, timeout, start_period…
    ports, dns …, extra_hosts   one per line, ports in their short form
    networks                    names, one per line; YAML (name: {aliases: …}) where one has options
    volumes                     YAML: a list of source:target[:ro], or of mappings
"""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml
from pydantic import ValidationError

from engine.config import ContainerConfig
from engine.errors import InvalidArgument, NotFound, TooLarge
from engine.model import MAX_DOCUMENT, NAME, Frozen, load_yaml, one_line
from engine.netconfig import plain_networks
from engine.options import UNLIMITED

FIELDS = tuple(ContainerConfig.model_fields)
ARGV = frozenset({"command", "entrypoint"})
PAIRS = frozenset({"env", "labels", "sysctls", "ulimits"})
LISTS = frozenset(
    {
        "cap_add",
        "cap_drop",
        "env_file",
        "group_add",
        "security_opt",
        "devices",
        "device_cgroup_rules",
        "tmpfs",
        "volumes_from",
    }
    | {"ports", "dns", "dns_search", "dns_options", "extra_hosts"}
)
FLAGS = frozenset({"tty", "stdin", "init", "read_only", "privileged", "fast_start"})
LIMITS = frozenset(
    {"memory", "memory_reservation", "cpus", "pids", "shm_size", "disk_size", "oom_score_adj"}
    | {"stop_grace_period", "log_max_size", "log_max_total", "log_max_age"}
)

# what its driver changes while a container runs or is paused: updates.py
RESOURCES = frozenset({"memory", "memory_swap", "memory_reservation", "cpus", "cpu_shares", "cpuset", "pids"})
# what may change at any time: read anew each time they matter
LIVE = frozenset(
    {"labels", "restart", "stop_signal", "stop_grace_period", "log_max_size", "log_max_total", "log_max_age"}
)


def check_field(field: str) -> str:
    if field not in ContainerConfig.model_fields:
        raise NotFound(f"no config field {field[:80]!r}", at=field[:80], hint=f"one of {', '.join(FIELDS)}")
    return field


def field_text(field: str, config: ContainerConfig) -> str:
    """The file: newline-terminated; empty when unset."""
    value = getattr(config, check_field(field))
    if field in ARGV:
        return argv_text(value)
    if field in PAIRS:
        return _pairs_text(value)
    if field in LISTS:
        return "".join(f"{item}\n" for item in value)
    if field == "volumes":
        return yaml.safe_dump([item.plain() for item in value], sort_keys=False) if value else ""
    if field == "healthcheck":
        return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True) if value is not None else ""
    if field == "networks":
        shown = plain_networks(value)
        named = isinstance(shown, list)
        return "".join(f"{name}\n" for name in shown) if named else yaml.safe_dump(shown, sort_keys=False)
    if field in FLAGS:
        return "true\n" if value else "false\n"
    if field == "memory_swap":  # unset and unlimited are two things here
        return "" if value is None else "max\n" if value == UNLIMITED else f"{value}\n"
    if field in LIMITS:
        return "max\n" if value is None else f"{_number(value)}\n"
    return f"{value}\n" if value else ""


def parse_field(field: str, text: str) -> Any:
    """What the model's validation of `field` takes. None stands for the field's default; EINVAL names the field."""
    check_field(field)
    if len(text) > MAX_DOCUMENT:
        raise TooLarge(f"{field}: larger than {MAX_DOCUMENT} bytes")
    if "\0" in text:
        raise InvalidArgument(f"{field}: contains a NUL byte", at=field)
    if field in ARGV:
        return _parse_argv(field, text)
    if field in PAIRS:
        return _parse_pairs(field, text)
    if field in LISTS:
        return [line.strip() for line in text.split("\n") if line.strip()]
    if field == "volumes":
        value = load_yaml(text, "volumes")
        return text.strip() if isinstance(value, str) else value
    if field == "healthcheck":
        return load_yaml(text, field)
    if field == "networks":
        names = text.split()
        return names if all(NAME.match(name) for name in names) else load_yaml(text, "networks")
    value = text.strip()
    if "\n" in value:
        raise InvalidArgument(f"{field}: one value expected, not several lines", at=value.split("\n")[1][:80] or field)
    if field in FLAGS and value:
        if value not in ("true", "false", "1", "0"):
            raise InvalidArgument(f"{field}: true or false expected, not {value[:80]!r}", at=value[:80])
        return value in ("true", "1")
    if field in LIMITS and value == "max":
        return _MAX
    return value or None


_MAX = object()  # `max`: no limit, as opposed to the default


def with_field(config: ContainerConfig, field: str, text: str) -> ContainerConfig:
    """`config` with one field as written to its file; validated whole."""
    value = parse_field(field, text)
    data = config.model_dump()
    if value is None:
        data.pop(field)
    else:
        data[field] = None if value is _MAX else value
    return validated(data, f"config/{field}")


def validated(data: dict[str, Any], document: str = "config") -> ContainerConfig:
    try:
        return ContainerConfig.model_validate(data)
    except ValidationError as error:
        raise one_line(error, document) from error


def config_text(config: ContainerConfig) -> str:
    """config.yaml: every field in the order of the model, so that what can be set is seen."""
    data = config.model_dump(mode="json")
    data["volumes"] = [item.plain() for item in config.volumes]
    data["ports"], data["networks"] = [str(item) for item in config.ports], plain_networks(config.networks)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    if any(char in text for char in "\x85\u2028\u2029\ufeff"):  # YAML reads these as line breaks, or drops them
        text = yaml.safe_dump(data, sort_keys=False, width=1000)
    return text


def _plain(value: Frozen) -> dict[str, Any]:
    """Only what was set."""
    return {key: item for key, item in value.model_dump(mode="json").items() if item not in (None, [], False)}


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def argv_text(value: tuple[str, ...] | None) -> str:
    """One argument per line where that can be read back, else a JSON list."""
    if value is None:
        return ""
    plain = all(item and "\n" not in item and item == item.strip() for item in value) and value
    if plain and not value[0].startswith("[") and (len(value) > 1 or shlex.quote(value[0]) == value[0]):
        return "".join(f"{item}\n" for item in value)
    return json.dumps(list(value), ensure_ascii=False) + "\n"


def _parse_argv(field: str, text: str) -> list[str] | None:
    body = text.strip("\n")
    if not body.strip():
        return None
    if body.lstrip().startswith("["):
        try:
            value = json.loads(body)
        except ValueError:
            value = None  # `[` is also a command: [ -f /x ]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    lines = body.split("\n")
    if len(lines) > 1:
        return lines
    try:
        return shlex.split(body)
    except ValueError as error:
        raise InvalidArgument(f"{field}: {error}", at=body[:80]) from error


def _pairs_text(value: dict[str, str]) -> str:
    keys = list(value)
    if any("\n" in key + item or key != key.strip() for key, item in value.items()) or (keys[:1] and keys[0][0] == "{"):
        return json.dumps(value, ensure_ascii=False) + "\n"
    return "".join(f"{key}={item}\n" for key, item in value.items())


def _parse_pairs(field: str, text: str) -> dict[str, str]:
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"{field}: not JSON: {error}", at=field) from error
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise InvalidArgument(f"{field}: a JSON object of texts expected", at=field)
        return value
    out: dict[str, str] = {}
    for line in text.split("\n"):
        if not line.strip():
            continue
        key, equals, item = line.partition("=")
        if not key.strip() or not (equals or field == "labels"):
            raise InvalidArgument(f"{field}: KEY=VALUE expected, not {line[:80]!r}", at=line[:80])
        out[key.strip()] = item
    return out

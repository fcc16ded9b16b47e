"""config/<field>: what is read can be written back, for every field and any value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ContainerConfig, parse_config
from engine.errors import InvalidArgument, NotFound
from engine.fields import FIELDS, config_text, field_text, validated, with_field

WORD = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12)
LINE = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp", "Zs")), min_size=1, max_size=12)
KEY = LINE.filter(lambda key: "=" not in key)
PATH = st.from_regex(r"/[a-z0-9.]{1,8}(/[a-z]{1,5}){0,2}", fullmatch=True).filter(lambda path: ".." not in path)
MOUNT = st.one_of(
    st.fixed_dictionaries({"type": st.just("volume"), "source": st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True),
                           "target": PATH, "read_only": st.booleans()}),
    st.fixed_dictionaries({"type": st.just("bind"), "source": PATH, "target": PATH, "read_only": st.booleans()}),
    st.fixed_dictionaries({"type": st.just("tmpfs"), "target": PATH}),
)  # fmt: skip
ARGV = st.none() | st.lists(WORD, max_size=5)
SECONDS = st.none() | st.floats(0, 1e6, allow_nan=False).map(lambda value: round(value, 3))
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "image": st.sampled_from(["nginx:1.27", "ghcr.io/o/r@sha256:" + "a" * 64]),
        "command": ARGV, "entrypoint": ARGV,
        "env": st.dictionaries(KEY, WORD, max_size=4), "labels": st.dictionaries(KEY, WORD, max_size=4),
        "workdir": PATH, "user": st.sampled_from(["1000:1000", "nobody"]), "hostname": st.just("web"),
        "stop_signal": st.just("SIGINT"), "stop_grace_period": SECONDS, "log_max_age": SECONDS,
        "tty": st.booleans(), "read_only": st.booleans(), "privileged": st.booleans(),
        "memory": st.none() | st.integers(0, 1 << 50), "log_max_size": st.none() | st.integers(0, 1 << 40),
        "cpus": st.none() | st.sampled_from([0.5, 1.0, 2.25]), "pids": st.none() | st.integers(1, 1 << 20),
        "cap_add": st.lists(st.sampled_from(["NET_ADMIN", "ALL"]), max_size=2),
        "seccomp": st.sampled_from(["default", "unconfined"]),
        "volumes": st.lists(MOUNT, max_size=3), "runtime": st.sampled_from(["", "oci", "fake"]),
    },
)  # fmt: skip


@given(CONFIGS)
def test_every_field_written_back_as_read_changes_nothing(data: dict[str, object]) -> None:
    config = validated(dict(data))
    for field in FIELDS:
        text = field_text(field, config)
        assert text == "" or text.endswith("\n")
        assert with_field(config, field, text) == config, (field, text)
        assert getattr(with_field(ContainerConfig(), field, text), field) == getattr(config, field), (field, text)
    assert parse_config(config_text(config)) == config


@given(st.sampled_from(FIELDS), st.text(max_size=40))
def test_whatever_is_written_is_taken_or_refused_by_name(field: str, text: str) -> None:
    try:
        with_field(ContainerConfig(), field, text)
    except InvalidArgument as error:
        assert field in error.reason


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("command", "sleep 100\n", ("sleep", "100")),
        ("command", "sh -c 'echo a b'", ("sh", "-c", "echo a b")),
        ("command", "sh\n-c\necho a b\n", ("sh", "-c", "echo a b")),
        ("command", '["a\\nb"]\n', ("a\nb",)),
        ("command", "[ -f /x ]", ("[", "-f", "/x", "]")),
        ("command", "\n", None),
        ("entrypoint", "[]", ()),
        ("env", "A=1\nB=x=y\nC=\n", {"A": "1", "B": "x=y", "C": ""}),
        ("labels", "solo\n", {"solo": ""}),
        ("memory", "512m\n", 512 << 20),
        ("memory", "max\n", None),
        ("stop_grace_period", "1m30s\n", 90.0),
        ("stop_grace_period", "\n", 10.0),
        ("cpus", "1.5", 1.5),
        ("tty", "true\n", True),
        ("cap_add", "NET_ADMIN\nSYS_TIME\n", ("NET_ADMIN", "SYS_TIME")),
        ("user", "1000\n", "1000"),
    ],
)
def test_what_people_write(field: str, text: str, value: object) -> None:
    assert getattr(with_field(ContainerConfig(), field, text), field) == value


def test_volumes_are_yaml_or_plain_lines() -> None:
    for text in ("- data:/d\n- /h:/h:ro\n", "[data:/d, '/h:/h:ro']"):
        config = with_field(ContainerConfig(), "volumes", text)
        assert field_text("volumes", config) == "- data:/d\n- /h:/h:ro\n"
    assert len(with_field(ContainerConfig(), "volumes", "data:/d\n").volumes) == 1


def test_an_unknown_field_is_not_there() -> None:
    with pytest.raises(NotFound, match="colour"):
        field_text("colour", ContainerConfig())

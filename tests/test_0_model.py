"""What crosses the edge: sizes, durations, names, config.yaml. A bad document names its field, in one line."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import model
from engine.config import ContainerConfig, parse_config
from engine.errors import InvalidArgument, TooLarge
from engine.model import ImageConfig


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        ("4096", 4096),
        ("512m", 512 << 20),
        ("1.5g", 3 << 29),
        ("64KiB", 64 << 10),
        ("2 GB", 2 << 30),
        ("max", None),
    ],
)
def test_sizes(text: Any, size: int | None) -> None:
    assert parse_config(f"memory: {text}").memory == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10.0), ("10s", 10.0), ("1m30s", 90.0), ("500ms", 0.5), ("7d", 604800.0), ("0", 0.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_config(f"stop_grace_period: {text}").stop_grace_period == pytest.approx(seconds)


BAD = [
    ("memory: lots", "memory"),
    ("memory: -1", "memory"),
    ("memory: true", "memory"),
    ("cpus: 0", "cpus"),
    ("pids: many", "pids"),
    ("stop_grace_period: soon", "stop_grace_period"),
    ("colour: red", "colour"),
    ("image: [a]", "image"),
    ("env: 5", "env"),
    ("env: ['=x']", "env"),
    ("volumes: [data]", "volumes"),
    ("volumes: ['a:relative']", "volumes"),
    ("volumes: ['a:/x/../y']", "volumes"),
    ("volumes: ['a:/']", "volumes"),
    ("volumes: [{target: /x, colour: red}]", "volumes"),
    ("workdir: srv", "workdir"),
    ("seccomp: maybe", "seccomp"),
    ("tty: perhaps", "tty"),
    ("- a list", "mapping"),
    ("just text", "mapping"),
    ("a: [", "YAML"),
    ("a: &a [*a]", "a"),
    ("\x01", "YAML"),
]


@pytest.mark.parametrize(("text", "names"), BAD)
def test_a_bad_document_is_refused_in_one_line_that_names_the_field(text: str, names: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_config(text)
    assert names in caught.value.reason
    assert "\n" not in caught.value.reason


def test_documents_are_bounded() -> None:
    with pytest.raises(TooLarge):
        parse_config("#" * (model.MAX_DOCUMENT + 1))
    with pytest.raises(InvalidArgument):
        parse_config("[" * 5000)


def test_not_utf8_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        parse_config(b"image: \xff")


def test_an_empty_document_is_every_default() -> None:
    assert parse_config("") == ContainerConfig()


def test_command_is_split_but_never_run_by_a_shell() -> None:
    assert parse_config("command: sh -c 'echo $HOME; ls'").command == ("sh", "-c", "echo $HOME; ls")


def test_env_takes_lists_mappings_and_lines() -> None:
    expected = {"A": "1", "B": "x=y", "C": ""}
    assert parse_config("env: [A=1, B=x=y, C]").env == expected
    assert parse_config("env: {A: 1, B: x=y, C: }").env == expected
    assert parse_config('env: "A=1\\nB=x=y\\nC\\n"').env == expected


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "a\n", "ä", "a" * 129, ".hidden", "a\0"])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidArgument):
        model.check_name(name, "container")


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:" + "g" * 64, "sha256:" + "a" * 63, "sha512:" + "a" * 64])
def test_bad_digests(text: str) -> None:
    with pytest.raises(InvalidArgument):
        model.check_digest(text)
    with pytest.raises(InvalidArgument):
        model.check_digest("sha256:" + "a" * 64 + "/..")


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_no_text_makes_the_parser_crash(text: str | bytes) -> None:
    try:
        parse_config(text)
    except InvalidArgument as error:
        assert error.reason


@given(st.dictionaries(st.sampled_from(sorted(ContainerConfig.model_fields)), st.none() | st.integers() | st.text()))
def test_no_document_makes_the_parser_crash(document: dict[str, Any]) -> None:
    try:
        parsed = parse_config(model.canonical_json(document))
    except InvalidArgument as error:
        assert "\n" not in error.reason
    else:
        assert ContainerConfig.model_validate(parsed.model_dump()) == parsed


def test_image_configs_keep_what_is_known() -> None:
    image = ImageConfig.model_validate({"os": "linux", "config": {"Cmd": ["a"], "Unknown": 1}, "more": []})
    assert image.runtime.cmd == ("a",)
    assert ImageConfig().runtime.entrypoint is None


def _bomb(line: str, levels: int = 40) -> str:
    return "z0: &a0 {k: v}\n" + "".join(line.format(i=i, j=i - 1) for i in range(1, levels))


@pytest.mark.parametrize(
    "text",
    [
        _bomb("z{i}: &a{i} {{<<: [*a{j}, *a{j}]}}\n"),
        _bomb("z{i}: &a{i} [*a{j}, *a{j}]\n") + "stop_grace_period: *a39\n",
        _bomb("z{i}: &a{i} [*a{j}, *a{j}]\n") + "env: [*a39]\n",
        "labels: &a [*a]\n",
    ],
)
def test_aliases_that_stand_for_too_much_are_refused_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidArgument, match="aliases"):
        parse_config(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("pids: " + "9" * 5000, "not YAML"),
        ("image: 2024-13-45", "not YAML"),
        ("tty: !!bool x", "not YAML"),
        ("image: !!timestamp x", "not YAML"),
        ('labels: {a: "\\ud800"}', "labels: contains"),
        ('command: ["a\\0b"]', "command: contains"),
        ('volumes: ["/a\\0b:/x"]', "volumes: contains"),
        ('volumes: ["~nobody/x:/x"]', "only ~/"),
        ("stop_grace_period: .inf", "stop_grace_period"),
        ("stop_grace_period: 1.0e+300", "stop_grace_period"),
        ("memory: 99999999999999999999", "memory"),
        ("[" * 5000, "nested"),
    ],
)
def test_what_would_fail_later_is_refused_where_it_is_written(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        parse_config(text)


def test_ordinary_aliases_and_merges_are_taken() -> None:
    config = parse_config("env: &e {a: b}\nlabels:\n  <<: *e\n  c: d\n")
    assert config.labels == {"a": "b", "c": "d"}


def test_a_port_pair_is_a_text_not_a_number_of_base_60() -> None:
    found = model.load_yaml("[22:22, 1:30.5, 12:30:45, 10, 0x1f, 010, 1.5, .inf]", "x")
    assert found == ["22:22", "1:30.5", "12:30:45", 10, 31, 8, 1.5, float("inf")]
    assert [str(port.host) for port in parse_config("ports: [22:22]").ports] == ["22"]

"""policy.yaml: units, defaults, one-line refusals that change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import InvalidArgument, TooLarge
from engine.store.policy import DEFAULT, Policy, PolicyFile, parse_policy


def test_the_default_text_says_what_holds_without_a_file(tmp_path: Path) -> None:
    file = PolicyFile(tmp_path)
    assert file.text() == DEFAULT
    assert file.get() == parse_policy(DEFAULT) == Policy() == parse_policy("")
    assert (Policy().max_size, Policy().low_water, Policy().max_age) == (10 << 30, 0.8, 30 * 86400)


def test_units_and_no_limit() -> None:
    policy = parse_policy("max_size: 1.5g\nmax_age: 12h\nlow_water: 1\nkeep: [nginx:1.27, 'ghcr.io/me/*']\n")
    assert (policy.max_size, policy.max_age, policy.low_water) == (3 << 29, 43200, 1)
    assert policy.keep == ("nginx:1.27", "ghcr.io/me/*")
    assert parse_policy("max_size: max\nmax_age: max\nkeep:\n") == Policy(max_size=None, max_age=None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_size: lots", "max_size"),
        ("max_size: -1", "max_size"),
        ("max_age: soon", "max_age"),
        ("low_water: 0", "low_water"),
        ("low_water: 1.1", "low_water"),
        ("keep: nginx", "keep"),
        ("keep: [{}]", "keep"),
        ("keep: ['']", "keep"),
        ("maxsize: 1g", "maxsize"),
        ("- max_size", "mapping"),
        ("max_size: [", "not YAML"),
        ("\x00", "not YAML"),
    ],
)
def test_a_bad_document_changes_nothing_and_names_the_fault(tmp_path: Path, text: str, named: str) -> None:
    file = PolicyFile(tmp_path)
    file.write(b"max_size: 1g")
    with pytest.raises(InvalidArgument) as caught:
        file.write(text.encode())
    assert named in caught.value.reason and "\n" not in caught.value.reason
    assert file.get().max_size == 1 << 30


def test_comments_stay_and_a_new_daemon_reads_it(tmp_path: Path) -> None:
    PolicyFile(tmp_path).write(b"# mine\nmax_size: 2g\n")
    again = PolicyFile(tmp_path)
    assert again.text() == "# mine\nmax_size: 2g\n" and again.get().max_size == 2 << 30
    again.write(b"max_size: 3g\n")
    assert again.get().max_size == 3 << 30


def test_a_huge_document_is_refused() -> None:
    with pytest.raises(TooLarge):
        parse_policy(b"#" * (2 << 20))

"""The reference grammar against the tables of the reference implementation, and its normal and familiar forms."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.images import reference as ref

TABLES = Path(__file__).parents[2] / "shared" / "fixtures" / "tables" / "image-reference.json"


def _rows() -> list[Any]:
    if not TABLES.exists():
        return []
    out = []
    for table in json.loads(TABLES.read_text())["tables"]:
        if table["test"] == "TestMatch":
            continue  # patterns: nothing here takes any
        for number, row in enumerate(table["rows"]):
            if isinstance(row, dict) and "$key" in row:
                continue  # test-case metadata, not a case
            name = f"{table['test']}-{table['line']}-{number}"
            out.append(pytest.param(table["test"], table["line"], row, id=name))
    return out


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key, "")
    return str(value)


def _refused(call: Any, text: str) -> None:
    with pytest.raises(InvalidArgument):
        call(text)


def check_validate_name(line: int, row: str) -> None:
    if line == 12:
        ref.parse(row)
    else:
        _refused(ref.parse, row)


def check_validate_remote(line: int, row: str) -> None:
    if line == 79:
        ref.parse(row)
    else:
        _refused(ref.parse, row)


def check_repository_info(_: int, row: dict[str, str]) -> None:
    for text in filter(None, (row["AmbiguousName"], row["FamiliarName"], row["FullName"])):
        parsed = ref.parse(text)
        assert (parsed.domain, parsed.path) == (row["Domain"], row["RemoteName"])
        assert parsed.name == row["FullName"]
        assert parsed.familiar_name() == row["FamiliarName"]


def check_any(_: int, row: dict[str, str]) -> None:
    parsed = ref.parse_any(row["Reference"])
    assert str(parsed) == row["Equivalent"]
    assert bool(parsed.path) is not row["Equivalent"].startswith("sha256:")


def check_split(_: int, row: dict[str, str]) -> None:
    parsed = ref.parse(row["input"])
    assert (parsed.domain, parsed.path) == (row["domain"], row["path"])


def check_docker(_: int, row: dict[str, str]) -> None:
    assert ref.parse(row["input"]).normalised() == row["expected"]


REASONS = {
    "ErrNameEmpty": "at least one component",
    "ErrReferenceInvalidFormat": "invalid reference format",
    "ErrNameContainsUppercase": "lowercase",
    "ErrNameTooLong": "255",
    "digest.ErrDigestInvalidLength": "invalid digest length",
    "digest.ErrDigestUnsupported": "unsupported digest algorithm",
    "ErrNameNotCanonical": "canonical",
}


def check_parse(_: int, row: dict[str, Any]) -> None:
    if "err" in row:
        with pytest.raises(InvalidArgument) as caught:
            ref.parse_exact(_text(row, "input"))
        assert REASONS[row["err"]["$go"]] in caught.value.reason
        return
    parsed = ref.parse_exact(row["input"])
    assert parsed.name == row["repository"]
    assert (parsed.domain, parsed.tag, parsed.digest) == (
        _text(row, "domain"),
        _text(row, "tag"),
        _text(row, "digest"),
    )
    assert str(parsed) == row["input"]


def check_with_name_fails(_: int, row: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ref.with_name(row["input"])
    assert REASONS[row["err"]["$go"]] in caught.value.reason


def check_domain_and_path(_: int, row: dict[str, str]) -> None:
    parsed = ref.with_name(row["input"])
    assert (parsed.domain, parsed.path) == (row["domain"], row["path"])


def check_serialization(_: int, row: dict[str, Any]) -> None:
    if "err" in row:
        _refused(ref.parse_exact, _text(row, "input"))
        return
    parsed = ref.parse_exact(row["input"])
    assert (parsed.name, parsed.tag, parsed.digest) == (row["name"], _text(row, "tag"), _text(row, "digest"))
    assert str(parsed) == row["input"]


def check_with_tag(_: int, row: dict[str, str]) -> None:
    named = ref.with_name(row["name"])
    assert str(replace(named, tag=row["tag"], digest=row.get("digest", ""))) == row["combined"]


def check_with_digest(_: int, row: dict[str, str]) -> None:
    named = ref.with_name(row["name"])
    assert str(replace(named, tag=row.get("tag", ""), digest=row["digest"])) == row["combined"]


def _canonical(text: str) -> ref.Reference:
    parsed = ref.parse(text)
    if str(parsed) != text:
        raise InvalidArgument("not canonical")
    return parsed


def check_canonical(_: int, row: dict[str, Any]) -> None:
    if "err" in row:
        with pytest.raises(InvalidArgument) as caught:
            _canonical(row["input"])
        assert REASONS[row["err"]["$go"]] in caught.value.reason
        return
    parsed = _canonical(row["input"])
    assert (parsed.domain, parsed.path) == (row["domain"], row["path"])


def check_domain(_: int, row: dict[str, Any]) -> None:
    assert bool(ref.DOMAIN.fullmatch(row["input"])) is row["match"]


def check_full_name(_: int, row: dict[str, Any]) -> None:
    match = ref.NAME.fullmatch(row["input"])
    assert bool(match) is row["match"]
    if match and "subs" in row:
        assert [match[1] or "", match[2]] == row["subs"]


def check_reference(_: int, row: dict[str, Any]) -> None:
    match = ref.REFERENCE.fullmatch(row["input"])
    assert bool(match) is row["match"]
    if match:
        assert [part or "" for part in match.groups()] == row["subs"]


def check_identifier(_: int, row: dict[str, Any]) -> None:
    assert bool(ref.IDENTIFIER.fullmatch(row["input"])) is row["match"]


CHECKS = {
    "TestValidateReferenceName": check_validate_name,
    "TestValidateRemoteName": check_validate_remote,
    "TestParseRepositoryInfo": check_repository_info,
    "TestParseAnyReference": check_any,
    "TestNormalizedSplitHostname": check_split,
    "TestParseDockerRef": check_docker,
    "TestReferenceParse": check_parse,
    "TestWithNameFailure": check_with_name_fails,
    "TestDomainAndPath": check_domain_and_path,
    "TestSerialization": check_serialization,
    "TestWithTag": check_with_tag,
    "TestWithDigest": check_with_digest,
    "TestParseNamed": check_canonical,
    "TestDomainRegexp": check_domain,
    "TestFullNameRegexp": check_full_name,
    "TestReferenceRegexp": check_reference,
    "TestIdentifierRegexp": check_identifier,
}


@pytest.mark.parametrize(("test", "line", "row"), _rows())
def test_as_the_reference_implementation(test: str, line: int, row: Any) -> None:
    CHECKS[test](line, row)


def test_the_tables_are_there() -> None:
    if not TABLES.exists() and not os.environ.get("CI"):
        pytest.skip("the fixtures are not there")
    assert {param.values[0] for param in _rows()} == set(CHECKS)


def test_familiar_and_normalised_forms() -> None:
    assert ref.parse("nginx:1.27").familiar() == "nginx:1.27"
    assert ref.parse("nginx").normalised() == "docker.io/library/nginx:latest"
    assert ref.parse("ghcr.io/o/r:tag").familiar() == "ghcr.io/o/r:tag"


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        parsed = ref.parse_any(text)
    except InvalidArgument:
        return
    assert ref.parse_any(str(parsed)) == parsed
    assert ref.parse_any(parsed.familiar()) == parsed

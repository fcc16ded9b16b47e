"""Login files in every form they come in, and the challenges registries send."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.images import auth
from engine.images.reference import parse, parse_exact

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "manifests" / "docker-config"

TABLE = [
    ("example.json", "example.org/a", ("example", "org")),
    ("example.json", "example.com/a", None),
    ("empty.json", "example.org/a", None),
    ("full.json", "docker.io/library/a", ("docker", "io")),
    ("full.json", "localhost/a", ("local", "host")),
    ("full.json", "localhost:5000/a", ("local", "host-5000")),
    ("full.json", "10.10.30.45/a", ("10.10", "30.45")),
    ("full.json", "10.10.30.45:5000/a", ("10.10", "30.45-5000")),
    ("full.json", "normalize.example.org/a", ("normalize", "example")),
    ("abnormal.json", "example.org/a", ("example", "org")),
    ("abnormal.json", "docker.io/library/a", ("index", "docker.io")),
    ("abnormal.json", "localhost/a", ("local", "host")),
    ("abnormal.json", "localhost:5000/a", ("local", "host-5000")),
    ("abnormal.json", "localhost:5001/a", ("local", "host-5001")),
    ("legacy.json", "docker.io/library/a", ("docker", "io-legacy")),
    ("legacy.json", "localhost/a", ("local", "host-legacy")),
    ("refpath.json", "example.org/repo", ("example", "org")),
    ("refpath.json", "example.org/repo/deeper", ("example", "org")),
    ("refpath.json", "example.org/other", ("local", "host")),
    ("refpath.json", "docker.io/library/busybox", ("library", "busybox")),
    ("refpath.json", "docker.io/library/fedora", ("library", "other")),
    ("refpath.json", "docker.io/vendor/product", ("first", "level")),
    ("refpath.json", "docker.io/other/product", ("top", "level")),
    ("config.json", "registry-no-creds.com/a", None),
]


@pytest.mark.skipif(not FIXTURES.exists(), reason="the fixtures are not there")
@pytest.mark.parametrize(("name", "reference", "expected"), TABLE)
def test_login_files_of_the_containers_tools(name: str, reference: str, expected: tuple[str, str] | None) -> None:
    found = auth.lookup(json.loads((FIXTURES / name).read_text()), parse_exact(reference))
    assert (None if found is None else (found.username, found.password)) == expected


@pytest.mark.skipif(not FIXTURES.exists(), reason="the fixtures are not there")
def test_an_identity_token_and_a_helper() -> None:
    found = auth.lookup(json.loads((FIXTURES / "example_identitytoken.json").read_text()), parse("example.org/a"))
    assert found is not None and found.identity_token == "some very long identity token"
    env = {"HOME": "/nonexistent", "REGISTRY_AUTH_FILE": str(FIXTURES / "config.json")}
    assert auth.find(parse("registry-no-creds.com/a"), env) == auth.Found(helper="helper-registry")


def _write(path: Path, user: str, host: str = "example.org") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"auth": base64.b64encode(f"{user}:x".encode()).decode()}
    path.write_text(json.dumps({"auths": {host: entry}}))


def test_the_files_in_their_order(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    reference = parse("example.org/a")
    legacy = {"https://example.org/v1/": {"username": "oldest", "password": "x"}}
    (tmp_path / ".dockercfg").write_text(json.dumps(legacy))
    steps = [
        (tmp_path / ".docker" / "config.json", "docker"),
        (tmp_path / ".config" / "containers" / "auth.json", "config"),
        (tmp_path / "run" / "containers" / "auth.json", "runtime"),
    ]
    found = auth.find(reference, env).credentials
    assert found is not None and found.username == "oldest"
    for path, user in steps:
        _write(path, user)
        found_in = auth.find(reference, env)
        assert found_in.credentials is not None
        assert (found_in.credentials.username, found_in.source) == (user, str(path))
    _write(tmp_path / "named.json", "named", "elsewhere.org")
    env["REGISTRY_AUTH_FILE"] = str(tmp_path / "named.json")  # the only containers file, then Docker's
    assert auth.find(reference, env).source == str(steps[0][0])
    _write(tmp_path / "dc" / "config.json", "dc")
    env["DOCKER_CONFIG"] = str(tmp_path / "dc")
    assert auth.find(reference, env).source == str(tmp_path / "dc" / "config.json")


BROKEN = [
    b"",
    b"[]",
    b"{",
    b"\xff",
    b'{"auths": 7}',
    b'{"auths": {"example.org": 7}}',
    b'{"auths": {"example.org": {"auth": "!!!"}}}',
    b'{"auths": {"example.org": {}}}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_has_no_logins(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "auth.json").write_bytes(content)
    env = {"HOME": str(tmp_path), "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")}
    assert auth.find(parse("example.org/a"), env).credentials is None


def test_secrets_are_not_printed() -> None:
    assert "hunter2" not in repr(auth.Credentials("ann", "hunter2", "hunter2"))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Basic realm="a, b"', [("basic", {"realm": "a, b"})]),
        ('Bearer realm="https://a/t",service="s",scope="x y"',
         [("bearer", {"realm": "https://a/t", "service": "s", "scope": "x y"})]),
        ('Bearer realm="a" , service=b, Basic realm=c', [("bearer", {"realm": "a", "service": "b"}),
                                                         ("basic", {"realm": "c"})]),
        ('Negotiate, Basic realm="c"', [("negotiate", {}), ("basic", {"realm": "c"})]),
        ('BASIC REALM="q\\"uote"', [("basic", {"realm": 'q"uote'})]),
        ("", []),
        ("=", []),
        ('Bearer realm="open', [("bearer", {})]),
    ],
)  # fmt: skip
def test_challenges(header: str, expected: list[Any]) -> None:
    got = [(challenge.scheme, dict(challenge.params)) for challenge in auth.parse_challenges(header)]
    assert got[: len(expected)] == expected


@given(st.text(alphabet='aB =,"\\\t:/', max_size=200))
def test_any_challenge_is_read_in_bounds(header: str) -> None:
    assert len(auth.parse_challenges(header)) <= auth.MAX_CHALLENGES

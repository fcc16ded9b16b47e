"""Credential helpers of Docker: real small programs on $PATH, good ones and bad ones."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from engine import programs
from engine.errors import AccessDenied, DeadlineExceeded, EngineError, NotFound, TooLarge
from engine.images import auth, helpers
from engine.images.pull import pull
from engine.images.push import push
from engine.images.reference import parse
from engine.images.transport import Policy
from engine.jobs import Task
from tests.imagestore import ImageStore
from tests.ociimages import make_layout
from tests.registry import Registry, available

KEEPS = """#!/bin/sh
[ "$1" = get ] || exit 3
read server
case "$server" in
127.0.0.1:*|https://index.docker.io/v1/) echo '{"ServerURL":"'$server'","Username":"ann","Secret":"se cret"}' ;;
token.example) echo '{"ServerURL":"x","Username":"<token>","Secret":"tok"}' ;;
*) echo "credentials not found in native keychain"; exit 1 ;;
esac
"""


def program(directory: Path, name: str, text: str) -> dict[str, str]:
    """A helper; returns the environment that finds it."""
    directory.mkdir(exist_ok=True)
    path = directory / f"docker-credential-{name}"
    path.write_text(text)
    path.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}", "HOME": str(directory)}


def login(environ: dict[str, str], **document: object) -> None:
    place = Path(environ["HOME"]) / ".docker"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(document))


def found(environ: dict[str, str], name: str) -> auth.Found:
    return auth.find(parse(name), environ, lambda helper, domain: helpers.ask(helper, domain, environ))


def test_what_a_helper_keeps(tmp_path: Path) -> None:
    env = program(tmp_path, "keeps", KEEPS)
    assert helpers.ask("keeps", "docker.io", env) == ("ann", "se cret")
    assert helpers.ask("keeps", "other.example", env) is None
    login(env, credsStore="keeps", auths={"other.example": {"username": "bob", "password": "b"}})
    assert found(env, "ubuntu").credentials == auth.Credentials("ann", "se cret")
    assert found(env, "ubuntu").source == "docker-credential-keeps"
    assert found(env, "token.example/a").credentials == auth.Credentials(identity_token="tok")
    assert found(env, "other.example/a").credentials == auth.Credentials("bob", "b")
    assert found(env, "none.example/a") == auth.Found(helper="keeps")


def test_a_helper_of_one_registry_goes_before_the_store_of_all(tmp_path: Path) -> None:
    env = program(tmp_path, "keeps", KEEPS)
    program(tmp_path, "other", '#!/bin/sh\necho \'{"ServerURL":"","Username":"own","Secret":"x"}\'\n')
    login(env, credsStore="keeps", credHelpers={"a.example": "other", "https://index.docker.io/v1/": "other"})
    for name in ("a.example/x", "ubuntu"):
        credentials = found(env, name).credentials
        assert credentials is not None and credentials.username == "own"


@pytest.mark.parametrize(("text", "error"), [
    ("#!/bin/sh\nexit 7\n", AccessDenied),
    ("#!/bin/sh\necho '[]'\n", AccessDenied),
    ("#!/bin/sh\necho '{\"Username\": 1, \"Secret\": \"x\"}'\n", AccessDenied),
    ("#!/nonexistent\n", AccessDenied),
    ("#!/bin/sh\nyes\n", TooLarge),
    ("#!/bin/sh\nyes >&2\n", TooLarge),
    ("#!/bin/sh\nsleep 60 & sleep 60\n", DeadlineExceeded),
    ("#!/bin/sh\nexec >&- 2>&-\nsleep 60\n", DeadlineExceeded),
])  # fmt: skip
def test_a_bad_helper_is_bounded_and_anonymous_goes_on(
    tmp_path: Path, text: str, error: type[EngineError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "SECONDS", 0.4)
    env = program(tmp_path, "bad", text)
    since = time.monotonic()
    with pytest.raises(error):
        helpers.ask("bad", "a.example", env)
    assert time.monotonic() - since < 50
    login(env, credsStore="bad")
    assert (
        found(env, "a.example/x").credentials is None and "docker-credential-bad" in found(env, "a.example/x").failure
    )


def test_names_that_are_no_programs_and_programs_that_are_not_there(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path)}
    for name in ("../sh", "a/b", "", "a b", "x;y", "a" * 99):
        with pytest.raises(AccessDenied):
            helpers.ask(name, "a.example", env)
    with pytest.raises(NotFound, match="docker-credential-none"):
        helpers.ask("none", "a.example", env)


def test_a_program_that_does_not_read_its_input() -> None:
    code, out, err = programs.run_helper(["/bin/sh", "-c", "exec <&-; echo out; echo err >&2; exit 5"], b"x", 5, 100)
    assert (code, out, err) == (5, b"out\n", b"err\n")


@pytest.mark.skipif(not available(), reason="docker-registry and skopeo are not installed")
def test_push_and_pull_with_a_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in program(tmp_path / "bin", "keeps", KEEPS).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    quick = Policy(attempts=2, base=0.01)
    with Registry(tmp_path, users={"ann": "se cret"}) as registry, ImageStore(tmp_path / "store") as store:
        from engine.images.archive import load

        make_layout(tmp_path / "layout", [{"a": b"1"}])
        (image,) = load(store.images, tmp_path / "layout")
        login(dict(os.environ), credHelpers={registry.host: "absent"})
        task = Task()
        with pytest.raises(AccessDenied) as refused:
            push(store.images, image.digest, registry.name("a:1"), task, policy=quick)
        assert "docker-credential-absent is not on $PATH" in (refused.value.hint or "")
        login(dict(os.environ), credHelpers={registry.host: "keeps"})
        push(store.images, image.digest, registry.name("a:1"), policy=quick)
        assert pull(store.images, registry.name("a:1"), policy=quick).digest == image.digest

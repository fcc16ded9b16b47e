"""Pushing to Debian's docker-registry: digests stay, nothing is sent twice, what breaks is taken up again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.errors import AccessDenied, InvalidArgument, NotFound, RuntimeFailure, Unreachable
from engine.images import push as pushing
from engine.images.archive import load
from engine.images.catalog import Image
from engine.images.pull import pull
from engine.images.push import push
from engine.images.transport import Policy
from engine.jobs import Cancelled, Task
from tests.imagestore import ImageStore
from tests.ociimages import busybox_rootfs_tar, make_docker_archive, make_layout
from tests.registry import Registry, available

if not available() and os.environ.get("CI"):
    raise RuntimeError("docker-registry and skopeo are needed")
pytestmark = pytest.mark.skipif(not available(), reason="docker-registry and skopeo are not installed")
QUICK = Policy(attempts=4, base=0.01, cap=0.05, budget=5, connect=2, read=5)


@pytest.fixture(autouse=True)
def _no_logins_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    with ImageStore(tmp_path / "store") as store:
        yield store


def image_of(store: ImageStore, tmp_path: Path, *layers: Any, compression: str = "gzip") -> Image:
    layout = tmp_path / f"layout{len(list(tmp_path.iterdir()))}"
    make_layout(layout, list(layers) or [{"a": b"1"}, {"b": b"2"}], compression=compression)
    (image,) = load(store.images, layout)
    return image


def inspect(reference: str, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        ["skopeo", "inspect", "--no-tags", "--tls-verify=false", *options, f"docker://{reference}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def notes(task: Task) -> list[str]:
    return [line.split()[2] for line in task.render().splitlines() if re.match(r"sha256:", line)]


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_what_is_pushed_has_the_same_digest(
    tmp_path: Path, store: ImageStore, registry: Registry, compression: str
) -> None:
    image = image_of(store, tmp_path, {"c": compression.encode()}, {"d": b"2"}, compression=compression)
    name = registry.name(f"same/{compression}:1")
    task = Task()
    assert image.digest in push(store.images, image.digest, name, task, policy=QUICK)
    assert set(notes(task)) == {"done"}
    assert inspect(name)["Digest"] == image.digest
    again = Task()
    push(store.images, image.digest, name, again, policy=QUICK)
    assert set(notes(again)) == {"exists"}
    with ImageStore(tmp_path / "other") as other:
        assert pull(other.images, name, "linux/amd64").digest == image.digest
    copy = subprocess.run(["skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", "--preserve-digests",
                           f"docker://{name}", f"oci:{tmp_path}/copy:1"], capture_output=True, text=True)  # fmt: skip
    assert copy.returncode == 0, copy.stderr


def test_by_digest_and_docker_s_own_kinds(tmp_path: Path, store: ImageStore, registry: Registry) -> None:
    archive = tmp_path / "a.tar"
    make_docker_archive(archive, [{"old": b"docker"}])
    registry.push_archive(archive, "old/image:1")
    image = pull(store.images, registry.name("old/image:1"), "linux/amd64")
    assert "docker" in image.media_type
    push(store.images, image.digest, registry.name(f"old/again@{image.digest}"), policy=QUICK)
    assert inspect(registry.name(f"old/again@{image.digest}"))["Digest"] == image.digest
    with pytest.raises(InvalidArgument, match="digest"):
        push(store.images, image.digest, registry.name("old/again@sha256:" + "0" * 64), policy=QUICK)


def test_blobs_are_mounted_from_a_repository_that_has_them(
    tmp_path: Path, store: ImageStore, registry: Registry
) -> None:
    image = image_of(store, tmp_path, {"mounted": b"m"})
    store.images.tag(image.digest, registry.name("from/here:1"))
    push(store.images, image.digest, registry.name("from/here:1"), policy=QUICK)
    task = Task()
    push(store.images, image.digest, registry.name("to/there:1"), task, policy=QUICK)
    assert sorted(notes(task)) == ["done", "mounted"]  # the configuration is sent
    store.images.tag(image.digest, registry.name("never/pushed:1"))
    push(store.images, image.digest, registry.name("third/place:1"), policy=QUICK)
    assert inspect(registry.name("third/place:1"))["Digest"] == image.digest


def test_big_blobs_go_in_chunks(
    tmp_path: Path, store: ImageStore, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "MONOLITHIC", 1 << 16)
    monkeypatch.setattr(pushing, "CHUNK", 100_000)
    image = image_of(store, tmp_path, busybox_rootfs_tar(), compression="none")
    push(store.images, image.digest, registry.name("big/one:1"), policy=QUICK)
    assert inspect(registry.name("big/one:1"))["Digest"] == image.digest


def test_a_login_is_needed_where_it_is(tmp_path: Path, store: ImageStore) -> None:
    image = image_of(store, tmp_path)
    with Registry(tmp_path, users={"ann": "secret"}) as registry:
        name = registry.name("private/app:1")
        with pytest.raises(AccessDenied, match="login"):
            push(store.images, image.digest, name, policy=QUICK)
        (tmp_path / ".docker").mkdir()
        auth = {"auths": {registry.host: {"username": "ann", "password": "wrong"}}}
        (tmp_path / ".docker" / "config.json").write_text(json.dumps(auth))
        with pytest.raises(AccessDenied) as refused:
            push(store.images, image.digest, name, policy=QUICK)
        assert "refused" in (refused.value.hint or "")
        auth["auths"][registry.host]["password"] = "secret"
        (tmp_path / ".docker" / "config.json").write_text(json.dumps(auth))
        push(store.images, image.digest, name, policy=QUICK)
        assert inspect(name, "--creds", "ann:secret")["Digest"] == image.digest


def test_a_blob_that_is_nowhere_is_named_but_one_that_is_there_is_not_needed(
    tmp_path: Path, store: ImageStore, registry: Registry
) -> None:
    image = image_of(store, tmp_path, {"gone": b"g"})
    layer = store.images.layers(image.digest)[0]
    push(store.images, image.digest, registry.name("gone/a:1"), policy=QUICK)
    store.blobs.remove(layer.blob)
    push(store.images, image.digest, registry.name("gone/a:2"), policy=QUICK)
    with pytest.raises(NotFound, match=layer.blob):
        push(store.images, image.digest, registry.name("gone/b:1"), policy=QUICK)


# --- a registry in trouble ------------------------------------------------------------------------------------------


class Troubled(BaseHTTPRequestHandler):
    """Takes blobs and manifests as the specification has it, and breaks what `plan` says, once each."""

    protocol_version = "HTTP/1.1"
    plan: dict[str, list[str]]
    blobs: dict[str, bytes]
    uploads: dict[str, bytearray]
    seen: list[str]

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def broken(self) -> str:
        steps = self.plan.get(self.command, [])
        return steps.pop(0) if steps else ""

    def handle_one(self) -> None:
        self.seen.append(self.command)
        size = int(self.headers.get("content-length") or 0)
        how = self.broken()
        if how == "cut":
            self.uploads.setdefault("u", bytearray()).extend(self.rfile.read(size // 2))
            self.close_connection = True
            self.connection.close()
            return None
        body = self.rfile.read(size)
        if how == "kept":  # taken whole, but the answer is lost
            self.uploads["u"] += body
            self.close_connection = True
            self.connection.close()
            return None
        if how.isdigit():
            error = json.dumps({"errors": [{"code": "WOE", "message": "as planned"}]}).encode()
            return self.answer(int(how), {"Retry-After": "0"}, error)
        path, _, query = self.path.partition("?")
        if self.command == "HEAD":
            self.answer(200 if path.rpartition("/")[2] in self.blobs else 404)
        elif self.command == "POST":
            self.uploads["u"] = bytearray()
            self.answer(202, {"Location": "/upload/u?state=1", "Range": "0-0"})
        elif self.command == "GET":
            done = len(self.uploads["u"])
            self.answer(204, {"Location": "/upload/u?state=2", "Range": f"0-{done - 1}"} if done else {"Range": "0-0"})
        elif self.command == "PATCH":
            first = int(self.headers["content-range"].partition("-")[0])
            if first != len(self.uploads["u"]):
                return self.answer(416)
            self.uploads["u"] += body
            self.answer(202, {"Location": "/upload/u?state=3", "Range": f"0-{len(self.uploads['u']) - 1}"})
        elif "manifests" in path:
            self.blobs["manifest"] = body
            self.answer(201)
        else:
            assert "state=" in query
            digest = query.partition("digest=sha256%3A")[2]
            self.blobs["sha256:" + digest] = bytes(self.uploads.pop("u", b"")) + body
            self.answer(201)
        return None

    do_HEAD = do_POST = do_GET = do_PATCH = do_PUT = handle_one

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def troubled() -> Iterator[tuple[str, type[Troubled]]]:
    kind = type("Planned", (Troubled,), {"plan": {}, "blobs": {}, "uploads": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{server.server_port}/x/y:1", kind
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("plan", [
    {},
    {"PATCH": ["503", "cut", "", "kept"]},
    {"PATCH": ["", "kept", "429"], "PUT": ["500"]},
    {"HEAD": ["500"], "POST": ["503", "502"], "GET": ["404"], "PATCH": ["cut"]},
])  # fmt: skip
def test_uploads_go_on_where_they_broke(
    tmp_path: Path,
    store: ImageStore,
    troubled: tuple[str, type[Troubled]],
    plan: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pushing, "MONOLITHIC", 1000)
    monkeypatch.setattr(pushing, "CHUNK", 5000)
    monkeypatch.setattr(pushing, "WORKERS", 1)
    name, server = troubled
    server.plan = {verb: list(steps) for verb, steps in plan.items()}
    image = image_of(store, tmp_path, {"f": os.urandom(20_000)})
    push(store.images, image.digest, name, policy=QUICK)
    layer = store.images.layers(image.digest)[0]
    assert server.blobs[layer.blob] == store.blobs.path(layer.blob).read_bytes()
    assert server.blobs["manifest"] == store.images.manifest(image.digest)


@pytest.mark.parametrize(("plan", "error", "match"), [
    ({"POST": ["405"]}, RuntimeFailure, "405 .*WOE as planned"),
    ({"PUT": ["400"]}, RuntimeFailure, "400"),
    ({"POST": ["503"] * 9}, Unreachable, "503"),
    ({"HEAD": ["403"]}, AccessDenied, "refuses"),
    ({"POST": ["404"]}, NotFound, "WOE"),
])  # fmt: skip
def test_what_a_registry_refuses_has_its_error(
    tmp_path: Path, store: ImageStore, troubled: tuple[str, type[Troubled]], plan: Any, error: Any, match: str
) -> None:
    name, server = troubled
    server.plan = plan
    image = image_of(store, tmp_path, {"f": b"1"})
    with pytest.raises(error, match=match):
        push(store.images, image.digest, name, policy=QUICK)
    assert "manifest" not in server.blobs


def test_a_push_is_cancelled(tmp_path: Path, store: ImageStore, troubled: tuple[str, type[Troubled]]) -> None:
    name, server = troubled
    image = image_of(store, tmp_path, {"f": b"1"})
    task = Task()
    server.plan = {"POST": ["503"] * 99}
    threading.Timer(0.1, task.cancel).start()
    with pytest.raises(Cancelled):
        push(store.images, image.digest, name, task, policy=Policy(attempts=99, base=0.1, cap=1))

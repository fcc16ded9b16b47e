"""What registries do wrong, by a small fake server that exists for faults only; and the token dance."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from engine.errors import (
    AccessDenied,
    Damaged,
    DeadlineExceeded,
    EngineError,
    NotFound,
    RuntimeFailure,
    TooLarge,
    Unreachable,
)
from engine.images import manifests
from engine.images.pull import pull
from engine.images.reference import parse
from engine.images.registry import Registry, is_loopback
from engine.images.transport import Policy
from engine.jobs import Cancelled, Task
from tests.imagestore import ImageStore
from tests.ociimages import make_layout

QUICK = Policy(attempts=4, base=0.01, cap=0.2, budget=3, connect=1, read=0.4, answer=1, slowest=1000, window=0.3)


class Fake:
    """A registry serving one layout, with faults: `before(handler, path)` answers itself and returns True."""

    def __init__(self, layout: Path) -> None:
        self.layout = layout
        self.before: Callable[[BaseHTTPRequestHandler, str], bool] = lambda handler, path: False
        self.seen: list[tuple[str, dict[str, str]]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.seen.append((self.path, dict(self.headers)))
                try:
                    if not fake.before(self, self.path):
                        fake.serve(self)
                except OSError:
                    self.close_connection = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                fake.seen.append((f"{self.path} {body}", dict(self.headers)))
                if not fake.before(self, self.path):
                    fake.serve(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        name = urlsplit(handler.path).path.rsplit("/", 1)[1]
        if name == "latest":
            name = json.loads((self.layout / "index.json").read_text())["manifests"][0]["digest"]
        path = self.layout / "blobs" / "sha256" / name.removeprefix("sha256:")
        if not path.exists():
            answer(handler, 404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no\\nsuch"}]}')
            return
        body, start = path.read_bytes(), 0
        if (wanted := handler.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            answer(handler, 206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})
            return
        kind = manifests.OCI_MANIFEST if "/manifests/" in handler.path else "application/octet-stream"
        answer(handler, 200, body, {"Content-Type": kind})

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, part: str) -> int:
        return sum(part in path for path, _ in self.seen)


def answer(
    handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", headers: dict[str, str] | None = None
) -> None:
    handler.send_response(status)
    for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(key, value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture(autouse=True)
def _no_logins_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)


BODY = os.urandom(600_000)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    layout = tmp_path / "layout"
    make_layout(layout, [{"big": BODY}], compression="none")
    made = Fake(layout)
    yield made
    made.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    with ImageStore(tmp_path / "store") as opened:
        yield opened


def _layer(fake: Fake) -> str:
    index = json.loads((fake.layout / "index.json").read_text())
    digest = index["manifests"][0]["digest"]
    return str(json.loads((fake.layout / "blobs" / "sha256" / digest[7:]).read_text())["layers"][0]["digest"])


def _pull(store: ImageStore, fake: Fake, task: Task | None = None) -> str:
    return pull(store.images, f"{fake.host}/demo", None, task, policy=QUICK).digest


@pytest.mark.parametrize(
    ("status", "headers", "error", "tries"),
    [
        (401, {}, AccessDenied, 1),
        (401, {"WWW-Authenticate": "Basic realm=x"}, AccessDenied, 1),
        (401, {"WWW-Authenticate": "Negotiate"}, AccessDenied, 1),
        (403, {}, AccessDenied, 1),
        (404, {}, NotFound, 1),
        (418, {}, RuntimeFailure, 1),
        (429, {}, Unreachable, 4),
        (429, {"Retry-After": "9999"}, Unreachable, 1),
        (500, {}, Unreachable, 4),
        (503, {}, Unreachable, 4),
    ],
)
def test_each_status_has_its_error(
    store: ImageStore, fake: Fake, status: int, headers: dict[str, str], error: type[EngineError], tries: int
) -> None:
    body = b'{"errors":[{"code":"SOME","message":"words\\u0007 of the registry"}]}'

    def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
        answer(handler, status, body, headers)
        return True

    fake.before = before
    with pytest.raises(error) as caught:
        _pull(store, fake)
    assert fake.count("/manifests/") == tries
    if not headers:
        assert "SOME words of the registry" in caught.value.reason
    if error is AccessDenied and "Negotiate" not in headers.values():
        assert "login" in (caught.value.hint or "")
    assert store.images.all() == []


def test_what_passes_is_waited_for_as_long_as_asked(store: ImageStore, fake: Fake) -> None:
    left = [1, 1]

    def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if left:
            left.pop()
            answer(handler, 429, b"", {"Retry-After": "1"} if left else {})
            return True
        return False

    fake.before = before
    started = time.monotonic()
    task = Task()
    _pull(store, fake, task)
    assert time.monotonic() - started >= 1
    assert "too many requests" in task.log_text()


def _cut(fake: Fake, at: int, times: int) -> None:
    """Drop the connection of blob requests after `at` bytes, `times` times."""
    left = [times]

    def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if _layer(fake) not in path or not left[0]:
            return False
        left[0] -= 1
        body = (fake.layout / "blobs" / "sha256" / _layer(fake)[7:]).read_bytes()
        start = int((handler.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.end_headers()
        handler.wfile.write(body[start : start + at])
        handler.close_connection = True
        return True

    fake.before = before


def test_a_dropped_connection_is_resumed_where_it_broke(store: ImageStore, fake: Fake) -> None:
    _cut(fake, 100_000, 5)  # more often than `attempts`: progress counts
    digest = _pull(store, fake)
    assert store.read(digest, "big") == BODY
    ranges = [headers.get("Range", "") for path, headers in fake.seen if _layer(fake) in path]
    starts = [int(text[6:].split("-")[0]) for text in ranges if text]
    assert len(ranges) == 6 and starts == sorted(starts) and starts[0] > 0


def test_a_connection_that_always_drops_at_once_ends(store: ImageStore, fake: Fake) -> None:
    _cut(fake, 0, 1000)
    with pytest.raises(Unreachable):
        _pull(store, fake)
    assert fake.count(_layer(fake)) == 4


def test_a_server_that_ignores_range_is_coped_with(store: ImageStore, fake: Fake) -> None:
    _cut(fake, 200_000, 1)
    cut, body = fake.before, (fake.layout / "blobs" / "sha256" / _layer(fake)[7:]).read_bytes()

    def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if cut(handler, path):
            return True
        if _layer(fake) in path:
            answer(handler, 200, body)
            return True
        return False

    fake.before = before
    assert store.read(_pull(store, fake), "big") == BODY


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda body: body[:-1] + b"x", Damaged),  # the wrong digest
        (lambda body: body[:1000], Damaged),  # truncated, and says so
        (lambda body: body + b"more", Damaged),  # larger than announced
    ],
)
def test_a_wrong_blob_is_refused(
    store: ImageStore, fake: Fake, change: Callable[[bytes], bytes], error: type[EngineError]
) -> None:
    body = change((fake.layout / "blobs" / "sha256" / _layer(fake)[7:]).read_bytes())

    def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if _layer(fake) in path:
            start = int((handler.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            answer(handler, 206 if start else 200, body[start:],
                   {"Content-Range": f"bytes {start}-{len(body)}/{len(body)}"} if start else {})  # fmt: skip
            return True
        return False

    fake.before = before
    with pytest.raises(error):
        _pull(store, fake)
    assert store.images.all() == [] and store.layers.all() == []


def test_endless_and_oversized_manifests_are_bounded(store: ImageStore, fake: Fake) -> None:
    sent = [0]

    def endless(handler: BaseHTTPRequestHandler, path: str) -> bool:
        handler.send_response(200)
        handler.end_headers()  # no length: until the connection closes
        while True:
            handler.wfile.write(bytes(1 << 16))
            sent[0] += 1 << 16

    fake.before = endless
    with pytest.raises(TooLarge):
        _pull(store, fake)
    assert sent[0] < 64 << 20

    def announced(handler: BaseHTTPRequestHandler, path: str) -> bool:
        answer(handler, 200, b"", {"Content-Length": str(1 << 40)})
        return True

    fake.before = announced
    with pytest.raises(TooLarge, match="announced"):
        _pull(store, fake)


def test_redirects_have_an_end(store: ImageStore, fake: Fake) -> None:
    def loop(handler: BaseHTTPRequestHandler, path: str) -> bool:
        answer(handler, 307, b"", {"Location": path})
        return True

    fake.before = loop
    with pytest.raises(Unreachable, match="redirects"):
        _pull(store, fake)
    assert len(fake.seen) == 6

    def away(handler: BaseHTTPRequestHandler, path: str) -> bool:
        answer(handler, 307, b"", {"Location": "file:///etc/passwd"})
        return True

    fake.before = away
    with pytest.raises(Unreachable, match="no web address"):
        _pull(store, fake)


def _log_in(tmp_path: Path, host: str, **entry: str) -> None:
    (tmp_path / ".docker").mkdir(exist_ok=True)
    entry = entry or {"auth": base64.b64encode(b"ann:s3cret").decode()}
    (tmp_path / ".docker" / "config.json").write_text(json.dumps({"auths": {host: entry}}))


def test_a_redirect_to_another_host_takes_no_secret_along(tmp_path: Path, store: ImageStore, fake: Fake) -> None:
    other = Fake(fake.layout)
    try:
        _log_in(tmp_path, fake.host)

        def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
            if "Authorization" not in handler.headers:
                answer(handler, 401, b"", {"WWW-Authenticate": "Basic realm=x"})
                return True
            if "/blobs/" in path:
                answer(handler, 307, b"", {"Location": f"http://{other.host}{path}"})
                return True
            return False

        fake.before = before
        assert store.read(_pull(store, fake), "big") == BODY
        assert any("Authorization" in headers for _, headers in fake.seen)
        assert other.seen and not any("Authorization" in headers for _, headers in other.seen)
    finally:
        other.close()


@pytest.mark.parametrize("identity", [False, True])
def test_bearer_tokens_are_fetched_kept_and_renewed(
    tmp_path: Path, store: ImageStore, fake: Fake, identity: bool
) -> None:
    _log_in(tmp_path, fake.host, **({"identitytoken": "idtok"} if identity else {}))
    valid = {"t1"}

    def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if path.startswith("/token"):
            number = fake.count("/token")
            valid.clear()
            valid.add(f"t{number}")
            answer(handler, 200, json.dumps({"token": f"t{number}", "expires_in": 300}).encode())
            return True
        if handler.headers.get("Authorization", "")[7:] not in valid:
            challenge = f'Bearer realm="http://{fake.host}/token?x=1",service="svc",scope="whatever:*"'
            answer(handler, 401, b"", {"WWW-Authenticate": challenge})
            return True
        if "/blobs/" in path and fake.count("/token") == 1:
            valid.clear()  # expires now
        return False

    fake.before = before
    assert store.read(_pull(store, fake), "big") == BODY
    asked = [(path, headers) for path, headers in fake.seen if path.startswith("/token")]
    assert len(asked) == 2
    path, headers = asked[0]
    if identity:
        form = parse_qs(path.split(" ", 1)[1])
        assert form["grant_type"] == ["refresh_token"] and form["refresh_token"] == ["idtok"]
        assert form["scope"] == ["repository:demo:pull"]
    else:
        query = parse_qs(urlsplit(path).query)
        assert query == {"x": ["1"], "service": ["svc"], "scope": ["repository:demo:pull"]}
        assert headers["Authorization"] == "Basic " + base64.b64encode(b"ann:s3cret").decode()


@pytest.mark.parametrize("token", [b"", b"[]", b"{}", b'{"token": 7}', b'{"token": "a\\nb: c"}'])
def test_a_token_service_that_talks_nonsense(store: ImageStore, fake: Fake, token: bytes) -> None:
    def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if path.startswith("/token"):
            answer(handler, 200, token)
        else:
            answer(handler, 401, b"", {"WWW-Authenticate": f'Bearer realm="http://{fake.host}/token"'})
        return True

    fake.before = before
    with pytest.raises(Damaged, match="token"):
        _pull(store, fake)


@pytest.mark.parametrize("drip", [False, True])
def test_a_silent_or_dripping_server_meets_the_deadline(store: ImageStore, fake: Fake, drip: bool) -> None:
    over = threading.Event()

    def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if _layer(fake) not in path:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", "600576")
        handler.end_headers()
        while not over.wait(0.05):
            if drip:
                handler.wfile.write(b"x")
        return True

    fake.before = before
    try:
        with pytest.raises(DeadlineExceeded):
            _pull(store, fake)
    finally:
        over.set()


@pytest.mark.parametrize("answers", [True, False])
def test_cancelling_breaks_a_read_from_a_silent_server(store: ImageStore, fake: Fake, answers: bool) -> None:
    over, there = threading.Event(), threading.Event()

    def before(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if answers and _layer(fake) not in path:
            return False
        if answers:
            answer(handler, 200, b"", {"Content-Length": "615936"})
        there.set()
        over.wait(100)
        return True

    fake.before = before
    task = Task()
    ended: list[type[BaseException]] = []

    def work() -> None:
        try:
            pull(store.images, f"{fake.host}/demo", None, task, policy=Policy(read=100))
        except BaseException as error:
            ended.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert there.wait(10)
    time.sleep(0.1)
    task.cancel()
    thread.join(50)
    over.set()
    assert ended == [Cancelled]


def test_nobody_there(store: ImageStore) -> None:
    with pytest.raises(Unreachable, match=r"cannot reach 127\.0\.0\.1:1: "):
        pull(store.images, "127.0.0.1:1/demo", None, None, policy=QUICK)


@pytest.mark.parametrize(
    ("domain", "expected"),
    [("localhost", True), ("localhost:5000", True), ("127.0.0.1:5000", True), ("127.9.9.9", True), ("[::1]:5000", True),
     ("example.org", False), ("127.example.org", False), ("10.0.0.1:5000", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_plain_http_is_for_this_machine_only(domain: str, expected: bool) -> None:
    assert is_loopback(domain) is expected
    with Registry(parse(f"{domain}/a"), Task()) as registry:
        assert registry.base.startswith("http:" if expected else "https:")


def test_an_insecure_registry_is_one_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUTCHMAN_INSECURE_REGISTRIES", "one.example:5000, two.example")
    for name, scheme in (("one.example:5000", "http:"), ("two.example", "http:"), ("one.example", "https:")):
        with Registry(parse(f"{name}/a"), Task()) as registry:
            assert registry.base.startswith(scheme)
    with Registry(parse("nginx"), Task()) as registry:
        assert registry.base == "https://registry-1.docker.io/v2/library/nginx"

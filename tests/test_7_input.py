"""Bad input through a real mount: an errno that fits at the write, the reason in `error`, and nothing changed."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from dutchman import Dutchman, demo_archive, needs_oci

NAMES = {number: name for number, name in errno.errorcode.items()}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dutchman]:
    needs_oci()
    with Dutchman(tmp_path_factory.mktemp("input")) as engine:
        engine.up()
        engine.cli("load", str(demo_archive()))
        (engine.mount / "containers" / "idle").mkdir()
        (engine.mount / "volumes" / "data").mkdir()
        engine.make("busy", "exec sleep 1000")
        engine.write("containers/busy/config/volumes", "data:/data")
        engine.write("containers/busy/ctl", "start")
        yield engine


def failing(action: Callable[[], object]) -> str:
    """The name of the errno an action fails with."""
    with pytest.raises(OSError) as caught:
        action()
    return NAMES[caught.value.errno or 0]


# (file, what is written, errno, what the newest entry in `error` says)
WRITES = [
    ("containers/idle/ctl", "strat", "EINVAL", "unknown verb"),
    ("containers/idle/ctl", "Start", "EINVAL", "unknown verb"),
    ("containers/idle/ctl", "start now", "EINVAL", "too many arguments"),
    ("containers/idle/ctl", "stop 1 2", "EINVAL", "too many arguments"),
    ("containers/idle/ctl", "kill 'TERM", "EINVAL", "quot"),
    ("containers/idle/ctl", "stop", "EBUSY", "created"),
    ("containers/idle/ctl", "pause", "EBUSY", "created"),
    ("containers/idle/ctl", "start", "EINVAL", "image"),
    ("containers/busy/ctl", "start", "EBUSY", "running"),
    ("containers/busy/ctl", "remove", "EBUSY", "running"),
    ("containers/busy/ctl", "stop soon", "EINVAL", "soon"),
    ("containers/busy/ctl", "kill NOSUCH", "EINVAL", "NOSUCH"),
    ("containers/ctl", "run", "EINVAL", "argument missing"),
    ("containers/ctl", "run demo:1 colour=red", "EINVAL", "colour"),
    ("containers/ctl", "run demo:1 name=busy", "EEXIST", "busy"),
    ("containers/ctl", "run demo:1 name=a/b", "EINVAL", "name"),
    ("containers/ctl", "run nowhere:1", "ENOENT", "nowhere"),
    ("containers/ctl", "run UPPER:1", "EINVAL", "UPPER"),
    ("containers/idle/config/memory", "lots", "EINVAL", "    memory = lots\n"),
    ("containers/idle/config/env", "=x", "EINVAL", "env"),
    ("containers/idle/config/cpus", "-1", "EINVAL", "cpus"),
    ("containers/idle/config/stop_grace_period", "soon", "EINVAL", "stop_grace_period"),
    ("containers/idle/config/volumes", "data:relative", "EINVAL", "volumes"),
    ("containers/idle/config/hostname", "two words", "EINVAL", "hostname"),
    ("containers/idle/config/hostname", "h" * 65, "EINVAL", "hostname"),
    ("images/ctl", "pull", "EINVAL", "argument missing"),
    ("images/ctl", "pull a b", "EINVAL", "too many arguments"),
    ("images/ctl", "pull Not/A/Reference", "EINVAL", "Not"),
    ("images/ctl", "pull demo:1 colour=red", "EINVAL", "colour"),
    ("images/ctl", "pull demo@sha256:abc", "EINVAL", "sha256:abc"),
    ("images/ctl", "load relative/path", "EINVAL", "relative/path"),
    ("images/ctl", "import /nowhere", "EINVAL", "argument missing"),
    ("images/demo:1/ctl", "untag demo:2", "ENOENT", "tag"),
    ("images/demo:1/ctl", "tag ::", "EINVAL", "::"),
    ("images/demo:1/ctl", "remove", "EBUSY", "busy"),
    ("volumes/ctl", "create", "EINVAL", "argument missing"),
    ("volumes/ctl", "create data", "EEXIST", "data"),
    ("volumes/ctl", "create -x", "EINVAL", "-x"),
    ("volumes/ctl", "create v driver=cloud", "EINVAL", "cloud"),
    ("volumes/data/ctl", "remove", "EBUSY", "busy"),
    ("ctl", "explode", "EINVAL", "unknown verb"),
]


@pytest.mark.parametrize(("path", "line", "expected", "says"), WRITES, ids=[f"{p}<{w}" for p, w, _, _ in WRITES])
def test_a_bad_write_fails_and_says_why(engine: Dutchman, path: str, line: str, expected: str, says: str) -> None:
    top = path.split("/config/")[0].removesuffix("ctl").rstrip("/")
    before = engine.read("containers/idle/config.yaml"), sorted(os.listdir(engine.mount / "containers"))
    assert failing(lambda: engine.write(path, line)) == expected
    newest = engine.read(f"{top}/error" if top else "error").split("\n\n")[0]
    assert expected in newest.splitlines()[0]
    assert says in newest
    assert (engine.read("containers/idle/config.yaml"), sorted(os.listdir(engine.mount / "containers"))) == before


DOCUMENTS = [
    ("a: [", "EINVAL", "YAML"),
    ("\x01", "EINVAL", "YAML"),
    ("- list", "EINVAL", "mapping"),
    ("colour: red", "EINVAL", "colour"),
    ("image: demo:1\nmemory: lots", "EINVAL", "memory"),
    ("tty: perhaps", "EINVAL", "tty"),
    ("volumes: [data]", "EINVAL", "volumes"),
    ("#" * (2 << 20), "E2BIG", "larger"),
]


@pytest.mark.parametrize(("document", "expected", "says"), DOCUMENTS, ids=[d[:20] for d, _, _ in DOCUMENTS])
def test_a_bad_document_changes_nothing(engine: Dutchman, document: str, expected: str, says: str) -> None:
    before = engine.read("containers/idle/config.yaml")
    assert failing(lambda: (engine.mount / "containers/idle/config.yaml").write_text(document)) == expected
    assert says in engine.read("containers/idle/error").split("\n\n")[0]
    assert engine.read("containers/idle/config.yaml") == before


def test_names_and_directories(engine: Dutchman) -> None:
    mount = engine.mount
    assert failing((mount / "containers" / "busy").mkdir) == "EEXIST"
    assert failing((mount / "containers" / "-x").mkdir) == "EINVAL"
    assert failing((mount / "containers" / "busy").rmdir) == "EBUSY"
    assert failing((mount / "volumes" / "data").rmdir) == "EBUSY"
    assert failing((mount / "containers" / "none").rmdir) == "ENOENT"
    assert failing((mount / "images" / "x").mkdir) in ("EACCES", "EROFS")
    assert failing((mount / "x").mkdir) in ("EACCES", "EROFS")
    assert failing(lambda: (mount / "containers" / ".DS_Store").write_text("")) == "EACCES"


def test_wrong_directions(engine: Dutchman) -> None:
    """Root passes mode bits: these are refused all the same."""
    mount = engine.mount
    for name in ("version", "status", "events", "containers/busy/state", "containers/busy/pid"):
        assert failing(lambda name=name: (mount / name).write_text("x")) == "EACCES", name  # type: ignore[misc]
    for name in ("images/demo:1/rootfs/new", "images/demo:1/rootfs/srv/hello.txt", "images/demo:1/layers/00/fs/new"):
        assert failing(lambda name=name: (mount / name).write_text("x")) == "EROFS", name  # type: ignore[misc]


def test_an_oversized_command(engine: Dutchman) -> None:
    assert failing(lambda: engine.write("images/ctl", "pull " + "x" * (100 << 10))) == "E2BIG"


def test_lines_run_in_order_until_one_fails(engine: Dutchman) -> None:
    assert failing(lambda: engine.write("volumes/ctl", "create first\nexplode\ncreate second")) == "EINVAL"
    assert os.path.isdir(engine.mount / "volumes/first") and not os.path.exists(engine.mount / "volumes/second")
    engine.write("volumes/first/ctl", "remove")


def test_error_keeps_eight_and_can_be_cleared(engine: Dutchman) -> None:
    for number in range(10):
        failing(lambda number=number: engine.write("volumes/ctl", f"wrong{number}"))  # type: ignore[misc]
    entries = engine.read("volumes/error").split("\n\n")
    assert len(entries) == 8 and "wrong9" in entries[0] and "wrong2" in entries[-1]
    assert "    ^^^^^^" in entries[0]
    engine.write("volumes/error", "")
    assert engine.read("volumes/error") == ""


# --- damaged archives -----------------------------------------------------------------------------------------------


def layout(directory: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """An OCI layout with one gzip layer, changed by the test before it is written."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        info = tarfile.TarInfo("file")
        info.size = 200_000
        archive.addfile(info, io.BytesIO(os.urandom(info.size)))
    layer = gzip.compress(tar.getvalue(), mtime=0)
    diff_id = f"sha256:{hashlib.sha256(tar.getvalue()).hexdigest()}"
    rootfs = {"type": "layers", "diff_ids": [diff_id]}
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": rootfs}).encode()

    def described(body: bytes, kind: str) -> dict[str, object]:
        kind = f"application/vnd.oci.image.{kind}"
        return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(body).hexdigest()}", "size": len(body)}

    parts = {"config": config, "layer": layer}
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described(config, "config.v1+json"),
        "layers": [described(layer, "layer.v1.tar+gzip")],
    }
    names = {key: hashlib.sha256(body).hexdigest() for key, body in parts.items()}
    change(parts)
    body = json.dumps(manifest).encode()
    parts["manifest"], names["manifest"] = body, hashlib.sha256(body).hexdigest()
    entry = described(body, "manifest.v1+json") | {"annotations": {"org.opencontainers.image.ref.name": "damaged:1"}}
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for key, content in parts.items():
        (blobs / names[key]).write_bytes(content)
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return directory


def flip(parts: dict[str, bytes]) -> None:
    layer = bytearray(parts["layer"])
    layer[len(layer) // 2] ^= 1
    parts["layer"] = bytes(layer)


DAMAGE: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "a flipped bit": (flip, "sha256|digest|corrupt|CRC|inflate|gzip|damaged"),
    "a truncated layer": (lambda parts: parts.update(layer=parts["layer"][:-1000]), "trunc|short|end|size|bytes"),
    "another config": (lambda parts: parts.update(config=parts["config"] + b" "), "digest|size|bytes|sha256"),
    "garbage": (lambda parts: parts.update(layer=os.urandom(len(parts["layer"]))), "gzip|tar|digest|sha256|inflate"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_archive_is_refused_whole(engine: Dutchman, tmp_path: Path, damage: str) -> None:
    change, says = DAMAGE[damage]
    before = sorted(os.listdir(engine.mount / "images" / "by-digest"))
    state, error = engine.job(f"load {layout(tmp_path / 'layout', change)}")
    assert state == "failed"
    assert any(word in error for word in says.split("|")), error
    assert sorted(os.listdir(engine.mount / "images" / "by-digest")) == before
    assert not os.path.lexists(engine.mount / "images" / "damaged:1")


def test_the_same_archive_undamaged_is_taken(engine: Dutchman, tmp_path: Path) -> None:
    assert engine.job(f"load {layout(tmp_path / 'layout', lambda parts: None)}") == ("done", "")
    assert (engine.mount / "images" / "damaged:1" / "rootfs" / "file").stat().st_size == 200_000
    engine.write("images/damaged:1/ctl", "remove")


def test_what_is_not_there_or_not_an_image(engine: Dutchman, tmp_path: Path) -> None:
    for line, says in (
        (f"load {tmp_path}/none", "none"),
        (f"load {tmp_path}", "layout"),
        ("import /etc/passwd x:1", ""),
    ):
        try:
            state, error = engine.job(line)
            assert state == "failed" and says in error, error
        except OSError as caught:
            assert NAMES[caught.errno or 0] in ("ENOENT", "EINVAL", "EIO")


# --- a registry that misbehaves -------------------------------------------------------------------------------------


@contextmanager
def registry(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[str]]]:
    """A registry on the loopback that answers as told: its host:port, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, **headers: str) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        body = json.dumps({"errors": [{"code": "SOMETHING", "message": "the registry says no"}]}).encode()
        request.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    return answer


def drop(request: http.server.BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.close()


REGISTRIES: dict[str, tuple[Callable[[http.server.BaseHTTPRequestHandler], None], str]] = {
    "dropped": (drop, "connection|closed|reach|disconnect|dropped"),
    "nobody listens": (drop, "cannot reach 127.0.0.1:"),
    "429": (status(429, Retry_After="0"), "429|too many|busy|rate"),
    "500": (status(500), "500|server"),
    "401": (status(401, WWW_Authenticate='Basic realm="test"'), "401|unauthorized|credentials|log|denied"),
    "403": (status(403), "403|denied|forbidden|refused"),
    "404": (status(404), "has no manifest"),
    "not a registry": (status(200, Content_Type="text/html"), "schemaversion|manifest|registry|media"),
}


class Refusal(NamedTuple):
    state: str
    error: str
    name: str
    asked: list[str]


@pytest.fixture(scope="module")
def refusals(engine: Dutchman) -> dict[str, Refusal]:
    """What came of a pull from each of them, all at once: those that are asked again take their time."""

    def pull(kind: str) -> Refusal:
        with registry(REGISTRIES[kind][0]) as (name, asked):
            if kind == "nobody listens":
                name, _ = gone
                asked.append("")
            state, error = engine.job(f"pull {name}/library/thing:1", seconds=90)
            return Refusal(state, error, name, asked)

    with registry(drop) as gone:
        pass
    with ThreadPoolExecutor(len(REGISTRIES)) as pool:
        return dict(zip(REGISTRIES, pool.map(pull, REGISTRIES), strict=True))


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_registry_that_refuses(engine: Dutchman, refusals: dict[str, Refusal], kind: str) -> None:
    refusal = refusals[kind]
    assert refusal.state == "failed"
    assert any(word in refusal.error.lower() for word in REGISTRIES[kind][1].split("|")), refusal.error
    assert 0 < len(refusal.asked) < 40
    if kind in ("429", "500", "dropped"):
        assert len(refusal.asked) > 1, "it tries again"
    assert f"pull {refusal.name}/library/thing:1" in engine.read("events")
    assert refusal.name not in os.listdir(engine.mount / "images")

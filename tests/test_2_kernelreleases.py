"""Releases as GitHub's API was recorded answering (shared/fixtures/github-releases): those documents from a server.

Of the recorded answers only the origin of the addresses in them is another: the server's own.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from test_2_kernelfetch import QUICK, sha
from test_2_kernels import vmlinux

from engine.errors import Damaged, NotFound, Unreachable
from engine.jobs import Task
from engine.kernelfetch import Wanted, fetch
from engine.kernels import Kernels

PLACE = Path(__file__).parents[2] / "shared" / "fixtures" / "github-releases" / "octokit"
CASES = [f"{name}/{kind}" for name in ("release-assets", "release-assets-conflict") for kind in ("normalized", "raw")]
DIGEST = "sha256:" + hashlib.sha256(b"Hello, world!\n").hexdigest()


class Recorded:
    """Answers of one scenario, by path. The asset's bytes are at another origin, as GitHub has them."""

    def __init__(self, case: str) -> None:
        name, kind = case.split("/")
        path = PLACE / name / f"{kind}-fixture.json"
        if not path.exists():
            pytest.fail("fixtures are not here") if os.environ.get("CI") else pytest.skip("fixtures are not here")
        exchanges = json.loads(path.read_text())
        self.answers: dict[str, Any] = {}
        for item in exchanges:
            if item["method"] == "get":
                self.answers.setdefault(urlsplit(item["path"]).path, item["response"])
        self.repository = next(iter(self.answers)).removeprefix("/repos/").partition("/releases/")[0]
        self.content = (PLACE / "release-assets" / "test-upload.txt").read_bytes()
        self.asked: list[tuple[str, str]] = []
        self.pages = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                outer.asked.append((path, self.headers["Accept"]))
                if path == "/objects/1":
                    return self.answer(200, outer.content)
                if self.headers["Accept"] == "application/octet-stream" and "/releases/assets/" in path:
                    return self.answer(302, b"", Location=f"http://localhost:{outer.port}/objects/1")
                if path not in outer.answers:
                    return self.answer(404, b'{"message": "Not Found"}')
                answer = outer.answers[path]
                if outer.pages and isinstance(answer, list) and "page=2" not in self.path:
                    following = f'<{outer.api}{path}?per_page=100&page=2>; rel="next"'
                    return self.answer(200, b"[]", Link=following)
                text = json.dumps(answer).replace("https://api.github.com", outer.api)
                return self.answer(200, text.encode())

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self.api = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture(params=CASES)
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    server = Recorded(request.param)
    monkeypatch.setenv("DUTCHMAN_GITHUB_API", server.api)
    yield server
    server.close()


def wanted(server: Recorded, **more: str) -> Wanted:
    known = {"tag": "v1.0.0", "repository": server.repository, "digest": DIGEST, "asset": "test-upload.txt"}
    return Wanted(**{**known, "arch": "x86_64", **more})


def test_the_recorded_asset_is_found_and_downloaded_and_judged_by_its_bytes(recorded: Recorded, tmp_path: Path) -> None:
    kernels = Kernels(tmp_path / "kernels")
    with pytest.raises(Damaged, match="no kernel: it begins with 48656c6c"):
        fetch(kernels, wanted(recorded), Task(), policy=QUICK)
    # the release's document, made before the upload, has no assets: the list of its assets was asked
    paths = [path.rpartition("/")[2] for path, _ in recorded.asked]
    assert paths[:2] == ["v1.0.0", "assets"] and recorded.asked[-1] == ("/objects/1", "application/octet-stream")
    with pytest.raises(Damaged, match=f"is {DIGEST}, not {sha(b'x')}"):
        fetch(kernels, wanted(recorded, digest=sha(b"x")), Task(), policy=QUICK)
    with pytest.raises(NotFound, match=r"no asset vmlinux-x86_64\.zst; it has test-upload.txt"):
        fetch(kernels, wanted(recorded, asset=""), Task(), policy=QUICK)
    with pytest.raises(NotFound, match="release v2 of"):
        fetch(kernels, wanted(recorded, tag="v2"), Task(), policy=QUICK)
    assert kernels.names() == []


def test_a_kernel_in_the_place_of_the_recorded_asset(recorded: Recorded, tmp_path: Path) -> None:
    (listed,) = (answer for answer in recorded.answers.values() if isinstance(answer, list))
    recorded.content = vmlinux()
    (item,) = listed
    item.update(name="vmlinux-x86_64", size=len(recorded.content))
    recorded.pages = True  # and on the second page
    made = fetch(Kernels(tmp_path), wanted(recorded, asset="", digest=sha(recorded.content)), Task(), policy=QUICK)
    assert made.version == "6.9.1-test" and recorded.repository in made.source
    item["state"] = "starter"  # an upload that broke off
    with pytest.raises(NotFound, match="it has none"):
        fetch(Kernels(tmp_path), wanted(recorded, digest=sha(b"y"), asset="vmlinux-x86_64"), Task(), policy=QUICK)
    item["state"] = "uploaded"
    listed[0]["url"] = "https://example.com/elsewhere"
    with pytest.raises(Unreachable, match="elsewhere than the API"):
        fetch(Kernels(tmp_path), wanted(recorded, digest=sha(b"y"), asset="vmlinux-x86_64"), Task(), policy=QUICK)

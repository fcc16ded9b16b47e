"""Kernels from releases, against a server that serves a real kernel and every failure."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import lzma
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from guestkernel import guest_kernel
from test_2_kernels import CONFIG, arm64, vmlinux

from engine.errors import AccessDenied, Damaged, EngineError, InvalidArgument, NotFound, Unreachable
from engine.images.transport import Policy
from engine.jobs import Cancelled, Task
from engine.kernelfetch import Wanted, fetch
from engine.kernels import Kernels

QUICK = Policy(attempts=3, base=0.01, cap=0.05, budget=20)
TOKEN = "ghp_secret"


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def kata(config: str = CONFIG, pack: Callable[[bytes], bytes] = zstandard.compress) -> bytes:
    """An archive as Kata's static releases: several kernels, a link that names the one for containers."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        base = "./opt/kata/share/kata-containers/"
        for name, body in (
            ("vmlinux-6.1.9-99-other", vmlinux("6.1.9")),
            ("vmlinux-6.12.4-176", vmlinux("6.12.4", config="")),
            ("config-6.12.4-176", config.encode()),
            ("../../../../../etc/passwd", b"root::0:0::/:/bin/sh\n"),
        ):
            info = tarfile.TarInfo(base + name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        link = tarfile.TarInfo(base + "vmlinux.container")
        link.type, link.linkname = tarfile.SYMTYPE, "vmlinux-6.12.4-176"
        tar.addfile(link)
    return pack(out.getvalue())


class Server:
    """The API on 127.0.0.1, what it redirects to on localhost: another origin."""

    def __init__(self) -> None:
        self.assets: dict[str, bytes] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.cut: list[int] = []  # bytes after which each of the next downloads breaks off
        self.limits: list[dict[str, str]] = []  # headers of the next answers of the API, which are 403
        self.loop = False
        self.more: dict[str, Any] = {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                sent = {key.lower(): value for key, value in self.headers.items()}
                outer.seen.append((sent["host"].partition(":")[0], self.path, sent))
                name = self.path.rpartition("/")[2]
                if self.path.startswith("/cdn/"):
                    return self.body(outer.assets[name], sent.get("range"))
                if outer.limits:
                    return self.answer(403, b'{"message": "API rate limit exceeded"}', **outer.limits.pop(0))
                if self.path == "/repos/o/k/releases/tags/v1":
                    return self.answer(200, json.dumps(outer.release()).encode())
                if outer.loop:
                    return self.answer(302, Location=self.path)
                if name in outer.assets and sent["accept"] == "application/octet-stream":
                    return self.answer(302, Location=f"http://localhost:{outer.port}/cdn/{name}")
                return self.answer(404, b'{"message": "Not Found"}')

            def body(self, data: bytes, wanted: str | None) -> None:
                start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if outer.cut:
                    self.wfile.write(data[start : start + outer.cut.pop(0)])
                    self.close_connection = True
                else:
                    self.wfile.write(data[start:])

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def release(self) -> dict[str, Any]:
        assets = [
            {"url": f"{self.api}/assets/{name}", "id": n, "name": name, "size": len(body), "state": "uploaded"}
            | self.more
            for n, (name, body) in enumerate(self.assets.items())
        ]
        return {"tag_name": "v1", "assets": assets}

    def downloads(self) -> list[str | None]:
        return [headers.get("range") for _, path, headers in self.seen if path.startswith("/cdn/")]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("DUTCHMAN_GITHUB_API", server.api)
    monkeypatch.setenv("DUTCHMAN_GITHUB_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture
def kernels(tmp_path: Path) -> Kernels:
    return Kernels(tmp_path / "kernels")


def wanted(data: bytes, **more: str) -> Wanted:
    return Wanted(**{"tag": "v1", "repository": "o/k", "digest": sha(data), "arch": "x86_64", **more})


def test_a_real_kernel_is_fetched_with_its_initfs_and_the_token_stays_with_the_api(
    server: Server, kernels: Kernels
) -> None:
    real = guest_kernel()
    if real.arch != "x86_64":
        pytest.skip("the kernel of the tests is for another machine")
    data = zstandard.ZstdCompressor(level=1).compress(real.image.read_bytes())
    server.assets = {"vmlinux-x86_64.zst": data, "initfs-x86_64.cpio": b"070701 initial"}
    task = Task()
    made = fetch(kernels, wanted(data, name="mine", initfs=sha(b"070701 initial")), task, policy=QUICK)
    assert (made.version, made.format, made.verified) == (real.version, "vmlinux+zstd", sha(data))
    assert made.image.read_bytes() == real.image.read_bytes()
    assert made.initfs(None).read_bytes() == b"070701 initial"
    assert f"vmlinux-x86_64.zst {len(data)}/{len(data)}" in task.render()
    tokens = {host: headers.get("authorization") for host, _, headers in server.seen}
    assert tokens == {"127.0.0.1": f"Bearer {TOKEN}", "localhost": None}
    assert not list(kernels.directory.glob(".*"))


def test_katas_archive_gives_the_kernel_its_link_names(server: Server, kernels: Kernels) -> None:
    data = kata()
    server.assets = {"kata-static-1-amd64.tar.zst": data}
    made = fetch(kernels, wanted(data), Task(), policy=QUICK)
    assert made.version == "6.12.4" and "erofs" in made.features and made.acpi
    path = "opt/kata/share/kata-containers/vmlinux-6.1.9-99-other"
    other = fetch(kernels, wanted(data, member=path), Task(), policy=QUICK)
    older = kata(pack=lzma.compress)
    server.assets = {"kata-static-1-amd64.tar.xz": older}
    assert fetch(kernels, wanted(older, name="older"), Task(), policy=QUICK).version == "6.12.4"
    assert other.version == "6.1.9" and other.source.endswith("/o/k/releases/download/v1/kata-static-1-amd64.tar.zst")


def test_a_broken_download_goes_on_where_it_stopped_also_in_another_job(server: Server, kernels: Kernels) -> None:
    data = vmlinux(extra=bytes(300_000))
    server.assets = {"vmlinux-x86_64": data}
    server.cut = [1000, 1000, 1000]
    with pytest.raises(EngineError):
        fetch(kernels, wanted(data), Task(), policy=QUICK)
    assert kernels.names() == []
    assert fetch(kernels, wanted(data), Task(), policy=QUICK).version == "6.9.1-test"
    starts = [int(item[6:].partition("-")[0]) for item in server.downloads() if item]
    assert len(starts) == 3 and starts == sorted(starts) and starts[-1] > 0


def test_the_digest_decides(server: Server, kernels: Kernels) -> None:
    data = vmlinux()
    server.assets = {"vmlinux-x86_64": data}
    with pytest.raises(InvalidArgument, match="digest=sha256"):
        fetch(kernels, wanted(data, digest=""), Task(), policy=QUICK)
    with pytest.raises(Damaged, match=f"is {sha(data)}, not {sha(b'x')}"):
        fetch(kernels, wanted(b"x"), Task(), policy=QUICK)
    server.more = {"digest": sha(b"y")}
    with pytest.raises(Damaged, match="the release says"):
        fetch(kernels, wanted(data), Task(), policy=QUICK)
    assert kernels.names() == [] and not list(kernels.directory.glob(".*"))


def test_what_is_no_kernel_for_this_machine_is_refused(server: Server, kernels: Kernels) -> None:
    for name, data, says in (
        ("vmlinux-x86_64", arm64(), "for aarch64, not for x86_64"),
        ("vmlinux-x86_64", vmlinux()[:-9], "cut short"),
        ("vmlinux-x86_64", b"<html>not found</html>", "no kernel"),
        ("kata-static-1-amd64.tar.zst", kata()[:-300], "truncated|cut short|damaged"),
    ):
        server.assets = {name: data}
        with pytest.raises(EngineError, match=says):
            fetch(kernels, wanted(data), Task(), policy=QUICK)
    assert kernels.names() == []


def test_no_release_no_asset_and_a_redirect_that_never_ends(server: Server, kernels: Kernels) -> None:
    data = vmlinux()
    with pytest.raises(NotFound, match="release v2 of o/k"):
        fetch(kernels, wanted(data, tag="v2"), Task(), policy=QUICK)
    server.assets = {"README": b"x"}
    with pytest.raises(NotFound, match=r"no asset vmlinux-x86_64\.zst; it has README"):
        fetch(kernels, wanted(data), Task(), policy=QUICK)
    server.assets, server.loop = {"vmlinux-x86_64": data}, True
    with pytest.raises(Unreachable, match="more than 5 redirects"):
        fetch(kernels, wanted(data), Task(), policy=QUICK)
    server.more = {"url": "http://localhost:1/steal"}
    with pytest.raises(Unreachable, match="elsewhere than the API"):
        fetch(kernels, wanted(data), Task(), policy=QUICK)


def test_a_rate_limit_is_waited_for_when_it_ends_soon(server: Server, kernels: Kernels) -> None:
    data = vmlinux()
    server.assets = {"vmlinux-x86_64": data}
    server.limits = [
        {"Retry_After": "1"},
        {"x_ratelimit_remaining": "0", "x_ratelimit_reset": str(int(time.time()))},
    ]
    assert fetch(kernels, wanted(data), Task(), policy=QUICK).version == "6.9.1-test"
    server.limits = [{"x_ratelimit_remaining": "0", "x_ratelimit_reset": str(int(time.time()) + 3000)}]
    with pytest.raises(Unreachable, match="rate limit") as caught:
        fetch(kernels, wanted(data, name="again"), Task(), policy=QUICK)
    assert "DUTCHMAN_GITHUB_TOKEN" in str(caught.value.hint) and TOKEN not in str(caught.value)


def test_a_token_that_is_refused_is_said_to_be(server: Server, kernels: Kernels) -> None:
    server.assets, server.limits = {"vmlinux-x86_64": vmlinux()}, [{}]
    with pytest.raises(AccessDenied, match="refuses access to release v1 of o/k") as caught:
        fetch(kernels, wanted(vmlinux()), Task(), policy=QUICK)
    assert "DUTCHMAN_GITHUB_TOKEN" in str(caught.value.hint) and TOKEN not in str(caught.value)


def test_a_cancelled_fetch_ends_and_keeps_no_kernel(server: Server, kernels: Kernels) -> None:
    data = vmlinux()
    server.assets = {"vmlinux-x86_64": data}
    task = Task()
    task.cancel()
    with pytest.raises(Cancelled):
        fetch(kernels, wanted(data), task, policy=QUICK)
    assert kernels.names() == []

"""registry/: remote images looked at through a mount, from real registries, and one that is silent.

samples/estargz.tar and samples/zstd-chunked.tar are OCI layouts converted by containerd's ctr-remote 0.12 from one
image; skopeo makes zstd:chunked by itself.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Daemon, can_mount
from ociimages import make_index, make_layout
from registry import Registry, available

SAMPLES = Path(__file__).parent / "samples"

pytestmark = [
    pytest.mark.skipif(not available(), reason="docker-registry and skopeo are needed"),
    pytest.mark.skipif(can_mount() is not None, reason=str(can_mount())),
]

BIG = b"".join(b"%07d\n" % (number % 1000) for number in range(25_000))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    place = tmp_path_factory.mktemp("registry")
    with Registry(place) as registry:
        for name in ("estargz", "zstd-chunked"):
            with tarfile.open(SAMPLES / f"{name}.tar") as tar:
                tar.extractall(place / name)
            registry.push_layout(place / name, f"team/{name}:1", "1")
        layout = place / "plain"
        one = make_layout(layout, [{"etc": None, "etc/motd": b"amd\n"}], listed=False)
        two = make_layout(layout, [{"etc": None, "etc/motd": b"arm\n"}], platform="linux/arm64", listed=False)
        make_index(layout, {"linux/amd64": one, "linux/arm64": two}, reference="1")
        registry.push_layout(layout, "plain:1", "1")
        body = bytes(range(256)) * 4000
        make_layout(place / "raw", [{"bin/tool": (0o4755, body), "zeros": bytes(1 << 20)}], compression="none")
        registry._skopeo(
            f"oci:{place / 'raw'}:latest", "skopeo:1", "--dest-compress", "--dest-compress-format", "zstd:chunked"
        )
        yield registry


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


def test_a_plain_image_shows_its_documents_and_says_how_to_pull_it(daemon: Daemon, registry: Registry) -> None:
    at = f"registry/{registry.host}/plain"
    assert daemon.sh(f"ls {at}").split() == ["1"]
    names = daemon.sh(f"ls {at}/1").split()
    assert "rootfs.unavailable" in names and "rootfs" not in names and "platforms" in names
    assert "pull" in daemon.sh(f"cat {at}/1/rootfs.unavailable")
    manifest = json.loads(daemon.sh(f"cat {at}/1/platforms/linux-arm64/manifest.json"))
    assert daemon.sh(f"ls {at}/1/platforms").split() == ["linux-amd64", "linux-arm64"]
    assert json.loads(daemon.sh(f"cat {at}/1/platforms/linux-arm64/config.json"))["architecture"] == "arm64"
    assert int(daemon.sh(f"cat {at}/1/platforms/linux-arm64/size_bytes")) == manifest["layers"][0]["size"]
    number, blob, size, _, kind, _ = daemon.sh(f"cat {at}/1/layers").split()
    assert (number, kind) == ("00", "plain") and blob.startswith("sha256:") and int(size) > 0
    assert "COPY layer0" in daemon.sh(f"cat {at}/1/history")
    assert json.loads(daemon.sh(f"cat {at}/1/index.json"))["manifests"]
    hint = daemon.sh(f"tail -n 1 {at}/1/rootfs.unavailable").partition("'")[2].partition("'")[0]
    assert hint == f"pull {registry.host}/plain:1"
    assert plain_names(daemon, registry) == {"plain"}


def plain_names(daemon: Daemon, registry: Registry) -> set[str]:
    return set(daemon.sh(f"ls registry/{registry.host}").split()) & {"plain"}


@pytest.mark.parametrize("name", ["estargz", "zstd-chunked"])
def test_the_tree_is_what_a_pull_would_bring(daemon: Daemon, registry: Registry, name: str) -> None:
    at = f"registry/{registry.host}/team/{name}/1/rootfs"
    remote = daemon.sh(
        f"cd {at} && find . | sort && cat etc/a etc/new etc/hard old/y bin/tool && stat -c %a%u%g bin/tool"
    )
    assert "./old/x" not in remote and "./etc/gone" not in remote and "hello\nnew\nhello\ny#!/bin/sh\n475578" in remote
    assert daemon.sh(f"cat {at}/big").encode() == BIG
    assert daemon.sh(f"getfattr --only-values -n user.note {at}/big") == "kept"
    daemon.sh(f"echo 'pull {registry.host}/team/{name}:1' > images/ctl")
    pulled = f"images/{registry.host}/team/{name}:1/rootfs"
    daemon.sh(f"for i in $(seq 100); do [ -d {pulled} ] && exit 0; sleep 0.1; done; cat jobs/*/progress; exit 1")
    difference = daemon.sh(f"diff -r --no-dereference {at} {pulled} 2>&1; true")
    lines = [
        line for line in difference.splitlines() if "is a character special" not in line and "is a fifo" not in line
    ]
    assert lines in ([], [f"Only in {pulled}: stargz.index.json"])
    stats = [daemon.sh(f"cd {place} && find . -not -name stargz.index.json -not -path . "
                       "-printf '%p %y %m %U %G %T@ %l %n\\n' | sort") for place in (at, pulled)]  # fmt: skip
    assert stats[0] == stats[1]


def test_what_skopeo_made_chunked_is_read_by_parts(daemon: Daemon, registry: Registry) -> None:
    at = f"registry/{registry.host}/skopeo/1"
    assert "zstd:chunked" in daemon.sh(f"cat {at}/layers")
    assert daemon.sh(f"tail -c 256 {at}/rootfs/bin/tool | od -An -tu1 -w256 | tr -s ' '").split() == [
        str(number) for number in range(256)
    ]
    sums = daemon.sh(f"sha256sum {at}/rootfs/bin/tool {at}/rootfs/zeros; stat -c %a {at}/rootfs/bin/tool").split()
    import hashlib

    assert sums[0] == hashlib.sha256(bytes(range(256)) * 4000).hexdigest()
    assert sums[2] == hashlib.sha256(bytes(1 << 20)).hexdigest()
    assert sums[4] == "4755"


def test_what_is_not_there_is_not_there(daemon: Daemon, registry: Registry) -> None:
    at = f"registry/{registry.host}"
    assert daemon.sh(f"ls {at}/plain/2 2>&1; true").strip().endswith("No such file or directory")
    assert daemon.sh("ls registry/.git 2>&1; true").strip().endswith("No such file or directory")
    assert daemon.sh(f"ls {at}/plain/.hidden 2>&1; true").strip().endswith("No such file or directory")
    daemon.refused(f"echo x > {at}/plain/1/digest", "Permission denied")
    daemon.refused(f"touch {at}/team/estargz/1/rootfs/new", "Read-only file system")


def test_a_silent_registry_holds_nobody_up(daemon: Daemon) -> None:
    """It takes connections and says nothing: every step ends soon, with an errno that says why."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []
        stop = threading.Event()

        def accept() -> None:
            server.settimeout(0.1)
            while not stop.is_set():
                try:
                    taken.append(server.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            at = f"{daemon.mount}/registry/127.0.0.1:{server.getsockname()[1]}/team/app"
            for path in (at, f"{at}/1", f"{at}/1/manifest.json", at):
                done = subprocess.run(["ls", "-l", path], capture_output=True, text=True, timeout=30)
                assert done.returncode and "timed out" in done.stderr, done.stderr
            assert daemon.sh("cat version", timeout=5)
            assert taken
        finally:
            stop.set()
            thread.join()
            for connection in taken:
                connection.close()


def test_a_pull_goes_on_after_the_daemon_was_killed_and_after_it_was_stopped(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    make_layout(layout, [{"etc": None, "etc/motd": b"still here\n"}])
    registry = Registry(tmp_path).start()
    daemon = Daemon(tmp_path / "daemon")
    try:
        registry.push_layout(layout, "app:1")
        registry.stop()
        daemon.start()
        daemon.sh(f"echo 'pull {registry.host}/app:1' > images/ctl")  # tries again and again
        assert daemon.sh("cat jobs/1/state") == "running\n"
        daemon.kill()
        daemon.start()
        assert daemon.sh("cat jobs/1/state") == "running\n"
        daemon.stop()
        registry.start()
        daemon.start()
        daemon.until("cat jobs/1/state", "done", seconds=20)
        assert daemon.sh(f"cat images/{registry.host}/app:1/rootfs/etc/motd") == "still here\n"
        assert "Traceback" not in daemon.log()
    finally:
        daemon.stop()
        registry.stop()

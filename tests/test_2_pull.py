"""Pulling from Debian's docker-registry, filled by skopeo, with and without htpasswd."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import AccessDenied, InvalidArgument, NotFound
from engine.images import manifests, platforms, registries
from engine.images.manifests import Descriptor
from engine.images.mirrors import Mirrored
from engine.images.pull import pull
from engine.images.reference import parse
from engine.images.transport import Policy
from engine.jobs import Cancelled, Jobs, State, Task
from tests.imagestore import ImageStore
from tests.ociimages import (
    busybox_rootfs_tar,
    digest_of,
    make_docker_archive,
    make_index,
    make_layout,
    make_tar,
)
from tests.registry import Registry, available

if not available() and os.environ.get("CI"):
    raise RuntimeError("docker-registry and skopeo are needed")
pytestmark = pytest.mark.skipif(not available(), reason="docker-registry and skopeo are not installed")


@pytest.fixture(autouse=True)
def _no_logins_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("layout")
    base = busybox_rootfs_tar()
    top = {"etc/motd": b"hello\n", "tmp/.wh.gone": b""}
    amd = make_layout(directory, [base, top], listed=False)
    arm = make_layout(directory, [{"etc/motd": b"arm\n"}], platform="linux/arm64", listed=False)
    make_index(directory, {"linux/arm64": arm, "linux/amd64": amd}, reference="multi")
    for compression in ("none", "gzip", "zstd"):
        make_layout(directory, [{"a": compression.encode()}, {"b": b"2"}], compression=compression,
                    reference=compression)  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, layout: Path) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry")) as running:
        running.push_layout(layout, "demo:1", "multi")
        for compression in ("none", "gzip", "zstd"):
            running.push_layout(layout, f"plain:{compression}", compression)
        archive = layout / "archive.tar"
        make_docker_archive(archive, [{"old": b"docker"}])
        running.push_archive(archive, "team/docker:v2s2")
        yield running


def test_the_platform_of_an_index_is_pulled_and_readable(tmp_path: Path, registry: Registry) -> None:
    with ImageStore(tmp_path / "store") as store:
        task = Task()
        image = pull(store.images, registry.name("demo:1"), "linux/amd64", task)
        assert image.platform == "linux/amd64"
        assert store.read(image.digest, "etc/motd") == b"hello\n"
        assert store.read(image.digest, "bin/busybox") == Path("/bin/busybox").read_bytes()
        assert store.images.resolve(registry.name("demo:1")) == image
        assert store.images.references(image.digest) == [registry.name("demo:1")]
        assert digest_of(store.images.manifest(image.digest)) == image.digest
        assert ("imagePulled", f"image/{image.digest}") in store.events()
        assert all(store.trees.has(layer.diff_id) for layer in store.images.layers(image.digest))
        lines = task.render().splitlines()
        assert lines[0].startswith("pulled ")
        assert [line.split()[-1] for line in lines[1:3]] == ["done", "done"]
        total = lines[-1].split()
        assert total[0] == "total" and total[2] == "100%"
        assert "blobs" in store.images.verify(image.digest, None)


def test_another_platform_by_name_and_a_missing_one(tmp_path: Path, registry: Registry) -> None:
    with ImageStore(tmp_path / "store") as store:
        image = pull(store.images, registry.name("demo:1"), "linux/arm64")
        assert store.read(image.digest, "etc/motd") == b"arm\n"
        with pytest.raises(NotFound, match="linux/amd64, linux/arm64"):
            pull(store.images, registry.name("demo:1"), "linux/s390x")
        with pytest.raises(NotFound, match="only linux/amd64"):
            pull(store.images, registry.name("plain:gzip"), "linux/arm64")


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_each_compression(tmp_path: Path, registry: Registry, compression: str) -> None:
    with ImageStore(tmp_path / "store") as store:
        image = pull(store.images, registry.name(f"plain:{compression}"))
        assert store.read(image.digest, "a") == compression.encode()


def test_docker_v2s2(tmp_path: Path, registry: Registry) -> None:
    with ImageStore(tmp_path / "store") as store:
        image = pull(store.images, registry.name("team/docker:v2s2"))
        assert image.media_type.startswith("application/vnd.docker.distribution.manifest.v2")
        assert store.read(image.digest, "old") == b"docker"


def test_by_digest_of_the_index_and_of_the_manifest(tmp_path: Path, registry: Registry, layout: Path) -> None:
    index = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    with ImageStore(tmp_path / "store") as store:
        image = pull(store.images, registry.name(f"demo@{index}"), "linux/amd64")
        assert image.digest != index
        assert store.images.resolve(registry.name(f"demo@{index}")) == image
        again = pull(store.images, registry.name(f"demo:other@{image.digest}"))
        assert again.digest == image.digest


def test_layers_the_store_has_are_not_fetched_again(tmp_path: Path, registry: Registry) -> None:
    with ImageStore(tmp_path / "store") as store:
        pull(store.images, registry.name("plain:gzip"))
        task = Task()
        pull(store.images, registry.name("plain:zstd"), None, task)
        assert "present" in task.render()  # the second layer is the same tar, compressed otherwise


def test_missing_tag_and_repository(tmp_path: Path, registry: Registry) -> None:
    with ImageStore(tmp_path / "store") as store:
        with pytest.raises(NotFound, match="manifest nope"):
            pull(store.images, registry.name("demo:nope"))
        with pytest.raises(NotFound):
            pull(store.images, registry.name("nothing/here:1"))
        with pytest.raises(InvalidArgument):
            pull(store.images, "Bad Name")
        assert store.images.all() == []


def test_htpasswd_wants_a_login_and_takes_it_from_the_files(
    tmp_path: Path, layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64

    with Registry(tmp_path / "r", users={"ann": "s3cret"}) as running, ImageStore(tmp_path / "store") as store:
        running.push_layout(layout, "private/demo:1", "multi")
        name = running.name("private/demo:1")
        with pytest.raises(AccessDenied, match="wants a login") as caught:
            pull(store.images, name)
        assert "login" in (caught.value.hint or "")

        def entry(password: str) -> dict[str, str]:
            return {"auth": base64.b64encode(f"ann:{password}".encode()).decode()}

        docker = tmp_path / ".docker"
        docker.mkdir()
        (docker / "config.json").write_text(json.dumps({"auths": {running.host: entry("wrong")}}))
        with pytest.raises(AccessDenied) as caught:
            pull(store.images, name)
        assert "log in again" in (caught.value.hint or "")
        assert "wrong" not in str(caught.value) + (caught.value.hint or "")
        # the containers tools' file comes first, and a repository's key before the registry's
        auth = tmp_path / "auth.json"
        auth.write_text(json.dumps({"auths": {running.host: entry("x"), f"{running.host}/private": entry("s3cret")}}))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(auth))
        image = pull(store.images, name, "linux/amd64")
        assert store.read(image.digest, "etc/motd") == b"hello\n"


def _big(directory: Path, seed: int = 0) -> tuple[str, int]:
    """A layout tagged big: one small layer and one of 24 MiB that does not compress."""
    import random

    body = random.Random(seed).randbytes(24 << 20)
    digest = make_layout(directory, [{"small": b"1"}, {"big": body}], compression="none", reference="big")
    return digest, len(make_tar({"big": body}))


KILLED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from engine.images import pull as module
from engine.jobs import Task
from tests.imagestore import ImageStore
import threading, time
store = ImageStore(Path({store!r}))
task = Task()
real = task.advance
def advance(label, done, total, note=""):
    real(label, done, total, note)
    if total > 1 << 20 and done > 8 << 20:
        print("deep", flush=True)
        time.sleep(60)
task.advance = advance
module.pull(store.images, {name!r}, None, task)
"""


def test_a_pull_killed_in_the_middle_is_resumed(tmp_path: Path, registry: Registry) -> None:
    directory = tmp_path / "layout"
    digest, size = _big(directory)
    registry.push_layout(directory, "big:killed", "big")
    root = str(Path(__file__).parents[1])
    script = KILLED.format(root=root, store=str(tmp_path / "store"), name=registry.name("big:killed"))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "deep\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close() if child.stdout else None
    from engine.store.check import empty_tmp, remove_strays

    with ImageStore(tmp_path / "store") as store:
        empty_tmp(store.root)
        remove_strays(store.root, store.meta)
        assert store.images.all() == []
        part = next((tmp_path / "store" / "tmp").glob("partial-*"))
        assert 0 < part.stat().st_size < size
        task = Task()
        image = pull(store.images, registry.name("big:killed"), None, task)
        assert image.digest == digest
        assert "resuming at byte" in task.log_text()
        store.images.verify(digest, None)


def test_a_layer_may_link_to_files_of_those_below_it(tmp_path: Path, registry: Registry) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("name")
        link.type, link.linkname = tarfile.LNKTYPE, "file"
        tar.addfile(link)
    make_layout(tmp_path / "layout", [{"file": b"below"}, out.getvalue()], reference="linked")
    registry.push_layout(tmp_path / "layout", "linked:1", "linked")
    with ImageStore(tmp_path / "store") as store:
        image = pull(store.images, f"{registry.host}/linked:1")
        tree = store.trees.open(image.chain_id)
        assert tree.lookup(b"name") == tree.lookup(b"file")


def test_a_damaged_part_is_fetched_from_the_start(tmp_path: Path, registry: Registry) -> None:
    directory = tmp_path / "layout"
    digest, size = _big(directory, 3)
    registry.push_layout(directory, "big:part", "big")
    with ImageStore(tmp_path / "store") as store:
        blob = json.loads((directory / "blobs" / "sha256" / digest[7:]).read_text())["layers"][1]["digest"]
        (store.root / "tmp" / f"partial-{blob[7:]}").write_bytes(b"\1" * (size // 2))
        task = Task()
        pull(store.images, registry.name("big:part"), None, task)
        assert "once more from the start" in task.log_text()


def test_cancelling_a_job_ends_it_promptly_and_keeps_the_part(tmp_path: Path, registry: Registry) -> None:
    directory = tmp_path / "layout"
    _big(directory, 1)
    registry.push_layout(directory, "big:cancel", "big")
    with ImageStore(tmp_path / "store") as store:
        jobs = Jobs(store.meta, store.journal)
        number = 0
        deep = threading.Event()

        def work(task: Task) -> str:
            real = task.advance

            def advance(label: str, done: int, total: int, note: str = "") -> None:
                real(label, done, total, note)
                if done > 4 << 20 and not deep.is_set():
                    deep.set()
                    task.cancelled.wait(100)

            task.advance = advance  # type: ignore[method-assign]
            return pull(store.images, registry.name("big:cancel"), None, task).digest

        number = jobs.start("pull big", work)
        assert deep.wait(20)
        jobs.cancel(number)
        assert jobs.wait(number, 50).state is State.CANCELLED
        assert store.images.all() == []
        pull(store.images, registry.name("big:cancel"))
        jobs.close()


def test_two_pulls_at_once_fetch_a_layer_once(tmp_path: Path, registry: Registry) -> None:
    directory = tmp_path / "layout"
    digest, _size = _big(directory, 2)
    registry.push_layout(directory, "big:twice", "big")
    with ImageStore(tmp_path / "store") as store:
        tasks = [Task(), Task()]
        results: list[str] = []

        def run(task: Task) -> None:
            results.append(pull(store.images, registry.name("big:twice"), None, task).digest)

        threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [digest, digest]
        logs = "".join(task.log_text() for task in tasks)
        assert logs.count("is layer") == 2  # two layers, each fetched by one of the pulls
        for task in tasks:
            assert "total" in task.render()


def test_a_cancelled_task_does_nothing(tmp_path: Path, registry: Registry) -> None:
    with ImageStore(tmp_path / "store") as store:
        task = Task()
        task.cancel()
        with pytest.raises(Cancelled):
            pull(store.images, registry.name("demo:1"), None, task)


# --- several platforms of one reference -----------------------------------------------------------------------------


def test_an_index_is_kept_and_its_other_platforms_are_shown(tmp_path: Path, registry: Registry) -> None:
    name = registry.name("demo:1")
    with ImageStore(tmp_path / "store") as store:
        amd = pull(store.images, name, "linux/amd64")
        (there,) = [entry for entry in platforms.listed(store.images, amd.digest) if entry.name == "linux-arm64"]
        assert not there.present and there.size > 0
        arm = pull(store.images, name, "linux/arm64")
        assert arm.digest == there.digest
        own = amd if str(manifests.host()) == "linux/amd64" else arm
        assert store.images.tags()[name] == own.digest  # a chosen platform does not take the name of this host's
        assert {(entry.name, entry.present) for entry in platforms.listed(store.images, arm.digest)} == {
            ("linux-amd64", True),
            ("linux-arm64", True),
        }
        assert platforms.named(store.images, name, "").digest == own.digest
        for wanted, image in (("linux/amd64", amd), ("arm64", arm), ("linux/arm64/v8", arm), ("linux/amd64/v3", amd)):
            assert platforms.named(store.images, name, wanted).digest == image.digest
            assert platforms.named(store.images, image.digest, wanted).digest == image.digest
        with pytest.raises(NotFound, match=r"no such image for linux/s390x: that is for linux/amd64") as caught:
            platforms.named(store.images, amd.digest, "linux/s390x")
        assert f"pull {name} platform=linux/s390x" in str(caught.value.hint) or own is not amd
        indexes = [digest for digest in store.blobs.all() if b'"manifests"' in store.blobs.read(digest, 1 << 24)[:200]]
        assert len(indexes) == 1
        store.images.collect()
        assert store.blobs.has(indexes[0])
        for image in (amd, arm):
            store.images.remove(image.digest)
        assert store.blobs.all() == []
        plain = pull(store.images, registry.name("plain:gzip"))
        assert platforms.listed(store.images, plain.digest) == []


# --- mirrors --------------------------------------------------------------------------------------------------------


def test_mirrors_are_asked_first_and_nothing_depends_on_them(tmp_path: Path, registry: Registry, layout: Path) -> None:
    quick = Policy(attempts=2, base=0.01, cap=0.02, budget=5, connect=2, read=5)
    with Registry(tmp_path) as mirror, ImageStore(tmp_path / "store") as store:
        mirror.push_layout(layout, "hub/plain:gzip", "gzip")
        document = f"registries:\n  {registry.host}:\n    mirrors: ['127.0.0.1:1', '{mirror.host}/hub']\n"
        registries.write(store.root, document.encode())
        task = Task()
        image = pull(store.images, registry.name("plain:gzip"), task=task, policy=quick)
        assert "mirror 127.0.0.1:1" in task.log_text() and f"mirror {mirror.host}" not in task.log_text()
        assert store.images.references(image.digest) == [registry.name("plain:gzip")]
        task = Task()
        pull(store.images, registry.name("plain:zstd"), task=task, policy=quick)  # only in the registry itself
        assert f"mirror {mirror.host}" in task.log_text()
        # only there
        store.images.remove(registry.name("plain:gzip"))
        registries.write(store.root, f"registries:\n  nowhere.invalid:\n    mirrors: ['{mirror.host}/hub']\n".encode())
        again = pull(store.images, "nowhere.invalid/plain:gzip", policy=quick)
        assert again.digest == image.digest


def test_a_mirror_that_breaks_off_is_followed_by_the_next(tmp_path: Path, registry: Registry) -> None:
    with ImageStore(tmp_path / "store") as store:
        name = parse(registry.name("demo:1"))
        with Mirrored(store.root, name, Task()) as source:
            raw, _, _ = source.manifest("1")
            entry = Descriptor("x", "sha256:" + "0" * 64, 10)

            class Half:
                reference = name

                def blob(self, entry: Descriptor, offset: int) -> Iterator[bytes]:
                    yield b"01234"
                    raise NotFound("gone")

            class Rest(Half):
                def blob(self, entry: Descriptor, offset: int) -> Iterator[bytes]:
                    yield b"0123456789"[offset:]

            source._mirrors = [Half(), Rest()]  # type: ignore[list-item]
            assert b"".join(source.blob(entry, 0)) == b"0123456789" and raw


@pytest.mark.parametrize(("text", "match"), [
    ("[", "not YAML"),
    ("- a", "mapping"),
    ("registry: {}", "registry: unknown field"),
    ("registries: {'http://x': {}}", "host"),
    ("registries: {x.y: {mirrors: ['https://m']}}", "mirrors"),
    ("registries: {x.y: {insecure: perhaps}}", "insecure"),
    ("registries: {x.y: {ca_file: relative}}", "absolute"),
    ("default: {ca_file: /nonexistent}", "no such file"),
    ("default: {ca_file: /etc/passwd}", "no certificate"),
])  # fmt: skip
def test_registries_yaml_is_checked_whole(tmp_path: Path, text: str, match: str) -> None:
    registries.write(tmp_path, b"registries: {a.b: {insecure: true}}")
    with pytest.raises(InvalidArgument, match=match):
        registries.write(tmp_path, text.encode())
    assert registries.load(tmp_path).rules("a.b").insecure
    assert not registries.load(tmp_path).rules("c.d").insecure
    assert registries.parse(registries.EMPTY) == registries.Registries()

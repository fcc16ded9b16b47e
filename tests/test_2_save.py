"""Saving and exporting images: what skopeo, umoci and tar make of the files, byte for byte by digest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import AlreadyExists, InvalidArgument, NotFound
from engine.images import tarout
from engine.images.archive import load
from engine.images.catalog import Image
from engine.images.export import export
from engine.images.save import save
from engine.jobs import Cancelled, Task
from engine.store.tar import TarReader
from tests.imagestore import ImageStore
from tests.ociimages import busybox_rootfs_tar, digest_of, make_layout

TOOLS = shutil.which("skopeo") and shutil.which("umoci")
if not TOOLS and os.environ.get("CI"):
    raise RuntimeError("skopeo and umoci are needed")
needs_tools = pytest.mark.skipif(not TOOLS, reason="skopeo and umoci are not installed")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    with ImageStore(tmp_path / "store") as store:
        yield store


@pytest.fixture
def image(tmp_path: Path, store: ImageStore) -> Image:
    layout = tmp_path / "source"
    make_layout(layout, [busybox_rootfs_tar(), {"etc/motd": b"two\n", "bin/.wh.tail": b""}], compression="gzip")
    (image,) = load(store.images, layout)
    store.images.tag(image.digest, "demo/app:1")
    return image


def blobs(directory: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (directory / "blobs" / "sha256").iterdir()}
    assert all(digest_of(data)[7:] == name for name, data in found.items())
    return found


@needs_tools
def test_a_layout_is_taken_by_skopeo_and_umoci_with_its_digests(
    tmp_path: Path, store: ImageStore, image: Image
) -> None:
    out = tmp_path / "out"
    save(store.images, image.digest, out)
    assert blobs(out) == blobs(tmp_path / "source")
    seen = json.loads(run("skopeo", "inspect", f"oci:{out}:1"))
    assert seen["Digest"] == image.digest
    run("skopeo", "--insecure-policy", "copy", "-q", "--preserve-digests", f"oci:{out}:1", f"dir:{tmp_path}/copy")
    assert digest_of((tmp_path / "copy" / "manifest.json").read_bytes()) == image.digest
    run("umoci", "unpack", "--image", f"{out}:1", str(tmp_path / "bundle"))
    assert (tmp_path / "bundle" / "rootfs" / "etc" / "motd").read_text() == "two\n"
    assert not (tmp_path / "bundle" / "rootfs" / "bin" / "tail").exists()


@needs_tools
def test_a_tar_of_a_layout_and_a_docker_archive(tmp_path: Path, store: ImageStore, image: Image) -> None:
    save(store.images, image.digest, tmp_path / "oci.tar")
    assert json.loads(run("skopeo", "inspect", f"oci-archive:{tmp_path}/oci.tar:1"))["Digest"] == image.digest
    with tarfile.open(tmp_path / "oci.tar") as tar:  # what `docker load` looks for, in a layout too
        (listed,) = json.load(tar.extractfile("manifest.json") or pytest.fail("no manifest.json"))
        held = [digest_of(tar.extractfile(blob).read()) for blob in (listed["Config"], *listed["Layers"])]  # type: ignore[union-attr]
    assert held == [image.config, *(layer.blob for layer in store.images.layers(image.digest))]
    save(store.images, image.digest, tmp_path / "docker.tar", "docker")
    name = "docker.io/demo/app:1"
    config = run("skopeo", "inspect", "--config", "--raw", f"docker-archive:{tmp_path}/docker.tar:{name}")
    assert config.encode() == store.images.config_bytes(image.digest)
    run("skopeo", "--insecure-policy", "copy", "-q", f"docker-archive:{tmp_path}/docker.tar:{name}",
        f"oci:{tmp_path}/again:1")  # fmt: skip
    with tarfile.open(tmp_path / "docker.tar") as tar:
        (listed,) = json.load(tar.extractfile("manifest.json") or pytest.fail("no manifest.json"))
        bodies = [digest_of(tar.extractfile(layer).read()) for layer in listed["Layers"]]  # type: ignore[union-attr]
    assert bodies == [layer.diff_id for layer in store.images.layers(image.digest)]
    assert listed["RepoTags"] == ["demo/app:1"]


@pytest.mark.parametrize(("form", "name"), [("oci", "x"), ("oci", "x.tar"), ("docker", "x.tar")])
def test_what_was_saved_is_loaded_as_the_same_image(
    tmp_path: Path, store: ImageStore, image: Image, form: str, name: str
) -> None:
    path = tmp_path / name
    save(store.images, image.digest, path, form)
    first = path.read_bytes() if path.is_file() else b""
    with ImageStore(tmp_path / "other") as other:
        (again,) = load(other.images, path)
        assert again.config == image.config and again.chain_id == image.chain_id
        assert form == "docker" or again.digest == image.digest
        assert other.images.references(again.digest) == ["docker.io/demo/app:1"]
    if first:
        path.unlink()
        save(store.images, image.digest, path, form)
        assert path.read_bytes() == first


def test_what_is_there_is_not_replaced_and_nothing_half_remains(
    tmp_path: Path, store: ImageStore, image: Image
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    (room / "x.tar").write_bytes(b"mine")
    with pytest.raises(AlreadyExists):
        save(store.images, image.digest, room / "x.tar")
    assert (room / "x.tar").read_bytes() == b"mine"
    with pytest.raises(NotFound, match="directory"):
        save(store.images, image.digest, room / "none" / "x.tar")
    with pytest.raises(InvalidArgument, match="absolute"):
        save(store.images, image.digest, "x.tar")
    with pytest.raises(InvalidArgument, match="format"):
        save(store.images, image.digest, room / "y", "zip")
    stopped = Task()
    stopped.cancel()
    for name in ("y", "y.tar"):
        with pytest.raises(Cancelled):
            save(store.images, image.digest, room / name, task=stopped)
    assert os.listdir(room) == ["x.tar"]


def test_a_blob_that_is_gone_is_named(tmp_path: Path, store: ImageStore, image: Image) -> None:
    gone = store.images.layers(image.digest)[1]
    store.blobs.remove(gone.blob)
    with pytest.raises(NotFound, match=gone.blob):
        save(store.images, image.digest, tmp_path / "x")
    with pytest.raises(NotFound, match=gone.diff_id):
        save(store.images, image.digest, tmp_path / "x.tar", "docker")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.tar").exists()
    # another blob of the same layer: enough for an archive without compression
    other = make_layout(tmp_path / "zstd", [{"etc/motd": b"two\n", "bin/.wh.tail": b""}], compression="zstd")
    load(store.images, tmp_path / "zstd")
    assert not store.blobs.has(gone.blob) and other != image.digest
    blob = next(path for path in (tmp_path / "zstd" / "blobs" / "sha256").iterdir()
                if path.read_bytes()[:4] == b"\x28\xb5\x2f\xfd")  # fmt: skip
    with store.blobs.writer("application/vnd.oci.image.layer.v1.tar+zstd") as writer:
        store.layers.ingest([blob.read_bytes()], writer._media_type, keep=writer)
    save(store.images, image.digest, tmp_path / "x.tar", "docker")
    with pytest.raises(NotFound, match=gone.blob):
        save(store.images, image.digest, tmp_path / "x")


def test_export_is_the_merged_tree(tmp_path: Path, store: ImageStore, image: Image) -> None:
    out = tmp_path / "root.tar"
    export(store.images, image.digest, out)
    with tarfile.open(out) as tar:
        names = tar.getnames()
        assert "bin/tail" not in names and "bin/cat" in names
        assert tar.extractfile("etc/motd").read() == b"two\n"  # type: ignore[union-attr]
        assert tar.getmember("bin/busybox").mode == 0o755
        assert names.index("bin") < names.index("bin/busybox")
    shutil.rmtree(tmp_path / "dir", ignore_errors=True)
    (tmp_path / "dir").mkdir()
    run("tar", "-xf", str(out), "-C", str(tmp_path / "dir"))
    assert os.readlink(tmp_path / "dir" / "bin" / "cat") == "busybox"


def test_headers_say_what_was_put_in() -> None:
    deep = b"d/" * 120 + b"file"
    cases = [
        tarout.Member(b"plain", size=3, mtime_ns=1_700_000_000_000_000_000),
        tarout.Member(deep, mode=0o4755, mtime_ns=1_500_000_001),
        tarout.Member("späße".encode(), tarout.SYMLINK, 0o777, linkname=b"x" * 300),
        tarout.Member(b"raw\xff\xfe", uid=1 << 31, gid=(1 << 32) - 2, mtime_ns=-1_500_000_000),
        tarout.Member(b"dir", tarout.DIRECTORY, 0o1777),
        tarout.Member(b"dev", tarout.CHAR, rdev=(1, 3)),
        tarout.Member(b"link", tarout.HARDLINK, linkname=deep),
        tarout.Member(b"cap", xattrs={b"security.capability": b"\0\n=\xff", b"user.empty": b""}),
    ]
    raw = b"".join(tarout.archive((case, (b"abc",) if case.size else ()) for case in cases))
    back = list(TarReader(iter([raw])))
    for case, member in zip(cases, back, strict=True):
        assert member.name.rstrip(b"/") == case.name
        assert (member.mode, member.uid, member.gid) == (case.mode, case.uid, case.gid)
        assert member.mtime_ns == case.mtime_ns and member.linkname == case.linkname
        assert member.xattrs == case.xattrs

"""Images from files: layouts, docker archives old and new, root filesystem tars; hostile ones are refused."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import Damaged, EngineError, InvalidArgument, NotFound, TooLarge
from engine.images import files, platforms
from engine.images.archive import import_rootfs, load
from engine.jobs import Task
from tests.imagestore import ImageStore
from tests.ociimages import (
    busybox_rootfs_tar,
    compress,
    digest_of,
    make_docker_archive,
    make_index,
    make_layout,
    make_tar,
)

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
LAYERS = FIXTURES / "layers"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="the fixtures are not there")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    with ImageStore(tmp_path / "store") as opened:
        yield opened


def _names(store: ImageStore, digest: str) -> list[str]:
    tree = store.trees.open(store.images.get(digest).chain_id)
    return sorted(name.decode() for name, _, _ in tree.readdir(tree.root))


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_layout_as_directory_and_as_tar_is_the_same_image(
    tmp_path: Path, store: ImageStore, compression: str
) -> None:
    layout = tmp_path / "layout"
    digest = make_layout(layout, [{"a": b"1", "b": b"2"}, {".wh.a": b""}], compression=compression,
                         reference="ghcr.io/o/r:tag")  # fmt: skip
    assert [image.digest for image in load(store.images, layout)] == [digest]
    assert store.images.references(digest) == ["ghcr.io/o/r:tag"]
    assert _names(store, digest) == ["b"]
    with tarfile.open(tmp_path / "layout.tar.gz", "w:gz") as tar:
        tar.add(layout, arcname=".")
    assert [image.digest for image in load(store.images, tmp_path / "layout.tar.gz")] == [digest]
    assert [kind for kind, _ in store.events()].count("imageLoaded") == 2


def test_an_index_in_a_layout_gives_this_hosts_image(tmp_path: Path, store: ImageStore) -> None:
    layout = tmp_path / "layout"
    amd = make_layout(layout, [{"arch": b"amd64"}], listed=False)
    arm = make_layout(layout, [{"arch": b"arm64"}], platform="linux/arm64", listed=False)
    make_index(layout, {"linux/arm64/v8": arm, "linux/amd64": amd})
    (image,) = load(store.images, layout)
    wanted = {"x86_64": b"amd64", "aarch64": b"arm64"}[os.uname().machine]
    assert store.read(image.digest, "arch") == wanted


def test_another_platform_of_an_index_in_a_layout(tmp_path: Path, store: ImageStore) -> None:
    layout = tmp_path / "layout"
    made = {
        name: make_layout(layout, [{"arch": name.encode()}], platform=name, listed=False)
        for name in ("linux/amd64", "linux/arm64", "linux/s390x")
    }
    make_index(layout, made, reference="demo:1")
    make_layout(layout, [{"alone": b""}], reference="demo:2", platform="linux/amd64")
    (other,) = load(store.images, layout, platform="linux/s390x")
    assert other.digest == made["linux/s390x"]
    assert store.images.references(other.digest) == ["docker.io/library/demo:1"]  # nobody else has the name
    own = load(store.images, layout)[0]
    (arm,) = load(store.images, layout, platform="arm64")
    assert arm.digest == made["linux/arm64"] and store.read(arm.digest, "arch") == b"linux/arm64"
    assert store.images.tags()["docker.io/library/demo:1"] == own.digest  # it stays what this host runs
    for name, digest in made.items():  # the others are found beside it
        if name in ("linux/s390x", "linux/arm64", own.platform):
            assert platforms.named(store.images, "demo:1", name).digest == digest
    before = [image.digest for image in store.images.all()]
    with pytest.raises(NotFound, match=r"linux/riscv64"):
        load(store.images, layout, platform="linux/riscv64")
    with pytest.raises(InvalidArgument):
        load(store.images, layout, platform="a/b/c/d")
    assert [image.digest for image in store.images.all()] == before


@needs_fixtures
def test_regclients_layout(store: ImageStore) -> None:
    images = load(store.images, FIXTURES / "oci-layouts" / "regclient" / "testrepo")
    assert len(images) >= 3
    for image in images:
        store.images.verify(image.digest, None)
    assert {b"1\n", b"2\n", b"3\n"} >= {
        store.read(image.digest, name) for image in images for name in _names(store, image.digest) if "layer" in name
    }


@needs_fixtures
def test_regclients_external_layout_is_refused(store: ImageStore) -> None:
    with pytest.raises(EngineError):
        load(store.images, FIXTURES / "oci-layouts" / "regclient" / "external")


# --- docker archives ------------------------------------------------------------------------------------------------

ARCHIVES: dict[str, list[tuple[list[str], dict[str, str | None]]]] = {
    # archive -> per image: names, and files of the merged tree (None: not there)
    "ggcr-tarball/test_image_1.tar": [(["docker.io/bazel/v1/tarball:test_image_1"], {})],
    "ggcr-tarball/test_image_2.tar": [(["docker.io/bazel/v1/tarball:test_image_2"], {})],
    "ggcr-tarball/test_load_manifest.tar": [(["docker.io/bazel/v1/tarball:test_image_1"], {})],
    "ggcr-tarball/hello-world-v25.tar": [([], {"hello": ""})],
    "ggcr-tarball/test_bundle.tar": [
        (["docker.io/library/test_image_2:latest"], {}),
        (["docker.io/library/test_image_1:latest"], {}),
    ],
    "ggcr-mutate/source_image.tar": [(["docker.io/bazel/pkg/v1/mutate:source_image"], {})],
    "ggcr-mutate/source_image_with_empty_layer_history.tar": [(["docker.io/bazel/pkg/v1/mutate:source_image"], {})],
    "ggcr-mutate/overwritten_file.tar": [(["docker.io/bazel/pkg/v1/mutate:overwritten_file"], {})],
    "ggcr-mutate/whiteout_image.tar": [(["docker.io/bazel/pkg/v1/mutate:whiteout_image"], {"foo.txt": None})],
    "ggcr-mutate/whiteout_dir.tar": [(["localhost:5000/whiteout:latest"], {})],
    "moby-integration-cli/emptyLayer.tar": [(["docker.io/matthughes/library-centos:6-2015.03.20"], {})],
}


@needs_fixtures
@pytest.mark.parametrize("name", ARCHIVES)
def test_docker_archives_of_other_tools(store: ImageStore, name: str) -> None:
    images = load(store.images, LAYERS / name)
    expected = ARCHIVES[name]
    assert len(images) == len(expected)
    for image, (names, files_) in zip(images, expected, strict=True):
        assert set(names) <= set(store.images.references(image.digest))
        top = _names(store, image.digest)
        for path, content in files_.items():
            assert (path in top) is (content is not None)
        store.images.verify(image.digest, None)


@needs_fixtures
def test_a_layer_that_is_a_link_to_another_has_to_match_its_diff_id(store: ImageStore) -> None:
    images = load(store.images, LAYERS / "ggcr-tarball" / "test_link.tar")
    assert len(images) == 2
    first, second = (store.images.layers(image.digest) for image in images)
    assert second[0] == first[0] or second[0].diff_id == first[0].diff_id


@needs_fixtures
def test_an_archive_with_only_the_repositories_file(store: ImageStore) -> None:
    (image,) = load(store.images, LAYERS / "ggcr-tarball" / "no_manifest.tar")
    assert store.images.references(image.digest) == ["docker.io/bazel/v1/tarball:test_image"]
    assert len(store.images.layers(image.digest)) == 1


@needs_fixtures
@pytest.mark.parametrize("name", ["ggcr-tarball/null_manifest.tar", "ggcr-tarball/content.tar"])
def test_what_is_no_archive_is_refused(store: ImageStore, name: str) -> None:
    with pytest.raises((InvalidArgument, Damaged)):
        load(store.images, LAYERS / name)
    assert store.images.all() == []


def test_a_docker_archive_of_another_platform(tmp_path: Path, store: ImageStore) -> None:
    make_docker_archive(tmp_path / "one.tar", [{"a": b"1"}])
    with pytest.raises(NotFound, match="no image for linux/arm64; there is only linux/amd64"):
        load(store.images, tmp_path / "one.tar", platform="linux/arm64")
    assert not store.images.all() and not store.images.tags()
    (image,) = load(store.images, tmp_path / "one.tar", platform="linux/amd64")
    assert image.platform == "linux/amd64"


def test_a_docker_archive_gets_the_same_manifest_every_time(tmp_path: Path, store: ImageStore) -> None:
    config = make_docker_archive(tmp_path / "a.tar", [busybox_rootfs_tar(), {"x": b"1"}], tags=["demo:1", "demo:2"])
    (image,) = load(store.images, str(tmp_path / "a.tar"))
    assert image.config == config
    assert store.images.references(image.digest) == ["docker.io/library/demo:1", "docker.io/library/demo:2"]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with ImageStore(tmp_path / "other") as other:
        assert load(other.images, tmp_path / "a.tar.gz")[0].digest == image.digest


def test_skopeo_agrees_about_a_docker_archive(tmp_path: Path, store: ImageStore) -> None:
    layout = tmp_path / "layout"
    make_layout(layout, [{"a": b"1"}, {"b": b"2"}])
    target = f"docker-archive:{tmp_path / 'out.tar'}:demo:1"
    subprocess.run(["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}:latest", target], check=True)
    (image,) = load(store.images, tmp_path / "out.tar")
    assert [store.read(image.digest, name) for name in "ab"] == [b"1", b"2"]


def _archive(path: Path, members: dict[str, Any]) -> Path:
    path.write_bytes(make_tar(members))
    return path


def _saved(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    raw = json.dumps(config).encode()
    entry = {"Config": "config.json", "RepoTags": ["demo:1"], "Layers": ["layer.tar"], **changes}
    return {"manifest.json": json.dumps([entry]).encode(), "config.json": raw}


TAR = make_tar({"a": b"1"})
CONFIG = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest_of(TAR)]}}


@pytest.mark.parametrize(
    ("members", "error", "reason"),
    [
        ({**_saved(CONFIG)}, NotFound, "lacks a file"),
        ({**_saved(CONFIG), "layer.tar": make_tar({"a": b"2"})}, Damaged, "diff_id"),
        ({**_saved(CONFIG), "layer.tar": TAR[:700]}, Damaged, "trunc|end|diff_id"),
        ({**_saved(CONFIG, Layers=[]), "layer.tar": TAR}, Damaged, "0 layers"),
        ({**_saved(CONFIG, Layers=["../../../etc/passwd"])}, NotFound, "lacks"),
        ({**_saved(CONFIG, Layers=["/etc/passwd"])}, NotFound, "lacks"),
        ({**_saved(CONFIG), "layer.tar": "/etc/passwd"}, NotFound, "lacks"),
        ({**_saved(CONFIG), "layer.tar": "layer.tar"}, Damaged, "links"),
        ({**_saved(CONFIG, Config=7), "layer.tar": TAR}, Damaged, "Config"),
        ({**_saved(CONFIG, Layers="layer.tar"), "layer.tar": TAR}, Damaged, "Layers"),
        ({**_saved({**CONFIG, "rootfs": {"type": "layers", "diff_ids": ["sha256:x"]}}), "layer.tar": TAR}, Damaged,
         "diff_ids"),
        ({"manifest.json": b"[" * 100_000}, Damaged, "not JSON"),
        ({"manifest.json": b"[]"}, Damaged, "list"),
        ({"repositories": b'{"a": {"b": "c"}}', "c/json": b'{"parent": "c"}'}, Damaged, "does not end"),
        ({"repositories": b'{"a": 1}'}, Damaged, "repositories"),
        ({"other": b"1"}, InvalidArgument, "neither"),
    ],
)  # fmt: skip
def test_a_broken_archive_is_refused_and_leaves_nothing(
    tmp_path: Path, store: ImageStore, members: dict[str, Any], error: type[EngineError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        load(store.images, _archive(tmp_path / "a.tar", members))
    assert store.images.all() == [] and store.images.tags() == {}
    assert not [path for path in (store.root / "tmp").iterdir() if not path.name.startswith("partial-")]


def test_a_name_that_is_none_is_left_out_not_the_image(tmp_path: Path, store: ImageStore) -> None:
    members = {**_saved(CONFIG, RepoTags=["Bad Name:1", "good:1"]), "layer.tar": TAR}
    task = Task()
    (image,) = load(store.images, _archive(tmp_path / "a.tar", members), task)
    assert store.images.references(image.digest) == ["docker.io/library/good:1"]
    assert "not taken over" in task.log_text()


def test_a_layout_whose_blob_is_wrong_or_outside_is_refused(tmp_path: Path, store: ImageStore) -> None:
    layout = tmp_path / "layout"
    digest = make_layout(layout, [{"a": b"1"}])
    blob = layout / "blobs" / "sha256" / digest[7:]
    raw = blob.read_bytes()
    blob.write_bytes(raw.replace(b'"size"', b'"Size"'))
    with pytest.raises(Damaged, match="digest"):
        load(store.images, layout)
    blob.unlink()
    outside = tmp_path / "outside"
    outside.write_bytes(raw)
    blob.symlink_to(outside)  # right content, but reached through a link out of the layout
    with pytest.raises((NotFound, Damaged)):
        load(store.images, layout)
    with pytest.raises(NotFound):
        load(store.images, tmp_path / "nothing")
    assert store.images.all() == []


def test_the_number_of_members_and_the_size_of_headers_are_bounded(
    tmp_path: Path, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_MEMBERS", 10)
    with pytest.raises(TooLarge, match="members"):
        load(store.images, _archive(tmp_path / "many.tar", {f"f{n}": b"" for n in range(11)}))
    monkeypatch.setattr(files, "MAX_INFLATED", 1 << 20)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(8 << 20)))
    with pytest.raises(TooLarge, match="inflates"):
        load(store.images, tmp_path / "bomb.gz")
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x")
        info.pax_headers = {"comment": "x" * (5 << 20)}
        tar.addfile(info)
    with pytest.raises(TooLarge, match="header"):
        load(store.images, tmp_path / "pax.tar")


# --- root filesystems -----------------------------------------------------------------------------------------------


def test_a_root_filesystem_in_each_compression(tmp_path: Path, store: ImageStore) -> None:
    tar = busybox_rootfs_tar()
    xz = subprocess.run(["xz", "-c"], input=tar, capture_output=True, check=True).stdout
    forms = {
        "plain": tar,
        "gz": compress(tar, "gzip"),
        "zst": compress(tar, "zstd"),
        "bz2": bz2.compress(tar),
        "xz": xz,
    }
    for name, content in forms.items():
        path = tmp_path / f"root.tar.{name}"
        path.write_bytes(content)
        image = import_rootfs(store.images, path, f"root:{name}")
        assert store.images.resolve(f"root:{name}") == image
        assert store.read(image.digest, "bin/busybox") == Path("/bin/busybox").read_bytes()
        (layer,) = store.images.layers(image.digest)
        assert layer.diff_id == digest_of(tar)
        store.images.verify(image.digest, None)
    assert len(store.layers.all()) == 1


def test_what_cannot_be_imported(tmp_path: Path, store: ImageStore) -> None:
    (tmp_path / "no.tar").write_bytes(b"this is no tar" * 100)
    (tmp_path / "none.tar").write_bytes(b"")
    with pytest.raises(NotFound):
        import_rootfs(store.images, tmp_path / "gone.tar", "a:1")
    (tmp_path / "zip.tar").write_bytes(b"PK\x03\x04" + bytes(2000))
    (tmp_path / "odd.tar").write_bytes(bytes(range(255, 0, -1)) * 9)
    (tmp_path / "elf.tgz").write_bytes(gzip.compress(b"\x7fELF" * 400))
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    for name, found in (
        ("no.tar", "not a tar archive but text that begins with 'this is no tar"),
        ("none.tar", "nothing: the file is empty"),
        ("zip.tar", "but a zip archive"),
        ("odd.tar", "but bytes that begin with ff fe fd fc fb fa f9 f8"),
        ("elf.tgz", r"a program \(ELF\), compressed with gzip"),
        ("zeros.tar", "the tar holds nothing"),
    ):
        with pytest.raises(InvalidArgument, match=found):
            import_rootfs(store.images, tmp_path / name, "a:1")
    with pytest.raises(InvalidArgument):
        import_rootfs(store.images, tmp_path, "a:1")
    assert store.images.all() == []

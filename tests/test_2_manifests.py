"""Manifests: those of other projects read as they do, what is wrong named, platforms chosen as containerd does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import Damaged, EngineError, InvalidArgument, NotFound, TooLarge, Unsupported
from engine.images import manifests as m

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
MANIFEST: dict[str, Any] = {
    "schemaVersion": 2,
    "config": {"mediaType": m.OCI_CONFIG, "digest": A, "size": 2},
    "layers": [{"mediaType": m.OCI_LAYER + "+gzip", "digest": B, "size": 3}],
}

TABLE: dict[str, Any] = {
    "containers-image-manifest/ociv1.manifest.json": m.OCI_MANIFEST,
    "containers-image-manifest/ociv1nomime.manifest.json": m.OCI_MANIFEST,
    "containers-image-manifest/ociv1.image.index.json": m.OCI_INDEX,
    "containers-image-manifest/ociv1nomime.image.index.json": m.OCI_INDEX,
    "containers-image-manifest/schema2list.json": m.DOCKER_LIST,
    "containers-image-manifest/schema2list-variants.json": m.DOCKER_LIST,
    "containers-image-manifest/v2list.manifest.json": m.DOCKER_LIST,
    "containers-image-manifest/v2list.everything.json": m.DOCKER_LIST,
    "containers-image-manifest/ociv1.artifact.json": InvalidArgument,
    "containers-image-manifest/ociv1nomime.artifact.json": InvalidArgument,
    "containers-image-manifest/non-json.manifest.json": Damaged,
    "containers-image-manifest/v2s1.manifest.json": Unsupported,
    "containers-image-manifest2/v2s2.everything.json": m.DOCKER_MANIFEST,
    "containers-image-manifest2/v2s2.uncompressed.manifest.json": m.DOCKER_MANIFEST,
    "containers-image-manifest2/v2s2.nondistributable.manifest.json": Unsupported,
    "containers-image-manifest2/v2s2.nondistributable.gzip.manifest.json": Unsupported,
    "containers-image-convert/oci1.json": m.OCI_MANIFEST,
    "containers-image-convert/schema2.json": m.DOCKER_MANIFEST,
    "containers-image-convert/oci1-to-schema2.json": m.DOCKER_MANIFEST,
    "containers-image-convert/oci1-artifact.json": InvalidArgument,
    "containers-image-convert/oci1-invalid-media-type.json": InvalidArgument,
    "containers-image-convert/oci1.encrypted.json": Unsupported,
    "containers-image-convert/oci1-all-media-types.json": Unsupported,
    "containers-image-convert/schema2-all-media-types.json": Unsupported,
    "containers-image-convert/oci1-all-media-types-to-schema2.json": Unsupported,
    "containers-image-convert/schema2-to-schema1-by-docker.json": Unsupported,
}


@pytest.mark.skipif(not FIXTURES.exists(), reason="the fixtures are not there")
@pytest.mark.parametrize("name", TABLE)
def test_manifests_of_other_projects(name: str) -> None:
    raw = (FIXTURES / "manifests" / name).read_bytes()
    expected = TABLE[name]
    if isinstance(expected, str):
        document = m.parse(raw)
        entries = document.layers if isinstance(document, m.Manifest) else document.manifests
        assert document.media_type == expected
        data = json.loads(raw)
        assert [entry.digest for entry in entries] == [
            entry["digest"] for entry in data.get("layers") or data["manifests"]
        ]
    else:
        with pytest.raises(expected):
            m.parse(raw)


@pytest.mark.skipif(not FIXTURES.exists(), reason="the fixtures are not there")
@pytest.mark.parametrize("name", ["schema2-config.json", "oci1-to-schema2-config.json", "schema1-to-oci1-config.json"])
def test_configurations_of_other_projects(name: str) -> None:
    config = m.parse_config((FIXTURES / "manifests" / "containers-image-convert" / name).read_bytes())
    assert config.os == "linux" and config.architecture == "amd64"


def _changed(path: list[Any], value: Any) -> bytes:
    data = json.loads(json.dumps(MANIFEST))
    here = data
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("raw", "error", "reason"),
    [
        (b"", Damaged, "not JSON"),
        (b"[]", Damaged, "not a JSON object"),
        (b"[" * 200_000, Damaged, "not JSON"),
        (b" " * (m.MAX_MANIFEST + 1), TooLarge, "bytes"),
        (_changed(["schemaVersion"], 3), Damaged, "schemaVersion"),
        (_changed(["schemaVersion"], 1), Unsupported, "schema 1"),
        (_changed(["mediaType"], "text/plain"), InvalidArgument, "text/plain"),
        (_changed(["mediaType"], 7), Damaged, "mediaType"),
        (_changed(["config"], None), Damaged, "config"),
        (_changed(["config", "digest"], "sha256:../../etc"), Damaged, "config.digest"),
        (_changed(["config", "digest"], A + "\n"), Damaged, "config.digest"),
        (_changed(["config", "digest"], "sha512:" + "a" * 128), Damaged, "config.digest"),
        (_changed(["config", "size"], m.MAX_CONFIG + 1), TooLarge, "config.size"),
        (_changed(["layers"], {}), Damaged, "layers"),
        (_changed(["layers", 0], 1), Damaged, r"layers\[0\]"),
        (_changed(["layers", 0, "size"], -1), Damaged, r"layers\[0\].size"),
        (_changed(["layers", 0, "size"], True), Damaged, r"layers\[0\].size"),
        (_changed(["layers", 0, "size"], 1.5), Damaged, r"layers\[0\].size"),
        (_changed(["layers", 0, "size"], 1 << 60), TooLarge, r"layers\[0\].size"),
        (_changed(["layers", 0, "mediaType"], "text/plain"), InvalidArgument, "not a kind of layer"),
        (_changed(["layers"], MANIFEST["layers"] * 513), TooLarge, "513"),
        (_changed(["manifests"], []), Damaged, "both"),
    ],
)
def test_what_is_wrong_is_named(raw: bytes, error: type[EngineError], reason: str) -> None:
    with pytest.raises(error, match=reason):
        m.parse(raw)


def test_a_document_that_contradicts_its_transport_is_refused() -> None:
    raw = json.dumps({**MANIFEST, "mediaType": m.OCI_MANIFEST}).encode()
    with pytest.raises(Damaged, match="served as"):
        m.parse(raw, m.DOCKER_LIST)
    assert m.parse(raw, "application/json; charset=utf-8").media_type == m.OCI_MANIFEST
    assert m.parse(json.dumps(MANIFEST).encode(), m.DOCKER_MANIFEST).media_type == m.DOCKER_MANIFEST


KEYS = [
    "schemaVersion",
    "config",
    "layers",
    "manifests",
    "mediaType",
    "digest",
    "size",
    "platform",
    "annotations",
    "os",
]
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=20)


@given(
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
        max_leaves=20,
    )
)
def test_any_json_is_read_or_refused(data: Any) -> None:
    for document in (data, {**MANIFEST, "layers": data}, {"schemaVersion": 2, "manifests": [data]}):
        try:
            m.parse(json.dumps(document).encode())
        except EngineError as error:
            assert error.reason


def _index(*platforms: str | None) -> m.Index:
    entries = [
        m.Descriptor(m.OCI_MANIFEST, f"sha256:{n:064x}", 1, m.parse_platform(text) if text else None)
        for n, text in enumerate(platforms)
    ]
    return m.Index(m.OCI_INDEX, tuple(entries))


@pytest.mark.parametrize(
    ("there", "wanted", "strict", "chosen"),
    [
        (["linux/arm64", "linux/amd64"], "linux/amd64", True, 1),
        (["linux/amd64", "linux/amd64"], "linux/amd64", True, 0),
        (["linux/x86_64"], "amd64", True, 0),
        (["linux/arm64/v8"], "linux/aarch64", True, 0),
        (["linux/arm/v5", "linux/arm/v6"], "linux/arm/v7", True, 1),
        (["linux/arm/v7"], "linux/arm/v6", True, None),
        (["linux/arm/v7"], "linux/arm", True, 0),
        (["linux/arm/v7", "linux/arm/v6"], "linux/armhf", True, 0),
        (["linux/arm/v7"], "linux/arm64", False, 0),
        (["linux/arm/v7"], "linux/arm64", True, None),
        (["linux/386"], "linux/amd64", False, 0),
        (["linux/386"], "linux/amd64", True, None),
        (["linux/amd64/v2", "linux/amd64"], "linux/amd64", True, 1),
        (["linux/amd64/v2", "linux/amd64"], "linux/amd64/v3", True, 0),
        (["windows/amd64"], "linux/amd64", False, None),
        ([None], "linux/amd64", True, 0),
        ([None, None], "linux/amd64", True, None),
    ],
)
def test_the_platform(there: list[str | None], wanted: str, strict: bool, chosen: int | None) -> None:
    index = _index(*there)
    if chosen is None:
        with pytest.raises(NotFound) as caught:
            m.select(index, m.parse_platform(wanted), strict=strict)
        for platform in filter(None, there):
            assert str(m.parse_platform(platform)) in caught.value.reason
    else:
        assert m.select(index, m.parse_platform(wanted), strict=strict) is index.manifests[chosen]


@pytest.mark.skipif(not FIXTURES.exists(), reason="the fixtures are not there")
def test_a_real_list_with_variants() -> None:
    raw = (FIXTURES / "manifests" / "containers-image-manifest" / "schema2list-variants.json").read_bytes()
    index = m.parse(raw)
    assert isinstance(index, m.Index)
    for entry in index.manifests:
        assert entry.platform is not None
        assert m.select(index, entry.platform, strict=True) == entry


@pytest.mark.parametrize("text", ["", "/", "linux/", "linux/amd64/v1/x", "linux/amd 64", "li\0nux/a"])
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(InvalidArgument):
        m.parse_platform(text)

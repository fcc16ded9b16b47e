"""The catalog: names and ids, tagging, removal as docker rmi does it, collection, sizes, verification."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import Busy, Damaged, InvalidArgument, NotFound
from engine.images.archive import load
from engine.images.documents import dockerfile_line
from engine.images.gc import Scope
from tests.imagestore import ImageStore
from tests.ociimages import make_layout

BASE = {"etc/a": b"base" * 1000, "etc/b": b"b"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    with ImageStore(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def two(tmp_path: Path, store: ImageStore) -> tuple[str, str]:
    """app:1 and app:2 share their lowest layer; app:2's own layer shares a body with app:1's."""
    layout = tmp_path / "layout"
    one = make_layout(layout, [BASE, {"one": b"1" * 5000}], reference="app:1")
    other = make_layout(layout, [BASE, {"two": b"2" * 7000, "same": b"1" * 5000}], reference="app:2")
    load(store.images, layout)
    return one, other


def _container(store: ImageStore, name: str, image: str = "", wanted: str = "") -> None:
    with store.meta.tx() as tx:
        tx.execute(
            "INSERT INTO containers (id, name, state, config, image, runtime, created_ns)"
            " VALUES (?, ?, 'created', ?, ?, '', 1)",
            (name * 8, name, json.dumps({"image": wanted}), image),
        )


def test_what_people_call_an_image(store: ImageStore, two: tuple[str, str]) -> None:
    one, other = two
    image = store.images.get(one)
    for text in ("app:1", "docker.io/library/app:1", "library/app:1", one, one[7:], one[:19], one[7:14], image.config,
                 image.config[7:19], f"app@{one}", f"app:1@{one}", f"  {one}\n"):  # fmt: skip
        assert store.images.resolve(text) == image, text
    for text in ("app", "app:3", "ghcr.io/app:1", "sha256:" + "0" * 64, "0" * 64, f"app@sha256:{'0' * 64}"):
        with pytest.raises(NotFound) as caught:
            store.images.resolve(text)
        assert ("ls" if text.strip("0") in ("", "sha256:") else "pull") in (caught.value.hint or "")
    for text in ("", "App", "a b", "sha256:XYZ:x", "../etc"):
        with pytest.raises(InvalidArgument):
            store.images.resolve(text)
    assert store.images.tags() == {"docker.io/library/app:1": one, "docker.io/library/app:2": other}
    assert [image.digest for image in store.images.all()] == [one, other]


def test_a_tag_wins_over_an_id_and_an_ambiguous_id_is_refused(store: ImageStore, two: tuple[str, str]) -> None:
    one, other = two
    store.images.tag(other, one[7:15])  # a name that looks like the other image's id
    assert store.images.resolve(one[7:15]).digest == other
    with store.meta.tx() as tx:
        tx.execute(
            "INSERT INTO images SELECT ?, media_type, config, platform, chain_id, size, created, pulled_ns"
            " FROM images WHERE digest = ?",
            (one[:30] + "f" * 41, one),
        )
    with pytest.raises(InvalidArgument, match="2 images"):
        store.images.resolve(one[:20])
    with store.meta.tx() as tx:
        tx.execute("DELETE FROM images WHERE digest = ?", (one[:30] + "f" * 41,))


def test_tag_untag_and_their_events(store: ImageStore, two: tuple[str, str]) -> None:
    one, other = two
    assert store.images.tag(one, "ghcr.io/me/app") == "ghcr.io/me/app:latest"
    store.images.tag(other, "ghcr.io/me/app:latest")  # the name moves
    assert store.images.resolve("ghcr.io/me/app").digest == other
    store.images.untag("ghcr.io/me/app")
    with pytest.raises(NotFound):
        store.images.untag("ghcr.io/me/app")
    with pytest.raises(InvalidArgument):
        store.images.tag(one, f"app@{one}")
    with pytest.raises(NotFound):
        store.images.tag("sha256:" + "0" * 64, "x")
    events = [event for event in store.journal.replay(0, 100) if event.type != "imageLoaded"]
    assert [(event.type, event.object) for event in events] == [
        ("imageTagged", f"image/{one}"),
        ("imageTagged", f"image/{other}"),
        ("imageUntagged", f"image/{other}"),
    ]
    assert events[1].data["previous"] == one


def test_removal_as_docker_rmi(store: ImageStore, two: tuple[str, str]) -> None:
    one, other = two
    layers = [layer.diff_id for layer in store.images.layers(one)]
    store.images.tag(one, "extra:1")
    store.images.remove("extra:1")  # only the name
    assert store.images.references(one) == ["docker.io/library/app:1"]
    store.images.remove("app:1")  # the last name: the image
    with pytest.raises(NotFound):
        store.images.get(one)
    with pytest.raises(NotFound):
        store.images.layers(one)
    assert store.layers.has(layers[0])  # shared with app:2
    assert store.layers.has(layers[1])  # app:2's layer refers to a body in it
    assert not store.blobs.has(one)
    assert store.read(other, "same") == b"1" * 5000
    store.images.tag(other, "extra:2")
    store.images.remove(other)  # by digest: all names
    assert store.images.tags() == {} and store.images.all() == []
    assert store.layers.all() == [] and store.trees.all() == [] and store.blobs.all() == []
    assert store.events()[-1] == ("imageRemoved", f"image/{other}")
    assert list((store.root / "blobs" / "sha256").iterdir()) == []


def prune(store: ImageStore) -> list[str]:
    """The images that went."""
    plan = store.gc.plan(Scope.PRUNE)
    store.gc.run(Scope.PRUNE, plan.hash)
    return plan.of("image")


@pytest.mark.parametrize("by", ["image", "name"])
def test_an_image_in_use_stays(store: ImageStore, two: tuple[str, str], by: str) -> None:
    one, _ = two
    if by == "image":
        _container(store, "web", image=one)
    else:
        _container(store, "web", wanted="app:1")
    assert store.images.users(one) == ["web"]
    for text in (one, "app:1"):
        with pytest.raises(Busy, match="container web"):
            store.images.remove(text)
    store.images.tag(one, "second:1")
    store.images.remove("second:1")
    assert store.images.references(one) == ["docker.io/library/app:1"]
    if by == "image":
        store.images.untag("app:1")
        assert prune(store) == []
    with store.meta.tx() as tx:
        tx.execute("DELETE FROM containers")
    store.images.remove(one)


def test_prune_takes_what_has_neither_name_nor_user(tmp_path: Path, store: ImageStore, two: tuple[str, str]) -> None:
    one, other = two
    layout = tmp_path / "new"
    make_layout(layout, [{"new": b"1"}], reference="app:1")
    load(store.images, layout)  # takes the name of `one`
    assert store.images.references(one) == []
    assert prune(store) == [one]
    assert prune(store) == []
    assert other in [image.digest for image in store.images.all()]


def test_nothing_is_collected_while_a_pull_is_under_way(store: ImageStore, two: tuple[str, str]) -> None:
    one, other = two
    with store.images.lease():
        store.images.remove(one)
        store.images.remove(other)
        assert len(store.layers.all()) == 3
    assert store.layers.all() == []


def test_sizes(store: ImageStore, two: tuple[str, str]) -> None:
    one, other = two
    assert store.images.get(one).size == 4001 + 5000
    assert (store.images.unique_bytes(one), store.images.shared_bytes(one)) == (5000, 4001)
    assert (store.images.unique_bytes(other), store.images.shared_bytes(other)) == (12000, 4001)


def test_history_and_layers(store: ImageStore, two: tuple[str, str]) -> None:
    one, _ = two
    lines = store.images.history(one)
    assert [(line.text, line.size) for line in lines] == [("COPY layer0 /", 4001), ("COPY layer1 /", 5000)]
    layers = store.images.layers(one)
    assert [layer.diff_id for layer in layers] == [line.diff_id for line in lines]
    assert [layer.created_by for layer in layers] == ["COPY layer0 /", "COPY layer1 /"]
    assert all(layer.size == store.blobs.size(layer.blob) for layer in layers)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('/bin/sh -c #(nop)  CMD ["sh"]', 'CMD ["sh"]'),
        ("/bin/sh -c apt-get  update", "RUN apt-get update"),
        ("RUN /bin/sh -c make # buildkit", "RUN make"),
        ("COPY a b # buildkit", "COPY a b"),
        ("", ""),
    ],
)
def test_history_in_a_dockerfiles_words(raw: str, text: str) -> None:
    assert dockerfile_line(raw) == text


def test_verify_finds_a_rotten_body_and_a_rotten_blob(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store")
    layout = tmp_path / "layout"
    digest = make_layout(layout, [BASE], reference="app:1")
    load(store.images, layout)
    said: list[str] = []
    assert "2 files (4001 bytes) match" in store.images.verify(digest, said.append)
    assert any(text.startswith("layer ") for text in said)
    (layer,) = store.images.layers(digest)
    data = store.layers.data_path(layer.diff_id)
    raw = data.read_bytes()
    data.write_bytes(raw.replace(b"base", b"bass", 1))
    with pytest.raises(Damaged, match="/etc/a"):
        store.images.verify(digest)
    data.write_bytes(raw)
    store.blobs.path(layer.blob).write_bytes(b"rot")
    with pytest.raises(Damaged, match="blob"):
        store.images.verify(digest)
    store.meta.close()


def test_reading_stays_quick_with_many_images(store: ImageStore, two: tuple[str, str]) -> None:
    one, _ = two
    with store.meta.tx() as tx:
        tx.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) INSERT INTO tags"
            " SELECT 'docker.io/library/many:' || i, ?, 0 FROM n",
            (one,),
        )
    started = time.thread_time()
    for number in range(200):
        assert store.images.resolve(f"many:{number + 1}").digest == one
        assert len(store.images.layers(one)) == 2
    assert time.thread_time() - started < 2  # 400 reads; a list path that parsed JSON each time would be far over
    with store.meta.tx() as tx:
        tx.execute("DELETE FROM tags WHERE reference LIKE '%/many:%'")

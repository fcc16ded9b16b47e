"""store/ and the pictures without a mount: contents by digest, where they are used, plans as jobs, true numbers."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from engines import add_image

from engine.engine import Engine
from fdfs import svg
from fdfs.contents import ContentsGraft
from fdfs.entry import render, walk
from fdfs.ops import Operations
from fdfs.tree.root import ROOT

FILES = {"etc": None, "etc/motd": b"ahoy\n", "copy": b"ahoy\n", "big": b"0123456789" * 1000}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        add_image(engine, "docker.io/library/one:1", FILES)
        add_image(engine, "docker.io/library/two:1", {"other": b"ahoy\n", "new": b"new\n"})
        yield engine


@pytest.fixture
def ops(engine: Engine) -> Operations:
    return Operations(engine, ROOT, lambda: (os.getuid(), os.getgid(), os.getpid()))


def show(engine: Engine, path: str) -> str:
    found = walk(engine, ROOT, path.encode())
    return render(engine, found.row, found.keys).decode()  # type: ignore[arg-type]


def write(ops: Operations, path: str, text: str) -> str:
    number, handle = ops.open(path.encode(), os.O_RDWR)
    handle.write(text.encode(), 0)
    reply = handle.read(1 << 16, 0).decode()
    ops.release(number)
    return reply.strip()


def read(ops: Operations, path: str) -> bytes:
    number, _ = ops.open(path.encode(), os.O_RDONLY)
    try:
        return ops.read(number, 1 << 20, 0)
    finally:
        ops.release(number)


def test_stats_agree_with_du(engine: Engine) -> None:
    stats = dict(line.split(" ", 1) for line in show(engine, "store/stats").splitlines())
    for name in ("blobs", "layers", "trees"):
        du = subprocess.run(["du", "-sB1", engine.store / name], capture_output=True, text=True, check=True).stdout
        assert int(stats[f"{name}_disk_bytes"]) == int(du.split()[0]), name
        assert 0 < int(stats[f"{name}_bytes"]) <= int(stats[f"{name}_disk_bytes"])
    assert int(stats["bodies"]) == 3
    assert int(stats["dedup_saved_bytes"]) == 2 * len(b"ahoy\n")
    assert int(stats["bodies_bytes"]) + int(stats["dedup_saved_bytes"]) == int(stats["layer_files_bytes"])
    assert (int(stats["bodies_hits"]), int(stats["bodies_misses"])) == (2, 3)


def test_sizes_of_images_add_up(engine: Engine) -> None:
    add_image(engine, "docker.io/library/same:1", FILES, Cmd=["other"])  # the same layer under another configuration
    images = engine.images.all()
    for image in images:
        at = f"images/by-digest/{image.digest}"
        size, unique, shared = (int(show(engine, f"{at}/{name}_bytes")) for name in ("size", "unique", "shared"))
        assert size == unique + shared
    assert sum(engine.images.unique_bytes(image.digest) for image in images) == 9
    assert engine.images.shared_bytes(images[0].digest) == 10010


def test_every_content_is_there_once_by_digest(engine: Engine, ops: Operations) -> None:
    names = [name for name, _, _ in ops.readdir(b"/store/objects/by-digest") if not name.startswith(b".")]
    assert names == sorted(b"sha256:" + hashlib.sha256(body).hexdigest().encode()
                           for body in (b"ahoy\n", b"new\n", FILES["big"] or b""))  # fmt: skip
    for name in names:
        path = "/store/objects/by-digest/" + name.decode()
        content = read(ops, path)
        assert hashlib.sha256(content).hexdigest() == name[7:].decode()
        assert ops.getattr(path.encode()).size == len(content)
        assert read(ops, path.replace("sha256:", "")) == content
    for bad in ("0" * 64, "sha256:" + "0" * 64, "x", "sha256:" + "A" * 64, "0" * 64 + ".refs"):
        with pytest.raises(OSError, match="No such file"):
            ops.guard("getattr", ops.getattr, f"/store/objects/by-digest/{bad}".encode())


def test_refs_are_paths_that_have_the_content(engine: Engine, ops: Operations) -> None:
    path = f"/store/objects/by-digest/{hashlib.sha256(b'ahoy' + bytes([10])).hexdigest()}.refs"
    refs = read(ops, path).decode().splitlines()
    assert ops.getattr(path.encode()).size == sum(len(ref) + 1 for ref in refs)
    assert len(refs) == 6 and {ref.partition("/")[0] for ref in refs} == {"layers", "images"}
    for ref in refs:
        assert read(ops, "/" + ref) == b"ahoy\n"


def test_a_listing_goes_on_where_it_was(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.store.contents.PAGE", 2)
    graft = ContentsGraft(engine)
    everything = list(graft.readdir_from(b"", 0))
    assert len(everything) == 3
    for at, (_, _, _, offset) in enumerate(everything):
        assert list(graft.readdir_from(b"", offset)) == everything[at + 1 :]


def test_gc_and_prune_run_what_the_plan_says(engine: Engine, ops: Operations) -> None:
    for text in ("gc", "gc " + "0" * 64):
        with pytest.raises(OSError, match=r"Invalid|busy"):
            ops.guard("write", write, ops, "/store/ctl", text)
    engine.images.untag("two:1")
    reply = write(ops, "/images/ctl", show(engine, "images/plan").splitlines()[-1])
    assert engine.jobs.wait(int(reply.rpartition("/")[2]), 10).state == "done"
    assert [list(engine.images.tags())] == [["docker.io/library/one:1"]] and len(engine.images.all()) == 1
    engine.blobs.put(b"nobody needs this", "text/plain")
    command = show(engine, "store/plan").splitlines()[-1]
    reply = write(ops, "/store/ctl", command)
    assert engine.jobs.wait(int(reply.rpartition("/")[2]), 10).state == "done"


def test_verify_reads_everything_and_finds_rot(engine: Engine, ops: Operations) -> None:
    job = engine.jobs.wait(int(write(ops, "/store/ctl", "verify").rpartition("/")[2]), 20)
    assert job.state == "done" and "match" in job.progress
    with open(engine.layers.data_path(engine.layers.all()[0].diff_id), "r+b") as file:
        file.write(b"rot")
    job = engine.jobs.wait(int(write(ops, "/store/ctl", "verify").rpartition("/")[2]), 20)
    assert job.state == "failed" and "does not match" in job.error
    assert "verify" in show(engine, "store/error")


def test_a_bad_policy_is_refused_and_says_so(engine: Engine, ops: Operations) -> None:
    def document(text: bytes) -> None:
        number, handle = ops.open(b"/store/policy.yaml", os.O_WRONLY | os.O_TRUNC)
        try:
            handle.write(text, 0)
            handle.flush()
        finally:
            ops.release(number)

    document(b"max_size: 5g\n")
    with pytest.raises(OSError, match="Invalid"):
        ops.guard("flush", document, b"max_size: lots\n")
    assert show(engine, "store/policy.yaml") == "max_size: 5g\n" and "max_size" in show(engine, "store/error")


# --- pictures ---------------------------------------------------------------------------------------------------


def elements(text: str, name: str) -> list[Any]:
    return list(ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}" + name))


def test_the_pictures_of_a_store_are_svg(engine: Engine) -> None:
    for path in ("store/usage.svg", f"images/by-digest/{engine.images.all()[0].digest}/layers.svg"):
        assert any("one:1" in (text.text or "") for text in elements(show(engine, path), "text"))


@pytest.mark.parametrize("count", [0, 1, 100, 1000])
def test_any_number_of_layers_fits(count: int) -> None:
    stack = [svg.Layer(f"sha256:{n:064x}", n * 1000, n % 3, f"RUN {n}") for n in range(count)]
    picture = svg.layers("app:1", stack)
    width, height = (int(ElementTree.fromstring(picture).attrib[name]) for name in ("width", "height"))
    for rect in elements(picture, "rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width")) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height")) <= height
    assert height < 12_000


def test_hostile_words_stay_words() -> None:
    evil = "</text><script>alert(1)</script>&amp;\x00\x1b[31m\udc80\ufffe" + "x" * 5000
    picture = svg.layers(evil, [svg.Layer("sha256:0", 1, 0, evil)])
    picture += svg.usage({"blobs": 1}, free=1, limit=1, images=[svg.Image(evil, 0, 1)])
    first = picture.index("</svg>") + len("</svg>")
    for part in (picture[:first], picture[first:]):
        assert not elements(part, "script")
        part.encode()
    assert max(len(text.text or "") for text in elements(picture[:first], "text")) < 200

"""What differs between two images: the views agree with the two trees compared path by path, whatever the trees are."""

from __future__ import annotations

import errno
import io
import os
import stat
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import add_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ociimages import make_tar

from engine.engine import Engine
from engine.errors import DeadlineExceeded
from engine.images import diff as diffs
from fdfs.entry import listing, walk
from fdfs.ops import Operations
from fdfs.tree.root import ROOT
from fdfs.tree.tags import short

BEFORE = {
    "etc": None,
    "etc/same": b"same\n",
    "etc/conf": b"old\n",
    "etc/gone": b"gone\n",
    "etc/link": "same",
    "kind": None,
    "kind/below": b"was in a directory\n",
    "old": None,
    "old/deep": None,
    "old/deep/file": b"12345",
    "quiet": None,
    "quiet/file": b"nothing changes here",
}
AFTER = {
    "etc": None,
    "etc/same": b"same\n",
    "etc/conf": b"new\n",
    "etc/new": b"new file\n",
    "etc/link": "conf",
    "kind": b"now a file\n",
    "fresh": None,
    "fresh/deep": None,
    "fresh/deep/file": (0o755, b"678"),
    "quiet": None,
    "quiet/file": b"nothing changes here",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("diff") / "store", runtime="fake") as engine:
        add_image(engine, "docker.io/library/app:1", BEFORE)
        add_image(engine, "docker.io/library/app:2", AFTER)
        add_image(engine, "ghcr.io/owner/repo:2", {"x": b"x"})
        yield engine


@pytest.fixture
def ops(engine: Engine) -> Operations:
    return Operations(engine, ROOT, lambda: (os.getuid(), os.getgid(), os.getpid()))


def place(engine: Engine, a: str, b: str) -> bytes:
    return f"/images/by-digest/{engine.images.resolve(a).digest}/diff/{b}".encode()


def files(ops: Operations, top: bytes) -> dict[bytes, Any]:
    """Everything below: path -> content, link target, or None for a directory."""
    out: dict[bytes, Any] = {}
    stack = [b""]
    while stack:
        here = stack.pop()
        for name, _, kind in list(ops.readdir(top + here)):
            if name in (b".", b".."):
                continue
            path = here + b"/" + name
            attr = ops.getattr(top + path)
            assert stat.S_IFMT(attr.mode) == stat.S_IFMT(kind)
            if stat.S_ISDIR(attr.mode):
                out[path] = None
                stack.append(path)
            elif stat.S_ISLNK(attr.mode):
                out[path] = ops.readlink(top + path).decode()
            else:
                number, handle = ops.open(top + path, os.O_RDONLY)
                out[path] = handle.read(1 << 20, 0)
                ops.release(number)
    return out


def read(ops: Operations, path: bytes) -> bytes:
    size = ops.getattr(path).size
    number, handle = ops.open(path, os.O_RDONLY)
    try:
        content = handle.read(1 << 24, 0)
    finally:
        ops.release(number)
    assert size in (0, len(content)) or path.endswith(b"state")
    return content


def test_the_views_hold_what_changed_and_nothing_else(engine: Engine, ops: Operations) -> None:
    top = place(engine, "app:1", "app:2")
    assert files(ops, top + b"/added") == {
        b"/etc": None,
        b"/etc/new": b"new file\n",
        b"/fresh": None,
        b"/fresh/deep": None,
        b"/fresh/deep/file": b"678",
        b"/kind": b"now a file\n",
    }
    assert files(ops, top + b"/changed") == {b"/etc": None, b"/etc/conf": b"new\n", b"/etc/link": "conf"}
    assert files(ops, top + b"/before") == {b"/etc": None, b"/etc/conf": b"old\n", b"/etc/link": "same"}
    assert files(ops, top + b"/deleted") == {
        b"/etc": None,
        b"/etc/gone": b"gone\n",
        b"/kind": None,
        b"/kind/below": b"was in a directory\n",
        b"/old": None,
        b"/old/deep": None,
        b"/old/deep/file": b"12345",
    }
    assert read(ops, top + b"/summary").decode().splitlines() == [
        "M /etc/conf",
        "D /etc/gone",
        "M /etc/link",
        "A /etc/new",
        "A /fresh",
        "A /fresh/deep",
        "A /fresh/deep/file",
        "D /kind",
        "D /kind/below",
        "A /kind",
        "D /old",
        "D /old/deep",
        "D /old/deep/file",
    ]
    state = dict(line.split(" ", 1) for line in read(ops, top + b"/state").decode().splitlines())
    assert state["state"] == "complete" and state["image"] == engine.images.resolve("app:2").digest
    assert [state[key] for key in ("added", "changed", "deleted")] == ["5", "2", "6"]
    assert [state[key] for key in ("added_bytes", "changed_bytes", "deleted_bytes")] == ["23", "4", "29"]


def test_provenance_is_that_of_the_image_the_content_comes_from(engine: Engine, ops: Operations) -> None:
    top = place(engine, "app:1", "app:2")
    layer = {name: engine.images.layers(engine.images.resolve(name).digest)[0].diff_id for name in ("app:1", "app:2")}
    for view, path, image in (
        (b"added", b"/etc/new", "app:2"),
        (b"changed", b"/etc/conf", "app:2"),
        (b"before", b"/etc/conf", "app:1"),
        (b"deleted", b"/old", "app:1"),
    ):
        assert ops.getxattr(top + b"/" + view + path, b"user.dutchman.layer").decode() == layer[image]


def test_nothing_in_a_view_can_be_changed_or_reached_beside_it(engine: Engine, ops: Operations) -> None:
    top = place(engine, "app:1", "app:2")
    for path in (b"/added/etc/same", b"/added/etc/conf", b"/changed/etc/new", b"/deleted/etc/conf", b"/added/quiet",
                 b"/changed/kind", b"/added/kind/below", b"/deleted/kind/none", b"/before/none/none"):  # fmt: skip
        with pytest.raises(FileNotFoundError):
            ops.getattr(top + path)
    for call in (
        lambda: ops.open(top + b"/added/etc/new", os.O_WRONLY),
        lambda: ops.change("unlink", top + b"/added/etc/new"),
    ):
        with pytest.raises(OSError) as caught:
            ops.guard("test", call)
        assert caught.value.errno == errno.EROFS


def test_images_are_listed_by_name_and_found_by_digest_and_id(engine: Engine, ops: Operations) -> None:
    top = place(engine, "app:1", "")
    assert {name for name, _, _ in ops.readdir(top)} == {b".", b"..", b"app:2", b"ghcr.io"}
    assert {name for name, _, _ in ops.readdir(top + b"ghcr.io/owner")} == {b".", b"..", b"repo:2"}
    other = engine.images.resolve("ghcr.io/owner/repo:2").digest
    for name in ("ghcr.io/owner/repo:2", other, other[7:19], "docker.io/library/app:2"):
        assert ops.getattr(top + name.encode() + b"/summary" if name.count("/") < 2 else top + b"app:2").mode
    assert files(ops, top + other.encode() + b"/added") == {b"/x": b"x"}
    assert files(ops, place(engine, "app:1", "app:1") + b"/changed") == {}
    assert read(ops, place(engine, "app:1", "app:1") + b"/summary") == b""
    found = walk(engine, ROOT, top)
    assert [name for name, _ in listing(engine, found.row, found.keys)] == ["app:2", "ghcr.io"]  # type: ignore[arg-type]


def test_a_short_name_that_means_another_image_stays_long() -> None:
    assert short("docker.io/r.io/foo:latest") == "docker.io/r.io/foo:latest"
    assert short("r.io/foo:latest") == "r.io/foo:latest"
    assert short("docker.io/library/foo:latest") == "foo:latest"


# --- against a model --------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "dd"])
CONTENT = st.one_of(
    st.binary(max_size=3),
    st.sampled_from(["to", "there"]),
    st.none(),
    st.tuples(st.sampled_from([0o600, 0o755]), st.binary(max_size=3)),
)
TREE = st.recursive(CONTENT, lambda below: st.dictionaries(NAMES, below, max_size=4), max_leaves=12)


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, content in tree.items():
        here = f"{path}/{name}" if path else name
        if isinstance(content, dict):
            out[here] = None
            out.update(flatten(content, here))
        else:
            out[here] = content
    return out


def summary_of(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    out = set()

    def plain(content: Any) -> Any:
        return (0o644, content) if isinstance(content, bytes) else content

    for path in a.keys() | b.keys():
        if path not in a or path not in b:
            out.add(f"{'A' if path in b else 'D'} /{path}")
        elif (a[path] is None) != (b[path] is None):
            out |= {f"D /{path}", f"A /{path}"}
        elif plain(a[path]) != plain(b[path]):
            out.add(f"M /{path}")
    return out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=st.dictionaries(NAMES, TREE, max_size=4), two=st.dictionaries(NAMES, TREE, max_size=4))
def test_any_two_trees(engine: Engine, ops: Operations, one: Any, two: Any) -> None:
    a, b = flatten(one), flatten(two)
    # (an archive without entries is no layer worth an image: both have one file in common)
    first = add_image(engine, "localhost/one:1", make_tar({"common": b"", **a}))
    second = add_image(engine, "localhost/two:1", make_tar({"common": b"", **b}))
    top = f"/images/by-digest/{first}/diff/{second}".encode()
    lines = read(ops, top + b"/summary").decode().splitlines()
    assert set(lines) == summary_of(a, b) and len(lines) == len(set(lines))
    shown = {view: files(ops, f"{top.decode()}/{view}".encode()) for view in ("added", "changed", "before", "deleted")}
    for view, letter in (("added", "A"), ("changed", "M"), ("before", "M"), ("deleted", "D")):
        wanted = {line[2:].encode() for line in lines if line[0] == letter}
        leading = {path[:at] for path in wanted for at in range(1, len(path)) if path[at : at + 1] == b"/"}
        assert set(shown[view]) == wanted | leading
        source = a if view in ("before", "deleted") else b
        for path, content in shown[view].items():
            there = source[path[1:].decode()]
            assert content == (there[1] if isinstance(there, tuple) else there)


# --- size -------------------------------------------------------------------------------------------------------


def many(count: int, odd: int) -> bytes:
    """A tar of `count` empty files in directories of 100; every `odd`th is executable."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"d{number // 100:05}/f{number:07}")
            info.mode = 0o755 if number % odd == 0 else 0o644
            tar.addfile(info)
    return out.getvalue()


def test_large_trees_are_compared_while_who_asked_may_come_back(engine: Engine, ops: Operations) -> None:
    first = add_image(engine, "localhost/many:1", many(10_000, 1 << 30))
    second = add_image(engine, "localhost/many:2", many(10_000, 100))
    top = f"/images/by-digest/{first}/diff/{second}/".encode()
    start = time.thread_time(), time.monotonic()
    while True:
        try:
            shown = [name for name, _, _ in ops.readdir(top + b"changed")]
            break
        except DeadlineExceeded:
            assert time.monotonic() - start[1] < 60
    took = time.thread_time() - start[0]
    assert len(shown) == 2 + 99 and took < 5, took
    assert len(engine.diffs.get(*(engine.images.get(image).chain_id for image in (first, second))).masks) == 100


def test_a_reader_does_not_wait_for_a_slow_comparison(
    engine: Engine, ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = add_image(engine, "localhost/slow:1", {"slow": b"slow"})
    compute, go = diffs.Diff.compute, threading.Event()

    def slow(self: Any, *arguments: Any) -> None:
        assert go.wait(60)
        compute(self, *arguments)

    monkeypatch.setattr(diffs.Diff, "compute", slow)
    top = place(engine, "app:1", image)
    with pytest.raises(DeadlineExceeded):
        list(ops.readdir(top + b"/added"))
    assert b"comparing" in read(ops, top + b"/state")
    assert stat.S_ISDIR(ops.getattr(top + b"/added").mode)
    go.set()
    until = time.monotonic() + 60
    while b"comparing" in read(ops, top + b"/state"):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert files(ops, top + b"/added") == {b"/slow": b"slow"}


def test_results_are_bounded_and_hold_no_tree(engine: Engine, tmp_path: Path) -> None:
    chains = [engine.images.get(image.digest).chain_id for image in engine.images.all()][:6]
    known = [engine.diffs.get(a, b).wait(5) for a in chains for b in chains]
    assert len(engine.diffs._known) <= diffs.CACHED
    descriptors = {os.readlink(f"/proc/self/fd/{diff._list}") for diff in known} if Path("/proc").exists() else set()
    assert all("deleted" in path for path in descriptors)

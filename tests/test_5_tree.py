"""The namespace without a mount: rows, the walk, the ctl grammar, and operations as the binding calls them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import SMALL, add_image
from hypothesis import given
from hypothesis import strategies as st

from engine import host, hostmounts
from engine.engine import Engine
from engine.errors import AccessDenied, Busy, EngineError, InvalidArgument, NotFound, TooLarge
from fdfs import ctl
from fdfs.ctl import Verb
from fdfs.entry import Dir, File, Link, attr_of, is_litter, listing, mode_of, render, rows_below, table, walk
from fdfs.loopback import Loopback
from fdfs.ops import Operations
from fdfs.tree.root import ROOT


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("tree") / "store", runtime="fake") as engine:
        add_image(engine, "docker.io/library/small:1", SMALL)
        add_image(engine, "ghcr.io/owner/repo:2", {"etc": None, "etc/other": b"2\n"})
        engine.containers.create("web")
        engine.containers.set_field("web", "image", "small:1")
        engine.containers.set_field("web", "volumes", "- data:/data\n")
        engine.volumes.create("data")
        engine.jobs.wait(engine.jobs.start("nothing", lambda task: None), 5)
        yield engine


@pytest.fixture
def ops(engine: Engine) -> Operations:
    return Operations(engine, ROOT, lambda: (os.getuid(), os.getgid(), os.getpid()))


def everything(engine: Engine, path: bytes = b"") -> Iterator[bytes]:
    """Every path of the declared tree, dynamic children included, without going into grafts."""
    found = walk(engine, ROOT, path)
    if isinstance(found.row, Dir) and found.row.graft is None:
        for name, _ in listing(engine, found.row, found.keys):
            below = path + b"/" + name.encode()
            yield below
            yield from everything(engine, below)


# --- rows -------------------------------------------------------------------------------------------------------


def test_every_row_renders(engine: Engine) -> None:
    seen = 0
    for path in everything(engine):
        found = walk(engine, ROOT, path)
        attr = attr_of(engine, found, path)
        if isinstance(found.row, File) and (found.row.show or found.row.verbs is not None):
            content = render(engine, found.row, found.keys)
            if not path.endswith((b"/status", b"/store/stats")):
                # a comparison of images may have ended between the two looks
                assert len(content) in (attr.size, attr_of(engine, found, path).size), path
            if content and not path.endswith((b"manifest.json", b"config.json")):
                assert content.endswith(b"\n"), path
        seen += 1
    assert seen > 80


def test_every_row_is_documented_and_has_one_way_to_read_it() -> None:
    for path, row in rows_below(ROOT):
        assert (row.doc and row.doc[0] != row.doc[0].upper()) or row.doc[:1] in "AJK0164", path
        assert "\n" not in row.doc
        if isinstance(row, File):
            ways = [row.show, row.read, row.wait, row.verbs, row.opens]
            assert sum(way is not None for way in ways) == (row.feed is None), path
            assert sum(way is not None for way in (row.commit, row.set, row.verbs)) <= 1, path
            assert row.read is None or row.size is not None, path
            assert not row.writable or row.object is not None, f"{path}: failed writes must land in an `error`"


def test_dynamic_children_are_declared(engine: Engine) -> None:
    declared = {id(row) for _, row in rows_below(ROOT)}
    for path in everything(engine):
        assert id(walk(engine, ROOT, path).row) in declared, path


def test_every_object_with_a_ctl_has_an_error_file() -> None:
    paths = {path for path, row in rows_below(ROOT) if isinstance(row, File)}
    for path in paths:
        if path.rpartition("/")[2] == "ctl":
            assert path[: -len("ctl")] + "error" in paths, path


def test_mode_bits_follow_from_the_row() -> None:
    def show(engine: Any) -> str:
        return ""

    verb = ctl.table(Verb(name="go", doc="", run=show))
    assert mode_of(File(name="a", doc="", show=show)) == stat.S_IFREG | 0o444
    assert mode_of(File(name="a", doc="", verbs=verb)) == stat.S_IFREG | 0o644
    assert mode_of(File(name="a", doc="", set=show)) == stat.S_IFREG | 0o200
    assert mode_of(File(name="a", doc="", show=show, commit=show)) == stat.S_IFREG | 0o644
    assert mode_of(Dir(name="a", doc="")) == stat.S_IFDIR | 0o555
    assert mode_of(Dir(name="a", doc="", mkdir=show)) == stat.S_IFDIR | 0o755
    assert mode_of(Link(name="a", doc="", target=show)) == stat.S_IFLNK | 0o777


def test_links_lead_to_something(engine: Engine) -> None:
    for path in everything(engine):
        found = walk(engine, ROOT, path)
        if isinstance(found.row, Link):
            target = os.path.normpath(
                os.path.join(os.path.dirname(path.decode()), found.row.target(engine, *found.keys))
            )
            walk(engine, ROOT, target.encode())


def test_readme_names_every_row(engine: Engine) -> None:
    text = render(engine, ROOT.index["README.txt"], ()).decode()  # type: ignore[arg-type]
    for path, doc in table(ROOT):
        assert path in text and doc in text


@pytest.mark.parametrize("path", [b"/nope", b"/version/x", b"/containers/none/state", b"/images/x:1", b"/jobs/01",
                                  b"/jobs/99", b"/images/by-digest/sha256:zz", b"/layers/..", b"/jobs/\xd9\xa1",
                                  b"/containers/\xff", b"/images/by-digest/sha256:" + b"0" * 64])  # fmt: skip
def test_what_is_not_there_is_not_found(engine: Engine, path: bytes) -> None:
    with pytest.raises(NotFound):
        walk(engine, ROOT, path)


@given(
    st.lists(st.binary(min_size=1, max_size=12).filter(lambda part: b"/" not in part and b"\0" not in part), max_size=5)
)
def test_no_path_breaks_the_walk(engine: Engine, parts: list[bytes]) -> None:
    for prefix in (
        [],
        [b"images"],
        [b"containers"],
        [b"containers", b"web", b"config"],
        [b"store", b"objects", b"by-digest"],
    ):
        try:
            walk(engine, ROOT, b"/" + b"/".join([*prefix, *parts]))
        except EngineError as error:
            assert error.errno in (errno.ENOENT, errno.EINVAL)


def test_litter_is_known() -> None:
    for name in (b".DS_Store", b"._x", b".Trash-1000", b"desktop.ini", b".hidden"):
        assert is_litter(name)
    for name in (b"config.yaml~", b".config.yaml.swp", b"4913", b"web"):
        assert not is_litter(name)


# --- the ctl grammar --------------------------------------------------------------------------------------------


def verb(args: str) -> Verb:
    return Verb(name="do", args=args, doc="", run=lambda engine, call: None)


@pytest.mark.parametrize(
    ("args", "line", "positional", "options", "rest"),
    [
        ("", "", (), {}, None),
        ("REF [platform=…]", "alpine:3 platform=linux/arm64", ("alpine:3",), {"platform": "linux/arm64"}, None),
        ("REF", "'a b'", ("a b",), {}, None),
        ("REF", '"a\\"b"', ('a"b',), {}, None),
        ("[SECONDS]", "", (), {}, None),
        ("[SECONDS]", "10", ("10",), {}, None),
        ("PATH…", "a b c", ("a", "b", "c"), {}, None),
        ("IMAGE [name=…] [-- ARGV…]", "x name=y -- sh -c 'a b'", ("x",), {"name": "y"}, ("sh", "-c", "a b")),
        ("IMAGE [-- ARGV…]", "x -- -- y", ("x",), {}, ("--", "y")),
        ("NAME [driver=…] [KEY=VALUE…]", "n any=thing", ("n",), {"any": "thing"}, None),
        ("REF", "host/p@sha256:x=y", ("host/p@sha256:x=y",), {}, None),
    ],
)
def test_what_a_line_means(
    args: str, line: str, positional: tuple[str, ...], options: dict[str, str], rest: tuple[str, ...] | None
) -> None:
    call = ctl.parse(verb(args), ctl.split_line(line))
    assert (call.args, dict(call.options), call.rest) == (positional, options, rest)


@pytest.mark.parametrize(
    ("args", "line"),
    [("REF", ""), ("REF", "a b"), ("", "x"), ("REF [a=…]", "x b=1"), ("REF [a=…]", "x a=1 a=2"), ("PATH…", "")],
)
def test_what_a_line_may_not_be(args: str, line: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ctl.parse(verb(args), ctl.split_line(line))
    assert caught.value.hint is not None and "usage: do" in caught.value.hint


@given(st.text(max_size=200))
def test_any_text_is_split_or_refused(text: str) -> None:
    try:
        assert all(isinstance(word, str) for word in ctl.split_line(text))
    except InvalidArgument:
        pass


def test_failures_are_recorded_with_a_caret(engine: Engine, ops: Operations) -> None:
    number, handle = ops.open(b"/containers/web/ctl", os.O_WRONLY | os.O_TRUNC)
    with pytest.raises(InvalidArgument):
        ops.write(number, b"stopp 10\n", 0)
    ops.release(number)
    text = render(engine, walk(engine, ROOT, b"/containers/web/error").row, ("web",)).decode()  # type: ignore[arg-type]
    assert "    stopp 10\n    ^^^^^\n" in text
    assert handle.direct


def test_too_much_for_a_ctl(ops: Operations) -> None:
    number, _ = ops.open(b"/containers/ctl", os.O_WRONLY)
    with pytest.raises(TooLarge):
        ops.write(number, b"a" * (ctl.MAX_WRITE + 1), 0)
    with pytest.raises(TooLarge):
        ops.write(number, b"a\n" * (ctl.MAX_LINES + 1), 0)


# --- operations -------------------------------------------------------------------------------------------------


def test_a_snapshot_stays_what_it_was_when_opened(engine: Engine, ops: Operations) -> None:
    number, _ = ops.open(b"/volumes/data/labels", os.O_RDONLY)
    engine.volumes.set_labels("data", {"a": "1"})
    assert ops.read(number, 100, 0) == b""
    again, _ = ops.open(b"/volumes/data/labels", os.O_RDONLY)
    assert ops.read(again, 100, 0) == b"a=1\n"
    assert ops.read(again, 2, 1) == b"=1"


def test_directions_without_a_handler_are_refused_to_root_too(ops: Operations) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR):
        with pytest.raises(AccessDenied):
            ops.open(b"/version", flags)


def test_a_document_opened_and_closed_without_a_write_changes_nothing(engine: Engine, ops: Operations) -> None:
    before = engine.containers.get("web").config
    number, _ = ops.open(b"/containers/web/config.yaml", os.O_WRONLY | os.O_TRUNC)
    ops.flush(number)
    ops.release(number)
    assert engine.containers.get("web").config == before


def test_every_failure_becomes_an_errno(ops: Operations) -> None:
    def failing(error: BaseException) -> Any:
        raise error

    for error, number in (
        (NotFound("x"), errno.ENOENT),
        (PermissionError(errno.EACCES, "x"), errno.EACCES),
        (OSError("without errno"), errno.EIO),
        (SystemExit(), errno.EIO),
        (KeyboardInterrupt(), errno.EIO),
        (ValueError("bug"), errno.EIO),
        (RecursionError(), errno.EIO),
    ):
        with pytest.raises(OSError, match=r".") as caught:
            ops.guard("op", failing, error)
        assert caught.value.errno == number


def test_an_image_without_a_graft_shows_an_empty_directory(engine: Engine, ops: Operations) -> None:
    engine.containers.create("bare")
    try:
        assert stat.S_ISDIR(ops.getattr(b"/containers/bare/rootfs").mode)
        assert [name for name, _, _ in ops.readdir(b"/containers/bare/rootfs")] == [b".", b".."]
    finally:
        engine.containers.remove("bare")


def test_trees_are_served_read_only(ops: Operations, engine: Engine) -> None:
    digest = engine.images.resolve("small:1").digest.encode()
    root = b"/images/by-digest/" + digest + b"/rootfs"
    number, handle = ops.open(root + b"/etc/motd", os.O_RDONLY)
    assert ops.read(number, 100, 0) == b"ahoy\n" and handle.keep and not handle.direct
    assert ops.readlink(root + b"/etc/link") == b"motd"
    assert {b"user.dutchman.layer", b"user.dutchman.digest"} <= set(ops.listxattr(root + b"/etc/motd"))
    for change in (("unlink",), ("chmod", 0o777), ("mkdir", 0o755), ("setxattr", b"user.x", b"1", 0)):
        with pytest.raises(EngineError) as caught:
            ops.change(change[0], root + b"/etc/motd", *change[1:])
        assert caught.value.errno == errno.EROFS
    with pytest.raises(FileNotFoundError):
        ops.getattr(root + b"/etc/none")


# --- the loopback -----------------------------------------------------------------------------------------------


def test_nothing_escapes_a_loopback(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to("..")
    (root / "abs").symlink_to("/")
    (root / "link").symlink_to("../secret")
    tree = Loopback(root, writable=lambda: True)
    for path in (b"../secret", b"out/secret", b"abs/etc/passwd", b"out/../secret", b"."):
        with pytest.raises(OSError, match=r"."):
            tree.open(path, os.O_RDONLY)
        with pytest.raises(OSError, match=r"."):
            tree.change("truncate", path, 0)
    with pytest.raises(OSError, match=r"."):
        tree.open(b"link", os.O_RDONLY)
    with pytest.raises(OSError, match=r"."):
        tree.change("create", b"link", 0o644, os.O_WRONLY | os.O_EXCL)
    with pytest.raises(OSError, match=r"."):
        tree.change("rename", b"link", b"../moved")
    with pytest.raises(OSError, match=r"."):
        tree.change("setxattr", b"link", b"user.x", b"1", 0)
    tree.change("chown", b"link", os.getuid(), os.getgid())
    assert (tmp_path / "secret").read_text() == "secret"
    assert stat.S_ISLNK(tree.getattr(b"link").mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device node needs root")
def test_a_device_put_in_a_files_place_is_not_opened(tmp_path: Path) -> None:
    """The kernel looked a moment ago and saw a file; the daemon must not open a device of the host for it."""
    os.mknod(tmp_path / "file", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(tmp_path / "fifo")
    os.symlink("/etc/passwd", tmp_path / "link")
    tree = Loopback(tmp_path, writable=lambda: True)
    for name in (b"file", b"fifo", b"link"):
        with pytest.raises(OSError) as caught:
            tree.open(name, os.O_RDONLY)
        assert caught.value.errno == errno.ESTALE
        with pytest.raises(OSError) as caught:
            tree.change("truncate", name, 0)
        assert caught.value.errno == errno.ESTALE
        with pytest.raises(OSError) as caught:
            tree.change("create", name, 0o644, os.O_RDWR)
        assert caught.value.errno == errno.ESTALE


def test_a_loopback_hides_what_the_overlay_keeps_for_itself(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("making a whiteout needs root")
    os.mknod(tmp_path / "gone", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    (tmp_path / "there").write_text("x")
    os.setxattr(tmp_path / "there", "trusted.overlay.opaque", b"y")
    tree = Loopback(tmp_path, writable=lambda: False, overlay_upper=True)
    assert [name for name, _, _ in tree.readdir(b"")] == [b"there"]
    assert tree.listxattr(b"there") == []
    with pytest.raises(FileNotFoundError):
        tree.getattr(b"gone")


def test_new_files_belong_to_the_caller(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("acting for others needs root")
    tree = Loopback(tmp_path, writable=lambda: True, caller=lambda: (1234, 2345, 0))
    tree.change("mkdir", b"d", 0o750)
    handle = tree.change("create", b"d/f", 0o4640, os.O_WRONLY)
    handle.write(b"x", 0)
    handle.close()
    tree.change("symlink", b"d/s", b"f")
    for name in ("d", "d/f", "d/s"):
        found = os.lstat(tmp_path / name)
        assert (found.st_uid, found.st_gid) == (1234, 2345)
    assert stat.S_IMODE(os.stat(tmp_path / "d/f").st_mode) == 0o4640
    assert stat.S_IMODE(os.stat(tmp_path / "d").st_mode) == 0o750


@pytest.mark.skipif(not (host.LINUX and host.is_root()), reason="mounting needs root on Linux")
def test_nothing_is_made_below_what_was_mounted(tmp_path: Path) -> None:
    """A disk that a guest has got by now: what is made in the directory it was mounted on would never be seen again."""
    root = tmp_path / "merged"
    root.mkdir()
    hostmounts.mount("tmpfs", root, "tmpfs", 0)
    try:
        tree = Loopback(root, writable=lambda: True, mounted=True)
        tree.change("create", b"here", 0o644, os.O_RDWR).close()
        assert not tree.gone() and [name for name, _, _ in tree.readdir(b"")] == [b"here"]
    finally:
        hostmounts.unmount(root)
    assert tree.gone()
    for operation, *arguments in (("create", 0o644, os.O_RDWR), ("mkdir", 0o755)):
        with pytest.raises(Busy, match="handed over"):
            tree.change(operation, b"there", *arguments)
    with pytest.raises(Busy):
        tree.change("chown", b"", 1, 1)
    assert os.listdir(root) == [] and root.stat().st_uid == os.geteuid()

"""Committing containers: what changed becomes a layer that says the same, on top of the image it was made from."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from engines import add_busybox, add_image, reach
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import host
from engine.commit import commit
from engine.engine import Engine
from engine.errors import Busy, InvalidArgument
from engine.images import newimage
from engine.images.catalog import Image
from engine.images.upperlayer import layer_tar
from engine.jobs import Task
from engine.lifecycle import State
from engine.store.inflate import inflate

if not (host.LINUX and host.is_root()) and os.environ.get("CI"):
    raise RuntimeError("root on Linux is needed")
pytestmark = pytest.mark.skipif(not (host.LINUX and host.is_root()), reason="overlay mounts need root on Linux")

FILES = {
    "etc": None,
    "etc/motd": b"old\n",
    "etc/gone": b"x",
    "opt": None,
    "opt/a": b"a",
    "opt/b": b"b",
    "bin": None,
    "bin/tool": (0o755, b"tool"),
}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        yield engine
        engine.close(unmount=True)


def made(engine: Engine, name: str = "c", image: str = "base:1") -> Path:
    add_image(engine, image, FILES, Cmd=["tool"], Env=["A=1", "B=2"])
    engine.containers.create(name)
    engine.containers.set_field(name, "image", image)
    return engine.containers.rootfs(name)


def layer_of(engine: Engine, image: Image) -> dict[str, tarfile.TarInfo]:
    blob = engine.images.layers(image.digest)[-1].blob
    raw = b"".join(inflate(engine.blobs.chunks(blob)))
    with tarfile.open(fileobj=BytesIO(raw)) as tar:
        return {info.name: info for info in tar}


def do(engine: Engine, reference: str = "new:1", **more: object) -> Image:
    return commit(
        engine.containers,
        engine.images,
        engine.trees,
        "c",
        reference,
        Task(),
        **more,  # type: ignore[arg-type]
    )


def test_every_kind_of_change_comes_back(engine: Engine) -> None:
    root = made(engine)
    (root / "etc/motd").write_text("new\n")
    (root / "etc/gone").unlink()
    shutil.rmtree(root / "opt")
    (root / "opt").mkdir()
    (root / "opt/only").write_text("1")
    tool = root / "bin/su"
    tool.write_bytes(b"#!")
    tool.chmod(0o4755)
    os.chown(tool, 12, 34)
    os.chmod(tool, 0o4755)
    os.utime(tool, ns=(1, 1_600_000_000_123_456_789))
    os.setxattr(tool, "user.note", b"\0bin\xff")
    os.setxattr(tool, "security.capability", b"\x01\0\0\x02\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0")
    os.link(tool, root / "bin/su2")
    os.symlink("../etc/motd", root / "bin/ln")
    os.mkfifo(root / "bin/fifo")
    os.mknod(root / "bin/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(root / "bin")
        try:
            listener.bind("sock")
        finally:
            os.chdir("/")
    (root / ("d" * 120)).mkdir()
    (root / ("d" * 120) / "späße").write_text("")
    image = do(engine, author="me", message="why")
    names = layer_of(engine, image)
    assert "etc/.wh.gone" in names and "opt/.wh..wh..opq" in names and "opt/only" in names
    assert names["bin/su2"].islnk() and names["bin/su2"].linkname == "bin/su"
    assert "bin/sock" not in names
    assert names["bin/su"].mode == 0o4755 and (names["bin/su"].uid, names["bin/su"].gid) == (12, 34)
    tree = engine.trees.open(engine.images.get(image.digest).chain_id)
    here = {path: tree.stat(nid) for path, nid in tree.walk()}
    for path, nid in tree.walk():
        real = os.lstat(os.fsencode(root) + b"/" + path)
        info = tree.stat(nid)
        assert (info.mode, info.uid, info.gid) == (real.st_mode, real.st_uid, real.st_gid), path
        if not stat.S_ISDIR(info.mode):
            assert (info.size, info.mtime_ns, info.nlink) == (real.st_size, real.st_mtime_ns, real.st_nlink), path
    nid = tree.lookup(b"bin/su")
    assert tree.xattrs(nid)[b"user.note"] == b"\0bin\xff" and b"security.capability" in tree.xattrs(nid)
    assert tree.pread(tree.lookup(b"etc/motd"), 10, 0) == b"new\n"
    assert b"opt/a" not in here and b"etc/gone" not in here and os.fsencode("d" * 120 + "/späße") in here
    config = json.loads(engine.images.config_bytes(image.digest))
    assert config["author"] == "me" and config["history"][-1]["comment"] == "why"
    assert config["history"][-1]["created_by"] == "tool" and len(config["history"]) == 2
    assert engine.images.references(image.digest) == ["docker.io/library/new:1"]
    assert "WH" not in str(engine.images.verify(image.digest))


def test_the_same_changes_give_the_same_bytes_and_none_give_no_layer(engine: Engine) -> None:
    root = made(engine)
    assert len(engine.images.layers(do(engine, "empty:1").digest)) == 1
    history = engine.images.config(engine.images.resolve("empty:1").digest).history
    assert history is not None and history[-1].empty_layer
    for name in ("z", "a", "m"):
        (root / "opt" / name).write_text(name)
    first = engine.images.layers(do(engine, "one:1").digest)[-1]
    again = engine.images.layers(do(engine, "two:1").digest)[-1]
    assert first == again
    order = list(layer_of(engine, engine.images.resolve("one:1")))
    assert order == ["opt", "opt/a", "opt/m", "opt/z"]


def test_places_of_the_runtime_are_no_changes(engine: Engine) -> None:
    root = made(engine)
    for name in ("dev", "proc", "sys"):
        (root / name).mkdir()
    (root / "etc/hosts").write_bytes(b"")
    (root / "etc/hostname").write_text("written\n")
    names = set(layer_of(engine, do(engine)))
    assert names == {"etc", "etc/hostname"}


def test_what_it_was_configured_with_becomes_the_image_s(engine: Engine) -> None:
    made(engine)
    for field, text in (("env", "B=3\nC=4"), ("user", "7:8"), ("workdir", "/opt"), ("command", "run it")):
        engine.containers.set_field("c", field, text)
    image = do(engine, changes=("ENV D='x y' E=1", "EXPOSE 80 53/udp", "LABEL a=b", "WORKDIR sub", "VOLUME /data"))
    config = json.loads(engine.images.config_bytes(image.digest))["config"]
    assert config["Env"] == ["A=1", "B=3", "C=4", "D=x y", "E=1"]
    assert config["Cmd"] == ["run", "it"] and config["User"] == "7:8" and config["WorkingDir"] == "/opt/sub"
    assert config["ExposedPorts"] == {"80/tcp": {}, "53/udp": {}} and config["Volumes"] == {"/data": {}}
    assert config["Labels"] == {"a": "b"}
    entry = do(engine, "e:1", changes=('ENTRYPOINT ["x"]', "CMD y z", "STOPSIGNAL INT", "ONBUILD RUN q", "ENV K v w"))
    config = json.loads(engine.images.config_bytes(entry.digest))["config"]
    assert config["Entrypoint"] == ["x"] and config["Cmd"] == ["/bin/sh", "-c", "y z"] and "K=v w" in config["Env"]
    for bad in ("RUN x", "CMD", "EXPOSE http", "ENV =1", "ENV 'x"):
        with pytest.raises(InvalidArgument, match="change"):
            do(engine, "bad:1", changes=(bad,))
    with pytest.raises(InvalidArgument, match="digest"):
        do(engine, "x@sha256:" + "0" * 64)


def test_a_running_container_is_paused_and_goes_on(engine: Engine) -> None:
    add_busybox(engine)
    engine.containers.create("c")
    engine.containers.set_field("c", "image", "busybox")
    engine.containers.set_field("c", "command", "sleep\ninf")
    engine.containers.start("c")
    reach(engine, "c", State.RUNNING)
    seen = [event.data for event in engine.journal.replay(0, 10_000)]
    (engine.containers.rootfs("c") / "srv").mkdir()
    image = do(engine)
    assert engine.containers.get("c").state is State.RUNNING
    after = [event.data for event in engine.journal.replay(0, 10_000)][len(seen) :]
    states = [data["to"] for data in after if data.get("to") in ("paused", "running")]
    assert states == ["paused", "running"]
    assert "srv" in layer_of(engine, image)
    engine.containers.remove("c", force=True)


def test_a_container_that_was_started_meanwhile_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    add_busybox(engine)
    engine.containers.create("c")
    engine.containers.set_field("c", "image", "busybox")
    engine.containers.set_field("c", "command", "sleep\ninf")
    (engine.containers.rootfs("c") / "srv").mkdir()
    upper = engine.containers.upper

    def started(name: str) -> Path:
        engine.containers.start(name)
        return upper(name)

    monkeypatch.setattr(engine.containers, "upper", started)
    with pytest.raises(Busy, match="went on"):
        do(engine)
    assert "docker.io/library/new:1" not in engine.images.tags()
    engine.containers.remove("c", force=True)


names = st.text("abc", min_size=1, max_size=2)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("wmrl"), names, names), max_size=12))
def test_any_changes_come_back(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, str]]) -> None:
    """A model: random work in the container's rootfs; the committed image's tree is what the container sees."""
    place = tmp_path_factory.mktemp("any")
    with Engine(place / "store", runtime="fake") as engine:
        root = made(engine)
        for verb, one, two in steps:
            try:
                if verb == "w":
                    (root / one).write_text(two)
                elif verb == "m":
                    (root / one / two).mkdir(parents=True)
                elif verb == "r":
                    target = root / ("opt" if one == "a" else one)
                    shutil.rmtree(target) if target.is_dir() else target.unlink()
                else:
                    os.link(root / one, root / two)
            except OSError as error:
                assert error.errno in (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EPERM)
        image = do(engine)
        tree = engine.trees.open(image.chain_id)
        there = sorted(path for path, _ in tree.walk())
        real = sorted(
            os.path.relpath(os.path.join(base, name), root).encode()
            for base, below, files in os.walk(root)
            for name in (*below, *files)
        )
        assert there == real
        engine.close(unmount=True)


def test_an_upper_that_vanishes_or_shrinks(engine: Engine) -> None:
    root = made(engine)
    (root / "opt/big").write_bytes(bytes(3 << 20))
    tree = engine.trees.open(engine.images.resolve("base:1").chain_id)
    pieces = layer_tar(engine.containers.upper("c"), tree, Task())
    next(pieces)
    (root / "opt/big").write_bytes(b"")
    with pytest.raises(Busy, match="shorter"):
        list(pieces)


def test_changes_are_read_like_dockerfile_lines() -> None:
    runtime: dict[str, object] = {"Env": ["A=1"]}
    newimage.apply(runtime, "env A=2")
    newimage.apply(runtime, "user  nobody")
    assert runtime == {"Env": ["A=2"], "User": "nobody"}

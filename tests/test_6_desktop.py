"""What desktops do to a directory they show: the calls a file manager makes, without one (tools/desktop has one)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import add_image
from mounting import Daemon, can_mount

from engine.engine import Engine

REASON = can_mount()
if REASON and os.environ.get("CI") == "true":
    raise RuntimeError(f"this test must run in CI: {REASON}")
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

LITTER = (".DS_Store", "._web", ".hidden", ".directory", "Thumbs.db", "desktop.ini")
ENGINE_DIRECTORIES = (".", "containers", "containers/web", "containers/web/config", "images", "volumes", "volumes/v")
WRITABLE = ("volumes/v/data", "containers/web/rootfs")


@pytest.fixture(scope="module", params=["bound", "fuse alone"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    place = tmp_path_factory.mktemp("desktop")
    with Engine(place / "store", runtime="fake") as engine:
        add_image(engine, "docker.io/library/app:1", {"srv": None, "srv/film.mp4": bytes(8 << 20)})
    with Daemon(place, binds=request.param == "bound") as running:
        running.sh("mkdir volumes/v containers/web containers/idle; echo app:1 > containers/web/config/image")
        running.sh("ls containers/web/rootfs")
        yield running


def test_litter_is_refused_without_a_word_where_the_engine_lives(daemon: Daemon) -> None:
    for directory in ENGINE_DIRECTORIES:
        for name in LITTER:
            with pytest.raises(PermissionError):
                (daemon.mount / directory / name).write_text("x")
        for name in (".Trash-0", ".Trash"):
            with pytest.raises(PermissionError):
                (daemon.mount / directory / name).mkdir()
        assert not {*LITTER, ".Trash-0", ".Trash"} & set(os.listdir(daemon.mount / directory))
    assert (daemon.mount / "error").read_text() == ""  # nobody is told of it
    assert (daemon.mount / "containers/error").read_text() == ""


def test_litter_is_a_file_like_others_where_people_keep_files(daemon: Daemon) -> None:
    for directory in WRITABLE:
        place = daemon.mount / directory
        for name in LITTER:
            (place / name).write_text("x")
        (place / ".Trash-0/files").mkdir(parents=True)
        (place / ".Trash-0/files/gone").write_text("x")
        os.rename(place / ".Trash-0/files/gone", place / "back")
        assert {*LITTER, ".Trash-0", "back"} <= set(os.listdir(place))


def test_everything_can_be_looked_at(daemon: Daemon) -> None:
    """Every directory lists, every entry has attributes, every symlink leads somewhere, every icon costs 4 KiB."""
    seen = 0
    for directory, names, files in os.walk(daemon.mount):
        os.statvfs(directory)
        for name in names + files:
            path = Path(directory, name)
            os.lstat(path)
            os.stat(path)
            os.access(path, os.R_OK)
            os.listxattr(path)
            seen += 1
        for name in files:
            path = Path(directory, name)
            if os.stat(path).st_mode & 0o444 and name != "wait":
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                try:
                    os.read(fd, 4096)
                finally:
                    os.close(fd)
    assert seen > 150

"""Volumes: rows and directories that agree, also after a crash."""

from __future__ import annotations

import json
import os
import resource
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from engine import host
from engine.config import parse_config
from engine.errors import AlreadyExists, Busy, InvalidArgument, NotFound, TooLarge
from engine.events import Journal
from engine.records import Records
from engine.store.meta import Meta
from engine.treecopy import copy_tree
from engine.volumes import Volumes
from engine.volumesizes import Sizes
from engine.walk import usage, walk


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        self.meta = Meta(root / "db.sqlite")
        self.meta._writer.execute("PRAGMA synchronous=OFF")
        self.journal = Journal(self.meta)
        self.volumes = Volumes(root, self.meta, self.journal)
        self.records = Records(self.meta, self.journal)

    def events(self, name: str) -> list[str]:
        data = self.journal.read(0, 1 << 20, f"volume/{name}")
        return [json.loads(line)["type"] for line in data.splitlines()]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    yield store
    store.meta.close()


def test_created_listed_inspected_removed(store: Store) -> None:
    before = os.umask(0o077)
    try:
        volume = store.volumes.create("data", labels={"tier": "db"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(volume.path).st_mode) == 0o755
    assert (volume.driver, dict(volume.labels), volume.name) == ("local", {"tier": "db"}, "data")
    assert store.volumes.names() == ["data"] and store.volumes.path("data") == volume.path
    (volume.path / "file").write_bytes(b"x" * 5000)
    store.volumes.remove("data")
    assert not volume.path.parent.exists() and not list((store.root / "tmp").iterdir())
    assert store.events("data") == ["volumeCreated", "volumeRemoved"]
    for gone in (store.volumes.get, store.volumes.remove, store.volumes.size):
        with pytest.raises(NotFound):
            gone("data")
    assert list(store.volumes.create("data").path.iterdir()) == []


def test_bad_input_is_refused_by_name_and_leaves_nothing(store: Store) -> None:
    for bad in ("", ".", "..", "a/b", "-x", "x" * 200, "ü"):
        with pytest.raises(InvalidArgument):
            store.volumes.create(bad)
    with pytest.raises(InvalidArgument, match="nfs"):
        store.volumes.create("a", driver="nfs")
    with pytest.raises(InvalidArgument, match="device"):
        store.volumes.create("a", options={"device": "/dev/sda"})
    with pytest.raises(InvalidArgument):
        store.volumes.create("a", labels={"": "x"})
    with pytest.raises(TooLarge):
        store.volumes.create("a", labels={"k": "v" * (1 << 20)})
    assert store.volumes.all() == [] and store.journal.size() == 0 and list((store.root / "volumes").iterdir()) == []
    store.volumes.create("a")
    with pytest.raises(AlreadyExists):
        store.volumes.create("a")


def test_used_volumes_stay_and_the_others_are_unused(store: Store) -> None:
    for name in ("data", "data2", "free"):
        store.volumes.create(name)
    config = parse_config("volumes: [data:/var/data, '/data2:/bind']\nlabels: {data2: free}")
    store.records.create("db", config, lambda id: None)
    assert store.volumes.users("data") == ["db"] and store.volumes.users("data2") == []
    with pytest.raises(Busy, match="db") as caught:
        store.volumes.remove("data")
    assert caught.value.at == "data"
    assert store.volumes.path("data").is_dir()
    assert [volume.name for volume in store.volumes.unused()] == ["data2", "free"]


def test_size_counts_files_once_and_follows_nothing(store: Store) -> None:
    path = store.volumes.create("v").path
    (path / "a").write_bytes(b"x" * 1000)
    os.link(path / "a", path / "b")
    (path / "sub").mkdir()
    (path / "sub" / "c").write_bytes(b"y" * 24)
    os.symlink("/usr", path / "usr")
    assert store.volumes.size("v") == 1024
    (path / "sub" / "d").write_bytes(b"z")
    assert store.volumes.size("v") == 1024  # remembered


def test_walking_never_leaves_the_tree_and_is_bounded(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"s" * 100)
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    os.symlink(outside, root / "a" / "link")
    seen = []
    for path, _, entries in walk(root):
        if path == b"a":  # swapped under our feet
            os.rmdir(root / "a" / "b")
            os.symlink(outside, root / "a" / "b")
        seen += [name for name, _ in entries]
    assert b"secret" not in seen and usage(root) == 0
    deep = root / "deep"
    deep.mkdir()
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(3000):  # beyond PATH_MAX and beyond any recursion
        os.mkdir("d" * 4, dir_fd=fd)
        below = os.open("d" * 4, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert usage(root) == 0
    host.remove_tree(deep)
    for number in range(20):
        (root / f"f{number}").touch()
    with pytest.raises(TooLarge):
        usage(root, limit=15)


def test_a_crash_between_row_and_directory_is_put_right(store: Store) -> None:
    (store.root / "volumes" / "orphan" / "data").mkdir(parents=True)
    (store.root / "volumes" / "orphan" / "data" / "old").touch()
    path = store.volumes.create("kept").path
    os.rmdir(path)
    store.volumes.reconcile()
    assert store.volumes.names() == ["kept"] and path.is_dir()
    assert sorted(os.listdir(store.root / "volumes")) == ["kept"]
    (store.root / "volumes" / "late" / "data").mkdir(parents=True)
    (store.root / "volumes" / "late" / "data" / "old").touch()
    assert list(store.volumes.create("late").path.iterdir()) == []  # litter does not become content


def test_a_failed_creation_leaves_no_row(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("engine.host.fsync_dir", full)
        with pytest.raises(OSError, match="No space"):
            store.volumes.create("a")
    assert store.volumes.all() == [] and store.journal.size() == 0
    store.volumes.create("a")


NAMES = st.sampled_from(["a", "b", "c"])


def test_any_sequence_of_verbs_agrees_with_a_model(tmp_path: Path) -> None:
    class Machine(RuleBasedStateMachine):
        count = 0

        @initialize()
        def begin(self) -> None:
            Machine.count += 1
            self.store = Store(tmp_path / str(Machine.count))
            self.model: dict[str, set[str]] = {}
            self.users: dict[str, set[str]] = {}

        @rule(name=NAMES)
        def create(self, name: str) -> None:
            if name in self.model:
                with pytest.raises(AlreadyExists):
                    self.store.volumes.create(name)
            else:
                self.store.volumes.create(name)
                self.model[name] = set()

        @rule(name=NAMES, file=st.sampled_from(["x", "y"]))
        def write(self, name: str, file: str) -> None:
            if name in self.model:
                (self.store.volumes.path(name) / file).touch()
                self.model[name].add(file)

        @rule(name=NAMES)
        def use(self, name: str) -> None:
            user = f"u{len(self.users)}"
            self.store.records.create(user, parse_config(f"volumes: ['{name}:/v']"), lambda id: None)
            self.users[user] = {name}

        @rule(name=NAMES)
        def remove(self, name: str) -> None:
            if name not in self.model:
                with pytest.raises(NotFound):
                    self.store.volumes.remove(name)
            elif any(name in used for used in self.users.values()):
                with pytest.raises(Busy):
                    self.store.volumes.remove(name)
            else:
                self.store.volumes.remove(name)
                del self.model[name]

        @rule()
        def prune(self) -> None:
            free = sorted(name for name in self.model if not any(name in used for used in self.users.values()))
            assert [volume.name for volume in self.store.volumes.unused()] == free
            for name in free:
                self.store.volumes.remove(name)
                del self.model[name]

        @rule()
        def restart(self) -> None:
            self.store.meta.close()
            self.store = Store(self.store.root)
            self.store.volumes.reconcile()

        @invariant()
        def agrees(self) -> None:
            if hasattr(self, "store"):
                found = {v.name: {path.name for path in v.path.iterdir()} for v in self.store.volumes.all()}
                assert found == self.model
                assert set(os.listdir(self.store.root / "volumes")) == set(self.model)

        def teardown(self) -> None:
            if hasattr(self, "store"):
                self.store.meta.close()

    run_state_machine_as_test(Machine, settings=settings(max_examples=15, stateful_step_count=20, deadline=None))


def test_a_tree_deeper_than_all_open_files_is_deleted(tmp_path: Path) -> None:
    top = tmp_path / "deep"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for level in range(1500):
        os.close(os.open(f"f{level}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.mkdir("dddd", dir_fd=fd)
        below = os.open("dddd", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, used + 128), hard))
    try:
        host.remove_tree(top)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not top.exists()


def test_a_volume_that_came_into_use_while_its_removal_waited_stays(store: Store) -> None:
    store.volumes.create("v")
    waiting = threading.Event()
    users = store.volumes.users

    def look(name: str) -> list[str]:
        waiting.set()
        return users(name)

    store.volumes.users = look  # type: ignore[method-assign]
    refused: list[BaseException] = []

    def remove() -> None:
        try:
            store.volumes.remove("v")
        except Busy as error:
            refused.append(error)

    with store.volumes.changing("v"):
        remover = threading.Thread(target=remove)
        remover.start()
        assert waiting.wait(60)
        with store.volumes.using("v") as volume:
            held = volume.path
            store.volumes._locks["v"].release()  # the change is over; the use goes on
            try:
                remover.join(60)
            finally:
                store.volumes._locks["v"].acquire()
            assert refused and held.is_dir()


def test_labels_that_no_event_could_hold_are_refused(store: Store) -> None:
    store.volumes.create("v")
    for value in ("x" * 40_000, "\n" * 20_000, "é" * 10_000):
        with pytest.raises(TooLarge, match="labels"):
            store.volumes.set_labels("v", {"a": value})
    store.volumes.set_labels("v", {"a": "x" * 30_000})


def test_many_sizes_asked_for_at_once_are_measured_by_few_threads() -> None:
    go_on = threading.Event()
    sizes = Sizes(lambda name: int(go_on.wait(60)))
    before = threading.active_count()
    for number in range(200):
        assert sizes.known(str(number)) is None
    assert threading.active_count() - before <= 16
    go_on.set()
    deadline = time.monotonic() + 60
    while any(sizes.known(str(number)) is None for number in range(200)):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_copy_is_whole_or_fails(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    here = os.open(source, os.O_RDONLY)
    for _ in range(25):  # beyond PATH_MAX
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        with pytest.raises(TooLarge, match="too long"):
            copy_tree(source, target)
    finally:
        host.remove_tree(source)
        host.remove_tree(target)

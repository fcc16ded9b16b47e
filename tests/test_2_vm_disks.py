"""The disk of a virtual machine's container: the host has it mounted, or a guest has it, never both."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_2_mounts import Store

from engine import host, hostmounts, loops
from engine.errors import Busy
from engine.hostfiles import share
from engine.hostmounts import mounted_at
from engine.mounts import RootfsMounts

pytestmark = pytest.mark.skipif(not (host.LINUX and host.is_root()), reason="mounting needs root on Linux")
C = "c"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    store.container(C)
    for name in ("upper", "work"):
        (store.root / "containers" / C / name).mkdir()
    yield store
    store.mounts.given(C)
    store.mounts.release_all()
    store.meta.close()
    assert store.points() == set()


def disk_of(store: Store) -> Path:
    return store.root / "containers" / C / "vm" / "upper.ext4"


def own(store: Store) -> int:
    """Take the disk as the owner of a guest does."""
    fd = os.open(disk_of(store), os.O_RDWR | os.O_CLOEXEC)
    try:
        share(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def test_what_a_container_changed_moves_to_its_disk(store: Store) -> None:
    (store.root / "containers" / C / "upper" / "f").write_text("text")
    store.mounts.use_disk(C)
    assert (store.mounts.upper(C) / "f").read_text() == "text"
    chain = store.chain(b"ahoy")
    assert (store.mounts.ensure(C, chain) / "f").read_text() == "text"
    (store.mounts.merged(C) / "etc/motd").write_text("changed")
    store.mounts.give_disk(C)
    assert store.points() == set()
    store.mounts.given(C)
    assert (store.mounts.upper(C) / "etc/motd").read_text() == "changed"


def test_a_disk_grows_and_keeps_what_is_on_it(store: Store) -> None:
    (store.root / "containers" / C / "upper" / "f").write_text("text")
    store.mounts.use_disk(C, size=64 << 20)
    before = os.statvfs(store.mounts.upper(C))
    store.mounts.use_disk(C, size=32 << 20)  # it never shrinks
    with open(store.mounts.upper(C) / "f"), pytest.raises(Busy):
        store.mounts.use_disk(C, size=200 << 20)
    store.mounts.use_disk(C, size=200 << 20)
    after = os.statvfs(store.mounts.upper(C))
    assert after.f_blocks * after.f_frsize > (170 << 20) > before.f_blocks * before.f_frsize
    assert (store.mounts.upper(C) / "f").read_text() == "text"
    assert disk_of(store).stat().st_blocks * 512 < 64 << 20  # sparse


def test_nobody_mounts_a_disk_that_is_about_to_be_a_guests(store: Store) -> None:
    """From give_disk to the end of the guest, over the moment when the owner takes it, with readers hammering."""
    chain = store.chain(b"ahoy")
    store.mounts.use_disk(C)
    stop, wrong, refused = threading.Event(), list[str](), [0]
    has = threading.Event()  # a guest has the disk, or is about to

    def hammer(look: str) -> None:
        while not stop.is_set():
            late = has.is_set()
            try:
                store.mounts.upper(C) if look == "upper" else store.mounts.ensure(C, chain)
            except Busy:
                refused[0] += 1
            except Exception as error:
                wrong.append(repr(error))
            else:
                if late and has.is_set():
                    wrong.append(f"{look} was answered while a guest had the disk")
            stop.wait(0.002)

    def asked_and_refused() -> None:
        before = refused[0]
        while refused[0] < before + 4 and not wrong:
            assert not mounted_at(disk_of(store).parent / "disk")
            assert loops.of(disk_of(store)) is None

    readers = [threading.Thread(target=hammer, args=(look,)) for look in ("upper", "ensure")]
    for reader in readers:
        reader.start()
    turns = 0
    try:
        for _ in range(12):
            try:
                store.mounts.give_disk(C)
            except Busy:  # a reader is just looking in: as for a person who has files open
                continue
            has.set()
            asked_and_refused()  # before the owner has it
            fd = own(store)
            store.mounts.given(C)
            asked_and_refused()
            turns += 1
            has.clear()
            os.close(fd)
    finally:
        stop.set()
        for reader in readers:
            reader.join(60)
    assert not wrong
    assert turns > 3


def test_a_mounted_disk_is_no_guests_even_when_its_daemon_was_killed(store: Store) -> None:
    store.mounts.use_disk(C)
    upper = store.mounts.upper(C)
    store.mounts = RootfsMounts(store.root, store.trees)  # as a daemon after kill -9 finds it
    with pytest.raises(Busy):
        own(store)
    # who still uses it elsewhere: the mount is gone from here, and the lock is not
    (upper / "open").touch()
    with open(upper / "open"):
        with pytest.raises(Busy):
            store.mounts.give_disk(C)
        hostmounts.unmount(upper.parent)
        with pytest.raises(Busy):
            own(store)
        assert (store.mounts.upper(C) / "open").exists()  # through the device that is there
    store.mounts.give_disk(C)
    os.close(own(store))


@pytest.mark.parametrize("more", [[], ["--user", "--map-root-user"]])
def test_a_copy_of_the_mount_in_another_namespace_goes_with_it(store: Store, more: list[str]) -> None:
    store.mounts.use_disk(C)
    store.mounts.ensure(C, store.chain(b"ahoy"))
    argv = ["unshare", *more, "--mount", "--propagation", "slave", "sh", "-c", "echo; exec sleep 100"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline()
            store.mounts.give_disk(C)
            os.close(own(store))
        finally:
            other.kill()
    store.mounts.given(C)
    store.mounts.forget(C)
    assert not [point for point, _, _ in hostmounts.mounts() if point.startswith(str(store.root / "containers"))]


def test_a_disk_half_filled_by_a_killed_daemon_is_made_anew(store: Store) -> None:
    (store.root / "containers" / C / "upper" / "f").write_text("text")
    place = disk_of(store).parent
    place.mkdir()
    subprocess.run(["truncate", "-s", "16M", place / "filling.ext4"], check=True)
    subprocess.run(["mkfs.ext4", "-q", place / "filling.ext4"], check=True)
    (place / "disk").mkdir()
    device, name = loops.attach(place / "filling.ext4", 0, 512)
    hostmounts.mount(name, place / "disk", "ext4")
    os.close(device)
    store.mounts.use_disk(C)
    assert not mounted_at(place / "disk")
    assert (store.mounts.upper(C) / "f").read_text() == "text"

"""Volume drivers that are programs: trusted or not, their words, their bounds, and what a crash leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import eventually
from mounting import ROOT

from engine import host, hostmounts, volumeplugins
from engine.errors import Busy, DeadlineExceeded, EngineError, InvalidArgument, NotFound, RuntimeFailure, Unsupported
from engine.events import Journal
from engine.store.meta import Meta
from engine.volumes import Volumes


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        self.meta = Meta(root / "db.sqlite")
        self.volumes = Volumes(root, self.meta, Journal(self.meta))
        self.log = root / "asked"

    def driver(self, name: str, script: str) -> Path:
        path = self.root / "volume-drivers" / name
        path.write_text("#!/bin/sh\nread -r asked || :\n" + f'echo "$1 $asked" >> {self.log}\n' + script)
        path.chmod(0o755)
        return path

    def asked(self) -> list[tuple[str, dict[str, object]]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(line.partition(" ")[0], json.loads(line.partition(" ")[2])) for line in lines]

    def made(self) -> list[str]:
        place = self.root / "volume-drivers" / ".made"
        return sorted(os.listdir(place)) if place.exists() else []


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    yield store
    store.meta.close()


def test_what_a_driver_is_told(store: Store) -> None:
    store.driver("echo", "[ $1 = usage ] && echo '{\"bytes\": 7}'; true")
    store.volumes.create("v", "echo", {"colour": "red", "read_only": "true"})
    eventually(lambda: store.volumes.size("v") == 7)
    store.volumes.remove("v")
    asked = store.asked()
    assert [verb for verb, _ in asked] == ["check", "create", "usage", "remove"]
    assert asked[0][1] == {"protocol": 1, "options": {"colour": "red"}}
    (id,) = {str(told["id"]) for _, told in asked[1:]}
    assert len(id) == 32
    for _, told in asked[1:]:
        assert (told["volume"], told["options"], told["protocol"]) == ("v", {"colour": "red"}, 1)
    assert str(asked[2][1]["directory"]) == f"{store.root}/volumes/v/driver"
    assert store.made() == [] and store.volumes.names() == []


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ('echo \'{"error": "the pool is full", "errno": "ENOSPC"}\'; exit 1', "NoSpace", "the pool is full"),
        ('echo \'{"error": "in use", "errno": "EBUSY"}\'', "Busy", "in use"),
        ('echo \'{"error": "odd", "errno": "ENOANO"}\'; exit 1', "RuntimeFailure", "odd"),
        ("echo broken pipe of sorts >&2; exit 3", "RuntimeFailure", "broken pipe of sorts"),
        ("exit 4", "RuntimeFailure", "exit code 4"),
        ("echo hello", "RuntimeFailure", "no JSON object was answered: hello"),
        ("echo '[1]'", "RuntimeFailure", "no JSON object was answered: [1]"),
        ("printf '\\377\\001'", "RuntimeFailure", "no JSON object"),
        ("head -c 200000 /dev/zero", "RuntimeFailure", "more than 65536 bytes"),
    ],
)
def test_a_driver_fails_in_its_own_words(store: Store, script: str, kind: str, words: str) -> None:
    store.driver("bad", script)
    with pytest.raises(EngineError) as caught:
        store.volumes.create("v", "bad")
    assert type(caught.value).__name__ == kind and words in caught.value.reason and "bad: check" in caught.value.reason
    assert store.volumes.names() == [] and store.made() == []


def test_a_driver_that_does_not_answer_is_killed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumeplugins, "SECONDS", 0.3)
    store.driver("slow", f"echo $$ > {store.root}/pid; sleep 1000")
    with pytest.raises(DeadlineExceeded, match="slow: check"):
        store.volumes.create("v", "slow")
    pid = (store.root / "pid").read_text().strip()
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


def test_only_what_the_user_wrote_is_run(store: Store) -> None:
    path = store.driver("mine", "true")
    for name in ("none", "../mine", ".made", "MINE"):
        with pytest.raises(InvalidArgument, match="unknown driver"):
            store.volumes.create("v", name)
    path.chmod(0o775)
    with pytest.raises(Unsupported, match="others could write it"):
        store.volumes.create("v", "mine")
    path.chmod(0o644)
    with pytest.raises(Unsupported, match="not executable"):
        store.volumes.create("v", "mine")
    path.chmod(0o755)
    os.symlink("mine", path.parent / "link")
    with pytest.raises(Unsupported, match="not a file"):
        store.volumes.create("v", "link")
    if host.is_root():
        os.chown(path, 4711, 0)
        with pytest.raises(Unsupported, match="others could write it"):
            store.volumes.create("v", "mine")
        os.chown(path, 0, 0)
    path.parent.chmod(0o777)
    with pytest.raises(Unsupported, match="others could write it"):
        store.volumes.create("v", "mine")
    assert store.asked() == []


def test_what_a_failed_creation_made_is_removed(store: Store) -> None:
    store.driver("half", '[ $1 != create ] || { echo \'{"error": "no", "errno": "EBUSY"}\'; }')
    with pytest.raises(Busy):
        store.volumes.create("v", "half")
    assert [verb for verb, _ in store.asked()] == ["check", "create", "remove"]
    assert store.made() == [] and not list((store.root / "tmp").iterdir())


def test_what_a_driver_could_not_remove_is_removed_by_the_next_start(store: Store) -> None:
    path = store.driver("dull", "[ $1 != remove ] || { echo cannot >&2; exit 1; }")
    store.volumes.create("v", "dull")
    store.volumes.create("kept", "dull")
    with pytest.raises(RuntimeFailure, match="cannot") as caught:
        store.volumes.remove("v")
    assert "next start" in str(caught.value.hint) and store.volumes.names() == ["kept"]
    assert len(store.made()) == 2
    os.unlink(path)
    store.driver("dull", "true")
    store.volumes.reconcile()
    eventually(lambda: len(store.made()) == 1)
    verb, told = store.asked()[-1]
    assert (verb, told["volume"], told["directory"]) == ("remove", "v", None)
    (store.root / "volumes" / "kept" / "id").unlink()  # a volume that is there is never taken for a leftover
    store.volumes.reconcile()
    assert len(store.made()) == 1


def test_a_volume_outlives_its_driver(store: Store) -> None:
    path = store.driver("gone", "true")
    store.volumes.create("v", "gone")
    os.unlink(path)
    assert [volume.driver for volume in store.volumes.all()] == ["gone"]
    assert store.volumes.mounted(store.volumes.get("v")) is False
    with pytest.raises(NotFound, match="gone: it is not there"), store.volumes.using("v"):
        pass


@pytest.mark.skipif(not (host.LINUX and host.is_root()), reason="mounts need root on Linux")
def test_the_driver_of_directories(store: Store, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tools" / "volume-drivers" / "dirs", store.root / "volume-drivers" / "dirs")
    disk = tmp_path / "disk"
    disk.mkdir()
    with pytest.raises(InvalidArgument, match="one option: root="):
        store.volumes.create("v", "dirs")
    with pytest.raises(NotFound, match="is no directory"):
        store.volumes.create("v", "dirs", {"root": f"{disk}/not"})
    store.volumes.create("v", "dirs", {"root": str(disk)})
    with store.volumes.using("v") as volume:
        (volume.path / "f").write_text("kept")
        (place,) = disk.iterdir()
        assert (place / "f").read_text() == "kept"
    assert list(volume.path.iterdir()) == [] and not store.volumes.mounted(volume)
    eventually(lambda: store.volumes.size("v") == 4)
    store.volumes.remove("v")
    assert list(disk.iterdir()) == [] and store.made() == []


@pytest.mark.skipif(not (host.LINUX and host.is_root()), reason="mounts need root on Linux")
def test_a_driver_mounts_itself_or_is_found_out(store: Store) -> None:
    path = '$(printf %s "$asked" | sed \'s/.*"mountpoint": "\\([^"]*\\)".*/\\1/\')'
    store.driver("ram", f'[ $1 != mount ] || mount -t tmpfs -o size=1m ram "{path}"')
    store.driver("liar", "true")
    store.volumes.create("r", "ram")
    with store.volumes.using("r") as volume:
        assert hostmounts.is_mounted(volume.path)
    assert not hostmounts.is_mounted(volume.path)
    store.volumes.create("l", "liar")
    with pytest.raises(RuntimeFailure, match="nothing is mounted"), store.volumes.using("l"):
        pass

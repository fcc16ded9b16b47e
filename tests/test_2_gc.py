"""Plans and eviction: nothing goes that was not shown, nothing that is used; the order and the low-water mark."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from imagestore import ImageStore
from ociimages import make_layout

from engine.errors import Busy, InvalidArgument, Unsupported
from engine.images.archive import load
from engine.images.gc import GRACE, Collector, Scope
from engine.jobs import Cancelled, Jobs, Task
from engine.store.meta import SCHEMA_VERSION, Meta
from engine.store.usage import Usage

BIG = 200_000
DAY = 86400 * 10**9


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    with ImageStore(tmp_path / "store") as store:
        yield store


def image(store: ImageStore, base: Path, number: int, *, pulled: bool = True, age_days: float = 0) -> str:
    """`app<number>:1` with BIG bytes of its own, last used `age_days` ago."""
    layout = base / f"layout{number}"
    body = hashlib.shake_256(str(number).encode()).digest(BIG)
    make_layout(layout, [{"base": b"base\n"}, {"own": body}], reference=f"app{number}:1")
    digest = load(store.images, layout, Task())[0].digest
    with store.meta.tx() as tx:
        when = time.time_ns() - int(age_days * DAY) + number
        tx.execute("UPDATE images SET pulled_ns = ? WHERE digest = ?", (when, digest))
        tx.execute("UPDATE blobs SET created_ns = ? WHERE digest = ?", (when, digest))
        if pulled:
            tx.execute("INSERT OR IGNORE INTO pulled VALUES (?)", (digest,))
    return digest


def limit(store: ImageStore, more: str = "", *, size: int | None = None, low: float = 0.8) -> None:
    size = store.gc.usage.total() - 1 if size is None else size
    store.policy.write(f"max_size: {size}\nlow_water: {low}\n{more}".encode())


def container(store: ImageStore, digest: str) -> None:
    with store.meta.tx() as tx:
        tx.execute("INSERT INTO containers (id, name, state, config, image, runtime, created_ns)"
                   " VALUES ('1', 'web', 'stopped', '{}', ?, '', 0)", (digest,))  # fmt: skip


def run(store: ImageStore, scope: Scope) -> Any:
    plan = store.gc.plan(scope)
    store.gc.run(scope, plan.hash)
    return plan


def test_a_plan_ends_with_the_hash_of_what_it_says(store: ImageStore, tmp_path: Path) -> None:
    image(store, tmp_path, 1)
    store.images.untag("app1:1")
    *items, total, command = store.gc.text(Scope.PRUNE).splitlines(keepends=True)
    digest = hashlib.sha256("".join([*items, total]).encode()).hexdigest()
    assert command == f"prune {digest}\n"
    assert total == f"total {len(items)} objects {sum(int(line.split()[2]) for line in items)} bytes\n"
    assert {line.split()[0] for line in items} == {"image", "tree", "layer", "blob"}


def test_freed_bytes_are_what_the_plan_said(store: ImageStore, tmp_path: Path) -> None:
    image(store, tmp_path, 1)
    image(store, tmp_path, 2)
    store.images.untag("app2:1")
    before = store.gc.usage.total()
    plan = run(store, Scope.PRUNE)
    assert before - store.gc.usage.total() == plan.bytes > BIG
    assert store.gc.plan(Scope.PRUNE).items == store.gc.plan(Scope.GC).items == ()


def test_a_changed_plan_or_a_bad_hash_deletes_nothing(store: ImageStore, tmp_path: Path) -> None:
    one = image(store, tmp_path, 1)
    store.images.untag("app1:1")
    read = store.gc.plan(Scope.PRUNE).hash
    store.images.tag(one, "again:1")
    for scope, digest, error in [(Scope.PRUNE, read, Busy), (Scope.GC, "0" * 64, Busy)]:
        with pytest.raises(error):
            store.gc.run(scope, digest)
    for bad in ("", "x", "0" * 63):
        with pytest.raises(InvalidArgument, match="plan"):
            store.gc.check(Scope.PRUNE, bad)
    assert [found.digest for found in store.images.all()] == [one]


def test_nothing_runs_while_something_is_stored(store: ImageStore, tmp_path: Path) -> None:
    image(store, tmp_path, 1)
    store.images.untag("app1:1")
    with store.images.lease(), pytest.raises(Busy):
        store.gc.run(Scope.PRUNE, store.gc.plan(Scope.PRUNE).hash)
    assert run(store, Scope.PRUNE).of("image")


def test_blobs_that_can_be_downloaded_go_first(store: ImageStore, tmp_path: Path) -> None:
    one = image(store, tmp_path, 1)
    image(store, tmp_path, 2, pulled=False)
    limit(store, low=0.9)
    plan = run(store, Scope.GC)
    assert {item.kind for item in plan.items} == {"blob"}
    mine = [layer.blob for layer in store.images.layers(one)]
    assert plan.of("blob") == [mine[1]]  # the base is the loaded image's too
    assert not store.blobs.has(mine[1]) and store.read(one, "own")


def test_images_go_by_class_then_by_last_use(store: ImageStore, tmp_path: Path) -> None:
    digests = [image(store, tmp_path, n, pulled=False, age_days=60 - n) for n in range(5)]
    store.images.untag("app4:1")
    store.meta.used(digests[0])  # the oldest was used just now
    total = store.gc.usage.total()
    limit(store, low=(total - 3 * BIG) / total)  # an image frees between 2 and 3 times BIG: layer, blob and trees
    assert run(store, Scope.GC).of("image") == [digests[4], digests[1]]
    left = {found.digest for found in store.images.all()}
    assert digests[4] not in left and digests[1] not in left and digests[0] in left and digests[3] in left


def test_young_kept_and_used_images_stay_whatever_the_size(store: ImageStore, tmp_path: Path) -> None:
    digests = [image(store, tmp_path, n, age_days=60 if n else 0) for n in range(4)]
    container(store, digests[1])
    store.images.untag("app1:1")
    limit(store, "keep: [app2, 'app3*']\n".replace("app2", "app2:1"), size=1, low=0.01)
    kept_blobs = {layer.blob for digest in digests[2:] for layer in store.images.layers(digest)}
    plan = run(store, Scope.GC)
    assert plan.of("image") == [] and not kept_blobs & set(plan.of("blob"))
    assert len(store.images.all()) == 4
    assert all(store.read(digest, "own") for digest in digests)


def test_eviction_by_itself_is_a_job_and_spares_what_came_just_now(store: ImageStore, tmp_path: Path) -> None:
    jobs = Jobs(store.meta, store.journal)
    collector = Collector(store.images, store.policy, Usage(store.root), jobs)
    old = image(store, tmp_path, 1, pulled=False, age_days=GRACE)
    store.images.untag("app1:1")
    limit(store, low=0.01)
    store.images.after_store = collector.after_store
    new = image(store, tmp_path, 2, pulled=False)
    job = jobs.wait(1, 20)
    assert job.state == "done" and "deleted" in job.progress
    assert [found.digest for found in store.images.all()] == [new] and old in job.log
    jobs.close()


def test_a_cancelled_run_leaves_the_rest_to_the_next_plan(store: ImageStore, tmp_path: Path) -> None:
    image(store, tmp_path, 1)
    store.images.untag("app1:1")
    task = Task()
    task.cancel()
    plan = store.gc.plan(Scope.PRUNE)
    with pytest.raises(Cancelled):
        store.gc.run(Scope.PRUNE, plan.hash, task)
    rest = run(store, Scope.GC)
    assert set(rest.of("layer")) == set(plan.of("layer"))
    assert store.layers.all() == []


def test_a_store_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    meta = Meta(tmp_path / "db.sqlite")
    with meta.tx() as tx:
        tx.execute("INSERT INTO layers (id, diff_id, size, data_size, tar_size, entries, created_ns)"
                   " VALUES (1, 'd', 9, 8192, 9, 2, 0)")  # fmt: skip
        tx.executemany("INSERT INTO bodies VALUES (?, 1, ?, ?)", [(b"a" * 32, 0, 5), (b"b" * 32, 4096, 4)])
        tx.execute("INSERT INTO events VALUES (1, 0, 'imagePulled', 'image/sha256:x', 0, 0, '')")
        tx.execute("ALTER TABLE layers DROP COLUMN body_size")
        for table in ("last_use", "pulled", "counters"):
            tx.execute(f"DROP TABLE {table}")
        tx.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
    meta.close()
    for _ in range(2):
        meta = Meta(tmp_path / "db.sqlite")
        assert [row["body_size"] for row in meta.query("SELECT body_size FROM layers")] == [9]
        assert [row["image"] for row in meta.query("SELECT image FROM pulled")] == ["sha256:x"]
        assert [row["value"] for row in meta.query("SELECT value FROM meta")] == [str(SCHEMA_VERSION)]
        meta.close()


def test_a_store_of_a_newer_program_is_refused_untouched(tmp_path: Path) -> None:
    Meta(tmp_path / "db.sqlite").close()
    with sqlite3.connect(tmp_path / "db.sqlite") as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    with pytest.raises(Unsupported, match="99"):
        Meta(tmp_path / "db.sqlite")


def test_uses_and_counts_survive_and_are_cheap(tmp_path: Path) -> None:
    meta = Meta(tmp_path / "db.sqlite")
    for _ in range(1000):
        meta.used("sha256:x")
        meta.count("trees_hits")
    assert meta.query("SELECT * FROM last_use") == []  # no transaction of its own
    meta.close()
    meta = Meta(tmp_path / "db.sqlite")
    assert len(meta.query("SELECT * FROM last_use")) == 1
    assert meta.query("SELECT value FROM counters")[0]["value"] == 1000
    meta.close()

"""store/: what lies on disk, how much of it there may be, and what would be deleted. Floor 5."""

from __future__ import annotations

import os
import time
from typing import Any

from engine.errors import Damaged, InvalidArgument, NotFound
from engine.images import registries
from engine.images.gc import Scope
from engine.store.check import check
from fdfs import svg
from fdfs.contents import ContentsGraft
from fdfs.ctl import Call, Verb, table
from fdfs.entry import STARTED_NS, Dir, File, Row
from fdfs.tree.errors import error_file
from fdfs.tree.text import flat

CLASSES = ("blobs", "layers", "trees")


def store_object(engine: Any, *_: str) -> str:
    return "store"


# --- numbers ----------------------------------------------------------------------------------------------------


def stats(engine: Any) -> str:
    """Flat keys. `<class>_bytes` are file sizes, `<class>_disk_bytes` what `du -sB1` says of that directory."""

    def one(sql: str) -> int:
        row = engine.meta.row(sql)
        return int(row[0] or 0) if row else 0

    disk = os.statvfs(engine.store)
    sizes = engine.usage.measure()
    engine.meta.note()
    counters = {row["name"]: row["value"] for row in engine.meta.query("SELECT name, value FROM counters")}
    files = one("SELECT sum(size) FROM layers")
    distinct = one("SELECT sum(body_size) FROM layers")
    out: dict[str, Any] = {"images": one("SELECT count(*) FROM images"), "tags": one("SELECT count(*) FROM tags")}
    for name in CLASSES:
        size = sizes[name]
        out |= {name: size.count, f"{name}_bytes": size.bytes, f"{name}_disk_bytes": size.disk}
        out |= {f"{name}_{what}": counters.get(f"{name}_{what}", 0) for what in ("hits", "misses")}
    out |= {
        "bodies": engine.contents.count(),
        "bodies_bytes": distinct,
        "bodies_hits": counters.get("bodies_hits", 0),
        "bodies_misses": counters.get("bodies_misses", 0),
        "layer_files_bytes": files,
        "dedup_saved_bytes": max(0, files - distinct),
        "store_disk_bytes": sum(size.disk for size in sizes.values()),
        "max_size_bytes": "max" if (limit := engine.policy.get().max_size) is None else limit,
        "containers": one("SELECT count(*) FROM containers"),
        "volumes": one("SELECT count(*) FROM volumes"),
        "events": one("SELECT max(seq) FROM events"),
        "disk_bytes": disk.f_blocks * disk.f_frsize,
        "free_bytes": disk.f_bavail * disk.f_frsize,
    }
    return flat(out)


def usage_svg(engine: Any) -> str:
    sizes = engine.usage.measure()
    disk = os.statvfs(engine.store)
    names: dict[str, list[str]] = {}
    for reference, digest in engine.images.tags().items():
        names.setdefault(digest, []).append(reference.removeprefix("docker.io/library/").removeprefix("docker.io/"))
    rows = engine.meta.query(
        "SELECT i.digest, i.size, coalesce(sum(CASE WHEN u.users = 1 THEN l.size END), 0) AS own"
        " FROM images i LEFT JOIN image_layers x ON x.image = i.digest LEFT JOIN layers l ON l.diff_id = x.diff_id"
        " LEFT JOIN (SELECT diff_id, count(DISTINCT image) AS users FROM image_layers GROUP BY diff_id) u"
        " ON u.diff_id = x.diff_id GROUP BY i.digest ORDER BY i.size DESC, i.digest"
    )
    images = [
        svg.Image(", ".join(sorted(names.get(row["digest"], []))) or row["digest"][:19], row["own"], row["size"])
        for row in rows
    ]
    return svg.usage(
        {name: sizes[name].disk for name in CLASSES},
        free=disk.f_bavail * disk.f_frsize,
        limit=engine.policy.get().max_size,
        images=images,
    )


# --- policy -----------------------------------------------------------------------------------------------------


def policy(engine: Any) -> str:
    return str(engine.policy.text())


def set_policy(engine: Any, content: bytes) -> None:
    engine.policy.write(content)


def policy_mtime(engine: Any) -> int:
    try:
        return int(engine.policy.path.stat().st_mtime_ns)
    except FileNotFoundError:
        return STARTED_NS


# --- plans and verbs --------------------------------------------------------------------------------------------


def plan(engine: Any) -> str:
    return str(engine.gc.text(Scope.GC))


def run_plan(engine: Any, scope: Scope, call: Call) -> str:
    """Check the hash now, so that the writer hears of a changed plan, and again when the job runs."""
    digest = call.arg(0) or ""
    with engine.images.gate():
        engine.gc.check(scope, digest)
    number = engine.jobs.start(f"{scope} {digest}", lambda task: str(engine.gc.run(scope, digest, task)))
    return f"jobs/{number}"


def gc(engine: Any, call: Call) -> str:
    return run_plan(engine, Scope.GC, call)


def registries_yaml(engine: Any) -> str:
    return registries.text(engine.store)


def set_registries(engine: Any, document: bytes) -> None:
    registries.write(engine.store, document)


def verify(engine: Any, call: Call) -> str:
    def work(task: Any) -> str:
        row = engine.meta.row("SELECT (SELECT sum(size) FROM blobs), (SELECT sum(body_size) FROM layers)")
        totals = {"blobs": int(row[0] or 0), "files": int(row[1] or 0)}
        done = dict.fromkeys(totals, 0)

        def say(what: str, size: int) -> None:
            done[what] += size
            task.check()
            task.advance(what, done[what], totals[what])

        with engine.images.lease():  # nothing that is being read is deleted; storing goes on
            problems = check(engine.store, engine.meta, deep=True, progress=say)
            if problems:  # what was half-way into its place a moment ago is not wrong
                time.sleep(1)
                still = set(check(engine.store, engine.meta))
                shallow = ("without a row", "is missing", "were stored", "no such layer")
                problems = [text for text in problems if text in still or not any(word in text for word in shallow)]
        for problem in problems:
            task.log(problem)
        if problems:
            raise Damaged(
                f"{len(problems)} problems, the first: {problems[0]}",
                hint="the job's log has all of them; pull the images again",
            )
        return f"{sum(done.values())} bytes in blobs and files match their digests; every index and tree is whole"

    return f"jobs/{engine.jobs.start('verify', work)}"


# --- blobs ------------------------------------------------------------------------------------------------------


def _names(engine: Any) -> list[str]:
    return [row["digest"] for row in engine.meta.query("SELECT digest FROM blobs")]


def _find(engine: Any, digest: str) -> Row | None:
    try:
        return BLOB if engine.blobs.has(digest) else None
    except (NotFound, InvalidArgument):
        return None


def blob_size(engine: Any, digest: str) -> int:
    return int(engine.blobs.size(digest))


def blob(engine: Any, digest: str, offset: int, size: int) -> bytes:
    engine.meta.used(digest)
    fd = os.open(engine.blobs.path(digest), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


# --- rows -------------------------------------------------------------------------------------------------------


def contents(engine: Any) -> ContentsGraft:
    return ContentsGraft(engine)


def content_doc(engine: Any, *_: str) -> str:
    raise NotFound("contents are served by their directory")


BLOB = File(name="sha256:<digest>", doc="one blob, byte for byte as pulled", read=blob, size=blob_size)
BODY = File(
    name="sha256:<content>",
    doc="one file content, read-only; the bare hex digits name it too",
    read=content_doc,
    size=content_doc,
)
REFS = File(
    name="sha256:<content>.refs",
    doc="where it is used: paths in layers/ and images/, one per line; found by name, not listed",
    show=content_doc,
)

STORE = Dir(
    name="store",
    doc="what lies on disk",
    scratch=True,
    object=store_object,
    rows=(
        File(
            name="ctl",
            doc="clean up and check; the reply names the job",
            object=store_object,
            verbs=table(
                Verb(name="gc", args="[HASH]", doc="delete what the plan with this hash lists (a job)", run=gc),
                Verb(name="verify", doc="read everything again and check every digest (a job)", run=verify),
            ),
        ),
        error_file(store_object),
        File(name="stats", doc="counts and bytes per class, flat-keyed", show=stats),
        File(
            name="policy.yaml",
            doc="how large the store may grow, and what stays in it",
            show=policy,
            commit=set_policy,
            mtime=policy_mtime,
            object=store_object,
        ),
        File(
            name="registries.yaml",
            doc="mirrors, plain HTTP and certificate authorities of registries; counts from the next pull or push on",
            show=registries_yaml,
            commit=set_registries,
            object=store_object,
        ),
        File(name="plan", doc="what gc would delete: class, digest, bytes, reason; ends with what runs it", show=plan),
        File(name="usage.svg", doc="a picture of where the bytes are", show=usage_svg),
        Dir(name="blobs", doc="blobs as pulled, by digest", names=_names, find=_find, kinds=(BLOB,)),
        Dir(
            name="objects",
            doc="content-addressed objects",
            rows=(
                Dir(
                    name="by-digest",
                    doc="every distinct file content of all images and layers, once; grep -r reads each once",
                    graft=contents,
                    kinds=(BODY, REFS),
                ),
            ),
        ),
    ),
)

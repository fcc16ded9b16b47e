"""Plans of what to delete, and their execution: nothing goes that was not shown first. Floor 2.

Only here: the choice. `prune` is every image that has neither a name nor a user. `gc` is what no image needs and, while
the store is larger than its policy allows, in this order until it is at the low-water mark:

    1. layers' blobs as pulled, oldest first: their content stays, and they can be downloaded again
    2. images without a name, least recently used first
    3. images with a name, unused for longer than max_age, least recently used first

Never touched: what a container or a kept name uses, and anything at all while a pull, load or other job stores
something (a lease of the catalog). A plan's hash is the sha256 of its text; it runs only while that is still the plan.

Threading: all methods from any thread; a run keeps the catalog's gate, so what would store something waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from engine import plans
from engine.errors import Busy, EngineError
from engine.events import rfc3339
from engine.images import collect
from engine.images.catalog import Images
from engine.images.reference import parse
from engine.jobs import Jobs, Task
from engine.store.policy import PolicyFile
from engine.store.usage import Usage, allocated

log = logging.getLogger(__name__)

BELIEVED = 1.0  # seconds a shown plan is not made anew: open, stat and read agree
GRACE = 600.0  # seconds an image without a name is safe from eviction nobody asked for


class Scope(StrEnum):
    PRUNE = "prune"
    GC = "gc"


PLACES = {Scope.PRUNE: "images/plan", Scope.GC: "store/plan"}  # where people read it


@dataclass(frozen=True, slots=True)
class Item:
    """One object to be deleted; `bytes` of disk that frees."""

    kind: str  # image (its manifest), tree, layer, blob
    digest: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    scope: Scope
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)

    def body(self) -> str:
        lines = [f"{item.kind} {item.digest} {item.bytes} {item.reason}\n" for item in self.items]
        return "".join(lines) + f"total {len(self.items)} objects {self.bytes} bytes\n"

    @property
    def hash(self) -> str:
        """64 hex digits: sha256 of `body`."""
        return plans.hash_of(self.body())

    def text(self) -> str:
        """`CLASS DIGEST BYTES REASON` lines, `total N objects B bytes`, and `VERB HASH`: what runs exactly this."""
        return f"{self.body()}{self.scope} {self.hash}\n"

    def of(self, kind: str) -> list[str]:
        return [item.digest for item in self.items if item.kind == kind]


class Collector:
    """Of one store."""

    def __init__(self, images: Images, policy: PolicyFile, usage: Usage, jobs: Jobs | None = None) -> None:
        self.images, self.policy, self.usage, self._jobs = images, policy, usage, jobs
        self._lock = threading.Lock()
        self._shown: dict[Scope, tuple[float, str]] = {}
        self._evicting = False

    # --- planning ---------------------------------------------------------------------------------------------------

    def text(self, scope: Scope) -> str:
        """The plan as people read it, made anew when a second has passed."""
        with self._lock:
            known = self._shown.get(scope)
            if known is None or time.monotonic() - known[0] > BELIEVED:
                known = self._shown[scope] = (time.monotonic(), self.plan(scope).text())
            return known[1]

    def plan(self, scope: Scope, *, grace: float = 0.0) -> Plan:
        """What to delete now. `grace`: seconds for which an image without a name is safe from eviction."""
        return _Planner(self, scope, grace).plan()

    # --- running ----------------------------------------------------------------------------------------------------

    def check(self, scope: Scope, digest: str) -> None:
        """Whether `run` with this hash would be accepted now: InvalidArgument, Busy."""
        plans.check(digest, self.plan(scope).hash, PLACES[scope], scope)

    def run(self, scope: Scope, digest: str, task: Task | None = None) -> str:
        """Delete exactly what the plan with this hash lists; returns a line saying what was done.

        Busy when the plan has changed, or while something is being stored; Cancelled between steps, what is left is in
        the next plan.
        """
        with self.images.gate():
            plan = self.plan(scope)
            plans.check(digest, plan.hash, PLACES[scope], scope)
            return self._execute(plan, task)

    def _execute(self, plan: Plan, task: Task | None) -> str:
        images = self.images
        doomed = plan.of("image")
        if doomed:
            images.forget(doomed)
        layers, trees = plan.of("layer"), plan.of("tree")
        blobs = plan.of("blob") + doomed
        collect.delete(images.blobs, images.store_layers, images.trees, (layers, trees, blobs), task)
        if plan.items:
            data = {"objects": len(plan.items), "bytes": plan.bytes, "images": doomed, "plan": plan.hash}
            images.journal.append(f"{plan.scope}Done", "store", data)
        if task is not None:
            for item in plan.items:
                task.log(f"{item.kind} {item.digest} {item.bytes} {item.reason}")
        with self._lock:
            self._shown.clear()
        return f"{len(plan.items)} objects deleted, {plan.bytes} bytes freed"

    # --- by itself --------------------------------------------------------------------------------------------------

    def after_store(self) -> None:
        """Something was stored: when the store is too large now, start a job that evicts. Raises nothing."""
        try:
            limit = self.policy.get().max_size
            if self._jobs is None or limit is None or self.usage.total() <= limit:
                return
            with self._lock:
                if self._evicting:
                    return
                self._evicting = True
            try:
                self._jobs.start("gc (the store is larger than its policy allows)", self._evict)
            except BaseException:
                self._evicting = False
                raise
        except EngineError as error:
            log.warning("nothing is evicted: %s", error.reason)

    def _evict(self, task: Task) -> str:
        try:
            while True:
                try:
                    with self.images.gate():
                        return self._execute(self.plan(Scope.GC, grace=GRACE), task)
                except Busy:  # the next pull has begun: after it
                    task.progress("waiting until nothing is being stored")
                    if task.cancelled.wait(0.5):
                        task.check()
        finally:
            self._evicting = False


class _Planner:
    """Makes one plan from what the catalog says at one moment."""

    def __init__(self, collector: Collector, scope: Scope, grace: float) -> None:
        images = self._images = collector.images
        images.meta.note()
        self._scope, self._grace = scope, grace
        self._policy = collector.policy.get()
        self._usage = collector.usage
        self._have = collect.Holdings.read(images.meta)
        self._used = images.used()
        self._names: dict[str, list[str]] = {}
        for reference, digest in images.tags().items():
            self._names.setdefault(digest, []).append(reference)
        uses = {row["digest"]: int(row["used_ns"]) for row in images.meta.query("SELECT * FROM last_use")}
        self._when = {
            image.digest: max(image.pulled_ns, uses.get(image.digest, 0), uses.get(image.chain_id, 0))
            for image in images.all()
        }
        self._uses = uses
        self._sizes: dict[tuple[str, str], int] = {}

    def plan(self) -> Plan:
        free = [digest for digest in self._oldest() if self._free(digest)]
        if self._scope is Scope.PRUNE:
            doomed = {digest: self._why(digest) for digest in free if digest not in self._names}
            return self._made(doomed, {})
        doomed, blobs = self._evicted(free)
        return self._made(doomed, blobs)

    def _oldest(self) -> list[str]:
        return sorted(self._when, key=lambda digest: (self._when[digest], digest))

    def _free(self, digest: str) -> bool:
        return digest not in self._used and not self._is_kept(digest)

    def _is_kept(self, digest: str) -> bool:
        names = [digest, *self._names.get(digest, ())]
        names += [parse(name).familiar() for name in self._names.get(digest, ())]
        return any(fnmatchcase(name, pattern) for pattern in self._policy.keep for name in names) or any(
            parse_keep(pattern) in names for pattern in self._policy.keep
        )

    def _why(self, digest: str) -> str:
        what = "has no name" if digest not in self._names else ",".join(sorted(self._names[digest]))
        return f"{what}, no container uses it, last used {rfc3339(self._when[digest])[:19]}Z"

    def _evicted(self, free: list[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Images and blobs to evict, with the reason."""
        limit = self._policy.max_size
        doomed: dict[str, str] = {}
        blobs: dict[str, str] = {}
        if limit is None:
            return doomed, blobs
        total = self._usage.total()
        left = total - sum(item.bytes for item in self._made({}, {}).items)
        if left <= limit:
            return doomed, blobs
        goal = int(limit * self._policy.low_water)
        for digest in self._refetchable():
            if left <= goal:
                return doomed, blobs
            blobs[digest] = "as pulled: its content stays in its layer, and it can be downloaded again"
            left -= self._size("blob", digest)
        now = time.time_ns()
        age = self._policy.max_age
        needs = _Needs(self._have)
        for named in (False, True):
            patience = age if named else self._grace
            for digest in free:
                if left <= goal:
                    return doomed, blobs
                old = patience is not None and now - self._when[digest] >= patience * 1e9
                if (digest in self._names) is not named or not old:
                    continue
                doomed[digest] = self._why(digest)
                freed = [item for item in needs.drop(digest) if item[1] not in blobs]
                left -= sum(self._size(kind, one) for kind, one in freed)
        return doomed, blobs

    def _refetchable(self) -> list[str]:
        """Blobs of stored layers whose images all came from a registry and are not kept; least recently used first."""
        meta = self._images.meta
        pulled = {row["image"] for row in meta.query("SELECT image FROM pulled")}
        present = set(self._have.layers)
        good: set[str] = set()
        bad: set[str] = set()
        for image, (config, _) in self._have.images.items():
            fine = image in pulled and not self._is_kept(image)
            bad |= {image, config}
            for diff_id, blob in self._have.layers_of.get(image, ()):
                (good if fine and diff_id in present else bad).add(blob)
        order = {blob: number for number, blob in enumerate(self._have.blobs)}
        mine = [blob for blob in self._have.blobs if blob in good and blob not in bad]
        return sorted(mine, key=lambda blob: (self._uses.get(blob, 0), order[blob]))

    def _size(self, kind: str, digest: str) -> int:
        known = self._sizes.get((kind, digest))
        if known is None:
            images = self._images
            path = collect.paths_of(images.blobs, images.store_layers, images.trees, kind, digest)
            known = self._sizes[kind, digest] = allocated([path])
        return known

    def _made(self, doomed: dict[str, str], evicted: dict[str, str]) -> Plan:
        """The plan that removes these images and blobs, and what nothing needs then."""
        idle = self._have.unneeded()
        layers, trees, blobs = self._have.unneeded(doomed) if doomed else idle
        already = [set(group) for group in idle]
        items = [Item("image", digest, self._size("blob", digest), why) for digest, why in doomed.items()]
        for kind, group, before in (("tree", trees, already[1]), ("layer", layers, already[0]),
                                    ("blob", blobs, already[2])):  # fmt: skip
            for digest in group:
                if digest in doomed:
                    continue
                why = "no image needs it" if digest in before else "no image needs it then"
                items.append(Item(kind, digest, self._size(kind, digest), why))
        gone = set(blobs) | set(doomed)
        for blob, why in evicted.items():
            if blob not in gone:
                items.append(Item("blob", blob, self._size("blob", blob), why))
        return Plan(self._scope, tuple(items))


class _Needs:
    """How many things need each object, to know what goes with an image without looking at all of them again."""

    def __init__(self, have: collect.Holdings) -> None:
        self._have = have
        self._count: Counter[tuple[str, str]] = Counter()
        layers, _, _ = have.needed()
        for digest in have.images:
            self._count.update(self._of(digest))
        for layer in layers:
            self._count.update(("layer", dep) for dep in have.deps.get(layer, ()))
        self._trees, self._layers = set(have.trees), set(have.layers)
        self._blobs = set(have.blobs)

    def _of(self, digest: str) -> list[tuple[str, str]]:
        config, chain = self._have.images[digest]
        below = self._have.layers_of.get(digest, ())
        out = {("blob", digest), ("blob", config), ("tree", chain)}
        return [*out, *{("layer", layer) for layer, _ in below}, *{("blob", blob) for _, blob in below}]

    def drop(self, digest: str) -> list[tuple[str, str]]:
        """(kind, digest) of what nothing needs any more once this image is gone too."""
        todo, freed = self._of(digest), []
        while todo:
            thing = todo.pop()
            self._count[thing] -= 1
            if self._count[thing]:
                continue
            kind, name = thing
            if kind == "layer":
                todo += [("layer", dep) for dep in self._have.deps.get(name, ())]
                if name in self._layers:
                    freed.append(thing)
                if name in self._trees and not self._count["tree", name]:
                    freed.append(("tree", name))
            elif kind == "tree":
                if name in self._trees and not self._count["layer", name]:
                    freed.append(thing)
            elif name in self._blobs:
                freed.append(thing)
        return freed


def parse_keep(pattern: str) -> str:
    """A kept name as it is written in the catalog; a pattern as it is."""
    try:
        return parse(pattern).normalised()
    except EngineError:
        return pattern

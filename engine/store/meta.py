"""The catalog: one SQLite file in WAL mode for everything that is state; bytes are files beside it.

Only here: the schema and how transactions are taken. One writer at a time (`tx`, BEGIN IMMEDIATE under a lock,
synchronous=FULL so an acknowledged change survives power loss); any number of readers (idle connections are kept for
the next), each statement seeing the last commit. Handlers on the lookup/getattr/readdir/open path use `query` only,
which never waits for a writer.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import EngineError, NoSpace, Unsupported

SCHEMA_VERSION = 2

SCHEMA = """
-- schema version and other single values
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);

-- every blob under blobs/, by digest of its bytes as stored (compressed where it was pulled compressed)
CREATE TABLE IF NOT EXISTS blobs (
    digest      TEXT PRIMARY KEY,        -- sha256:<hex>
    size        INTEGER NOT NULL,        -- bytes
    media_type  TEXT NOT NULL,
    created_ns  INTEGER NOT NULL         -- when it entered the store
);

-- every ingested layer under layers/: `data` + `index`
CREATE TABLE IF NOT EXISTS layers (
    id          INTEGER PRIMARY KEY,     -- short key used by `bodies`
    diff_id     TEXT NOT NULL UNIQUE,    -- sha256 of the uncompressed tar
    size        INTEGER NOT NULL,        -- sum of its regular files' sizes, bytes
    data_size   INTEGER NOT NULL,        -- bytes of `data` (bodies stored here, 4 KiB aligned)
    tar_size    INTEGER NOT NULL,        -- bytes of the uncompressed tar
    entries     INTEGER NOT NULL,
    created_ns  INTEGER NOT NULL,
    body_size   INTEGER NOT NULL DEFAULT 0   -- bytes of the distinct bodies in its `data`, without alignment
);

-- compressed form(s) of a layer: which blob inflates to which diff_id; known even after the blob is evicted
CREATE TABLE IF NOT EXISTS layer_blobs (
    digest      TEXT PRIMARY KEY,        -- of the blob
    diff_id     TEXT NOT NULL,
    media_type  TEXT NOT NULL,
    size        INTEGER NOT NULL         -- compressed bytes
);
CREATE INDEX IF NOT EXISTS layer_blobs_diff ON layer_blobs (diff_id);

-- layer -> other layers whose `data` holds bodies it shares (whole-file dedup); pins them
CREATE TABLE IF NOT EXISTS layer_deps (
    diff_id     TEXT NOT NULL,
    dep         TEXT NOT NULL,           -- diff_id of the layer whose `data` is referenced
    PRIMARY KEY (diff_id, dep)
) WITHOUT ROWID;

-- where each distinct regular-file body lives, once
CREATE TABLE IF NOT EXISTS bodies (
    sha256      BLOB PRIMARY KEY,        -- 32 bytes
    layer       INTEGER NOT NULL,        -- layers.id
    offset      INTEGER NOT NULL,        -- bytes into that layer's `data`, multiple of 4096
    size        INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS bodies_layer ON bodies (layer);

-- merged trees under trees/, by OCI chain id (a single layer's tree has chain_id == diff_id)
CREATE TABLE IF NOT EXISTS trees (
    chain_id    TEXT PRIMARY KEY,
    layers      TEXT NOT NULL,           -- JSON list of diff_ids, lowest first
    entries     INTEGER NOT NULL,
    size        INTEGER NOT NULL,        -- bytes of the EROFS metadata image
    created_ns  INTEGER NOT NULL
);

-- images by manifest digest (never an index: the chosen platform's manifest)
CREATE TABLE IF NOT EXISTS images (
    digest      TEXT PRIMARY KEY,
    media_type  TEXT NOT NULL,
    config      TEXT NOT NULL,           -- digest of the config blob
    platform    TEXT NOT NULL,           -- os/arch[/variant]
    chain_id    TEXT NOT NULL,           -- its merged tree
    size        INTEGER NOT NULL,        -- sum of its layers' regular-file bytes
    created     TEXT NOT NULL,           -- RFC 3339 from the config, '' when absent
    pulled_ns   INTEGER NOT NULL
);

-- image -> its layers, position 0 lowest
CREATE TABLE IF NOT EXISTS image_layers (
    image       TEXT NOT NULL,           -- images.digest
    position    INTEGER NOT NULL,
    diff_id     TEXT NOT NULL,
    blob        TEXT NOT NULL,           -- digest of the compressed blob named by the manifest
    PRIMARY KEY (image, position)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS image_layers_diff ON image_layers (diff_id);

-- platform -> manifest of each index (a blob) that was pulled, whether that image is here or not
CREATE TABLE IF NOT EXISTS index_entries (
    index_digest TEXT NOT NULL,
    platform    TEXT NOT NULL,           -- os/arch[/variant]
    manifest    TEXT NOT NULL,           -- digest
    size        INTEGER NOT NULL,        -- bytes of that manifest
    PRIMARY KEY (index_digest, platform)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS index_entries_manifest ON index_entries (manifest);

-- names of images: normalised references (docker.io/library/nginx:1.27)
CREATE TABLE IF NOT EXISTS tags (
    reference   TEXT PRIMARY KEY,
    digest      TEXT NOT NULL,           -- images.digest
    updated_ns  INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS tags_digest ON tags (digest);

-- containers; `state` is written by engine/containers.py only, always with its event in the same transaction
CREATE TABLE IF NOT EXISTS containers (
    id          TEXT PRIMARY KEY,        -- 64 hex
    name        TEXT NOT NULL UNIQUE,
    state       TEXT NOT NULL,           -- lifecycle.State
    config      TEXT NOT NULL,           -- ContainerConfig as JSON
    image       TEXT NOT NULL,           -- images.digest it was first started from, '' before
    runtime     TEXT NOT NULL,           -- driver name, '' before the first start
    pid         INTEGER,                 -- host pid of its init while it runs
    exit_code   INTEGER,                 -- of the last run
    oom         INTEGER NOT NULL DEFAULT 0,  -- 1 when the last run was ended by the OOM killer
    restarts    INTEGER NOT NULL DEFAULT 0,
    created_ns  INTEGER NOT NULL,
    started_ns  INTEGER,
    finished_ns INTEGER,
    reason      TEXT NOT NULL DEFAULT '' -- why it is in this state, one line, '' when ordinary
);

-- what restart policies know of a container that has been started; written by engine/restarts.py
CREATE TABLE IF NOT EXISTS restarts (
    id          TEXT PRIMARY KEY,        -- containers.id
    stopped     INTEGER NOT NULL DEFAULT 0,  -- who stopped it: 0 nobody, 1 a person, 2 the engine
    automatic   INTEGER NOT NULL DEFAULT 0,  -- 1 when its last start was its policy's
    attempts    INTEGER NOT NULL DEFAULT 0,  -- restarts since a person started it
    delay_ms    INTEGER NOT NULL DEFAULT 0,  -- the last back-off
    due_ns      INTEGER                  -- Unix time at which it starts again; NULL: it does not wait for that
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS volumes (
    name        TEXT PRIMARY KEY,
    driver      TEXT NOT NULL,
    options     TEXT NOT NULL,           -- JSON object
    labels      TEXT NOT NULL,           -- JSON object
    created_ns  INTEGER NOT NULL
);

-- networks of containers
CREATE TABLE IF NOT EXISTS networks (
    name        TEXT PRIMARY KEY,
    id          TEXT NOT NULL UNIQUE,    -- 10 hex digits; names its bridge on the host
    driver      TEXT NOT NULL,           -- bridge
    subnet      TEXT NOT NULL,           -- IPv4, address/bits
    gateway     TEXT NOT NULL,
    subnet6     TEXT NOT NULL,           -- IPv6, '' when it has none
    gateway6    TEXT NOT NULL,
    internal    INTEGER NOT NULL,        -- 1: no way out
    chosen      INTEGER NOT NULL,        -- 1: the engine chose `subnet`, and may choose anew while nobody is connected
    labels      TEXT NOT NULL,           -- JSON object
    created_ns  INTEGER NOT NULL
);

-- containers whose network is set up, or about to be: written before anything is made on the host, deleted after all
-- of it is gone
CREATE TABLE IF NOT EXISTS connections (
    container   TEXT PRIMARY KEY,        -- containers.id
    name        TEXT NOT NULL,           -- what the resolver knows it as
    ports       TEXT NOT NULL,           -- JSON list of netconfig.PortSpec, every host port decided
    dns         TEXT NOT NULL            -- JSON list: resolvers asked for what the networks do not know
);

-- their addresses, one row per network
CREATE TABLE IF NOT EXISTS endpoints (
    container   TEXT NOT NULL,           -- connections.container
    network     TEXT NOT NULL,           -- networks.name
    interface   TEXT NOT NULL,           -- in the container: eth0 …
    address     TEXT NOT NULL,           -- IPv4
    address6    TEXT NOT NULL,           -- '' when the network has none
    mac         TEXT NOT NULL,           -- '' when it was not asked for
    aliases     TEXT NOT NULL,           -- JSON list
    started     INTEGER NOT NULL,        -- 1: set up at the start, with the ports; 0: connected while it ran
    PRIMARY KEY (container, network)
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS endpoints_address ON endpoints (network, address);

-- the event journal; `line` is the JSON line people read, `off` its byte offset in the logical `events` file and
-- `obj_off` its offset in the object's own `events` file, so both files have a true size and are never re-rendered
CREATE TABLE IF NOT EXISTS events (
    seq         INTEGER PRIMARY KEY,     -- gapless, from 1
    time_ns     INTEGER NOT NULL,
    type        TEXT NOT NULL,           -- stateChanged, logOutput, resourceUpdate, imagePulled, ...
    object      TEXT NOT NULL,           -- container/<id>, image/<digest>, volume/<name>, job/<n>, engine
    off         INTEGER NOT NULL,
    obj_off     INTEGER NOT NULL,
    line        BLOB NOT NULL            -- with its newline
);
CREATE INDEX IF NOT EXISTS events_off ON events (off);
CREATE INDEX IF NOT EXISTS events_object ON events (object, obj_off);

-- what each container was after each event that changed its state or config; pruned with the journal
CREATE TABLE IF NOT EXISTS history (
    container   TEXT NOT NULL,           -- containers.id
    seq         INTEGER NOT NULL,        -- of the event
    state       TEXT NOT NULL,
    config      TEXT NOT NULL,           -- configs.digest
    PRIMARY KEY (container, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS history_config ON history (config);

-- configs of containers as JSON, each once
CREATE TABLE IF NOT EXISTS configs (digest TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;

-- long-running work
CREATE TABLE IF NOT EXISTS jobs (
    id          INTEGER PRIMARY KEY,
    verb        TEXT NOT NULL,           -- the command line as written
    state       TEXT NOT NULL,           -- running, done, failed, cancelled
    progress    TEXT NOT NULL DEFAULT '',
    error       TEXT NOT NULL DEFAULT '',
    created_ns  INTEGER NOT NULL,
    finished_ns INTEGER
);

-- the last failures per object with a ctl (the `error` files), newest have the highest id
CREATE TABLE IF NOT EXISTS failures (
    id          INTEGER PRIMARY KEY,
    object      TEXT NOT NULL,           -- '' root, images, containers, container/<id>, volume/<name>, ...
    time_ns     INTEGER NOT NULL,
    text        TEXT NOT NULL            -- rendered: time, command, caret, reason, hint
);
CREATE INDEX IF NOT EXISTS failures_object ON failures (object, id);

-- when something was last used, at most once an hour: images.digest, trees.chain_id, blobs.digest
CREATE TABLE IF NOT EXISTS last_use (digest TEXT PRIMARY KEY, used_ns INTEGER NOT NULL) WITHOUT ROWID;

-- images that came from a registry, so that what was downloaded for them can be downloaded again
CREATE TABLE IF NOT EXISTS pulled (image TEXT PRIMARY KEY) WITHOUT ROWID;

-- hits and misses of each class of objects since the store was made: <class>_hits, <class>_misses
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""

# what takes a store of version N-1 to N, once, in one transaction; new tables are made by SCHEMA itself
MIGRATIONS = {
    2: (
        "ALTER TABLE layers ADD COLUMN body_size INTEGER NOT NULL DEFAULT 0",
        "UPDATE layers SET body_size = (SELECT coalesce(sum(size), 0) FROM bodies WHERE layer = layers.id)",
        "INSERT OR IGNORE INTO pulled SELECT DISTINCT substr(object, 7) FROM events WHERE type = 'imagePulled'",
    ),
}
USE_SECONDS = 3600.0  # how exactly last use is known
MAX_USES = 10_000  # remembered to keep it that cheap


# sqlite.org/rescode.html: SQLITE_FULL, and what a full disk makes of the WAL's own files
_FULL = {13, 10 | (3 << 8), 10 | (19 << 8)}  # FULL, IOERR_WRITE, IOERR_SHMSIZE


def _converted(error: sqlite3.OperationalError) -> EngineError | sqlite3.OperationalError:
    """NoSpace for a full disk, the error itself otherwise."""
    if error.sqlite_errorcode in _FULL:
        return NoSpace("the disk that holds the store is full: nothing was changed", hint="make room, then try again")
    return error


MAX_IDLE = 32  # reader connections kept open between queries


class Meta:
    """The catalog at `path`. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._depth = 0
        self._after: list[Callable[[], None]] = []
        self._closed = False
        self._idle: list[sqlite3.Connection] = []  # append and pop are atomic: a reader waits for nobody
        self._writer = self._connect()
        self._writer.execute("PRAGMA journal_mode=WAL")
        self._writer.execute("PRAGMA synchronous=FULL")
        self._counts: Counter[str] = Counter()  # not yet in `counters`
        self._uses: dict[str, int] = {}  # not yet in `last_use`
        self._used: dict[str, float] = {}  # when a use was last noted, monotonic
        try:
            self._migrate()
        except BaseException:
            self._writer.close()
            raise

    def _migrate(self) -> None:
        """Bring the file to SCHEMA_VERSION. Unsupported when a newer program has written it."""
        db = self._writer
        known = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is not None
        row = db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() if known else None
        version = int(row["value"]) if row else SCHEMA_VERSION
        if version > SCHEMA_VERSION:
            raise Unsupported(
                f"the store has schema {version}; this program knows up to {SCHEMA_VERSION}",
                at=str(self.path),
                hint="use the newer program, or another --store",
            )
        db.executescript(SCHEMA)
        with self.tx():
            for step in range(version + 1, SCHEMA_VERSION + 1):
                for statement in MIGRATIONS[step]:
                    db.execute(statement)
            db.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),))

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA busy_timeout=30000")
        return connection

    @contextmanager
    def tx(self) -> Iterator[sqlite3.Connection]:
        """One write transaction: commits on leaving, rolls back on an exception. Nested use joins the outer one."""
        with self._lock:
            outer = self._depth == 0
            if outer:
                self._begin()
                self._after = []
            self._depth += 1
            try:
                yield self._writer
            except BaseException as error:
                self._depth -= 1
                if outer:
                    self._after = []
                    if self._writer.in_transaction:  # on a full disk SQLite has already rolled back
                        self._writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise _converted(error) from error
                raise
            self._depth -= 1
            if outer:
                try:
                    self._note()
                    self._writer.execute("COMMIT")
                except BaseException as error:
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
                    if isinstance(error, sqlite3.OperationalError):
                        raise _converted(error) from error
                    raise
                after, self._after = self._after, []
                for call in after:
                    call()

    def _begin(self) -> None:
        try:
            self._writer.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise _converted(error) from error

    def after_commit(self, call: Callable[[], None]) -> None:
        """Run `call` once the current transaction has committed, still under the write lock, in order.

        It must be quick and must not raise. Not called when the transaction rolls back.
        """
        assert self._depth, "after_commit outside a transaction"
        self._after.append(call)

    def query(self, sql: str, args: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Rows as of the last commit (inside `tx` of the same thread: use the yielded connection instead)."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
            connection.execute("PRAGMA query_only=ON")
        try:
            return connection.execute(sql, args).fetchall()
        finally:
            if self._closed or len(self._idle) >= MAX_IDLE:
                connection.close()
            else:
                self._idle.append(connection)

    # --- what is noted by the way, without a transaction of its own -------------------------------------------------

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter; kept in memory until the next transaction or `close`. Any thread, waits for nobody."""
        if number:
            self._counts[name] += number  # a race loses a count at worst, never an update of the catalog

    def used(self, digest: str) -> None:
        """Note that something was used now; as `count`, and no more than once an hour for the same thing."""
        now = time.monotonic()
        before = self._used.get(digest)
        if before is not None and now - before < USE_SECONDS:
            return
        if len(self._used) >= MAX_USES:
            self._used.clear()
        self._used[digest] = now
        self._uses[digest] = time.time_ns()

    def note(self) -> None:
        """Write down what `count` and `used` have kept in memory."""
        if self._counts or self._uses:
            with self.tx():
                pass

    def _note(self) -> None:
        counts, self._counts = self._counts, Counter()
        uses, self._uses = self._uses, {}
        if counts:
            self._writer.executemany(
                "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                list(counts.items()),
            )
        if uses:
            self._writer.executemany("INSERT OR REPLACE INTO last_use VALUES (?, ?)", list(uses.items()))

    def row(self, sql: str, args: Sequence[Any] = ()) -> sqlite3.Row | None:
        rows = self.query(sql, args)
        return rows[0] if rows else None

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                with suppress(EngineError, sqlite3.Error):  # only counts and times of use: not worth a failure
                    self.note()
                self._closed = True
                while self._idle:
                    self._idle.pop().close()
                self._writer.close()

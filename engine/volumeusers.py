"""Which containers use which volume, read from their configs. Floor 2, no state.

Only here: the names of anonymous volumes, and who uses what. An anonymous volume's name follows from its container's id
and its place in it, so the same start finds the same volume; whose it is stands in the catalog (`anonymous/<volume>`),
since an image's VOLUME is in no config. A container uses its own mounts and those of the containers it names in
volumes_from.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence

from engine.mountspec import MountKind, parse_from

ALIVE = ("starting", "running", "paused", "stopping")  # states in which a container may have files open
_KEY = "anonymous/"

Query = Callable[[str, Sequence[object]], Iterable[sqlite3.Row]]


def anonymous_name(id: str, target: str) -> str:
    """64 hex digits, as Docker's are."""
    return hashlib.sha256(f"{id}\0{target}".encode()).hexdigest()


def owned(query: Query, id: str) -> list[str]:
    """Anonymous volumes of the container `id`."""
    rows = query("SELECT key FROM meta WHERE value = ? AND key LIKE 'anonymous/%'", (id,))
    return sorted(row["key"][len(_KEY) :] for row in rows)


def own(db: sqlite3.Connection, name: str, id: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (_KEY + name, id))


def disown(db: sqlite3.Connection, name: str) -> None:
    db.execute("DELETE FROM meta WHERE key = ?", (_KEY + name,))


def gone_owners(query: Query) -> list[str]:
    """Ids of containers that are gone and have anonymous volumes still."""
    rows = query(
        "SELECT DISTINCT value FROM meta WHERE key LIKE 'anonymous/%' AND value NOT IN (SELECT id FROM containers)", ()
    )
    return [row["value"] for row in rows]


def used(query: Query) -> set[str]:
    """Names of the volumes that have any `users`: one look at all containers, however many volumes there are."""
    out = {
        str(mount["source"])
        for row in query("SELECT config FROM containers WHERE instr(config, '\"volumes\":[{')", ())
        for mount in json.loads(row["config"]).get("volumes", ())
        if mount.get("type") == MountKind.VOLUME
    }
    rows = query("SELECT key FROM meta WHERE key LIKE 'anonymous/%' AND value IN (SELECT id FROM containers)", ())
    return out | {row["key"][len(_KEY) :] for row in rows}


def users(query: Query, name: str, *, alive: bool = False) -> list[str]:
    """Names of the containers that use it, sorted; `alive`: only those that run or are about to."""
    rows = list(
        query(
            "SELECT id, name, state, config FROM containers WHERE instr(config, ?)"
            " OR id = (SELECT value FROM meta WHERE key = ?)"
            " OR (instr(config, 'volumes_from') AND NOT instr(config, '\"volumes_from\":[]'))",
            (name, _KEY + name),
        )
    )
    owner = next(iter(query("SELECT value FROM meta WHERE key = ?", (_KEY + name,))), None)
    found: set[str] = set()
    sources: dict[str, set[str]] = {}
    for row in rows:
        config = json.loads(row["config"])
        if (owner is not None and owner["value"] == row["id"]) or _names(config, name):
            found.add(row["name"])
        sources[row["name"]] = {parse_from(item)[0] for item in config.get("volumes_from", ())}
    grown = True
    while grown:
        more = {user for user, given in sources.items() if user not in found and given & found}
        found |= more
        grown = bool(more)
    states = {row["name"]: row["state"] for row in rows}
    return sorted(user for user in found if not alive or states[user] in ALIVE)


def _names(config: dict[str, list[dict[str, str]]], name: str) -> bool:
    return any(
        mount.get("type") == MountKind.VOLUME and mount.get("source") == name for mount in config.get("volumes", ())
    )

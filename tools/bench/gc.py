#!/usr/bin/env python3
"""How long a plan and its execution take for many blobs nothing needs: `gc.py [BLOBS] [DIRECTORY]`.

Prints one line per step: name, seconds. The store is made in DIRECTORY (default: a temporary one) and removed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from engine.engine import Engine
from engine.images.gc import Scope

SIZE = 4096  # bytes of a blob


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    where = sys.argv[2] if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory(dir=where) as top, Engine(Path(top) / "store", runtime="fake") as engine:
        rows = []
        for number in range(count):  # as `put` does, without its fsyncs: not what is measured
            digest = f"sha256:{number:064x}"
            engine.blobs.path(digest).write_bytes(number.to_bytes(8, "big") * (SIZE // 8))
            rows.append((digest, SIZE, "application/octet-stream", number))
        with engine.meta.tx() as tx:
            tx.executemany("INSERT INTO blobs VALUES (?, ?, ?, ?)", rows)
        os.sync()  # files that never reached the disk would go for nothing
        start = time.perf_counter()
        plan = engine.gc.plan(Scope.GC)
        planned = time.perf_counter()
        engine.gc.run(Scope.GC, plan.hash)
        ended = time.perf_counter()
        assert len(plan.items) == count and not engine.blobs.all()
        print(f"objects {count}")
        print(f"plan_seconds {planned - start:.3f}")
        print(f"run_seconds {ended - planned:.3f}")


if __name__ == "__main__":
    main()

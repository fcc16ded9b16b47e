"""Browsing an image through the mount against the same tree on the host's file system (ext4 as a rule).

Prints JSON lines: {"bench": "browse", "what", "who", "cache", "median_s", "rounds", "ratio"}; `ratio` is against
`native` of the same row. `who`: `native` (the directory the image was made from), `bound` (<mnt>/images/…/rootfs with
the data plane bound over it), `control` (the same path, DUTCHMAN_NO_BIND=1). `cold`: a fresh daemon and mount, and
caches dropped (and the backing files read back in, unless --cold-backing, so that the disk is not measured); `warm`:
the same command again at once. Rounds alternate between the three, so that all see the same machine.

Needs root on Linux. Usage: python tools/bench/browse.py [--rounds N] [--files N] [--big MIB] [--cold-backing]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from mounting import Daemon

from engine.engine import Engine

LAYER = "application/vnd.oci.image.layer.v1.tar"
COMMANDS = {
    "find": "find {} > /dev/null",
    "find -ls": "find {} -ls > /dev/null",
    "ls -lR": "cd {} && ls -lR . > /dev/null",
    # every path from the root of the host: the directories above rootfs/ are control files and are asked for each time
    "stat by absolute path": "find {} -type f | head -n 2000 | xargs stat -c %s > /dev/null",
    "tar c": "tar -cf - --exclude=big.bin -C {} . | cat > /dev/null",
    "read": "dd if={}/big.bin of=/dev/null bs=1M status=none",
}


def make_source(place: Path, files: int, big: int) -> Path:
    """A tree as of an operating system image: many small files, some directories, one large file."""
    source = place / "source"
    for number in range(files):
        directory = source / f"d{number // 650}" / f"s{number // 13}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number % 13}.txt").write_bytes(os.urandom(64) * 128)
    with open(source / "big.bin", "wb") as handle:
        for _ in range(big):
            handle.write(os.urandom(1 << 20))
    return source


def make_image(store: Path, source: Path) -> str:
    """The same tree as an image of one layer; its digest."""
    with Engine(store, runtime="fake") as engine:
        tar = subprocess.Popen(["tar", "-C", source, "-cf", "-", "."], stdout=subprocess.PIPE)
        assert tar.stdout is not None
        with tar.stdout as stream:
            info = engine.layers.ingest(iter(lambda: stream.read(1 << 20), b""), LAYER)
        tar.wait()
        document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [info.diff_id]}}
        raw = json.dumps(document).encode()
        config = engine.blobs.put(raw, "application/vnd.oci.image.config.v1+json")
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config,
                "size": len(raw),
            },
            "layers": [{"mediaType": LAYER, "digest": info.diff_id, "size": info.tar_size}],
        }
        return str(
            engine.images.add(json.dumps(manifest).encode(), str(manifest["mediaType"]), "docker.io/library/b:1").digest
        )


def drop_caches(backing: list[Path], *, warm: bool) -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    if warm:
        for path in backing:
            with open(path, "rb", buffering=0) as handle:
                while handle.read(1 << 22):
                    pass


@contextmanager
def served(place: Path, who: str, digest: str) -> Iterator[Path]:
    """The root to browse."""
    if who == "native":
        yield place / "source"
        return
    with Daemon(place, binds=who == "bound") as daemon:
        root = daemon.mount / "images/by-digest" / digest / "rootfs"
        deadline = time.monotonic() + 10
        while who == "bound" and not daemon.bound(f"images/by-digest/{digest}/rootfs"):
            if time.monotonic() > deadline:
                raise SystemExit("the image was not bound: binds need root on Linux")
            time.sleep(0.01)
        yield root


def timed(command: str, root: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(command.format(root), shell=True, check=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=20000)
    parser.add_argument("--big", type=int, default=512, help="MiB of the large file")
    parser.add_argument("--cold-backing", action="store_true", help="measure the disk too")
    parser.add_argument("--where", type=Path, default=None, help="a directory on the file system to compare with")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="browse-", dir=options.where))
    results: dict[tuple[str, str, str], list[float]] = {}
    try:
        source = make_source(place, options.files, options.big)
        digest = make_image(place / "store", source)
        stored = [path for path in (place / "store").glob("*/sha256/*/*") if path.is_file()]
        native = [source / "big.bin", *source.rglob("*.txt")]
        for _ in range(options.rounds):
            for who in ("native", "bound", "control"):
                for what, command in COMMANDS.items():
                    # native reads its files back too, which also brings in their metadata: as fast as it can be
                    drop_caches(native if who == "native" else stored, warm=not options.cold_backing)
                    with served(place, who, digest) as root:
                        results.setdefault((what, who, "cold"), []).append(timed(command, root))
                        results.setdefault((what, who, "warm"), []).append(timed(command, root))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for (what, who, cache), times in sorted(results.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])):
        median = statistics.median(times)
        base = statistics.median(results[(what, "native", cache)])
        row = {"bench": "browse", "what": what, "who": who, "cache": cache, "median_s": round(median, 4)}
        if what == "read":
            row["mb_per_s"] = round(options.big * 1.048576 / median)
        print(json.dumps(row | {"rounds": len(times), "ratio": round(median / base, 2)}), flush=True)


if __name__ == "__main__":
    main()

"""Listing a large store: `ls images`, `find` of one image, start and memory of the daemon. One JSON line.

    python tools/bench/scale.py [--images 1000] [--layers 50] [--files 100000] [--rounds 9]

Makes `--layers` layers of `--files` files each (5 million by default) through the real ingest, and `--images` images
of one layer each that share them. The store is made below the temporary directory and removed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def tar(number: int, files: int) -> Iterator[bytes]:
    """A layer: empty files, a hundred to a directory. One header is made and patched: tarfile is the slowest part."""
    base = tarfile.TarInfo("d0000000/f0000000")
    base.mode = 0o644
    head = bytearray(base.tobuf(tarfile.USTAR_FORMAT))
    out = bytearray()
    for n in range(files):
        head[0:17] = b"d%07d/f%07d" % (n // 100, n) if n else b"l%07d/f%07d" % (number, n)
        head[148:156] = b"        "
        head[148:156] = b"%06o\0 " % sum(head)
        out += head
        if len(out) > 1 << 20:
            yield bytes(out)
            out.clear()
    yield bytes(out) + bytes(1024)


def fill(store: Path, images: int, layers: int, files: int) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from engine.engine import Engine

    with Engine(store, runtime="fake") as engine, engine.images.lease():
        made = []
        for number in range(layers):
            info = engine.layers.ingest(tar(number, files), LAYER)
            row = engine.meta.row("SELECT digest, size FROM layer_blobs WHERE diff_id = ?", (info.diff_id,))
            assert row is not None
            made.append((info.diff_id, row["digest"], row["size"]))
        for number in range(images):
            diff_id, blob, size = made[number % layers]
            config = json.dumps(
                {
                    "architecture": "amd64",
                    "os": "linux",
                    "config": {"Labels": {"number": str(number)}},
                    "rootfs": {"type": "layers", "diff_ids": [diff_id]},
                }
            ).encode()
            engine.blobs.put(config, CONFIG)
            digest = "sha256:" + hashlib.sha256(config).hexdigest()
            manifest = {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": {"mediaType": CONFIG, "digest": digest, "size": len(config)},
                "layers": [{"mediaType": LAYER, "digest": blob, "size": size}],
            }
            engine.images.add(json.dumps(manifest).encode(), MANIFEST, f"docker.io/library/image{number:05}:1")


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def memory(pid: int) -> int:
    """Anonymous bytes and peak are what counts: pages of mapped trees are the kernel's to drop."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="dutchman-scale-"))
    store, mount = base / "store", base / "mnt"
    cli = [sys.executable, "-m", "fdfs.cli"] if not shutil.which("dutchman") else ["dutchman"]
    where = ["--store", str(store), "--mount", str(mount)]
    try:
        start = time.perf_counter()
        fill(store, options.images, options.layers, options.files)
        filled = time.perf_counter() - start
        up = timed([*cli, "up", *where])
        try:
            pid = int((store / "lock").read_text().split("pid ")[1].split(",")[0].split()[0])
            at_start = memory(pid)
            listings = [timed(["ls", str(mount / "images")]) for _ in range(options.rounds)]
            detailed = [timed(["ls", "-l", str(mount / "images")]) for _ in range(options.rounds)]
            rootfs = str(mount / "images" / "image00000:1" / "rootfs")
            finds = [timed(["find", rootfs + "/", "-type", "f"]) for _ in range(options.rounds)]
            after = memory(pid)
        finally:
            subprocess.run([*cli, "down", *where], check=False, stdout=subprocess.DEVNULL)
        print(
            json.dumps(
                {
                    "images": options.images,
                    "files": options.layers * options.files,
                    "fill_seconds": round(filled, 1),
                    "up_seconds": round(up, 2),
                    "ls_ms": [round(value * 1000, 1) for value in listings],
                    "ls_median_ms": round(statistics.median(listings) * 1000, 1),
                    "ls_l_median_ms": round(statistics.median(detailed) * 1000, 1),
                    "find_first_s": round(finds[0], 3),
                    "find_median_s": round(statistics.median(finds), 3),
                    "rss_at_start_mib": at_start >> 20,
                    "rss_after_mib": after >> 20,
                    "database_mib": os.stat(store / "db.sqlite").st_size >> 20,
                }
            )
        )
    finally:
        if not os.path.ismount(mount):
            shutil.rmtree(base, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Ingest of a gzip layer against the floor and against skopeo + umoci; one JSON line per measurement.

    python tools/bench/ingest.py [--layer FILE.tar.gz] [--rounds N]

Without --layer, one of at least 150 MB is made from /usr and kept in the temporary directory. The floor is
`igzip -d -c | sha256sum`: what it takes to know the diff_id and nothing else. The order of the contenders alternates
by round; every line has all rounds, so noise can be seen. Peak RSS is that of a process that does only that.
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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WANTED = 150 << 20  # bytes of compressed layer
INGEST = """
import resource, sys, time
from pathlib import Path
from engine.store.layers import Layers
from engine.store.meta import Meta
from engine.store.trees import Trees
root, source = Path(sys.argv[1]), sys.argv[2]
meta = Meta(root / "db.sqlite")
layers = Layers(root, meta)
def chunks():
    with open(source, "rb", buffering=0) as file:
        while piece := file.read(1 << 18):
            yield piece
start = time.perf_counter()
info = layers.ingest(chunks(), "application/vnd.oci.image.layer.v1.tar+gzip")
middle = time.perf_counter()
Trees(root, meta, layers).build([info.diff_id])
end = time.perf_counter()
status = Path("/proc/self/status")
peak = int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else 0
print(middle - start, end - middle, peak, info.entries, info.tar_size)
"""


def make_layer(where: Path) -> Path:
    """A gzip layer of WANTED bytes or more from /usr, cached at `where`."""
    if where.exists() and where.stat().st_size >= WANTED:
        return where
    chosen: list[str] = []
    total = 0
    for part in ("bin", "lib/python3", "share", "lib", "include", "sbin", "src"):
        if not Path("/usr", part).is_dir() or (part == "lib" and total > 3 * WANTED):
            continue
        chosen.append(part)
        total += sum(file.lstat().st_size for file in Path("/usr", part).rglob("*") if file.is_file())
        if total > 4 * WANTED:
            break
    aside = where.with_suffix(".making")
    with open(aside, "wb") as out:
        tar = subprocess.Popen(["tar", "-C", "/usr", "-c", *chosen], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        subprocess.run(["gzip", "-6"], stdin=tar.stdout, stdout=out, check=True)
        tar.wait()
    aside.rename(where)
    return where


def floor(layer: Path, tmp: Path) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(f"igzip -d -c '{layer}' | sha256sum > /dev/null", shell=True, check=True)
    return {"seconds": time.perf_counter() - start}


def ours(layer: Path, tmp: Path) -> dict[str, float]:
    out = subprocess.check_output([sys.executable, "-c", INGEST, str(tmp), str(layer)], text=True).split()
    return {
        "seconds": float(out[0]),
        "tree_seconds": float(out[1]),
        "peak_rss_kib": int(out[2]),
        "entries": int(out[3]),
        "tar_bytes": int(out[4]),
    }


def make_oci(layer: Path, where: Path) -> None:
    """An OCI layout with one image of that layer, for skopeo."""
    blobs = where / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    with open(layer, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.link(layer, blobs / digest) if layer.stat().st_dev == where.stat().st_dev else shutil.copy(layer, blobs / digest)
    plain = subprocess.check_output(f"igzip -d -c '{layer}' | sha256sum", shell=True, text=True).split()[0]

    def put(document: object) -> dict[str, object]:
        data = json.dumps(document).encode()
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    config = put(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{plain}"]},
            "config": {},
        }
    )
    kind = "application/vnd.oci.image"
    body = {"mediaType": f"{kind}.layer.v1.tar+gzip", "digest": f"sha256:{digest}", "size": layer.stat().st_size}
    manifest = put(
        {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": {"mediaType": f"{kind}.config.v1+json", **config},
            "layers": [body],
        }
    )
    row = {
        "mediaType": f"{kind}.manifest.v1+json",
        **manifest,
        "annotations": {"org.opencontainers.image.ref.name": "x"},
    }
    (where / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [row]}))
    (where / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def peers(layer: Path, tmp: Path) -> dict[str, float]:
    source = tmp / "source"
    make_oci(layer, source)
    start = time.perf_counter()
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{source}:x", f"oci:{tmp}/copy:x"],
        check=True,
        capture_output=True,
    )
    copied = time.perf_counter()
    subprocess.run(
        ["umoci", "unpack", "--image", f"{tmp}/copy:x", str(tmp / "bundle")], check=True, capture_output=True
    )
    end = time.perf_counter()
    return {"seconds": end - start, "copy_seconds": copied - start, "unpack_seconds": end - copied}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=Path, default=Path(tempfile.gettempdir()) / "bench-layer.tar.gz")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    layer = make_layer(arguments.layer)
    contenders: dict[str, Callable[[Path, Path], dict[str, float]]] = {
        "floor: igzip | sha256sum": floor,
        "ingest": ours,
    }
    if shutil.which("skopeo") and shutil.which("umoci"):
        contenders["skopeo copy + umoci unpack"] = peers
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    layer.read_bytes()[:0]  # into the page cache
    for number in range(arguments.rounds):
        for name in sorted(contenders, reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory(dir=layer.parent) as tmp:
                results[name].append(contenders[name](layer, Path(tmp)))
            os.sync()  # nobody pays for another's dirty pages
    base = statistics.median(row["seconds"] for row in results["floor: igzip | sha256sum"])
    for name, rows in results.items():
        seconds = sorted(row["seconds"] for row in rows)
        line: dict[str, object] = {"bench": "ingest", "what": name, "layer_bytes": layer.stat().st_size}
        line |= {"median_seconds": round(statistics.median(seconds), 3), "rounds": [round(s, 3) for s in seconds]}
        line["times_floor"] = round(statistics.median(seconds) / base, 2)
        line |= {key: round(value, 3) for key, value in rows[-1].items() if key != "seconds"}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

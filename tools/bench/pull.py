"""Pull of an image of ten layers from a local registry, a second one with nine shared layers, and its removal.

    python tools/bench/pull.py [--megabytes N] [--rounds N] [--compression gzip|zstd]

One JSON line per measurement, with CPU seconds besides. Contenders: `dutchman pull` with its daemon running, `podman
pull` (--root in the temporary directory), `skopeo copy` + `umoci unpack`, `ctr images pull` with a containerd
running. Each takes both images into an empty store; the order of the contenders alternates by round. Layers are made
of files below /usr. Docker's registry serves them from the page cache.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = 10
NAMES = ("one", "two")
KIND = "application/vnd.oci.image"


def files() -> Iterator[Path]:
    for part in ("bin", "lib/python3", "share", "include", "lib"):
        for directory, _, names in os.walk(Path("/usr", part)):
            for name in sorted(names):
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink() and path.stat().st_size < 8 << 20:
                    yield path


def make_layer(source: Iterator[Path], size: int) -> bytes:
    out, total = io.BytesIO(), 0
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path in source:
            tar.add(path, recursive=False)
            total += path.stat().st_size
            if total >= size:
                break
    return out.getvalue()


def make_images(layout: Path, megabytes: int, compression: str) -> None:
    """An OCI layout with images `one` and `two`, which differ in their highest layer."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    source = files()
    made = []
    for _ in range(LAYERS + 1):
        tar = make_layer(source, (megabytes << 20) // LAYERS)
        if compression == "zstd":
            packed = subprocess.run(["zstd", "-q", "-3"], input=tar, stdout=subprocess.PIPE, check=True).stdout
        else:
            packed = gzip.compress(tar, 6, mtime=0)
        made.append(("sha256:" + hashlib.sha256(tar).hexdigest(), put(packed)))
    rows = []
    for name, layers in (("one", made[:LAYERS]), ("two", [*made[: LAYERS - 1], made[LAYERS]])):
        config = {"architecture": "amd64", "os": "linux", "config": {}}
        config |= {"rootfs": {"type": "layers", "diff_ids": [diff_id for diff_id, _ in layers]}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{KIND}.manifest.v1+json",
            "config": {"mediaType": f"{KIND}.config.v1+json", **put(json.dumps(config).encode())},
            "layers": [{"mediaType": f"{KIND}.layer.v1.tar+{compression}", **blob} for _, blob in layers],
        }
        entry = {"mediaType": f"{KIND}.manifest.v1+json", **put(json.dumps(manifest).encode())}
        rows.append(entry | {"annotations": {"org.opencontainers.image.ref.name": name}})
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": rows}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def run(*command: str | Path, **more: str) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env={**os.environ, **more})
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")


def timed(*command: str | Path, **more: str) -> float:
    start = time.perf_counter()
    run(*command, **more)
    return time.perf_counter() - start


def used(daemon: int = 0) -> float:
    """CPU seconds so far of the commands that were run, and of a daemon with what it ran, so of anyone at work."""
    mine = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = mine.ru_utime + mine.ru_stime
    if daemon:
        fields = Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()
        seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return seconds


def pulls(command: tuple[str | Path, ...], names: list[str], daemon: int = 0, **more: str) -> dict[str, float]:
    """Seconds for the first and the second image, and of CPU."""
    out = {}
    for what, name in zip(("first", "second"), names, strict=True):
        before = used(daemon)
        out[what] = timed(*command, name, **more)
        out[f"{what} cpu"] = used(daemon) - before
    return out


class Registry:
    """docker-registry on a free port, its data below `directory`."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"
        config = directory / "registry.yml"
        config.write_text(
            "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {directory}/registry}}}}\nhttp: {{addr: '{self.host}'}}\n"
        )
        self.process = subprocess.Popen(
            ["docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise SystemExit("docker-registry did not start")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


Pulls = Callable[[str, Path], dict[str, float]]


def ours(host: str, tmp: Path) -> dict[str, float]:
    environ = {"DUTCHMAN_STORE": str(tmp / "store"), "DUTCHMAN_MOUNT": str(tmp / "mnt"), "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-m", "fdfs")
    run(*command, "up", "--runtime", "fake", **environ)
    try:
        daemon = int((tmp / "store" / "lock").read_text().split("pid ")[1].split(",")[0].split()[0])
        out = pulls((*command, "pull"), [f"{host}/bench:{name}" for name in NAMES], daemon, **environ)
        return {**out, "rmi": timed(*command, "rmi", f"{host}/bench:one", **environ)}
    finally:
        run(*command, "down", **environ)


def podman(host: str, tmp: Path) -> dict[str, float]:
    command = ("podman", "--root", tmp / "root", "--runroot", tmp / "run", "--storage-driver", "overlay")
    out = pulls((*command, "pull", "-q", "--tls-verify=false"), [f"{host}/bench:{name}" for name in NAMES])
    out["rmi"] = timed(*command, "rmi", f"{host}/bench:one")
    run("umount", "-q", tmp / "root" / "overlay") if os.path.ismount(tmp / "root" / "overlay") else None
    return out


def skopeo(host: str, tmp: Path) -> dict[str, float]:
    def one(name: str) -> float:
        copy = ("skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false")
        took = timed(*copy, f"docker://{host}/bench:{name}", f"oci:{tmp}/layout:{name}")
        return took + timed("umoci", "unpack", "--image", f"{tmp}/layout:{name}", tmp / f"bundle-{name}")

    out = {"first": one("one"), "second": one("two")}
    start = time.perf_counter()
    run("umoci", "rm", "--image", f"{tmp}/layout:one")
    run("umoci", "gc", "--layout", tmp / "layout")
    shutil.rmtree(tmp / "bundle-one")
    return {**out, "rmi": time.perf_counter() - start}


def containerd(host: str, tmp: Path) -> dict[str, float]:
    """A containerd of its own, with its usual snapshotter and no Kubernetes plugin; `ctr` pulls, as nerdctl would."""
    config, address = tmp / "containerd.toml", tmp / "containerd.sock"
    config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
    directories = ("--root", tmp / "root", "--state", tmp / "state")
    daemon = [str(word) for word in ("containerd", "--config", config, "--address", address, *directories)]
    process = subprocess.Popen(daemon, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        command = ("ctr", "--address", address, "images")
        for attempt in range(100):
            if subprocess.run([*map(str, command), "ls", "-q"], capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
            if attempt == 99:
                raise SystemExit("containerd did not start")
        names = [f"{host}/bench:{name}" for name in NAMES]
        out = pulls((*command, "pull", "--plain-http"), names, process.pid)
        return {**out, "rmi": timed(*command, "rm", "--sync", f"{host}/bench:one")}
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="of files in the first image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compression", choices=("gzip", "zstd"), default="gzip")
    parser.add_argument("--only", default="", help="contenders whose name matches this regular expression")
    arguments = parser.parse_args()
    contenders: dict[str, Pulls] = {"dutchman": ours}
    if shutil.which("podman"):
        contenders["podman"] = podman
    if shutil.which("skopeo") and shutil.which("umoci") and arguments.compression == "gzip":
        contenders["skopeo + umoci"] = skopeo
    if shutil.which("containerd") and shutil.which("ctr"):
        contenders["containerd"] = containerd
    contenders = {name: call for name, call in contenders.items() if re.search(arguments.only, name)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="bench-pull-") as place:
        base = Path(place)
        make_images(base / "layout", arguments.megabytes, arguments.compression)
        registry = Registry(base)
        try:
            for name in NAMES:
                run("skopeo", "--insecure-policy", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false",
                    f"oci:{base}/layout:{name}", f"docker://{registry.host}/bench:{name}")  # fmt: skip
            for number in range(arguments.rounds):
                for name in sorted(contenders, reverse=bool(number % 2)):
                    with tempfile.TemporaryDirectory(prefix="bench-pull-") as tmp:
                        results[name].append(contenders[name](registry.host, Path(tmp)))
                    os.sync()  # nobody pays for another's dirty pages
        finally:
            registry.close()
    for what in ("first", "second", "rmi"):
        for name, rows in results.items():
            seconds = [row[what] for row in rows]
            line: dict[str, object] = {"bench": "pull", "what": what, "with": name, "megabytes": arguments.megabytes}
            line |= {"compression": arguments.compression, "median_seconds": round(statistics.median(seconds), 3)}
            if f"{what} cpu" in rows[0]:
                line["median_cpu_seconds"] = round(statistics.median(row[f"{what} cpu"] for row in rows), 2)
            print(json.dumps(line | {"rounds": [round(each, 3) for each in seconds]}), flush=True)


if __name__ == "__main__":
    main()

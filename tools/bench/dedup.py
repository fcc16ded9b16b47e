"""Ten builds of a Debian root filesystem, a layer each: bytes on disk here and in others' storage of the same images.

    python tools/bench/dedup.py [--builds 10] [--only NAME]

One JSON line per contender. Each build unpacks Debian's required packages and a set of its own (apt-get downloads them,
with an empty package database, so that what this host has installed does not matter) and is packed as an OCI image of
one gzip layer with times of its own, as builds that start from nothing are. Contenders: `dutchman load` (the whole
store, and without the blobs as pulled, which the policy lets go first), `podman pull oci:…`, and `docker load` by a
dockerd of its own. Bytes are what is allocated (`du -sB1`). A contender that is not installed or cannot run here is
named with its reason. Needs root: owners of files and mounts count.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIND = "application/vnd.oci.image"
EXTRA = (  # what a build has besides the required packages
    (),
    ("ca-certificates", "curl"),
    ("python3-minimal",),
    ("perl",),
    ("git",),
    ("openssh-client",),
    ("vim-tiny", "less"),
    ("sqlite3", "rsync"),
    ("python3", "ca-certificates"),
    ("git", "curl", "python3-minimal"),
)


class Missing(Exception):
    """A contender cannot run here; the text says why."""


def run(*command: str | Path, **more: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **more}, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:12])}: {(done.stderr or done.stdout)[-500:]}")
    return done.stdout


def allocated(path: Path) -> int:
    return int(run("du", "-sB1", path).split()[0])


# --- the images ---------------------------------------------------------------------------------------------------


def required() -> list[str]:
    """Names of the packages a Debian root filesystem has at least."""
    names = []
    for paragraph in run("apt-cache", "dumpavail").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Essential") == "yes" or fields.get("Priority") == "required":
            names.append(fields["Package"])
    return sorted(set(names))


def download(base: Path, names: list[str]) -> list[Path]:
    """The packages and all they depend on, as files; each is fetched once for all builds."""
    (base / "status").touch()

    def apt(archives: Path, *words: str) -> str:
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        options = [f"Dir::State::status={base}/status", f"Dir::Cache::archives={archives}/"]
        options += ["Dir::Cache::pkgcache=", "APT::Sandbox::User=root", "Debug::NoLocking=1"]
        given = [word for option in options for word in ("-o", option)]
        return run("apt-get", *given, "-qq", "-y", "--no-install-recommends", *words, *names)

    listed = apt(base / "none", "--print-uris", "install")  # it leaves out what is there already
    apt(base / "archives", "--download-only", "install")
    return [base / "archives" / line.split()[1] for line in listed.splitlines() if line.startswith("'")]


def build(base: Path, number: int, packages: list[Path]) -> tuple[Path, int]:
    """An OCI layout with one image of one layer; the bytes of its uncompressed tar."""
    rootfs, layout = base / "rootfs", base / f"layout-{number}"
    rootfs.mkdir()
    for package in packages:
        run("dpkg-deb", "-x", package, rootfs)
    admin = rootfs / "var" / "lib" / "dpkg"
    admin.mkdir(parents=True, exist_ok=True)
    (admin / "status").write_text("\n".join(run("dpkg-deb", "-f", package) for package in packages))
    (rootfs / "etc" / "machine-id").write_text(hashlib.sha256(str(number).encode()).hexdigest()[:32] + "\n")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def dated(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime = 1_700_000_000 + number * 86_400
            return member

        tar.add(rootfs, arcname=".", filter=dated)
    shutil.rmtree(rootfs)
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"digest": f"sha256:{name}", "size": len(data)}

    tarred = out.getvalue()
    layer = {"mediaType": f"{KIND}.layer.v1.tar+gzip", **put(gzip.compress(tarred, 6, mtime=0))}
    config = {"architecture": "amd64", "os": "linux", "config": {}}
    config |= {"rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(tarred).hexdigest()]}}
    described = {"mediaType": f"{KIND}.config.v1+json", **put(json.dumps(config).encode())}
    manifest = {"schemaVersion": 2, "mediaType": f"{KIND}.manifest.v1+json", "config": described, "layers": [layer]}
    entry = {"mediaType": f"{KIND}.manifest.v1+json", **put(json.dumps(manifest).encode())}
    entry["annotations"] = {"org.opencontainers.image.ref.name": f"localhost/build:{number}"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return layout, len(tarred)


# --- the contenders -----------------------------------------------------------------------------------------------


def ours(layouts: list[Path], tmp: Path) -> dict[str, int]:
    environ = {"DUTCHMAN_STORE": str(tmp / "store"), "DUTCHMAN_MOUNT": str(tmp / "mnt"), "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-m", "fdfs")
    run(*command, "up", "--runtime", "fake", **environ)
    try:
        for layout in layouts:
            run(*command, "load", layout, **environ)
        stats = dict(line.split() for line in (tmp / "mnt" / "store" / "stats").read_text().splitlines())
        whole = allocated(tmp / "store")
        blobs = allocated(tmp / "store" / "blobs")
        return {"bytes": whole, "without_blobs": whole - blobs} | {
            key: int(value) for key, value in stats.items() if key.startswith("dedup")
        }
    finally:
        run(*command, "down", **environ)


def podman(layouts: list[Path], tmp: Path) -> dict[str, int]:
    if not shutil.which("podman"):
        raise Missing("podman is not installed")
    command = ("podman", "--root", tmp / "root", "--runroot", tmp / "run", "--storage-driver", "overlay")
    try:
        for number, layout in enumerate(layouts):
            run(*command, "pull", "-q", f"oci:{layout}:localhost/build:{number}")
        return {"bytes": allocated(tmp / "root")}
    finally:
        if os.path.ismount(tmp / "root" / "overlay"):
            run("umount", tmp / "root" / "overlay")


def docker(layouts: list[Path], tmp: Path) -> dict[str, int]:
    for program in ("dockerd", "docker", "skopeo"):
        if not shutil.which(program) and not Path("/usr/sbin", program).exists():
            raise Missing(f"{program} is not installed")
    socket = tmp / "docker.sock"
    command = ["dockerd", "--data-root", str(tmp / "data"), "--exec-root", str(tmp / "exec"), "-H", f"unix://{socket}"]
    command += ["--pidfile", str(tmp / "pid"), "--bridge=none", "--iptables=false", "--ip-forward=false"]
    with open(tmp / "log", "wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(["docker", "-H", f"unix://{socket}", "version"], capture_output=True).returncode:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise Missing("dockerd does not start here: " + (tmp / "log").read_text()[-300:])
            time.sleep(0.2)
        for number, layout in enumerate(layouts):
            archive = tmp / "archive.tar"
            run("skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}:localhost/build:{number}",
                f"docker-archive:{archive}:build:{number}")  # fmt: skip
            run("docker", "-H", f"unix://{socket}", "load", "-q", "-i", archive)
            archive.unlink()
        return {"bytes": allocated(tmp / "data")}
    finally:
        daemon.terminate()
        daemon.wait(30)


Contender = Callable[[list[Path], Path], dict[str, int]]
CONTENDERS: dict[str, Contender] = {"dutchman": ours, "podman": podman, "docker": docker}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builds", type=int, default=len(EXTRA), choices=range(1, len(EXTRA) + 1), metavar="N")
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    arguments = parser.parse_args()
    if os.geteuid():
        raise SystemExit("run it as root: owners of files and mounts count")
    with tempfile.TemporaryDirectory(prefix="bench-dedup-") as place:
        base = Path(place)
        names, layouts, tars = required(), [], 0
        for number, extra in enumerate(EXTRA[: arguments.builds]):
            layout, size = build(base, number, download(base, [*names, *extra]))
            layouts.append(layout)
            tars += size
        compressed = sum(file.stat().st_size for layout in layouts for file in layout.rglob("*") if file.is_file())
        what = {"bench": "dedup", "builds": arguments.builds, "tar_bytes": tars, "compressed_bytes": compressed}
        for name, contender in CONTENDERS.items():
            if arguments.only not in name:
                continue
            with tempfile.TemporaryDirectory(prefix="bench-dedup-") as tmp:
                try:
                    found: dict[str, object] = {**contender(layouts, Path(tmp))}
                except Missing as why:
                    found = {"skipped": str(why)}
            print(json.dumps({**what, "with": name, **found}), flush=True)


if __name__ == "__main__":
    main()

"""Images through the mount, as people use them: push, save, export, commit, platforms, registries.yaml, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import ROOT, Daemon, can_mount
from ociimages import INDEX, busybox_rootfs_tar, digest_of, make_index, make_layout

from tests.registry import Registry, available

WHY = can_mount() or ("" if available() else "docker-registry and skopeo are not installed")
if WHY and os.environ.get("CI"):
    raise RuntimeError(WHY)
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def registry(place: Path) -> Iterator[Registry]:
    layout = place / "layout"
    amd = make_layout(layout, [busybox_rootfs_tar(), {"etc/motd": b"hello\n"}], listed=False)
    arm = make_layout(layout, [{"etc/motd": b"arm\n"}], platform="linux/arm64", listed=False)
    make_index(layout, {"linux/amd64": amd, "linux/arm64": arm}, reference="multi")
    with Registry(place) as running:
        running.push_layout(layout, "demo:1", "multi")
        yield running


@pytest.fixture(scope="module")
def daemon(place: Path, registry: Registry) -> Iterator[Daemon]:
    env = {"HOME": str(place), "XDG_RUNTIME_DIR": str(place / "run"), "REG": registry.host}
    with Daemon(place, env=env) as daemon:
        job(daemon, f"echo 'pull {registry.name('demo:1')} platform=linux/amd64' > images/ctl")
        yield daemon


def job(daemon: Daemon, command: str, wanted: str = "done") -> str:
    """Start a job and wait for its end; its last line of progress, or its error."""
    before = set(daemon.sh("ls jobs").split())
    daemon.sh(command)
    (number,) = set(daemon.sh("ls jobs").split()) - before
    for _ in range(200):
        state = daemon.sh(f"cat jobs/{number}/state").strip()
        if state not in ("running", "waiting"):
            break
        daemon.run("sleep 0.05")
    text = daemon.sh(f"cat jobs/{number}/error jobs/{number}/log jobs/{number}/progress")
    assert state == wanted, text
    return text


def cli(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DUTCHMAN_MOUNT": str(daemon.mount)}
    return subprocess.run([sys.executable, "-m", "fdfs", *words], capture_output=True, text=True, env=env, cwd="/tmp")


def test_platforms_of_an_index(daemon: Daemon, registry: Registry) -> None:
    image = f"images/{registry.host}/demo:1"
    assert daemon.sh(f"ls {image}/platforms").split() == ["linux-amd64", "linux-arm64"]
    assert daemon.sh(f"cat {image}/platforms/linux-arm64/present").strip() == "0"
    digest = daemon.sh(f"cat {image}/platforms/linux-arm64/digest").strip()
    assert int(daemon.sh(f"cat {image}/platforms/linux-arm64/size_bytes")) > 0
    job(daemon, f"echo 'pull {registry.name('demo:1')} platform=linux/arm64' > images/ctl")
    daemon.until(f"readlink {image}/platforms/linux-arm64", digest)
    assert daemon.sh(f"cat {image}/platforms/linux-arm64/rootfs/etc/motd") == "arm\n"
    assert daemon.sh(f"cat {image}/platforms/linux-amd64/platform") == "linux/amd64\n"


def test_a_containers_platform(daemon: Daemon, registry: Registry) -> None:
    done = cli(daemon, "run", "--platform", "linux/s390x", "--name", "other", registry.name("demo:1"))
    assert done.returncode != 0 and "no image for linux/s390x; there is linux/amd64, linux/arm64" in done.stderr, done
    assert not (daemon.mount / "containers/other").exists()
    name = registry.name("demo:1")
    done = cli(daemon, "run", "-d", "--platform", "arm64", "--name", "other", name, "sleep", "inf")  # it is pulled
    assert done.returncode == 0, done.stderr
    assert daemon.sh("cat containers/other/config/platform") == "arm64\n"
    assert daemon.sh("cat containers/other/rootfs/etc/motd") == "arm\n"
    arm = f"images/{registry.host}/demo:1/platforms/linux-arm64"
    assert daemon.sh(f"cat {arm}/used_by") == "other\n"
    daemon.sh("echo kill > containers/other/ctl")
    daemon.until("cat containers/other/state", "stopped")
    daemon.refused("echo 'linux/a b' > containers/other/config/platform", "Invalid argument")
    assert "a platform is os/architecture" in daemon.sh("cat containers/other/error")
    daemon.sh("echo linux/s390x > containers/other/config/platform")  # as the name of an image that is not here
    daemon.refused("echo start > containers/other/ctl", "No such file")
    assert f"pull {name} platform=linux/s390x" in daemon.sh("cat containers/other/error")
    daemon.sh("rmdir containers/other")
    daemon.sh(f"echo 'run {name} name=other platform=linux/amd64 -- sleep inf' > containers/ctl")
    assert daemon.sh("cat containers/other/rootfs/etc/motd") == "hello\n"
    daemon.sh("echo kill > containers/other/ctl")
    daemon.until("cat containers/other/state", "stopped")
    daemon.sh("rmdir containers/other")


def test_another_platform_out_of_a_file(daemon: Daemon, tmp_path: Path) -> None:
    layout = tmp_path / "several"
    made = [
        make_layout(layout, [{"who": name.encode()}], platform=f"linux/{name}", listed=False)
        for name in ("amd64", "arm64")
    ]
    make_index(layout, {"linux/amd64": made[0], "linux/arm64": made[1]}, reference="several:1")
    assert cli(daemon, "load", "--platform", "linux/amd64", str(layout)).stdout == "several:1\n"
    done = cli(daemon, "load", "--platform", "linux/arm64", str(layout))
    assert done.stdout == f"{made[1]}\n", done  # the name stays what it is
    assert daemon.sh("cat images/several:1/platforms/linux-arm64/rootfs/who") == "arm64"
    done = cli(daemon, "load", "--platform", "linux/s390x", str(layout))
    assert done.returncode != 0 and "no image for linux/s390x; there is linux/amd64, linux/arm64" in done.stderr, done
    daemon.refused(f"echo 'load {layout} platform=a/b/c/d' > images/ctl", "Invalid argument")


def test_push_and_save_and_export(daemon: Daemon, registry: Registry, place: Path) -> None:
    image = f"images/{registry.host}/demo:1"
    digest = os.path.basename(os.readlink(daemon.mount / image))
    job(daemon, f"echo 'push {registry.name('other/name:2')}' > {image}/ctl")
    done = subprocess.run(["skopeo", "inspect", "--tls-verify=false", f"docker://{registry.name('other/name:2')}"],
                          capture_output=True, text=True)  # fmt: skip
    assert json.loads(done.stdout)["Digest"] == digest
    job(daemon, f"echo 'save {place}/out' > {image}/ctl")
    job(daemon, f"echo 'save {place}/out.tar format=docker' > {image}/ctl")
    job(daemon, f"echo 'export {place}/root.tar' > {image}/ctl")
    assert digest_of((place / "out/blobs/sha256" / digest[7:]).read_bytes()) == digest
    assert "etc/motd" in daemon.sh(f"tar -tf {place}/root.tar")
    daemon.refused(f"echo 'save {place}/out' > {image}/ctl", "File exists")
    daemon.refused(f"echo 'save out' > {image}/ctl", "Invalid argument")
    daemon.refused(f"echo 'save {place}/x format=zip' > {image}/ctl", "Invalid argument")
    daemon.refused(f"echo 'push' > {image}/ctl", "Invalid argument")
    daemon.refused(f"echo 'push UPPER' > {image}/ctl", "Invalid argument")
    assert "push" in daemon.sh(f"cat {image}/ctl")
    said = job(daemon, f"echo 'push 127.0.0.1:1/a:1' > {image}/ctl; sleep 0.3; echo cancel > jobs/$(ls jobs | sort -n |"
                       " tail -1)/ctl", "cancelled")  # fmt: skip
    assert "127.0.0.1:1" in said


def test_commit_and_the_command(daemon: Daemon, registry: Registry, place: Path) -> None:
    name = registry.name("demo:1")
    daemon.sh(f"mkdir containers/c && echo {name} > containers/c/config/image")
    daemon.sh("echo sleep inf > containers/c/config/command; echo start > containers/c/ctl")
    daemon.sh(
        "mkdir containers/c/rootfs/srv && echo made > containers/c/rootfs/srv/file && rm containers/c/rootfs/etc/motd"
    )
    assert "commit REF" in daemon.sh("cat containers/c/ctl")
    line = """commit made:1 author=me message='two words' 'change=CMD ["x"]' change='ENV A=1'"""
    job(daemon, f"cat > containers/c/ctl <<'END'\n{line}\nEND")
    assert daemon.sh("cat containers/c/state") == "running\n"
    assert daemon.sh("cat images/made:1/rootfs/srv/file") == "made\n"
    daemon.refused("cat images/made:1/rootfs/etc/motd", "No such file")
    config = json.loads(daemon.sh("cat images/made:1/config.json"))
    assert config["config"]["Cmd"] == ["x"] and "A=1" in config["config"]["Env"]
    assert config["history"][-1]["comment"] == "two words"
    daemon.refused("echo 'commit made:1 change=RUN' > containers/c/ctl", "Invalid argument")
    assert cli(daemon, "commit", "-c", "USER 5", "-c", "ENV B=2", "c", "made:2").returncode == 0
    assert json.loads(daemon.sh("cat images/made:2/config.json"))["config"]["User"] == "5"
    assert cli(daemon, "tag", "made:2", f"{registry.host}/made:3").returncode == 0
    pushed = cli(daemon, "push", f"{registry.host}/made:3")
    assert (pushed.returncode, pushed.stdout) == (0, f"{registry.host}/made:3\n"), pushed.stderr
    assert cli(daemon, "save", "-o", str(place / "cli"), "made:2").returncode == 0
    assert cli(daemon, "export", "-o", str(place / "cli.tar"), "made:2").returncode == 0
    again = cli(daemon, "export", "-o", str(place / "cli.tar"), "made:2")
    assert again.returncode == 1 and "exists" in again.stderr
    assert "srv/file" in daemon.sh(f"tar -tf {place}/cli.tar")
    refused = cli(daemon, "export", "-o", "/proc/new.tar", "made:2")
    assert refused.returncode == 1 and "nothing can be written there" in refused.stderr
    daemon.sh("echo kill > containers/c/ctl; sleep 0.2; rmdir containers/c")


def test_registries_yaml(daemon: Daemon, registry: Registry) -> None:
    assert "mirrors" in daemon.sh("cat store/registries.yaml")
    daemon.sh(f"echo 'registries: {{mirror.test: {{mirrors: [{registry.host}]}}}}' > store/registries.yaml")
    job(daemon, "echo 'pull mirror.test/demo:1' > images/ctl")
    assert daemon.sh("cat images/mirror.test/demo:1/rootfs/etc/motd") == "hello\n"
    daemon.refused("/bin/echo 'registries: {x.y: {mirror: []}}' > store/registries.yaml", "Invalid argument")
    assert "unknown field" in daemon.sh("cat store/error")
    assert "mirror.test" in daemon.sh("cat store/registries.yaml")


@pytest.mark.parametrize(("kind", "why"), [
    ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "not distributed"),
    ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "not distributed"),
    ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
])  # fmt: skip
def test_foreign_and_encrypted_layers_are_refused(daemon: Daemon, tmp_path: Path, kind: str, why: str) -> None:
    digest = make_layout(tmp_path / "l", [{"a": b"1"}], listed=False)
    path = tmp_path / "l" / "blobs" / "sha256" / digest[7:]
    manifest = json.loads(path.read_text())
    manifest["layers"][0]["mediaType"] = kind
    raw = json.dumps(manifest).encode()
    path.with_name(digest_of(raw)[7:]).write_bytes(raw)
    entry = {"mediaType": manifest["mediaType"], "digest": digest_of(raw), "size": len(raw)}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}
    (tmp_path / "l" / "index.json").write_text(json.dumps(index))
    (tmp_path / "l" / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    said = job(daemon, f"echo 'load {tmp_path}/l' > images/ctl", "failed")
    assert why in said and "layers[0]" in said
    assert why in daemon.sh("cat images/error")

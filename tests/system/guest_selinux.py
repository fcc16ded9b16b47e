"""SELinux, enforcing: contexts of containers, of their files, and of what is bound into them with z and Z.

The tests run as unconfined_t; the types are those of tools/systemtest/containers.cil.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Daemon

ENFORCE = Path("/sys/fs/selinux/enforce")
PROCESS, FILE = "system_u:system_r:container_t:s0", "system_u:object_r:container_file_t:s0"


@pytest.fixture(scope="module", autouse=True)
def enforcing() -> Iterator[None]:
    ENFORCE.write_text("1")
    yield
    ENFORCE.write_text("0")


def context(path: Path | str) -> str:
    return os.getxattr(path, "security.selinux", follow_symlinks=False).rstrip(b"\0").decode()


def make(daemon: Daemon, name: str, command: str, **fields: object) -> None:
    config = {"image": "busybox", "command": ["sh", "-c", command], "networks": ["none"], **fields}
    daemon.sh(f"mkdir containers/{name}")
    (daemon.mount / "containers" / name / "config.yaml").write_text(json.dumps(config))


def said(daemon: Daemon, name: str, command: str, **fields: object) -> str:
    """What a container prints that runs to its end; then it is removed."""
    make(daemon, name, f"exec 2>&1; {command}", **fields)
    done = daemon.run(f"echo start > containers/{name}/ctl", timeout=120)
    assert done.returncode == 0, done.stderr + daemon.sh(f"cat containers/{name}/error")
    daemon.until(f"cat containers/{name}/state", "stopped", seconds=60)
    text = daemon.sh(f"cat containers/{name}/logs/stdout")
    daemon.sh(f"rmdir containers/{name}")
    return text


def refusal(daemon: Daemon, name: str, **fields: object) -> str:
    make(daemon, name, "true", **fields)
    assert daemon.run(f"echo start > containers/{name}/ctl", timeout=120).returncode != 0
    text = daemon.sh(f"cat containers/{name}/error")
    daemon.sh(f"rmdir containers/{name}")
    return text


def test_processes_and_files_have_contexts_of_their_own(daemon: Daemon) -> None:
    loop = "cp /bin/busybox /tmp/busybox && /tmp/busybox true && echo x > /file; echo y > /dev/shm/file; "
    loop += "cat /etc/hosts > /tmp/hosts && echo ready; sleep 600"
    levels = {}
    for name in ("one", "two"):
        make(daemon, name, f"/var/busybox true && {loop}")
        daemon.sh(f"cp /bin/busybox containers/{name}/rootfs/var/busybox")  # before it has a context
        daemon.sh(f"echo start > containers/{name}/ctl", timeout=120)
        daemon.until(f"cat containers/{name}/logs/stdout", "ready", seconds=60)
        pid = int(daemon.sh(f"cat containers/{name}/pid"))
        running = Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0\n")
        assert running.startswith(f"{PROCESS}:")
        levels[name] = running.removeprefix(f"{PROCESS}:")
        assert context(f"/proc/{pid}/root/file") == f"{FILE}:{levels[name]}"
        assert context(f"/proc/{pid}/root/dev/shm/file") == f"{FILE}:{levels[name]}"
        assert context(f"/proc/{pid}/root/etc/hosts") == f"{FILE}:{levels[name]}"
    assert levels["one"] != levels["two"]
    daemon.sh("echo 'run -- cat /proc/self/attr/current' > containers/one/exec/ctl")
    daemon.until("cat containers/one/exec/1/stdout", f"{PROCESS}:{levels['one']}", seconds=60)
    assert "selinux" not in daemon.sh("cat containers/one/changes") and "A /file" in daemon.sh(
        "cat containers/one/changes"
    )
    daemon.kill()
    daemon.start()
    assert daemon.sh("cat containers/one/state") == "running\n"
    daemon.sh("echo kill > containers/one/ctl")
    daemon.until("cat containers/one/state", "stopped", seconds=60)
    assert daemon.sh("cat containers/one/rootfs/file") == "x\n"
    daemon.sh("echo start > containers/one/ctl", timeout=120)
    again = Path(f"/proc/{int(daemon.sh('cat containers/one/pid'))}/attr/current").read_text().rstrip("\0\n")
    assert again == f"{PROCESS}:{levels['one']}"
    for name in ("one", "two"):
        daemon.run(f"echo kill > containers/{name}/ctl")
        daemon.until(f"cat containers/{name}/state", "stopped", seconds=60)
        daemon.sh(f"rmdir containers/{name}")


def test_binds_are_shared_or_private_or_closed(daemon: Daemon, tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "sub").mkdir(parents=True)
    (place / "sub/file").write_text("seen\n")
    (place / "link").symlink_to("/etc/hostname")
    before, hostname = context(place), context("/etc/hostname")
    look = "cat /m/sub/file; touch /m/new && echo written"
    assert "Permission denied" in said(daemon, "closed", look, volumes=[f"{place}:/m"])
    assert context(place) == before
    for name in ("a", "b"):
        assert said(daemon, name, look, volumes=[f"{place}:/m:z"]) == "seen\nwritten\n"
    found = {context(path) for path in (place, place / "sub", place / "sub/file", place / "link")}
    assert found == {FILE} and context("/etc/hostname") == hostname
    assert FILE in daemon.sh(f"ls -Zd {place}")
    assert said(daemon, "then", look, volumes=[f"{place}:/m"]) == "seen\nwritten\n"  # it is shared now

    level = {"security_opt": ["label=level:s0:c7,c8"]}
    assert said(daemon, "own", look, volumes=[f"{place}:/m:Z"], **level) == "seen\nwritten\n"
    assert context(place / "sub/file") == f"{FILE}:c7,c8"
    assert "Permission denied" in said(daemon, "other", look, volumes=[f"{place}:/m"])
    assert said(daemon, "same", look, volumes=[f"{place}:/m"], **level) == "seen\nwritten\n"


def test_volumes_are_open_to_all_containers(daemon: Daemon) -> None:
    look = "mkdir /v/$0.d && echo $0 | tee -a /v/file /v/$0.d/file > /dev/null; cat /v/file /v/*.d/file"
    for name, text in (("v1", "v1\nv1\n"), ("v2", "v1\nv2\nv1\nv2\n")):
        assert said(daemon, name, f"sh -c '{look}' {name}", volumes=["common:/v"]) == text
    data = daemon.store / "volumes/common/data"
    assert {context(data / path) for path in (".", "file", "v1.d", "v2.d/file")} == {FILE}
    daemon.sh("rmdir volumes/common")


def test_what_is_asked_for(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("seen\n")
    now = "cat /proc/self/attr/current"
    options = ["label=type:container_other_t", "label=level:s0:c1,c2"]
    assert said(daemon, "c", now, security_opt=options).rstrip("\0\n") == (
        "system_u:system_r:container_other_t:s0:c1,c2"
    )
    for fields in ({"security_opt": ["label=disable"]}, {"privileged": True}):
        text = said(daemon, "c", f"{now}; echo; cat /m/file", volumes=[f"{tmp_path}:/m"], **fields)
        assert "unconfined_t" in text and "seen" in text
    text = refusal(daemon, "c", security_opt=["label=type:no_such_t"])
    assert re.search(r"label=type:no_such_t: .*no context system_u:system_r:no_such_t:s0:c", text), text
    text = refusal(daemon, "c", security_opt=["label=type:sshd_t"])  # there is one, but not for containers
    assert re.search(r"type:sshd_t: .*no system_u:system_r:sshd_t:\S+ be started from \S+container_file_t", text), text


@pytest.mark.parametrize("option", ["z", "Z"])
def test_the_hosts_own_directories_keep_their_contexts(daemon: Daemon, tmp_path: Path, option: str) -> None:
    (tmp_path / "link").symlink_to("/usr")
    for path in ("/", "/usr", "/home", "/etc", "/root", str(tmp_path / "link"), "/usr/../etc"):
        before = context(os.path.realpath(path))
        text = refusal(daemon, "h", volumes=[f"{path}:/m:{option}"])
        assert "stays its own" in text and f"volumes: {option}: {os.path.realpath(path)} " in text
        assert context(os.path.realpath(path)) == before
    assert context("/usr/bin/bash").split(":")[2] == "shell_exec_t"

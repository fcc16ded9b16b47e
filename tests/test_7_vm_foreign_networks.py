"""A machine of another processor beside one of this host's: networks, mounts, files, limits, terminals. Slow.

`tools/setup slow` fetches what it needs. That one runs at all is in test_7_vm_foreign.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from guestkernel import copy_kernels
from ociimages import busybox_rootfs_tar, make_layout
from runtimebench import SLOW, no_vm, skip_or_fail
from test_7_networks import missing
from test_7_vm_foreign import START, newest
from test_7_vm_networks import OUTSIDE, Fleet, peer
from test_7_vm_transport import PLACE

from engine.runtimes.vm import agentbuild, driver, transport

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
NOTE = "from the host\n"
DUTCHMAN = f"{sys.executable} -m fdfs"
FAR = (
    "trap 'echo bye; exit 6' TERM; echo far > /index.html; peer & httpd -p 80 -h /; uname -m;"
    "while :; do date +%s%N > /now; sleep 0.2; done"
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if reason := no_vm():
        skip_or_fail(reason)
    if shutil.which("qemu-system-aarch64") is None:
        skip_or_fail("needs qemu-system-arm: tools/setup slow gets it")
    agentbuild.build("aarch64", driver.agents())
    place = tmp_path_factory.mktemp("far")
    subprocess.run(["dpkg-deb", "-x", newest("busybox-arm64/*.deb"), place / "deb"], check=True)
    busybox = next(path for path in (place / "deb").rglob("bin/busybox"))
    make_layout(place / "layout", [busybox_rootfs_tar(busybox)], platform="linux/arm64", reference="box:arm")
    path = f"{os.environ['PATH']}:{PLACE}"
    fleet = Fleet(place)
    fleet._env["PATH"] = path
    (fleet.store / "kernels").unlink()  # which all tests share
    copy_kernels(fleet.store)
    with fleet:
        fleet.sh(f"echo 'load {place}/layout' > images/ctl")
        fleet.until("ls images", "box:arm", seconds=60)
        fleet.sh(f"echo 'import {newest('kernels-arm64/*.deb')} arm arch=aarch64' > kernels/ctl")
        fleet.until("ls kernels", "arm", seconds=120)
        peer("aarch64", place / "peer-far")
        (place / "shared").mkdir()
        (place / "shared" / "note").write_text("from the host\n")
        fleet.sh("mkdir networks/front; echo 'create back ipv6=true' > networks/ctl")
        fleet.launch("near", networks=["back"])
        config = {
            "image": "box:arm",
            "memory": "128MiB",
            "cpus": 1,
            "networks": {"front": {}, "back": {"aliases": ["sea"]}},
            "ports": ["8080:80", "9090:81/udp"],
            "volumes": [f"{place}/peer-far:/bin/peer:ro", f"{place}/shared:/shared", "data:/data"],
            "command": ["sh", "-c", FAR],
        }
        (fleet.mount / "containers/far").mkdir()
        (fleet.mount / "containers/far/config.yaml").write_text(json.dumps(config))
        start(fleet)
        yield fleet
        for name in ("near", "far"):
            fleet.gone(name)
        fleet.host("ip link del way")
        fleet.left_nothing()


def start(fleet: Fleet) -> None:
    before = fleet.run("grep -c aarch64 containers/far/logs/stdout").stdout.strip() or "0"
    fleet.run("echo start > containers/far/ctl", timeout=60)
    fleet.until("grep -qx starting containers/far/state || echo over", "over", seconds=START)
    now = fleet.read("containers/far/state")
    assert now == "running", fleet.run("cd containers/far; cat error reason logs/*").stdout
    fleet.until("grep -c aarch64 containers/far/logs/stdout", f"{int(before) + 1}\n", seconds=120)


if SLOW:

    def test_machines_of_two_kinds_find_each_other(fleet: Fleet) -> None:
        _, back, back6 = fleet.read("containers/far/ip").split()
        near, near6 = fleet.read("containers/near/ip").split()
        fleet.knows("near", "sea", back)
        fleet.knows("far", "near", near)
        assert fleet.get("near", back) == "far\n" and fleet.get("near", back6) == "far\n"
        assert fleet.get("far", near) == "near\n" and fleet.get("far", near6) == "near\n"
        assert fleet.fetch("127.0.0.1:8080") == fleet.fetch(f"{OUTSIDE}00:8080") == "far\n"
        assert fleet.sends(f"{OUTSIDE}00", 9090) == "ahoy!\n"
        assert fleet.get("far", OUTSIDE) == f"outside saw ::ffff:{OUTSIDE}00\n"

    def test_it_joins_and_leaves_a_network_while_it_runs(fleet: Fleet) -> None:
        fleet.sh("mkdir networks/side; echo 'connect far alias=other' > networks/side/ctl", timeout=60)
        fleet.sh("echo 'connect near' > networks/side/ctl")
        here = fleet.read("containers/far/ip").split()[3]
        fleet.knows("near", "other", here)
        assert fleet.get("near", here) == "far\n"
        inside = fleet.exec("far", "ip addr show eth2; cat /etc/resolv.conf /etc/hosts")
        assert f"inet {here}/24" in inside and f"\n{here}\t" in inside and inside.count("nameserver") == 4, inside
        fleet.sh("echo 'disconnect far' > networks/side/ctl", timeout=60)
        left = fleet.exec("far", "ip addr show eth2; cat /etc/resolv.conf /etc/hosts")
        assert here not in left and left.count("nameserver") == 3, left

    def test_its_mounts_and_files_are_the_hosts(fleet: Fleet) -> None:
        shared = fleet.store.parent / "shared"
        assert fleet.exec("far", "cat /shared/note; echo back > /shared/answer; chown 5:6 /shared/answer") == NOTE
        assert (shared / "answer").read_text() == "back\n" and (shared / "answer").stat().st_uid == 5
        assert "Read-only file system" in fleet.exec("far", "echo > /bin/peer")
        assert fleet.exec("far", "echo kept > /data/file; ls -A /data") == "file\n"
        assert fleet.read("volumes/data/data/file") == "kept"
        rootfs = fleet.mount / "containers/far/rootfs"
        data = os.urandom(3 << 20)
        (rootfs / "big").write_bytes(data)
        assert (rootfs / "big").read_bytes() == data
        assert fleet.exec("far", "sha256sum /big")[:64] == hashlib.sha256(data).hexdigest()
        (rootfs / "d").mkdir(mode=0o750)
        (rootfs / "d" / "link").symlink_to("../big")
        os.chown(rootfs / "d", 7, 8)
        assert fleet.exec("far", 'stat -c "%a %u %g" /d; readlink /d/link').split() == ["750", "7", "8", "../big"]

    def test_its_limits_pause_and_terminals(fleet: Fleet) -> None:
        fleet.sh("echo pause > containers/far/ctl; grep -qx paused containers/far/state", timeout=60)
        before = fleet.read("containers/far/state")
        fleet.sh("echo resume > containers/far/ctl; grep -qx running containers/far/state", timeout=60)
        assert before == "paused" and fleet.fetch("127.0.0.1:8080") == "far\n"
        fleet.sh("echo 64MiB > containers/far/config/memory; echo 50 > containers/far/config/pids", timeout=60)
        said = fleet.exec("far", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max")
        assert said.split() == [str(64 << 20), "50"], said
        done = fleet.run(f"echo fed | {DUTCHMAN} exec --mount {fleet.mount} -i far sh -c 'cat; exit 4'", timeout=60)
        assert (done.returncode, done.stdout) == (4, "fed\n"), done
        inner = f"{DUTCHMAN} exec --mount {fleet.mount} -it far sh -c 'tty; stty size; exit 5'"
        done = fleet.run(f'script -qec "stty rows 33 cols 77; {inner}" /dev/null < /dev/null', timeout=60)
        assert done.returncode == 5 and "/dev/pts/0\r\n" in done.stdout and "33 77\r\n" in done.stdout, done

    def test_a_killed_daemon_finds_both_again(fleet: Fleet) -> None:
        fleet.kill()
        fleet.unmount()
        assert fleet.fetch("127.0.0.1:8080") == "far\n"
        fleet.start(60)
        assert [fleet.read(f"containers/{name}/state") for name in ("near", "far")] == ["running"] * 2
        assert fleet.exec("far", "cat /shared/note") == NOTE
        fleet.run("echo 'stop 60' > containers/far/ctl", timeout=90)
        fleet.until("cat containers/far/state", "stopped", seconds=120)
        assert fleet.read("containers/far/exit_code") == "6"

    def test_its_agent_is_reached_over_hybrid_vsock(fleet: Fleet) -> None:
        if shutil.which(transport.PROGRAM, path=fleet._env["PATH"]) is None:
            skip_or_fail(f"needs {transport.PROGRAM}: tools/setup slow gets it")
        fleet.sh("echo hybrid > containers/far/config/vm_transport")
        start(fleet)
        assert "transport hybrid" in fleet.read("containers/far/machine")
        assert fleet.exec("far", "cat /shared/note") == NOTE and fleet.fetch("127.0.0.1:8080") == "far\n"
        fleet.kill()
        fleet.unmount()
        fleet.start(60)
        now = fleet.exec("far", "cat /now")
        fleet.until(f"cat containers/far/rootfs/now | grep -v {now.strip()}", "\n", seconds=60)
        fleet.run("echo 'stop 60' > containers/far/ctl", timeout=90)
        fleet.until("cat containers/far/state", "stopped", seconds=120)
        assert fleet.read("containers/far/exit_code") == "6"

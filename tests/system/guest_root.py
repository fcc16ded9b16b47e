"""Root's engine on cgroup v2, with runc and with crun: limits, update, pause, the OOM killer; AppArmor."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from mounting import Daemon

TOP = Path("/sys/fs/cgroup/dutchman")
LOOP = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.2; done"
PROFILE = """
#include <tunables/global>
profile dutchman-systemtest flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  umount,
  signal,
  deny /etc/secret rw,
}
"""


def start(daemon: Daemon, name: str, command: str, **fields: object) -> None:
    config = {"image": "busybox", "command": ["sh", "-c", command], **fields}
    daemon.sh(f"mkdir containers/{name}")
    (daemon.mount / "containers" / name / "config.yaml").write_text(json.dumps(config))
    daemon.sh(f"echo start > containers/{name}/ctl", timeout=60)


def stats(daemon: Daemon, name: str) -> dict[str, int]:
    lines = daemon.sh(f"cat containers/{name}/stats").splitlines()
    return {key: int(value) for key, value in (line.split() for line in lines)}


def end(daemon: Daemon, *names: str) -> None:
    for name in names:
        daemon.run(f"echo kill > containers/{name}/ctl")
        daemon.until(f"cat containers/{name}/state", "stopped", seconds=60)
        daemon.sh(f"rmdir containers/{name}")


def test_limits_figures_update_pause_and_a_killed_daemon(daemon: Daemon) -> None:
    assert "works here (cgroup v2)" in daemon.sh("cat status")
    start(
        daemon,
        "web",
        LOOP,
        memory="64MiB",
        cpus=0.5,
        cpuset="0",
        pids=50,
        memory_reservation="32MiB",
        networks=["none"],
    )
    daemon.until("cat containers/web/logs/stdout", "ready", seconds=60)
    place = TOP / daemon.sh("cat containers/web/id").strip()
    files = {
        "memory.max": 64 << 20,
        "memory.low": 32 << 20,
        "cpu.max": "50000 100000",
        "cpuset.cpus": 0,
        "pids.max": 50,
    }
    assert {name: (place / name).read_text().strip() for name in files} == {
        name: str(text) for name, text in files.items()
    }
    found = stats(daemon, "web")
    assert (found["memory_limit_bytes"], found["cpu_limit_percent"], found["pids_limit"]) == (64 << 20, 50, 50)
    assert found["memory_bytes"] > 0 and found["cpu_usec"] > 0 and found["pids"] >= 2
    web = daemon.mount / "containers/web"
    (web / "config/memory").write_text("96m\n")
    (web / "config/pids").write_text("max\n")
    (web / "config/memory_reservation").write_text("\n")
    assert [(place / name).read_text().strip() for name in ("memory.max", "pids.max", "memory.low")] == [
        str(96 << 20), "max", "0"
    ]  # fmt: skip
    daemon.sh("echo pause > containers/web/ctl")
    assert (place / "cgroup.freeze").read_text() == "1\n"
    daemon.kill()
    daemon.start()
    assert daemon.sh("cat containers/web/state") == "paused\n"
    daemon.sh("echo resume > containers/web/ctl")
    assert (place / "cgroup.freeze").read_text() == "0\n"
    daemon.sh("echo 'run -- cat /proc/self/cgroup' > containers/web/exec/ctl")
    daemon.until("cat containers/web/exec/1/stdout", "0::/", seconds=60)
    end(daemon, "web")
    assert not place.exists()


def test_out_of_memory_is_told(daemon: Daemon) -> None:
    start(daemon, "fat", "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done", memory="16MiB", memory_swap="16MiB")
    daemon.until("cat containers/fat/state", "stopped", seconds=60)
    assert daemon.sh("cat containers/fat/oom containers/fat/exit_code").split() == ["1", "137"]
    end(daemon, "fat")


def test_a_limit_below_what_is_used_is_refused(daemon: Daemon) -> None:
    start(daemon, "full", "dd if=/dev/zero of=/dev/shm/x bs=1M count=40; echo full; sleep 600", memory="80MiB")
    daemon.until("cat containers/full/logs/stdout", "full", seconds=60)
    daemon.run("echo 16m > containers/full/config/memory")  # refused at the close, of which echo does not tell
    daemon.until("cat containers/full/error", "memory", seconds=60)
    assert stats(daemon, "full")["memory_limit_bytes"] == 80 << 20
    assert daemon.sh("cat containers/full/state") == "running\n"
    end(daemon, "full")


def test_an_apparmor_profile_is_applied(daemon: Daemon) -> None:
    subprocess.run(["apparmor_parser", "-r"], input=PROFILE.encode(), check=True, timeout=120)
    script = "cat /proc/self/attr/current; echo x > /etc/secret || echo denied; echo y > /etc/open && echo written"
    start(daemon, "armed", script, security_opt=["apparmor=dutchman-systemtest"])
    daemon.until("cat containers/armed/state", "stopped", seconds=60)
    said = daemon.sh("cat containers/armed/logs/stdout").split("\n")
    assert said[0] == "dutchman-systemtest (enforce)" and said[1:3] == ["denied", "written"]
    start(daemon, "open", "cat /proc/self/attr/current", security_opt=["apparmor=unconfined"])
    daemon.until("cat containers/open/state", "stopped", seconds=60)
    assert "unconfined" in daemon.sh("cat containers/open/logs/stdout")
    daemon.sh("mkdir containers/lost")
    lost = daemon.mount / "containers/lost"
    (lost / "config.yaml").write_text('{"image": "busybox", "security_opt": ["apparmor=no-such-profile"]}')
    daemon.run("echo start > containers/lost/ctl")
    daemon.until("cat containers/lost/error", "no such profile is loaded")
    daemon.sh("rmdir containers/armed containers/open containers/lost")

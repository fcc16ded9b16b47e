"""A container started with everything its spec offers, seen from inside; limits, names and figures while it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dutchman import Dutchman, demo_archive, needs_oci, wait_for

from engine import hostmounts
from engine.runtimes.oci import OciRuntime
from engine.runtimes.resources import Resources

SCRIPT = r"""
echo limits; cat /proc/self/limits
echo status; cat /proc/self/status
echo one; tr '\0' ' ' < /proc/1/cmdline; echo
echo shm; df -k /dev/shm | tail -n 1
echo mounts; cat /proc/mounts
echo sysctl; cat /proc/sys/net/core/somaxconn /proc/sys/kernel/msgmax /proc/sys/kernel/domainname
echo cgroup; cat /proc/self/cgroup
echo oom; cat /proc/self/oom_score_adj
echo device; if true < /dev/readable; then echo usable; fi; (echo x > /dev/readable) 2>&1
echo groups; id -G
echo env; env
(sleep 0.01 & exec sleep 0.05) ; sleep 0.2
echo zombies; grep -l 'State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l
echo ready
trap 'exit 7' USR1
while :; do sleep 0.05; done
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dutchman]:
    needs_oci()
    with Dutchman(tmp_path_factory.mktemp("spec")) as engine:
        engine.up()
        engine.cli("load", str(demo_archive()))
        yield engine


@pytest.fixture(scope="module")
def inside(engine: Dutchman) -> dict[str, list[str]]:
    """What the container `web` says of itself, by section."""
    (engine.home / "one.env").write_text("FROM_FILE=yes\nBOTH=file\n")
    words = (
        "run -d --name web --init --env-file one.env -e BOTH=option --domainname example.org --group-add 4242 "
        "--memory 64m --memory-swap 96m --cpus 0.5 --cpu-shares 512 --cpuset-cpus 0 --pids 60 "
        "--ulimit nofile=1024:2048 --ulimit core=0 --shm-size 8m --oom-score-adj 300 "
        "--device /dev/fuse:/dev/readable:r --security-opt no-new-privileges "
        "--sysctl net.core.somaxconn=77 --sysctl kernel.msgmax=9000 --tmpfs /run:size=1m,mode=700 --tmpfs /x:exec "
        "--storage-opt size=128m --log-opt max-size=2m --log-opt max-file=3 --log-opt max-age=2h "
        "--read-only demo:1 sh -c"
    )
    done = subprocess.run(
        ["dutchman", *words.split(), SCRIPT],
        env=engine.env,
        cwd=engine.home,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    log = engine.mount / "containers" / "web" / "logs" / "stdout"
    text = wait_for(lambda: (read := log.read_text()).endswith("ready\n") and read, 30, "the script to be through")
    sections: dict[str, list[str]] = {}
    names = set(re.findall(r"^echo (\w+);", SCRIPT, re.M))
    current: list[str] = []
    for line in text.splitlines():
        if line in names:
            current = sections.setdefault(line, [])
        else:
            current.append(line)
    return sections


def test_options_of_logs_and_storage(engine: Dutchman, inside: dict[str, list[str]]) -> None:
    config = engine.mount / "containers" / "web" / "config"
    kept = [(config / f"log_max_{name}").read_text().strip() for name in ("size", "total", "age")]
    assert kept == [str(2 << 20), str(6 << 20), "7200"] and inside["oom"]
    assert (config / "disk_size").read_text().strip() == str(128 << 20)
    for option, value, reason in (
        ("--log-opt", "max-files=3", "max-files: not known"),
        ("--log-opt", "max-file=few", "a number of files"),
        ("--storage-opt", "dm.size=1", "there is size=SIZE"),
    ):
        done = engine.cli("create", option, value, "demo:1", code=2)
        assert reason in done.stderr, done.stderr


def test_ulimits(inside: dict[str, list[str]]) -> None:
    limits = {line[:26].strip(): line[26:].split()[:2] for line in inside["limits"]}
    assert limits["Max open files"] == ["1024", "2048"]
    assert limits["Max core file size"] == ["0", "0"]


def test_no_new_privileges_groups_and_oom_score(inside: dict[str, list[str]]) -> None:
    assert "NoNewPrivs:\t1" in inside["status"]
    assert "4242" in inside["groups"][0].split()
    assert inside["oom"] == ["300"]


def test_an_init_is_process_1_and_reaps(inside: dict[str, list[str]]) -> None:
    assert inside["one"][0].startswith("/dev/init -- sh")
    assert inside["zombies"][0] == "0"


def test_tmpfs_and_shm(inside: dict[str, list[str]]) -> None:
    assert inside["shm"][0].split()[1] == "8192"
    options = {line.split()[1]: line.split()[3].split(",") for line in inside["mounts"] if line.split()[2] == "tmpfs"}
    assert {"noexec", "nosuid", "nodev", "size=1024k", "mode=700"} <= set(options["/run"])
    assert "noexec" not in options["/x"] and "nosuid" in options["/x"]


def test_sysctls_and_domain_name(inside: dict[str, list[str]]) -> None:
    assert inside["sysctl"] == ["77", "9000", "example.org"]


def test_devices(inside: dict[str, list[str]]) -> None:
    usable, refused = inside["device"]  # opened for reading, as given, and not for writing
    assert usable == "usable" and "not permitted" in refused


def test_env_files(inside: dict[str, list[str]]) -> None:
    assert {"FROM_FILE=yes", "BOTH=option"} <= set(inside["env"])


def stats(engine: Dutchman, name: str = "web") -> dict[str, int]:
    lines = (engine.mount / "containers" / name / "stats").read_text().splitlines()
    return {key: int(value) for key, value in (line.split() for line in lines)}


def test_limits_are_in_the_cgroup_and_change_while_it_runs(engine: Dutchman, inside: dict[str, list[str]]) -> None:
    found = stats(engine)
    assert (found["memory_limit_bytes"], found["cpu_limit_percent"], found["pids_limit"]) == (64 << 20, 50, 60)
    web = engine.mount / "containers" / "web"
    (web / "config" / "memory_swap").write_text("max\n")
    (web / "config" / "memory").write_text("128m\n")
    (web / "config" / "cpus").write_text("1.5\n")
    found = stats(engine)
    assert (found["memory_limit_bytes"], found["cpu_limit_percent"]) == (128 << 20, 150)
    engine.cli("pause", "web")
    engine.cli("update", "web", "--memory", "96m", "--memory-swap", "200m", "--pids", "max", "--cpuset-cpus", "0")
    engine.cli("unpause", "web")
    found = stats(engine)
    assert found["memory_limit_bytes"] == 96 << 20 and "pids_limit" not in found
    assert (web / "config" / "memory_swap").read_text() == f"{200 << 20}\n"
    changed = [json.loads(line) for line in (web / "events").read_text().splitlines()]
    assert {"memory", "memory_swap", "pids"} <= set(
        next(event for event in reversed(changed) if event["type"] == "containerConfigured")["fields"]
    )


def test_an_update_that_fails_changes_nothing_and_says_why(engine: Dutchman, inside: dict[str, list[str]]) -> None:
    web = engine.mount / "containers" / "web"
    before, config = stats(engine), (web / "config.yaml").read_text()
    for field, value, word in (
        ("memory", "1m", "at least 6 MiB"),
        ("cpuset", "8000", "no CPU 8000"),
        ("memory_swap", "10m", "below memory"),
        ("tmpfs", "/y", "stop it first"),
    ):
        with pytest.raises(OSError, match=r"Invalid|busy"):
            (web / "config" / field).write_text(value)
        assert word in (web / "error").read_text().split("\n\n")[0]
    after = stats(engine)
    limits = ("memory_limit_bytes", "cpu_limit_percent")
    assert [after[key] for key in limits] == [before[key] for key in limits]
    assert (web / "config.yaml").read_text() == config


def test_less_memory_than_is_in_use_is_refused(engine: Dutchman, inside: dict[str, list[str]]) -> None:
    engine.cli("run", "-d", "--name", "fat", "-m", "128m", "--memory-swap", "128m", "demo:1", "sh", "-c",
               "dd if=/dev/zero of=/dev/shm/x bs=1M count=48 2>/dev/null; echo full; sleep 1000")  # fmt: skip
    fat = engine.mount / "containers" / "fat"
    wait_for(lambda: (fat / "logs" / "stdout").read_text() == "full\n", 30, "48 MB to be in use")
    done = engine.cli("update", "fat", "-m", "16m", "--memory-swap", "16m", code=1)
    assert "memory" in done.stderr.lower()
    assert stats(engine, "fat")["memory_limit_bytes"] == 128 << 20
    assert (fat / "config" / "memory").read_text() == f"{128 << 20}\n" and (fat / "state").read_text() == "running\n"
    engine.cli("rm", "-f", "fat")


def test_an_update_that_was_applied_but_not_recorded_is_undone(engine: Dutchman, inside: dict[str, list[str]]) -> None:
    """As when the daemon is killed between the two; what was acknowledged before is kept."""
    web = engine.mount / "containers" / "web"
    (web / "config" / "cpu_shares").write_text("600\n")
    before, config = stats(engine), (web / "config.yaml").read_text()
    id = (web / "id").read_text().strip()
    engine.expect("daemon|killed|orders end")
    engine.kill()
    driver = OciRuntime(engine.store / "containers")
    driver.update(id, Resources(memory=32 << 20, memory_swap=-1, cpus=0.25))
    driver.close()
    engine.up()
    after = stats(engine)
    for key in ("memory_limit_bytes", "cpu_limit_percent"):
        assert after[key] == before[key]
    assert (web / "config.yaml").read_text() == config and "cpu_shares: 600" in config
    assert (web / "state").read_text() == "running\n"


def test_top_stats_and_inspect(engine: Dutchman, inside: dict[str, list[str]]) -> None:
    header, *rows = engine.cli("top", "web").stdout.splitlines()
    assert header.split() == ["PID", "INSIDE", "PARENT", "USER", "STATE", "CPU_SECONDS", "MEMORY_BYTES", "COMMAND"]
    first = rows[0].split(None, 7)
    assert first[0] == (engine.mount / "containers" / "web" / "pid").read_text().strip()
    assert (first[1], first[3]) == ("1", "root") and first[7].startswith("/dev/init -- sh")
    assert any(row.split(None, 7)[7].startswith("sh -c") for row in rows)
    found = stats(engine)
    assert {"cpu_user_usec", "cpu_throttled_usec", "memory_anon_bytes", "io_read_bytes", "oom_kills"} <= set(found)
    assert 0 < found["memory_bytes"] <= found["memory_peak_bytes"] and found["cpu_usec"] > 0 and found["pids"] >= 2
    shown = engine.cli("stats", "web").stdout.splitlines()
    assert shown[0].startswith("NAME") and shown[1].startswith("web") and " %" in shown[1]
    text = engine.cli("inspect", "web").stdout
    assert '\nstate: "running"' in text and "\n  shm_size: 8388608" in text


def test_a_picture_of_the_last_minutes(engine: Dutchman, inside: dict[str, list[str]], tmp_path: Path) -> None:
    picture = engine.mount / "containers" / "web" / "stats.svg"
    text = wait_for(lambda: "polyline" in (svg := picture.read_text()) and svg, 30, "two samples")
    assert 'class="cpu curve"' in text and 'class="memory curve"' in text
    (tmp_path / "stats.svg").write_text(text)
    subprocess.run(["rsvg-convert", "-o", tmp_path / "stats.png", tmp_path / "stats.svg"], check=True, timeout=30)
    assert (tmp_path / "stats.png").stat().st_size > 5000


def test_renamed_by_mv_and_by_ctl_while_it_runs(engine: Dutchman, inside: dict[str, list[str]]) -> None:
    containers = engine.mount / "containers"
    engine.sh("mkdir containers/taken")
    with (containers / "web" / "logs" / "stdout").open() as log, (containers / "web" / "events").open() as events:
        log.read()
        events.read()
        wait_for(lambda: hostmounts.is_mounted(containers / "web" / "rootfs"), what="its root file system to be bound")
        engine.sh("mv -T containers/web containers/page")
        assert not (containers / "web").exists() and (containers / "page" / "state").read_text() == "running\n"
        engine.cli("rename", "page", "site")
        assert (engine.mount / "logs" / "site.log").resolve() == containers / "site" / "logs" / "all.jsonl"
        assert sorted(os.listdir(engine.mount / "logs")) == ["engine.log", "site.log", "taken.log"]
        engine.sh("echo still > containers/site/rootfs/x/y || true; ls containers/site/rootfs/bin/sh")
        assert os.fstat(log.fileno()).st_size > 0
        engine.cli("kill", "-s", "USR1", "site")
        assert engine.cli("wait", "site").stdout == "7\n"
        renamed = [json.loads(line) for line in events if '"containerRenamed"' in line]
        assert [(event["from"], event["name"]) for event in renamed] == [("web", "page"), ("page", "site")]
    wait_for(lambda: not hostmounts.is_mounted(containers / "page" / "rootfs"), what="the old place to be let go")
    for command in ("mv -T containers/site containers/taken", "echo rename taken > containers/site/ctl"):
        assert "File exists" in engine.sh(command, code=1).stderr
    assert "Invalid argument" in engine.sh("echo rename -x > containers/site/ctl", code=1).stderr
    with pytest.raises(OSError, match="Invalid argument"):
        os.rename(containers / "site", containers / "-x")
    engine.sh("mv -T containers/site volumes/x", code=1)
    used = (engine.mount / "images" / "demo:1" / "used_by").read_text()
    assert used == "site\n"
    engine.sh("rmdir containers/site containers/taken")


def test_a_file_that_follows_keeps_to_its_container(engine: Dutchman, inside: dict[str, list[str]]) -> None:
    """Another container that takes the old name is not what an open file reads."""
    containers = engine.mount / "containers"
    engine.cli("run", "-d", "--name", "old", "demo:1", "sh", "-c", "echo mine; sleep 0.3; echo mine too")
    with (containers / "old" / "logs" / "stdout").open() as log:
        engine.cli("rename", "old", "new")
        engine.cli("run", "-d", "--name", "old", "demo:1", "echo", "another's")
        engine.cli("wait", "old", "new")
        read = ""
        deadline = time.monotonic() + 40
        while read.count("\n") < 2 and time.monotonic() < deadline:
            read += log.read()
        assert read == "mine\nmine too\n"
    engine.cli("rm", "old", "new")

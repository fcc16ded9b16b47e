"""Figures of a container from cgroup files and /proc; what is kept of them for pictures, and the pictures."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from engine import processes, stats
from engine.config import ContainerConfig
from engine.fields import RESOURCES
from engine.runtimes import cgroups
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.resources import Resources
from engine.samples import EVERY, SPAN, Samples
from fdfs import chart

ID = "ab" * 32
V2 = {
    "cgroup.procs": "",
    "cpu.max": "150000 100000\n",
    "cpu.stat": "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\nnr_periods 9\nnr_throttled 4\nthrottled_usec 77\n",
    "memory.current": "1000\n",
    "memory.peak": "2000\n",
    "memory.max": "max\n",
    "memory.stat": "anon 600\nfile 300\nkernel 100\nslab_reclaimable 5\n",
    "memory.swap.current": "40\n",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 0\n",
    "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=2\n8:16 rbytes=5 wbytes=7 rios=3 wios=4 dbytes=0 dios=0\n",
    "pids.current": "3\n",
    "pids.max": "50\n",
}
V1 = {
    "memory/memory.usage_in_bytes": "1000\n",
    "memory/memory.max_usage_in_bytes": "2000\n",
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
    "memory/memory.stat": "cache 1\nrss 2\ntotal_cache 300\ntotal_rss 600\ntotal_swap 40\n",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "cpuacct/cpuacct.usage": "5000000\n",
    "cpuacct/cpuacct.usage_user": "3000000\n",
    "cpuacct/cpuacct.usage_sys": "2000000\n",
    "cpu/cpu.stat": "nr_periods 9\nnr_throttled 4\nthrottled_time 77000\n",
    "cpu/cpu.cfs_quota_us": "150000\n",
    "cpu/cpu.cfs_period_us": "100000\n",
    "pids/pids.current": "3\n",
    "pids/pids.max": "50\n",
    "blkio/blkio.throttle.io_service_bytes": "8:0 Read 10\n8:0 Write 20\n8:16 Read 5\n8:16 Write 7\nTotal 42\n",
    "blkio/blkio.throttle.io_serviced": "8:0 Read 1\n8:0 Write 2\n8:16 Read 3\n8:16 Write 4\nTotal 10\n",
}
WANTED = {
    "cpu_usec": 5000, "cpu_user_usec": 3000, "cpu_system_usec": 2000, "cpu_throttled_usec": 77,
    "cpu_throttled_periods": 4, "cpu_limit_percent": 150, "memory_bytes": 1000, "memory_peak_bytes": 2000,
    "memory_anon_bytes": 600, "memory_file_bytes": 300, "swap_bytes": 40, "pids": 3, "pids_limit": 50,
    "io_read_bytes": 15, "io_written_bytes": 27, "io_reads": 4, "io_writes": 6, "oom_kills": 2,
}  # fmt: skip


def record(root: Path, files: dict[str, str], version: int) -> None:
    for name, text in files.items():
        controller, _, file = name.rpartition("/")
        place = root / controller / "dutchman" / ID if version == 1 else root / "dutchman" / ID
        place.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(text)


@pytest.mark.parametrize(("version", "files"), [(1, V1), (2, V2)])
def test_both_versions_of_cgroups_say_the_same(
    version: int, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(stats, "_host", lambda: Cgroups(version, True))
    assert stats.resources(ID) == {} and stats.quick(ID) is None
    record(tmp_path, files, version)
    assert stats.resources(ID) == WANTED
    assert stats.quick(ID) == (5000, 1000)
    limit = {1: "memory/memory.limit_in_bytes", 2: "memory.max"}[version]
    record(tmp_path, {limit: "4096\n"}, version)
    assert stats.resources(ID)["memory_limit_bytes"] == 4096


def test_a_version_2_without_some_controllers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(stats, "_host", lambda: Cgroups(2, False))
    record(tmp_path, {"cpu.stat": "usage_usec 1\nuser_usec 1\nsystem_usec 0\n"}, 2)
    assert stats.resources(ID) == {"cpu_usec": 1, "cpu_user_usec": 1, "cpu_system_usec": 0, "oom_kills": 0}


def test_network_figures() -> None:
    text = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls\n"
        "    lo:  500      5    0    0    0   0        0        0     500     5   0   0   0   0   0   0\n"
        "  eth0: 1000     10    0    0    0   0        0        0    2000    20   0   0   0   0   0   0\n"
        "  eth1:1 1 0 0 0 0 0 0 2 2 0 0 0 0 0 0\n"
    )
    assert stats.network(text.splitlines()) == {
        "network_received_bytes": 1001,
        "network_received_packets": 11,
        "network_sent_bytes": 2002,
        "network_sent_packets": 22,
    }


def test_resources_are_the_fields_of_that_name() -> None:
    assert set(Resources.__dataclass_fields__) == RESOURCES
    config = ContainerConfig(
        memory=1 << 30, memory_swap=-1, memory_reservation=5, cpus=2, cpu_shares=3, cpuset="0", pids=4
    )
    found = Resources.of(config)
    assert all(getattr(found, name) == getattr(config, name) for name in RESOURCES)


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_process_with_an_odd_name() -> None:
    script = "import ctypes,sys; ctypes.CDLL(None).prctl(15, b'a) (b\\nc', 0, 0, 0); print(flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", script, "x\x1b[31my\nz"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None and child.stdout.readline()
        found = processes.process(child.pid)
        assert found is not None
        assert (found.pid, found.parent, found.uid) == (child.pid, os.getpid(), os.geteuid())
        assert found.state in "SR" and found.memory_bytes > 1 << 20 and found.cpu_seconds >= 0
        assert found.command.endswith("x\\x1b[31my\\nz") and found.command.isprintable()
    finally:
        child.communicate()
    assert processes.process(child.pid) is None


# --- samples and pictures --------------------------------------------------------------------------------------------


def test_samples_are_what_lies_between_two_looks() -> None:
    samples, now = Samples(), time.monotonic()
    assert samples.due("a", now)
    samples.add("a", now - 20, 0, 100)
    assert samples.get("a") == []
    samples.add("a", now - 18, 1_000_000, 200)
    assert [(sample.cpu_percent, sample.memory_bytes) for sample in samples.get("a")] == [(50.0, 200)]
    assert not samples.due("a", now - 18 + EVERY / 2)
    samples.add("a", now - 17, 5, 300)  # another run: its counter began anew
    samples.add("a", now, 1_000, 300)  # too long ago to say how it went in between
    assert len(samples.get("a")) == 1
    samples.forget("a")
    assert samples.get("a") == [] and samples.due("a", now)


def test_samples_are_bounded() -> None:
    samples, now = Samples(), time.monotonic()
    for tick in range(1000):
        samples.add("a", now + tick * EVERY, tick * 1000, tick)
    assert len(samples._rings["a"]) == SPAN / EVERY
    samples.add("b", now + 5000, 0, 0)  # long after the last of a
    samples.add("b", now + 5002, 0, 0)
    assert set(samples._rings) == {"b"}


def test_a_chart_is_a_picture_with_breaks_and_limits() -> None:
    points = [(float(at), 40.0 + at % 7, 50 << 20) for at in range(-400, -200, 2)]
    points += [(float(at), 90.0, 60 << 20) for at in range(-100, 0, 2)]
    picture = chart.usage("a<b>&c", "running", points, memory_limit=64 << 20, cpus=1.0)
    root = ElementTree.fromstring(picture)
    lines = root.findall(".//{*}polyline")
    assert [line.get("class") for line in lines] == ["cpu curve"] * 2 + ["memory curve"] * 2
    numbers = [float(part) for line in lines for word in str(line.get("points")).split() for part in word.split(",")]
    assert min(numbers) > 0 and max(numbers) < 960
    assert len(root.findall(".//{*}line[@class='mark']")) == 2
    words = " ".join(text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "a<b>&c" in words and "limit 64.0 MiB" in words and "last 90 %" in words
    assert "the last 10 minutes" in words and "\N{MINUS SIGN}8 min" in words
    empty = chart.usage("none", "stopped", [])
    assert "nothing was seen" in empty and "polyline" not in empty
    single = chart.usage("one", "running", [(-1.0, 0.0, 0)], memory_limit=1 << 40)
    assert "the last minute" in single and "\N{MINUS SIGN}48 s" in single
    assert "circle" in single and "mark" not in single.partition("</style>")[2]


@pytest.mark.parametrize(
    ("value", "binary", "wanted"),
    [
        (0, False, 1),
        (1, False, 1),
        (1.01, False, 2),
        (37, False, 50),
        (99, False, 100),
        (3000, True, 4096),
        (0.3, False, 0.5),
    ],
)
def test_round_numbers_at_the_top(value: float, binary: bool, wanted: float) -> None:
    assert chart.ceiling(value, binary) == pytest.approx(wanted)

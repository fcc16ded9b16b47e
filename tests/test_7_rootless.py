"""An ordinary user's engine: the tour, a killed daemon, what stays closed to others, what is refused and how.

The user is made for the test, with subordinate ids, and removed after it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from dutchman import wait_for
from people import Person, two_people

from engine import host, hostmounts, userids
from engine.errors import AccessDenied
from engine.runtimes import rootless
from engine.runtimes.pids import words

ECHO = """
import socket
echo = socket.socket(type=socket.SOCK_DGRAM)
echo.bind(("", 80))
echo.settimeout(20)
print("up", flush=True)
said, who = echo.recvfrom(9)
echo.sendto(said + b"!", who)
"""


@pytest.fixture(scope="module")
def people() -> Iterator[tuple[Person, Person]]:
    with two_people() as made:
        yield made


def test_the_tour_and_a_killed_daemon_and_nothing_left(people: tuple[Person, Person]) -> None:
    me, other = people
    assert "up at" in me.sh("dutchman up").stdout
    me.sh(f"dutchman load {me.base}/demo.tar")
    status = me.out("cat status")
    assert "runtime oci: runc works here" in status and "in a user namespace" in status
    assert me.out("stat -c %u:%g ctl containers") == f"{me.uid}:{me.gid}\n{me.uid}:{me.gid}"

    # run and logs; ids in the container are the user's subordinate ids, and shown as such
    assert me.sh("dutchman run --name once demo:1 sh -c 'id -u; cat /proc/self/uid_map; exit 7'", code=7).stdout
    assert me.out("head -1 containers/once/logs/stdout") == "0"
    script = "rm -rf /etc/* /srv; mkdir /srv; echo up > /srv/new; mkfifo /f; trap 'exit 3' TERM; echo ready; read x </f"
    me.make("web", json.dumps({"image": "demo:1", "command": ["sh", "-c", script]}))
    me.out("echo start > containers/web/ctl")
    wait_for(lambda: "ready" in me.out("cat containers/web/logs/stdout"), 30, "the container says that it is ready")
    assert me.sh("echo fed | dutchman exec -i -u 1000 web sh -c 'id -u; cat; exit 4'", code=4).stdout == "1000\nfed\n"
    changes = me.out("cat containers/web/changes")
    assert "D /etc/group" in changes and "A /srv/new" in changes, changes

    # files of the container are readable and writable by its user, whatever id owns them
    assert me.out("echo ahoy > containers/web/rootfs/tmp/x; cat containers/web/rootfs/tmp/x") == "ahoy"
    assert me.out("stat -c %u:%g containers/web/rootfs/tmp/x") == f"{me.uid}:{me.gid}"
    me.out(f"chown {me.first + 999} containers/web/rootfs/tmp/x")
    assert me.out("stat -c %u containers/web/rootfs/tmp/x") == str(me.first + 999)
    assert "not permitted" in me.sh(f"chown 5 {me.mount}/containers/web/rootfs/tmp/x", code=1).stderr
    me.make("low", '{"image": "demo:1", "user": "1000:1000", "command": ["sh", "-c", "id -u > /tmp/mine"]}')
    me.out("echo start > containers/low/ctl")
    me.await_state("low", "stopped")
    assert me.out("cat containers/low/rootfs/tmp/mine; stat -c %u containers/low/rootfs/tmp/mine") == (
        f"1000\n{me.first + 999}"
    )

    # the host's network and processes
    me.make("host", '{"image": "demo:1", "networks": ["host"], "pid": "host", "command": ["cat", "/proc/1/comm"]}')
    me.out("echo start > containers/host/ctl")
    me.await_state("host", "stopped")
    assert me.out("cat containers/host/logs/stdout") == Path("/proc/1/comm").read_text().strip()

    # what an ordinary user cannot have is refused by name
    me.make("limited", '{"image": "demo:1", "memory": "64MiB", "command": ["true"]}')
    me.sh(f"echo start > {me.mount}/containers/limited/ctl", code=None)
    wait_for(lambda: "memory: an engine without root" in me.out("cat containers/limited/error"), 20, "memory is named")
    me.make("mapped", '{"image": "demo:1", "user": "1000", "volumes": ["v:/v:idmap"], "command": ["true"]}')
    me.sh(f"echo start > {me.mount}/containers/mapped/ctl", code=None)
    wait_for(lambda: "volume v: its owners cannot be mapped" in me.out("cat containers/mapped/error"), 20, "idmap is")
    me.sh(f"echo pause > {me.mount}/containers/web/ctl", code=1)
    assert "pause: an engine without root" in me.out("cat containers/web/error")

    # without cgroups its figures are those of its processes, a session's too
    me.sh("dutchman exec -d web sleep 1000")
    rows = [row.split(None, 7) for row in me.out("cat containers/web/top").splitlines()[1:]]
    assert {"sleep 1000"} < {row[7] for row in rows} and rows[0][1] == "1", rows
    found = dict(line.split() for line in me.out("cat containers/web/stats").splitlines())
    assert int(found["pids"]) == len(rows) and 0 < int(found["memory_anon_bytes"]) < int(found["memory_bytes"])
    assert {"cpu_usec", "io_written_bytes", "network_sent_bytes"} < set(found) and "oom_kills" not in found

    # closed to others: the mount, the store, the sockets; root may not look into the mount either
    for path in (me.mount, me.store, me.runtime):
        assert "Permission denied" in other.sh(f"ls {path}", code=2).stderr
    with pytest.raises(PermissionError):
        os.listdir(me.mount)
    more = "--store ~/s --mount ~/m"
    done = me.sh(f"grep -qx user_allow_other /etc/fuse.conf || dutchman up --allow-other {more}", code=None)
    assert done.returncode == 0 or ("user_allow_other" in done.stderr and not (me.home / "m").exists())

    # the daemon is killed: its mount is taken away, the container goes on and is taken up again
    pid = int(re.findall(r"^pid (\d+)$", me.out("cat status"), re.M)[0])
    process = int(me.out("cat containers/web/pid"))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not hostmounts.is_mounted(me.mount), what="the dead mount is gone")
    me.sh("dutchman up")
    assert me.out("cat containers/web/state containers/web/pid").split() == ["running", str(process)]
    assert me.out("cat containers/web/rootfs/srv/new") == "up"
    me.sh("dutchman stop web")
    assert me.out("cat containers/web/state containers/web/exit_code").split() == ["stopped", "3"]

    # files of other ids can be removed with it, and nothing is left behind
    me.sh("dutchman rm web low once host limited mapped")
    assert not list((me.store / "run/trees").iterdir())
    me.sh("dutchman down")
    wait_for(lambda: not me.processes(), what="everything has ended")
    assert not [point for point, _, _ in hostmounts.mounts() if f"{point}/".startswith(f"{me.home}/")]
    assert not (me.runtime / "holder").exists()
    alarms = [line for line in (me.store / "engine.log").read_text().splitlines() if " INFO " not in line]
    assert not alarms, alarms
    assert "uid=0" in me.sh("dutchman unshare id").stdout


@pytest.fixture
def disk(people: tuple[Person, Person]) -> Iterator[Path]:
    """Something of root's that is mounted, in the way disks of machines are."""
    place = people[0].base / "theirs"
    (place / "disk").mkdir(parents=True)
    hostmounts.bind(place, place)
    hostmounts.mount("none", place, "none", hostmounts.MS_SHARED)
    hostmounts.mount("tmpfs", place / "disk", "tmpfs", 0)
    yield place / "disk"
    for point in (place / "disk", place):
        hostmounts.unmount(point)


def test_containers_have_networks_names_and_published_ports(people: tuple[Person, Person], disk: Path) -> None:
    me, _ = people
    me.sh("dutchman up")
    me.sh(f"dutchman load {me.base}/demo.tar")
    assert "networks netavark" in me.out("cat status")
    with socket.socket() as probe:  # a port nobody has
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = "mkdir /w; echo ahoy > /w/index.html; trap 'exit 0' TERM; httpd -f -p 80 -h /w & wait"
    me.make(
        "web",
        json.dumps(
            {"image": "demo:1", "ports": [f"127.0.0.1:{port}:80", f"{port}:80/udp"], "command": ["sh", "-c", web]}
            | {"networks": ["side", "dutchman"]}
        ),
    )
    me.out("mkdir networks/side && echo start > containers/web/ctl")

    def page() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    wait_for(lambda: page() == "ahoy\n", 20, "the published port answers")
    assert any(b"aardvark-dns" in b" ".join(words(pid)) for pid in me.processes())
    hostmounts.unmount(disk)
    for pid in me.processes():  # nobody keeps it: its machine could not have it
        with suppress(OSError):  # it has just ended
            assert f" {disk} " not in Path(f"/proc/{pid}/mountinfo").read_text(), words(pid)
    inside = me.sh("dutchman run --rm --name ask demo:1 sh -c 'nslookup web; wget -qO- http://web/'", code=None)
    assert "ahoy" in inside.stdout, inside
    me.out("echo disconnect web > networks/side/ctl")  # its ports stay published by the other
    assert page() == "ahoy\n" and len(me.out("cat containers/web/ports").splitlines()) == 2
    # a datagram from the host's own loopback is answered; nobody inside begins to talk to what listens there
    with (
        subprocess.Popen(
            ["nsenter", "-t", me.out("cat containers/web/pid"), "-n", sys.executable, "-c", ECHO],
            stdout=subprocess.PIPE,
        ) as echo,
        socket.socket(type=socket.SOCK_DGRAM) as asking,
        socket.create_server(("127.0.0.1", 0)) as kept,
    ):
        assert echo.stdout is not None and echo.stdout.readline() == b"up\n"
        asking.settimeout(20)
        asking.sendto(b"ahoy", ("127.0.0.1", port))
        assert asking.recv(9) == b"ahoy!"
        kept.settimeout(0)
        for address in ("10.0.2.2", "10.0.2.77"):
            me.sh(f"dutchman exec web sh -c 'nc -w 2 {address} {kept.getsockname()[1]} < /dev/null'", code=1)
        with pytest.raises(BlockingIOError):
            kept.accept()
    pid = int(re.findall(r"^pid (\d+)$", me.out("cat status"), re.M)[0])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not hostmounts.is_mounted(me.mount), what="the dead mount is gone")
    assert page() == "ahoy\n", "what runs keeps its network without a daemon"
    me.sh("dutchman up")
    me.sh("dutchman stop web")
    wait_for(lambda: not page(), what="the port is closed")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
    me.make("low", json.dumps({"image": "demo:1", "ports": ["80:80"], "command": ["true"]}))
    if rootless.first_port() > 80:
        me.sh(f"echo start > {me.mount}/containers/low/ctl", code=None)
        wait_for(lambda: "port 80" in me.out("cat containers/low/error"), 20, "the port is named")
    me.sh("dutchman rm web low && dutchman network rm side")
    me.sh("dutchman down")
    wait_for(lambda: not me.processes(), what="everything has ended")


def test_doctor_says_what_an_ordinary_user_has_and_lacks(people: tuple[Person, Person]) -> None:
    me, _ = people
    said = me.sh("dutchman doctor").stdout
    assert re.search(r"^ok +without root +.*65536 subordinate ids", said, re.M), said
    assert re.search(r"^ok +runtime oci +runc works here", said, re.M), said
    assert re.search(r"^no +limits .*memory", said, re.M), said
    subprocess.run(["usermod", "--del-subuids", f"{me.first}-{me.first + 65535}", me.name], check=True, timeout=30)
    try:
        said = me.sh("dutchman doctor", code=1).stdout
        assert re.search(rf"^no +/etc/subuid +/etc/subuid has no ids for {me.name}$", said, re.M), said
        assert "usermod --add-subuids" in said
    finally:
        subprocess.run(["usermod", "--add-subuids", f"{me.first}-{me.first + 65535}", me.name], check=True, timeout=30)


def test_a_runtime_directory_somebody_else_made_is_not_used(people: tuple[Person, Person]) -> None:
    me, other = people
    host.remove_tree(me.runtime)
    other.sh(f"mkdir -m 777 {me.runtime}")
    try:
        done = me.sh("dutchman up", code=1)
        assert "is not a directory of yours alone" in done.stderr and "XDG_RUNTIME_DIR" in done.stderr
        assert not list(me.runtime.iterdir())
    finally:
        host.remove_tree(me.runtime)
    assert not hostmounts.is_mounted(me.mount) and not me.processes()


def test_a_private_directory_is_ours_alone(tmp_path: Path) -> None:
    made = rootless.private_directory(tmp_path / "made")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.chmod(0o750)
    with pytest.raises(AccessDenied):
        rootless.private_directory(made)
    (tmp_path / "link").symlink_to(tmp_path / "made")
    made.chmod(0o700)
    with pytest.raises(AccessDenied):
        rootless.private_directory(tmp_path / "link")


def test_subordinate_ids_are_read_by_name_and_number(tmp_path: Path) -> None:
    table = tmp_path / "subuid"
    table.write_text("# ids\nann:100:5\nbob:200:7\n1000:300:9\nann:400:1\nbad\nann:x:3\nann:500:0\n")
    assert rootless.subordinate(table, 1000, "ann") == [(100, 5), (300, 9), (400, 1)]
    assert rootless.subordinate(table, 7, "carl") == []
    assert rootless.subordinate(tmp_path / "none", 7, "carl") == []


def test_ids_are_translated_both_ways() -> None:
    ranges = ((0, 1000, 1), (1, 100000, 65536))
    for inside, outside in ((0, 1000), (1, 100000), (33, 100032), (65536, 165535)):
        assert userids.outward(inside, ranges) == outside
        assert userids.inward(outside, ranges) == inside
    assert userids.outward(65537, ranges) == userids.NOBODY
    assert userids.inward(-1, ranges) == -1
    for foreign in (0, 33, 999, 1001, 165536):
        with pytest.raises(PermissionError):
            userids.inward(foreign, ranges)

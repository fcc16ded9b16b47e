"""A container on a host that takes itself to be macOS: all above QEMU as it is there. With DUTCHMAN_SLOW_TESTS=1.

What is real: engine, store, monitor, owner, QEMU and guest. What is pretended: the platform, in the daemon's process.
So there are no mounts, no namespaces, no conmon; and no HVF, which QEMU of Linux refuses, as a Mac without it would.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path

from guestkernel import copy_kernels
from macos import REAL, ROOT, on_macos
from runtimebench import SLOW, no_vm, skip_or_fail

STORY = r"""
import socket, sys, time, urllib.request
from pathlib import Path
sys.path.insert(0, "tests")
from engines import add_busybox, eventually, reach
from engine.commit import commit
from engine.config import ContainerConfig
from engine.engine import Engine
from engine.errors import EngineError, Unsupported
from engine.lifecycle import State

store, shared, port = Path(os.environ["STORE"]), Path(os.environ["SHARED"]), os.environ["PORT"]
assert host.MACOS
with Engine(store) as engine:
    status = engine.status()
    assert status["runtime"].startswith("vm: tcg"), status
    assert status["networks"].startswith("QEMU's own"), status
    add_busybox(engine)
    box = engine.containers
    script = (
        "id -un; cat /in/word; echo back > /in/answer; cat /etc/hostname;"
        "ip -4 addr show eth0 | grep -o 'inet [0-9.]*';"
        "touch /ro/x 2>/dev/null || echo read-only; ulimit -n; trap 'echo usr1; exit 5' USR1;"
        "mkdir -p /www; echo served > /www/index.html; httpd -f -p 80 -h /www & while :; do sleep 0.1; done"
    )
    box.create("web", ContainerConfig.model_validate({
        "image": "busybox", "command": ["sh", "-c", script], "ports": [f"127.0.0.1:{port}:80"], "hostname": "mac",
        "ulimits": {"nofile": "777"},
        "volumes": [f"{shared}:/in", f"{shared}:/ro:ro", "data:/etc"],
    }))
    box.start("web")
    reach(engine, "web", State.RUNNING, seconds=120)
    web = box.get("web")
    log = lambda: box.logs("web").read("stdout", 0, 1 << 20).decode().split("\n")
    eventually(lambda: len(log()) > 6, 60)
    address = engine.connections.endpoints.addresses(web.id)[0].address
    assert log()[:6] == ["root", "from the host", "mac", f"inet {address}", "read-only", "777"], log()
    assert (shared / "answer").read_text() == "back\n"
    assert (store / "volumes/data/data/passwd").read_bytes().startswith(b"root:x:0:0")  # the image's
    answer = eventually(lambda: _get(port), 60)
    assert answer == b"served\n", answer
    files = engine.guests.files(web)
    assert files is not None and files.stat("container", b"www/index.html").size == 7
    number = box.sessions.run("web", ["sh", "-c", "cat; exit 4"], stdin=True).number
    box.sessions.send("web", number, b"typed\n")
    box.sessions.end_input("web", number)
    assert box.sessions.wait("web", number, 60).exit_code == 4
    assert box.sessions.logs("web", number).read("stdout", 0, 100) == b"typed\n"
    assert eventually(lambda: box.stats("web"), 30)
    assert any(process.command.startswith("httpd") for process, _ in box.processes("web")), box.processes("web")
    box.pause("web")
    reach(engine, "web", State.PAUSED)
    box.resume("web")
    reach(engine, "web", State.RUNNING)
    box.configure("web", box.get("web").config.model_copy(update={"pids": 50, "memory": 200 << 20}))
    try:
        box.configure("web", box.get("web").config.model_copy(update={"cpuset": "0"}))
    except Unsupported as error:
        assert error.at == "cpuset"
    else:
        raise AssertionError("nothing is tied to processors there")
    save = lambda task: commit(box, engine.images, engine.trees, "web", "made:1", task).digest
    assert engine.jobs.wait(engine.jobs.start("commit web made:1", save)).state.value == "done"
    made = engine.images.resolve("made:1")
    tree = engine.trees.open(made.chain_id)
    assert tree.stat(tree.lookup(b"www/index.html")).size == 7
    pid = web.pid
# another daemon finds it
with Engine(store) as engine:
    box = engine.containers
    assert box.get("web").state is State.RUNNING and box.get("web").pid == pid
    box.kill("web", "USR1")
    ended = reach(engine, "web", State.STOPPED, seconds=60)
    assert ended.exit_code == 5, ended
    log = lambda: box.logs("web").read("stdout", 0, 1 << 20).decode()
    eventually(lambda: log().endswith("usr1\n"), 30)
    for look in (lambda: list(box.changes("web")), lambda: box.rootfs("web")):
        try:
            look()
        except Unsupported as error:
            assert "start it" in (error.hint or ""), error
        else:
            raise AssertionError("a stopped machine's disk cannot be shown here")
    box.start("web")  # with what it wrote
    reach(engine, "web", State.RUNNING, seconds=120)
    assert ("A", b"/www/index.html") in list(box.changes("web"))
    box.stop("web", 0)
    reach(engine, "web", State.STOPPED, seconds=60)
    box.remove("web")
print("right")
"""
HELP = r"""
def _get(port):
    import urllib.request
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20).read()
    except OSError:
        return b""
"""


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


if SLOW:

    def test_a_container_lives_on_a_host_without_mounts(tmp_path: Path) -> None:
        if (why := no_vm()) is not None:
            skip_or_fail(why)
        store, shared = tmp_path / "Application Support" / "store", tmp_path / "shared"
        store.mkdir(parents=True)
        shared.mkdir()
        (shared / "word").write_text("from the host\n")
        copy_kernels(store)
        try:
            with tempfile.TemporaryDirectory(prefix="dm-") as sockets:  # as short as a home: pytest's may be too long
                said = on_macos(
                    REAL + HELP + STORY,
                    STORE=str(store),
                    SHARED=str(shared),
                    PORT=str(free_port()),
                    XDG_RUNTIME_DIR=sockets,
                    DUTCHMAN_DEFAULT_NETWORK="dutchman",
                )
        finally:
            for left in store.glob("containers/*/run/pid"):  # its monitor and its QEMU end with it
                os.kill(int(left.read_text()), signal.SIGKILL)
        assert said.endswith("right\n")


def test_the_story_is_python() -> None:
    compile(REAL + HELP + STORY, str(ROOT), "exec")

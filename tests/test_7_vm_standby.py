"""`kill -9` of the daemon while a machine that stood by is taken over, through the mount: nothing is left of that, and
the container starts again."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from guestkernel import copy_kernels
from mounting import can_mount
from runtimebench import SLOW, no_vm, skip_or_fail
from test_7_networks import missing
from test_7_vm_killed import DRIVER, LIFE, START_VERB, Killed, nothing

STANDBYS, STANDBY = "engine.runtimes.vm.standbys:Standbys", "engine.runtimes.vm.standby"
POINTS = {  # where it dies, and the state the next one comes to
    "engaged": (f"after {STANDBY}:engage", "stopped"),
    "set-up-asked": (f"after {STANDBY}:set_up", "stopped"),
    "noted": (f"after {DRIVER}._ready", "stopped"),
    "taken": (f"after {DRIVER}.create", "stopped"),
    "left": (f"after {STANDBYS}.left", "stopped"),
    "started": (f"after {DRIVER}.start", "running"),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    if (why := missing() or can_mount() or no_vm()) is not None:
        skip_or_fail(why)
    daemon = Killed(tmp_path_factory.mktemp("standby"), runtime="vm")
    daemon._env["DUTCHMAN_STANDBY"] = "1"
    copy_kernels(daemon.store)
    daemon.again()
    yield daemon
    daemon.stop()


def standing(daemon: Killed) -> None:
    """A machine stands by for the container `c`: starting it has one made."""
    daemon.machine("start", "running")
    daemon.waits("grep -q '^standbys 1: .*held=' status")
    daemon.machine("kill", "stopped")


if SLOW:

    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("point", POINTS)
    def test_killed_while_it_is_taken_over(daemon: Killed, point: str) -> None:
        where, state = POINTS[point]
        (daemon.mount / "containers" / "c").mkdir()
        config = {"image": "busybox", "memory": "64m", "command": ["sh", "-c", LIFE]}
        (daemon.mount / "containers" / "c" / "config.yaml").write_text(json.dumps(config))
        id = daemon.read("containers/c/id")
        if not list(daemon.store.glob("kernels/*/templates/[0-9a-f]*/template.json")):
            daemon.machine("start", "running")
            daemon.waits("grep -q '^templates 1' status")
            daemon.machine("kill", "stopped")
        standing(daemon)
        daemon.die_at(where)
        daemon.run(START_VERB, timeout=120)
        daemon.await_death()
        daemon.again()
        daemon.waits(f"grep -qx {state} containers/c/state")
        if state == "stopped":
            nothing(lambda: [found for found in daemon.stays() if "/containers/" not in found])
            daemon.machine("start", "running")
        daemon.lives()
        daemon.machine("kill", "stopped")
        daemon.sh("rmdir containers/c", timeout=60)
        daemon.kill()  # and what stands by with it
        daemon.again()
        nothing(daemon.stays)
        nothing(lambda: daemon.kept(id))
        daemon.left_nothing()
        assert "Traceback" not in daemon.log(), daemon.log()[-5000:]

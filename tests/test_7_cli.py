"""The `dutchman` command against a real daemon and a real mount: what it prints, its exit codes, its errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dutchman import ROOT, Dutchman, demo_archive, needs_oci, wait_for

from engine import hostmounts
from fdfs.cli import COMMANDS
from fdfs.cli_mount import explain, tail_offset
from fdfs.cli_mounts import long_mount


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dutchman]:
    needs_oci()
    with Dutchman(tmp_path_factory.mktemp("cli")) as engine:
        engine.up()
        loaded = engine.cli("load", str(demo_archive()))
        assert loaded.stdout.split() == ["demo:1", "demo:2"]
        yield engine


@pytest.fixture
def down(tmp_path: Path) -> Iterator[Dutchman]:
    """One that is not up yet."""
    needs_oci()
    with Dutchman(tmp_path, runtime="fake") as engine:
        yield engine


# --- without a daemon -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["ps"], ["images"], ["logs", "web"], ["run", "demo:1"], ["pull", "x"], ["stop", "web"]]
)
def test_without_a_daemon_it_says_how_to_start_it(down: Dutchman, words: list[str]) -> None:
    done = down.cli(*words, code=1)
    assert "nothing is mounted" in done.stderr and "dutchman up" in done.stderr


def test_status_has_an_exit_code_of_its_own_when_down(down: Dutchman) -> None:
    assert "dutchman up" in down.cli("status", code=3).stderr
    assert down.cli("down").stdout == "not up\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(down: Dutchman, command: str) -> None:
    shown = down.cli(command, "--help").stdout
    assert shown.startswith("Usage: dutchman") and len(shown.splitlines()) > 4


def test_bad_usage_is_exit_code_2(down: Dutchman) -> None:
    assert "No such command" in down.cli("frobnicate", code=2).stderr
    assert "Missing argument" in down.cli("logs", code=2).stderr
    assert "No such option" in down.cli("ps", "--colour", code=2).stderr


def test_commands_start_without_the_engine() -> None:
    """Half the start-up time would be libraries only the daemon needs."""
    code = "import sys, fdfs.cli, fdfs.cli_containers, fdfs.cli_images; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    heavy = [name for name in loaded if name.split(".")[0] in ("engine", "pydantic", "yaml", "rich", "httpx", "ctypes")]
    assert not heavy


def test_doctor_finds_what_the_tests_need(down: Dutchman) -> None:
    done = down.cli("doctor")
    assert "everything needed is here" in done.stdout
    for name in ("python", "libfuse 2", "runc", "conmon", "cgroups"):
        assert f"ok    {name} " in done.stdout


def test_newest_failure_is_told_with_its_place() -> None:
    entry = "2026-01-31T12:00:00Z EINVAL\n    stopp 10\n    ^^^^^\nunknown verb\nhint: stop\n\nolder EBUSY\nno\n"
    assert explain(entry) == ("unknown verb", ("    stopp 10", "    ^^^^^", "hint: stop"))


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("lines", [0, 1, 2, 5, 6, 7])
def test_tail_finds_the_last_lines(tmp_path: Path, ending: str, lines: int) -> None:
    path = tmp_path / "log"
    written = [f"line {n}" * (1 + n * 9000) for n in range(6)]
    path.write_text("\n".join(written) + ending)
    kept = path.read_text()[tail_offset(path, lines) :].splitlines()
    assert kept == written[6 - lines if lines < 6 else 0 :]


# --- up and down ----------------------------------------------------------------------------------------------------


def test_up_twice_says_so(engine: Dutchman) -> None:
    assert f"already up at {engine.mount}" in engine.cli("up").stdout


def test_a_second_daemon_on_the_store_is_refused_and_says_who_holds_it(engine: Dutchman, tmp_path: Path) -> None:
    done = engine.cli("up", "--mount", str(tmp_path / "other"), code=1)
    assert str(engine.pid) in done.stderr and str(engine.mount) in done.stderr
    command = [sys.executable, "-m", "fdfs.daemon", "--store", str(engine.store), "--mount", str(tmp_path / "other")]
    direct = subprocess.run([*command, "--runtime", "fake"], capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert direct.returncode != 0
    assert str(engine.pid) in direct.stderr + direct.stdout


def test_a_taken_mount_point_is_refused(engine: Dutchman, tmp_path: Path) -> None:
    done = engine.cli("up", "--store", str(tmp_path / "store"), "--mount", str(engine.mount), code=1)
    assert "something else is mounted" in done.stderr
    assert engine.read("version")


def test_up_reports_why_it_cannot_start(down: Dutchman, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in down.cli("up", "--mount", str(tmp_path / "file"), code=1).stderr
    assert "file" in down.cli("up", "--store", str(tmp_path / "file"), code=1).stderr


def test_up_in_the_foreground_serves_until_it_is_told_to_end(down: Dutchman) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fdfs", "up", "--foreground", "--runtime", "fake"], env=down.env, cwd=ROOT
    )
    try:
        wait_for(lambda: (down.mount / "version").exists(), what="mounted")
        assert down.pid == process.pid
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)
        assert not hostmounts.is_mounted(down.mount)
    finally:
        process.kill()
        process.wait()


def test_a_mount_left_by_a_killed_daemon_is_recovered(down: Dutchman) -> None:
    down.up()
    down.kill()
    assert "dutchman up" in down.cli("ps", code=1).stderr
    down.up()
    assert down.read("version")
    down.kill()
    assert "killed daemon" in down.cli("down").stdout
    assert not hostmounts.is_mounted(down.mount)


def test_the_daemon_is_found_by_its_mount_alone_or_its_store_alone(down: Dutchman, tmp_path: Path) -> None:
    down.up()
    settings = {key: value for key, value in down.env.items() if key != "DUTCHMAN_STORE"}
    down.env["DUTCHMAN_STORE"] = str(tmp_path / "unused")
    assert f"store {down.store}\n" in down.cli("status").stdout
    assert "no daemon has" in down.cli("status", "--store", str(tmp_path / "unused"), code=3).stderr
    down.env = settings | {"DUTCHMAN_STORE": str(down.store), "DUTCHMAN_MOUNT": str(tmp_path / "elsewhere")}
    told = down.cli("down")
    assert told.stdout == "not up\n" and str(down.mount) in told.stderr, "not the one that was meant"
    assert down.read("version")
    down.env = settings | {"DUTCHMAN_STORE": str(tmp_path / "unused"), "DUTCHMAN_MOUNT": str(down.mount)}
    assert down.cli("down").stdout == f"down: {down.mount} is unmounted\n"
    assert not hostmounts.is_mounted(down.mount)
    down.env = settings | {"DUTCHMAN_STORE": str(down.store)}


def test_down_keeps_containers_and_up_takes_them_up_again(tmp_path: Path) -> None:
    needs_oci()
    with Dutchman(tmp_path) as engine:
        engine.up()
        engine.cli("load", str(demo_archive()))
        engine.cli("run", "-d", "--name", "demo", "demo:1")
        pid = engine.read("containers/demo/pid")
        told = engine.cli("down").stdout
        assert "1 still running: demo" in told and "--stop-containers" in told
        assert os.path.exists(f"/proc/{int(pid)}") and not hostmounts.is_mounted(engine.mount)
        engine.up()
        assert engine.state("demo") == "running" and engine.read("containers/demo/pid") == pid
        engine.cli("down", "--stop-containers")
        assert not os.path.exists(f"/proc/{int(pid)}")


# --- containers -----------------------------------------------------------------------------------------------------


def test_run_passes_on_output_byte_for_byte_and_the_exit_code(engine: Dutchman) -> None:
    script = r"printf 'out\0\377no newline'; printf err >&2; exit 7"
    command = [sys.executable, "-m", "fdfs", "run", "--rm", "demo:1", "--", "sh", "-c", script]
    done = subprocess.run(command, env=engine.env, cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout == b"out\0\377no newline"
    assert done.stderr == b"err"
    assert done.returncode == 7
    assert not engine.cli("ps", "-a", "-q").stdout


def test_run_sets_what_it_is_told(engine: Dutchman, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "given").write_text("from the host\n")
    options = ["--rm", "-e", "A=1 2", "-v", f"{tmp_path}:/given:ro", "-w", "/srv", "--hostname", "ship", "-u", "nobody"]
    script = "echo $A; cat /given/given; pwd; hostname; id -u; touch /given/x 2>/dev/null || echo read-only"
    done = engine.cli("run", *options, "demo:1", "sh", "-c", script)
    assert done.stdout.splitlines() == ["1 2", "from the host", "/srv", "ship", "65534", "read-only"]


def test_arguments_reach_the_program_as_they_are(engine: Dutchman) -> None:
    words = ["a b", "", "'", '"', "$HOME", "*", "ä€", "--name", "\\", "x\ny"]
    done = engine.cli("run", "--rm", "demo:1", "--", "printf", "[%s]", *words)
    assert done.stdout == "".join(f"[{word}]" for word in words)


def test_ctrl_c_stops_the_container(engine: Dutchman) -> None:
    command = [sys.executable, "-m", "fdfs", "run", "--name", "ctrl-c", "demo:1"]
    process = subprocess.Popen(command, env=engine.env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "hello from" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert "asked to stop, bye" in rest
        assert process.wait(20) == 0
        assert engine.state("ctrl-c") == "stopped"
    finally:
        process.kill()
        process.wait()
    engine.cli("rm", "ctrl-c")


def test_a_container_from_run_to_rm(engine: Dutchman) -> None:
    assert engine.cli("run", "-d", "--name", "life", "demo:1").stdout == "life\n"
    assert "running" in engine.cli("ps").stdout
    wait_for(lambda: "tick 1" in engine.cli("logs", "life").stdout, what="first line")
    assert engine.cli("logs", "-n", "1", "--stdout", "life").stdout.startswith(("tick", "demo"))
    stamped = engine.cli("logs", "-t", "life").stdout.splitlines()[0]
    assert stamped[4] == "-" and "hello from" in stamped
    busy = engine.cli("start", "life", code=1)
    assert "running" in busy.stderr
    refused = engine.cli("rm", "life", code=1)
    assert "running" in refused.stderr
    assert "taken" in engine.cli("run", "-d", "--name", "life", "demo:1", code=1).stderr
    engine.cli("stop", "life")
    assert "stopped (0)" in engine.cli("ps", "-a").stdout and "life" not in engine.cli("ps").stdout
    assert "bye" in engine.cli("logs", "-f", "life").stdout
    assert "stopped" in engine.cli("stop", "life", code=1).stderr
    engine.cli("start", "life")
    engine.cli("rm", "-f", "life")
    assert "no container 'life'" in engine.cli("logs", "life", code=1).stderr


def test_stop_restart_and_forced_removal_wait_for_a_container_that_ignores_its_signal(engine: Dutchman) -> None:
    """Each takes longer than its verb waits (a second), and what comes next finds it done."""
    engine.make("deaf", "trap '' TERM; while :; do sleep 0.1; done")
    engine.cli("start", "deaf")
    engine.cli("stop", "-t", "2", "deaf")
    assert engine.sh("cat containers/deaf/state").stdout == "stopped\n"
    engine.cli("start", "deaf")
    engine.cli("restart", "-t", "2", "deaf")
    assert engine.sh("cat containers/deaf/state containers/deaf/restarts").stdout == "running\n1\n"
    engine.sh("echo stop 60 > containers/deaf/ctl")
    assert "no longer stopping" in engine.cli("exec", "deaf", "true", code=1).stderr
    assert "no container 'none'" in engine.cli("rm", "-fv", "none", "deaf", code=1).stderr
    assert not engine.cli("ps", "-aq").stdout


def test_create_as_run_without_the_start(engine: Dutchman) -> None:
    words = ["--name", "made", "-h", "inner", "--net", "none", "demo:1", "hostname"]
    assert engine.cli("create", *words).stdout == "made\n"
    assert engine.sh("cat containers/made/state").stdout == "created\n"
    engine.cli("update", "--cpus", "2", "--memory", "64m", "made")
    engine.cli("update", "--cpus", "max", "--memory", "max", "--restart", "on-failure:2", "made")
    shown = engine.sh("cd containers/made/config && cat cpus memory restart").stdout
    assert shown == "max\nmax\non-failure:2\n"
    engine.cli("start", "made")
    assert engine.cli("wait", "made").stdout == "0\n" and engine.cli("logs", "made").stdout == "inner\n"
    assert "/etc/h" not in engine.cli("diff", "made").stdout
    assert engine.cli("commit", "made", "kept").stdout.startswith("sha256:")
    assert engine.cli("rmi", "kept").stdout == "kept:latest\n"
    engine.cli("rm", "made")


def test_interrupting_attach_passes_the_signal_on(engine: Dutchman) -> None:
    engine.make("trapped", "trap 'echo interrupted' INT; trap 'exit 4' USR1; while :; do sleep 0.1; done")
    engine.cli("start", "trapped")
    words = [engine.bin / "dutchman", "attach", "trapped"]
    with subprocess.Popen(words, env=engine.env, stdout=subprocess.PIPE) as held:
        try:
            # SIGINT is ours once it follows: a handler of its own is set
            wait_for(lambda: caught(held.pid, signal.SIGINT), what="attached")
            held.send_signal(signal.SIGINT)
            assert held.stdout is not None and held.stdout.readline() == b"interrupted\n"
            engine.cli("kill", "-s", "USR1", "trapped")
            assert held.wait(30) == 4
        finally:
            held.kill()
    engine.cli("rm", "trapped")


def caught(pid: int, number: int) -> bool:
    """Whether a process has a handler for SIGTERM and this signal: Python has one for SIGINT from the start."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line.split()[1] for line in lines if line.startswith("SigCgt")), 16)
    return all(mask >> (one - 1) & 1 for one in (number, signal.SIGTERM))


def test_logs_follow_ends_with_the_container(engine: Dutchman) -> None:
    engine.make("lines", "for i in $(seq 200); do echo line $i; done; echo problem >&2; sleep 1; echo last")
    engine.cli("start", "lines")
    done = engine.cli("logs", "-f", "lines")
    assert done.stdout.splitlines() == [*(f"line {n}" for n in range(1, 201)), "last"]
    assert done.stderr == "problem\n"
    assert engine.cli("logs", "--tail", "2", "--stdout", "lines").stdout == "line 200\nlast\n"
    engine.cli("rm", "lines")


def test_what_could_not_start_is_not_kept(engine: Dutchman) -> None:
    missing = engine.cli("run", "--pull=never", "nowhere:9", code=1)
    assert "nowhere" in missing.stderr and "dutchman pull nowhere:9" in missing.stderr
    command = engine.cli("run", "demo:1", "--", "/no/such/program", code=127)
    assert "/no/such/program" in command.stderr
    assert "/srv/hello.txt" in engine.cli("run", "--rm", "demo:1", "--", "/srv/hello.txt", code=126).stderr
    field = engine.cli("run", "-m", "lots", "demo:1", code=1)
    assert "memory" in field.stderr
    assert engine.cli("ps", "-a", "-q").stdout == ""


@pytest.mark.parametrize("name", ["a/b", "..", "-x", "a b", "ä"])
def test_names_that_cannot_be(engine: Dutchman, name: str) -> None:
    engine.sh("mkdir containers/.earlier", code=1)
    said = engine.cli("run", f"--name={name}", "demo:1", code=1).stderr
    assert said.startswith("dutchman: ") and "earlier" not in said
    assert engine.cli("logs", "--", name, code=1).stderr.startswith("dutchman: there is no container")


def test_ps_imports_little(engine: Dutchman) -> None:
    """What makes `ps` quick: of all packages the project uses, it loads only click."""
    command = [sys.executable, "-X", "importtime", "-m", "fdfs", "ps"]
    done = subprocess.run(command, cwd=ROOT, env=engine.env, capture_output=True, text=True, timeout=60, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded
    assert not loaded & {"engine", "pydantic", "yaml", "httpx", "rich", "fuse", "sqlite3", "zstandard", "isal"}


# --- images ---------------------------------------------------------------------------------------------------------


def test_images_and_their_removal(engine: Dutchman, tmp_path: Path) -> None:
    rows = engine.cli("images").stdout.splitlines()
    assert rows[0].split() == ["NAME", "DIGEST", "PLATFORM", "SIZE", "CREATED"]
    assert [row.split()[0] for row in rows[1:]] == ["demo:1", "demo:2"]
    tar = tmp_path / "root fs.tar"
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("imported\n")
    subprocess.run(["tar", "-C", str(source), "-cf", str(tar), "."], check=True)
    engine.cli("import", str(tar), "imported:1")
    assert engine.read("images/imported:1/rootfs/file") == "imported"
    engine.cli("rmi", "imported:1")
    assert "no image" in engine.cli("rmi", "imported:1", code=1).stderr
    assert "imported" not in engine.cli("images").stdout


def test_a_damaged_archive_is_refused_with_a_reason(engine: Dutchman, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tar"
    bad.write_bytes(os.urandom(4096))
    done = engine.cli("load", str(bad), code=1)
    assert "load" in done.stderr and len(done.stderr.splitlines()[0]) > len(f"dutchman: load {bad}: ")
    assert "does not exist" in engine.cli("load", str(tmp_path / "none"), code=2).stderr


def test_pull_from_a_registry(engine: Dutchman, tmp_path: Path) -> None:
    registry_module = pytest.importorskip("registry")
    if not registry_module.available():
        pytest.skip("needs docker-registry and skopeo")
    with registry_module.Registry(tmp_path) as registry:
        registry.push_archive(f"{demo_archive()}:demo:2", "pulled:1")
        name = registry.name("pulled:1")
        assert engine.cli("pull", name).stdout == f"{name}\n"
        words = "--rm", name, "--", "cat", "/srv/new.txt"
        assert engine.cli("run", *words).stdout == "This file is new.\n"
        engine.cli("rmi", name)
        assert "no such image" in engine.cli("run", "--pull=never", *words, code=1).stderr
        assert engine.cli("run", *words).stdout == "This file is new.\n"  # pulled first
        absent = engine.cli("run", registry.name("absent:1"), code=1)
        assert "pull" in absent.stderr and "absent" in absent.stderr
        registry.push_archive(f"{demo_archive()}:demo:1", "pulled:1")
        assert engine.cli("run", *words).stdout == "This file is new.\n"
        assert "srv/new.txt" in engine.cli("run", "--pull=always", *words, code=1).stderr  # it is another one now
        absent = engine.cli("pull", registry.name("absent:1"), code=1)
        assert "absent" in absent.stderr
    engine.cli("rmi", name)


# --- volumes --------------------------------------------------------------------------------------------------------


def test_volumes_by_the_command(engine: Dutchman, tmp_path: Path) -> None:
    assert engine.cli("volume", "create", "-l", "tier=db", "-d", "ext4", "-o", "size=8m", "small").stdout == "small\n"
    host_dir = tmp_path / "from"
    host_dir.mkdir()
    (host_dir / "f").write_text("host\n")
    mount = f"type=bind,source={host_dir},target=/h,readonly"
    words = ["run", "--name", "giver", "-v", "small:/v", "--mount", mount, "demo:1", "sh", "-c"]
    engine.cli(*words, "cp /h/f /v/f; touch /h/no 2>/dev/null || echo ro >> /v/f")
    done = engine.cli(
        "run", "--rm", "--volumes-from", "giver:ro", "demo:1", "sh", "-c", "cat /v/f; touch /v/x || echo ro"
    )
    assert done.stdout == "host\nro\nro\n"
    (row,) = engine.cli("volume", "ls").stdout.splitlines()[1:]
    assert (row.split()[0], row.split()[1], row.split()[-1]) == ("small", "ext4", "giver")
    assert "used by giver" in engine.cli("volume", "rm", "small", code=1).stderr
    assert engine.cli("volume", "clone", "small", "copy").stdout == "copy\n"
    engine.cli("volume", "export", "copy", str(tmp_path / "copy.tar"))
    engine.cli("volume", "create", "back")
    engine.cli("volume", "import", "back", str(tmp_path / "copy.tar"))
    assert engine.sh("cat volumes/back/data/f").stdout == "host\nro\n"
    engine.cli("rm", "giver")
    assert "small" in engine.cli("volume", "prune", "--yes").stdout
    assert engine.cli("volume", "ls", "-q").stdout == ""
    assert "--mount" in engine.cli("run", "--mount", "type=bind,colour=red", "demo:1", code=2).stderr
    bound = {"type": "bind", "source": "/h", "target": "/t", "bind": {"idmap": True}}
    assert long_mount("idmap,type=bind,source=/h,target=/t") == bound
    named = {"source": "v", "target": "/t", "volume": {"idmap": "uids=0-1-1#1-0-1;gids=0-1-1"}}
    assert long_mount("source=v,target=/t,idmap=uids=0-1-1#1-0-1;gids=0-1-1") == named

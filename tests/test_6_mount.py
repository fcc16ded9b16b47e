"""A real daemon, a real mount, real shell commands: the control mount, with binds and without."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import SMALL, add_busybox, add_image
from mounting import Daemon, can_mount
from ociimages import make_tar

from engine import host, hostmounts
from engine.engine import Engine

REASON = can_mount()
if REASON and os.environ.get("CI") == "true":
    raise RuntimeError(f"this test must run in CI: {REASON}")
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

ROOT_ONLY = pytest.mark.skipif(not (host.LINUX and host.is_root()), reason="overlay mounts need root on Linux")


@pytest.fixture(scope="module", params=["binds", "no-binds"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    place = tmp_path_factory.mktemp("mount")
    with Engine(place / "store", runtime="fake") as engine:
        add_busybox(engine, Cmd=["sleep", "inf"])
        add_image(engine, "ghcr.io/owner/repo:1", SMALL)
    with Daemon(place, binds=request.param == "binds") as daemon:
        if request.param == "binds" and host.is_root():
            deadline = time.monotonic() + 40
            while not any(
                "/rootfs" in point for point, _, _ in hostmounts.mounts() if point.startswith(str(daemon.mount))
            ):
                assert time.monotonic() < deadline, "nothing was bound"
                time.sleep(0.02)
        yield daemon


# --- the shape --------------------------------------------------------------------------------------------------


def test_the_top_lists_what_the_namespace_promises(daemon: Daemon) -> None:
    names = set(daemon.sh("ls").split())
    promised = "README.txt version status ctl error events images layers containers logs volumes jobs store"
    assert set(promised.split()) <= names
    assert "images/" in daemon.sh("cat README.txt")
    assert daemon.sh("cat ctl") == "down\nhalt\n"


def test_sizes_are_true(daemon: Daemon) -> None:
    out = daemon.sh("for f in README.txt version ctl images/ctl store/stats; do stat -c %s $f; cat $f | wc -c; done")
    sizes = out.split()
    assert sizes[::2] == sizes[1::2]


def test_everything_can_be_found_and_read_without_an_error(daemon: Daemon) -> None:
    daemon.sh("mkdir -p containers/shape volumes/shape")
    try:
        done = daemon.run("find . -type f -perm /444 -not -name wait -exec cat {} + | wc -c", timeout=60)
        assert done.stderr == "" and int(done.stdout) > 1000
        assert daemon.run("ls -lR . > /dev/null", timeout=60).stderr == ""
        assert daemon.run("find . -ls > /dev/null", timeout=60).stderr == ""
    finally:
        daemon.sh("rmdir containers/shape volumes/shape")


def test_tags_lead_to_digests(daemon: Daemon) -> None:
    assert daemon.sh("cat images/busybox:latest/reference").strip().endswith("busybox:latest")
    assert daemon.sh("cat images/ghcr.io/owner/repo:1/rootfs/etc/motd") == "ahoy\n"
    assert daemon.sh("cat images/ghcr.io/owner/repo:1/rootfs/etc/link") == "ahoy\n"
    assert daemon.sh("cat images/ghcr.io/owner/repo:1/layers/00/fs/etc/motd") == "ahoy\n"


# --- immutable trees --------------------------------------------------------------------------------------------


def test_an_image_is_read_only_and_has_provenance(daemon: Daemon) -> None:
    daemon.refused("echo x > images/busybox:latest/rootfs/etc/x", "Read-only file system")
    daemon.refused("rm images/busybox:latest/rootfs/bin/busybox", "Read-only file system")
    xattrs = daemon.sh("getfattr -d -m - images/ghcr.io/owner/repo:1/rootfs/etc/motd")
    assert "user.dutchman.layer=" in xattrs and "user.dutchman.digest=" in xattrs


def test_images_copy_and_pack_as_they_are(daemon: Daemon, tmp_path: Path) -> None:
    root = "images/busybox:latest/rootfs"
    daemon.sh(f"cp -a {root}/. {tmp_path}/copy && diff -r --no-dereference {root} {tmp_path}/copy")
    daemon.sh(f"mkdir {tmp_path}/tar && tar -C {root} -cf - . | tar -C {tmp_path}/tar -xf -")
    daemon.sh(f"diff -r --no-dereference {root} {tmp_path}/tar")
    assert daemon.run(f"rsync -aHAX {root}/ {tmp_path}/xattrs/").stderr == "", "what is listed can be read"
    daemon.sh(f"rsync -aHn --delete --itemize-changes {root}/ {tmp_path}/copy/ | grep -v '^[.]' && exit 1; true")
    assert daemon.run(f"grep -r ahoy {root}/etc; true").stderr == ""
    assert int(daemon.sh(f"du -s {root}").split()[0]) > 1000


# --- control files ----------------------------------------------------------------------------------------------


def test_a_bad_verb_fails_in_the_shell_and_says_why(daemon: Daemon) -> None:
    for shell in ("sh", "bash"):
        done = daemon.run("echo bogus > containers/ctl", shell=shell)
        assert done.returncode != 0
        assert "Invalid argument" in done.stderr or "I/O error" in done.stderr
    error = daemon.sh("cat containers/error")
    assert "EINVAL" in error and "bogus" in error and "^^^^^" in error and "run" in error
    daemon.sh("echo > containers/error")
    assert daemon.sh("cat containers/error") == ""
    daemon.refused("echo something > containers/error", "Invalid argument")


@pytest.mark.parametrize(
    ("command", "errno_text"),
    [
        ("echo run > containers/ctl", "Invalid argument"),  # argument missing
        ("echo 'run a b' > containers/ctl", "Invalid argument"),  # one too many
        ("echo 'run a color=red' > containers/ctl", "Invalid argument"),
        ('echo "run \'unbalanced" > containers/ctl', "Invalid argument"),
        ("echo 'run no-such-image' > containers/ctl", "No such file or directory"),
        ("echo 'pull UPPER:CASE' > images/ctl", "Invalid argument"),
        ("echo 'load relative/path' > images/ctl", "Invalid argument"),
        ("printf '\\xff\\n' > images/ctl", "Invalid argument"),
        ("head -c 70000 /dev/zero | tr '\\0' a | dd bs=70000 iflag=fullblock of=images/ctl", "Argument list too long"),
        ("echo x > version", "Permission denied"),
        ("rm version", "Permission denied"),
        ("mkdir images/x", "Permission denied"),
        ("mkdir 'containers/-bad-'", "Invalid argument"),
        ("touch containers/.DS_Store", "Permission denied"),
        ("mkdir .Trash-0", "Permission denied"),
        ("touch ._x", "Permission denied"),
        ("cat containers/none/state", "No such file or directory"),
        ("mv version containers/", "Permission denied|cross-device"),
        ("chmod 777 containers", "Permission denied"),
        ("ln -s x y", "Permission denied"),
    ],
)
def test_what_is_refused(daemon: Daemon, command: str, errno_text: str) -> None:
    daemon.refused(command, errno_text)


def test_lines_run_in_order_and_stop_at_the_first_failure(daemon: Daemon) -> None:
    daemon.refused("/usr/bin/printf 'create one\\nbogus\\ncreate two\\n' > volumes/ctl", "Invalid argument")
    assert "one" in daemon.sh("ls volumes") and "two" not in daemon.sh("ls volumes").split()
    daemon.sh("rmdir volumes/one")


def test_the_reply_is_read_on_the_handle_that_wrote(daemon: Daemon) -> None:
    out = daemon.sh("exec 3<>volumes/ctl; echo 'create replied' >&3; cat <&3; exec 3>&-")
    assert out == "replied\n"
    fd = os.open(daemon.mount / "volumes/ctl", os.O_RDWR)
    try:
        os.write(fd, b"create again\n")
        assert os.pread(fd, 100, 0) == b"again\n"
    finally:
        os.close(fd)
    daemon.sh("rmdir volumes/replied volumes/again")


def test_who_wrote_a_verb_is_recorded(daemon: Daemon) -> None:
    daemon.sh("echo 'create noted' > volumes/ctl; rmdir volumes/noted")
    assert f'"who":"uid={os.getuid()} pid=' in daemon.sh("tail -n 5 events")


# --- documents and settings -------------------------------------------------------------------------------------


@pytest.fixture
def web(daemon: Daemon) -> Iterator[Daemon]:
    daemon.sh("mkdir containers/web")
    yield daemon
    daemon.run("echo kill > containers/web/ctl; sleep 0.1")
    for _ in range(50):
        if daemon.run("rmdir containers/web").returncode == 0:
            break
        time.sleep(0.1)


def test_a_field_is_a_file(web: Daemon) -> None:
    web.sh("echo busybox > containers/web/config/image")
    assert web.sh("cat containers/web/config/image") == "busybox\n"
    assert "image: busybox" in web.sh("cat containers/web/config.yaml")
    web.refused("echo lots > containers/web/config/memory", "Invalid argument")
    assert "memory" in web.sh("cat containers/web/error")
    web.sh("printf 'A=1\\nB=2\\n' > containers/web/config/env; echo C=3 >> containers/web/config/env")
    assert web.sh("cat containers/web/config/env") == "A=1\nB=2\nC=3\n"
    web.refused("mkdir containers/web", "File exists")


def test_a_document_is_applied_whole_or_not_at_all(web: Daemon, tmp_path: Path) -> None:
    (tmp_path / "good").write_text("image: busybox\nenv: {A: one}\n")
    (tmp_path / "bad").write_text("image: busybox\nnonsense: 1\n")
    web.sh(f"cp {tmp_path}/good containers/web/config.yaml")
    assert web.sh("cat containers/web/config/env") == "A=one\n"
    web.refused(f"cp {tmp_path}/bad containers/web/config.yaml", "Invalid argument")
    assert "nonsense" in web.sh("cat containers/web/error")
    assert web.sh("cat containers/web/config/env") == "A=one\n"
    web.sh("cat > containers/web/config.yaml <<END\nimage: busybox\nenv: {A: two}\nEND\n")
    assert web.sh("cat containers/web/config/env") == "A=two\n"


@pytest.mark.parametrize(
    "edit",
    [
        "vim -u NONE -es -c 's/.*/image: ghcr.io\\/owner\\/repo:1/' -c wq {}",
        "vim -u NONE -es --cmd 'set backup backupcopy=no' -c 's/.*/image: ghcr.io\\/owner\\/repo:1/' -c wq {}",
        "sed -i 's,busybox,ghcr.io/owner/repo:1,' {}",
        "printf 'image: ghcr.io/owner/repo:1\\n' > {}.new && mv {}.new {}",
    ],
    ids=["vim", "vim-backup", "sed-i", "write-temp-then-rename"],
)
def test_editors_can_save(web: Daemon, edit: str) -> None:
    path = "containers/web/config.yaml"
    web.sh(f"echo 'image: busybox' > {path}")
    web.sh(edit.replace("{}", path))
    assert web.sh("cat containers/web/config/image") == "ghcr.io/owner/repo:1\n", web.sh("cat containers/web/error")
    assert "4913" not in web.sh("ls -A containers/web") and ".swp" not in web.sh("ls -A containers/web")


# --- running ----------------------------------------------------------------------------------------------------


def test_a_container_is_started_followed_and_stopped_by_files(web: Daemon) -> None:
    web.sh("echo busybox > containers/web/config/image")
    assert web.sh("cat containers/web/state") == "created\n"
    assert "start" in web.sh("cat containers/web/ctl") and "stop" not in web.sh("cat containers/web/ctl")
    web.refused("echo stop > containers/web/ctl", "Device or resource busy")
    web.refused("""echo '{"out": "/etc"}' > containers/web/tar""", "not supported")
    assert "its files are on this host" in web.sh("cat containers/web/error")
    web.refused("head -c 100000 /dev/zero | tr '\\0' '[' > containers/web/tar", "Invalid argument")
    web.sh("echo start > containers/web/ctl")
    web.until("cat containers/web/state", "running")
    assert "start" not in web.sh("cat containers/web/ctl").split()
    web.refused("rmdir containers/web", "Device or resource busy")
    assert web.sh("cat containers/web/wait") == ""
    web.sh("echo kill > containers/web/ctl")
    web.until("cat containers/web/state", "stopped")
    assert web.sh("cat containers/web/wait").strip() == web.sh("cat containers/web/exit_code").strip() != ""
    assert "stateChanged" in web.sh("cat containers/web/events")


def test_wait_does_not_hold_up_others(web: Daemon) -> None:
    web.sh("echo busybox > containers/web/config/image; echo start > containers/web/ctl")
    web.until("cat containers/web/state", "running")
    for _ in range(20):  # each waits a second: on a busy host that may be over before the others are done
        waiting = [subprocess.Popen(["cat", web.mount / "containers/web/wait"]) for _ in range(20)]
        web.sh("cat version; ls containers")
        left = [process for process in waiting if process.poll() is None]
        for process in waiting:
            process.wait(60)
        if left:
            break
    assert left


def test_a_hundred_waiting_readers_leave_room_for_others(web: Daemon) -> None:
    web.sh("echo busybox > containers/web/config/image; echo start > containers/web/ctl")
    web.until("cat containers/web/state", "running")
    done = threading.Event()

    def wait() -> None:
        while not done.is_set():
            (web.mount / "containers/web/wait").read_bytes()

    waiting = [threading.Thread(target=wait) for _ in range(100)]
    for thread in waiting:
        thread.start()
    try:
        time.sleep(0.5)
        took = []
        for _ in range(20):
            began = time.monotonic()
            assert (web.mount / "containers/web/state").read_text() == "running\n"
            took.append(time.monotonic() - began)
            time.sleep(0.05)
        assert sorted(took)[10] < 0.5  # if it had to wait until one of them is answered, most would take longer
    finally:
        done.set()
        for thread in waiting:
            thread.join(60)


def test_growing_files_are_followed(daemon: Daemon, tmp_path: Path) -> None:
    """By tail, which shows what comes once it is there: so something comes until both have shown it."""
    outs, followers = [tmp_path / flag for flag in ("-f", "-F")], []
    for out in outs:
        with open(out, "wb") as target:
            command = ["tail", out.name, "-n", "0", daemon.mount / "events"]
            followers.append(subprocess.Popen(command, stdout=target, stderr=target))
    try:
        deadline = time.monotonic() + 40
        while not all('"volumeRemoved"' in out.read_text() for out in outs):
            assert time.monotonic() < deadline, [out.read_text() for out in outs]
            daemon.sh("echo 'create followed-1' > volumes/ctl; rmdir volumes/followed-1")
            time.sleep(0.2)
        assert not any("truncated" in out.read_text() for out in outs)
    finally:
        for process in followers:
            process.kill()
            process.wait()


# --- writable trees ---------------------------------------------------------------------------------------------

WRITABLE = """
set -e
cd "$1"
mkdir -p a/b; echo hi > a/b/f; ln a/b/f a/h; ln -s b/f a/s
test "$(cat a/s)" = hi; test "$(stat -c %h a/h)" = 2
mv a/b/f a/b/g; test -f a/b/g; test ! -e a/b/f
touch -d @1000.5 a/b/g; test "$(stat -c %.1Y a/b/g)" = 1000.5
touch -a a/b/g; test "$(stat -c %.1Y a/b/g)" = 1000.5
setfattr -n user.note -v yes a/h; test "$(getfattr --only-values -n user.note a/h)" = yes
setfattr -x user.note a/h
chmod 640 a/h; test "$(stat -c %a a/h)" = 640; chown 1:2 a/h; test "$(stat -c %u:%g a/h)" = 1:2
echo more >> a/h; test "$(cat a/h | tr '\\n' ' ')" = "hi more "
truncate -s 100 a/h; test "$(stat -c %s a/h)" = 100
exec 4<>gone; rm gone; echo data >&4; exec 4>&-
mkfifo fifo; test -p fifo
dd if=/dev/urandom of=big bs=1M count=3 status=none; cp big big2; cmp big big2; sync big2
rsync -aHX a/ c/; diff -r a/b c/b
tar cf - a | tar tf - > /dev/null
test "$(df --output=target . | tail -1)" != ""
ln -s /etc/passwd out; test "$(readlink out)" = /etc/passwd
rm -rf a c big big2 fifo out
test "$(ls -A)" = ""
"""


def test_a_volume_is_an_ordinary_directory(daemon: Daemon) -> None:
    daemon.sh("mkdir volumes/data1")
    try:
        done = subprocess.run(
            ["bash", "-c", WRITABLE, "bash", str(daemon.mount / "volumes/data1/data")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        daemon.sh("echo kept > volumes/data1/data/kept")
        assert (daemon.store / "volumes/data1/data/kept").read_text() == "kept\n"
    finally:
        daemon.sh("rmdir volumes/data1")
    assert "data1" not in daemon.sh("ls volumes")


@ROOT_ONLY
def test_a_stopped_containers_root_is_writable_and_diff_shows_it(web: Daemon) -> None:
    web.sh("echo busybox > containers/web/config/image")
    root = "containers/web/rootfs"
    web.sh(f"echo mine > {root}/etc/mine; rm {root}/bin/busybox; mkdir {root}/new; mv {root}/etc/mine {root}/new/")
    assert web.sh("cat containers/web/rootfs/new/mine") == "mine\n"
    changes = web.sh("cat containers/web/changes").splitlines()
    assert "A /new/mine" in changes and "D /bin/busybox" in changes
    assert web.sh("find containers/web/diff -type f").split() == ["containers/web/diff/new/mine"]
    upper = next(path for path in web.store.glob("containers/*/upper") if (path / "new/mine").exists())
    (upper / "etc").mkdir(exist_ok=True)
    (upper / "etc/hosts").touch()  # as the runtime makes it to mount over
    assert "A /etc/hosts" not in web.sh("cat containers/web/changes").splitlines()
    assert "hosts" not in web.sh("ls containers/web/diff/etc").split()
    assert web.run("cat containers/web/diff/etc/hosts").returncode == 1
    (upper / "etc/hosts").write_text("written\n")  # no longer only a place to mount over
    assert "written" in (upper / "etc/hosts").read_text() and "hosts" in web.sh("ls containers/web/diff/etc")
    (upper / "etc/hosts").unlink()
    web.refused("echo x > containers/web/diff/x", "Read-only file system")
    assert "trusted.overlay" not in web.run("getfattr -d -m - containers/web/diff/new").stdout
    assert web.sh("ls images/busybox:latest/rootfs/bin/busybox")


# --- names and ends ---------------------------------------------------------------------------------------------


def test_file_names_need_not_be_text(daemon: Daemon) -> None:
    daemon.sh("mkdir volumes/odd")
    data = os.fsencode(daemon.mount / "volumes/odd/data")
    try:
        name = b"\xff\xfe \n'\"$(x)"
        with open(data + b"/" + name, "wb") as handle:
            handle.write(b"x")
        assert os.listdir(data) == [name]
        os.unlink(data + b"/" + name)
    finally:
        daemon.sh("rmdir volumes/odd")


def test_removed_while_open_is_enodev(daemon: Daemon) -> None:
    daemon.sh("mkdir containers/brief")
    fd = os.open(daemon.mount / "containers/brief/events", os.O_RDONLY)
    try:
        daemon.sh("rmdir containers/brief")
        with pytest.raises(OSError, match=r"No such device|No such file"):
            os.pread(fd, 10, 0)
    finally:
        os.close(fd)


# --- images that come and go ------------------------------------------------------------------------------------


def test_an_image_is_imported_browsed_at_once_and_removed(daemon: Daemon, tmp_path: Path) -> None:
    """Right after it appears the tree may be bound while it is walked: nobody may notice."""
    for number in range(4):
        files = {"d": None, "n": str(number).encode()} | {f"d/s{i}/f{j}": b"x" for i in range(20) for j in range(5)}
        (tmp_path / "root.tar").write_bytes(make_tar(files))
        reply = daemon.sh(f"exec 3<>images/ctl; echo 'import {tmp_path}/root.tar made/here:{number}' >&3; cat <&3")
        job = reply.strip()
        daemon.until(f"cat {job}/state", "done")
        assert daemon.sh(f"cat {job}/error") == "" and "import" in daemon.sh(f"cat {job}/verb")
        image = f"images/made/here:{number}"
        done = daemon.run(f"find {image}/rootfs/ -ls | wc -l; du -s {image}/rootfs/; cat {image}/rootfs/n")
        assert done.stderr == "" and done.stdout.splitlines()[0] == str(20 * 6 + 3), done
        assert done.stdout.endswith(str(number))
        daemon.sh(f"echo remove > {image}/ctl")
        daemon.refused(f"ls {image}", "No such file")
    daemon.refused("cat images/made", "No such file|Is a directory")


def test_a_failing_job_says_why(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 1000)
    job = daemon.sh(f"exec 3<>images/ctl; echo 'load {tmp_path}/bad.tar' >&3; cat <&3").strip()
    daemon.until(f"cat {job}/state", "failed")
    assert daemon.sh(f"cat {job}/error").strip()
    daemon.refused(f"echo cancel > {job}/ctl", "Device or resource busy")


def test_a_name_that_has_gone_behind_the_mount_is_looked_for_again(tmp_path: Path) -> None:
    """The kernel believes names for a second. One that has gone meanwhile is made when that is asked for, and is not
    there for who reads: as with a machine that ended before it had written a file out."""
    with Daemon(tmp_path, runtime="fake", binds=False) as daemon:
        daemon.sh("mkdir volumes/v && echo one > volumes/v/data/file")
        path = next(daemon.store.glob("volumes/*/data")) / "file"
        for command, said in (("echo two > volumes/v/data/file", ""), ("cat volumes/v/data/file", "No such file")):
            for _ in range(5):
                path.write_text("here")
                daemon.sh("stat volumes/v/data/file")
                path.unlink()
                done = daemon.run(command)
                assert said in done.stderr and "Stale" not in done.stderr, done.stderr
                assert bool(done.returncode) == bool(said)
        assert not path.exists()

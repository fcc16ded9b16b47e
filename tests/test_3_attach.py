"""Mounts of containers that really run (driver oci): what is checked, made, copied, and what is never touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import eventually
from ociimages import busybox_rootfs_tar, make_layout

from engine import attach, host, hostmounts, volumefill, volumeusers
from engine.attach import give
from engine.engine import Engine
from engine.errors import Busy, EngineError, InvalidArgument, NotFound, Unsupported
from engine.hostmounts import mount_of
from engine.images.archive import load
from engine.staging import Staging
from engine.treecopy import copy_tree

IMAGE = "docker.io/library/mounts:1"
CONTENT: dict[str, Any] = {
    "data": None,
    "data/file": (0o640, b"from the image\n"),
    "data/sub": None,
    "data/sub/tool": (0o4755, b"#!/bin/sh\n"),
    "data/out": "/etc/passwd",
    "declared": None,
    "declared/given": b"given\n",
    "link": "/etc",
    "etc/plain": b"plain\n",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if not (host.LINUX and host.is_root()):
        pytest.skip("containers need root on Linux")
    place = tmp_path_factory.mktemp("attach")
    engine = Engine(place / "store", runtime="oci")
    if not engine.drivers.probe()[1].ok:
        reason = engine.drivers.probe()[1].reason
        engine.close()
        pytest.skip(f"no OCI runtime: {reason}")
    config = {"Cmd": ["sh"], "Volumes": {"/declared": {}}}
    make_layout(place / "layout", [busybox_rootfs_tar(), CONTENT], config=config, reference=IMAGE)
    load(engine.images, place / "layout")
    yield engine
    for container in engine.containers.all():
        engine.containers.remove(container.name, force=True)
    engine.close(unmount=True)
    assert not [point for point, _, _ in hostmounts.mounts() if point.startswith(str(engine.store))]


@pytest.fixture
def ran(engine: Engine) -> Iterator[Callable[..., str]]:
    """Run a container to its end: what it printed. Everything it was given goes afterwards."""
    names: list[str] = []

    def run(script: str, *, code: int = 0, **fields: Any) -> str:
        name = f"c{len(names)}"
        names.append(name)
        engine.containers.run(IMAGE, name, ["sh", "-c", script], **fields)
        assert engine.containers.wait(name, 40) == code, logs(name, "stderr")
        return logs(name, "stdout")

    def logs(name: str, stream: str) -> str:
        kept = engine.containers.logs(name)
        kept.caught_up(stream)
        return kept.read(stream, 0, 1 << 20).decode()

    yield run
    for container in engine.containers.all():
        engine.containers.remove(container.name, force=True)
    for volume in engine.volumes.unused():
        engine.volumes.remove(volume.name)
    assert engine.volumes.all() == []


def refused(engine: Engine, volumes: list[Any], **fields: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        engine.containers.run(IMAGE, "bad", ["true"], volumes=volumes, **fields)
    engine.containers.remove("bad")
    return caught.value


# --- bind mounts --------------------------------------------------------------------------------------------------


def test_directories_files_and_made_ones(tmp_path: Path, ran: Callable[..., str]) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "f").write_text("dir\n")
    (tmp_path / "single").write_text("single\n")
    said = ran(
        "cat /a/f /etc/one /b/c/two; echo new > /made/x; echo more >> /etc/one; touch /a/no 2>/dev/null || echo ro",
        volumes=[f"{tmp_path}/dir:/a:ro", f"{tmp_path}/single:/etc/one", f"{tmp_path}/single:/b/c/two:ro",
                 f"{tmp_path}/not/there:/made"],
    )  # fmt: skip
    assert said == "dir\nsingle\nsingle\nro\n"
    assert (tmp_path / "not/there/x").read_text() == "new\n"
    assert (tmp_path / "single").read_text() == "single\nmore\n"


def test_what_cannot_be_mounted_is_named(engine: Engine, tmp_path: Path, ran: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("x")
    os.symlink("nowhere", tmp_path / "dangling")
    missing = {"type": "bind", "source": f"{tmp_path}/gone", "target": "/a"}
    for volume, kind, named in (
        (missing, NotFound, "gone"),
        (f"{tmp_path}/dangling:/a", NotFound, "dangling"),
        (f"{tmp_path}/file/below:/a", InvalidArgument, "file/below"),
        (f"{tmp_path}/file:/data", InvalidArgument, "/data is a directory"),
        (f"{tmp_path}:/etc/passwd", InvalidArgument, "/etc/passwd is a file"),
        (f"{tmp_path}:/etc/passwd/x", InvalidArgument, "/etc/passwd/x"),
        ({"source": "vol", "target": "/a", "volume": {"subpath": "none"}}, NotFound, "none"),
    ):
        error = refused(engine, [volume])
        assert isinstance(error, kind) and named in error.reason, error.reason
    assert not (tmp_path / "gone").exists()
    made = {**missing, "bind": {"create_host_path": True}}
    ran("touch /a/x", volumes=[made])
    assert (tmp_path / "gone/x").exists()


def test_links_of_an_image_lead_nowhere_on_the_host(tmp_path: Path, ran: Callable[..., str]) -> None:
    """/link -> /etc in the image: the mount lands in the container's /etc, the host's is what it was."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "seen").write_text("seen\n")
    said = ran(
        "cat /etc/deep/er/seen /link/one/seen; ls -d /link/made",
        volumes=[f"{tmp_path}/d:/link/deep/er", f"{tmp_path}/d:/link/one", "fresh:/link/made"],
    )
    assert said == "seen\nseen\n/link/made\n"
    assert not [name for name in ("deep", "one", "made") if os.path.lexists(f"/etc/{name}")]


def test_u_gives_the_source_away_without_following_links(tmp_path: Path, ran: Callable[..., str]) -> None:
    (tmp_path / "src" / "sub").mkdir(parents=True)
    (tmp_path / "src" / "sub" / "f").write_text("x")
    (tmp_path / "other").write_text("x")
    os.symlink(tmp_path / "other", tmp_path / "src" / "link")
    ran("touch /mine/sub/new", user="65534:65534", volumes=[f"{tmp_path}/src:/mine:U"])
    for path in ("src", "src/sub", "src/sub/f", "src/link", "src/sub/new"):
        info = os.lstat(tmp_path / path)
        assert (info.st_uid, info.st_gid) == (65534, 65534), path
    assert os.stat(tmp_path / "other").st_uid == 0
    with pytest.raises(InvalidArgument, match="/usr"):
        give(Path("/usr"), tmp_path, "1000")


def test_u_mounts_what_it_gave_away_whatever_takes_its_name(
    tmp_path: Path, ran: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("src", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("x")

    def swap(*given: Any) -> None:
        (tmp_path / "src").rename(tmp_path / "away")
        os.symlink(tmp_path / "secret", tmp_path / "src")
        give(*given)

    monkeypatch.setattr(attach, "give", swap)
    assert ran("ls /mine", user="65534", volumes=[f"{tmp_path}/src:/mine:U"]) == "src\n"
    assert os.stat(tmp_path / "away").st_uid == 65534
    assert os.stat(tmp_path / "secret").st_uid == os.stat(tmp_path / "secret" / "secret").st_uid == 0


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A file system that can have its owners mapped, whatever the host's own is."""
    if host.kernel_version() < (6, 3):
        pytest.skip("tmpfs maps owners from Linux 6.3 on")
    place = tmp_path / "ram"
    place.mkdir()
    hostmounts.mount("tmpfs", place, "tmpfs", 0, "size=4m,mode=0755")
    hostmounts.mount("none", place, "none", 1 << 20)  # MS_SHARED, as systemd has it
    yield place
    while hostmounts.is_mounted(place):
        hostmounts.unmount(place)


def test_u_and_propagation_go_by_the_same_look(
    engine: Engine, ram: Path, ran: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given away is what is mounted, with what is mounted in it before and after, on either side."""
    source, away, secret = ram / "src", ram / "away", ram / "secret"
    for place in (source, source / "sub", source / "later", source / "inner", secret):
        place.mkdir()
    hostmounts.mount("tmpfs", source / "sub", "tmpfs", 0, "size=1m")

    def swap(*given: Any) -> None:
        source.rename(away)
        os.symlink(secret, source)
        give(*given)

    monkeypatch.setattr(attach, "give", swap)
    try:
        engine.containers.run(IMAGE, "spread", ["sleep", "600"], user="65534", volumes=[f"{source}:/mine:U,rshared"])
        assert (os.stat(away).st_uid, os.stat(secret).st_uid) == (65534, 0)
        assert not list((engine.store / "run/sources").iterdir()) and hostmounts.is_mounted(away / "sub")
        hostmounts.mount("tmpfs", away / "later", "tmpfs", 0, "size=1m")
        pid = engine.containers.get("spread").pid
        assert sorted(os.listdir(f"/proc/{pid}/root/mine")) == ["inner", "later", "sub"]
        for name in ("sub", "later"):
            assert os.path.samestat(os.stat(away / name), os.stat(f"/proc/{pid}/root/mine/{name}")), name
        inside = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--root=/proc/{pid}/root"]
        subprocess.run([*inside, "mount", "-t", "tmpfs", "none", "/mine/inner"], check=True, timeout=30)
        assert hostmounts.is_mounted(away / "inner")
        engine.containers.remove("spread", force=True)
        assert hostmounts.is_mounted(away / "sub") and hostmounts.is_mounted(away / "later")
    finally:
        for name in ("sub", "later", "inner"):
            hostmounts.unmount(away / name)


def test_a_killed_start_leaves_nothing_and_takes_nothing_down(engine: Engine, ram: Path) -> None:
    (ram / "src" / "sub").mkdir(parents=True)
    hostmounts.mount("tmpfs", ram / "src" / "sub", "tmpfs", 0, "size=1m")
    try:
        staging = Staging(engine.store / "run/sources")
        left = staging.held(ram / "src", lambda path: None, shared=True)
        place = left.__enter__()
        assert hostmounts.is_mounted(place / "sub")
        staging.clear()
        assert hostmounts.is_mounted(ram / "src" / "sub") and not list((engine.store / "run/sources").iterdir())
        left.__exit__(None, None, None)
    finally:
        hostmounts.unmount(ram / "src" / "sub")


def owned(place: Path, uid: int, gid: int) -> Path:
    place.mkdir(mode=0o700)
    (place / "f").write_text("x")
    for path in (place, place / "f"):
        os.chown(path, uid, gid)
    return place


def test_idmap_shows_the_owner_as_the_containers_user(engine: Engine, ram: Path, ran: Callable[..., str]) -> None:
    source = owned(ram / "src", 4242, 4343)
    (source / "roots").write_text("x")
    (source / "sub").mkdir()
    hostmounts.mount("tmpfs", source / "sub", "tmpfs", 0, "size=1m,uid=4242,gid=4343")
    script = "cd /m; stat -c '%u:%g %n' . f roots sub; touch new sub/new; stat -c %u:%g new"
    try:
        said = ran(script, user="1000:1001", volumes=[f"{source}:/m:idmap"])
        assert hostmounts.is_mounted(source / "sub")  # taking down ours took nothing of the host's with it
        info = os.stat(source / "sub" / "new")
        assert (info.st_uid, info.st_gid) == (4242, 4343)
    finally:
        hostmounts.unmount(source / "sub")
    assert said.split("\n") == ["1000:1001 .", "1000:1001 f", "0:0 roots", "1000:1001 sub", "1000:1001", ""]
    for name, owner in (("new", (4242, 4343)), ("f", (4242, 4343)), ("roots", (0, 0))):
        info = os.stat(source / name)
        assert (info.st_uid, info.st_gid) == owner, name
    assert ran("stat -c %u:%g /one; echo no > /one", user="1000", code=1, volumes=[f"{source}/f:/one:ro,idmap"])
    assert ran("stat -c %u:%g /m", user="4242:4343", volumes=[f"{source}:/m:idmap"]) == "4242:4343\n"


def test_idmap_takes_ranges_and_volumes(engine: Engine, ram: Path, ran: Callable[..., str]) -> None:
    source = owned(ram / "src", 4242, 4343)
    (source / "roots").write_text("x")
    said = ran(
        "stat -c '%u:%g %n' /m /m/roots; touch /m/new; chown 9:9 /m/new 2>&1 | grep -o Value",
        volumes=[f"{source}:/m:idmap=uids=4242-0-1;gids=4300-0-100"],
    )
    assert said == "0:43 /m\n65534:65534 /m/roots\nValue\n"  # what no range names is nobody, and nobody can be it
    assert (os.stat(source / "new").st_uid, os.stat(source / "new").st_gid) == (4242, 4300)
    engine.volumes.create("mapped", options={"type": "tmpfs", "device": "tmpfs", "o": "size=1m,uid=7,mode=0700"})
    spread = {"source": "mapped", "target": "/v", "volume": {"nocopy": True, "idmap": True}}
    assert ran("stat -c %u:%g /v; touch /v/x", user="1000:1000", volumes=[spread]) == "1000:1000\n"


def test_a_file_system_that_cannot_map_owners_is_named(engine: Engine, tmp_path: Path, ran: Callable[..., str]) -> None:
    error = refused(engine, ["/proc/sys/kernel:/m:idmap"], user="1000")
    assert (
        isinstance(error, Unsupported) and "/proc/sys/kernel: its owners" in error.reason and "U " in (error.hint or "")
    )
    assert not list((engine.store / "run/sources").iterdir())
    assert ran("stat -c %u /m", volumes=["/proc/sys/kernel:/m:idmap"]) == "0\n"  # root to root: nothing to map


def test_z_is_noted_where_there_is_no_selinux(engine: Engine, tmp_path: Path, ran: Callable[..., str]) -> None:
    if Path("/sys/fs/selinux/enforce").exists():
        pytest.skip("SELinux is enabled here")
    engine.containers.run(IMAGE, "labelled", ["sleep", "60"], volumes=[f"{tmp_path}:/a:Z", f"{tmp_path}:/b:z"])
    assert engine.containers.get("labelled").reason == "z and Z do nothing: SELinux is not enabled on this host"
    engine.containers.remove("labelled", force=True)


def test_propagation_reaches_the_container(engine: Engine, tmp_path: Path, ran: Callable[..., str]) -> None:
    """What the host mounts later below a slave is seen inside; below a private mount it is not."""
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    if not mount_of(base)[1]:
        assert "is not a shared mount" in refused(engine, [f"{base}:/a:rshared"]).reason
    hostmounts.mount("tmpfs", base, "tmpfs", 0, "size=1m")
    try:
        hostmounts.mount("none", base, "none", 1 << 20)  # MS_SHARED
        for place in ("sub", "other"):
            (base / place).mkdir()
        volumes = [f"{base}:/slave:rslave", f"{base}:/private:rprivate", f"{base}:/shared:rshared"]
        engine.containers.run(IMAGE, "spread", ["sleep", "60"], volumes=volumes)
        hostmounts.mount("tmpfs", base / "sub", "tmpfs", 0, "size=1m")
        (base / "sub" / "later").write_text("x")
        root = Path(f"/proc/{engine.containers.get('spread').pid}/root")
        assert (root / "slave/sub/later").exists() and (root / "shared/sub/later").exists()
        assert not (root / "private/sub/later").exists()
        config = json.loads(
            (engine.store / "containers" / engine.containers.get("spread").id / "bundle/config.json").read_text()
        )
        assert config["linux"]["rootfsPropagation"] == "shared"
        engine.containers.remove("spread", force=True)
    finally:
        hostmounts.unmount(base / "sub")
        hostmounts.unmount(base)


def test_tmpfs_has_its_size_and_mode(ran: Callable[..., str]) -> None:
    mount = {"type": "tmpfs", "target": "/t", "tmpfs": {"size": "2m", "mode": "0700"}}
    assert ran("stat -c %a /t; df -k /t | tail -1 | awk '{print $2}'", volumes=[mount]) == "700\n2048\n"


# --- volumes --------------------------------------------------------------------------------------------------------


def test_an_empty_volume_gets_what_the_image_has_there(engine: Engine, ran: Callable[..., str]) -> None:
    ran("true", volumes=["copied:/data", "bare:/data2", {"source": "nocopy", "target": "/x"}, "plain:/declared:nocopy"])
    data = engine.volumes.path("copied")
    assert (data / "file").read_text() == "from the image\n" and stat.S_IMODE((data / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((data / "sub/tool").stat().st_mode) == 0o4755
    assert os.readlink(data / "out") == "/etc/passwd"  # as it is: not what it points to
    assert list(engine.volumes.path("plain").iterdir()) == []
    (data / "file").write_text("changed\n")
    assert ran("cat /data/file; rm -r /data/*", volumes=["copied:/data"]) == "changed\n"
    assert sorted(os.listdir(engine.store / "volumes" / "copied")) == ["data"]


def test_owner_and_mode_of_the_mount_point_come_along(engine: Engine, ran: Callable[..., str], tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    (root / "srv").mkdir(parents=True)
    os.chown(root / "srv", 12, 34)
    os.chmod(root / "srv", 0o2770)
    os.symlink("/", root / "host")
    from engine.attach import first_use

    volume = engine.volumes.create("owned")
    first_use(volume.path, root, "/srv")
    info = os.stat(volume.path)
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (12, 34, 0o2770)
    first_use(volume.path, root, "/host/etc")  # the root of the container, which has no etc
    assert list(volume.path.iterdir()) == []


def test_declared_and_anonymous_volumes_live_as_long_as_their_container(
    engine: Engine, ran: Callable[..., str]
) -> None:
    said = ran("cat /declared/given; echo kept >> /declared/given; echo x > /anon/y", volumes=["/anon"])
    assert said == "given\n"
    container = engine.containers.get("c0")
    names = {target: volumeusers.anonymous_name(container.id, target) for target in ("/declared", "/anon")}
    assert set(engine.volumes.names()) == set(names.values())
    assert engine.volumes.users(names["/declared"]) == ["c0"] and engine.volumes.get(names["/anon"]).labels
    with pytest.raises(Busy, match="c0"):
        engine.volumes.remove(names["/declared"])
    engine.containers.start("c0")
    assert engine.containers.wait("c0", 40) == 0
    assert (engine.volumes.path(names["/declared"]) / "given").read_text() == "given\nkept\nkept\n"
    assert ran("cat /declared/given; ls /anon", volumes_from=["c0:ro"]).endswith("kept\ny\n")
    assert engine.volumes.users(names["/anon"]) == ["c0", "c1"]
    assert ran("echo no > /anon/y", volumes_from=["c0:ro"], code=1) == ""
    engine.containers.remove("c2")
    engine.containers.remove("c1")
    engine.containers.remove("c0")
    assert engine.volumes.names() == []


def test_volumes_from_what_is_not_there_or_itself(engine: Engine, ran: Callable[..., str]) -> None:
    assert "ghost" in refused(engine, [], volumes_from=["ghost"]).reason
    assert "bad" in refused(engine, [], volumes_from=["bad"]).reason


def test_a_subpath_stays_in_its_volume(engine: Engine, ran: Callable[..., str]) -> None:
    data = engine.volumes.create("parts").path
    (data / "in").mkdir()
    (data / "in" / "f").write_text("inside\n")
    (data / "etc").mkdir()
    (data / "etc" / "hostname").write_text("of the volume\n")
    os.symlink("/etc", data / "out")
    part = lambda path, target: {"source": "parts", "target": target, "volume": {"subpath": path}}  # noqa: E731
    said = ran("cat /a/f /b/hostname /c", volumes=[part("in", "/a"), part("out", "/b"), part("in/f", "/c")])
    assert said == "inside\nof the volume\ninside\n"


def test_a_full_ext4_volume_is_full_and_goes_when_unused(engine: Engine, ran: Callable[..., str]) -> None:
    volume = engine.volumes.create("small", "ext4", {"size": "8m"})
    engine.containers.run(
        IMAGE,
        "writer",
        ["sh", "-c", "dd if=/dev/zero of=/v/big bs=1M count=20 || echo full > /v/../full; sleep 60"],
        volumes=["small:/v"],
    )
    eventually(lambda: (engine.containers.rootfs("writer") / "full").exists())
    assert engine.volumes.mounted(volume) and os.statvfs(volume.path).f_bavail < 1024
    with pytest.raises(Busy, match="writer"):
        engine.volumes.remove("small")
    assert ran("ls /v", volumes=["small:/v:ro"]) == "big\n"
    assert engine.volumes.mounted(volume)  # writer still has it
    engine.containers.remove("writer", force=True)
    eventually(lambda: not engine.volumes.mounted(volume))
    assert ran("ls /v; rm /v/big", volumes=["small:/v"]) == "big\n"
    eventually(lambda: not engine.volumes.mounted(volume))


def test_local_options_mount_a_tmpfs_and_a_directory(engine: Engine, tmp_path: Path, ran: Callable[..., str]) -> None:
    (tmp_path / "f").write_text("host\n")
    engine.volumes.create("ram", options={"type": "tmpfs", "device": "tmpfs", "o": "size=1m,uid=7,mode=0750"})
    engine.volumes.create("dir", options={"type": "none", "device": str(tmp_path), "o": "bind,ro"})
    engine.volumes.create("lost", options={"type": "none", "device": str(tmp_path / "gone"), "o": "bind"})
    said = ran(
        "stat -c '%u %a' /r; df -k /r | tail -1 | awk '{print $2}'; cat /d/f", volumes=["ram:/r:nocopy", "dir:/d"]
    )
    assert said == "7 750\n1024\nhost\n"
    assert ran("echo no > /d/f", volumes=["dir:/d"], code=1) == "" and (tmp_path / "f").read_text() == "host\n"
    error = refused(engine, ["lost:/l"])
    assert isinstance(error, NotFound) and error.at == str(tmp_path / "gone")
    for name in ("ram", "dir"):
        eventually(lambda name=name: not engine.volumes.mounted(engine.volumes.get(name)))


def test_an_nfs_volume_says_why_the_kernel_cannot(engine: Engine, ran: Callable[..., str]) -> None:
    engine.volumes.create(
        "far", options={"type": "nfs", "device": ":/export", "o": "addr=127.0.0.1,rw,soft,timeo=1,retrans=1"}
    )
    error = refused(engine, ["far:/n"])
    assert ":/export" in error.reason and error.hint
    assert not engine.volumes.mounted(engine.volumes.get("far"))
    engine.volumes.remove("far")


# --- copies ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy_tree(tmp_path: Path) -> Path:
    """One of everything a copy must keep."""
    root = tmp_path / "tree"
    (root / "d").mkdir(parents=True)
    with open(root / "sparse", "wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"middle")
    (root / "d" / "one").write_text("x")
    os.link(root / "d" / "one", root / "two")
    os.setxattr(root / "two", "user.note", b"kept")
    subprocess.run(["setfacl", "-m", "u:1234:r,d:u:77:rwx", root / "d"], check=True)
    os.symlink("/nowhere", root / "link")
    os.mkfifo(root / "pipe")
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.chown(root / "two", 5, 6)
    os.chmod(root / "two", 0o6711)
    os.utime(root / "two", ns=(1, 1_000_000_007))
    os.utime(root / "d", ns=(1, 2_000_000_003))
    return root


def same(one: Path, other: Path) -> None:
    for base, names, files in os.walk(one):
        for name in [*names, *files, "."]:
            a = Path(base) / name
            b = other / a.relative_to(one)
            left, right = os.lstat(a), os.lstat(b)
            for field in ("st_mode", "st_uid", "st_gid", "st_rdev", "st_mtime_ns"):
                assert getattr(left, field) == getattr(right, field), (a, field)
            if not stat.S_ISDIR(left.st_mode):
                assert (left.st_nlink, left.st_size) == (right.st_nlink, right.st_size), a
            if stat.S_ISREG(left.st_mode):
                assert a.read_bytes() == b.read_bytes() and right.st_blocks <= left.st_blocks + 16, a
            if stat.S_ISLNK(left.st_mode):
                assert os.readlink(a) == os.readlink(b)
            attributes = {
                key: os.getxattr(a, key, follow_symlinks=False) for key in os.listxattr(a, follow_symlinks=False)
            }
            assert attributes == {
                key: os.getxattr(b, key, follow_symlinks=False) for key in os.listxattr(b, follow_symlinks=False)
            }


def test_a_copy_keeps_everything(busy_tree: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    assert copy_tree(busy_tree, tmp_path / "copy") == (64 << 20) + 1
    same(busy_tree, tmp_path / "copy")


def test_a_filling_is_all_or_nothing(tmp_path: Path) -> None:
    data = tmp_path / "v" / "data"
    data.mkdir(parents=True)

    def fails(place: Path) -> None:
        (place / "half").write_text("x")
        raise OSError(errno.EIO, "no")

    with pytest.raises(OSError):
        volumefill.fill(data, fails)
    assert list(data.iterdir()) == [] and os.listdir(data.parent) == ["data"]
    (data.parent / volumefill.FILLING).mkdir()  # as a kill -9 leaves it
    (data.parent / volumefill.FILLING / "half").write_text("x")
    (data.parent / volumefill.FILLED).mkdir()
    (data.parent / volumefill.FILLED / "whole").write_text("y")
    volumefill.recover(data)
    assert os.listdir(data) == ["whole"] and os.listdir(data.parent) == ["data"]
    with pytest.raises(Busy, match="not empty"):
        volumefill.fill(data, lambda place: None)
    shutil.rmtree(data)

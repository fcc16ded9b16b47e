"""Volumes as archives: what goes out comes back, and what a hostile archive may not do."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from engine.errors import AlreadyExists, Damaged, EngineError, InvalidArgument, NotFound
from engine.jobs import Task
from engine.volumetar import export, unpack

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "tar"


def archive(path: Path, *members: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for info in members:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def member(
    name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", size: int = 0, mode: int = 0o644
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, size, mode
    return info


@pytest.fixture
def target(tmp_path: Path) -> Path:
    place = tmp_path / "outer" / "target"
    place.mkdir(parents=True)
    return place


def test_what_goes_out_comes_back(tmp_path: Path, target: Path) -> None:
    if os.geteuid():
        pytest.skip("owners and devices need root")
    data = tmp_path / "data"
    (data / "d" / "e").mkdir(parents=True)
    (data / "d" / "e" / "f").write_bytes(b"body\n" * 1000)
    (data / "d" / ".wh.name").write_text("a plain name here")
    os.link(data / "d" / "e" / "f", data / "hard")
    os.symlink("d/e", data / "soft")
    os.mkfifo(data / "pipe")
    os.mknod(data / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with open(data / "sparse", "wb") as file:
        file.seek(16 << 20)
        file.write(b"end")
    os.setxattr(data / "hard", "user.note", b"kept")
    os.chown(data / "d", 12, 34)
    os.chmod(data, 0o1777)
    os.utime(data / "d", ns=(0, 1_500_000_000_000_000_001))
    export(data, tmp_path / "out.tar", Task())
    with pytest.raises(AlreadyExists):
        export(data, tmp_path / "out.tar", Task())
    subprocess.run(["gzip", "-k", tmp_path / "out.tar"], check=True)
    unpack(tmp_path / "out.tar.gz", target, tmp_path, Task())
    for base, names, files in os.walk(data):
        for name in (*names, *files, "."):
            a = Path(base, name)
            b = target / a.relative_to(data)
            one, other = os.lstat(a), os.lstat(b)
            for field in ("st_mode", "st_uid", "st_gid", "st_rdev", "st_nlink", "st_mtime_ns"):
                assert getattr(one, field) == getattr(other, field), (a, field)
            if stat.S_ISREG(one.st_mode):
                assert a.read_bytes() == b.read_bytes()
    assert os.readlink(target / "soft") == "d/e" and os.getxattr(target / "hard", "user.note") == b"kept"
    assert os.stat(target / "sparse").st_blocks < 64
    assert os.path.samefile(target / "hard", target / "d/e/f")


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ([member("../out", size=1)], InvalidArgument),
        ([member("a/../../out", size=1)], InvalidArgument),
        ([member("link", tarfile.SYMTYPE, link=".."), member("link/out", size=1)], Damaged),
        ([member("link", tarfile.SYMTYPE, link="/tmp"), member("link/x/out", size=1)], Damaged),
        ([member("d", tarfile.SYMTYPE, link=".."), member("hard", tarfile.LNKTYPE, link="d/secret")], Damaged),
        ([member("hard", tarfile.LNKTYPE, link="../secret")], InvalidArgument),
        ([member("hard", tarfile.LNKTYPE, link="none")], Damaged),
        ([member("d", tarfile.DIRTYPE, mode=0o755), member("d", size=1)], Damaged),
        ([member("f", size=1), member("f", tarfile.DIRTYPE)], Damaged),
        ([member("f", size=1), member("f/x", size=1)], Damaged),
        ([member(".dutchman-filled/x", size=1)], InvalidArgument),
    ],
)
def test_nothing_leaves_the_volume(
    tmp_path: Path, target: Path, members: list[tarfile.TarInfo], kind: type[EngineError]
) -> None:
    (target.parent / "secret").write_text("secret")
    path = archive(tmp_path / "bad.tar", *members)
    with pytest.raises(kind):
        unpack(path, target, tmp_path, Task())
    assert sorted(os.listdir(target.parent)) == ["secret", "target"] and os.stat(target.parent / "secret").st_nlink == 1
    assert not os.path.lexists("/tmp/x/out")


def test_an_absolute_name_is_one_of_the_volume_and_a_link_stays_a_link(tmp_path: Path, target: Path) -> None:
    path = archive(
        tmp_path / "odd.tar",
        member("/etc/passwd", size=1),
        member("out", tarfile.SYMTYPE, link="/etc/passwd"),
        member("out", size=2),  # replaces the link, does not write through it
    )
    before = Path("/etc/passwd").read_bytes()
    unpack(path, target, tmp_path, Task())
    assert (target / "etc/passwd").read_bytes() == b"x" and (target / "out").read_bytes() == b"xx"
    assert Path("/etc/passwd").read_bytes() == before and not (target / "out").is_symlink()


def test_what_is_no_archive_is_named(tmp_path: Path, target: Path) -> None:
    (tmp_path / "junk").write_bytes(b"\x01junk" * 1000)
    bad = InvalidArgument
    for path, kind, word in (("none", NotFound, "no such"), (".", bad, "a tar file"), ("junk", bad, "with 01 6a 75")):
        with pytest.raises(kind, match=word):
            unpack(tmp_path / path, target, tmp_path, Task())
    assert os.listdir(target) == []


@pytest.mark.skipif(not FIXTURES.exists() and not os.environ.get("CI"), reason="the fixtures are not there")
def test_every_odd_archive_unpacks_or_is_refused(tmp_path: Path) -> None:
    """Whatever others found to break readers: within the volume, or an error; nothing beside it."""
    found = [path for path in sorted(FIXTURES.rglob("*")) if path.suffix == ".tar" and path.stat().st_size < 1 << 20]
    assert len(found) > 50
    outcomes = set()
    for number, path in enumerate(found):
        target = tmp_path / str(number) / "target"
        target.mkdir(parents=True)
        try:
            unpack(path, target, tmp_path, Task())
            outcomes.add("unpacked")
        except EngineError:
            outcomes.add("refused")
        except OSError as error:
            assert error.errno in (1, 22, 36, 95), (path, error)  # a name or xattr this file system does not take
        assert os.listdir(target.parent) == ["target"], path
    assert outcomes == {"unpacked", "refused"}

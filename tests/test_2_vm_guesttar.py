"""Archives of a guest's files: packed and unpacked by the agent's file verbs, against tar, and against what is hostile.

The agent is process 1 of namespaces here (agents.py), not of a guest; a hostile one is played.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import agents
import manyfiles
import pytest
from dutchman import wait_for

from engine.errors import Busy, Damaged, InvalidArgument, TooLarge
from engine.runtimes.vm import guestfiles, guesttar, protocol
from engine.runtimes.vm.guestfiles import GuestFiles
from engine.runtimes.vm.protocol import ATTR, Parser, ProtocolError, Side, Type, Values
from engine.volumetar import unpack_stream

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces without a user namespace need root")
BIG = 300_000
Says = Callable[[str, Values], dict[str, object] | int | None]


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[tuple[GuestFiles, Path]]:
    """Files of a guest, and where they are here."""
    root = tmp_path / "a/b/root"
    root.mkdir(parents=True)
    ours, theirs = socket.socketpair()
    process = agents.spawn(theirs)
    files = GuestFiles(root.parent / "agent.sock", lambda: ours)
    try:
        files.call("ROOT", {"name": "container", "path": root}, 60)
        yield files, root
    finally:
        files.close()
        process.wait(60)


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> Iterator[bytes]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    content = out.getvalue()
    return iter([content[at : at + 5000] for at in range(0, len(content), 5000)])


def info(name: str, type: bytes = tarfile.REGTYPE, **values: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mtime = type, 1000
    for key, value in values.items():
        setattr(member, key, value)
    return member


def variety(place: Path) -> None:
    """What there is in file systems."""
    manyfiles.make(place / "many", 150)
    (place / "big").write_bytes(os.urandom(BIG))
    (place / "empty").touch()
    os.link(place / "big", place / "many/other")
    os.mkfifo(place / "fifo", 0o640)
    os.mknod(place / "node", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (place / "böse\n name").write_text("x")
    (place / ("n" * 200)).symlink_to("y/" * 150)
    (place / "deep/er/est").mkdir(parents=True)
    os.setxattr(place / "empty", "user.kept", b"a\0b")
    os.setxattr(place / "deep", "user.kept", b"of a directory")
    os.chown(place / "empty", 70_000, 5)
    os.chown(place / ("n" * 200), 7, 8, follow_symlinks=False)
    for path in ("fifo", "node", "n" * 200, "deep/er", "deep", "empty"):
        os.utime(place / path, ns=(10**18 + 5, 10**18 + 5), follow_symlinks=False)


def known(place: Path) -> dict[str, object]:
    out: dict[str, object] = {}
    for path in sorted(place.rglob("*")):
        st = os.lstat(path)
        kind = stat.S_IFMT(st.st_mode)
        content: object = os.readlink(path) if kind == stat.S_IFLNK else st.st_rdev
        if kind == stat.S_IFREG:
            content = path.read_bytes()
        names = os.listxattr(path, follow_symlinks=False)
        xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in names if name != "security.selinux"}
        links = st.st_nlink if kind == stat.S_IFREG else 1
        out[str(path.relative_to(place))] = st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns, links, content, xattrs
    return out


def test_files_go_out_and_in_as_they_are(guest: tuple[GuestFiles, Path], tmp_path: Path) -> None:
    files, root = guest
    (root / "there").mkdir()
    variety(root / "there")
    with socket.socket(socket.AF_UNIX) as left_out:
        left_out.bind(f"/proc/self/fd/{(fd := os.open(root / 'there', os.O_RDONLY))}/sock")
        os.close(fd)
        packed = b"".join(guesttar.pack(files, b"there", b"x", plain=False))
    (root / "there/sock").unlink()
    before = known(root / "there")
    back = tmp_path / "back"
    back.mkdir()
    top = os.open(back, os.O_RDONLY | os.O_DIRECTORY)
    try:
        unpack_stream(iter([packed]), top, owners=True)
    finally:
        os.close(top)
    assert known(back / "x") == before
    (root / "new").mkdir()
    (root / "up").symlink_to("../../new")  # the way to it may lead through links
    guesttar.unpack(files, b"up", iter([packed]), owners=True, merge=False)
    assert known(root / "new/x") == before
    assert len(list(root.iterdir())) == 3
    with tarfile.open(fileobj=io.BytesIO(b"".join(guesttar.pack(files, b"there", b"y", plain=True)))) as plain:
        assert not [member for member in plain if member.islnk() or "SCHILY.xattr.user.kept" in member.pax_headers]
        assert plain.getmember("y/many/other").size == BIG
    with tarfile.open(fileobj=io.BytesIO(b"".join(guesttar.pack(files, b"there/big", b"one", plain=False)))) as one:
        assert [(member.name, member.size) for member in one] == [("one", BIG)]
    with pytest.raises(FileNotFoundError):
        next(guesttar.pack(files, b"nope", b"x", plain=False))


def test_what_is_there_is_replaced_or_kept(guest: tuple[GuestFiles, Path]) -> None:
    files, root = guest
    (root / "d").mkdir(mode=0o711)
    (root / "d/file").write_text("old")
    (root / "d/link").symlink_to("/d/file")
    os.utime(root / "d", ns=(5, 5))
    twice = [(info("d/file"), b"%d" % number) for number in range(20)]
    members = [(info("d", tarfile.DIRTYPE, mode=0o700), b""), (info("d/link", mode=0o755), b"a file now"), *twice]
    members += [(info("d/name", tarfile.LNKTYPE, linkname="d/file"), b""), (info("a/b/c"), b"of no member")]
    guesttar.unpack(files, b"", archive(*members), owners=False, merge=True)
    assert (root / "d/link").read_text() == "a file now" and not (root / "d/link").is_symlink()
    assert (root / "d/file").read_text() == (root / "d/name").read_text() == "19"
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o711
    guesttar.unpack(files, b"", archive(*members), owners=False, merge=False)
    assert ((root / "d").stat().st_mode & 0o7777, (root / "d").stat().st_mtime) == (0o700, 1000)
    assert (root / "a/b/c").read_text() == "of no member"
    sparse = b"".join(archive((info("x"), b"")))
    guesttar.unpack(files, b"d", iter([sparse]), owners=True, merge=False)
    assert (root / "d/x").stat().st_size == 0


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ([(info("../evil"), b"x")], InvalidArgument),
        ([(info("out/evil"), b"x")], Damaged),
        ([(info("l", tarfile.SYMTYPE, linkname=".."), b""), (info("l/evil"), b"x")], Damaged),
        ([(info("name", tarfile.LNKTYPE, linkname="out/secret"), b"")], Damaged),
        ([(info("out", tarfile.DIRTYPE), b"")], Damaged),
        ([(info("dir"), b"a file where a directory is")], Damaged),
        ([(info("dir/deep/file"), b"1"), (info("dir/deep/file/more"), b"2")], Damaged),
        ([(info("name", tarfile.LNKTYPE, linkname="nowhere"), b"")], FileNotFoundError),
    ],
)
def test_an_archive_leads_nowhere_else(
    guest: tuple[GuestFiles, Path], members: list[tuple[tarfile.TarInfo, bytes]], kind: type[Exception]
) -> None:
    files, root = guest
    (root / "to/dir").mkdir(parents=True)
    (root / "secret").write_text("s")
    (root / "to/out").symlink_to("..")
    with pytest.raises(kind):
        guesttar.unpack(files, b"to", archive(*members), owners=True, merge=False)
    assert {path.name for path in root.iterdir()} == {"to", "secret"}
    files.call("STAT", {"path": b"to"})  # and the connection is as good as before


class Liar:
    """Answers what it is asked by `says`; to what that does not answer, with the attributes of a directory."""

    def __init__(self, says: Says) -> None:
        self.ours, self._connection = socket.socketpair()
        self._says = says
        hello = protocol.pack_words([b"version=%d" % protocol.VERSION])
        self._connection.sendall(protocol.frame(Type.HELLO, 0, hello))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        parser = Parser(Side.HOST)
        while data := self._connection.recv(1 << 18):
            for frame in parser.feed(data):
                said = self._says(*protocol.parse_request(frame.payload))
                number, words = (said, {}) if isinstance(said, int) else (0, said or {"attr": attr(stat.S_IFDIR)})
                payload = protocol.response(number, words)  # type: ignore[arg-type]
                self._connection.sendall(protocol.frame(Type.RESP, frame.stream, payload))


def guest_of(place: Path, says: Says) -> GuestFiles:
    liar = Liar(says)
    return GuestFiles(place / "a/b/agent.sock", lambda: liar.ours)


def attr(kind: int, size: int = 0, ino: int = 1) -> bytes:
    return ATTR.pack(kind | 0o755, 1, 0, 0, 0, 0, 1, ino, size, 0, 0, 0, 0)


def lists(*entries: bytes) -> Says:
    return lambda verb, values: {"entry": list(entries)} if verb == "LIST" else None


LIES: dict[str, Says] = {
    "twice": lists(attr(stat.S_IFREG) + b"x", attr(stat.S_IFREG) + b"x"),
    "above": lists(attr(stat.S_IFDIR) + b".."),
    "a path": lists(attr(stat.S_IFREG) + b"a/b"),
    "no kind": lists(attr(0o30000) + b"x"),
    "a directory opened": lists(attr(stat.S_IFREG, 5) + b"x"),
    "an empty link": lambda verb, values: (
        {"entry": attr(stat.S_IFLNK) + b"x"} if verb == "LIST" else {"target": b""} if verb == "READLINK" else None
    ),
    "no end": lambda verb, values: {"handle": b"7"} if verb == "LIST" else None,
    "too much": lambda verb, values: (
        {"entry": attr(stat.S_IFREG, 5) + b"x"}
        if verb == "LIST"
        else {"attr": attr(stat.S_IFREG, 5), "data": bytes(protocol.EARLY + 1)}
        if verb == "OPEN"
        else None
    ),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_what_a_hostile_guest_tells_is_refused(tmp_path: Path, lie: str) -> None:
    files = guest_of(tmp_path, LIES[lie])
    try:
        with pytest.raises(ProtocolError):
            list(guesttar.pack(files, b"", b"x", plain=True))
    finally:
        files.close()


def test_a_listing_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guestfiles, "MAX_ENTRIES", 1000)
    closed: list[bytes] = []
    entries = [attr(stat.S_IFREG, 5, number) + b"f%d" % number for number in range(100)]
    more: list[dict[str, object]] = [{"handle": b"7"}, {"handle": b"7", "entry": entries}]

    def says(verb: str, values: Values) -> dict[str, object] | None:
        closed.extend(values.all("done"))
        return more[-1] if verb == "LIST" else None

    files = guest_of(tmp_path, says)
    try:
        with pytest.raises(TooLarge):
            list(files.list("container", b"d"))
        assert next(files.list("container", b"d"))[0] == b"f0"
        wait_for(lambda: closed == [b"7", b"7"], 30)
        more.pop()
        with pytest.raises(ProtocolError):
            list(files.list("container", b"d"))
    finally:
        files.close()


def test_values_of_xattrs_are_not_asked_for_all_at_once(tmp_path: Path) -> None:
    names = b"".join(b"\0user.%d" % number for number in range(60))
    many = [attr(stat.S_IFIFO, 0, number) + b"f%d" % number + names for number in range(10)]
    under_way: list[int] = []

    def says(verb: str, values: Values) -> dict[str, object] | None:
        if verb == "GETXATTR":
            under_way.append(len(files._client._streams))  # type: ignore[union-attr]
            return {"value": b"v" * 2000}
        return {"entry": many} if verb == "LIST" else None

    files = guest_of(tmp_path, says)
    try:
        packed = b"".join(guesttar.pack(files, b"", b"x", plain=False))
        with tarfile.open(fileobj=io.BytesIO(packed)) as made:
            kept = [len([key for key in member.pax_headers if "xattr" in key]) for member in made]
        assert kept == [0] + [60] * 10
        assert max(under_way) < 200
        many[0] += names.replace(b"r.", b"r.x")
        with pytest.raises(TooLarge):  # for who reads the archive
            list(guesttar.pack(files, b"", b"x", plain=False))
    finally:
        files.close()


def test_archives_that_nobody_reads_on_leave_room_for_other_calls(tmp_path: Path) -> None:
    files = guest_of(tmp_path, lists(*(attr(stat.S_IFIFO, 0, number) + b"f%d" % number for number in range(9))))
    begun = [guesttar.pack(files, b"", b"x", plain=True) for _ in range(guestfiles.PIPELINES)]
    try:
        for each in begun:
            next(each)
        with pytest.raises(Busy):
            next(guesttar.pack(files, b"", b"x", plain=True))
        files.call("STAT", {"path": b"f1"})
        begun.pop().close()
        assert b"".join(guesttar.pack(files, b"", b"x", plain=True))
    finally:
        for each in begun:
            each.close()
        files.close()


def test_what_vanishes_is_left_out_and_handles_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesttar, "MOST", 2)
    given: list[bytes] = []
    closed: list[bytes] = []

    def says(verb: str, values: Values) -> dict[str, object] | int | None:
        closed.extend(values.all("done"))
        if verb == "LIST":
            return {"entry": [attr(stat.S_IFREG, 5, number) + b"f%d" % number for number in range(1, 9)]}
        if verb == "OPEN" and values.text("path") == "f2":
            return errno.ENOENT
        if verb == "OPEN" and values.text("path") == "f3":  # it has grown, and is not small any more
            given.append(b"%d" % (len(given) + 70))
            return {"attr": attr(stat.S_IFREG, BIG), "handle": given[-1]}
        if verb == "OPEN":
            return {"attr": attr(stat.S_IFREG, 5), "data": b"four"}
        return {"data": bytes(values.number("size"))} if verb == "READ" else None

    files = guest_of(tmp_path, says)
    try:
        with tarfile.open(fileobj=io.BytesIO(b"".join(guesttar.pack(files, b"", b"x", plain=True)))) as made:
            sizes = {member.name: member.size for member in made}
        assert sizes == {"x": 0, "x/f1": 4, "x/f3": BIG} | {f"x/f{number}": 4 for number in range(4, 9)}
        wait_for(lambda: set(given) <= set(closed), 30)
    finally:
        files.close()
    assert len(given) == 2

"""Files of a guest: the client against an agent played here over a directory, mute and hostile ones included."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from dutchman import wait_for

from engine.errors import DeadlineExceeded, Unreachable
from engine.runtimes.vm import beliefs, guestfiles, protocol, scratch
from engine.runtimes.vm.guestfiles import GuestFiles
from engine.runtimes.vm.protocol import ATTR, Parser, Side, Type, Values
from fdfs.guest import GuestGraft, OpenFile

START = 12 << 20


class Agent:
    """Serves the directory `root` as the agent does, one request at a time."""

    def __init__(self, root: Path, connection: socket.socket) -> None:
        self.root, self.connection = root, connection
        self.mute = threading.Event()
        self.full = threading.Event()
        self.asked: list[str] = []
        self.page = 100  # entries of one LIST
        self.name = b""  # added to what is listed
        self._fds: dict[int, int] = {}
        self._lists: dict[int, list[bytes]] = {}
        self.disk = root.parent / "vm" / scratch.NAME  # what lies at START of the machine's disk
        self.wrong: dict[str, bytes | int] = {}  # words of a WRITE's answer
        self.pieces: list[int] = []  # bytes of each WRITE from the disk
        self._next = 7
        connection.sendall(protocol.frame(Type.HELLO, 0, _words(version=protocol.VERSION)))
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        parser = Parser(Side.HOST)
        while data := self.connection.recv(1 << 18):
            for frame in parser.feed(data):
                verb, values = protocol.parse_request(frame.payload)
                self.asked.append(verb)
                if self.mute.is_set():
                    continue
                try:
                    payload = protocol.ERRNO.pack(0) + self._do(verb, values)
                except OSError as error:
                    payload = protocol.response(error.errno or errno.EIO, {"step": verb})
                self.connection.sendall(protocol.frame(Type.RESP, frame.stream, payload))

    def _path(self, values: Values, key: str = "path") -> bytes:
        return os.path.join(os.fsencode(self.root), values.need(key))

    def _attr(self, at: bytes | int) -> bytes:
        st = os.fstat(at) if isinstance(at, int) else os.lstat(at)
        return ATTR.pack(
            st.st_mode, st.st_nlink, st.st_uid, st.st_gid, os.major(st.st_rdev), os.minor(st.st_rdev), st.st_dev,
            st.st_ino, st.st_size, st.st_blocks, st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns,
        )  # fmt: skip

    def _told(self, at: bytes | int) -> bytes:
        return _words(attr=self._attr(at), names=b"user.one")

    def _folder(self, path: bytes) -> bytes:
        st = os.stat(path)
        return struct.pack("<2q", st.st_mtime_ns, st.st_ctime_ns)

    def _entry(self, values: Values, act: Callable[[], None]) -> bytes:
        folder = os.path.dirname(self._path(values))
        before = self._folder(folder)
        act()
        return _words(folder=before + self._folder(folder))

    def _laid(self, values: Values, key: str) -> bytes:
        with open(self.disk, "rb") as disk:
            disk.seek(values.number(key) - START)
            return disk.read(values.number("size"))

    def _do(self, verb: str, values: Values) -> bytes:
        for done in values.all("done"):
            os.close(self._fds.pop(int(done)))
        handle = values.get("handle")
        fd = self._fds.get(int(handle), -1) if handle is not None else -1
        if verb in ("CLOSE", "ROOT"):
            if fd >= 0:
                os.close(self._fds.pop(int(handle or b"")))
            return b""
        if verb == "STAT":
            return self._told(fd if handle is not None else self._path(values))
        if verb == "LIST":
            if handle is not None:
                names = self._lists.pop(int(handle))
            else:
                folder = self._folder(self._path(values))
                names = sorted(os.listdir(self._path(values)))
                self._listed = self._path(values)
            now, later = names[: self.page], names[self.page :]
            out = [b"entry=" + self._attr(os.path.join(self._listed, name)) + name + b"\0user.one" for name in now]
            if self.name:
                out.append(b"entry=" + self._attr(self._listed) + self.name)
            if later:
                self._next += 1
                self._lists[self._next] = later
                out.append(b"handle=%d" % self._next)
            elif handle is None:
                out.append(b"folder=" + folder + self._folder(self._listed))
            return protocol.pack_words(out)
        if verb == "OPEN":
            letters = values.text("flags")
            flags = os.O_RDWR if "w" in letters else os.O_RDONLY
            flags |= (os.O_TRUNC if "t" in letters else 0) | (os.O_CREAT if "c" in letters else 0)
            path = self._path(values)
            new, before = not os.path.lexists(path), self._folder(os.path.dirname(path))
            opened = os.open(path, flags | os.O_NOFOLLOW, int(values.text("mode", "644"), 8))
            self._next += 1
            self._fds[self._next] = opened
            size, early = os.fstat(opened).st_size, values.text("early")
            told = _words(handle=self._next) + self._told(opened)
            if early and size <= int(early):
                told += _words(data=os.pread(opened, size, 0))
            return told + (_words(folder=before + self._folder(os.path.dirname(path))) if new else b"")
        if verb == "READ":
            return _words(data=os.pread(fd, values.number("size"), values.number("offset")))
        if verb == "WRITE" and self.full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if verb == "SCRATCH":
            return _words(data=self._laid(values, "at"))
        if verb == "WRITE":
            data = values.get("data")
            if data is None:
                data = self._laid(values, "from")
                self.pieces.append(len(data))
            size = os.pwrite(fd, data, values.number("offset"))
            return _words(**{"size": size, "attr": self._attr(fd), **self.wrong})
        if verb == "TRUNCATE":
            os.truncate(fd if handle is not None else self._path(values), values.number("size"))
            return b"" if handle is not None else self._told(self._path(values))
        if verb == "READLINK":
            return _words(target=os.readlink(self._path(values)))
        if verb == "UNLINK":
            return self._entry(values, lambda: os.unlink(self._path(values)))
        if verb == "MKDIRAT":
            made = self._entry(values, lambda: os.mkdir(self._path(values), int(values.text("mode"), 8)))
            return made + self._told(self._path(values))
        if verb == "RENAME":
            os.rename(self._path(values), self._path(values, "to"))
        elif verb == "CHMOD":
            os.chmod(self._path(values), int(values.text("mode"), 8))
            return self._told(self._path(values)) + self._entry(values, lambda: None)
        elif verb == "LISTXATTR":
            return _words(name=b"user.one")
        elif verb == "GETXATTR":
            return _words(value=b"1")
        elif verb not in ("FSYNC", "UTIMENS"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return b""


def _words(**values: bytes | int) -> bytes:
    return protocol.pack_words([key.encode() + b"=" + protocol.to_bytes(value) for key, value in values.items()])


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[tuple[Agent, GuestFiles, GuestGraft, Path]]:
    root = tmp_path / "root"
    root.mkdir()
    ours, its = socket.socketpair()
    played = Agent(root, its)
    files = GuestFiles(tmp_path / "run/vm/agent.sock", connect=lambda: ours)
    yield played, files, GuestGraft(files, "container", writable=True), root
    files.close()
    ours.close()  # of who never connected
    played.thread.join()
    its.close()


def missing(graft: GuestGraft, path: bytes) -> bool:
    with pytest.raises(OSError) as caught:
        graft.getattr(path)
    return caught.value.errno == errno.ENOENT


Parts = tuple[Agent, GuestFiles, GuestGraft, Path]


def test_files_are_read_and_written(agent: Parts) -> None:
    _, _, graft, root = agent
    handle = graft.change("create", b"new", 0o640, os.O_RDWR | os.O_CREAT, 0o022)
    content = os.urandom(300_000)  # more than one call takes
    assert handle.write(content, 0) == len(content)
    assert handle.read(len(content) + 10, 0) == content
    handle.truncate(5)
    assert handle.attr().size == 5
    handle.close()
    assert (root / "new").read_bytes() == content[:5]
    assert stat.S_IMODE(graft.getattr(b"new").mode) == 0o640
    graft.change("mkdir", b"d", 0o755, 0o022)
    graft.change("rename", b"new", b"d/moved")
    assert (root / "d/moved").exists()
    assert missing(graft, b"new")
    graft.change("unlink", b"d/moved")
    assert graft.readdir(b"d") == []
    assert graft.listxattr(b"d") == [b"user.one"]
    assert graft.getxattr(b"d", b"user.one") == b"1"
    with pytest.raises(OSError, match="No data"):
        graft.getxattr(b"d", b"security.capability")


def test_a_listing_brings_attributes_and_what_is_changed_is_asked_for_again(agent: Parts) -> None:
    played, _, graft, root = agent
    for number in range(250):
        (root / f"{number:03}").write_bytes(b"x" * number)
    assert len(graft.readdir(b"")) == 250  # in pages
    before = len(played.asked)
    assert [graft.getattr(b"%03d" % number).size for number in range(250)] == list(range(250))
    assert len(played.asked) == before
    graft.change("chmod", b"100", 0o600)
    assert stat.S_IMODE(graft.getattr(b"100").mode) == 0o600
    handle = graft.open(b"101", os.O_WRONLY)
    handle.write(b"y" * 500, 0)
    assert graft.getattr(b"101").size == 500
    handle.close()


def test_a_big_file_is_written_behind_and_read_ahead(agent: Parts) -> None:
    played, _, graft, root = agent
    content = os.urandom(3 << 20)
    handle = graft.change("create", b"big", 0o644, os.O_RDWR | os.O_CREAT)
    for offset in range(0, len(content), 128 << 10):
        assert handle.write(content[offset : offset + (128 << 10)], offset) == 128 << 10
    assert graft.getattr(b"big").size == len(content)  # who asks waits until all is there
    out = b"".join(handle.read(128 << 10, offset) for offset in range(0, len(content) + 1, 128 << 10))
    assert out == content
    for offset in range(0, 2 << 20, 128 << 10):
        handle.write(bytes(128 << 10), offset)
    handle.flush()
    assert (root / "big").read_bytes()[: 2 << 20] == bytes(2 << 20)
    played.full.set()
    with pytest.raises(OSError, match="No space"):  # close(2) says what a write no longer could
        for offset in range(2 << 20, 3 << 20, 128 << 10):
            handle.write(bytes(128 << 10), offset)
        handle.flush()
    handle.close()


PIECE = 128 << 10


@pytest.fixture
def laid(agent: Parts, tmp_path: Path) -> Parts:
    """With a disk on which is laid down what the guest is to write."""
    for name in ("vm", "bundle"):
        (tmp_path / name).mkdir()
    scratch.make(tmp_path / "vm" / scratch.NAME)
    (tmp_path / "bundle/vm.json").write_text(json.dumps({scratch.NAME: START}))
    return agent


def fill(handle: OpenFile, content: bytes, begin: int = 0) -> None:
    for offset in range(0, len(content), PIECE):
        part = content[offset : offset + PIECE]
        assert handle.write(part, begin + offset) == len(part)


def test_what_is_written_is_laid_down_on_a_disk_of_the_guest(laid: Parts) -> None:
    played, _, graft, root = laid
    content = os.urandom((20 << 20) + 777)
    handle = graft.change("create", b"big", 0o644, os.O_RDWR | os.O_CREAT)
    fill(handle, content)
    handle.flush()
    assert (root / "big").read_bytes() == content
    assert sum(played.pieces) >= len(content) - 777  # what is small may be sent
    fill(handle, content[: 3 << 20], 5)  # over what is there, and not from its beginning
    handle.fsync()
    assert (root / "big").read_bytes() == content[:5] + content[: 3 << 20] + content[(3 << 20) + 5 :]
    handle.close()


def test_what_comes_while_a_guest_is_busy_goes_with_the_next(laid: Parts) -> None:
    played, _, graft, root = laid
    content = os.urandom(17 * PIECE)
    handle = graft.change("create", b"big", 0o644, os.O_RDWR | os.O_CREAT)
    fill(handle, bytes(8 * PIECE))  # every write of a first MiB is waited for
    go_on = threading.Event()
    laid_down = played._laid
    played._laid = lambda values, key: (go_on.wait(60), laid_down(values, key))[1]  # type: ignore[method-assign]
    fill(handle, content, 8 * PIECE)
    go_on.set()
    handle.close()
    assert sorted(played.pieces)[-3:] == [PIECE, scratch.PIECE, scratch.PIECE]
    assert (root / "big").read_bytes() == bytes(8 * PIECE) + content


def test_two_files_are_written_at_once(laid: Parts) -> None:
    _, _, graft, root = laid
    contents = {name: os.urandom(6 << 20) for name in (b"a", b"b", b"c", b"d")}

    def bring(name: bytes, content: bytes) -> None:
        handle = graft.change("create", name, 0o644, os.O_RDWR | os.O_CREAT)
        fill(handle, content)
        handle.close()

    bringing = [threading.Thread(target=bring, args=item) for item in contents.items()]
    for each in bringing:
        each.start()
    for each in bringing:
        each.join()
    assert {name: (root / os.fsdecode(name)).read_bytes() for name in contents} == contents


@pytest.mark.parametrize("damage", ["another disk", "a verb nobody knows", "none was made"])
def test_a_guest_that_does_not_see_what_is_laid_down_is_sent_it(laid: Parts, damage: str, tmp_path: Path) -> None:
    played, _, graft, root = laid
    if damage == "another disk":
        played.disk = scratch.make(tmp_path / "other")
    elif damage == "a verb nobody knows":
        played.disk = tmp_path / "not there"  # OSError: as from an agent of before
    else:
        (tmp_path / "bundle/vm.json").write_text("{}")
    content = os.urandom(3 << 20)
    handle = graft.change("create", b"big", 0o644, os.O_RDWR | os.O_CREAT)
    fill(handle, content)
    handle.close()
    assert (root / "big").read_bytes() == content and not played.pieces


def test_a_piece_is_not_lent_again_before_the_guest_has_answered(laid: Parts) -> None:
    played, files, graft, _ = laid
    handle = graft.change("create", b"big", 0o644, os.O_RDWR | os.O_CREAT)
    handle.write(bytes(PIECE), 0)
    free = files.scratch._free
    assert len(free) == scratch.PIECES
    held = threading.Event()
    laid_down = played._laid
    played._laid = lambda values, key: (held.wait(60), laid_down(values, key))[1]  # type: ignore[method-assign]
    piece = files.scratch.lay(b"x" * PIECE)
    assert piece is not None and len(free) == scratch.PIECES - 1
    with pytest.raises(DeadlineExceeded):
        files.call("WRITE", {"handle": 8, "offset": 0, "from": piece.place, "size": PIECE}, 0.2, piece.release)
    assert len(free) == scratch.PIECES - 1  # the guest may still come to read it
    held.set()
    wait_for(lambda: len(free) == scratch.PIECES, 60)
    files._mute_until = 0.0
    # who is not asked at all has not got it either
    piece = files.scratch.lay(b"x" * PIECE)
    assert piece is not None
    files._mute_until = time.monotonic() + 60
    with pytest.raises(DeadlineExceeded):
        files.write(8, 0, piece)
    assert len(free) == scratch.PIECES
    files._mute_until = 0.0
    piece = files.scratch.lay(b"x" * PIECE)
    assert piece is not None
    files.scratch.renew()  # a new connection: pieces of the old one are nobody's
    assert not piece.add(b"more")
    piece.release()
    assert files.scratch.lay(b"x" * PIECE) is not None and len(files.scratch._free) == scratch.PIECES - 1


def test_why_a_disk_did_not_take_all_is_told_at_the_end(laid: Parts) -> None:
    played, _, graft, _ = laid
    handle = graft.change("create", b"big", 0o644, os.O_RDWR | os.O_CREAT)
    for wrong, expected in (
        ({"size": 10, "error": errno.EDQUOT}, errno.EDQUOT),
        ({"size": 10}, errno.EIO),
        ({"size": 10, "error": 0}, None),
        ({"size": 10, "error": 5000}, None),
        ({"size": (1 << 20) + 1}, None),
    ):
        fill(handle, bytes(PIECE * 9))  # the last are written behind
        played.wrong = wrong
        with pytest.raises((OSError, protocol.ProtocolError)) as caught:
            fill(handle, bytes(2 * PIECE), PIECE * 9)
            handle.flush()
        played.wrong = {}
        if expected is None:
            assert isinstance(caught.value, protocol.ProtocolError)
        else:
            assert isinstance(caught.value, OSError) and caught.value.errno == expected
        handle.flush()
    handle.close()


def test_a_file_that_is_brought_costs_no_more_calls_than_things_done_to_it(
    agent: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beliefs, "FRESH", 60.0)
    monkeypatch.setattr(guestfiles, "DONE_SECONDS", 60.0)
    played, _, graft, root = agent
    graft.change("mkdir", b"d", 0o755)
    for name in (b"d/a", b"d/b", b"d/c"):
        played.asked.clear()
        assert missing(graft, name)
        handle = graft.change("create", name, 0o644, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        assert handle.attr().size == 0
        assert graft.listxattr(name) == [b"user.one"]
        handle.write(b"content", 0)
        assert (handle.attr().size, graft.getattr(name).size) == (7, 7)
        graft.change("chmod", name, 0o600)
        assert graft.getattr(name).mode & 0o777 == 0o600
        handle.flush()
        handle.close()
        assert played.asked == ["OPEN", "WRITE", "CHMOD"]
    assert {name for name, _, _ in graft.readdir(b"d")} == {b"a", b"b", b"c"}
    for name in (b"d/a", b"d/b", b"d/c"):
        played.asked.clear()
        handle = graft.open(name, os.O_RDONLY)
        assert handle.read(4096, 0) == b"content"
        handle.close()
        graft.listxattr(name)
        assert played.asked == ["OPEN"]
    assert len(played._fds) == 1  # the others were closed by the calls that came after
    # what somebody else puts there is noticed with the next answer
    (root / "d/theirs").write_text("x")
    graft.change("chmod", b"d/a", 0o644)
    assert graft.getattr(b"d/theirs").size == 1


def test_what_is_read_at_once_is_not_what_was_there_before_a_write(agent: Parts) -> None:
    _, _, graft, root = agent
    (root / "f").write_bytes(b"before")
    reading, writing = graft.open(b"f", os.O_RDONLY), graft.open(b"f", os.O_WRONLY)
    assert reading.read(100, 0) == b"before"
    writing.write(b"after!!", 0)
    assert reading.read(100, 0) == b"after!!"
    graft.change("truncate", b"f", 2)
    assert reading.read(100, 0) == b"af"
    reading.close()
    writing.close()


def test_a_root_is_shown_while_its_guest_is_mute(agent: Parts) -> None:
    played, files, graft, root = agent
    root.chmod(0o700)
    number = graft.getattr(b"").ino  # and its attributes are asked for meanwhile
    end = time.monotonic() + 60
    while stat.S_IMODE(graft.getattr(b"").mode) != 0o700:
        assert time.monotonic() < end
        time.sleep(0.01)
    played.mute.set()
    with pytest.raises(DeadlineExceeded):
        files.call("STAT", {"path": b""}, 0.1)
    asked = len(played.asked)
    assert (graft.getattr(b"").ino, stat.S_IMODE(graft.getattr(b"").mode)) == (number, 0o700)
    assert graft.listxattr(b"") == [b"user.one"]
    assert len(played.asked) == asked


def test_a_removed_file_lives_while_it_is_open(agent: Parts) -> None:
    _, _, graft, root = agent
    (root / "f").write_bytes(b"content")
    handle = graft.open(b"f", os.O_RDONLY)
    hidden = b".fuse_hidden0000000100000001"
    graft.change("rename", b"f", hidden)
    assert list(root.iterdir()) == []  # nothing lies about in the guest
    assert handle.read(100, 0) == b"content"
    assert graft.getattr(hidden).size == 7
    graft.change("unlink", hidden)
    handle.close()
    assert missing(graft, hidden)


def test_a_mute_guest_times_out_once_and_then_at_once(agent: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    played, files, graft, root = agent
    (root / "f").write_bytes(b"content")
    assert graft.getattr(b"f").size == 7
    played.mute.set()
    with pytest.raises(DeadlineExceeded):
        files.call("STAT", {"root": "container", "path": b"f"}, 0.2)
    asked = len(played.asked)
    for _ in range(50):
        with pytest.raises(DeadlineExceeded):
            graft.getattr(b"f")
    assert len(played.asked) == asked  # it is not asked again for a moment
    monkeypatch.setattr(files, "_mute_until", 1.0)  # that is over: one asks, and the others do not wait with it

    def attempt() -> None:
        with pytest.raises(DeadlineExceeded):
            files.call("STAT", {"path": b"f"}, 2.0)

    trying = threading.Thread(target=attempt)
    trying.start()
    while len(played.asked) == asked:
        assert trying.is_alive()
        time.sleep(0.01)
    with pytest.raises(DeadlineExceeded, match="a moment ago"):
        graft.getattr(b"f")
    trying.join()
    played.mute.clear()
    monkeypatch.setattr(files, "_mute_until", 1.0)
    assert graft.getattr(b"f").size == 7 and files._mute_until == 0.0


@pytest.mark.parametrize("name", [b"..", b"a/b", b"\0nul", b"."])
def test_a_hostile_name_is_refused(agent: Parts, name: bytes) -> None:
    played, _, graft, _ = agent
    played.name = name
    with pytest.raises(protocol.ProtocolError, match="entry named"):
        graft.readdir(b"")


def test_a_machine_that_is_not_there(tmp_path: Path) -> None:
    files = guestfiles.Machines(tmp_path).of("abc", nullcontext)
    with pytest.raises(Unreachable):
        files.stat("container", b"f")
    assert stat.S_ISDIR(files.stat("container", b"").mode)  # whose parent is listed all the same

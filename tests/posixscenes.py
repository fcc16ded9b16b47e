"""Scenes of the POSIX cases: functions that do something in an empty directory and return what they saw, as JSON."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from typing import Any

from posixkit import ALICE, BOB, STAFF, USERS, answer, facts, libc, make, opened, user


def scene_unlinked_while_open() -> Any:
    os.mkdir("d")
    fd = os.open("d/f", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, b"kept")
    os.unlink("d/f")
    seen = [os.listdir("d"), os.fstat(fd).st_nlink, os.pread(fd, 10, 0).hex(), answer(lambda: os.stat("d/f"))]
    os.ftruncate(fd, 2)
    os.fchmod(fd, 0o640)
    os.utime(fd, ns=(7, 9))
    os.setxattr(fd, "user.late", b"1")
    st = os.fstat(fd)
    seen += [st.st_size, oct(st.st_mode), st.st_mtime_ns, os.listxattr(fd), os.write(fd, b"!")]
    os.close(fd)
    return [*seen, answer(lambda: os.rmdir("d"))]


def scene_directory_removed_below_an_open_file() -> Any:
    os.mkdir("d")
    fd = os.open("d/f", os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink("d/f")
    seen = [answer(lambda: os.rmdir("d")), os.write(fd, b"kept"), os.pread(fd, 10, 0).hex()]
    os.close(fd)
    return seen


def scene_renamed_over_while_open() -> Any:
    for name in "ab":
        with open(name, "w") as file:
            file.write(name)
    fd = os.open("b", os.O_RDONLY)
    os.link("b", "c")
    os.rename("a", "b")
    with open("b") as file:
        now = file.read()
    seen = [os.read(fd, 9).hex(), os.fstat(fd).st_nlink, now, sorted(os.listdir("."))]
    os.close(fd)
    return [*seen, os.stat("c").st_nlink]


def scene_open_directory_moves() -> Any:
    os.mkdir("d")
    fd = os.open("d/f", os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink("d/f")
    os.rename("d", "e")
    seen = [os.fstat(fd).st_nlink, os.write(fd, b"x"), os.listdir("e")]
    os.close(fd)
    return [*seen, os.listdir("e"), answer(lambda: os.rmdir("e"))]


def scene_link_counts() -> Any:
    open("f", "w").close()
    counts = []
    for number in range(5):
        os.link("f", f"l{number}")
        counts.append(os.stat("f").st_nlink)
    os.mkdir("d")
    for number in range(3):
        os.mkdir(f"d/{number}")
        counts.append(os.stat("d").st_nlink)
    os.unlink("l0")
    with open("l1", "w") as file:
        file.write("same")
    same = len({os.stat(name).st_ino for name in ("f", "l1", "l2")})
    with open("l2") as file:
        return [counts, os.stat("f").st_nlink, file.read(), same, os.stat("l4").st_size]


def scene_umask_and_modes() -> Any:
    seen = []
    for mask, mode in itertools.product((0, 0o022, 0o077, 0o777), (0o7777, 0o666, 0o640, 0)):
        before = os.umask(mask)
        try:
            name = f"{mask:o}-{mode:o}"
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, mode))
            os.mkdir(name + "d", mode)
            os.mknod(name + "n", stat.S_IFIFO | mode)
            seen.append([oct(os.stat(name + end).st_mode) for end in ("", "d", "n")])
        finally:
            os.umask(before)
    return seen


def scene_setgid_directory() -> Any:
    seen = []
    for who in USERS:
        os.mkdir(who)
        os.chown(who, 0, STAFF)
        os.chmod(who, 0o2777)
        with user(who):
            os.mkdir(f"{who}/d", 0o755)
            os.close(os.open(f"{who}/f", os.O_CREAT | os.O_WRONLY, 0o2775))
            os.symlink("x", f"{who}/l")
        seen.append(facts(who))
    os.mkdir("foreign")
    os.chown("foreign", 0, 61500)
    os.chmod("foreign", 0o2777)
    with user("bob"):
        os.close(os.open("foreign/f", os.O_CREAT | os.O_WRONLY, 0o2775))
        os.mkdir("foreign/d", 0o2755)
        seen.append(answer(lambda: os.chmod("foreign/f", 0o2755)))
    return [*seen, facts("foreign")]


def scene_set_id_bits_go() -> Any:
    seen = []
    for number, act in enumerate(
        (
            lambda fd: os.write(fd, b"x"),
            lambda fd: os.ftruncate(fd, 1),
            lambda fd: os.truncate("f", 1),
            lambda fd: os.close(os.open("f", os.O_WRONLY | os.O_TRUNC)),
            lambda fd: os.posix_fallocate(fd, 0, 100),
        )
    ):
        make("suid", "f", ALICE)
        with user("bob"):
            fd = os.open("f", os.O_RDWR)
            said = answer(lambda act=act, fd=fd: act(fd))  # type: ignore[misc]
            os.close(fd)
        seen.append([number, said, oct(os.stat("f").st_mode)])
        os.unlink("f")
    make("suid", "f", ALICE)
    os.chown("f", BOB, -1)
    return [*seen, oct(os.stat("f").st_mode)]


def scene_sticky() -> Any:
    os.mkdir("tmp")
    os.chmod("tmp", 0o1777)
    for name in ("a", "b", "c"):
        make("file", f"tmp/{name}", ALICE)
    with user("bob"):
        open("tmp/mine", "w").close()
        seen = [
            answer(lambda: os.unlink("tmp/a")),
            answer(lambda: os.rename("tmp/a", "tmp/z")),
            answer(lambda: os.rename("tmp/mine", "tmp/b")),
            answer(lambda: os.unlink("tmp/mine")),
        ]
    with user("alice"):
        seen += [answer(lambda: os.unlink("tmp/a")), answer(lambda: os.rename("tmp/b", "tmp/c"))]
    return [*seen, sorted(os.listdir("tmp"))]


def scene_groups() -> Any:
    os.mkdir("shared")
    os.chown("shared", 0, STAFF)
    os.chmod("shared", 0o770)
    seen = []
    for who in USERS:
        with user(who):
            seen.append(answer(lambda who=who: os.close(os.open(f"shared/{who}", os.O_CREAT | os.O_WRONLY, 0o640))))
            seen.append(answer(lambda who=who: os.chown(f"shared/{who}", -1, STAFF)))
            seen.append(answer(lambda who=who: os.chown(f"shared/{who}", -1, 61500)))
            seen.append(answer(lambda who=who: os.chmod(f"shared/{who}", 0o2750)))
    return [*seen, facts("shared")]


def scene_names() -> Any:
    seen = []
    for name in (b"n" * 255, b"n" * 256, b"\xff\xfe", "größe ☃".encode(), b"a\nb", b" ", b"-rf", b".fuse", b"." * 3):
        seen.append(answer(lambda name=name: os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600))))  # type: ignore[misc]
    deep = b"/".join([b"d" * 250] * 12)
    seen.append(answer(lambda: os.makedirs(deep)))
    seen.append(answer(lambda: os.stat(deep + b"/" + b"x" * 2000)))
    seen.append(answer(lambda: os.symlink("t" * 4095, "longlink")))
    seen.append(answer(lambda: len(os.readlink("longlink"))))
    seen.append(answer(lambda: os.symlink("t" * 4096, "longer")))
    return [*seen, sorted(name.hex() for name in os.listdir(b"."))]


def scene_append() -> Any:
    """8 processes append 200 lines each; every line is there, whole."""
    code = (
        "import os,sys\nfd=os.open('log',os.O_WRONLY|os.O_APPEND|os.O_CREAT,0o644)\n"
        "for n in range(200): os.write(fd,(sys.argv[1]*60+' %04d\\n'%n).encode())"
    )
    with_all = [subprocess.Popen([sys.executable, "-S", "-c", code, "abcdefgh"[number]]) for number in range(8)]
    ends = [process.wait() for process in with_all]
    with open("log") as file:
        lines = file.readlines()
    return [ends, len(lines), len(set(lines)), {len(line) for line in lines} == {66}]


def scene_writers() -> Any:
    """8 processes write their own blocks of one file, and read back what the others wrote."""
    with open("f", "wb") as file:
        file.truncate(8 * 64 * 4096)
    code = (
        "import os,sys\nn=int(sys.argv[1]);fd=os.open('f',os.O_RDWR)\n"
        "for b in range(64): os.pwrite(fd,bytes([65+n])*4096,(b*8+n)*4096)\nos.fsync(fd)"
    )
    with_all = [subprocess.Popen([sys.executable, "-S", "-c", code, str(number)]) for number in range(8)]
    ends = [process.wait() for process in with_all]
    with open("f", "rb") as file:
        content = file.read()
    right = all(content[block * 4096 : (block + 1) * 4096] == bytes([65 + block % 8]) * 4096 for block in range(512))
    return [ends, len(content), right]


def scene_races() -> Any:
    """8 threads create, exclusively, the same 50 names; each name has one winner. mkdir likewise."""
    won: list[int] = []

    def contend() -> None:
        for number in range(50):
            for call in (
                lambda: os.close(os.open(f"x{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)),  # noqa: B023
                lambda: os.mkdir(f"d{number}"),  # noqa: B023
            ):
                try:
                    call()
                except FileExistsError:
                    continue
                won.append(number)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [len(won), len(os.listdir("."))]


def scene_mmap() -> Any:
    with open("f", "wb+") as file:
        file.truncate(3 * 4096)
        with mmap.mmap(file.fileno(), 3 * 4096) as one, mmap.mmap(file.fileno(), 3 * 4096) as two:
            one[4096:4100] = b"mmap"
            seen = [bytes(two[4096:4100]).hex()]
            one.flush()
            seen.append(os.pread(file.fileno(), 4, 4096).hex())
            os.pwrite(file.fileno(), b"write", 0)
            seen.append(bytes(two[:5]).hex())
            os.unlink("f")
            two[8192:8196] = b"gone"
            two.flush()
            seen.append(os.pread(file.fileno(), 4, 8192).hex())
        with mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as private:
            seen.append(bytes(private[:5]).hex())
    return seen


def scene_sparse() -> Any:
    with open("f", "wb+") as file:
        file.seek(1 << 30)
        file.write(b"end")
    st = os.stat("f")
    with open("f", "rb") as file:
        return [st.st_size, st.st_blocks < 100, file.read(10).hex(), file.seek(-3, os.SEEK_END), file.read().decode()]


def scene_seek_hole() -> Any:
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(fd, b"x" * 65536, 1 << 20)
    os.ftruncate(fd, 1 << 22)
    os.fsync(fd)
    seen = [answer(lambda: os.lseek(fd, 0, os.SEEK_DATA)), answer(lambda: os.lseek(fd, 1 << 20, os.SEEK_HOLE))]
    os.close(fd)
    return seen


def scene_fallocate() -> Any:
    fd = os.open("f", os.O_RDWR | os.O_CREAT, 0o600)
    seen = [answer(lambda: os.posix_fallocate(fd, 0, 1 << 20)), os.fstat(fd).st_size, os.fstat(fd).st_blocks >= 2048]
    os.pwrite(fd, b"y" * (1 << 20), 0)
    for mode, offset, length in ((1, 0, 1 << 21), (3, 65536, 65536), (16, 0, 4096), (8, 0, 4096), (255, 0, 1)):
        # keep size; punch hole | keep size; zero range; collapse range; nonsense
        result = libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length))
        seen.append([mode, "ok" if result == 0 else errno.errorcode[ctypes.get_errno()], os.fstat(fd).st_size])
    seen.append([os.pread(fd, 4, 65536).hex(), os.pread(fd, 4, 200000).hex()])
    os.close(fd)
    read_only = os.open("f", os.O_RDONLY)
    seen.append(answer(lambda: os.posix_fallocate(read_only, 0, 10)))
    os.close(read_only)
    return seen


def scene_times() -> Any:
    open("f", "w").close()
    os.mkdir("d")
    seen = []
    for at, mt in ((1, 1_999_999_999), (0, 0), (2**33 * 10**9, 2**33 * 10**9 + 1)):
        os.utime("f", ns=(at, mt))
        seen.append([os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns])
    with user("bob"):
        seen.append(answer(lambda: os.utime("f")))
        seen.append(answer(lambda: os.utime("f", (1, 1))))
    os.chmod("f", 0o666)
    with user("bob"):
        seen.append(answer(lambda: os.utime("f")))
        seen.append(answer(lambda: os.utime("f", (1, 1))))
    seen.append(abs(time.time() - os.stat("f").st_mtime) < 60)
    _touch("f", None, 5)
    before = os.stat("f")
    _touch("f", 77, None)  # UTIME_OMIT for mtime
    seen.append([os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns == before.st_mtime_ns])
    os.utime("d", ns=(4, 4))
    open("d/new", "w").close()
    seen.append(os.stat("d").st_mtime_ns > 4)
    return seen


def _touch(name: str, atime: int | None, mtime: int | None) -> None:
    omit = (1 << 30) - 2
    pairs = [(0, omit) if value is None else divmod(value, 10**9) for value in (atime, mtime)]
    times = struct.pack("llll", *pairs[0], *pairs[1])
    if libc.utimensat(-100, os.fsencode(name), times, 0):
        raise OSError(ctypes.get_errno(), "utimensat")


def scene_ctime() -> Any:
    open("f", "w").close()
    os.mkdir("d")
    seen = []
    for call in (
        lambda: os.chmod("f", 0o600),
        lambda: os.chown("f", 1, 1),
        lambda: os.link("f", "g"),
        lambda: os.unlink("g"),
        lambda: os.rename("f", "h") or os.rename("h", "f"),
        lambda: os.truncate("f", 10),
        lambda: os.utime("f", (1, 1)),
        lambda: os.setxattr("f", "user.a", b"1"),
        lambda: os.access("f", os.R_OK),
        lambda: os.listxattr("f"),
    ):
        before = os.stat("f").st_ctime_ns
        time.sleep(0.012)
        call()
        seen.append(os.stat("f").st_ctime_ns > before)
    return seen


def scene_xattrs() -> Any:
    open("f", "w").close()
    os.mkdir("d")
    os.symlink("f", "l")
    seen = []
    for value in (b"", b"\0\xff" * 10, b"v" * 2000, b"v" * 70000):
        seen.append(answer(lambda value=value: os.setxattr("f", "user.v", value)))  # type: ignore[misc]
        seen.append(answer(lambda: len(os.getxattr("f", "user.v"))))
    seen += [
        answer(lambda: os.setxattr("f", "user.v", b"2", os.XATTR_CREATE)),
        answer(lambda: os.setxattr("f", "user.w", b"2", os.XATTR_REPLACE)),
        answer(lambda: os.setxattr("f", "user." + "n" * 250, b"2")),
        answer(lambda: os.setxattr("f", "user." + "n" * 251, b"2")),
        answer(lambda: os.setxattr("f", "nonsense.a", b"2")),
        answer(lambda: os.setxattr("f", "trusted.a", b"2")),
        answer(lambda: os.setxattr("l", "user.a", b"2", follow_symlinks=False)),
        answer(lambda: os.setxattr("l", "trusted.a", b"2", follow_symlinks=False)),
        answer(lambda: os.listxattr("l", follow_symlinks=False)),
        sorted(os.listxattr("f")),
    ]
    with user("bob"):
        seen += [
            answer(lambda: sorted(os.listxattr("f"))),
            answer(lambda: os.getxattr("f", "trusted.a")),
            answer(lambda: os.setxattr("f", "user.b", b"2")),
            answer(lambda: os.setxattr("f", "trusted.b", b"2")),
        ]
    return [*seen, answer(lambda: os.removexattr("f", "user.v")), answer(lambda: os.getxattr("f", "user.v"))]


def _acl(*entries: tuple[int, int, int]) -> bytes:
    """system.posix_acl_*: (tag, permissions, id): 1 owner, 2 user, 4 group, 8 named group, 16 mask, 32 others."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF


def scene_acl_stored() -> Any:
    open("f", "w").close()
    acl = _acl((1, 6, NOBODY), (2, 6, BOB), (4, 4, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY))
    os.setxattr("f", "system.posix_acl_access", acl)
    seen: list[Any] = [oct(os.stat("f").st_mode), os.getxattr("f", "system.posix_acl_access").hex()]
    os.chmod("f", 0o640)  # changes the mask
    seen.append(os.getxattr("f", "system.posix_acl_access").hex())
    seen.append(answer(lambda: os.setxattr("f", "system.posix_acl_access", b"rubbish")))
    os.removexattr("f", "system.posix_acl_access")
    return [*seen, os.listxattr("f"), oct(os.stat("f").st_mode)]


def scene_acl_default() -> Any:
    os.mkdir("d")
    acl = _acl((1, 7, NOBODY), (2, 7, BOB), (4, 5, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY))
    os.setxattr("d", "system.posix_acl_default", acl)
    os.chmod("d", 0o777)
    os.umask(0o027)
    try:
        os.mkdir("d/sub", 0o775)
        os.close(os.open("d/f", os.O_CREAT | os.O_WRONLY, 0o664))
        with user("alice"):
            os.close(os.open("d/g", os.O_CREAT | os.O_WRONLY, 0o666))
    finally:
        os.umask(0o022)
    keys = [(path, key) for path in ("d/sub", "d/f", "d/g") for key in sorted(os.listxattr(path))]
    return [facts("d"), [os.getxattr(*key).hex() for key in keys]]


def scene_acl_enforced() -> Any:
    make("file", "f", ALICE)
    os.setxattr(
        "f",
        "system.posix_acl_access",
        _acl((1, 6, NOBODY), (2, 6, BOB), (4, 0, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY)),
    )
    with user("bob"):
        return answer(lambda: opened(os.O_RDWR))


def scene_locks() -> Any:
    """Between two processes: flock, fcntl ranges, a closed descriptor, open file description locks."""
    with open("f", "w") as file:
        file.write("x" * 100)
    child = (
        "import fcntl,sys,errno\nf=open('f','r+')\n"
        "for line in sys.stdin:\n"
        "    try:\n        eval(line); print('ok',flush=True)\n"
        "    except OSError as e: print(errno.errorcode[e.errno],flush=True)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-S", "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(line: str) -> str:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write(line + "\n")
        other.stdin.flush()
        return other.stdout.readline().strip()

    exclusive = "fcntl.LOCK_EX|fcntl.LOCK_NB"
    with open("f", "r+") as here, open("f", "r+") as again:
        fcntl.flock(here, fcntl.LOCK_EX)
        seen = [answer(lambda: fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)), ask(f"fcntl.flock(f,{exclusive})")]
        fcntl.flock(here, fcntl.LOCK_UN)
        seen += [ask(f"fcntl.flock(f,{exclusive})"), answer(lambda: fcntl.flock(here, fcntl.LOCK_SH | fcntl.LOCK_NB))]
        seen += [ask("fcntl.flock(f,fcntl.LOCK_UN)")]
        fcntl.lockf(here, fcntl.LOCK_EX, 10, 0)
        seen += [ask(f"fcntl.lockf(f,{exclusive},10,5)"), ask(f"fcntl.lockf(f,{exclusive},10,10)")]
        seen += [answer(lambda: fcntl.lockf(here, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 12))]
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        kind, _, start, length, owner = struct.unpack("hhqqi4x", fcntl.fcntl(here, fcntl.F_GETLK, request))
        seen += [[kind, start, length, owner == other.pid]]
        seen += [answer(lambda: fcntl.lockf(again, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 2))]  # the same owner: no conflict
    seen += [ask(f"fcntl.lockf(f,{exclusive},10,0)")]  # closing any descriptor of the file let go of the lock
    assert other.stdin is not None
    other.stdin.close()
    return [*seen, other.wait()]


def scene_blocking_lock() -> Any:
    """A lock that is waited for comes when its holder lets go."""
    open("f", "w").close()
    code = (
        "import fcntl\nf=open('f','r+')\nprint('up',flush=True)\nfcntl.lockf(f,fcntl.LOCK_EX)\nprint('mine',flush=True)"
    )
    with open("f", "r+") as here:
        fcntl.lockf(here, fcntl.LOCK_EX)
        other = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        seen = [other.stdout.readline()]
        time.sleep(0.05)
        seen.append(str(other.poll()))
        fcntl.lockf(here, fcntl.LOCK_UN)
        seen.append(other.stdout.readline())
    return [*seen, other.wait()]


def scene_fifo_and_socket() -> Any:
    os.mkfifo("p")
    reader = subprocess.Popen(["cat", "p"], stdout=subprocess.PIPE)
    with open("p", "w") as file:
        file.write("through")
    seen: list[Any] = [reader.communicate()[0].decode()]
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("s")
        server.listen()
        client.connect("s")
        client.sendall(b"hello")
        seen.append(server.accept()[0].recv(5).decode())
    return [*seen, oct(os.stat("s").st_mode)]


def _renameat2(old: str, new: str, flags: int) -> str:
    result = libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags)
    return "ok" if result == 0 else errno.errorcode[ctypes.get_errno()]


def scene_renameat2() -> Any:
    for name in "ab":
        with open(name, "w") as file:
            file.write(name)
    seen = [_renameat2("a", "b", 1), _renameat2("a", "c", 1), _renameat2("b", "c", 2)]  # NOREPLACE twice, EXCHANGE
    return [*seen, sorted(os.listdir("."))]


def scene_tmpfile() -> Any:
    return answer(lambda: os.close(os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)))


def scene_append_flag_changes() -> Any:
    fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, b"one")
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"T")
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"end")
    os.close(fd)
    with open("f") as file:
        return file.read()


def scene_big_directory() -> Any:
    os.mkdir("d")
    for number in range(600):
        os.close(os.open(f"d/{number}", os.O_CREAT | os.O_WRONLY, 0o600))
    with os.scandir("d") as entries:  # removing while reading
        for entry in entries:
            os.unlink(entry.path)
    return [os.listdir("d"), answer(lambda: os.rmdir("d"))]


def scene_statfs() -> Any:
    st = os.statvfs(".")
    return [st.f_bsize, st.f_frsize, st.f_blocks, st.f_namemax, st.f_files]


def scene_directory_descriptor() -> Any:
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY | os.O_DIRECTORY)
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
    os.fsync(fd)
    seen = [os.listdir(fd)]
    os.unlink("f", dir_fd=fd)
    os.rmdir("d")
    seen.append(answer(lambda: os.close(os.open("f", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))))
    os.close(fd)
    return seen


def scene_executable() -> Any:
    with open("script", "w") as file:
        file.write("#!/bin/sh\necho ran\n")
    seen = [os.access("script", os.X_OK), answer(lambda: subprocess.run(["./script"]).returncode)]
    os.chmod("script", 0o755)
    return [*seen, os.access("script", os.X_OK), subprocess.run(["./script"], capture_output=True).stdout.decode()]


def scene_access() -> Any:
    seen = []
    for mode in (0o000, 0o100, 0o040, 0o004, 0o070, 0o777):
        make("file", f"f{mode:o}", ALICE)
        os.chown(f"f{mode:o}", ALICE, STAFF)
        os.chmod(f"f{mode:o}", mode)
        for who in USERS:
            with user(who):
                seen.append([os.access(f"f{mode:o}", bit) for bit in (os.R_OK, os.W_OK, os.X_OK)])
                seen.append(answer(lambda mode=mode: opened(os.O_RDONLY, name=f"f{mode:o}")))
    return seen

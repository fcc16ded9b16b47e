"""What a host may ask of the agent in a guest: every verb with its keys, and the options of a mount as Linux numbers.

Floor 2. Pure. The agent's side is guest/*.c; how verbs travel is in protocol.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# verb -> {key: what it means}. A key ending in * may repeat, one ending in ? may be absent. `->` has the answer's keys.
# Numbers are decimal text. Paths of set-up verbs are the guest's own (before any container); file verbs: see FILES.
SETUP: Mapping[str, Mapping[str, str]] = {
    "HELLO": {"->": "the words of HELLO again (after a restore)"},
    "CLOCK": {"ns": "the wall clock, ns since 1970", "slack?": "ns; a clock less wrong than that is left as it is"},
    "ENTROPY": {"seed": "up to 512 bytes credited to the kernel's generator, which is then reseeded"},
    "HOSTNAME": {"name": "of the guest and of containers run later"},
    "MOUNT": {
        "source?": "device, path or name",
        "target": "made with its parents when absent (a file where the source is a file of a bind)",
        "type?": "filesystem",
        "flags?": "MS_* numbers of Linux (see mount_flags)",
        "data?": "the filesystem's options",
    },
    "UMOUNT": {"target": "detached"},
    "MKDIR": {"path": "made with its parents", "mode?": "octal, 755"},
    "PUT": {"path": "of a small file, replaced whole", "data": "its content", "mode?": "octal, 644"},
    "PARTS": {"disk": "path of a block device", "part*": "NUMBER\\0START\\0LENGTH in bytes, multiples of 512"},
    "NET": {
        "iface": "name",
        "mac?": "aa:bb:cc:dd:ee:ff (the interface is down while it changes)",
        "mtu?": "bytes",
        "up?": "1",
        "addr*": "ADDRESS/PREFIX, IPv4 or IPv6",
        "gone*": "ADDRESS/PREFIX it has no longer, before others are added",
        "route*": "DESTINATION/PREFIX\\0GATEWAY[\\0METRIC]; 0.0.0.0/0, ::/0: the default; an empty gateway: on link",
    },
    "SYSCTL": {"set*": "NAME\\0VALUE, dots or slashes in the name"},
    "ROOT": {"name": "a root for the file verbs", "path": "a directory of the guest"},
    "RESET": {"disk*": "whose parts and cached blocks are dropped; as if there had been no RUN (which has ended)"},
    "SYNC": {},
    "POWEROFF": {"off?": "1: by ACPI or PSCI; absent: a reset, which ends a QEMU run with -no-reboot"},
}
PROCESSES: Mapping[str, Mapping[str, str]] = {
    "RUN": {
        "id": "name of the process",
        "rootfs": "the guest's directory that becomes /; a mount point",
        "argv*": "the program and its arguments",
        "env*": "NAME=VALUE; PATH finds the program",
        "cwd?": "made when absent; /",
        "uid?": "0",
        "gid?": "0",
        "group*": "supplementary",
        "umask?": "octal, 22",
        "caps?": "BOUNDING\\0EFFECTIVE\\0PERMITTED\\0INHERITABLE\\0AMBIENT, hexadecimal masks; absent: all for uid 0",
        "rlimit*": "RESOURCE\\0SOFT\\0HARD, numbers of Linux; -1 is infinity",
        "no_new_privs?": "1",
        "seccomp?": "a BPF program (struct sock_filter...) for the guest's architecture",
        "seccomp_flags?": "of seccomp(2), SECCOMP_SET_MODE_FILTER",
        "oom_score_adj?": "-1000..1000",
        "tty?": "1: a terminal; stderr is then part of it",
        "size?": "ROWS\\0COLUMNS",
        "stdin?": "1: DATA of the host; absent: /dev/null",
        "hostname?": "",
        "domainname?": "",
        "mount*": "SOURCE\\0TARGET\\0TYPE\\0FLAGS\\0DATA in order; TARGET in the container, made when absent",
        "device*": "PATH\\0MODE octal with its type\\0MAJOR\\0MINOR\\0UID\\0GID, beside the usual ones of /dev",
        "masked*": "path hidden in the container",
        "readonly*": "path read-only in the container",
        "readonly_rootfs?": "1",
        "sysctl*": "NAME\\0VALUE, set in the container's namespaces",
        "cgroup*": "FILE\\0VALUE of the container's cgroup v2 (memory.max, pids.max, cpu.max, ...)",
        "init?": "1: a reaper is process 1 and forwards signals",
        "->": "pid (the guest's number); all is set up and waits for START",
    },
    "START": {"id": "of a RUN; answered when the program was executed, or with why not"},
    "EXEC": {
        "id": "name of the session",
        "in": "id of the RUN whose namespaces and cgroup are joined",
        "->": "pid; started. Other keys as RUN: argv env cwd uid gid group umask caps rlimit no_new_privs seccomp"
        " seccomp_flags oom_score_adj tty size stdin",
    },
    "SIGNAL": {"id": "", "signal": "number", "group?": "1: its process group"},
    "KILLALL": {"signal?": "9; to every process of the container's cgroup"},
    "RESIZE": {"id": "", "rows": "", "columns": ""},
    "LIMITS": {"cgroup*": "as RUN"},
    "FREEZE": {
        "state": "1 frozen, 0 thawed; answered when it is so",
        "keep?": "for the relay alone: frozen also when its client goes away",
    },
    "STATS": {
        "->": "NAME=text of cgroup files (memory.current, cpu.stat, ...) and of uptime, loadavg, meminfo, net.dev"
    },
    "PS": {
        "->": "proc*: PID\\0INSIDE (its pid in the container)\\0PPID\\0UID\\0STATE\\0START ticks\\0CPU ticks"
        "\\0RSS bytes\\0THREADS\\0COMM\\0CMDLINE, its words joined by 0x1f; the guest's numbers",
    },
    "DIAL": {"port": "", "kind": "tcp (127.0.0.1, then ::1) | vsock (the guest's own)", "->": "the stream carries it"},
}
# Resolved in the guest by openat2(RESOLVE_IN_ROOT), the last name never followed. Each has `path` (from the root, may
# be empty: the root itself) and `root?` (container, the default; or a name given by ROOT), or `handle` where noted.
# Each may have `done*`: handles the host needs no more, closed before anything else. With an ATTR of a path comes
# `names?`, those of its xattrs, joined by NUL; with what makes, removes or changes an entry FOLDER: mtime and ctime of
# its directory in ns, before and after. Who finds them as they were left knows that no other entry came or went.
FILES: Mapping[str, Mapping[str, str]] = {
    "STAT": {"path": "or handle", "->": "attr: ATTR"},
    "LIST": {
        "path": "or handle of an earlier LIST",
        "->": "entry*: ATTR NAME [\\0 NAMES]; handle: there is more (CLOSE to give up); folder? (all came at once)",
    },
    "READLINK": {"path": "", "->": "target"},
    "OPEN": {
        "path": "a regular file",
        "flags": "letters: r, w, a append, t truncate, c create, x exclusive",
        "mode?": "octal, of a new file",
        "uid?": "of a new file",
        "gid?": "of a new file",
        "early?": "its content comes too when it is not longer, at most EARLY",
        "whole?": "1: no handle where its content came",
        "->": "handle?, attr, data?, folder? (of a new file)",
    },
    "READ": {"handle": "", "offset": "", "size": "at most BULK", "->": "data (short at the end)"},
    "SCRATCH": {
        "disk": "whose pieces WRITE takes",
        "at": "of a first one",
        "size": "of it",
        "->": "data: what is there",
    },
    "WRITE": {
        "handle": "",
        "offset": "",
        "data?": "at most BULK; or:",
        "from?": "where on SCRATCH's disk it lies, a multiple of 4096",
        "size?": "of what lies there, at most PIECE of scratch.py",
        "->": "size, attr, error? (an errno: why it is not all)",
    },
    "FSYNC": {"handle": "", "data?": "1: fdatasync"},
    "FALLOCATE": {"handle": "", "mode": "FALLOC_FL_*", "offset": "", "size": ""},
    "CLOSE": {"handle?": "", "all?": "1: every handle, for a new owner"},
    "TRUNCATE": {"path": "or handle", "size": "", "->": "attr (by path; so CHMOD CHOWN UTIMENS SETXATTR …)"},
    "MKNOD": {"path": "", "mode": "octal with type", "rdev_major?": "", "rdev_minor?": "", "uid?": "", "gid?": ""},
    "MKDIRAT": {"path": "", "mode": "octal", "uid?": "", "gid?": "", "->": "attr (also MKNOD, SYMLINK, LINK)"},
    "MAKE": {  # a member of an archive, in place of what is there but for a directory
        "at": "a directory, from which no link is followed",
        "path": "below it",
        "mode": "octal with type; a directory is left as it is where it is there",
        "uid?": "",
        "gid?": "",
        "mtime?": "of both times; so UTIMENS",
        "xattr*": "NAME\\0VALUE, of a file or with `dress`",
        "data?": "content of a file",
        "target?": "of a symlink",
        "link?": "below `at`: another name of it, whatever the mode says",
        "rdev_major?": "",
        "rdev_minor?": "",
        "dress?": "1: only mode, owner, time, xattrs of the file or directory that is there; without a path of `at`",
        "->": "made? (a directory that was not there)",
    },
    "UNLINK": {"path": ""},
    "RMDIR": {"path": ""},
    "RENAME": {"path": "", "to": "in the same root", "flags?": "RENAME_*"},
    "LINK": {"path": "", "to": ""},
    "SYMLINK": {"path": "", "target": "", "uid?": "", "gid?": ""},
    "CHMOD": {"path": "", "mode": "octal"},
    "CHOWN": {"path": "", "uid": "-1: kept", "gid": "-1: kept"},
    "UTIMENS": {"path": "", "atime?": "ns since 1970; now; absent: kept", "mtime?": ""},
    "GETXATTR": {"path": "", "name": "", "->": "value"},
    "LISTXATTR": {"path": "", "->": "name*"},
    "SETXATTR": {"path": "", "name": "", "value": "", "flags?": "XATTR_*"},
    "REMOVEXATTR": {"path": "", "name": ""},
    "STATFS": {"path": "", "->": "type bsize blocks bfree bavail files ffree namelen, numbers"},
}
VERBS: Mapping[str, Mapping[str, str]] = {**SETUP, **PROCESSES, **FILES}


# Linux's numbers (linux/mount.h), for hosts that have others: option -> (bits, set or clear)
_FLAGS = {
    "ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "remount": 32, "dirsync": 128, "noatime": 1024,
    "nodiratime": 2048, "bind": 4096, "rbind": 4096 | 16384, "silent": 32768, "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "private": 1 << 18, "rprivate": 1 << 18 | 16384, "slave": 1 << 19, "rslave": 1 << 19 | 16384,
    "shared": 1 << 20, "rshared": 1 << 20 | 16384,
}  # fmt: skip
_CLEARS = {
    "rw": 1, "suid": 2, "dev": 4, "exec": 8, "async": 16, "atime": 1024, "diratime": 2048, "norelatime": 1 << 21,
    "nostrictatime": 1 << 24, "defaults": 0,
}  # fmt: skip


def mount_flags(options: Iterable[str]) -> tuple[int, str]:
    """Options as mount(8) and the OCI spec have them -> (flags, data) for MOUNT and RUN's `mount`."""
    flags, data = 0, []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option in _CLEARS:
            flags &= ~_CLEARS[option]
        else:
            data.append(option)
    return flags, ",".join(data)

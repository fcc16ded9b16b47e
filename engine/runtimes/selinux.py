"""SELinux contexts of a container: of its processes, of its files, of what it shares with others. Floor 2, thread-safe.

Only here: what the host's policy has for containers, and the pair of categories that keeps each container from the
files of the others. Where SELinux is enabled and its policy knows the types, every container is confined, as Podman
does; where a policy lacks them (Debian 12's) containers are as without SELinux, unless a context is asked for.

A context is USER:ROLE:TYPE:LEVEL. Sources: selinuxfs (security_check_context(3)), selinux_config(5), the file
lxc_contexts of the policy (`process`, `file`), which libvirt, Docker and Podman read, too.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine import host, userids
from engine.config import ContainerConfig, Namespace
from engine.errors import InvalidArgument, Unsupported
from engine.options import security

log = logging.getLogger(__name__)

SELINUX = Path("/sys/fs/selinux")  # selinuxfs
ETC = Path("/etc/selinux")
PROCESS, FILE = "system_u:system_r:container_t:s0", "system_u:object_r:container_file_t:s0"  # container-selinux's
CATEGORIES = 1024  # c0 to c1023: what the policies of distributions have
ABSENT = "SELinux is not enabled on this host"
PERMISSIVE = 1  # of a decision's flags: what is denied to this type is done and logged
PARTS = ("user", "role", "type", "level")
_choosing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Labels:
    process: str = ""  # '': what the runtime runs as
    private: str = ""  # of files only this container may use; '': nothing is labelled
    shared: str = ""  # of files all containers may use
    note: str = ABSENT  # why nothing is labelled


def enabled() -> bool:
    return (SELINUX / "enforce").exists()


def known(context: str) -> bool:
    """Whether the loaded policy has such a context."""
    try:
        fd = os.open(SELINUX / "context", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, context.encode() + b"\0")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _ask(node: str, question: str) -> str:
    fd = os.open(SELINUX / node, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, question.encode())
        return os.read(fd, 4096).decode()
    finally:
        os.close(fd)


def enters(context: str, file: str) -> bool:
    """Whether the loaded policy lets programs with the context `file` be started in `context`; True where it is not
    enforced, or does not say (security_compute_av(3): "CONTEXT OBJECT CLASS" -> "ALLOWED DECIDED ... FLAGS", hex)."""
    try:
        if (SELINUX / "enforce").read_text().strip() != "1":
            return True
        kind = int((SELINUX / "class/file/index").read_text())
        bit = int((SELINUX / "class/file/perms/entrypoint").read_text()) - 1
        words = _ask("access", f"{context} {file} {kind}").split()
        allowed, flags = int(words[0], 16), int(words[5], 16)
    except (OSError, ValueError, IndexError) as error:
        log.warning("whether containers may be %s cannot be asked of SELinux: %s", context, error)
        return True
    return bool(allowed >> bit & 1 or flags & PERMISSIVE)


def defaults() -> tuple[str, str]:
    """(process, file): the contexts the policy has for containers, without categories."""
    try:
        config = (ETC / "config").read_text()
        kind = re.search(r"^\s*SELINUXTYPE\s*=\s*([\w.-]+)\s*$", config, re.M)
        text = (ETC / (kind[1] if kind else "targeted") / "contexts/lxc_contexts").read_text()
    except (OSError, UnicodeDecodeError):
        return PROCESS, FILE
    found = dict(re.findall(r'^\s*(process|file)\s*=\s*"?([^"\s]+)"?\s*$', text, re.M))
    return found.get("process", PROCESS), found.get("file", FILE)


def of_images() -> str:
    """The context of what images have, which every container reads and none writes to; '' where they get none."""
    if not enabled() or userids.rootless() is not None:
        return ""
    _, file = defaults()
    return file if known(file) else ""


def _levels() -> bool:
    """Whether contexts of the loaded policy have a fourth part."""
    try:
        return (SELINUX / "mls").read_text().strip() == "1"
    except OSError:
        return False


def _pairs(id: str) -> Iterator[str]:
    count = 0
    while True:
        number = int.from_bytes(hashlib.sha256(f"{id} {count}".encode()).digest()[:8])
        one, two = sorted((number % CATEGORIES, number // CATEGORIES % CATEGORIES))
        if one != two:
            yield f"c{one},c{two}"
        count += 1


def categories(directory: Path) -> str:
    """The pair of categories of the container whose directory this is: chosen once, and no other's in the store."""
    mine = directory / "categories"
    with _choosing:
        try:
            if text := mine.read_text().strip():
                return text
        except FileNotFoundError:
            pass
        taken = set()
        for other in directory.parent.glob("*/categories"):
            try:
                taken.add(other.read_text().strip())
            except FileNotFoundError:
                continue  # removed meanwhile
        found = next(pair for pair in _pairs(directory.name) if pair not in taken)
        host.write_atomic(mine, found.encode() + b"\n")
        return found


def _become(context: str) -> None:
    """What the programs this thread starts next run as (proc_pid_attr(5))."""
    fd = os.open("/proc/thread-self/attr/exec", os.O_WRONLY | os.O_CLOEXEC)  # no O_CREAT: the policy would refuse it
    try:
        os.write(fd, context.encode())
    finally:
        os.close(fd)


@contextmanager
def lowered() -> Iterator[None]:
    """What this thread starts meanwhile has no categories, as Podman starts conmon: pipes are of the level of who makes
    them, and a container may not write to those of a higher one than its own."""
    if not enabled():
        yield
        return
    own = Path("/proc/thread-self/attr/current").read_text().rstrip("\0\n")
    wanted = own.split(":", 3)
    try:
        _become(":".join([*wanted[:3], *(text.partition("-")[0] for text in wanted[3:])]))
    except OSError as error:
        log.warning("conmon stays at %s, so containers may not be able to write to it: %s", own, error)
        yield
        return
    try:
        yield
    finally:
        _become("\n")  # as it was


def label_file(path: Path, context: str) -> None:
    """A file of ours that a container gets. On a file system that keeps no contexts its mount's counts."""
    try:
        os.setxattr(path, "security.selinux", context.encode() + b"\0")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise


def _with(context: str, asked: dict[str, str], level: str) -> str:
    parts = dict(zip(PARTS, context.split(":", 3), strict=False)) | asked
    return ":".join([*(parts[part] for part in PARTS[:3]), *([level] if level else [])])


def of(directory: Path, config: ContainerConfig) -> Labels:
    """Of a run of the container whose directory this is. InvalidArgument for a context the policy does not have."""
    said = [text for text in security(config.security_opt).labels if text != "nested"]
    asked = dict(text.partition(":")[::2] for text in said if text != "disable")
    if not enabled():
        if asked:
            log.info("security_opt: label= has no effect: %s", ABSENT)
        return Labels()
    if userids.rootless() is not None:  # its image trees are plain files, which containers could not read then
        if asked:
            raise Unsupported(f"security_opt: label={said[0]}: not without root", at=f"label={said[0]}")
        return Labels(note="an engine without root gives no SELinux labels")
    process, file = defaults()
    level = ""
    if _levels():
        base = (process.split(":", 3)[3:] or ["s0"])[0]
        level = asked.get("level") or f"{base}:{categories(directory)}"
    types = {"type": asked["filetype"]} if "filetype" in asked else {}
    shared = _with(file, types, (file.split(":", 3)[3:] or ["s0"])[0] if level else "")
    private = _with(file, types, level)
    own = {key: value for key, value in asked.items() if key in PARTS[:3]}
    context = _with(process, own, level)
    open_ = config.privileged or Namespace.HOST in (config.pid, config.ipc)  # labels could not keep it apart
    if "disable" in said or (open_ and not asked):
        context = ""
    elif not known(context):
        if own or "level" in asked:
            raise _unknown(context, said)
        log.info("containers are not confined by SELinux: its policy has no context %s", context)
        context = ""
    if not known(private):
        if types or (context and "level" in asked):
            raise _unknown(private, said)
        return Labels(context, note=f"this host's SELinux policy has no context {shared}")
    if context and own and not enters(context, private):  # else it would end at once, and not say why
        raise InvalidArgument(
            f"security_opt: label={said[0]}: this host's SELinux policy lets no {context} be started from {private}",
            at=f"label={said[0]}",
            hint="a filetype: it may be started from, or label=disable",
        )
    return Labels(context, private, shared, "")


def _unknown(context: str, said: list[str]) -> InvalidArgument:
    return InvalidArgument(
        f"security_opt: label={said[0]}: this host's SELinux policy has no context {context}",
        at=f"label={said[0]}",
        hint="seinfo -t, -r and -u list what it has; label=disable does without",
    )

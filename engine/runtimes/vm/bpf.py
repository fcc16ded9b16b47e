"""A seccomp profile as the program the kernel runs: compiled on the host for a guest, by libseccomp as runc does.

Floor 2. Only here: libseccomp's C interface, by ctypes. `compile_profile` is stateless and thread-safe.
Source: libseccomp's seccomp.h; runtime-spec config-linux.md#seccomp; runc's libcontainer/seccomp for what it passes.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from typing import Any

from engine.errors import InvalidArgument, RuntimeFailure, Unsupported

ARCHITECTURES = {
    "SCMP_ARCH_X86_64": 0xC000003E,
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_X32": 0x4000003E,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
    "SCMP_ARCH_ARM": 0x40000028,
}
NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
OPERATORS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
EPERM, EEXIST = 1, 17  # Linux's
UNKNOWN = -1  # __NR_SCMP_ERROR
OPTIMIZE, TREE = 8, 2  # SCMP_FLTATR_CTL_OPTIMIZE (libseccomp 2.5), and its value for a binary tree


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


@cache
def _library() -> ctypes.CDLL:
    for name in ("libseccomp.so.2", "libseccomp.2.dylib"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.seccomp_init.restype = ctypes.c_void_p
        library.seccomp_init.argtypes = [ctypes.c_uint32]
        library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
        library.seccomp_release.argtypes = [ctypes.c_void_p]
        library.seccomp_arch_native.restype = ctypes.c_uint32
        library.seccomp_arch_add.argtypes = library.seccomp_arch_remove.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
        library.seccomp_rule_add_array.argtypes = [
            ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare)
        ]  # fmt: skip
        library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
        return library
    hint = "apt-get install libseccomp2, or security_opt seccomp=unconfined"
    raise Unsupported("libseccomp is not installed", hint=hint)


def _action(name: str, errno: int | None) -> int:
    try:
        number = ACTIONS[name]
    except KeyError:
        raise InvalidArgument(f"seccomp: unknown action {name!r}", at=name[:40]) from None
    if name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        number |= (EPERM if errno is None else errno) & 0xFFFF
    return number


def compile_profile(profile: Mapping[str, Any], arch: str) -> bytes:
    """`linux.seccomp` as an array of struct sock_filter for processes of `arch` (x86_64, aarch64).

    InvalidArgument names what the profile has that cannot be; Unsupported without libseccomp.
    """
    library = _library()
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    context = library.seccomp_init(default)
    if not context:
        raise RuntimeFailure("libseccomp: no filter")
    try:
        # the guest's kernel asks the filter about every system call there is when it is set, which a list makes slow;
        # an older libseccomp does not know the attribute, and makes a list
        library.seccomp_attr_set(context, OPTIMIZE, TREE)
        wanted = {ARCHITECTURES[name] for name in profile.get("architectures", ()) if name in ARCHITECTURES}
        wanted.add(ARCHITECTURES[NATIVE[arch]])
        native = library.seccomp_arch_native()
        for token in sorted(wanted - {native}):
            _check(library.seccomp_arch_add(context, token), "an architecture")
        if native not in wanted:
            _check(library.seccomp_arch_remove(context, native), "an architecture")
        for rule in profile.get("syscalls", ()):
            action = _action(rule["action"], rule.get("errnoRet"))
            if action == default:
                continue
            for name in rule["names"]:
                number = library.seccomp_syscall_resolve_name(str(name).encode())
                if number != UNKNOWN:  # else this libseccomp is older than the call, as with runc
                    _rule(library, context, action, number, rule.get("args") or ())
        with tempfile.TemporaryFile() as file:
            _check(library.seccomp_export_bpf(context, file.fileno()), "the program")
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def _rule(library: ctypes.CDLL, context: int, action: int, number: int, arguments: Any) -> None:
    compares = []
    for item in arguments:
        if item["op"] not in OPERATORS:
            raise InvalidArgument(f"seccomp: unknown operator {item['op']!r}", at=str(item["op"])[:40])
        compares.append(_Compare(item["index"], OPERATORS[item["op"]], item["value"], item.get("valueTwo", 0)))
    # several conditions on one argument mean any of them (runc)
    alone = len({item.arg for item in compares}) < len(compares)
    for group in [[item] for item in compares] if alone else [compares]:
        array = (_Compare * len(group))(*group)
        result = library.seccomp_rule_add_array(context, action, number, len(group), array)
        if result != -EEXIST:
            _check(result, f"a rule for system call {number}")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise RuntimeFailure(f"libseccomp: {what}: {os.strerror(-result)}")

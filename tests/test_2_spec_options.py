"""What each option of the spec becomes in config.json, and what is refused because this host cannot."""

# ruff: noqa: F811  (fixtures are imported)
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tables import rows
from test_2_spec import V1, V2, check, make, rootfs, schema  # noqa: F401

from engine import envfile
from engine.config import ContainerConfig
from engine.errors import InvalidArgument, NotFound, TooLarge, Unsupported
from engine.model import ImageConfig
from engine.options import Security, security
from engine.runtimes import confine, seccomp, spec
from engine.runtimes.base import environment
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.resources import Resources

EVERYTHING: dict[str, Any] = {
    "init": True,
    "domainname": "example.org",
    "group_add": ("adm", "4242"),
    "memory": "64m",
    "memory_swap": "96m",
    "memory_reservation": "32m",
    "cpus": 0.5,
    "cpu_shares": 512,
    "cpuset": "0",
    "pids": 30,
    "ulimits": {"nofile": "1024:2048", "core": "-1"},
    "shm_size": "8m",
    "oom_score_adj": 300,
    "security_opt": ("no-new-privileges", "systempaths=unconfined"),
    "sysctls": {"net.core.somaxconn": "77", "kernel.msgmax": "9000"},
    "devices": ("/dev/null:/dev/nothing:r",),
    "device_cgroup_rules": ("c 10:* rw",),
    "tmpfs": ("/run:size=1m,exec", "/var/tmp"),
}


@pytest.fixture(autouse=True)
def an_init_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "tini"
    program.write_text("")
    monkeypatch.setattr(spec, "INIT_PROGRAMS", (tmp_path / "none", program))
    return program


def build(root: Path, cgroups: Cgroups = V1, **fields: Any) -> dict[str, Any]:
    return spec.build(make(root, **fields), cgroups)


def at(config: dict[str, Any], target: str) -> dict[str, Any]:
    (found,) = [mount for mount in config["mounts"] if mount["destination"] == target]
    return dict(found)


@pytest.mark.parametrize("cgroups", [V1, V2])
@pytest.mark.parametrize("more", [{}, {"privileged": True}])
def test_everything_at_once_is_valid_by_the_schema(
    schema: Any,
    rootfs: Path,
    cgroups: Cgroups,
    more: dict[str, Any],
) -> None:
    fields = {**EVERYTHING, **more}
    if not cgroups.swap:
        del fields["memory_swap"]
    check(schema, build(rootfs, cgroups, **fields))
    for mode in ("pid", "ipc", "uts"):
        check(schema, build(rootfs, cgroups, **{mode: "host"}))


def test_where_everything_goes(rootfs: Path, an_init_program: Path) -> None:
    config = build(rootfs, **EVERYTHING)
    process, linux = config["process"], config["linux"]
    assert process["args"] == ["/dev/init", "--", "sh"]
    init = at(config, "/dev/init")
    assert init["source"] == str(an_init_program) and {"ro", "bind"} <= set(init["options"])
    assert process["user"]["additionalGids"] == [0, 4, 4242]
    assert process["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 2048},
        {"type": "RLIMIT_CORE", "soft": (1 << 64) - 1, "hard": (1 << 64) - 1},
    ]
    assert (process["oomScoreAdj"], process["noNewPrivileges"]) == (300, True)
    assert linux["sysctl"] == {
        "net.core.somaxconn": "77",
        "kernel.msgmax": "9000",
        "kernel.domainname": "example.org",
    }
    assert linux["maskedPaths"] == linux["readonlyPaths"] == []
    resources = linux["resources"]
    assert resources["memory"] == {"limit": 64 << 20, "swap": 96 << 20, "reservation": 32 << 20}
    assert resources["cpu"] == {"shares": 512, "cpus": "0", "quota": 50_000, "period": 100_000}
    assert resources["pids"] == {"limit": 30}
    (node,) = linux["devices"]
    assert (node["path"], node["type"], node["major"], node["minor"]) == ("/dev/nothing", "c", 1, 3)
    assert {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"} in resources["devices"]
    assert {"allow": True, "type": "c", "major": 10, "access": "rw"} in resources["devices"]
    assert resources["devices"][0] == {"allow": False, "access": "rwm"}
    assert "size=8388608" in at(config, "/dev/shm")["options"]
    assert at(config, "/run")["options"] == ["nosuid", "nodev", "noexec", "size=1m", "exec"]  # the later one wins
    assert at(config, "/var/tmp")["type"] == "tmpfs"


def test_namespaces_of_the_host(rootfs: Path) -> None:
    def kinds(config: dict[str, Any]) -> set[str]:
        return {item["type"] for item in config["linux"]["namespaces"]}

    whole = kinds(build(rootfs))
    assert kinds(build(rootfs, pid="host")) == whole - {"pid"}
    shared = build(rootfs, ipc="host")
    assert kinds(shared) == whole - {"ipc"}
    assert at(shared, "/dev/shm")["source"] == "/dev/shm" and at(shared, "/dev/mqueue")["type"] == "bind"
    named = build(rootfs, uts="host")
    assert kinds(named) == whole - {"uts"} and "hostname" not in named
    assert f"HOSTNAME={os.uname().nodename}" in named["process"]["env"]
    for fields, word in (
        ({"uts": "host", "hostname": "x"}, "hostname"),
        ({"uts": "host", "domainname": "x"}, "domainname"),
        ({"ipc": "host", "sysctls": {"kernel.msgmax": "1"}}, "ipc is host"),
        ({"domainname": "a b"}, "domainname"),
    ):
        with pytest.raises(InvalidArgument, match=word):
            build(rootfs, **fields)


def test_a_mount_of_ones_own_takes_the_place_of_a_default(rootfs: Path) -> None:
    config = build(rootfs, tmpfs=("/dev/shm:size=1m",))
    assert at(config, "/dev/shm")["options"][-1] == "size=1m"
    assert not [word for word in at(build(rootfs, shm_size="max"), "/dev/shm")["options"] if word.startswith("size")]


@pytest.mark.parametrize(
    ("fields", "error", "word"),
    [
        ({"devices": ("/dev/no-such-device",)}, NotFound, "devices: /dev/no-such-device"),
        ({"devices": ("/etc/passwd",)}, InvalidArgument, "/etc/passwd is not a device"),
        ({"devices": ("/proc/self",)}, InvalidArgument, "no device below"),
        ({"group_add": ("nobody-here",)}, InvalidArgument, "group_add: no group 'nobody-here'"),
        ({"cpuset": "8000"}, InvalidArgument, "cpuset: this host has no CPU 8000"),
        ({"memory_swap": "1g"}, InvalidArgument, "memory_swap: set memory"),
        ({"memory": "64m", "memory_swap": "32m"}, InvalidArgument, "memory_swap: below memory"),
        ({"memory": "64m", "memory_reservation": "65m"}, InvalidArgument, "memory_reservation: above"),
        ({"security_opt": ("seccomp=/no/such/profile",)}, NotFound, "seccomp: /no/such/profile does not exist"),
    ],
)
def test_what_this_host_cannot_is_named(
    rootfs: Path,
    fields: dict[str, Any],
    error: type[Exception],
    word: str,
) -> None:
    with pytest.raises(error, match=word):
        build(rootfs, **fields)


def test_no_init_program_names_the_package(rootfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "INIT_PROGRAMS", ())
    with pytest.raises(Unsupported) as caught:
        build(rootfs, init=True)
    assert "apt-get install tini" in (caught.value.hint or "")


def test_a_directory_stands_for_the_devices_below_it(rootfs: Path) -> None:
    nodes = build(rootfs, devices=("/dev:/host",))["linux"]["devices"]
    assert any(node["path"] == "/host/null" and node["minor"] == 3 for node in nodes)
    assert not any(node["path"].startswith("/host/pts/") for node in nodes)


def test_swap_that_is_not_accounted() -> None:
    limits = Resources(memory=64 << 20, memory_swap=96 << 20)
    with pytest.raises(Unsupported, match="memory_swap"):
        limits.oci(swap=False)
    assert Resources(memory=64 << 20, memory_swap=-1).oci(swap=False) == {"memory": {"limit": 64 << 20}}
    assert Resources(memory=64 << 20, memory_swap=-1).oci(swap=True)["memory"]["swap"] == -1


def test_an_update_undoes_what_is_not_set() -> None:
    assert Resources().update(swap=True, cpus="0-1") == {
        "memory": {"limit": -1, "swap": -1, "reservation": -1},
        "cpu": {"shares": 1024, "quota": -1, "period": 100_000, "cpus": "0-1"},
        "pids": {"limit": -1},
    }


# --- security_opt -----------------------------------------------------------------------------------------------------


def test_security_options() -> None:
    assert security(()) == Security()
    found = security(("no-new-privileges:true", "seccomp:unconfined", "apparmor=unconfined", "label:disable"))
    assert found == Security(True, "unconfined", "unconfined", ("disable",))
    assert not security(("no-new-privileges=false",)).no_new_privileges


def test_a_profile_of_ones_own(tmp_path: Path, rootfs: Path, schema: Any) -> None:
    path = tmp_path / "profile.json"
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "args": [
            {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}],
    }  # fmt: skip
    path.write_text(json.dumps(profile))
    for more in ({}, {"privileged": True}):
        config = build(rootfs, seccomp="default", security_opt=(f"seccomp={path}",), **more)
        check(schema, config)
        assert config["linux"]["seccomp"]["architectures"] == ["SCMP_ARCH_X86_64"]
        assert config["linux"]["seccomp"]["syscalls"][0]["names"] == ["mkdir"]
    config = build(rootfs, seccomp="default", security_opt=("seccomp=unconfined",))
    assert "seccomp" not in config["linux"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[]", "defaultAction"),
        ('{"defaultAction": "ALLOW"}', "defaultAction"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {}}', "syscalls: a list"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [1]}', r"syscalls\[0\].action"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_LOG"}]}', r"syscalls\[0\].names"),
        (
            '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a"], "action": "SCMP_ACT_LOG", '
            '"args": [{"index": 0, "value": 1, "op": "IS"}]}]}',
            "op: one of",
        ),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        pytest.param(" " * (seccomp.MAX_PROFILE + 1), "larger than", id="large"),
    ],
)
def test_a_bad_profile_is_named_with_its_fault(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises((InvalidArgument, TooLarge), match=f"(?s){path}: .*{word}"):
        seccomp.own_profile(path)


def test_confinement_that_this_host_has_or_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "APPARMOR", tmp_path / "profiles")
    named = Security(apparmor="mine")
    with pytest.raises(Unsupported, match="apparmor=mine: this host has no AppArmor"):
        confine.apparmor_of(named)
    assert confine.apparmor_of(Security(apparmor="unconfined")) is None
    (tmp_path / "profiles").write_text("other (enforce)\n")
    with pytest.raises(InvalidArgument, match="no such profile"):
        confine.apparmor_of(named)
    (tmp_path / "profiles").write_text("other (enforce)\nmine (complain)\n")
    assert confine.apparmor_of(named) == "mine"


# --- env_file ---------------------------------------------------------------------------------------------------------


def test_env_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.env", tmp_path / "two.env"
    one.write_bytes(b"\xef\xbb\xbf# comment\r\nA=1\r\n\n  B= spaced \nC='quoted'\nD=x=y\nHERE\nABSENT\nE=#no comment\n")
    two.write_text("A=2\n")
    found = envfile.read([str(one), str(two)], {"HERE": "passed on"})
    assert found == {
        "A": "2", "B": " spaced ", "C": "'quoted'", "D": "x=y", "HERE": "passed on", "E": "#no comment",
    }  # fmt: skip
    config = ContainerConfig(env_file=(str(one),), env={"A": "own"})
    image = ImageConfig.model_validate({"config": {"Env": ["A=image", "D=image"]}})
    seen = environment(config, image, "h")
    assert "A=own" in seen and "D=x=y" in seen


def test_lines_that_compose_ignores_are_ignored() -> None:
    """The rows of compose-go's own test; a value stays as it is written, as in Docker."""
    lines = {row["$key"]: row["$value"]["input"] for row in rows("compose-go.json", "TestLinesToIgnore")}
    assert len(lines) == 6
    for name, line in lines.items():
        if name != "non-ignored value":
            assert envfile.parse(line.encode(), "x", {}) == {}, name


@pytest.mark.parametrize(
    ("text", "word"),
    [(b"A=1\nB C=2\n", "line 2: not the name"), (b"=x\n", "line 1"), (b"A=\xff\n", "line 1: not UTF-8")],
)
def test_a_bad_env_file_is_named_with_its_line(tmp_path: Path, text: bytes, word: str) -> None:
    path = tmp_path / "bad.env"
    path.write_bytes(text)
    with pytest.raises(InvalidArgument, match=f"env_file: {path}: {word}"):
        envfile.read([str(path)])


def test_an_env_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"env_file: /no/such\.env"):
        envfile.read(["/no/such.env"])
    with pytest.raises(InvalidArgument, match="absolute"):
        envfile.read(["relative.env"])
    with pytest.raises(InvalidArgument, match="env_file: "):
        envfile.read([str(tmp_path)])
    os.mkfifo(tmp_path / "fifo")  # would block for ever
    with pytest.raises(InvalidArgument, match="not a regular file"):
        envfile.read([str(tmp_path / "fifo")])
    (tmp_path / "large").write_bytes(b"A=" + b"x" * envfile.MAX_FILE)
    with pytest.raises(TooLarge, match="larger"):
        envfile.read([str(tmp_path / "large")])

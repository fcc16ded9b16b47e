"""config.json: always valid by the runtime-spec's schema, with Docker's defaults, never fooled by a root filesystem."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import ContainerConfig, MountKind
from engine.errors import InvalidArgument, Unsupported
from engine.model import ImageConfig
from engine.runtimes import seccomp, spec
from engine.runtimes.base import Mount, command_line, environment, make_spec, parse_signal
from engine.runtimes.cgroups import Cgroups
from engine.runtimes.users import identify, make_directory, read_in_root

SCHEMAS = Path(__file__).parents[2] / "shared" / "fixtures" / "schema" / "runtime-spec"
V1, V2 = Cgroups(1, True), Cgroups(2, False)
PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv/web:/bin/sh\n#c\nbroken\nbad:x:a:b::\n1000:x:7:8::/digits:\n"
)
GROUP = "root:x:0:\nweb:x:34:\nadm:x:4:web,root\ntape:x:26:nobody,web\n99:x:55:\n"


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    (tmp_path / "rootfs" / "etc").mkdir(parents=True)
    (tmp_path / "rootfs" / "etc" / "passwd").write_text(PASSWD)
    (tmp_path / "rootfs" / "etc" / "group").write_text(GROUP)
    return tmp_path / "rootfs"


def make(rootfs: Path, mounts: tuple[Mount, ...] = (), image: dict[str, Any] | None = None, **fields: Any) -> Any:
    config = ContainerConfig(**{"command": ("sh",), "seccomp": "unconfined", **fields})
    found = ImageConfig.model_validate({"config": image}) if image else None
    directory = rootfs.parent
    return make_spec(
        id="ab" * 32, name="n", directory=directory, rootfs=rootfs, config=config, image=found, mounts=mounts
    )


@pytest.fixture(scope="module")
def schema() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    if not (SCHEMAS / "config-schema.json").exists():
        if os.environ.get("CI"):
            pytest.fail("fixtures are not here")
        pytest.skip("fixtures are not here")
    import referencing

    registry = referencing.Registry()
    for path in SCHEMAS.glob("*.json"):
        resource = referencing.Resource.from_contents(json.loads(path.read_text()), referencing.jsonschema.DRAFT4)
        registry = registry.with_resource(path.name, resource).with_resource(
            f"https://opencontainers.org/schema/{path.name}", resource
        )
    main = json.loads((SCHEMAS / "config-schema.json").read_text())
    validator = jsonschema.Draft4Validator(main, registry=registry)

    class Schema:  # the validator's own repr is 158 kB
        def iter_errors(self, config: Any) -> Any:
            return validator.iter_errors(config)

    return Schema()


def check(schema: Any, config: dict[str, Any]) -> None:
    errors = [f"{list(error.path)}: {error.message}" for error in schema.iter_errors(json.loads(json.dumps(config)))]
    assert errors == []


def test_the_schema_refuses_what_it_should(schema: Any, rootfs: Path) -> None:
    config = spec.build(make(rootfs), V1)
    config["process"]["args"] = "sh"
    assert list(schema.iter_errors(config))
    config = spec.build(make(rootfs), V1)
    config["linux"]["namespaces"].append({"type": "no such"})
    assert list(schema.iter_errors(config))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tty": True, "read_only": True, "hostname": "h", "workdir": "/w", "user": "web"},
        {"privileged": True},
        {"memory": "64m", "cpus": 0.5, "pids": 10},
        {"cap_drop": ("ALL",), "cap_add": ("net_admin", "CAP_SYS_TIME")},
        {"env": {"A": "b=c", "B": ""}, "user": "1234:99"},
    ],
)
@pytest.mark.parametrize("cgroups", [V1, V2])
def test_valid_by_the_schema(schema: Any, rootfs: Path, fields: dict[str, Any], cgroups: Cgroups) -> None:
    mounts = (
        Mount(MountKind.TMPFS, None, "/t", options=("size=1m",)),
        Mount(MountKind.BIND, Path("/srv"), "/s", read_only=True),
        Mount(MountKind.VOLUME, Path("/v"), "/dev/shm"),
    )
    check(schema, spec.build(make(rootfs, mounts, **fields), cgroups))


words = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=12)
paths = st.lists(st.sampled_from(["a", "b", "etc", "x y", "é"]), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {"command": st.lists(words, min_size=1, max_size=4).map(tuple)},
        optional={
            "env": st.dictionaries(words.map(lambda key: key.replace("=", "_")), words, max_size=4),
            "workdir": paths,
            "user": st.sampled_from(["", "0", "web", "root:web", "5:6", ":adm", "web:4"]),
            "tty": st.booleans(),
            "read_only": st.booleans(),
            "privileged": st.booleans(),
            "memory": st.integers(6 << 20, 1 << 60),
            "cpus": st.floats(0.001, 4096),
            "pids": st.integers(1, 1 << 40),
            "cap_add": st.lists(st.sampled_from(["ALL", *spec.known_capabilities()]), max_size=4).map(tuple),
            "cap_drop": st.lists(st.sampled_from(["all", *spec.CAPABILITIES]), max_size=4).map(tuple),
        },
    ),
    targets=st.lists(paths, max_size=5, unique=True),
    cgroups=st.sampled_from([V1, V2]),
)
def test_any_config_is_valid_by_the_schema(
    schema: Any, rootfs: Path, fields: dict[str, Any], targets: list[str], cgroups: Cgroups
) -> None:
    mounts = tuple(Mount(MountKind.BIND, Path("/src"), target) for target in targets)
    config = spec.build(make(rootfs, mounts, **fields), cgroups)
    check(schema, config)
    destinations = [mount["destination"] for mount in config["mounts"]]
    assert len(destinations) == len(set(destinations))
    for number, target in enumerate(destinations):  # nothing is hidden by a parent mounted later
        assert not any(later != target and target.startswith(later + "/") for later in destinations[number + 1 :])


def test_dockers_defaults(rootfs: Path) -> None:
    config = spec.build(make(rootfs), V1)
    caps = config["process"]["capabilities"]
    assert len(caps["bounding"]) == 14 and set(caps["bounding"]) == set(spec.DEFAULT_CAPABILITIES)
    assert "ambient" not in caps and "inheritable" not in caps
    assert config["process"]["noNewPrivileges"] is False
    assert config["hostname"] == "abababababab"
    assert config["linux"]["maskedPaths"] and config["linux"]["readonlyPaths"]
    assert config["linux"]["cgroupsPath"] == "/dutchman/" + "ab" * 32
    assert [item["type"] for item in config["linux"]["namespaces"]] == ["pid", "ipc", "uts", "mount", "network"]
    assert spec.build(make(rootfs), V2)["linux"]["namespaces"][-1] == {"type": "cgroup"}
    options = {mount["destination"]: mount["options"] for mount in config["mounts"]}
    assert "ro" in options["/sys"] and "ro" in options["/sys/fs/cgroup"] and "rw" in options["/etc/hosts"]


def test_capabilities(rootfs: Path) -> None:
    def caps(**fields: Any) -> set[str]:
        return set(spec.capabilities(ContainerConfig(**fields)))

    everything = set(spec.known_capabilities())
    assert caps(cap_drop=("ALL",)) == set()
    assert caps(cap_drop=("ALL",), cap_add=("chown",)) == {"CAP_CHOWN"}
    assert caps(cap_add=("ALL",)) == everything
    assert caps(cap_add=("ALL",), cap_drop=("SYS_ADMIN",)) == everything - {"CAP_SYS_ADMIN"}
    assert caps(cap_drop=("NET_RAW",), cap_add=("sys_time",)) == (
        set(spec.DEFAULT_CAPABILITIES) - {"CAP_NET_RAW"} | {"CAP_SYS_TIME"}
    )
    assert caps(privileged=True, cap_drop=("ALL",)) == everything
    with pytest.raises(InvalidArgument, match="cap_add"):
        caps(cap_add=("FLY",))


def test_a_capability_this_host_does_not_grant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "known_capabilities", lambda: ("CAP_CHOWN", "CAP_KILL"))
    assert spec.capabilities(ContainerConfig()) == ["CAP_CHOWN", "CAP_KILL"]
    assert spec.capabilities(ContainerConfig(privileged=True)) == ["CAP_CHOWN", "CAP_KILL"]
    with pytest.raises(Unsupported, match="CAP_SYS_ADMIN"):
        spec.capabilities(ContainerConfig(cap_add=("SYS_ADMIN",)))


def test_limits(rootfs: Path) -> None:
    resources = spec.build(make(rootfs, memory="64m", cpus=1.5, pids=9), V1)["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 << 20, "swap": 128 << 20}
    assert resources["cpu"] == {"quota": 150_000, "period": 100_000}
    assert resources["pids"] == {"limit": 9}
    assert "swap" not in spec.build(make(rootfs, memory="64m"), V2)["linux"]["resources"]["memory"]
    with pytest.raises(InvalidArgument, match="memory"):
        spec.build(make(rootfs, memory=1000), V1)


# --- argv and environment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entrypoint", "command", "image", "argv"),
    [
        (None, None, {"Entrypoint": ["e"], "Cmd": ["c"]}, ("e", "c")),
        (None, ("x",), {"Entrypoint": ["e"], "Cmd": ["c"]}, ("e", "x")),
        (("n",), None, {"Entrypoint": ["e"], "Cmd": ["c"]}, ("n",)),
        (("n",), ("x",), {"Entrypoint": ["e"], "Cmd": ["c"]}, ("n", "x")),
        ((), ("x",), {"Entrypoint": ["e"]}, ("x",)),
        (None, (), {"Entrypoint": ["e"], "Cmd": ["c"]}, ("e",)),
        (None, None, {"Cmd": ["c", ""]}, ("c", "")),
    ],
)
def test_command_line(entrypoint: Any, command: Any, image: dict[str, Any], argv: tuple[str, ...]) -> None:
    config = ContainerConfig(entrypoint=entrypoint, command=command)  # type: ignore[call-arg]
    assert command_line(config, ImageConfig.model_validate({"config": image})) == argv


def test_nothing_to_run() -> None:
    with pytest.raises(InvalidArgument, match="nothing to run"):
        command_line(ContainerConfig(), ImageConfig())
    with pytest.raises(InvalidArgument, match="NUL"):
        command_line(ContainerConfig(), ImageConfig.model_validate({"config": {"Cmd": ["a\0b"]}}))


def test_environment_order_and_home(rootfs: Path) -> None:
    image = {"Env": ["PATH=/bin", "A=image", "=broken", "B=x"], "User": "web"}
    run = make(rootfs, image=image, env={"A": "own"}, tty=True)
    assert run.env == ("PATH=/bin", "HOSTNAME=abababababab", "TERM=xterm", "A=own", "B=x")
    assert spec.build(run, V1)["process"]["env"][-1] == "HOME=/srv/web"
    kept = spec.build(make(rootfs, env={"HOME": "/h"}), V1)["process"]["env"]
    assert [item for item in kept if item.startswith("HOME=")] == ["HOME=/h"]
    assert environment(ContainerConfig(), ImageConfig(), "h")[0].startswith("PATH=/usr/local/sbin")


def test_hostname_is_checked(rootfs: Path) -> None:
    with pytest.raises(InvalidArgument, match="hostname"):
        make(rootfs, hostname="a" * 65)
    with pytest.raises(InvalidArgument, match="hostname"):
        make(rootfs, hostname="a b")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("SIGTERM", 15),
        ("TERM", 15),
        ("term", 15),
        ("15", 15),
        ("9", 9),
        ("RTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-1", 63),
    ],
)
def test_signals(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "NOPE", "-9", "RTMIN+40", "RTMAX-99", "RTMIN-1", "1٣", "SIG_DFL"])
def test_bad_signals(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_signal(text)


# --- users ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "who"),
    [
        ("", (0, 0, (0, 4), "/root")),
        ("root", (0, 0, (0, 4), "/root")),
        ("web", (33, 34, (34, 4, 26), "/srv/web")),
        ("33", (33, 34, (34, 4, 26), "/srv/web")),
        ("web:adm", (33, 4, (4,), "/srv/web")),
        ("web:1234", (33, 1234, (1234,), "/srv/web")),
        ("4321", (4321, 0, (0,), "/")),
        ("4321:adm", (4321, 4, (4,), "/")),
        ("1000", (7, 8, (8,), "/digits")),  # a name of digits wins, as in Docker
        (":26", (0, 26, (26,), "/root")),
        ("web:99", (33, 55, (55,), "/srv/web")),
    ],
)
def test_identities(rootfs: Path, text: str, who: tuple[Any, ...]) -> None:
    found = identify(rootfs, text)
    assert (found.uid, found.gid, found.groups, found.home) == who


@pytest.mark.parametrize("text", ["nobody", "web:nogroup", "4294967295", "1:99999999999", "-1", "web:-1"])
def test_bad_identities(rootfs: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match="user"):
        identify(rootfs, text)


def test_a_hostile_passwd_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("evil:x:666:666::/:\n")
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    for target in (str(tmp_path / "outside"), "../../outside", "passwd", "/proc/self/environ"):
        (root / "etc" / "passwd").unlink(missing_ok=True)
        (root / "etc" / "passwd").symlink_to(target)
        with pytest.raises(InvalidArgument):
            identify(root, "evil")
    (root / "etc" / "passwd").unlink()
    os.mkfifo(root / "etc" / "passwd")  # would block for ever
    assert identify(root, "12").uid == 12
    (root / "etc" / "passwd").unlink()
    (root / "real").write_text("evil:x:5:5::/:\n")
    (root / "etc" / "passwd").symlink_to("/real")  # within the root it is followed
    assert identify(root, "evil").uid == 5
    assert len(read_in_root(root, "/real", 4)) == 4


def test_the_working_directory_is_made_inside_only(tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    root.mkdir()
    (tmp_path / "out").mkdir()
    make_directory(root, "/a/b/c")
    assert (root / "a" / "b" / "c").is_dir()
    (root / "abs").symlink_to(tmp_path / "out")
    (root / "rel").symlink_to("../out")
    (root / "in").symlink_to("/a")
    (root / "file").write_text("")
    for path in ("/abs/x", "/rel/x", "/../../out/y", "/in/new", "/file/x"):
        make_directory(root, path)
    assert list((tmp_path / "out").iterdir()) == []
    assert (root / "a" / "new").is_dir()


def test_prepared_files(rootfs: Path) -> None:
    run = make(rootfs, hostname="ship", workdir="/new/dir")
    spec.prepare(run)
    assert (rootfs.parent / "hostname").read_text() == "ship\n"
    assert "127.0.0.1\tlocalhost" in (rootfs.parent / "hosts").read_text()
    assert "ship" in (rootfs.parent / "hosts").read_text()
    assert (rootfs.parent / "resolv.conf").exists()
    assert (rootfs / "new" / "dir").is_dir()


# --- seccomp --------------------------------------------------------------------------------------------------------

PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 38,
    "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
    "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [], "includes": {}, "excludes": {}},
        {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["arm_x"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["not_amd"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["amd64"]}},
        {
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 1, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
        },
    ],
}


def test_seccomp_rules_are_resolved() -> None:
    def names(caps: set[str], machine: str, kernel: tuple[int, int]) -> list[tuple[str, str]]:
        found = seccomp.resolve(PROFILE, caps, machine, kernel)
        return [(rule["names"][0], rule["action"][9:]) for rule in found["syscalls"]]

    assert names(set(), "x86_64", (6, 1)) == [
        ("read", "ALLOW"),
        ("mount", "ERRNO"),
        ("ptrace", "ALLOW"),
        ("clone", "ALLOW"),
    ]
    assert ("mount", "ALLOW") in names({"CAP_SYS_ADMIN"}, "x86_64", (6, 1))
    assert ("mount", "ERRNO") not in names({"CAP_SYS_ADMIN"}, "x86_64", (6, 1))
    assert ("ptrace", "ALLOW") not in names(set(), "x86_64", (4, 7))
    assert ("arm_x", "ALLOW") in names(set(), "aarch64", (6, 1))
    found = seccomp.resolve(PROFILE, set(), "x86_64", (6, 1))
    assert found["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert found["defaultErrnoRet"] == 38
    with pytest.raises(Unsupported, match="vax"):
        seccomp.resolve(PROFILE, set(), "vax", (6, 1))


def test_the_installed_profile_is_valid_by_the_schema(schema: Any, rootfs: Path) -> None:
    if seccomp.profile_path() is None:
        pytest.skip(f"no profile installed: apt-get install {seccomp.PACKAGE}")
    config = spec.build(make(rootfs, seccomp="default"), V1)
    check(schema, config)
    rules = config["linux"]["seccomp"]["syscalls"]
    allowed = {name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    assert {"read", "openat2", "clone3"} & allowed >= {"read"} and "kexec_load" not in allowed
    assert "seccomp" not in spec.build(make(rootfs, seccomp="unconfined"), V1)["linux"]
    assert "seccomp" not in spec.build(make(rootfs, seccomp="default", privileged=True), V1)["linux"]


def test_a_missing_profile_names_the_package(rootfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "PROFILES", (Path("/nonexistent/seccomp.json"),))
    with pytest.raises(Unsupported) as caught:
        spec.build(make(rootfs, seccomp="default"), V1)
    assert seccomp.PACKAGE in (caught.value.hint or "")

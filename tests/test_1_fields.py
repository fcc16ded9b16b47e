"""config/<field>: what is read can be written back, for every field and any value."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import rows

from engine.config import ContainerConfig, parse_config
from engine.errors import InvalidArgument, NotFound
from engine.fields import FIELDS, config_text, field_text, validated, with_field
from engine.options import MAX_LIMIT, RLIMITS, parse_ulimits, rlimits

WORD = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12)
LINE = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp", "Zs")), min_size=1, max_size=12)
KEY = LINE.filter(lambda key: "=" not in key)
PATH = st.from_regex(r"/[a-z0-9][a-z0-9.]{0,7}(/[a-z]{1,5}){0,2}", fullmatch=True).filter(lambda path: ".." not in path)
MOUNT = st.one_of(
    st.fixed_dictionaries({"type": st.just("volume"), "source": st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True),
                           "target": PATH, "read_only": st.booleans()}),
    st.fixed_dictionaries({"type": st.just("bind"), "source": PATH, "target": PATH, "read_only": st.booleans()}),
    st.fixed_dictionaries({"type": st.just("tmpfs"), "target": PATH}),
)  # fmt: skip
ADDRESS = st.ip_addresses().map(str).filter(lambda address: "%" not in address)
PORT = st.builds(
    lambda ip, host, container, count, protocol: {
        "host_ip": ip, "host": host, "host_last": host and host + count, "container": container,
        "container_last": container + count, "protocol": protocol,
    },
    st.just("") | ADDRESS, st.just(0) | st.integers(1, 60000), st.integers(1, 60000), st.integers(0, 99),
    st.sampled_from(["tcp", "udp", "sctp"]),
)  # fmt: skip
HOSTNAME = st.from_regex(r"[a-z][a-z0-9_.-]{0,6}[a-z0-9]", fullmatch=True)
ENDPOINT = st.fixed_dictionaries(
    {},
    optional={"aliases": st.lists(HOSTNAME, max_size=2), "ipv4_address": st.ip_addresses(v=4).map(str),
              "ipv6_address": st.ip_addresses(v=6).map(str), "mac_address": st.just("02:42:ac:11:00:02")},
)  # fmt: skip
ARGV = st.none() | st.lists(WORD, max_size=5)
SECONDS = st.none() | st.floats(0, 1e6, allow_nan=False).map(lambda value: round(value, 3))
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "image": st.sampled_from(["nginx:1.27", "ghcr.io/o/r@sha256:" + "a" * 64]),
        "command": ARGV, "entrypoint": ARGV,
        "env": st.dictionaries(KEY, WORD, max_size=4), "labels": st.dictionaries(KEY, WORD, max_size=4),
        "workdir": PATH, "user": st.sampled_from(["1000:1000", "nobody"]), "hostname": st.just("web"),
        "stop_signal": st.just("SIGINT"), "stop_grace_period": SECONDS, "log_max_age": SECONDS,
        "tty": st.booleans(), "read_only": st.booleans(), "privileged": st.booleans(),
        "memory": st.none() | st.integers(0, 1 << 50), "log_max_size": st.none() | st.integers(0, 1 << 40),
        "cpus": st.none() | st.sampled_from([0.5, 1.0, 2.25]), "pids": st.none() | st.integers(1, 1 << 20),
        "cap_add": st.lists(st.sampled_from(["NET_ADMIN", "ALL"]), max_size=2),
        "seccomp": st.sampled_from(["default", "unconfined"]),
        "env_file": st.lists(PATH, max_size=2), "group_add": st.lists(st.sampled_from(["adm", "1000"]), max_size=2),
        "init": st.booleans(), "stdin": st.booleans(), "domainname": st.just("example.org"),
        "memory_swap": st.none() | st.sampled_from([-1, "max", 0]) | st.integers(1, 1 << 50),
        "memory_reservation": st.none() | st.integers(0, 1 << 50), "cpu_shares": st.none() | st.integers(2, 262144),
        "cpuset": st.sampled_from(["", "0", "0-3,7", "1, 2"]), "oom_score_adj": st.integers(-1000, 1000),
        "ulimits": st.dictionaries(st.sampled_from(RLIMITS), st.sampled_from(["1:2", "-1", "5", "0:unlimited"])),
        "shm_size": st.none() | st.integers(0, 1 << 40),
        "security_opt": st.lists(st.sampled_from(["no-new-privileges", "seccomp=/p", "label=disable"]), max_size=3),
        "sysctls": st.dictionaries(st.sampled_from(["net.core.somaxconn", "kernel/msgmax"]), LINE),
        "devices": st.lists(st.sampled_from(["/dev/a", "/dev/a:/dev/b", "/dev/a:r", "/dev/a:/b:rw"]), max_size=2),
        "device_cgroup_rules": st.lists(st.sampled_from(["c 1:3 rwm", "a *:* r"]), max_size=2),
        "pid": st.sampled_from(["", "host", "private"]), "ipc": st.sampled_from(["", "host"]),
        "uts": st.sampled_from(["", "host"]),
        "tmpfs": st.lists(st.sampled_from(["/t", "/u:size=1m,exec"]), unique=True),
        "ports": st.lists(PORT, max_size=3), "dns": st.lists(ADDRESS, max_size=2),
        "networks": st.dictionaries(HOSTNAME.filter(lambda name: name not in ("host", "none")), ENDPOINT, max_size=3),
        "dns_search": st.lists(HOSTNAME, max_size=2), "dns_options": st.lists(st.just("ndots:2"), max_size=1),
        "extra_hosts": st.lists(st.builds("{}:{}".format, HOSTNAME, ADDRESS | st.just("host-gateway")), max_size=2),
        "volumes": st.lists(MOUNT, max_size=3), "runtime": st.sampled_from(["", "oci", "fake"]),
    },
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(CONFIGS)
def test_every_field_written_back_as_read_changes_nothing(data: dict[str, object]) -> None:
    config = validated(dict(data))
    for field in FIELDS:
        text = field_text(field, config)
        assert text == "" or text.endswith("\n")
        assert with_field(config, field, text) == config, (field, text)
        assert getattr(with_field(ContainerConfig(), field, text), field) == getattr(config, field), (field, text)
    assert parse_config(config_text(config)) == config


@given(st.sampled_from(FIELDS), st.text(max_size=40))
def test_whatever_is_written_is_taken_or_refused_by_name(field: str, text: str) -> None:
    try:
        with_field(ContainerConfig(), field, text)
    except InvalidArgument as error:
        assert field in error.reason


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("command", "sleep 100\n", ("sleep", "100")),
        ("command", "sh -c 'echo a b'", ("sh", "-c", "echo a b")),
        ("command", "sh\n-c\necho a b\n", ("sh", "-c", "echo a b")),
        ("command", '["a\\nb"]\n', ("a\nb",)),
        ("command", "[ -f /x ]", ("[", "-f", "/x", "]")),
        ("command", "\n", None),
        ("entrypoint", "[]", ()),
        ("env", "A=1\nB=x=y\nC=\n", {"A": "1", "B": "x=y", "C": ""}),
        ("labels", "solo\n", {"solo": ""}),
        ("memory", "512m\n", 512 << 20),
        ("memory", "max\n", None),
        ("stop_grace_period", "1m30s\n", 90.0),
        ("stop_grace_period", "\n", 10.0),
        ("cpus", "1.5", 1.5),
        ("tty", "true\n", True),
        ("cap_add", "NET_ADMIN\nSYS_TIME\n", ("NET_ADMIN", "SYS_TIME")),
        ("user", "1000\n", "1000"),
        ("memory_swap", "max\n", -1),
        ("memory_swap", "-1\n", -1),
        ("memory_swap", "\n", None),
        ("memory_swap", "1g\n", 1 << 30),
        ("pids", "-1\n", None),
        ("cpuset", "0-1, 3\n", "0-1,3"),
        ("ulimits", "nofile=1024:unlimited\nnproc=65535\n", {"nofile": "1024:-1", "nproc": "65535"}),
        ("sysctls", "net/core/somaxconn=128\n", {"net.core.somaxconn": "128"}),
        ("devices", "/dev/fuse:/dev/fuse:rwm\n/dev/null:/dev/zero:r\n", ("/dev/fuse", "/dev/null:/dev/zero:r")),
        ("tmpfs", "/run:size=1m,mode=1777\n/tmp\n", ("/run:size=1m,mode=1777", "/tmp")),
        ("shm_size", "128m\n", 128 << 20),
        ("oom_score_adj", "-500\n", -500),
        ("pid", "host\n", "host"),
        ("pid", "private\n", ""),
        ("init", "1", True),
    ],
)
def test_what_people_write(field: str, text: str, value: object) -> None:
    assert getattr(with_field(ContainerConfig(), field, text), field) == value


@pytest.mark.parametrize(
    ("field", "text", "word"),
    [
        ("ulimits", "nofile=10:5", "above the hard limit"),
        ("ulimits", "nofile=-1:5", "above the hard limit"),
        ("ulimits", "files=10", "unknown limit 'files'"),
        ("ulimits", "nofile=many", "number"),
        ("ulimits", "nofile=1:2:3", "SOFT"),
        ("sysctls", "vm.swappiness=10", "vm.swappiness is not namespaced"),
        ("sysctls", "kernel.hostname=x", "set hostname instead"),
        ("sysctls", "net.core.somaxconn=", "net.core.somaxconn"),
        ("sysctls", "net..x=1", "name of a sysctl"),
        ("devices", "dev/fuse", "absolute path"),
        ("devices", "/dev/fuse:/dev/fuse:rx", "made of r, w and m"),
        ("devices", "vendor.com/gpu=0", "absolute path"),
        ("device_cgroup_rules", "c 1 3 r", "TYPE MAJOR:MINOR"),
        ("tmpfs", "/run:size=1x", "size=1x"),
        ("tmpfs", "/run:bind", "'bind'"),
        ("tmpfs", "run", "absolute path"),
        ("tmpfs", "/run\n/run:ro", "one path"),
        ("security_opt", "seccomp=profile.json", "absolute path"),
        ("security_opt", "no-new-privilege", "unknown option 'no-new-privilege'"),
        ("security_opt", "no-new-privileges:maybe", "true or false"),
        ("security_opt", "apparmor=a\napparmor=b", "given twice"),
        ("security_opt", "label=colour:x", "label=colour"),
        ("cpuset", "3-1", "list of CPUs"),
        ("cpuset", "a", "list of CPUs"),
        ("memory_swap", "-2", "memory_swap"),
        ("cpu_shares", "1", "cpu_shares"),
        ("oom_score_adj", "1001", "oom_score_adj"),
        ("ipc", "container:web", "ipc"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(field: str, text: str, word: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        with_field(ContainerConfig(), field, text)
    assert word in caught.value.reason and field in caught.value.reason


def test_compose_long_forms() -> None:
    config = parse_config(
        "ulimits: {nproc: 65535, nofile: {soft: 20000, hard: 40000}}\nsysctls: [net.core.somaxconn=1024]\n"
        "devices:\n- {source: /dev/source, target: /dev/target, permissions: rw}\n- /dev/x\n"
        "security_opt: ['label=level:s0:c100,c200', 'label=type:svirt_apache_t']\ntmpfs: /run\nenv_file: /a.env\n"
    )
    assert config.ulimits == {"nproc": "65535", "nofile": "20000:40000"}
    assert config.devices == ("/dev/source:/dev/target:rw", "/dev/x")
    assert (config.tmpfs, config.env_file) == (("/run",), ("/a.env",))
    assert config.sysctls == {"net.core.somaxconn": "1024"} and len(config.security_opt) == 2


def test_ulimits_as_go_units_reads_them() -> None:
    """The rows of go-units' own test."""
    unlimited = rows("units.json", "TestParseUlimitUnlimited")
    assert len(unlimited) == 4
    for row in unlimited:
        wanted = row["expected"]
        soft, hard = (MAX_LIMIT if wanted[key] == -1 else wanted[key] for key in ("Soft", "Hard"))
        assert rlimits(parse_ulimits(row["in"])) == [(f"RLIMIT_{wanted['Name'].upper()}", soft, hard)]
    names = {str(row["ulimit"]["0"]) for row in rows("units.json", "TestGetRlimit")}
    assert names == set(RLIMITS)


def test_volumes_are_yaml_or_plain_lines() -> None:
    for text in ("- data:/d\n- /h:/h:ro\n", "[data:/d, '/h:/h:ro']"):
        config = with_field(ContainerConfig(), "volumes", text)
        assert field_text("volumes", config) == "- data:/d\n- /h:/h:ro\n"
    assert len(with_field(ContainerConfig(), "volumes", "data:/d\n").volumes) == 1


def test_an_unknown_field_is_not_there() -> None:
    with pytest.raises(NotFound, match="colour"):
        field_text("colour", ContainerConfig())

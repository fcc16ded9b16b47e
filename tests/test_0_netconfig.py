"""Published ports, networks and extra hosts as people write them, against the reference implementations' tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import ContainerConfig, parse_config
from engine.errors import InvalidArgument
from engine.fields import config_text, field_text, validated
from engine.netconfig import PortSpec, parse_port, parse_range

TABLES = Path(__file__).parents[2] / "shared" / "fixtures" / "tables"


def tables(file: str, name: str) -> list[list[Any]]:
    if not TABLES.is_dir():
        pytest.skip("the fixtures are not there")
    return [item["rows"] for item in json.loads((TABLES / file).read_text())["tables"] if item["test"] == name]


def port(text: str) -> PortSpec:
    return PortSpec.model_validate(parse_port(text))


def accepted(text: str) -> bool:
    try:
        port(text)
    except ValueError:
        return False
    return True


def bindings(spec: PortSpec) -> list[dict[str, Any]]:
    """As go-connections' ParsePortSpec returns them."""
    out = []
    for step in range(spec.count):
        host = "" if not spec.host else str(spec.host + step)
        if spec.count == 1 and spec.host_last > spec.host:
            host = f"{spec.host}-{spec.host_last}"
        binding = {"HostIP": spec.host_ip, "HostPort": host}
        out.append({"Binding": binding, "Port": f"{spec.container + step}/{spec.protocol}"})
    return out


def test_port_ranges_of_the_reference() -> None:
    (rows,) = tables("ports-nat.json", "TestParsePortRange")
    for row in rows:
        if "expErr" in row:
            with pytest.raises(ValueError):
                parse_range(row.get("input", ""), "container")
        else:
            assert parse_range(row["input"], "host") == (row.get("expBegin", 0), row.get("expEnd", 0))
    for row in tables("ports-nat.json", "TestParsePortNumber")[0]:
        if "expErr" in row:
            with pytest.raises(ValueError):
                parse_range(row["input"], "host")
        else:
            assert parse_range(row["input"], "host")[0] == row["exp"]


def test_port_specs_of_the_reference() -> None:
    for row in tables("ports-nat.json", "TestPartPortSpecIPV6")[0]:
        assert bindings(port(row["spec"])) == row["expected"]
    (rows,) = tables("ports-nat.json", "TestParsePortSpecFull")
    assert bindings(port("0.0.0.0:1234-1235:3333-3334/tcp")) == rows
    for row in tables("ports-nat.json", "TestParsePortSpecEmptyContainerPort")[0]:
        assert not accepted(row["spec"])
    for name in ("TestParsePortSpecs", "TestParsePortSpecsWithRange"):
        for rows in tables("ports-nat.json", name):
            for text in rows:
                spec = port(text)
                numbers = [int(item["Port"].partition("/")[0]) for item in bindings(spec)]
                assert numbers[0] in (1234, 2345, 3456) and len(numbers) == spec.count == (3 if "-" in text else 1)
                assert spec.protocol == text.rpartition("/")[2]
    for row in tables("ports-nat.json", "TestStringer")[0]:
        assert port(row["in"]) == port(row["expected"])
        if not row["expected"].startswith(":"):  # we leave out what is empty, and tcp
            assert str(port(row["in"])) == row["expected"].removesuffix("/tcp")


def test_ports_as_compose_reads_them() -> None:
    for row in tables("compose-go.json", "TestParsePortConfig")[0]:
        if "expectedError" in row:
            assert not accepted(row["value"])
            continue
        found = [
            {"Mode": "ingress", "Protocol": spec["Port"].partition("/")[2], "Target": int(spec["Port"].split("/")[0])}
            | ({"Published": spec["Binding"]["HostPort"]} if spec["Binding"]["HostPort"] else {})
            | ({"HostIP": spec["Binding"]["HostIP"]} if spec["Binding"]["HostIP"] else {})
            for spec in bindings(port(row["value"]))
        ]
        assert found == row["expected"], row["value"]


def test_extra_hosts_as_compose_reads_them() -> None:
    for row in tables("compose-go.json", "testHostsList")[0]:
        for separator in (":", "="):
            given = [
                item if isinstance(item, str) else item["$go"].replace('" + sep + "', separator).strip('"')
                for item in row["input"]
            ]
            if "expectedError" in row:
                with pytest.raises(InvalidArgument, match="host name"):
                    validated({"extra_hosts": given})
            else:
                assert sorted(validated({"extra_hosts": given}).extra_hosts) == row["expectedOut"].split()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("ports", ["80:70000"], "65535"),
        ("ports", ["80-82:80-81"], "3 host ports cannot be published to 2"),
        ("ports", ["127.0.1:80:80"], "IP address"),
        ("ports", ["80/xyz"], "protocol"),
        ("ports", ["0:0"], "container"),
        ("ports", [{"target": 80, "colour": 1}], "colour"),
        ("networks", ["host", "a"], "stands alone"),
        ("networks", {"host": {"aliases": ["x"]}}, "stands alone"),
        ("networks", ["../x"], "name"),
        ("networks", {"a": {"aliases": ["x y"]}}, "host name"),
        ("networks", {"a": {"ipv4_address": "fd00::1"}}, "family"),
        ("networks", {"a": {"mac_address": "01:00:00:00:00:01"}}, "interface"),
        ("networks", {"a": {"colour": 1}}, "unknown field"),
        ("dns", ["example.com"], "IP address"),
        ("dns_options", ["a\nnameserver 1.1.1.1"], "word"),
        ("dns_search", ["a b"], "word"),
        ("extra_hosts", ["a b:1.1.1.1"], "host name"),
        ("extra_hosts", ["a:1.1.1.1\n2.2.2.2 b"], "IP address"),
    ],
)
def test_what_cannot_be_is_refused_by_name(field: str, value: object, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        validated({field: value})
    assert field in caught.value.reason


@pytest.mark.parametrize("name", ["host", "none"])
def test_what_takes_the_place_of_networks_is_stored_and_read_again(name: str) -> None:
    config = validated({"networks": [name]})
    assert ContainerConfig.model_validate_json(config.model_dump_json()) == config == parse_config(config_text(config))
    assert validated(config.model_dump()) == config and field_text("networks", config) == f"{name}\n"


def test_nothing_is_published_of_the_hosts_own_network() -> None:
    with pytest.raises(InvalidArgument, match="ports: none can be published with networks: host"):
        validated({"networks": ["host"], "ports": ["80:80"]})


def test_the_short_form_says_all_the_long_one_does() -> None:
    long = {"target": 80, "published": "8080-8090", "host_ip": "::1", "protocol": "udp", "mode": "host", "name": "x"}
    config = validated({"ports": [long, 443, "53:53/udp"], "networks": {"a": {"aliases": ["db"]}, "b": None}})
    assert field_text("ports", config) == "[::1]:8080-8090:80/udp\n443\n53:53/udp\n"
    assert field_text("networks", config) == "a:\n  aliases:\n  - db\nb: null\n"
    assert parse_config(config_text(config)) == config

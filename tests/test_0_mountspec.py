"""Mounts as people write them, against the tables of the implementation whose grammar it is."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import volumedrivers
from engine.config import ContainerConfig, MountKind
from engine.errors import InvalidArgument
from engine.fields import field_text, validated, with_field
from engine.model import check_name
from engine.mountspec import ALL_IDS, MountSpec, id_ranges, parse_from, parse_mode, short_form
from engine.runtimes.base import Mount
from engine.runtimes.idmap import exchanged

TABLES = Path(__file__).parents[2] / "shared" / "fixtures" / "tables" / "moby-volume-mounts.json"


def parsed(text: str) -> MountSpec:
    return MountSpec.model_validate(short_form(text))


def refused(text: str) -> None:
    with pytest.raises(ValueError):
        parsed(text)


# --- the rows -----------------------------------------------------------------------------------------------------


def check_short(row: Any) -> None:
    """Accepted ones are plain texts; refused ones have what is said of them."""
    if isinstance(row, dict):
        refused(row["$key"])
        return
    spec = parsed(row)
    assert (
        MountSpec.model_validate(spec.plain() if isinstance(spec.plain(), dict) else short_form(str(spec.plain())))
        == spec
    )


def check_split(row: dict[str, Any]) -> None:
    if row.get("expErr"):
        refused(row["bind"])
        return
    want, spec = row["expected"], parsed(row["bind"])
    assert spec.target == want["Destination"] and spec.read_only is not want["RW"]
    assert spec.type is (MountKind.VOLUME if want["Type"]["$go"] == "mount.TypeVolume" else MountKind.BIND)
    assert spec.source == want.get("Source", want.get("Name", ""))
    copies = spec.type is MountKind.VOLUME and not (spec.volume and spec.volume.nocopy)
    assert copies is bool(want.get("CopyData"))
    assert spec.propagation in (None, want["Propagation"])  # none said is rprivate


KINDS = {"mount.TypeBind": "bind", "mount.TypeVolume": "volume", "mount.TypeImage": "image"}


def long_form(mount: dict[str, Any]) -> dict[str, Any]:
    kind = mount["Type"] if isinstance(mount["Type"], str) else KINDS[mount["Type"]["$go"]]
    slash = " + string(os.PathSeparator)"
    places = {"tmpDir": "/x", "testDir": "/x", "testDestinationPath": "/y"}
    places |= {name + slash: path + "/" for name, path in places.items()}
    text = lambda value: places[value["$go"]] if isinstance(value, dict) else value  # noqa: E731
    data: dict[str, Any] = {"type": kind, "target": text(mount["Target"])}
    if "Source" in mount:
        data["source"] = text(mount["Source"])
    if mount.get("ReadOnly"):
        data["read_only"] = True
    if "BindOptions" in mount:
        data["bind"] = {}
    if "ImageOptions" in mount:
        data["image"] = {}
    if "VolumeOptions" in mount:
        options = mount["VolumeOptions"]
        data["volume"] = {"subpath": options["Subpath"]} if "Subpath" in options else {}
    return data


def check_long(row: dict[str, Any]) -> None:
    mount = row.get("mount") or row["input"]
    data = long_form(mount)
    unwanted = "expErr" in row or ("expected" in row and "$go" in (row["expected"] or {}))
    if "does not exist" in row.get("expErr", ""):
        assert MountSpec.model_validate(data).source.startswith("/tmp/definitely")  # found out by the start
    elif unwanted or data["type"] == "image":  # mounts of images are not offered
        with pytest.raises(InvalidArgument):
            validated({"volumes": [data]})
    else:
        spec = validated({"volumes": [data]}).volumes[0]
        assert spec.target == "/y" or spec.target == mount["Target"]
        want = row.get("expected") or {}
        if "RW" in want or data.get("read_only"):
            assert spec.read_only is not want.get("RW", False)
        assert with_field(
            ContainerConfig(), "volumes", field_text("volumes", validated({"volumes": [data]}))
        ).volumes == (spec,)


def check_tmpfs(row: dict[str, Any]) -> None:
    from engine.attach import _tmpfs_options
    from engine.runtimes.spec import _mount

    option = row["opt"]
    if "Options" in option:
        return  # free options of a tmpfs are the field `tmpfs`
    tmpfs = {"mode": option["Mode"], "size": 1 << 20} if "Mode" in option else {}
    spec = MountSpec.model_validate({"type": "tmpfs", "target": "/t", "read_only": row["readOnly"], "tmpfs": tmpfs})
    mount = Mount(spec.type, None, spec.target, spec.read_only, _tmpfs_options(spec))
    words = _mount(mount.target, "tmpfs", "tmpfs", "ro" if mount.read_only else "rw", *mount.options)["options"]
    text = ",".join(words).replace("size=1048576", "size=1m")
    for wanted in row["expectedSubstrings"]:
        assert wanted in text
    for unwanted in row["unexpectedSubstrings"] or ():
        assert unwanted not in words


def check_create(row: dict[str, Any]) -> None:
    options = row.get("opts", {})
    faulty = bool(row.get("expectedErr"))
    try:
        check_name(row.get("name", "data"), "volume")
        volumedrivers.check(volumedrivers.DRIVERS["local"], options)
    except InvalidArgument as error:
        assert faulty, error
        if "missing required option" in row["expectedErr"]:
            assert row["expectedErr"].split('"')[1] in error.reason
        return
    assert not faulty or row["doc"] == "invalid: name too short"  # one letter is a name here


def check_arguments(row: dict[str, Any]) -> None:
    names = {"MountDevice": "device", "MountType": "type", "MountOpts": "o"}
    options = {names[key]: value for key, value in row["opts"].items()}
    device, words = volumedrivers.source_and_options(options, lambda name: "1.2.3.4")
    assert (device, words) == (row["expectedDevice"], row.get("expectedOpts", "")), row["name"]


def check_name_row(row: dict[str, Any]) -> None:
    if row["$key"] == "x":
        return  # one letter is a name here
    try:
        check_name(row["$key"], "volume")
    except InvalidArgument:
        assert not row["$value"]
    else:
        assert row["$value"]


def check_subpath(row: dict[str, Any]) -> None:
    """Their paths are absolute, of a volume at /volume: ours are relative to it, and refuse `..` altogether."""
    path = row["subpath"]
    relative = path.removeprefix("/volume").lstrip("/") if path.startswith("/volume") else path
    data = {"source": "v", "target": "/t", "volume": {"subpath": relative}}
    if row["result"] and ".." not in Path(relative).parts:
        MountSpec.model_validate(data)
    elif row["name"] != "relative path":  # relative to the volume is what ours are
        with pytest.raises(ValueError):
            MountSpec.model_validate(data)


def _value(key: str) -> Any:
    return lambda row: volumedrivers.value_of(row["$key"], key) == row["$value"] or pytest.fail(str(row))


CHECKS = {
    ("linux_parser_test.go", "TestLinuxParseMountRaw"): check_short,
    ("linux_parser_test.go", "TestLinuxParseMountRawSplit"): check_split,
    ("linux_parser_test.go", "TestLinuxValidateMounts"): check_long,
    ("linux_parser_test.go", "TestConvertTmpfsOptions"): check_tmpfs,
    ("parser_test.go", "TestParseMountSpec"): check_long,
    ("validate_test.go", "TestValidateMount"): check_long,
    ("local_linux_test.go", "TestVolCreateValidation"): check_create,
    ("local_linux_test.go", "TestVolMountOpts"): check_arguments,
    ("local_test.go", "TestGetAddress"): _value("addr"),
    ("local_test.go", "TestGetPassword"): _value("password"),
    ("local_test.go", "TestCreate"): check_name_row,
    ("local_test.go", "TestValidateName"): check_name_row,
    ("common_test.go", "TestIsLocalTo"): check_subpath,
}
# of Windows, or of that implementation's own insides
ELSEWHERE = {
    "TestLCOWParseMountRaw", "TestLCOWParseMountRawSplit", "TestValidateLCOWMount", "TestCreateWithOpts",
    "TestReloadNoOpts", "TestJoinEscapingSymlink", "TestJoinGoodSymlink", "TestSetGetMeta", "TestFilterFunc",
}  # fmt: skip


def _tables() -> list[dict[str, Any]]:
    return list(json.loads(TABLES.read_text())["tables"]) if TABLES.exists() else []


def _rows() -> list[Any]:
    out = []
    for table in _tables():
        key = (table["file"].rpartition("/")[2], table["test"])
        if key not in CHECKS or table["type"] == "map[string][]string":  # which option needs which: rows of another
            continue
        for number, row in enumerate(table["rows"]):
            if table["test"] == "TestLinuxParseMountRawSplit" and row["bind"] == "local/name:/tmp:rw":
                continue  # a plugin's volume: no name here
            out.append(pytest.param(key, row, id=f"{table['test']}-{table['line']}-{number}"))
    return out


@pytest.mark.parametrize(("key", "row"), _rows())
def test_as_the_reference_implementation(key: tuple[str, str], row: Any) -> None:
    CHECKS[key](row)


def test_the_tables_are_there_and_none_is_left_out() -> None:
    if not TABLES.exists() and not os.environ.get("CI"):
        pytest.skip("the fixtures are not there")
    assert {table["test"] for table in _tables()} == {test for _, test in CHECKS} | ELSEWHERE


# --- our own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "data:/d:U,nocopy",
        "/h:/d:ro,Z,rslave",
        "/h:/d:cached",
        "~/x:/y",
        "./x:/y:z",
        "/anon",
        "/anon space",
        "v:/d:z",
        "v:/d:idmap",
        "/h:/d:ro,idmap",
        "/h:/d:idmap=uids=4242-1000-1#0-0-10;gids=7-8-9",
        "v:/d:idmap=gids=0-1-10,nocopy",
    ],
)
def test_short_forms_read_back(text: str) -> None:
    config = validated({"volumes": [text]})
    again = with_field(ContainerConfig(), "volumes", field_text("volumes", config))
    assert again.volumes == config.volumes
    assert config.volumes[0].plain() == text.removesuffix(":z") if text == "v:/d:z" else text


def test_short_binds_make_their_directory_and_long_ones_do_not() -> None:
    short, long = validated({"volumes": ["/h:/a", {"type": "bind", "source": "/h", "target": "/b"}]}).volumes
    assert short.bind is not None and short.bind.create_host_path and long.bind is None
    text = field_text("volumes", validated({"volumes": [short.model_dump(), long.model_dump()]}))
    assert text == "- /h:/a\n- type: bind\n  source: /h\n  target: /b\n"


@pytest.mark.parametrize(
    ("mount", "named"),
    [
        ({"type": "bind", "target": "/t"}, "source"),
        ({"type": "tmpfs", "source": "x", "target": "/t"}, "source"),
        ({"type": "volume", "target": "/t", "tmpfs": {"size": "1m"}}, "tmpfs"),
        ({"source": "v", "target": "/t", "volume": {"subpath": "../x"}}, "subpath"),
        ({"source": "v", "target": "/t", "volume": {"subpath": "/x"}}, "subpath"),
        ({"type": "tmpfs", "target": "/t", "tmpfs": {"mode": "0999"}}, "mode"),
        ({"type": "tmpfs", "target": "/t", "tmpfs": {"size": -1}}, "size"),
        ({"type": "bind", "source": "/h", "target": "/t", "bind": {"propagation": "both"}}, "propagation"),
        ({"source": "v", "target": "//"}, "target"),
        ("v:/t:ro,rw", "ro and rw"),
        ("v:/t:zz", "zz"),
        ("v:/t:idmap=", "idmap"),
        ("v:/t:idmap=both=0-1-1", "idmap"),
        ("v:/t:idmap=uids=0-1", "HOST-CONTAINER-COUNT"),
        ("v:/t:idmap=uids=0-1-x", "0-1-x"),
        ("v:/t:idmap=uids=0-1-0", "0-1-0"),
        ("v:/t:idmap=uids=0-1-1;uids=1-2-1", "idmap"),
        ("v:/t:idmap=uids=0-4294967294-2", "4294967294"),
        ("v:/t:idmap=uids=0-10-5#4-20-5", "two ranges have the id 4"),
        ("v:/t:idmap=gids=0-10-5#5-14-5", "two ranges have the id 14"),
        ("v:/t:idmap=uids=" + "#".join(f"{n}-{n}-1" for n in range(101)), "more than 100"),
        ("v:/t:idmap,idmap=uids=0-1-1", "exclude each other"),
        ("v:/t:idmap,U", "idmap"),
        ("/h:/t:idmap,rshared", "idmap"),
        ({"type": "tmpfs", "target": "/t", "tmpfs": {"idmap": True}}, "idmap"),
        ({"source": "v", "target": "/t", "volume": {"idmap": 7}}, "idmap"),
    ],
)
def test_faults_are_named(mount: Any, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        validated({"volumes": [mount]})


def test_id_ranges_are_podmans() -> None:
    """The first of three is the id on the host, the second what the container sees it as."""
    assert id_ranges("uids=0-1-10#10-11-10;gids=0-100-10") == {
        "uid": ((0, 1, 10), (10, 11, 10)),
        "gid": ((0, 100, 10),),
    }
    assert id_ranges("uids=@2000-1-1") == {"uid": ((2000, 1, 1),), "gid": ()}
    long = {"type": "bind", "source": "/h", "target": "/t", "bind": {"idmap": "gids=01-2-3;uids=@0-1-1"}}
    spec = validated({"volumes": [long]}).volumes[0]
    assert spec.idmap == "uids=0-1-1;gids=1-2-3" and parsed("/h:/t:" + f"idmap={spec.idmap}").idmap == spec.idmap
    for said, idmap in ((True, True), ("true", True), (False, False)):
        assert MountSpec.model_validate({"source": "v", "target": "/t", "volume": {"idmap": said}}).idmap is idmap
    assert parsed("v:/t").idmap is False


@pytest.mark.parametrize(("one", "other"), [(4242, 1000), (0, 1000), (0, 1), (7, 7), (4294967294, 0)])
def test_two_ids_are_exchanged_and_all_others_stay(one: int, other: int) -> None:
    rows = exchanged(one, other)
    assert sum(count for _, _, count in rows) == ALL_IDS[2]
    for side in (0, 1):
        edges = sorted((row[side], row[side] + row[2]) for row in rows)
        assert edges[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(edges))
    seen = lambda id: next(inside + id - first for first, inside, count in rows if first <= id < first + count)  # noqa: E731
    assert (seen(one), seen(other), seen(500), seen(70000)) == (other, one, 500, 70000)


def test_volumes_from_are_names_with_or_without_access() -> None:
    config = validated({"volumes_from": ["web", "db:ro"]})
    assert field_text("volumes_from", config) == "web\ndb:ro\n"
    assert [parse_from(text) for text in config.volumes_from] == [("web", None), ("db", True)]
    for bad in ("", ":ro", "web:both"):
        with pytest.raises(InvalidArgument, match="volumes_from"):
            validated({"volumes_from": [bad]})


def test_modes_are_octal_in_texts() -> None:
    assert (parse_mode("1777"), parse_mode(0o700)) == (0o1777, 0o700)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        spec = parsed(text)
    except ValueError:
        return
    assert spec.target.startswith("/") and spec.target != "/"


@given(st.text(max_size=60))
def test_options_of_mount_never_lose_a_word(text: str) -> None:
    _, data = volumedrivers.split_options(text)
    assert set(data.split(",")) <= {*text.split(","), ""}

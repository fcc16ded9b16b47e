"""containers/list.jsonl: what it says is what the containers' own files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines import SMALL, add_image

from engine.engine import Engine
from engine.errors import InvalidArgument
from engine.netconfig import PortSpec
from fdfs.entry import File, render, walk
from fdfs.tree.containerlist import published
from fdfs.tree.containers import CONTAINERS
from fdfs.tree.networks import NETWORKS
from fdfs.tree.root import ROOT
from fdfs.tree.volumes import VOLUMES


def text(engine: Engine, path: str) -> str:
    found = walk(engine, ROOT, f"containers/{path}".encode())
    assert isinstance(found.row, File)
    return render(engine, found.row, found.keys).decode()


def test_the_list_of_containers_says_what_their_files_say(tmp_path: Path) -> None:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        assert text(engine, "list.jsonl") == ""
        add_image(engine, "docker.io/library/small:1", SMALL)
        for name in ("web", "listed"):
            engine.containers.create(name)
        engine.containers.set_field("listed", "image", "small:1")
        engine.containers.start("listed")
        listed = {row["name"]: row for row in map(json.loads, text(engine, "list.jsonl").splitlines())}
        assert list(listed) == ["listed", "web"] and listed["listed"]["state"] == "running"
        for name, row in listed.items():
            files = {key: key for key in row if key not in ("name", "image", "digest", "ports")}
            for key, file in {**files, "image": "config/image", "digest": "image"}.items():
                value = "" if row[key] is None else str(int(row[key]) if isinstance(row[key], bool) else row[key])
                assert value == text(engine, f"{name}/{file}").strip(), (name, key)


def test_nothing_is_named_as_a_file_beside_it(tmp_path: Path) -> None:
    with Engine(tmp_path / "store", runtime="fake") as engine:
        for directory, create in (
            (CONTAINERS, lambda name: engine.containers.create(name, None)),
            (VOLUMES, engine.volumes.create),
            (NETWORKS, engine.networks.create),
        ):
            for row in directory.rows:
                with pytest.raises(InvalidArgument, match=f"{row.name} is a file beside every"):
                    create(row.name)


def test_a_published_range_is_one_entry_of_the_list() -> None:
    one = PortSpec(container=80, container_last=80, host=8080, host_last=8080)
    many = PortSpec(host_ip="::1", container=80, container_last=89, host=8080, host_last=8089, protocol="udp")
    assert published(one) == "80/tcp 0.0.0.0:8080"
    assert published(many) == "80-89/udp [::1]:8080-8089"

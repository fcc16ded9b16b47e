"""Docker's own archives: what `docker save` wrote before it wrote OCI layouts, and before 1.10. Floor 2.

Only here: what their documents say, as a configuration, the layers' files and names for each image. Everything in them
is hostile: documents are bounded, names are looked up in the archive and nowhere else (files.py). Nothing is stored.

Sources: Docker image spec v1.2 (`docker save`: manifest.json, repositories), v1 for the oldest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import Damaged, InvalidArgument, NotFound, TooLarge
from engine.images import manifests
from engine.images.files import Files
from engine.images.reference import parse
from engine.jobs import Task
from engine.model import canonical_json
from engine.store.inflate import inflate

MAX_IMAGES = 256  # in one archive

Parts = tuple[bytes, list[str], list[str]]  # of an image without a manifest: configuration, layers' files, names


@dataclass(frozen=True, slots=True)
class _Saved:
    """One entry of a docker archive's manifest.json."""

    config: str
    layers: list[str]
    tags: list[str]


def usable_name(text: str, task: Task) -> str | None:
    """A name an archive gives, normalised; None, and the log says why, when it is none."""
    try:
        return parse(text).normalised()
    except InvalidArgument as error:
        task.log(f"the name {text[:200]!r} is not taken over: {error.reason}")
        return None


def saved(files: Files, task: Task) -> Iterator[Parts]:
    """Of one that `docker save` has made: manifest.json lists the images."""
    data = manifests.load_json(files.read("manifest.json", manifests.MAX_MANIFEST), "manifest.json")
    if not isinstance(data, list) or not data:
        raise Damaged("manifest.json: a list of images expected", at="manifest.json")
    if len(data) > MAX_IMAGES:
        raise TooLarge(f"manifest.json: more than {MAX_IMAGES} images", at="manifest.json")
    for number, item in enumerate(data):
        one = _saved(item, f"manifest.json[{number}]")
        names = [name for tag in one.tags if (name := usable_name(tag, task)) is not None]
        yield files.read(one.config, manifests.MAX_CONFIG), one.layers, names


def _saved(item: Any, where: str) -> _Saved:
    if not isinstance(item, dict):
        raise Damaged(f"{where}: an object expected", at=where)

    def strings(key: str) -> list[str]:
        value = item.get(key) or []
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise Damaged(f"{where}.{key}: a list of strings expected", at=f"{where}.{key}")
        if len(value) > manifests.MAX_LAYERS:
            raise TooLarge(f"{where}.{key}: more than {manifests.MAX_LAYERS} entries", at=f"{where}.{key}")
        return value

    config = item.get("Config")
    if not isinstance(config, str) or not config:
        raise Damaged(f"{where}.Config: a file name expected", at=f"{where}.Config")
    return _Saved(config, strings("Layers"), strings("RepoTags"))


def legacy(files: Files, task: Task) -> Iterator[Parts]:
    """Of Docker before 1.10: `repositories` names the top of chains of `<id>/json` and `<id>/layer.tar`."""
    data = manifests.load_json(files.read("repositories", manifests.MAX_MANIFEST), "repositories")
    if not isinstance(data, dict):
        raise Damaged("repositories: an object expected", at="repositories")
    tops: dict[str, list[str]] = {}
    for repository, tags in data.items():
        if not isinstance(tags, dict) or not all(isinstance(top, str) for top in tags.values()):
            raise Damaged(f"repositories.{repository[:100]}: tags expected", at="repositories")
        for tag, top in tags.items():
            tops.setdefault(top, []).append(f"{repository}:{tag}")
    if not tops or len(tops) > MAX_IMAGES:
        raise Damaged(f"repositories: between 1 and {MAX_IMAGES} images expected", at="repositories")
    for top, texts in tops.items():
        names = [name for text in texts if (name := usable_name(text, task)) is not None]
        yield *_legacy_config(files, top, task), names


def _legacy_config(files: Files, top: str, task: Task) -> tuple[bytes, list[str]]:
    """A configuration made of the chain of v1 documents below `top`, and the layers it has, lowest first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    seen: set[str] = set()
    here = top
    while here:
        if here in seen or len(chain) >= manifests.MAX_LAYERS:
            raise Damaged("the chain of parents does not end", at=here[:100])
        seen.add(here)
        document = manifests.load_json(files.read(f"{here}/json", manifests.MAX_CONFIG), f"{here[:80]}/json")
        if not isinstance(document, dict):
            raise Damaged("an object expected", at=f"{here[:80]}/json")
        chain.append((here, document))
        parent = document.get("parent") or ""
        if not isinstance(parent, str):
            raise Damaged("parent: a string expected", at=f"{here[:80]}/json")
        here = parent
    chain.reverse()
    diff_ids, history, sources = [], [], []
    for name, document in chain:
        step = {key: document[key] for key in ("created", "author", "comment") if isinstance(document.get(key), str)}
        ran = document.get("container_config")
        command = ran.get("Cmd") if isinstance(ran, dict) else None
        if isinstance(command, list):
            step["created_by"] = " ".join(str(word) for word in command)
        source = f"{name}/layer.tar"
        digester, size = hashlib.sha256(), 0
        try:
            for block in inflate(iter(files.chunks(source))):
                digester.update(block)
                size += len(block)
                task.check()
        except NotFound:
            size = 0
        if size:
            diff_ids.append("sha256:" + digester.hexdigest())
            sources.append(source)
            history.append(step)
        else:
            history.append({**step, "empty_layer": True})
    last = chain[-1][1]
    config = {key: last[key] for key in ("created", "author", "architecture", "os", "config") if last.get(key)}
    config = {"architecture": "amd64", "os": "linux", **config}
    config |= {"rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history}
    return canonical_json(config), sources

"""One mount of a container, as written: `source:target[:options]`, `/target` alone, or a mapping. Floor 0.

Only here: the grammar and its bounds; which of it a host can carry out is said in attach.py. The short form is Docker's
`-v` (moby volume/mounts/linux_parser.go) and podman's `U`; the long form is the compose specification's.

    name:/data            a volume; it is created by the first start
    /data                 an anonymous volume: named after the container, removed with it
    /host/dir:/data       a bind mount (also ./ and ~/); a missing directory is made, as `docker run -v` does
    …:ro,z,rslave         ro rw · z Z · U · nocopy · [r]shared [r]slave [r]private · consistent cached delegated
    …:idmap               owners shown as others: podman's, with ranges or without (`id_ranges`)
"""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from engine.model import Frozen, Size

MAX_MOUNTS = 1024
MAX_RANGES = 100  # of ids: the kernel takes a page of text for a map

IdRange = tuple[int, int, int]  # first id on the host, first in the container, how many
ALL_IDS: IdRange = (0, 0, (1 << 32) - 1)  # the last one means none


def _ranges(text: str) -> tuple[IdRange, ...]:
    out, texts = [], text.split("#")
    if len(texts) > MAX_RANGES:
        raise ValueError(f"idmap: more than {MAX_RANGES} ranges")
    for row in texts:
        words = row.removeprefix("@").split("-")  # @: relative to the container's user namespace, which is the host's
        if len(words) != 3 or not all(word.isascii() and word.isdigit() and len(word) <= 10 for word in words):
            raise ValueError(f"idmap: HOST-CONTAINER-COUNT expected, not {row!r}")
        first, inside, count = (int(word) for word in words)
        if not count or max(first, inside) + count > ALL_IDS[2]:
            raise ValueError(f"idmap: {row!r} does not lie between 0 and {ALL_IDS[2] - 1}")
        out.append((first, inside, count))
    for side in (0, 1):
        for one, after in pairwise(sorted((row[side], row[2]) for row in out)):
            if sum(one) > after[0]:
                raise ValueError(f"idmap: two ranges have the id {after[0]}")
    return tuple(out)


def id_ranges(text: str) -> dict[str, tuple[IdRange, ...]]:
    """`uids=H-C-N[#H-C-N…];gids=…` as ranges of "uid" and "gid", empty where not said. ValueError names the fault."""
    out: dict[str, tuple[IdRange, ...]] = {"uid": (), "gid": ()}
    for part in text.split(";"):
        kind, _, rows = part.partition("=")
        if kind not in ("uids", "gids") or out[kind[:3]]:
            raise ValueError(f"idmap: uids=HOST-CONTAINER-COUNT;gids=… expected, not {text!r}")
        out[kind[:3]] = _ranges(rows)
    return out


def _idmap(value: Any) -> Any:
    """True, false, or ranges in their plainest spelling."""
    if isinstance(value, str) and value not in ("true", "false"):
        said = [(kind, rows) for kind, rows in id_ranges(value).items() if rows]
        return ";".join(f"{kind}s=" + "#".join("-".join(map(str, row)) for row in rows) for kind, rows in said)
    if isinstance(value, str | bool):
        return value in ("true", True)
    raise ValueError("true or uids=HOST-CONTAINER-COUNT;gids=… expected")


IdMap = Annotated[bool | str, BeforeValidator(_idmap)]


class MountKind(StrEnum):
    VOLUME = "volume"
    BIND = "bind"
    TMPFS = "tmpfs"


class Propagation(StrEnum):
    """Whether mounts made below it later are seen on the other side (mount_namespaces(7)); default rprivate."""

    SHARED = "shared"
    RSHARED = "rshared"
    SLAVE = "slave"
    RSLAVE = "rslave"
    PRIVATE = "private"
    RPRIVATE = "rprivate"


class SELinux(StrEnum):
    """z: a label all containers may use; Z: one for this container."""

    SHARED = "z"
    PRIVATE = "Z"


class Consistency(StrEnum):
    """Docker Desktop's; nothing to do here, taken so that such configs work."""

    CONSISTENT = "consistent"
    CACHED = "cached"
    DELEGATED = "delegated"


class BindOptions(Frozen):
    propagation: Propagation | None = None
    create_host_path: bool = False
    selinux: SELinux | None = None
    idmap: IdMap = False


class VolumeOptions(Frozen):
    nocopy: bool = False
    subpath: str = ""
    idmap: IdMap = False

    @field_validator("subpath")
    @classmethod
    def _subpath(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or "\0" in value:
            raise ValueError("must be a relative path inside the volume, without '..'")
        return "" if str(path) == "." else str(path)


def parse_mode(value: Any) -> Any:
    """Permission bits: a number, or octal digits in a text (`"0700"`, as YAML 1.2 and people write them)."""
    if isinstance(value, str):
        if not value or value.strip("01234567"):
            raise ValueError(f"octal digits expected, not {value!r}")
        return int(value, 8)
    return value


class TmpfsOptions(Frozen):
    size: Size = None
    mode: Annotated[Annotated[int, Field(ge=0, le=0o7777)] | None, BeforeValidator(parse_mode)] = None


class MountSpec(Frozen):
    """`source` is a volume's name ('': anonymous), a path of the host, or '' for a tmpfs."""

    type: MountKind = MountKind.VOLUME
    source: str = ""
    target: str
    read_only: bool = False
    own: bool = False  # U: the container's user becomes the owner of the source
    consistency: Consistency | None = None
    bind: BindOptions | None = None
    volume: VolumeOptions | None = None
    tmpfs: TmpfsOptions | None = None

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        path = PurePosixPath(value)
        if not path.is_absolute() or ".." in path.parts or "\0" in value:
            raise ValueError("must be an absolute path inside the container, without '..', and not /")
        clean = "/" + "/".join(part for part in path.parts[1:])  # PurePosixPath keeps a leading //
        if clean == "/":
            raise ValueError("must be an absolute path inside the container, without '..', and not /")
        return clean

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        if value.startswith("~") and value[1:2] not in ("", "/"):
            raise ValueError("only ~/ is expanded, not another user's home")
        return value

    @model_validator(mode="after")
    def _fits(self) -> MountSpec:
        for kind in MountKind:
            if kind is not self.type and getattr(self, kind) is not None:
                raise ValueError(f"{kind}: options of another type than {self.type}")
        if self.type is MountKind.BIND and not self.source:
            raise ValueError("source: a bind mount needs a path of the host")
        if self.type is MountKind.TMPFS and self.source:
            raise ValueError("source: a tmpfs has none")
        if self.own and self.type is MountKind.TMPFS:
            raise ValueError("own: a tmpfs has no source to give away")
        if self.own and self.idmap:
            raise ValueError("idmap: U changes the owners that idmap leaves as they are")
        if self.idmap and self.propagation in (Propagation.SHARED, Propagation.RSHARED):
            raise ValueError(f"idmap: no {self.propagation} mount: what is mounted in the container stays there")
        return self

    @property
    def propagation(self) -> Propagation | None:
        return self.bind.propagation if self.bind else None

    @property
    def selinux(self) -> SELinux | None:
        return self.bind.selinux if self.bind else None

    @property
    def idmap(self) -> bool | str:
        """Whether owners are mapped: the source's owner to the container's user (True), or by ranges (`id_ranges`)."""
        options = self.bind or self.volume
        return options.idmap if options else False

    @property
    def anonymous(self) -> bool:
        return self.type is MountKind.VOLUME and not self.source

    def short(self) -> str | None:
        """The short form where it says the same."""
        try:
            text = self._short()
            same = MountSpec.model_validate(short_form(text)) == self
        except ValueError:
            return None
        return text if same else None

    def _short(self) -> str:
        words = [word for word, said in (("ro", self.read_only), (self.selinux, self.selinux),
                                         (self.propagation, self.propagation), ("U", self.own),
                                         ("idmap" if self.idmap is True else f"idmap={self.idmap}", self.idmap),
                                         ("nocopy", self.volume and self.volume.nocopy),
                                         (self.consistency, self.consistency)) if said]  # fmt: skip
        source = f"{self.source}:" if self.source else ""
        return source + self.target + (":" + ",".join(str(word) for word in words) if words else "")

    def plain(self) -> str | dict[str, Any]:
        """What a document shows: the short form where it says the same, else a mapping of what is set."""
        short = self.short()
        if short is not None:
            return short
        data = {"type": str(self.type), **self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)}
        for name in ("bind", "volume", "tmpfs"):
            if name in data and not data[name]:
                del data[name]
        if self.tmpfs is not None and self.tmpfs.mode is not None:
            data["tmpfs"]["mode"] = f"{self.tmpfs.mode:04o}"
        return data


_ACCESS, _MAPPED = ("ro", "rw"), ("idmap",)
_CLASSES: tuple[tuple[str, ...], ...] = (
    _ACCESS, tuple(SELinux), tuple(Propagation), tuple(Consistency), ("nocopy",), ("U",), _MAPPED
)  # fmt: skip


def _options(text: str, whole: str) -> dict[tuple[str, ...], str]:
    """Each word's class and the word. ValueError for an unknown one, or two of a class."""
    out: dict[tuple[str, ...], str] = {}
    for word in text.split(","):
        found = _MAPPED if word.startswith("idmap=") else next((words for words in _CLASSES if word in words), None)
        if found is None:
            known = " ".join(word for words in _CLASSES for word in words)
            raise ValueError(f"invalid mode {text!r} in {whole!r}: {word!r} is none of {known}")
        if found in out:
            raise ValueError(f"invalid mode {text!r} in {whole!r}: {out[found]} and {word} exclude each other")
        out[found] = word
    return out


def short_form(text: str) -> dict[str, Any]:
    """A short form as the mapping it stands for. ValueError says what is wrong with it."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise ValueError(f"source:target[:options] or /target expected, not {text!r}")
    words = _options(parts[2], text) if len(parts) == 3 else {}
    source, target = ("", parts[0]) if len(parts) == 1 else parts[:2]
    access, label, spread, consistency, nocopy, own, mapped = (words.get(kind) for kind in _CLASSES)
    idmap = mapped.removeprefix("idmap=") if mapped != "idmap" and mapped else bool(mapped)
    data: dict[str, Any] = {
        "source": source, "target": target, "read_only": access == "ro", "own": bool(own), "consistency": consistency,
    }  # fmt: skip
    if source[:1] in ("/", ".", "~"):
        bind = {"propagation": spread, "create_host_path": True, "selinux": label, "idmap": idmap}
        return {**data, "type": MountKind.BIND, "bind": bind}
    if spread:
        raise ValueError(f"invalid mode {parts[2]!r} in {text!r}: a volume has no mount propagation")
    if nocopy or mapped:
        data["volume"] = {"nocopy": bool(nocopy), "idmap": idmap}
    return data  # z and Z: the store's own files have the label containers may use


def parse_mounts(value: Any) -> Any:
    """A list of mounts in either form, or a text with a short form on each line, as plain data for validation."""
    if isinstance(value, str):
        value = [line for line in value.splitlines() if line]
    if not isinstance(value, list | tuple):
        return value
    if len(value) > MAX_MOUNTS:
        raise ValueError(f"more than {MAX_MOUNTS} mounts")
    return [short_form(item) if isinstance(item, str) else item for item in value]


def parse_from(text: str) -> tuple[str, bool | None]:
    """`NAME[:ro|rw]` of volumes_from: the container, and whether all is read-only (None: as it has them)."""
    name, colon, access = text.partition(":")
    if not name or (colon and access not in _ACCESS):
        raise ValueError(f"NAME[:ro|rw] expected, not {text!r}")
    return name, access == "ro" if colon else None


def _from(value: str) -> str:
    parse_from(value)
    return value


VolumesFrom = tuple[Annotated[str, AfterValidator(_from)], ...]

"""One mount of a container, as written: `source:target[:options]`, `/target` alone, or a mapping. Floor 0.

Only here: the grammar and its bounds; which of it a host can carry out is said in attach.py. The short form is Docker's
`-v` (moby volume/mounts/linux_parser.go) and podman's `U`; the long form is the compose specification's.

    name:/data            a volume; it is created by the first start
    /data                 an anonymous volume: named after the container, removed with it
    /host/dir:/data       a bind mount (also ./ and ~/); a missing directory is made, as `docker run -v` does
    …:ro,z,rslave         ro rw · z Z · U · nocopy · [r]shared [r]slave [r]private · consistent cached delegated
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from engine.model import Frozen, Size

MAX_MOUNTS = 1024


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


class VolumeOptions(Frozen):
    nocopy: bool = False
    subpath: str = ""

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
        return self

    @property
    def propagation(self) -> Propagation | None:
        return self.bind.propagation if self.bind else None

    @property
    def selinux(self) -> SELinux | None:
        return self.bind.selinux if self.bind else None

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


_ACCESS = ("ro", "rw")
_CLASSES: tuple[tuple[str, ...], ...] = (
    _ACCESS, tuple(SELinux), tuple(Propagation), tuple(Consistency), ("nocopy",), ("U",)
)  # fmt: skip


def _options(text: str, whole: str) -> dict[tuple[str, ...], str]:
    """Each word's class and the word. ValueError for an unknown one, or two of a class."""
    out: dict[tuple[str, ...], str] = {}
    for word in text.split(","):
        found = next((words for words in _CLASSES if word in words), None)
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
    access, label, spread, consistency, nocopy, own = (words.get(kind) for kind in _CLASSES)
    data: dict[str, Any] = {
        "source": source, "target": target, "read_only": access == "ro", "own": bool(own), "consistency": consistency,
    }  # fmt: skip
    if source[:1] in ("/", ".", "~"):
        bind = {"propagation": spread, "create_host_path": True, "selinux": label}
        return {**data, "type": MountKind.BIND, "bind": bind}
    if spread:
        raise ValueError(f"invalid mode {parts[2]!r} in {text!r}: a volume has no mount propagation")
    if nocopy:
        data["volume"] = {"nocopy": True}
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

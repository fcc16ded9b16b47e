"""What a container's mounts are on this host: from its config to sources that exist. Floor 3.

Only here: which mounts a start has (its own, those of volumes_from, the image's VOLUMEs), and what is checked, made and
handed over before the runtime sees them. Paths of the host are resolved as the user wrote them; paths of the container
(targets, subpaths, image content) only below their root (openat2), so no link in an image or a volume leads out of it.

Order of precedence for one target: the container's own, then volumes_from in its order, then the image's VOLUME.

Threading: any thread; every volume is acquired under its own lock.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from engine import host, volumeusers
from engine.config import ContainerConfig
from engine.errors import AccessDenied, EngineError, InvalidArgument, NotFound
from engine.giving import check_ours, give, relabel, shares
from engine.hostmounts import mount_of
from engine.model import ImageConfig, check_name
from engine.mountspec import MountKind, MountSpec, Propagation, SELinux, parse_from
from engine.options import tmpfs
from engine.records import Container, Records
from engine.runtimes.base import Mount
from engine.runtimes.selinux import Labels
from engine.runtimes.users import identify, make_directory
from engine.staging import RESOLVE, Staging
from engine.treecopy import copy_metadata, copy_tree
from engine.volumefill import OURS, empty, fill
from engine.volumes import Volumes

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Attached:
    mounts: list[Mount] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was asked for and does nothing here

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def check_mounts(config: ContainerConfig) -> None:
    """What can be said of a config's mounts before it runs. InvalidArgument names the field."""
    targets = set()
    for item in config.volumes:
        if item.target in targets:
            raise InvalidArgument(f"volumes: two mounts at {item.target}", at=item.target)
        targets.add(item.target)
        if item.target in (tmpfs(text)[0] for text in config.tmpfs):
            raise InvalidArgument(f"tmpfs: {item.target}: volumes has a mount there", at=item.target)
        if item.type is MountKind.VOLUME and not item.anonymous:
            if "/" in item.source:
                raise InvalidArgument(
                    f"volumes: {item.source} is no name of a volume", at=item.source,
                    hint=f"a directory of the host is said by its whole path, or ./{item.source} to `run -v`",
                )  # fmt: skip
            check_name(item.source, "volume")
        elif item.type is MountKind.BIND and not Path(item.source).expanduser().is_absolute():
            raise InvalidArgument(f"volumes: {item.source}: an absolute path expected", at=item.source)
    for text in config.volumes_from:
        check_name(parse_from(text)[0], "container")


class Attachments:
    """`image_of` gives the configuration of a container's image, for its VOLUMEs."""

    def __init__(
        self, store: Path, records: Records, volumes: Volumes, image_of: Callable[[Container], ImageConfig]
    ) -> None:
        self._places = Staging(store / "run" / "sources")
        self._records, self._volumes, self._image_of = records, volumes, image_of

    # --- which mounts -------------------------------------------------------------------------------------------------

    def specs(self, container: Container, image: ImageConfig | None = None) -> list[MountSpec]:
        """Its mounts, anonymous volumes by their names. NotFound for a container of volumes_from that is not there."""
        return self._specs(container, image, frozenset({container.name}))

    def _specs(self, container: Container, image: ImageConfig | None, above: frozenset[str]) -> list[MountSpec]:
        out: dict[str, MountSpec] = {}
        for item in container.config.volumes:
            out[item.target] = self._named(container, item)
        for text in container.config.volumes_from:
            name, read_only = parse_from(text)
            if name in above:
                raise InvalidArgument(f"volumes_from: {name} takes its volumes from this container", at=name)
            try:
                other = self._records.get(name)
            except NotFound as error:
                raise NotFound(f"volumes_from: {error.reason}", at=name, hint="ls containers") from error
            for item in self._specs(other, None, above | {name}):
                given = item if read_only is None else item.model_copy(update={"read_only": read_only})
                out.setdefault(item.target, given)
        if image is None:
            try:
                image = self._image_of(container)
            except EngineError:  # no image yet, or it is gone: then it declares nothing
                image = ImageConfig()
        covered = {tmpfs(text)[0] for text in container.config.tmpfs}
        for target in sorted(image.runtime.volumes or ()):
            try:
                item = MountSpec(target=target)
            except ValueError:
                log.warning("the image of %s declares a VOLUME that cannot be: %r", container.name, target)
                continue
            if item.target not in covered:
                out.setdefault(item.target, self._named(container, item))
        return list(out.values())

    @staticmethod
    def _named(container: Container, item: MountSpec) -> MountSpec:
        if not item.anonymous:
            return item
        return item.model_copy(update={"source": volumeusers.anonymous_name(container.id, item.target)})

    def shown(self, container: Container) -> list[MountSpec]:
        """As `specs`, or only its own while volumes_from names what is not there: the start says so."""
        try:
            return self.specs(container)
        except EngineError:
            return list(container.config.volumes)

    # --- a start ------------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(
        self, container: Container, image: ImageConfig, rootfs: Path, user: str, labels: Labels
    ) -> Iterator[Attached]:
        """The mounts of a start, ready to be used while the block runs. Errors name the path that is at fault.

        A path inside a volume is bound to a place of our own while the block runs: whoever writes to the volume cannot
        exchange it between the look and the mount. So is what has its owners mapped, or is given away.
        """
        out = Attached()
        with ExitStack() as stack:
            for item in self.specs(container, image):
                mount = self._mount(container, item, rootfs, user, labels, out, stack)
                out.mounts.append(mount)
                _make_target(rootfs, mount, [other.target for other in out.mounts[:-1]])
            for note in out.notes:
                log.info("container %s: %s", container.name, note)
            yield out

    def _mount(
        self,
        container: Container,
        item: MountSpec,
        rootfs: Path,
        user: str,
        labels: Labels,
        out: Attached,
        stack: ExitStack,
    ) -> Mount:
        if item.type is MountKind.TMPFS:
            return Mount(item.type, None, item.target, item.read_only, _tmpfs_options(item))
        if item.type is MountKind.BIND:
            source = bind_source(item)
            if item.propagation is not None:
                _check_propagation(source, item.propagation)
            if item.selinux is not None and not labels.private:
                out.note(f"z and Z do nothing: {labels.note}")
            changes = ["U"] if item.own else []
            changes += [item.selinux] if item.selinux is not None and labels.private else []
            for change in changes:
                check_ours(change, os.path.realpath(source))
            if changes and host.LINUX:  # what is changed is what is mounted, by one look
                shared = item.propagation in (Propagation.SHARED, Propagation.RSHARED)
                check = partial(check_ours, changes[-1])  # of labels more is kept than of owners
                source = stack.enter_context(self._places.held(source, check, shared=shared))
            if item.selinux is not None and labels.private:
                context = labels.private if item.selinux is SELinux.PRIVATE else labels.shared
                self._label(source, context, item.source, out)
            if item.own:
                give(source, rootfs, user)
            if item.idmap:
                source = stack.enter_context(
                    self._places.mapped(source, item.idmap, identify(rootfs, user), item.source)
                )
            spread = (item.propagation,) if item.propagation else ()
            return Mount(item.type, source, item.target, item.read_only, spread, isinstance(item.idmap, str))
        options = item.volume
        if item.source == volumeusers.anonymous_name(container.id, item.target):
            self._volumes.anonymous(container.id, item.target)
        else:
            self._volumes.ensure(item.source)
        volume = self._volumes.acquire(item.source)
        if not (options and (options.nocopy or options.subpath)):
            with self._volumes.changing(item.source):  # two starts with one new volume
                first_use(volume.path, rootfs, item.target)
        source = volume.path
        # what a driver mounted may be anything of the host's
        if labels.shared and not self._volumes.mounts(volume) and not shares(volume.path, labels.shared):
            self._label(source, labels.shared, f"volume {item.source}", out)
        if item.own:
            give(source, rootfs, user)
        if options and options.subpath:
            source = stack.enter_context(self._places.below(volume.path, item.source, options.subpath))
        if item.idmap:
            who = identify(rootfs, user)
            source = stack.enter_context(self._places.mapped(source, item.idmap, who, f"volume {item.source}"))
        read_only = item.read_only or volume.read_only
        return Mount(item.type, source, item.target, read_only, some_ids=isinstance(item.idmap, str))

    def _label(self, source: Path, context: str, name: str, out: Attached) -> None:
        if not relabel(source, context):
            out.note(f"z and Z do nothing: the file system of {name} has no SELinux labels")

    # --- the end ------------------------------------------------------------------------------------------------------

    def release(self, container: Container) -> None:
        """The container has ended: volumes a driver mounted for it are taken down when nobody else uses them. At once,
        without waiting; raises nothing."""
        try:
            names = [item.source for item in self.specs(container) if item.type is MountKind.VOLUME]
            names = [name for name in names if self._mounted_by_driver(name)]
        except EngineError as error:
            log.info("container %s: %s", container.name, error)
            return
        if names:  # a server may have gone away: nobody waits for that
            threading.Thread(target=self._settle, args=(names,), name="settle-volumes", daemon=True).start()

    def _settle(self, names: list[str]) -> None:
        for name in names:
            self._volumes.settle(name)

    def _mounted_by_driver(self, name: str) -> bool:
        try:
            volume = self._volumes.get(name)
        except NotFound:
            return False
        return self._volumes.mounts(volume)

    def settle_all(self) -> None:
        """After a restart: take down what a driver mounted for containers that do not run any more, and what a start
        that was killed left."""
        self._places.clear()
        for volume in self._volumes.all():
            if self._volumes.mounts(volume):
                self._volumes.settle(volume.name)


# --- bind mounts ------------------------------------------------------------------------------------------------------


def bind_source(item: MountSpec) -> Path:
    """The path of the host, there and readable. The short form makes a missing directory, as `docker run -v` does."""
    source = Path(item.source).expanduser()
    if not source.is_absolute():
        raise InvalidArgument(f"volumes: {item.source}: an absolute path expected", at=item.source)
    try:
        info = os.stat(source)
    except FileNotFoundError:
        if os.path.islink(source):
            raise NotFound(f"volumes: {source} is a link to what is not there", at=item.source) from None
        if not (item.bind and item.bind.create_host_path):
            raise NotFound(
                f"volumes: {source} does not exist", at=item.source,
                hint="make it, or say bind: {create_host_path: true}",
            ) from None  # fmt: skip
        try:
            os.makedirs(source, 0o755)
        except FileExistsError:
            pass  # made by somebody else meanwhile
        except OSError as error:
            raise InvalidArgument(f"volumes: {source} cannot be made: {error.strerror}", at=item.source) from error
        log.info("made %s for a bind mount", source)
        info = os.stat(source)
    except NotADirectoryError as error:
        raise InvalidArgument(f"volumes: {source}: {error.strerror}", at=item.source) from error
    except OSError as error:
        raise AccessDenied(f"volumes: {source}: {error.strerror}", at=item.source) from error
    if not os.access(source, os.R_OK | (os.X_OK if stat.S_ISDIR(info.st_mode) else 0)):
        raise AccessDenied(f"volumes: {source} is not readable", at=item.source)
    return source


def _check_propagation(source: Path, wanted: Propagation) -> None:
    """shared and slave mean something only below a mount of the host that is shared itself."""
    if wanted in (Propagation.PRIVATE, Propagation.RPRIVATE):
        return
    point, tags = mount_of(source)
    shared = any(tag.startswith("shared:") for tag in tags)
    if not shared and not (wanted in (Propagation.SLAVE, Propagation.RSLAVE) and any(
        tag.startswith("master:") for tag in tags
    )):  # fmt: skip
        kind = "shared" if wanted in (Propagation.SHARED, Propagation.RSHARED) else "shared or slave"
        raise InvalidArgument(
            f"volumes: {source} lies on the mount {point}, which is not a {kind} mount", at=str(source),
            hint=f"mount --make-rshared {point}",
        )  # fmt: skip


# --- volumes ----------------------------------------------------------------------------------------------------------


def first_use(data: Path, rootfs: Path, target: str) -> None:
    """An empty volume gets what the image has at `target`: its content, and the owner and mode of the directory."""
    with host.directory_fd(rootfs) as root:
        try:
            source = host.open_in_root(root, target, os.O_RDONLY | os.O_DIRECTORY, resolve=RESOLVE)
        except OSError:
            return  # nothing there, or a file
        try:
            if not empty(data):
                return
            if not os.listdir(source):
                with host.directory_fd(data) as fd:
                    copy_metadata(source, fd)
                return
            fill(data, lambda place: _ignore(copy_tree(source, place, skip=OURS)))
            log.info("volume at %s got the image's content of %s", data, target)
        finally:
            os.close(source)


def _ignore(_: object) -> None:
    pass


# --- inside -----------------------------------------------------------------------------------------------------------


def _tmpfs_options(item: MountSpec) -> tuple[str, ...]:
    options = item.tmpfs
    out = []
    if options is not None and options.size is not None:
        out.append(f"size={options.size}")
    if options is not None and options.mode is not None:
        out.append(f"mode={options.mode:o}")
    return tuple(out)


def _make_target(rootfs: Path, mount: Mount, before: list[str]) -> None:
    """The place to mount on, made inside the root filesystem only. InvalidArgument for a directory over a file."""
    if mount.source is None:
        return  # a tmpfs takes the mode of what it covers, if there is something: the runtime makes it
    wants_directory = os.path.isdir(mount.source)
    if not rootfs.is_dir() or any(mount.target.startswith(other + "/") for other in before):
        return  # it lies in what is mounted there: the runtime makes it
    with host.directory_fd(rootfs) as root:
        try:
            fd = host.open_in_root(root, mount.target, getattr(os, "O_PATH", os.O_RDONLY), resolve=RESOLVE)
        except FileNotFoundError:
            _make(rootfs, root, mount.target, wants_directory)
            return
        except OSError as error:
            raise InvalidArgument(f"volumes: {mount.target}: {error.strerror}", at=mount.target) from error
        try:
            is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        finally:
            os.close(fd)
    if is_directory != wants_directory:
        there, here = ("directory", "file") if is_directory else ("file", "directory")
        raise InvalidArgument(
            f"volumes: {mount.source} is a {here}, but {mount.target} is a {there} in the container",
            at=mount.target,
        )


def _make(rootfs: Path, root: int, target: str, directory: bool) -> None:
    if directory:
        make_directory(rootfs, target)
        return
    parent, name = str(PurePosixPath(target).parent), PurePosixPath(target).name
    make_directory(rootfs, parent)
    try:
        below = host.open_in_root(root, parent, os.O_RDONLY | os.O_DIRECTORY, resolve=RESOLVE)
    except OSError:
        return  # a dangling link: the runtime names the fault
    try:
        os.close(
            os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o755, dir_fd=below)
        )
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EROFS):  # of one that is only shown: its guest makes it
            raise
    finally:
        os.close(below)

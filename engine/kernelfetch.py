"""Guest kernels from GitHub releases: Kata's static releases, and assets laid out as ours. Floor 2.

Only here: which asset of a release has a kernel, and its download. The sha256 of what is downloaded must be given: it
decides, not the release. A broken download goes on where it stopped, also in another daemon (a part file named by its
digest). The token goes to the API's host alone; where that redirects, it stays behind (images/transport.py).

    vmlinux-<arch>[.zst|.xz|.gz]           ours: the kernel
    initfs-<arch>.cpio                     ours: its initial file system, where none is to be made here
    kata-static-<version>-<amd64|arm64>.tar.<zst|xz>    vmlinux.container in it names the kernel, config-… is beside it

Source: docs.github.com, REST API: releases, release assets, rate limits.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import posixpath
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from engine import kernelimage, kernelpackage
from engine.errors import AccessDenied, Damaged, InvalidArgument, NotFound, TooLarge, Unreachable
from engine.images.registry import is_loopback
from engine.images.transport import Backoff, Policy, Retry, Transport
from engine.jobs import Task
from engine.kernels import PART, Kernel, Kernels, platform_arch
from engine.model import check_digest
from engine.store.blobs import write_all
from engine.store.inflate import inflate

API = "https://api.github.com"
KATA = "kata-containers/kata-containers"
REPOSITORY = re.compile(r"[A-Za-z0-9_.-]{1,100}/[A-Za-z0-9_.-]{1,100}\Z")
MAX_RELEASE = 8 << 20  # bytes of a release's JSON
MAX_ASSET = 2 << 30
MAX_PAGES = 20  # of a release's assets, a hundred each
MAX_CANDIDATES = 8  # kernels in one archive
DEBIAN = {kernelimage.X86_64: "amd64", kernelimage.AARCH64: "arm64"}
PROGRESS = 1 << 20  # bytes after which a broken download counts as new


@dataclass(frozen=True, slots=True)
class Wanted:
    """`digest` is the asset's, `initfs` that of an initfs-<arch>.cpio to fetch with it, or empty."""

    tag: str
    digest: str
    repository: str = KATA
    asset: str = ""
    member: str = ""
    name: str = ""
    arch: str = field(default_factory=platform_arch)
    initfs: str = ""

    def check(self) -> Wanted:
        if not self.digest:
            raise InvalidArgument("digest=sha256:… of the asset is needed", at="digest", hint="the release tells it")
        check_digest(self.digest)
        if self.initfs:
            check_digest(self.initfs)
        if not REPOSITORY.match(self.repository):
            raise InvalidArgument("OWNER/NAME expected", at=self.repository[:100])
        if self.arch not in DEBIAN:
            raise InvalidArgument(f"one of {', '.join(DEBIAN)} expected", at=self.arch[:40])
        return self


@dataclass(frozen=True, slots=True)
class _Asset:
    name: str
    url: str
    size: int
    digest: str  # as the release tells it; empty where it does not


def fetch(kernels: Kernels, wanted: Wanted, task: Task, *, policy: Policy | None = None) -> Kernel:
    """Download, check and keep. Errors are those of the transport, of the digest, and of reading a kernel."""
    wanted.check()
    base = (os.environ.get("DUTCHMAN_GITHUB_API") or API).rstrip("/")
    parts = urlsplit(base)
    kernels.directory.mkdir(parents=True, exist_ok=True)
    transport = Transport(task, policy or Policy(), secure=parts.scheme == "https", loopback=is_loopback(parts.netloc))
    with transport:
        release = _Release(transport, base, wanted)
        chosen = release.choose()
        part = release.download(chosen, wanted.digest, kernels.directory)
        initial = b""
        if wanted.initfs:
            asset = release.asset(f"initfs-{wanted.arch}.cpio")
            path = release.download(asset, wanted.initfs, kernels.directory)
            initial = _bounded(path)
            path.unlink()
    task.progress(f"reading {chosen.name}")
    data, config = _kernel(part, chosen.name, wanted.member, task)
    source = f"https://github.com/{wanted.repository}/releases/download/{wanted.tag}/{chosen.name}"
    made = kernels.add(
        data,
        source,
        wanted.name or None,
        wanted.arch,
        digest=wanted.digest,
        config=config,
        initfs=initial,
        event="kernelFetched",
    )
    part.unlink()
    return made


class _Release:
    """A release and its assets."""

    def __init__(self, transport: Transport, base: str, wanted: Wanted) -> None:
        self._transport, self._base, self._wanted = transport, base, wanted
        self._what = f"release {wanted.tag} of {wanted.repository}"
        url = f"{base}/repos/{wanted.repository}/releases/tags/{quote(wanted.tag, safe='')}"
        found, _ = self._document(url)
        with self._understood():
            self._assets = _assets(found["assets"])
        self._list = str(found.get("assets_url") or "")  # the whole list, in pages

    def _headers(self, accept: str) -> dict[str, str]:
        token = os.environ.get("DUTCHMAN_GITHUB_TOKEN") or os.environ.get("GITHUB_TOKEN")
        more = {"Authorization": f"Bearer {token}"} if token else {}
        return {"Accept": accept, "X-GitHub-Api-Version": "2022-11-28", **more}

    def _document(self, url: str) -> tuple[Any, str]:
        """JSON at `url`, and the address of the next page or nothing."""
        if _origin(url) != _origin(self._base):
            raise Unreachable(f"{self._what} is elsewhere than the API", at=url[:200])
        backoff = Backoff(self._transport.policy, self._transport.task)
        while True:
            try:
                with self._transport.open(url, self._headers("application/vnd.github+json")) as response:
                    self._expect(response, self._what, {200})
                    raw = self._transport.body(response, self._what, MAX_RELEASE)
                    following = str(response.links.get("next", {}).get("url", ""))
                with self._understood():
                    return json.loads(raw), following
            except Retry as retry:
                backoff.pause(retry)

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{self._what} is no release as the API has them: {error!r}"
            raise Damaged(reason[:300], at=self._wanted.tag) from error

    def _have(self, names: list[str]) -> _Asset | None:
        """The first of `names` that the release has. What is not in its document may be in the list of its assets."""
        pages = 0
        while True:
            for name in names:
                for item in self._assets:
                    if item.name == name:
                        return item
            if not self._list or pages >= MAX_PAGES:
                return None
            more, self._list = self._document(self._list + ("" if "?" in self._list else "?per_page=100"))
            with self._understood():
                self._assets += _assets(more)
            pages += 1

    def _expect(self, response: Any, what: str, statuses: set[int]) -> None:
        """A rate limit is waited for when it ends soon; it is a 403 or 429 with one of these headers."""
        headers = response.headers
        if response.status_code in (403, 429) and (
            headers.get("x-ratelimit-remaining") == "0" or "retry-after" in headers
        ):
            after = _until(headers)
            hint = "set DUTCHMAN_GITHUB_TOKEN for the daemon: with a token more is allowed"
            said = f"{response.url.host} allows no more requests for {after:.0f} s (rate limit)"
            raise Retry(Unreachable(said, at=response.url.host, hint=hint), after)
        if response.status_code in (401, 403):
            raise AccessDenied(
                f"{response.url.host} refuses access to {what} ({response.status_code})",
                at=what,
                hint="DUTCHMAN_GITHUB_TOKEN of the daemon is wrong or may not see it, or there is none",
            )
        self._transport.expect(response, what, statuses)

    def asset(self, name: str) -> _Asset:
        if (found := self._have([name])) is not None:
            return found
        have = ", ".join(item.name for item in self._assets[:20]) or "none"
        raise NotFound(f"release {self._wanted.tag} has no asset {name}; it has {have}"[:900], at=name)

    def choose(self) -> _Asset:
        wanted = self._wanted
        if wanted.asset:
            return self.asset(wanted.asset)
        names = [f"vmlinux-{wanted.arch}{suffix}" for suffix in (".zst", ".xz", ".gz", "")]
        version = wanted.tag.removeprefix("v")
        names += [f"kata-static-{version}-{DEBIAN[wanted.arch]}.tar.{suffix}" for suffix in ("zst", "xz")]
        return self._have(names) or self.asset(names[0])

    def download(self, asset: _Asset, digest: str, directory: Path) -> Path:
        """The asset as a file whose bytes have `digest`; it goes on from what an earlier attempt left."""
        if asset.digest and asset.digest != digest:
            raise Damaged(f"the release says {asset.name} is {asset.digest}, not {digest}", at=digest)
        if not 0 < asset.size <= MAX_ASSET:
            raise TooLarge(f"{asset.name} has {asset.size} bytes; at most {MAX_ASSET} are taken", at=asset.name)
        if _origin(asset.url) != _origin(self._base):
            raise Unreachable(f"{asset.name} is elsewhere than the API", at=asset.url[:200])
        path = directory / f"{PART}{digest[7:]}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._fill(fd, asset)
            os.fsync(fd)
            with open(path, "rb") as file:
                found = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                path.unlink()
                raise Damaged(f"{asset.name} is {found}, not {digest}", at=digest, hint="compare it with its publisher")
        except BlockingIOError as error:
            raise Unreachable(f"another job downloads {asset.name}", at=asset.name) from error
        finally:
            os.close(fd)
        return path

    def _fill(self, fd: int, asset: _Asset) -> None:
        transport, task = self._transport, self._transport.task
        backoff = Backoff(transport.policy, task)
        have = os.lseek(fd, 0, os.SEEK_END)
        if have > asset.size:
            os.ftruncate(fd, 0)
            have = os.lseek(fd, 0, os.SEEK_SET)
        gained = 0
        while have < asset.size:
            try:
                headers = self._headers("application/octet-stream")
                if have:
                    headers["Range"] = f"bytes={have}-{asset.size - 1}"
                with transport.open(asset.url, headers) as response:
                    self._expect(response, asset.name, {200, 206} if have else {200})
                    if have and not _goes_on(response, have):  # a server that ignores Range sends all again
                        os.ftruncate(fd, 0)
                        have = os.lseek(fd, 0, os.SEEK_SET)
                    for chunk in response.iter_raw():
                        task.check()
                        if have + len(chunk) > asset.size:
                            raise Damaged(f"{asset.name} has more than the announced {asset.size} bytes", at=asset.name)
                        write_all(fd, chunk)
                        have += len(chunk)
                        gained += len(chunk)
                        if gained >= PROGRESS:
                            backoff.progressed()
                        task.advance(asset.name, have, asset.size)
                if have < asset.size:
                    raise Retry(Damaged(f"{asset.name} ends after {have} of {asset.size} bytes", at=asset.name))
            except Retry as retry:
                backoff.pause(retry)
                gained = 0


def _assets(listed: Any) -> list[_Asset]:
    """Those whose upload has ended."""
    return [
        _Asset(str(item["name"]), str(item["url"]), int(item["size"]), str(item.get("digest") or ""))
        for item in listed
        if item.get("state", "uploaded") == "uploaded"
    ]


def _goes_on(response: Any, offset: int) -> bool:
    if response.status_code != 206:
        return False
    if not response.headers.get("content-range", "").startswith(f"bytes {offset}-"):
        raise Unreachable("the server sent another range than asked for", at=response.url.host)
    return True


def _until(headers: Mapping[str, str]) -> float:
    """Seconds until requests are allowed again: Retry-After, else x-ratelimit-reset (seconds since the epoch)."""
    if (text := headers.get("retry-after", "")).isdigit():
        return float(text)
    reset = headers.get("x-ratelimit-reset", "")
    return max(1.0, int(reset) - time.time()) if reset.isdigit() else 60.0


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > kernelimage.MAX_PACKED:
        raise TooLarge(f"more than {kernelimage.MAX_PACKED} bytes", at=path.name)
    return path.read_bytes()


def _kernel(path: Path, name: str, member: str, task: Task) -> tuple[bytes, str]:
    """The kernel in an asset, and the configuration beside it."""
    if ".tar" not in name:
        return _bounded(path), ""

    def pieces() -> Iterator[bytes]:
        with open(path, "rb") as file:
            while piece := file.read(1 << 18):
                task.check()
                yield piece

    links: dict[str, str] = {}
    found: dict[str, bytes] = {}
    configs: dict[str, str] = {}
    for item, body in kernelpackage.members(inflate(pieces()), Path(name), links):
        base = posixpath.basename(item.name)
        if item.name.lstrip("./") == member.lstrip("./") or (not member and base.startswith("vmlinux")):
            if len(found) >= MAX_CANDIDATES:
                raise TooLarge(f"more than {MAX_CANDIDATES} kernels in {name}", at=name)
            found[base] = kernelpackage.whole(body, item, kernelimage.MAX_PACKED)
        elif base.startswith("config-"):
            configs[base.removeprefix("config-")] = kernelpackage.whole(body, item, kernelpackage.MAX_CONFIG).decode(
                errors="replace"
            )
    link = next((target for path, target in links.items() if posixpath.basename(path) == "vmlinux.container"), "")
    chosen = posixpath.basename(link) if not member and posixpath.basename(link) in found else ""
    if not chosen:
        if len(found) != 1:
            have = f"it has {', '.join(sorted(found))}" if found else "it has none"
            raise NotFound(f"which kernel of {name}? {have}", at=member or name, hint="member=PATH names one")
        chosen = next(iter(found))
    return found[chosen], configs.get(chosen.removeprefix("vmlinux-"), "")

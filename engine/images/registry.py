"""A repository of a registry, as the distribution-spec has it: manifests and blobs, for pulling. Floor 2.

Only here: addresses, authorisation (basic, bearer with a token cache) and the resumed download of a blob. What comes is
checked against its digest here (manifests) or by whoever stores it (blobs), and is bounded by the size announced.

Threading: one Registry per pull, used by its workers at once.

Sources: distribution-spec "Pull"; distribution "Token Authentication Specification" and "OAuth2 Token Authentication".
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit, urlunsplit

from engine.errors import AccessDenied, Damaged, DeadlineExceeded, Unreachable, Unsupported
from engine.images import auth
from engine.images.helpers import ask
from engine.images.manifests import ACCEPT, MAX_MANIFEST, Descriptor
from engine.images.reference import Reference
from engine.images.registries import Rules
from engine.images.transport import Backoff, Content, Policy, Retry, Transport
from engine.jobs import Task

if TYPE_CHECKING:
    import httpx

MAX_TOKEN = 1 << 20  # bytes of a token service's answer
MAX_SKIPPED = 1 << 20  # bytes of a blob passed over when a registry does not send the part asked for
PROGRESS = 1 << 16  # bytes after which an attempt was not in vain, and the count of attempts starts anew
MIN_TOKEN_LIFE = 60  # seconds; what the specification assumes when a token does not say
INSECURE = "DUTCHMAN_INSECURE_REGISTRIES"  # host[:port],… reached by plain http
HUB_HOST = "registry-1.docker.io"


def is_loopback(domain: str) -> bool:
    """localhost, 127.0.0.0/8 and ::1, with or without a port: spoken to by plain http, as Docker does."""
    host = urlsplit(f"//{domain}").hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_insecure(domain: str) -> bool:
    """Whether the user named this registry in $DUTCHMAN_INSECURE_REGISTRIES."""
    return domain in [name.strip() for name in os.environ.get(INSECURE, "").split(",")]


@dataclass(frozen=True, slots=True)
class _Token:
    header: str
    expires: float  # monotonic


class Registry:
    """The repository `reference` names. A context manager; reads the login files when made."""

    def __init__(
        self,
        reference: Reference,
        task: Task,
        *,
        insecure: bool = False,
        policy: Policy | None = None,
        environ: Mapping[str, str] | None = None,
        rules: Rules | None = None,
        actions: str = "pull",
    ) -> None:
        self.reference, self.task = reference, task
        rules = rules or Rules()
        loopback = is_loopback(reference.domain)
        self.plain = loopback or insecure or rules.insecure or is_insecure(reference.domain)
        host = HUB_HOST if reference.domain == "docker.io" else reference.domain
        self.base = f"{'http' if self.plain else 'https'}://{host}/v2/{reference.path}"
        self.scopes = [f"repository:{reference.path}:{actions}"]  # may be added to before the first request
        self._environ = os.environ if environ is None else environ
        self._transport = Transport(
            task, policy or Policy(), secure=not self.plain, loopback=loopback, ca_file=rules.ca_file
        )
        self._lock = threading.Lock()
        self._token: _Token | None = None

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self._transport.__exit__()

    # --- authorisation ----------------------------------------------------------------------------------------------

    @cached_property
    def _found(self) -> auth.Found:
        """Who we are, looked up (and a helper asked) when the registry wants to know."""
        found = auth.find(self.reference, self._environ, lambda name, domain: ask(name, domain, self._environ))
        if found.failure:
            self.task.log(found.failure)
        return found

    @contextmanager
    def _open(
        self,
        url: str,
        headers: Mapping[str, str],
        what: str,
        statuses: set[int],
        *,
        method: str = "GET",
        content: Content | None = None,
    ) -> Iterator[httpx.Response]:
        """A response with one of `statuses`; a 401 is answered once with what it asks for."""
        own = (
            urlsplit(url)[:2] == urlsplit(self.base)[:2]
        )  # an upload may go on elsewhere: who we are is not told there
        used = self._authorisation() if own else {}
        with self._transport.open(url, {**headers, **used}, method=method, content=content) as response:
            challenged = response.status_code == 401 and urlsplit(self.base).netloc == response.url.netloc.decode()
            if not challenged:
                self._transport.expect(response, what, statuses)
                yield response
                return
            header = ", ".join(response.headers.get_list("www-authenticate"))
            if not header:
                self._refuse(response, what)
        fresh = self._answer(auth.parse_challenges(header), used)
        with self._transport.open(url, {**headers, **fresh}, method=method, content=content) as response:
            if response.status_code == 401:
                self._refuse(response, what)
            self._transport.expect(response, what, statuses)
            yield response

    @contextmanager
    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        what: str,
        statuses: set[int],
        content: Content | None = None,
    ) -> Iterator[httpx.Response]:
        """One request with the repository's authorisation, for pushing. Retry for what may pass."""
        with self._open(url, headers, what, statuses, method=method, content=content) as response:
            yield response

    def _refuse(self, response: httpx.Response, what: str) -> None:
        try:
            self._transport.expect(response, what, set())
        except AccessDenied as error:
            if self._found.credentials is not None:
                error.hint = f"the login in {self._found.source} was refused: log in again"
            elif self._found.failure:
                error.hint = f"the login is kept by {self._found.helper}: {self._found.failure}"
            raise

    def _authorisation(self) -> dict[str, str]:
        with self._lock:
            if self._token is not None and time.monotonic() < self._token.expires:
                return {"Authorization": self._token.header}
            self._token = None
            return {}

    def _answer(self, challenges: list[auth.Challenge], used: Mapping[str, str]) -> dict[str, str]:
        """The Authorization a challenge asks for. One thread asks the token service, the others wait for it."""
        with self._lock:
            token = self._token
            if token is None or token.header == used.get("Authorization") or time.monotonic() >= token.expires:
                token = self._token = self._obtain(challenges)
            return {"Authorization": token.header}

    def _obtain(self, challenges: list[auth.Challenge]) -> _Token:
        credentials = self._found.credentials
        for challenge in challenges:
            if challenge.scheme == "bearer":
                return self._bearer(challenge.params)
        for challenge in challenges:
            if challenge.scheme == "basic":
                if credentials is None or not credentials.username:
                    hint = "log in: docker login, podman login or skopeo login write the file that is read here"
                    if self._found.failure:
                        hint = f"the login is kept by {self._found.helper}: {self._found.failure}"
                    raise AccessDenied(f"{self.reference.domain} wants a login", at=self.reference.name, hint=hint)
                return _Token(credentials.basic(), float("inf"))
        schemes = ", ".join(challenge.scheme for challenge in challenges)[:100] or "nothing readable"
        raise AccessDenied(f"{self.reference.domain} asks for {schemes}, which is not known here",
                           at=self.reference.name)  # fmt: skip

    def _bearer(self, params: Mapping[str, str]) -> _Token:
        """Ask the token service named by the challenge."""
        realm = urlsplit(params.get("realm", ""))
        if realm.scheme not in ("https", "http") or not realm.hostname:
            raise AccessDenied("the registry names no token service", at=self.reference.domain)
        if realm.scheme == "http" and not self.plain:
            raise AccessDenied("the registry names a token service without TLS", at=realm.hostname)
        query = {"service": params["service"]} if "service" in params else {}
        credentials, headers, form = self._found.credentials, {}, None
        if credentials is not None and credentials.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token,
                "client_id": "flying-dutchman",
                "scope": " ".join(self.scopes),
                **query,
            }
            url = urlunsplit((realm.scheme, realm.netloc, realm.path, realm.query, ""))
        else:
            if credentials is not None:
                headers["Authorization"] = credentials.basic()
            words = [*(("scope", scope) for scope in self.scopes), *query.items()]
            asked = "&".join(filter(None, (realm.query, urlencode(words))))
            url = urlunsplit((realm.scheme, realm.netloc, realm.path, asked, ""))
        what = f"a token for {self.reference.name}"
        backoff = Backoff(self._transport.policy, self.task)
        while True:
            try:
                method = "GET" if form is None else "POST"
                with self._transport.open(url, headers, method=method, form=form) as response:
                    if response.status_code in (400, 401, 403):
                        response.status_code = 401
                        self._refuse(response, what)
                    self._transport.expect(response, what, {200})
                    return _token(self._transport.body(response, what, MAX_TOKEN), realm.hostname)
            except Retry as retry:
                backoff.pause(retry)

    # --- content ----------------------------------------------------------------------------------------------------

    def manifest(self, name: str) -> tuple[bytes, str, str]:
        """(bytes, media type, digest) of the manifest called `name`, a tag or a digest; a digest is verified."""
        what = f"manifest {name} of {self.reference.name}"
        backoff = Backoff(self._transport.policy, self.task)
        while True:
            try:
                with self._open(f"{self.base}/manifests/{name}", {"Accept": ACCEPT}, what, {200}) as response:
                    raw = self._transport.body(response, what, MAX_MANIFEST)
                    media_type = response.headers.get("content-type", "")
                    said = response.headers.get("docker-content-digest", "")
                break
            except Retry as retry:
                backoff.pause(retry)
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        expected = name if name.startswith("sha256:") else said
        if expected.startswith("sha256:") and expected != digest:
            raise Damaged(f"the manifest's digest is {digest}, not {expected[:80]}", at=what)
        return raw, media_type, digest

    def document(self, path: str, what: str, limit: int) -> tuple[bytes, str]:
        """(body, Link header) of `path` (from /v2/ on) of this registry, with the repository's authorisation."""
        backoff = Backoff(self._transport.policy, self.task)
        while True:
            try:
                with self._open(self.base.partition("/v2/")[0] + path, {}, what, {200}) as response:
                    return self._transport.body(response, what, limit), response.headers.get("link", "")
            except Retry as retry:
                backoff.pause(retry)

    def part(self, entry: Descriptor, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` of a blob, not verified. Unsupported when the registry knows no ranges."""
        what = f"bytes {start}-{stop - 1} of blob {entry.digest}"
        backoff = Backoff(self._transport.policy, self.task)
        while start < stop:
            try:
                headers = {"Range": f"bytes={start}-{stop - 1}"}
                with self._open(f"{self.base}/blobs/{entry.digest}", headers, what, {200, 206}) as response:
                    if response.status_code == 200 and start > MAX_SKIPPED:
                        raise Unsupported("the registry sends whole blobs only, not parts", at=self.reference.domain)
                    for chunk in self._body(response, entry, start, what):
                        piece = chunk[: stop - start]
                        start += len(piece)
                        if piece:
                            backoff.progressed()
                            yield piece
                        if start >= stop:
                            return
                raise Retry(Damaged(f"{what} end early", at=entry.digest))
            except Retry as retry:
                backoff.pause(retry)

    def small_blob(self, entry: Descriptor) -> bytes:
        """A whole blob of a size already bounded (a configuration), verified."""
        raw = b"".join(self.blob(entry, 0))
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        if len(raw) != entry.size or digest != entry.digest:
            raise Damaged(f"the blob's digest is {digest}, not the expected one", at=entry.digest)
        return raw

    def blob(self, entry: Descriptor, offset: int) -> Iterator[bytes]:
        """The bytes of a blob from `offset` to its announced end, resumed with Range when the connection breaks.

        Not verified. Damaged when the registry sends more or less than announced.
        """
        what = f"blob {entry.digest} of {self.reference.name}"
        url = f"{self.base}/blobs/{entry.digest}"
        backoff = Backoff(self._transport.policy, self.task)
        gained = 0  # since the last failure
        while offset < entry.size:
            try:
                headers = {"Range": f"bytes={offset}-{entry.size - 1}"} if offset else {}
                with self._open(url, headers, what, {200, 206} if offset else {200}) as response:
                    for chunk in self._body(response, entry, offset, what):
                        offset += len(chunk)
                        gained += len(chunk)
                        if gained >= PROGRESS:
                            backoff.progressed()
                        yield chunk
                if offset < entry.size:
                    raise Retry(Damaged(f"{what} ends after {offset} of {entry.size} bytes", at=entry.digest))
            except Retry as retry:
                backoff.pause(retry)
                gained = 0

    def _body(self, response: httpx.Response, entry: Descriptor, offset: int, what: str) -> Iterator[bytes]:
        """The wanted part of a response: what a server that ignores Range sends again is skipped."""
        skip = offset
        if response.status_code == 206:
            start = _range_start(response.headers.get("content-range", ""))
            if start is None or start > offset:
                raise Unreachable(f"{what}: the registry sent another range than asked for", at=entry.digest)
            skip = offset - start
        left = entry.size - offset
        policy, since, seen = self._transport.policy, time.monotonic(), 0
        for chunk in response.iter_raw():
            self.task.check()
            seen += len(chunk)
            now = time.monotonic()
            if now - since > policy.window:
                if seen < policy.slowest * (now - since):
                    raise Retry(DeadlineExceeded(f"{what}: slower than {policy.slowest} bytes/s", at=entry.digest))
                since, seen = now, 0
            if skip:
                drop = min(skip, len(chunk))
                skip -= drop
                chunk = chunk[drop:]
            if len(chunk) > left:
                raise Damaged(f"more than the announced {entry.size} bytes", at=entry.digest)
            if chunk:
                left -= len(chunk)
                yield chunk


def _range_start(header: str) -> int | None:
    unit, _, rest = header.partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() and len(start) < 20 else None


def _token(raw: bytes, host: str) -> _Token:
    """The token of a token service's answer, good until a little before it expires."""
    try:
        data = json.loads(raw)
        text = data.get("token") or data.get("access_token")
        life = data.get("expires_in", MIN_TOKEN_LIFE)
    except (ValueError, AttributeError, RecursionError) as error:
        raise Damaged("the token service's answer is not JSON", at=host) from error
    if not isinstance(text, str) or not text or not text.isascii() or not text.isprintable() or len(text) > 64 << 10:
        raise Damaged("the token service's answer holds no token", at=host)
    seconds = float(life) if isinstance(life, int | float) and not isinstance(life, bool) else MIN_TOKEN_LIFE
    return _Token(f"Bearer {text}", time.monotonic() + max(5.0, min(seconds, 86400.0) * 0.9))

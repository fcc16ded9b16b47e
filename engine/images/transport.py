"""HTTP to registries: bounded in bytes, tries and time; who may see which secret. Floor 2.

Only here: httpx (imported when the first pull starts, so that the daemon starts quickly), retries, redirects and what
each status means. A secret goes to the host it was given for and to nobody else: Authorization is dropped when a
redirect leaves scheme, host or port, and a token service must be reached by TLS unless the registry itself is not.

Threading: one Transport per pull, used by its workers at once; `interrupt` from any thread breaks reads under way.

Sources: distribution-spec; RFC 9110 (Retry-After, Range, redirects).
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import (
    AccessDenied,
    Damaged,
    DeadlineExceeded,
    EngineError,
    NotFound,
    RuntimeFailure,
    TooLarge,
    Unreachable,
)
from engine.jobs import Task

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
Content = Callable[[], "bytes | Iterable[bytes]"]  # a request's body, from its start at each call


@dataclass(frozen=True, slots=True)
class Policy:
    """Bounds in seconds and tries. `attempts` without progress, never more than `budget` seconds of them."""

    attempts: int = 6
    base: float = 0.5  # first pause; doubles each time, with jitter
    cap: float = 15.0  # longest pause, also for Retry-After
    budget: float = 180.0
    connect: float = 10.0
    read: float = 30.0  # longest silence
    answer: float = 60.0  # a whole manifest or token
    slowest: int = 1024  # bytes per second, over `window`, below which a download counts as stalled
    window: float = 60.0


class Retry(Exception):
    """An attempt failed in a way that may pass; `error` is what it becomes when it does not."""

    def __init__(self, error: EngineError, after: float | None = None) -> None:
        super().__init__(error.reason)
        self.error = error
        self.after = after


class Backoff:
    """Pauses between attempts: exponential with full jitter. `progressed` starts anew."""

    def __init__(self, policy: Policy, task: Task) -> None:
        self._policy, self._task = policy, task
        self.progressed()

    def progressed(self) -> None:
        self._failures, self._since = 0, time.monotonic()

    def pause(self, retry: Retry) -> None:
        """Wait before the next attempt; raises the error when there shall be none. Raises Cancelled promptly."""
        policy = self._policy
        self._failures += 1
        pause = min(policy.cap, policy.base * 2 ** (self._failures - 1)) * random.uniform(0.5, 1)
        if retry.after is not None:
            if retry.after > policy.budget:
                raise retry.error
            pause = max(pause, min(retry.after, policy.budget))
        spent = time.monotonic() - self._since
        if self._failures >= policy.attempts or spent + pause > policy.budget:
            raise retry.error
        self._task.log(f"{retry.error.reason}; next try in {pause:.1f} s")
        self._task.cancelled.wait(pause)
        self._task.check()


class Transport:
    """GET and POST with the bounds of `policy`. A context manager."""

    def __init__(self, task: Task, policy: Policy, *, secure: bool, loopback: bool, ca_file: str = "") -> None:
        import httpx

        self.task, self.policy, self.secure = task, policy, secure
        self._sockets: set[socket.socket] = set()  # of all open connections
        self._lock = threading.Lock()
        self._closed = False
        timeout = httpx.Timeout(policy.read, connect=policy.connect)
        self._client = httpx.Client(
            timeout=timeout,
            follow_redirects=False,
            trust_env=not loopback,  # proxies; never for a registry on this machine
            verify=_trust(ca_file) if secure else False,
            limits=httpx.Limits(max_connections=16, keepalive_expiry=20),
            headers={"User-Agent": "flying-dutchman", "Accept-Encoding": "identity"},
            default_encoding="utf-8",
        )
        task.on_cancel(self.interrupt)

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
        self._client.close()

    def interrupt(self) -> None:
        """Break every read under way, so that a cancelled pull does not wait for a silent server."""
        with self._lock:
            for sock in self._sockets:
                with suppress(OSError, AttributeError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _connected(self, event: str, info: Mapping[str, Any]) -> None:
        """httpcore's trace: a new connection can be interrupted before its server has answered at all."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            sock = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets = {old for old in self._sockets if old.fileno() >= 0} | {sock}
            self.task.check()

    @contextmanager
    def open(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        method: str = "GET",
        form: Mapping[str, str] | None = None,
        content: Content | None = None,
    ) -> Iterator[httpx.Response]:
        """The response to a request, redirects followed, body unread. Retry for what may pass.

        `content` gives the body to send (again, for a redirect that asks for it), as long as Content-Length says.
        """
        import httpx

        address = httpx.URL(url)
        headers = dict(headers)
        for _ in range(MAX_REDIRECTS + 1):
            self.task.check()
            with (
                self._translated(address.netloc.decode("ascii", "replace")),
                self._client.stream(
                    method,
                    address,
                    headers=headers,
                    data=None if form is None else dict(form),
                    content=None if content is None else content(),
                    extensions={"trace": self._connected},
                ) as response,
            ):
                if response.status_code not in REDIRECTS or "location" not in response.headers:
                    self.task.check()
                    yield response
                    return
                target = self._redirected(address, response.headers["location"])
                if method not in ("GET", "HEAD") and form is None and response.status_code not in (307, 308):
                    raise Unreachable("the registry redirects what is sent to it", at=address.host)
            if form is not None:
                raise AccessDenied("the token service redirects, which would hand the secret on", at=address.host)
            if _origin(target) != _origin(address):
                headers.pop("Authorization", None)
            address = target
        raise Unreachable(f"more than {MAX_REDIRECTS} redirects", at=str(address.copy_with(query=None))[:300])

    def _redirected(self, address: httpx.URL, location: str) -> httpx.URL:
        import httpx

        try:
            target = address.join(location)
        except httpx.InvalidURL as error:
            raise Unreachable("the registry redirects to what is no address", at=location[:200]) from error
        if target.scheme not in ("https", "http") or not target.host or target.userinfo:
            raise Unreachable("the registry redirects to what is no web address", at=location[:200])
        if address.scheme == "https" and target.scheme == "http":
            raise Unreachable("the registry redirects from https to http", at=target.host)
        return target

    @contextmanager
    def _translated(self, host: str) -> Iterator[None]:
        """httpx's errors as ours: timeouts, refusals and broken connections may pass."""
        import httpx

        try:
            yield
        except httpx.TimeoutException as error:
            self.task.check()
            raise Retry(DeadlineExceeded(f"{host} did not answer in time ({type(error).__name__})", at=host)) from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise Unreachable(f"not an address: {error}", at=host) from error
        except (httpx.HTTPError, OSError) as error:
            self.task.check()
            raise Retry(Unreachable(f"cannot reach {host}: {error or type(error).__name__}"[:300], at=host)) from error

    def body(self, response: httpx.Response, what: str, limit: int) -> bytes:
        """The whole body, at most `limit` bytes, within the deadline for an answer."""
        if int(response.headers.get("content-length") or 0) > limit:
            raise TooLarge(f"{what} is announced larger than {limit} bytes", at=response.url.host)
        out = bytearray()
        deadline = time.monotonic() + self.policy.answer
        for chunk in response.iter_raw():
            out += chunk
            self.task.check()
            if len(out) > limit:
                raise TooLarge(f"{what} is larger than {limit} bytes", at=response.url.host)
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{what} took longer than {self.policy.answer:.0f} s", at=response.url.host)
        return bytes(out)

    def expect(self, response: httpx.Response, what: str, statuses: set[int]) -> None:
        """Nothing when the status is one of `statuses`; else the error it stands for."""
        status, host = response.status_code, response.url.host
        if status in statuses:
            return
        said = self._said(response)
        if status in (401, 403):
            raise AccessDenied(
                f"{host} refuses access to {what} ({status}{said}): it is private or does not exist",
                at=host,
                hint="log in: docker login, podman login or skopeo login write the file that is read here",
            )
        if status == 404:
            raise NotFound(f"{host} has no {what}{said}", at=what)
        if status in (408, 425, 429) or status >= 500:
            reason = "too many requests" if status == 429 else "the registry is in trouble"
            error = Unreachable(f"{host}: {reason} ({status}{said})", at=host)
            raise Retry(error, _retry_after(response.headers.get("retry-after", "")))
        if status == 416:
            raise Retry(Damaged(f"{host} has fewer bytes of {what} than announced", at=what))
        raise RuntimeFailure(f"{host} answered {status} for {what}{said}", at=host)

    def _said(self, response: httpx.Response) -> str:
        """The registry's own words: the first entry of distribution-spec's error body, cleaned."""
        try:
            data = json.loads(self.body(response, "the error", 64 << 10))
            first = data["errors"][0]
            text = f"{first.get('code', '')} {first.get('message', '')}"
        except (EngineError, Retry, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return ""
        text = "".join(char if char.isprintable() else " " for char in text)
        return f", {' '.join(text.split())[:200]}"


def _trust(ca_file: str) -> Any:
    """The system's certificate authorities where it has some ($SSL_CERT_FILE, $SSL_CERT_DIR), else those shipped;
    besides, those in `ca_file`."""
    import ssl

    context = ssl.create_default_context()
    if ca_file:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise AccessDenied(f"the certificates of registries.yaml cannot be read: {error}", at=ca_file) from error
        return context
    if not context.cert_store_stats()["x509_ca"] and not os.environ.get("SSL_CERT_DIR"):
        return True
    return context


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _retry_after(text: str) -> float | None:
    """Seconds from a Retry-After header: a number or a date."""
    if not text:
        return None
    if text.strip().isdigit():
        return float(text.strip()[:9])
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return max(0.0, moment.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None

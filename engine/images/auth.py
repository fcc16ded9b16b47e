"""Credentials and challenges: who we are to a registry, and what it asks for. Floor 2.

Only here: the login files of Docker and of the containers tools, and the grammar of WWW-Authenticate. Nothing is
cached: files are read at each pull, so a fresh `docker login` counts. A file that names a credential helper for the
registry (credHelpers, else credsStore) has it asked first, as Docker does (helpers.py starts it).

Sources: containers-auth.json(5); Docker's config.json and the older .dockercfg; RFC 9110 section 11.6.1;
distribution "Token Authentication Specification".
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import userids
from engine.errors import EngineError
from engine.images.reference import Reference

MAX_FILE = 1 << 20
MAX_CHALLENGES = 16
HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user's secret; `identity_token` is exchanged for bearer tokens instead of a password. Never printed."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(frozen=True, slots=True)
class Found:
    """What the files say: credentials or None, the file or helper they are from, the helper named, why it failed."""

    credentials: Credentials | None = None
    source: str = ""
    helper: str = ""
    failure: str = field(default="", compare=False)


Ask = Callable[[str, str], "tuple[str, str] | None"]  # helper's name, registry -> user name, secret


def files(environ: Mapping[str, str] | None = None) -> list[Path]:
    """The login files in the order they count. $REGISTRY_AUTH_FILE, when set, is the only one of its kind."""
    env = os.environ if environ is None else environ
    home = Path(env.get("HOME") or Path.home())
    out = []
    if named := env.get("REGISTRY_AUTH_FILE"):
        out.append(Path(named))
    else:
        if runtime := env.get("XDG_RUNTIME_DIR"):
            out.append(Path(runtime) / "containers" / "auth.json")
        else:
            out.append(Path(f"/run/containers/{userids.owner()[0]}/auth.json"))
        out.append(Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json")
    out.append(Path(env.get("DOCKER_CONFIG") or home / ".docker") / "config.json")
    out.append(home / ".dockercfg")
    return out


def find(reference: Reference, environ: Mapping[str, str] | None = None, ask: Ask | None = None) -> Found:
    """Credentials for a repository: the first file that has some wins. Unreadable or broken files have none.

    `ask` asks a helper; without it helpers are only named. One that fails is no reason to stop: `failure` says why.
    """
    helper = failure = ""
    for path in files(environ):
        data = _load(path)
        if data is None:
            continue
        named = _helper(data, reference.domain)
        helper = helper or named
        if named and ask is not None:
            try:
                answer = ask(named, reference.domain)
            except EngineError as error:
                failure = failure or error.reason
                answer = None
            if answer is not None:
                user, secret = answer
                token = user == "<token>"
                credentials = Credentials("" if token else user, "" if token else secret, secret if token else "")
                return Found(credentials, f"docker-credential-{named}", named)
        if found := lookup(data, reference):
            return Found(found, str(path))
    return Found(helper=helper, failure=failure)


def _load(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(MAX_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _helper(data: dict[str, Any], domain: str) -> str:
    helpers = data.get("credHelpers")
    named = None
    if isinstance(helpers, dict):
        named = helpers.get(domain) or next((helpers[key] for key in helpers if _normal(key) == _normal(domain)), None)
    named = named or data.get("credsStore")
    return named if isinstance(named, str) else ""


def lookup(data: dict[str, Any], reference: Reference) -> Credentials | None:
    """Credentials in one login file: of the repository, of the namespaces above it, then of the registry."""
    auths = data.get("auths")
    if not isinstance(auths, dict):
        if "auths" in data or not all(isinstance(value, dict) for value in data.values()):
            return None
        auths = data  # .dockercfg: the entries are at the top
    for key in _keys(reference):
        if key in auths and (credentials := _entry(auths[key])):
            return credentials
    # keys as people and older tools wrote them: with a scheme, with /v1/, under another name of the same registry
    for key, entry in auths.items():
        if _normal(key) == _normal(reference.domain) and (credentials := _entry(entry)):
            return credentials
    return None


def _keys(reference: Reference) -> Iterator[str]:
    name = reference.name
    while "/" in name:
        yield name
        name = name.rpartition("/")[0]
    yield reference.domain


def _normal(key: str) -> str:
    """The registry a key speaks of; for a key of a repository, the key itself (it never equals a registry)."""
    bare = re.sub(r"^https?://", "", key)
    host, slash, rest = bare.partition("/")
    if bare == key and slash and rest.strip("/") not in ("v1", "v2"):
        return key
    return "docker.io" if host in HUB else host


def _entry(entry: Any) -> Credentials | None:
    if not isinstance(entry, dict):
        return None
    username, password = entry.get("username", ""), entry.get("password", "")
    if isinstance(auth := entry.get("auth"), str) and auth:
        try:
            username, _, password = base64.b64decode(auth, validate=False).decode().partition(":")
        except (binascii.Error, ValueError):
            return None
    token = entry.get("identitytoken", "")
    if not all(isinstance(text, str) for text in (username, password, token)):
        return None
    password = password.strip("\0")
    if username == "<token>":
        username, password, token = "", "", password
    return Credentials(username, password, token) if (username and password) or token else None


# --- challenges -----------------------------------------------------------------------------------------------------

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_PARAM = re.compile(rf'\s*({_TOKEN})\s*=\s*("(?:[^"\\]|\\.)*"|{_TOKEN})')
_SCHEME = re.compile(rf"\s*({_TOKEN})(?:\s+|$|(?=,))")


@dataclass(frozen=True, slots=True)
class Challenge:
    scheme: str  # lower case
    params: Mapping[str, str]  # names in lower case


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of WWW-Authenticate headers joined by commas; what cannot be read ends the list."""
    out: list[Challenge] = []
    at = 0
    header = header[:8192]
    while at < len(header) and len(out) < MAX_CHALLENGES:
        while at < len(header) and header[at] in ", \t":
            at += 1
        match = _SCHEME.match(header, at)
        if match is None:
            break
        at = match.end()
        params: dict[str, str] = {}
        while param := _PARAM.match(header, at):
            value = param[2]
            if value.startswith('"'):
                value = re.sub(r"\\(.)", r"\1", value[1:-1])
            params.setdefault(param[1].lower(), value)
            at = param.end()
            comma = re.compile(r"\s*,\s*").match(header, at)
            if comma is None:
                break
            if _PARAM.match(header, comma.end()) is None:
                break  # another scheme follows
            at = comma.end()
        out.append(Challenge(match[1].lower(), params))
    return out

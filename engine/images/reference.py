"""Image references: `[domain/]path[:tag][@digest]`, and the short forms people write.

Pure functions. Floor 2. Only here: the grammar and Docker's normalisation (nginx -> docker.io/library/nginx:latest).
Every refusal is InvalidArgument with the text at fault in `at`.

Source: the grammar of github.com/distribution/reference (regexp.go, reference.go, normalize.go). As there, a digest
must be of an algorithm that can be verified here: sha256.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import InvalidArgument

DEFAULT_DOMAIN = "docker.io"
LEGACY_DOMAIN = "index.docker.io"
OFFICIAL = "library/"
DEFAULT_TAG = "latest"
MAX_PATH = 255  # characters of the repository path

_COMPONENT = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"(?:{_COMPONENT}(?:\.{_COMPONENT})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_PATH_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = rf"{_PATH_COMPONENT}(?:/{_PATH_COMPONENT})*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"

DOMAIN = re.compile(_DOMAIN)
NAME = re.compile(rf"(?:({_DOMAIN})/)?({_PATH})")
IDENTIFIER = re.compile(r"[a-f0-9]{64}")
DIGEST_FORM = re.compile(_DIGEST)
REFERENCE = re.compile(rf"((?:{_DOMAIN}/)?{_PATH})(?::({_TAG}))?(?:@({_DIGEST}))?")


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference; "" where a part is absent. A bare digest has neither domain nor path."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """The repository: domain/path."""
        return f"{self.domain}/{self.path}" if self.domain else self.path

    def __str__(self) -> str:
        if not self.path:
            return self.digest
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def familiar_name(self) -> str:
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        short = self.path.removeprefix(OFFICIAL)
        return self.path if "/" in short else short

    def familiar(self) -> str:
        """As people write it: docker.io and library/ left out. The tag stays as it is."""
        if not self.path:
            return self.digest
        tag = f":{self.tag}" if self.tag else ""
        return self.familiar_name() + tag + (f"@{self.digest}" if self.digest else "")

    def normalised(self) -> str:
        """What it names exactly: domain/path with a digest, else with a tag (`latest` when none is given)."""
        if not self.path:
            return self.digest
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag or DEFAULT_TAG}"


def check_digest_form(text: str) -> str:
    """`text` when it is a digest this engine can verify (sha256)."""
    if not DIGEST_FORM.fullmatch(text):
        raise InvalidArgument("invalid digest format: algorithm:hex expected", at=text[:100])
    algorithm, _, digits = text.partition(":")
    if algorithm != "sha256":
        raise InvalidArgument(f"unsupported digest algorithm {algorithm!r}: only sha256 is", at=text[:100])
    if len(digits) != 64:
        raise InvalidArgument(f"invalid digest length: sha256 has 64 hex digits, not {len(digits)}", at=text[:100])
    if not IDENTIFIER.fullmatch(digits):
        raise InvalidArgument("invalid digest format: lower-case hex digits expected", at=text[:100])
    return text


def _split(name: str) -> tuple[str, str]:
    match = NAME.fullmatch(name)
    if match is None:
        raise InvalidArgument("invalid reference format", at=name[:300])
    domain, path = match[1] or "", match[2]
    if len(path) > MAX_PATH:
        raise InvalidArgument(f"repository name must not be more than {MAX_PATH} characters", at=name[:300])
    return domain, path


def parse_exact(text: str) -> Reference:
    """`text` by the grammar alone, nothing filled in: nginx stays nginx."""
    if not text:
        raise InvalidArgument("repository name must have at least one component")
    match = REFERENCE.fullmatch(text)
    if match is None:
        if REFERENCE.fullmatch(text.lower()):
            raise InvalidArgument("repository name must be lowercase", at=text[:300])
        raise InvalidArgument(
            "invalid reference format", at=text[:300], hint="[host[:port]/]path[:tag][@sha256:…], path in lower case"
        )
    domain, path = _split(match[1])
    return Reference(domain, path, match[2] or "", check_digest_form(match[3]) if match[3] else "")


def with_name(text: str) -> Reference:
    """A repository name without tag and digest."""
    return Reference(*_split(text))


def split_docker_domain(name: str) -> tuple[str, str]:
    """Domain and the rest of what people write: the first component is a domain when it looks like one."""
    first, slash, rest = name.partition("/")
    if not slash or (first != "localhost" and not set(first) & {".", ":"} and first.lower() == first):
        domain, rest = DEFAULT_DOMAIN, name
    else:
        domain = DEFAULT_DOMAIN if first == LEGACY_DOMAIN else first
    if domain == DEFAULT_DOMAIN and "/" not in rest:
        rest = OFFICIAL + rest
    return domain, rest


def parse(text: str) -> Reference:
    """What people write, with Docker's defaults for domain and `library/` filled in; the tag is left as given."""
    if IDENTIFIER.fullmatch(text):
        raise InvalidArgument("invalid repository name: 64 hex digits would be taken for an image id", at=text)
    if not text:
        raise InvalidArgument("repository name must have at least one component")
    domain, rest = split_docker_domain(text)
    remote = rest.split("@", 1)[0]
    remote = remote.rsplit(":", 1)[0] if ":" in remote else remote
    if remote.lower() != remote:
        raise InvalidArgument("invalid reference format: repository name must be lowercase", at=text[:300])
    return parse_exact(f"{domain}/{rest}")


def parse_any(text: str) -> Reference:
    """A reference, a digest, or the 64 hex digits of one."""
    if IDENTIFIER.fullmatch(text):
        return Reference("", "", "", "sha256:" + text)
    try:
        return Reference("", "", "", check_digest_form(text))
    except InvalidArgument:
        return parse(text)

"""Docker's credential helpers: programs that keep logins. Floor 2.

Only here: how one is asked: `docker-credential-<name> get` with the server's address on its standard input answers
{"ServerURL", "Username", "Secret"}; the user name <token> means that the secret is an identity token. The name comes
from a login file and must be one word; the program is found on $PATH, gets ten seconds, and 64 KiB of answer are read.

Source: github.com/docker/docker-credential-helpers (client/client.go, credentials/error.go).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping

from engine import programs
from engine.errors import AccessDenied, DeadlineExceeded, NotFound, TooLarge

SECONDS = 10.0
MAX_ANSWER = 64 << 10
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
NOT_FOUND = "credentials not found in native keychain"
HUB_SERVER = "https://index.docker.io/v1/"


def server_of(domain: str) -> str:
    """What Docker calls the registry when it speaks to a helper."""
    return HUB_SERVER if domain == "docker.io" else domain


def ask(name: str, domain: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """(user name, secret) that the helper keeps for a registry; None when it keeps none.

    NotFound when there is no such program, AccessDenied when it fails or answers nonsense, DeadlineExceeded, TooLarge.
    """
    program = f"docker-credential-{name}"
    if not NAME.fullmatch(name):
        raise AccessDenied("the login file names a helper that is no program's name", at=name[:80])
    path = shutil.which(program, path=environ.get("PATH"))
    if path is None:
        raise NotFound(f"{program} is not on $PATH", at=program)
    try:
        code, out, err = programs.run_helper([path, "get"], server_of(domain).encode(), SECONDS, MAX_ANSWER, environ)
    except TimeoutError as error:
        raise DeadlineExceeded(f"{program} did not answer within {SECONDS:.0f} s", at=program) from error
    except OverflowError as error:
        raise TooLarge(f"{program} answers more than {MAX_ANSWER} bytes", at=program) from error
    except OSError as error:
        raise AccessDenied(f"{program} cannot be run: {error.strerror}", at=program) from error
    if code:
        said = " ".join((out + err).decode(errors="replace").split())
        if NOT_FOUND in said:
            return None
        raise AccessDenied(f"{program} failed ({code}): {said[:200]}", at=program)
    try:
        answer = json.loads(out)
        user, secret = answer["Username"], answer["Secret"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise AccessDenied(f"{program} answers something that is not a login", at=program) from error
    if not isinstance(user, str) or not isinstance(secret, str):
        raise AccessDenied(f"{program} answers something that is not a login", at=program)
    return (user, secret) if secret else None

"""What was written by a person, as it may be kept and shown to others: without secrets. Floor 0, pure.

Only here: which words of a command are secret: passwords among mount options (as mount.cifs(8) names them), and the
values of environment variables. The journal and `error` keep commands for days, and are read by more people and
programs than wrote them; where a secret is needed (a config, a volume's options) it is kept once, as it is.
"""

from __future__ import annotations

import json
import re
import shlex

HIDDEN = "…"

# a doubled comma belongs to the value (mount.cifs(8)); the value may hold blanks where the word is quoted
_PASSWORD = re.compile(
    r"""(?<![^\s,'"=])((?:password2?|passwd|pass)=)(?:,,|(?!\s{1,8}[a-z_]{1,32}=)[^,])*""", re.IGNORECASE
)
_WORD = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s'"\\])+|['"\\]""", re.DOTALL)  # as sh
_ENV = re.compile(r"""(["']?env=["']?[^\s=]+=)(.+)""", re.DOTALL)


def mount_options(text: str) -> str:
    """The value of `o=` without its passwords."""
    return _PASSWORD.sub(rf"\1{HIDDEN}", text)


def command(line: str) -> str:
    """A line written to a ctl, or `FIELD = VALUE` of a config's field, without passwords and values of variables."""
    verb, _, rest = line.partition(" ")
    if verb == "env" and rest.startswith("= "):
        return f"env = {_names(rest[2:])}"
    if verb == "spec":
        return f"spec {_document(rest)}"
    return mount_options(_WORD.sub(_variable, line))


def _variable(word: re.Match[str]) -> str:
    found = _ENV.fullmatch(word[0])
    return word[0] if found is None else found[1] + HIDDEN


def _names(text: str) -> str:
    """KEY=VALUE lines."""
    pairs = [item.partition("=") for item in text.splitlines()]
    return "\n".join(f"{key}={HIDDEN}" if equals else HIDDEN for key, equals, _ in pairs)


def _document(text: str) -> str:
    """The JSON of a session; what is none may hold anything."""
    try:
        (word,) = shlex.split(text)
        asked = json.loads(word)
        asked["env"] = [f"{str(item).partition('=')[0]}={HIDDEN}" for item in asked.get("env") or ()]
    except (ValueError, TypeError, AttributeError):
        return HIDDEN
    return json.dumps(asked, ensure_ascii=False)

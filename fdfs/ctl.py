"""The control grammar: one line is one command; words are split as a POSIX shell does; a table says what exists.

Floor 5. Only here: parsing of lines, checking of arguments against a verb's usage, and the list a ctl shows when read.
Who wrote what (an event) and what failed (the object's `error`) is recorded by `engine.command`, around each line. Runs
in the thread of the write(2).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidArgument, TooLarge
from fdfs.entry import File, Handler, Keys

MAX_WRITE = 64 << 10  # bytes of one write to a ctl
MAX_LINES = 256


@dataclass(frozen=True, slots=True)
class Call:
    """A checked command: positional words, `key=value` options, and the words after `--`."""

    args: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    rest: tuple[str, ...] | None = None
    who: str = ""

    def arg(self, index: int) -> str | None:
        return self.args[index] if index < len(self.args) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One verb. `args` is its usage and its arity: `REF [platform=…]`, `[SECONDS]`, `IMAGE [name=…] [-- ARGV…]`.

    UPPER is one word, `[UPPER]` an optional one, `UPPER…` one or more, `[key=…]` an option, `[KEY=VALUE…]` any
    options, `[key=…]*` one that may be given again (values joined by newlines), `[-- ARGV…]` words passed on as they
    are, `ARGV…` the same from the first word on that is no option (or after `--`). `run(engine, *keys, call)` returns
    the reply or None.
    """

    name: str
    doc: str
    run: Handler
    args: str = ""

    @property
    def usage(self) -> str:
        return f"{self.name} {self.args}".rstrip()


def table(*verbs: Verb) -> Mapping[str, Verb]:
    return {verb.name: verb for verb in verbs}


@dataclass(frozen=True, slots=True)
class _Shape:
    least: int
    most: int | None
    options: frozenset[str]
    free_options: bool
    rest: bool
    again: frozenset[str]  # options that may be repeated
    verbatim: bool  # from the first word on that is no option, words are passed on as they are


def _shape(verb: Verb) -> _Shape:
    """Arity from a verb's usage."""
    least, most, options, free, rest = 0, 0, set(), False, False
    endless = False
    again = set()
    verbatim = False
    for token in re.findall(r"\[[^\]]*\]\*?|\S+", verb.args):
        inner = token.strip("[]*")
        if inner.startswith("--"):
            rest = True
        elif "=" in inner:
            key = inner.partition("=")[0]
            free = free or key == "KEY"
            options.add(key)
            if token.endswith("*"):
                again.add(key)
        else:
            least += 0 if token.startswith("[") else 1
            most += 1
            endless = endless or inner.endswith("…")
            verbatim = verbatim or inner == "ARGV…"
    return _Shape(least, None if endless else most, frozenset(options), free, rest, frozenset(again), verbatim)


def parse(verb: Verb, words: list[str], who: str = "") -> Call:
    """`words` (without the verb) as a Call. EINVAL names the word at fault and shows the usage."""
    shape = _shape(verb)
    hint = f"usage: {verb.usage}"
    args: list[str] = []
    options: dict[str, str] = {}
    rest: tuple[str, ...] | None = None
    for index, word in enumerate(words):
        key, equals, value = word.partition("=")
        if shape.verbatim and (args or word == "--"):
            args += words[index + (word == "--" and not args) :]
            break
        if word == "--" and shape.rest:
            rest = tuple(words[index + 1 :])
            break
        if equals and (key in shape.options or shape.free_options) and key:
            if key in options and key in shape.again:
                value = f"{options[key]}\n{value}"
            elif key in options:
                raise InvalidArgument(f"{verb.name}: {key}= given twice", at=word, hint=hint)
            options[key] = value
        elif equals and shape.options and re.fullmatch(r"[a-z_]+", key):
            raise InvalidArgument(f"{verb.name}: unknown option {key}=", at=word, hint=hint)
        else:
            args.append(word)
            if shape.most is not None and len(args) > shape.most:
                raise InvalidArgument(f"{verb.name}: too many arguments", at=word, hint=hint)
    if len(args) < shape.least:
        raise InvalidArgument(f"{verb.name}: argument missing", hint=hint)
    return Call(tuple(args), options, rest, who)


def split_line(line: str) -> list[str]:
    """The words of one line; quotes and backslashes as in a POSIX shell, `#` has no meaning. EINVAL if unbalanced."""
    try:
        return shlex.split(line, comments=False)
    except ValueError as error:
        raise InvalidArgument(f"cannot split the line into words: {str(error).lower()}", at=line[-40:]) from error


def valid_now(engine: Any, row: File, keys: Keys) -> list[Verb]:
    verbs = row.verbs or {}
    if row.valid is None:
        return list(verbs.values())
    allowed = set(row.valid(engine, *keys))
    return [verb for verb in verbs.values() if verb.name in allowed]


def listing(engine: Any, row: File, keys: Keys) -> str:
    """What a ctl shows: one line per verb that is valid now, with its arguments."""
    return "".join(f"{verb.usage}\n" for verb in valid_now(engine, row, keys))


def object_of(engine: Any, row: Any, keys: Keys) -> str:
    return str(row.object(engine, *keys)) if row.object is not None else ""


def run_line(engine: Any, row: File, keys: Keys, line: str, who: str) -> str:
    """Run one line; the reply text ("" for none). A failure is recorded for the object and raised."""
    with engine.command(object_of(engine, row, keys), line, who=who):
        words = split_line(line)
        verb = (row.verbs or {}).get(words[0]) if words else None
        if verb is None:
            known = ", ".join(v.name for v in valid_now(engine, row, keys))
            raise InvalidArgument(
                f"unknown verb {words[0]!r}" if words else "no verb",
                at=words[0] if words else None,
                hint=f"valid now: {known}" if known else "no verb is valid now",
            )
        reply = verb.run(engine, *keys, parse(verb, words[1:], who))
    return f"{reply}\n" if reply else ""


def execute(engine: Any, row: File, keys: Keys, data: bytes, who: str) -> str:
    """Run every line of one write, in order, stopping at the first failure; the replies, one line each.

    E2BIG above 64 KiB or 256 lines, before anything ran. Empty lines do nothing.
    """
    if len(data) > MAX_WRITE:
        raise TooLarge(f"a write to a ctl holds at most {MAX_WRITE} bytes")
    try:
        lines = [line.strip() for line in data.decode().split("\n")]
    except UnicodeDecodeError as error:
        with engine.command(object_of(engine, row, keys), ascii(data[:80]), who=who):
            raise InvalidArgument(f"not UTF-8 at byte {error.start}") from error
    lines = [line.strip("\0") for line in lines if line.strip("\0")]
    if len(lines) > MAX_LINES:
        raise TooLarge(f"a write to a ctl holds at most {MAX_LINES} lines")
    return "".join(run_line(engine, row, keys, line, who) for line in lines)

"""The error set is closed and documented: each class in the tree of the module's docstring, each errno its own."""

from __future__ import annotations

import errno
import re

import pytest

from engine import errors
from engine.errors import EngineError


def subclasses() -> list[type[EngineError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, EngineError) and value is not EngineError
    ]


def documented() -> dict[str, str]:
    return dict(re.findall(r"[├└]── (\w+)\s+([A-Z0-9]+) ", errors.__doc__ or ""))


def test_the_documented_tree_is_the_real_one() -> None:
    assert {cls.__name__ for cls in subclasses()} == set(documented())
    for cls in subclasses():
        assert errno.errorcode[cls.errno] in (documented()[cls.__name__], "EIO", "ENOTSUP"), cls
        assert cls.errno == getattr(errno, documented()[cls.__name__], cls.errno)


def test_each_errno_means_one_thing() -> None:
    numbers = [cls.errno for cls in subclasses()]
    assert len(numbers) == len(set(numbers))


def test_nothing_derives_further() -> None:
    assert all(cls.__bases__ == (EngineError,) for cls in subclasses())
    assert not issubclass(EngineError, OSError)


@pytest.mark.parametrize("cls", subclasses())
def test_an_error_carries_reason_place_and_hint(cls: type[EngineError]) -> None:
    error = cls("why", at="word", hint="do this")
    assert (str(error), error.reason, error.at, error.hint) == ("why", "why", "word", "do this")

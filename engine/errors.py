"""The closed set of errors the engine raises, each with the errno a user of the mount sees.

Floor 0: imports nothing of ours. These are *not* OSErrors: a real OSError passes through the mount's
guard unchanged, an EngineError is translated there once, anything else is a bug and becomes EIO.

    EngineError
    ├── InvalidArgument   EINVAL        unknown verb, bad argument, bad document
    ├── NotFound          ENOENT        no such image, container, volume, file
    ├── AlreadyExists     EEXIST        the name is taken
    ├── Busy              EBUSY         wrong state for the verb, or the object is in use
    ├── ReadOnly          EROFS         a write to a read-only view
    ├── AccessDenied      EACCES        no handler for that direction; refused by a registry
    ├── Damaged           EIO           content does not match its digest or cannot be parsed
    ├── RuntimeFailure    EREMOTEIO     the runtime (runc, conmon, a guest) failed
    ├── Unreachable       EHOSTUNREACH  registry or guest out of reach
    ├── DeadlineExceeded  ETIMEDOUT     it took longer than its deadline
    ├── NoSpace           ENOSPC        the disk is full
    ├── TooLarge          E2BIG         input beyond its bound
    ├── Gone              ENODEV        the object was removed while open
    └── Unsupported       EOPNOTSUPP    not possible on this host
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class EngineError(Exception):
    """A failure with a reason for people. `at` is the token, field or byte at fault; `hint` says what to do next."""

    errno: ClassVar[int] = _errno.EIO

    def __init__(self, reason: str, *, at: str | None = None, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at
        self.hint = hint


class InvalidArgument(EngineError):
    errno = _errno.EINVAL


class NotFound(EngineError):
    errno = _errno.ENOENT


class AlreadyExists(EngineError):
    errno = _errno.EEXIST


class Busy(EngineError):
    errno = _errno.EBUSY


class ReadOnly(EngineError):
    errno = _errno.EROFS


class AccessDenied(EngineError):
    errno = _errno.EACCES


class Damaged(EngineError):
    errno = _errno.EIO


class RuntimeFailure(EngineError):
    errno = getattr(_errno, "EREMOTEIO", _errno.EIO)  # macOS has no EREMOTEIO


class Unreachable(EngineError):
    errno = _errno.EHOSTUNREACH


class DeadlineExceeded(EngineError):
    errno = _errno.ETIMEDOUT


class NoSpace(EngineError):
    errno = _errno.ENOSPC


class TooLarge(EngineError):
    errno = _errno.E2BIG


class Gone(EngineError):
    errno = _errno.ENODEV


class Unsupported(EngineError):
    errno = _errno.EOPNOTSUPP

"""Every error that torpor raises on purpose, in one tree.

    TorporError
    ├── UserError              what was asked cannot be done: yours to change
    │   ├── InvalidInput       a value, file or option is malformed
    │   ├── NotFound           no function, snapshot, instance or ref of that name
    │   ├── Conflict           it exists already, or somebody else is at it now
    │   ├── FunctionFailed     the function's own code did not start, listen or answer
    │   └── NotAllowed         who asks has not shown the daemon's token
    ├── OutsideError           the host, the network or a program refused: the outside's
    │   ├── HostUnfit          a kernel feature, program, device or permission is missing
    │   ├── NoSpace            a disk is full
    │   ├── ProgramFailed      a child process exited with an error
    │   ├── VmmFailed          the VMM refused, died or did not answer
    │   ├── GuestFailed        the agent in the guest refused or did not answer
    │   ├── StoreError         the object store failed
    │   │   ├── StoreUnreachable   no connection, no whole answer, or "not now"
    │   │   ├── StoreDenied        credentials missing or not sufficient
    │   │   ├── ObjectMissing      there is no such object
    │   │   └── ObjectConflict     a conditional put found another state
    │   ├── Overloaded         so much waits already that no more is taken
    │   └── DeadlineExceeded   it took longer than it may
    ├── DataError              stored bytes are not what they should be: the data's
    │   ├── Damaged            a digest, length or encoding does not fit
    │   ├── Incompatible       a sound snapshot that this host cannot run
    │   └── KeyMissing         a sound object that no key on this node vouches for
    └── InternalError          torpor broke its own rules: ours

A class is its default exit code and HTTP status; an object is what happened (`message`), why
(`reason`, often the words of the layer below) and what to do (`hint`).
"""

from __future__ import annotations

from typing import ClassVar


class TorporError(Exception):
    """Base of all errors raised on purpose.

    `message` says what happened in one sentence without a final full stop, `reason` why it did,
    `hint` what the user can do. `str()` gives message and reason.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, reason: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}: {self.reason}" if self.reason else self.message

    def to_dict(self) -> dict[str, str | int]:
        """The error as `--json` prints it."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "reason": self.reason,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


class UserError(TorporError):
    """What was asked cannot be done."""

    exit_code = 2
    http_status = 400


class InvalidInput(UserError):
    """A value, file or option is malformed."""


class NotFound(UserError):
    """There is nothing of that name."""

    exit_code = 3
    http_status = 404


class Conflict(UserError):
    """It exists already, or another command is at work on it."""

    exit_code = 4
    http_status = 409


class FunctionFailed(UserError):
    """The function's own code did not start, listen or answer."""

    exit_code = 5
    http_status = 502


class NotAllowed(UserError):
    """Who asks has not shown the token, or asks for what only the node's own socket may."""

    exit_code = 6
    http_status = 401


class OutsideError(TorporError):
    """The host, the network or a program refused."""

    exit_code = 10
    http_status = 503


class HostUnfit(OutsideError):
    """A kernel feature, program, device or permission is missing on this host."""

    exit_code = 11


class NoSpace(OutsideError):
    """A disk is full."""

    exit_code = 12
    http_status = 507

    def __init__(
        self, message: str, *, reason: str = "", hint: str = "free some space and try again"
    ) -> None:
        super().__init__(message, reason=reason, hint=hint)


class ProgramFailed(OutsideError):
    """A child process exited with an error."""

    exit_code = 13
    http_status = 500


class VmmFailed(OutsideError):
    """The VMM refused, died or did not answer."""

    exit_code = 14


class GuestFailed(OutsideError):
    """The agent in the guest refused or did not answer."""

    exit_code = 15


class StoreError(OutsideError):
    """The object store failed."""

    exit_code = 20


class StoreUnreachable(StoreError):
    """No connection to the store, no whole answer in time, or the answer that it cannot now."""

    exit_code = 21


class StoreDenied(StoreError):
    """Credentials are missing or not sufficient."""

    exit_code = 22
    http_status = 502


class ObjectMissing(StoreError):
    """There is no such object."""

    exit_code = 23
    http_status = 404


class ObjectConflict(StoreError):
    """A conditional put found another state than it asked for."""

    exit_code = 24
    http_status = 409


class DeadlineExceeded(OutsideError):
    """It took longer than it may."""

    exit_code = 16
    http_status = 504


class Overloaded(OutsideError):
    """So much waits already that no more is taken: try again later."""

    exit_code = 17


class DataError(TorporError):
    """Stored bytes are not what they should be."""

    exit_code = 30
    http_status = 500


class Damaged(DataError):
    """A digest, length or encoding does not fit."""

    exit_code = 31


class Incompatible(DataError):
    """A sound snapshot that this host cannot run; the reason names each difference."""

    exit_code = 32
    http_status = 409


class KeyMissing(DataError):
    """A sound object that is sealed with another key than this node's, or with none."""

    exit_code = 33
    http_status = 403


class InternalError(TorporError):
    """torpor broke its own rules; please report it."""

    exit_code = 70

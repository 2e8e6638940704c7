"""Errors over HTTP: RFC 9457 problems, made from the one error tree and back.

A problem's `type` is `urn:torpor:error:` and the class; `detail` is the message; `reason`, `hint`
and `exit_code` come along, so that a command which asked a daemon ends as one that did the work.
"""

from __future__ import annotations

import http
from typing import Any, Final

import msgspec

from torpor import errors
from torpor.errors import InternalError, TorporError
from torpor.structs import prepared

MEDIA_TYPE: Final = "application/problem+json"
_TYPE: Final = "urn:torpor:error:"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """The members of a problem."""

    type: str
    title: str
    status: int
    detail: str
    reason: str = ""
    hint: str = ""
    exit_code: int = 1


def problem_of(error: TorporError, *, status: int | None = None) -> Problem:
    """An error as a problem, under the class's HTTP status unless another is given."""
    code = status or error.http_status
    return Problem(
        type=_TYPE + type(error).__name__,
        title=http.HTTPStatus(code).phrase,
        status=code,
        detail=error.message,
        reason=error.reason,
        hint=error.hint,
        exit_code=error.exit_code,
    )


def bug_of(error: Exception) -> InternalError:
    """What a client is told of an exception that nobody raised on purpose."""
    return InternalError(
        "the daemon failed",
        reason=f"{type(error).__name__}: {error}",
        hint="this is a bug in torpor; its log shows where, please report it",
    )


def error_of(data: Any, *, status: int) -> TorporError:  # noqa: ANN401
    """The error that a problem is, or an InternalError for an answer that is none."""
    try:
        problem = msgspec.convert(data, prepared(Problem))
    except msgspec.ValidationError:
        return InternalError(f"the daemon answered {status} without saying why")
    found = getattr(errors, problem.type.removeprefix(_TYPE), None)
    known = isinstance(found, type) and issubclass(found, TorporError)
    kind: type[TorporError] = found if known and found is not None else InternalError
    return kind(problem.detail, reason=problem.reason, hint=problem.hint)

"""Answers that the gateway gives itself: RFC 9457 problems, from the one error tree.

A caller of a function is not its owner: a problem says what happened, not the reason, which may
hold the guest's console or paths of this host. That is in the log, under the request's id.
"""

from __future__ import annotations

import http
import re
from dataclasses import dataclass, field

import msgspec

from torpor.errors import (
    Conflict,
    DeadlineExceeded,
    FunctionFailed,
    NoSpace,
    NotFound,
    OutsideError,
    Overloaded,
    TorporError,
)

RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Problem:
    """One answer in the gateway's own name; `name` is its kind, `headers` come beside the usual."""

    status: int
    name: str
    detail: str
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())

    @classmethod
    def of(cls, error: TorporError) -> Problem:
        """What a request is told that could not be answered because of `error`."""
        name = re.sub(r"(?<!^)([A-Z])", r"-\1", type(error).__name__).lower()
        detail = "this node's disk is full" if isinstance(error, NoSpace) else error.message
        return cls(_status_of(error), name, detail, _headers_of(error))

    @property
    def title(self) -> str:
        """The status in words."""
        return http.HTTPStatus(self.status).phrase

    def encode(self, *, request_id: str) -> bytes:
        """The body: application/problem+json."""
        return msgspec.json.encode(
            {
                "type": f"urn:torpor:problem:{self.name}",
                "title": self.title,
                "status": self.status,
                "detail": self.detail,
                "instance": f"urn:torpor:request:{request_id}",
            }
        )


class Refused(Exception):
    """A request that is not passed on; never leaves the gateway."""

    def __init__(self, status: int, name: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem(status, name, detail)


def malformed(detail: str) -> Refused:
    """400: what came is not a request that may be passed on."""
    return Refused(400, "malformed-request", detail)


def _status_of(error: TorporError) -> int:
    match error:
        case NotFound():
            return 404
        case DeadlineExceeded():
            return 504
        case FunctionFailed():
            return 502
        case NoSpace():
            return 507
        case OutsideError() | Conflict():
            return 503
        case _:  # stored data that does not wake, or our own fault
            return 502


def _headers_of(error: TorporError) -> tuple[tuple[bytes, bytes], ...]:
    if isinstance(error, Overloaded):
        return ((b"Retry-After", b"%d" % RETRY_AFTER_S),)
    return ()

"""obstore's exceptions as torpor's, by exception class, HTTP status and S3 error code.

obstore puts all it knows into one text: a sentence, then the Rust value in the pretty form of
`{:#?}`, one field a line, with strings escaped on that line. Fields are read from that second
part by whole lines, so nothing that a key, URL or answer contains can be taken for one.

    class or status                            becomes             repeated by Retry
    FileNotFoundError, 404                     ObjectMissing       no
      with the code NoSuchBucket               StoreError          no
    AlreadyExists, Precondition, 409, 412      ObjectConflict      no
    PermissionDenied, Unauthenticated, 401/3   StoreDenied         no
    507, ENOSPC, EDQUOT                        NoSpace             no
    408, 429, 5xx but 501, passing codes       StoreUnreachable    yes
    no status: connect, reset, timeout, body   StoreUnreachable    yes
    other statuses, other errors of files      StoreError          no
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from obstore import exceptions as obs

from torpor.errors import (
    NoSpace,
    ObjectConflict,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreUnreachable,
)

if TYPE_CHECKING:
    from torpor.errors import TorporError

_DEBUG: Final = "\n\nDebug source:\n"
_STATUS: Final = re.compile(r"^ *status: (\d{3}),$", re.MULTILINE)
_OS_CODE: Final = re.compile(r"^ *code: (\d+),$", re.MULTILINE)
_DELETE_CODE: Final = re.compile(r'^ *code: "(\w+)",$', re.MULTILINE)
_LOCAL: Final = re.compile(r'^ *store: "LocalFileSystem",$', re.MULTILINE)
_REDIRECT: Final = re.compile(r"^ *inner: BareRedirect,$", re.MULTILINE)
_BAD_RANGE: Final = re.compile(r"^ *source: StartTooLarge \{$", re.MULTILINE)
_CAUSE: Final = re.compile(r'^ *(?:message|error): "(.*)",$|^ *source: (TimedOut),$', re.MULTILINE)
_BROKEN: Final = re.compile(r"^ *(?:error: IncompleteBody|IncompleteMessage),$", re.MULTILINE)
_S3_ERROR: Final = re.compile(r"<Code>(\w+)</Code>(?:<Message>([^<]*)</Message>)?")

_PASSING_CODES: Final = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "NoSuchUpload",  # a stream's last answer was lost: it is there, or it is gone
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
}
_DENIED_CODES: Final = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_PASSING_STATUSES: Final = {408, 429}
_NO_REPEAT_5XX: Final = {501, 507}


@dataclass(frozen=True)
class Words:
    """What an exception of obstore says: fields that it does not have are 0 or empty.

    `status`: HTTP. `code`: of the S3 error in the answer. `os_code`: errno of a local store.
    `reason`: for people. `is_bad_range`: the object ends at or before the range. `is_local`: a
    file store's. `is_redirect`: a redirect that led nowhere.
    """

    status: int
    code: str
    os_code: int
    reason: str
    is_bad_range: bool
    is_local: bool
    is_redirect: bool


def read_words(text: str) -> Words:
    """The fields of an exception's text."""
    sentence, _, debug = text.partition(_DEBUG)
    status, local = _STATUS.search(debug), bool(_LOCAL.search(debug))
    s3_error = _S3_ERROR.search(sentence) if status else None
    code = s3_error or _DELETE_CODE.search(debug)
    os_code = _OS_CODE.search(debug) if local else None
    return Words(
        status=int(status[1]) if status else 0,
        code=code[1] if code else "",
        os_code=int(os_code[1]) if os_code else 0,
        reason=_reason(sentence, debug, status, s3_error),
        is_bad_range=bool(_BAD_RANGE.search(debug) or (status and status[1] == "416")),
        is_local=local,
        is_redirect=bool(_REDIRECT.search(debug)),
    )


def translate(error: Exception, key: str, where: str) -> TorporError:
    """The error to raise instead; `key` may be a prefix or empty, `where` is the store's URL."""
    if not isinstance(error, obs.BaseError | OSError | NotImplementedError):
        return StoreError(f"{where} failed for {key}", reason=str(error)[:400])
    words = read_words(str(error))
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return _of_file_system(error.errno or 0, str(error), key, where)
    if words.is_local and words.os_code and isinstance(error, obs.GenericError):
        return _of_file_system(words.os_code, words.reason, key, where)
    if words.code in _PASSING_CODES or _is_passing(words, error):
        return _unreachable(words, key, where)
    return _settled(error, words, key, where)


def _is_passing(words: Words, error: Exception) -> bool:
    if words.status in _PASSING_STATUSES or 200 <= words.status < 300:
        return True
    if words.status:
        return words.status >= 500 and words.status not in _NO_REPEAT_5XX
    answered = words.code or words.is_redirect or words.is_local
    return isinstance(error, obs.GenericError) and not answered


def _settled(error: Exception, words: Words, key: str, where: str) -> TorporError:
    """What repeating does not change."""
    status, reason = words.status, words.reason
    if words.code == "NoSuchBucket":
        return StoreError(
            f"there is no bucket for {where}", reason=reason, hint="make it, or correct the URL"
        )
    if isinstance(error, obs.AlreadyExistsError | obs.PreconditionError | obs.NotModifiedError):
        return ObjectConflict(f"object {key} was written by somebody else", reason=reason)
    if isinstance(error, FileNotFoundError | obs.NotFoundError) or status == 404:
        return ObjectMissing(f"there is no object {key} in {where}", reason=reason)
    if status in (409, 412):
        return ObjectConflict(f"object {key} was written by somebody else", reason=reason)
    denied = isinstance(error, obs.PermissionDeniedError | obs.UnauthenticatedError)
    if denied or status in (401, 403) or words.code in _DENIED_CODES:
        return _denied(reason, key, where)
    if status == 507:
        return _full(reason, key, where)
    hint = "check the region and the endpoint" if words.is_redirect or 300 <= status < 400 else ""
    return StoreError(f"{where} failed for {key}", reason=reason, hint=hint)


def _of_file_system(code: int, reason: str, key: str, where: str) -> TorporError:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return _full(reason, key, where)
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _denied(reason, key, where)
    if code == errno.ENOENT:
        return ObjectMissing(f"there is no object {key} in {where}", reason=reason)
    return StoreError(f"{where} failed for {key}", reason=reason or os.strerror(code))


def _unreachable(words: Words, key: str, where: str) -> StoreUnreachable:
    if words.status:
        return StoreUnreachable(
            f"{where} cannot serve {key} now",
            reason=words.reason,
            hint="try again later; check the store's own log",
        )
    return StoreUnreachable(
        f"{where} did not answer for {key}",
        reason=words.reason,
        hint="check that it runs and that its address is right",
    )


def _denied(reason: str, key: str, where: str) -> StoreDenied:
    return StoreDenied(
        f"{where} denied access to {key}",
        reason=reason,
        hint="check key, secret, and what the key may do in the bucket",
    )


def _full(reason: str, key: str, where: str) -> NoSpace:
    return NoSpace(f"{where} is full, {key} could not be written", reason=reason)


def _reason(
    sentence: str, debug: str, status: re.Match[str] | None, s3_error: re.Match[str] | None
) -> str:
    if status is not None:
        said = f" {s3_error[1]}: {s3_error[2] or ''}" if s3_error else ""
        return f"HTTP status {status[1]}{said}".strip(": ")
    if cause := _CAUSE.search(debug):
        return "it took too long" if cause[2] else cause[1]
    if _BROKEN.search(debug):
        return "the connection was closed in the middle of the answer"
    return sentence.strip().split("\n", 1)[0][:400]

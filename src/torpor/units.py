"""Sizes, durations and digests: parsed once, at the edge, and typed from there on."""

from __future__ import annotations

import re
from typing import Final, NewType

from torpor.errors import InvalidInput

Digest = NewType("Digest", str)
"""A BLAKE3 digest as 64 lower-case hexadecimal digits."""

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(i?b)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes in `256MiB`, `64k` or `4096`; units are powers of 1024. Raises InvalidInput."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InvalidInput(f"not a size: {text!r}", hint="write it like 256MiB, 64k or 4096")
    exponent = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * 1024**exponent)


def format_size(size_bytes: float) -> str:
    """A size for people: `17.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("the loop returns")


def parse_duration(text: str) -> float:
    """Seconds in `250ms`, `30s`, `5m` or `1.5`. Raises InvalidInput."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise InvalidInput(f"not a duration: {text!r}", hint="write it like 250ms, 30s or 5m")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def format_duration(seconds: float) -> str:
    """A duration for people: `35 ms`, `1.24 s`, `2 m 05 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{int(seconds // 60)} m {int(seconds % 60):02d} s"


def parse_digest(text: str) -> Digest:
    """A digest as it stands in a manifest or a path. Raises InvalidInput."""
    if _DIGEST.fullmatch(text) is None:
        raise InvalidInput(f"not a digest: {text[:80]!r}", hint="a digest is 64 hexadecimal digits")
    return Digest(text)


def is_name(text: str) -> bool:
    """Whether `parse_name` takes it."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def parse_name(text: str, *, what: str = "name") -> str:
    """A function or ref name: letters, digits, dots and hyphens, safe as one path component.

    Raises InvalidInput.
    """
    if not is_name(text):
        raise InvalidInput(
            f"not a {what}: {text[:80]!r}",
            hint="use up to 63 lower-case letters, digits, '.' and '-', "
            "with a letter or digit first and last",
        )
    return text

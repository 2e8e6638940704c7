"""Which store a snapshot is read from, and with which keys: what a client tells the pager."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from torpor.config import Settings, load_settings
from torpor.snapshot.repository.keys import Keyring, parse_keyring, plain_keyring
from torpor.snapshot.repository.repository import Repository
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torpor.store.metrics import Counters

_RETRY_S: Final = "1s"
_PREFIXES: Final = ("s3_", "store")


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A store as settings in text form, and the lines of a keyring; without lines all is plain.

    It holds secrets: it goes through the pager's socket and into files of mode 0600 only.
    """

    settings: tuple[tuple[str, str], ...]
    keys: str
    plain: bool

    @classmethod
    def of(cls, settings: Settings, keys: str) -> Source:
        """The source that a node's settings mean."""
        rows = {
            row.name: str(getattr(settings, row.name))
            for row in fields(Settings)
            if row.name.startswith(_PREFIXES)
        }
        rows["store"] = settings.store_url()
        return cls(tuple(sorted(rows.items())), keys, settings.plain)


def open_repository(source: Source, *, counters: Counters | None = None) -> Repository:
    """The repository of a source, whose store is asked again only briefly, and counted.

    The fetcher has a deadline of its own and asks again by itself until that is over.
    """
    rows: Mapping[str, str] = dict(source.settings) | {"store_retry_s": _RETRY_S}
    settings = load_settings(rows, environ={}, file=_NO_FILE)
    return Repository(open_store(settings, counters=counters), _keyring(source))


def _keyring(source: Source) -> Keyring:
    if not source.keys:
        return plain_keyring()
    keyring = parse_keyring(source.keys, source="the node's keyring")
    return keyring.with_plain() if source.plain else keyring


_NO_FILE: Final = Path("/dev/null")

"""Which store a snapshot is read from, and with which keys: what a client tells the pager."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from torpor.config import Settings, load_settings
from torpor.snapshot.repository.keys import Keyring, parse_keyring, plain_keyring
from torpor.snapshot.repository.repository import Repository
from torpor.store.plain import open_plain
from torpor.store.stack import wrap

if TYPE_CHECKING:
    from torpor.store.interface import Store
    from torpor.store.metrics import Counters

_RETRY_S: Final = 1.0
_PREFIXES: Final = ("s3_", "store")
_NO_FILE: Final = Path("/dev/null")


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


@dataclass(frozen=True)
class OpenSource:
    """A source's repository, and the same store for who repeats what fails by himself."""

    repository: Repository
    store: Store


def open_source(
    source: Source, *, deadline_s: float, counters: Counters | None = None
) -> OpenSource:
    """The repository of a source, whose store is asked again until the deadline, and counted.

    The store beside it repeats only briefly: the fetcher has other things to do meanwhile, and its
    requests are not to wait behind those of the repository. Nothing is asked yet. Raises
    InvalidInput, HostUnfit, StoreDenied.
    """
    settings = load_settings(dict(source.settings), environ={}, file=_NO_FILE)
    settings = replace(settings, store_timeout_s=min(settings.store_timeout_s, deadline_s))
    plain = open_plain(settings, settings.store_url())
    patient = wrap(plain, replace(settings, store_retry_s=deadline_s), counters=counters)
    hurried = replace(settings, store_retry_s=min(_RETRY_S, deadline_s))
    brief = wrap(plain, hurried, counters=counters)
    return OpenSource(Repository(patient, _keyring(source)), brief)


def _keyring(source: Source) -> Keyring:
    if not source.keys:
        return plain_keyring()
    keyring = parse_keyring(source.keys, source="the node's keyring")
    return keyring.with_plain() if source.plain else keyring

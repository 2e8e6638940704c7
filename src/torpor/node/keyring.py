"""Which keys a node uses for a store: a decision that is never made silently."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torpor.errors import Conflict, InvalidInput, NotFound
from torpor.snapshot.repository.domain import PlainDomain
from torpor.snapshot.repository.keys import (
    Keyring,
    create_keyring,
    load_keyring,
    parse_keyring,
)

if TYPE_CHECKING:
    from torpor.config import Settings
    from torpor.node.parts import Reporter


def key_path(settings: Settings) -> Path:
    """Where this node's keyring is, or would be."""
    return Path(settings.key_file) if settings.key_file else settings.home / "key"


def find_keyring(settings: Settings) -> Keyring | None:
    """The keyring that is configured: the setting `key`, else the key file; None without either.

    Raises InvalidInput for one that is malformed or that others can read.
    """
    if settings.key:
        return parse_keyring(settings.key, source="the setting key")
    try:
        return load_keyring(key_path(settings))
    except NotFound:
        if settings.key_file:
            raise
        return None


def open_keyring(settings: Settings, reporter: Reporter) -> Keyring:
    """The keyring for the store of these settings.

    `plain` writes in the clear, and still reads with the keys there are. Without any key, one is
    made for the store below home, and said; another store asks for a decision. Raises InvalidInput.
    """
    found = find_keyring(settings)
    if settings.plain:
        known = () if found is None else (found.current, *found.others)
        return Keyring(PlainDomain(), known)
    if found is not None:
        return found
    if settings.store:
        raise InvalidInput(
            f"there is no key for {settings.store}",
            reason="snapshots hold a function's memory: whoever reads the store could read it",
            hint="`torpor key init` makes a key (copy it to the nodes that share the store),"
            " or choose --plain",
        )
    path = key_path(settings)
    try:
        keyring = create_keyring(path)
    except Conflict:  # another command made it meanwhile
        return load_keyring(path)
    reporter.say(f"made a key for this node's own store in {path}")
    return keyring

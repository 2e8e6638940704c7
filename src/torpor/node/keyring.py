"""Which keys a node uses for a store: a decision that is never made silently."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torpor.errors import Conflict, InvalidInput, NotFound
from torpor.snapshot.repository.domain import PlainDomain
from torpor.snapshot.repository.keys import (
    KeyLine,
    Keyring,
    create_keyring,
    load_keyring,
    parse_keyring,
    parse_lines,
    plain_keyring,
    read_key_file,
    rotate_keyring,
)

if TYPE_CHECKING:
    from torpor.config import Settings
    from torpor.node.parts import Reporter

_SETTING = "the setting key (TORPOR_KEY)"


@dataclass(frozen=True)
class KnownKeys:
    """The keys that this node uses, the current one first, and where they come from.

    `file_unused` is the key file that is there but not used, because the setting key wins.
    """

    keys: list[KeyLine]
    source: str
    file_unused: Path | None


def key_path(settings: Settings) -> Path:
    """Where this node's keyring is, or would be."""
    return Path(settings.key_file) if settings.key_file else settings.home / "key"


def known_keys(settings: Settings) -> KnownKeys:
    """What `find_keyring` would take, with the secret lines. Raises NotFound, InvalidInput."""
    path = key_path(settings)
    if settings.key:
        unused = path if path.exists() else None
        return KnownKeys(parse_lines(settings.key, source=_SETTING), _SETTING, unused)
    return KnownKeys(parse_lines(read_key_file(path), source=str(path)), str(path), None)


def init_key(settings: Settings) -> KnownKeys:
    """Make the key file with one fresh key. Raises Conflict when this node has a key already."""
    _refuse_setting(settings, "init")
    path = key_path(settings)
    create_keyring(path)
    return known_keys(settings)


def rotate_key(settings: Settings) -> KnownKeys:
    """Put a fresh key before those of the key file. Raises Conflict, NotFound, InvalidInput."""
    _refuse_setting(settings, "rotate")
    rotate_keyring(key_path(settings))
    return known_keys(settings)


def find_keyring(settings: Settings) -> Keyring | None:
    """The keyring that is configured: the setting `key`, else the key file; None without either.

    Raises InvalidInput for one that is malformed or that others can read.
    """
    if settings.key:
        return parse_keyring(settings.key, source=_SETTING)
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


def keyring_text(settings: Settings, reporter: Reporter) -> str:
    """The lines of the keyring that `open_keyring` gives, for another process; "" without keys.

    Raises InvalidInput.
    """
    open_keyring(settings, reporter)
    if settings.key:
        return settings.key
    try:
        return read_key_file(key_path(settings))
    except NotFound:
        return ""


def looking_keyring(settings: Settings) -> Keyring:
    """The keys there are, to look at a store or to clean it up: what is plain is seen too.

    Without a key it is one for what is plain; none is made. Raises InvalidInput.
    """
    found = find_keyring(settings)
    return plain_keyring() if found is None else found.with_plain()


def importing_keyring(settings: Settings) -> Keyring:
    """The keys for an archive. What is not sealed is taken by who has no key, or decided so.

    Raises InvalidInput.
    """
    found = find_keyring(settings)
    if found is None:
        return plain_keyring()
    return found.with_plain() if settings.plain else found


def _refuse_setting(settings: Settings, verb: str) -> None:
    if settings.key:
        raise Conflict(
            f"the key comes from {_SETTING}",
            reason="it is used instead of any key file",
            hint=f"unset it before `torpor key {verb}`, or change it where it is set",
        )

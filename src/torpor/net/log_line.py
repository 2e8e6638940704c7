"""The ancestor's log lines about a network allocation: written and read.

vHive logs through logrus's text formatter: `time="…" level=debug msg="…" Key=value …`, values with
other characters than letters, digits and `-._/@^+:` in quotes, keys as they are, `IP gateway` too
(networking/networkManager.go, networking/networking.go; logrus, text_formatter.go).
"""

from __future__ import annotations

import datetime
import json
import re
from typing import TYPE_CHECKING, Final

from torpor.errors import InvalidInput

if TYPE_CHECKING:
    from torpor.net.addresses import SlotAddresses

FIELDS: Final = (
    "CloneIP",
    "ContainerCIDR",
    "ContainerIP",
    "GatewayIP",
    "HostDevName",
    "NamespaceName",
    "NamespacePath",
    "Veth0CIDR",
    "Veth0Name",
    "Veth1CIDR",
    "Veth1Name",
    "funcID",
)

_ALLOCATED: Final = "Allocated a new network config"
_TAP_CREATED: Final = "Creating tap for virtual network"
_EVERY_LINE: Final = ("time", "level", "msg")
_PAIR = re.compile(r'([^\s="](?:[^="]*[^\s="])?)=("(?:[^"\\]|\\.)*"|[^\s"]*)(?:\s+|$)')
_HINT: Final = f"it needs {', '.join(f'{field}=…' for field in FIELDS)}"
_PLAIN = re.compile(r"[A-Za-z0-9._/@^+:-]+")


def allocation_fields(slot: SlotAddresses, func_id: str) -> dict[str, str]:
    """The values of FIELDS for a slot."""
    return {
        "CloneIP": str(slot.clone_ip),
        "ContainerCIDR": str(slot.guest),
        "ContainerIP": str(slot.guest.ip),
        "GatewayIP": str(slot.gateway.ip),
        "HostDevName": slot.tap,
        "NamespaceName": slot.namespace,
        "NamespacePath": str(slot.namespace_path),
        "Veth0CIDR": str(slot.veth0_address),
        "Veth0Name": slot.veth0,
        "Veth1CIDR": str(slot.veth1_address),
        "Veth1Name": slot.veth1,
        "funcID": func_id,
    }


def allocation_line(slot: SlotAddresses, func_id: str) -> str:
    """The line that a node logs when an instance gets its slot."""
    return _line(_ALLOCATED, allocation_fields(slot, func_id))


def tap_line(slot: SlotAddresses) -> str:
    """The line that a node logs about a slot's tap device."""
    fields = {"IP gateway": str(slot.gateway), "namespace": slot.namespace, "tap": slot.tap}
    return _line(_TAP_CREATED, fields)


def parse_log_line(text: str) -> dict[str, str]:
    """The FIELDS of an allocation line, in any order, with or without time, level and msg.

    Several lines may be given, as they stand in a log: those about taps are passed over. What
    comes before `time=` is a log collector's. Raises InvalidInput for what is not such a line:
    malformed, a field missing, empty, unknown or there twice.
    """
    lines = [_pairs(line) for line in text.splitlines() if line.strip()]
    found = [line for line in lines if line.get("msg") != _TAP_CREATED]
    if len(found) != 1:
        raise InvalidInput(
            f"there are {len(found)} lines about an allocation, not one",
            hint=f'give the line with msg="{_ALLOCATED}"',
        )
    if found[0].get("msg", _ALLOCATED) != _ALLOCATED:
        raise InvalidInput(
            f"not a line about an allocation: {found[0]['msg'][:80]!r}",
            hint=f'give the line with msg="{_ALLOCATED}"',
        )
    return _checked(found[0])


def _checked(pairs: dict[str, str]) -> dict[str, str]:
    for name in pairs:
        if name not in FIELDS and name not in _EVERY_LINE:
            raise InvalidInput(f"the log line has an unknown field {name[:80]!r}", hint=_HINT)
    for name in FIELDS:
        if not pairs.get(name):
            raise InvalidInput(f"the log line has no {name}", hint=_HINT)
    return {name: pairs[name] for name in FIELDS}


def _pairs(line: str) -> dict[str, str]:
    line = line[max(line.find("time="), 0) :].strip()
    pairs: dict[str, str] = {}
    position = 0
    while position < len(line):
        found = _PAIR.match(line, position)
        if found is None:
            raise InvalidInput(
                f"the log line is malformed at {line[position : position + 40]!r}", hint=_HINT
            )
        if found[1] in pairs:
            raise InvalidInput(f"the log line has {found[1]} twice", hint=_HINT)
        pairs[found[1]] = _unquoted(found[2])
        position = found.end()
    return pairs


def _line(message: str, fields: dict[str, str]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    pairs = {"time": now, "level": "debug", "msg": message, **fields}
    return " ".join(f"{key}={_quoted(value)}" for key, value in pairs.items())


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _unquoted(text: str) -> str:
    """Go's %q for a value is JSON's string but for a few escapes that no name or address has."""
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError as error:
        raise InvalidInput(
            f"the log line has a malformed value {text[:40]}", reason=str(error)
        ) from None

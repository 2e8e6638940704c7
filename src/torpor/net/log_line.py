"""The ancestor's log lines about a network allocation: written and read.

vHive logs through logrus's text formatter: `time="…" level=debug msg="…" Key=value …`, values with
other characters than letters, digits and `-._/@^+:` in quotes (networking/networkManager.go,
networking/networking.go; logrus, text_formatter.go).
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

_PAIR = re.compile(r'("[^"]*"|[^\s=]+)=("(?:[^"\\]|\\.)*"|\S*)')
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
    return _line("Allocated a new network config", allocation_fields(slot, func_id))


def tap_line(slot: SlotAddresses) -> str:
    """The line that a node logs about a slot's tap device."""
    fields = {"IP gateway": str(slot.gateway), "namespace": slot.namespace, "tap": slot.tap}
    return _line("Creating tap for virtual network", fields)


def parse_log_line(text: str) -> dict[str, str]:
    """The FIELDS of an allocation line, in any order, among any others, quoted or not.

    Raises InvalidInput naming the first field that is missing, empty or there twice.
    """
    found: dict[str, str] = {}
    for key, value in _PAIR.findall(text):
        name = _unquoted(key)
        if name in FIELDS:
            if name in found:
                raise InvalidInput(f"the log line has {name} twice")
            found[name] = _unquoted(value)
    for name in FIELDS:
        if not found.get(name):
            raise InvalidInput(
                f"the log line has no {name}",
                hint=f"it needs {', '.join(f'{field}=…' for field in FIELDS)}",
            )
    return found


def _line(message: str, fields: dict[str, str]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    pairs = {"time": now, "level": "debug", "msg": message, **fields}
    return " ".join(f"{_quoted(key)}={_quoted(value)}" for key, value in pairs.items())


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text.strip('"')

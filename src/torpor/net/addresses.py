"""One integer -> every name and address of a network slot.

The scheme is vHive's (networking/networkconfig.go): guest and gateway are the same in every slot,
the veth pair's /30 and the clone IP follow from the number.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torpor.errors import InvalidInput

LAST_SLOT: Final = 254 * 64 - 1
"""The veth /30s of 172.17.0.0/16 and the clone IPs of 172.18.0.0/16 suffice for more."""

TAP: Final = "tap0"
GUEST_MAC: Final = "06:00:ac:10:00:02"
TAP_MAC: Final = "06:00:ac:10:00:01"
GUEST: Final = ipaddress.IPv4Interface("172.16.0.2/24")
GATEWAY: Final = ipaddress.IPv4Interface("172.16.0.1/24")
NETNS_DIR: Final = Path("/run/netns")

BENCH_NAMESPACE_PREFIX: Final = "torpor-bench-"
"""Namespaces that benchmarks make; slots have others."""

_NAMESPACE_PREFIX: Final = "torpor-"
_LINK_PREFIX: Final = "tveth"


@dataclass(frozen=True)
class SlotAddresses:
    """All names and addresses of a slot. veth0 is inside the namespace, veth1 on the host."""

    number: int
    namespace: str
    veth0: str
    veth1: str
    veth0_address: ipaddress.IPv4Interface
    veth1_address: ipaddress.IPv4Interface
    clone_ip: ipaddress.IPv4Address
    tap: str = TAP
    tap_mac: str = TAP_MAC
    guest_mac: str = GUEST_MAC
    guest: ipaddress.IPv4Interface = GUEST
    gateway: ipaddress.IPv4Interface = GATEWAY

    @property
    def namespace_path(self) -> Path:
        """Where the namespace is mounted."""
        return NETNS_DIR / self.namespace


def addresses_of(number: int) -> SlotAddresses:
    """The addresses of slot `number`, 0 to LAST_SLOT. Raises InvalidInput for another."""
    if not 0 <= number <= LAST_SLOT:
        raise InvalidInput(f"there is no network slot {number}", hint=f"slots go up to {LAST_SLOT}")
    subnet = f"172.17.{4 * number // 256}"
    host = 4 * number % 256
    return SlotAddresses(
        number=number,
        namespace=f"{_NAMESPACE_PREFIX}{number}",
        veth0=f"{_LINK_PREFIX}{number}-0",
        veth1=f"{_LINK_PREFIX}{number}-1",
        veth0_address=ipaddress.IPv4Interface(f"{subnet}.{host + 2}/30"),
        veth1_address=ipaddress.IPv4Interface(f"{subnet}.{host + 1}/30"),
        clone_ip=ipaddress.IPv4Address(f"172.18.{number // 254}.{1 + number % 254}"),
    )


def slot_of_namespace(name: str) -> int | None:
    """The slot that a namespace of this name belongs to, None if it is not torpor's."""
    return _slot(name.removeprefix(_NAMESPACE_PREFIX), name, _NAMESPACE_PREFIX)


def slot_of_link(name: str) -> int | None:
    """The slot that a veth of this name belongs to, None if it is not torpor's."""
    number, _, end = name.removeprefix(_LINK_PREFIX).partition("-")
    return _slot(number, name, _LINK_PREFIX) if end in ("0", "1") else None


def is_own_namespace(name: str) -> bool:
    """Whether a network namespace of this name is torpor's."""
    return slot_of_namespace(name) is not None or name.startswith(BENCH_NAMESPACE_PREFIX)


def is_own_link(name: str) -> bool:
    """Whether a network link of this name is torpor's."""
    return slot_of_link(name) is not None


def _slot(number: str, name: str, prefix: str) -> int | None:
    if not name.startswith(prefix) or not number.isdecimal() or int(number) > LAST_SLOT:
        return None
    return int(number)

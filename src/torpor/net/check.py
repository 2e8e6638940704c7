"""Each field of an allocation against the live host."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torpor.errors import ProgramFailed
from torpor.host.netns import in_namespace, is_namespace
from torpor.host.process import run
from torpor.net.addresses import NETNS_DIR, slot_of_namespace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torpor.net.registry import SlotRegistry

ABSENT: Final = "absent"


@dataclass(frozen=True)
class FieldCheck:
    """One field: what the allocation says and what the host has."""

    name: str
    expected: str
    actual: str

    @property
    def ok(self) -> bool:
        """Whether they are the same."""
        return self.expected == self.actual


@dataclass(frozen=True)
class _Side:
    """Links with addresses, routes, neighbours and rules of one network namespace."""

    links: list[dict[str, Any]]
    routes: list[dict[str, Any]]
    neighbours: list[dict[str, Any]]
    rules: str

    def link(self, name: str) -> dict[str, Any] | None:
        """The link of that name."""
        return next((link for link in self.links if link["ifname"] == name), None)

    def cidr(self, name: str) -> str:
        """The first IPv4 address of a link with its prefix length."""
        link = self.link(name) or {}
        for address in link.get("addr_info", []):
            if address["family"] == "inet":
                return f"{address['local']}/{address['prefixlen']}"
        return ABSENT


def check_allocation(fields: Mapping[str, str], registry: SlotRegistry) -> list[FieldCheck]:
    """Compare every field of an allocation (`log_line.FIELDS`) with this host.

    Blocking. A value that the host does not have is ABSENT or what is there instead.
    """
    host = _read_side()
    path = NETNS_DIR / fields["NamespaceName"]
    inside = in_namespace(path, _read_side) if is_namespace(path) else None
    found = {
        **_names(fields, path),
        **_host_values(fields, host),
        **(_inside_values(fields, inside) if inside else {}),
        "funcID": _owner(fields["NamespaceName"], registry),
    }
    if "CloneIP" in found and found["CloneIP"] == fields["CloneIP"]:
        found["CloneIP"] = _routed(fields, host)
    return [FieldCheck(name, value, found.get(name, ABSENT)) for name, value in fields.items()]


def _names(fields: Mapping[str, str], path: Path) -> dict[str, str]:
    exists = is_namespace(path)
    given = Path(fields["NamespacePath"])
    same = False
    with contextlib.suppress(OSError):  # no such path, or one that cannot be
        same = exists and given.samefile(path)
    return {
        "NamespaceName": path.name if exists else ABSENT,
        "NamespacePath": fields["NamespacePath"] if same else str(path) if exists else ABSENT,
    }


def _host_values(fields: Mapping[str, str], host: _Side) -> dict[str, str]:
    name = fields["Veth1Name"]
    return {
        "Veth1Name": name if host.link(name) else ABSENT,
        "Veth1CIDR": host.cidr(name),
    }


def _inside_values(fields: Mapping[str, str], inside: _Side) -> dict[str, str]:
    tap, veth0 = fields["HostDevName"], fields["Veth0Name"]
    tap_cidr = inside.cidr(tap)
    guest = next((entry["dst"] for entry in inside.neighbours if entry.get("dev") == tap), ABSENT)
    prefix = tap_cidr.partition("/")[2]
    return {
        "HostDevName": tap if inside.link(tap) else ABSENT,
        "GatewayIP": tap_cidr.partition("/")[0],
        "ContainerIP": guest,
        "ContainerCIDR": f"{guest}/{prefix}" if guest != ABSENT and prefix else ABSENT,
        "Veth0Name": veth0 if inside.link(veth0) else ABSENT,
        "Veth0CIDR": inside.cidr(veth0),
        "CloneIP": _translated(fields, inside.rules),
    }


def _translated(fields: Mapping[str, str], rules: str) -> str:
    """The clone IP if the namespace translates it to the guest and back."""
    clone, guest = fields["CloneIP"], fields["ContainerIP"]
    lines = [f"{line.strip()} " for line in rules.splitlines()]
    wanted = (f"ip daddr {clone} dnat to {guest} ", f"ip saddr {guest} snat to {clone} ")
    both = all(any(words in line for line in lines) for words in wanted)
    return clone if both else f"{ABSENT}: no translation to {guest}"


def _routed(fields: Mapping[str, str], host: _Side) -> str:
    """The clone IP if the host's route to it goes through this slot's veth pair."""
    for route in host.routes:
        if route.get("dst") == fields["CloneIP"] and route.get("dev") == fields["Veth1Name"]:
            return fields["CloneIP"]
    return f"{ABSENT}: no route through {fields['Veth1Name']}"


def _owner(namespace: str, registry: SlotRegistry) -> str:
    number = slot_of_namespace(namespace)
    for record in registry.list():
        if record.slot == number:
            return record.instance or ABSENT
    return ABSENT


def _read_side() -> _Side:
    return _Side(
        links=_ip_json("addr", "show"),
        routes=_ip_json("route", "show"),
        neighbours=_ip_json("neigh", "show"),
        rules=_rules(),
    )


def _ip_json(*arguments: str) -> list[dict[str, Any]]:
    return list(json.loads(run(["ip", "-json", "-4", *arguments], timeout_s=20) or "[]"))


def _rules() -> str:
    with contextlib.suppress(ProgramFailed):  # no such table
        return run(["nft", "list", "table", "ip", "torpor"], timeout_s=20)
    return ""

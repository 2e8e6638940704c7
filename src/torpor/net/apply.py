"""Make a slot real and unmake it: namespace, veth pair, tap, translation, route.

`ip -batch` and `nft -f`, one call each side: a whole slot takes about 10 ms. Inside the namespace
the guest may only answer: what it begins itself is dropped, and its agent's port is not reachable
through the clone IP. What has another source than the guest's goes no step further: the namespace
itself would send its owner an error that quotes it. IPv6 is off there.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.errors import HostUnfit, ProgramFailed
from torpor.host.cancel import uncancelled
from torpor.host.netns import create_namespace, in_namespace, remove_namespace
from torpor.host.process import run

if TYPE_CHECKING:
    from torpor.net.addresses import SlotAddresses

AGENT_PORT: Final = 1024
TABLE: Final = "torpor"
_HINT: Final = "run `torpor doctor`; network slots need root, tun and nftables"


def apply_slot(slot: SlotAddresses) -> None:
    """Make all parts of a slot; remnants of the same number are removed first.

    Blocking. Raises HostUnfit with the kernel's words; nothing is left on failure.
    """
    remove_slot(slot)
    try:
        create_namespace(slot.namespace_path)
        _ip(host_commands(slot))
        in_namespace(slot.namespace_path, lambda: _apply_inside(slot))
    except (OSError, ProgramFailed) as error:
        remove_slot(slot)
        raise HostUnfit(
            f"network slot {slot.number} could not be made", reason=str(error), hint=_HINT
        ) from None
    except BaseException:
        remove_slot(slot)
        raise


def remove_slot(slot: SlotAddresses) -> None:
    """Remove whatever of a slot is there. Idempotent; a cancellation does not stop it half-way.

    The veth pair goes with its host end, route and addresses with it, the rest with the namespace.
    """
    with uncancelled():
        if Path("/sys/class/net", slot.veth1).exists():
            with contextlib.suppress(ProgramFailed):  # it goes by itself when the namespace ends
                run(["ip", "link", "delete", slot.veth1])
        remove_namespace(slot.namespace_path)


def host_commands(slot: SlotAddresses) -> list[str]:
    """`ip -batch` lines for the host's side."""
    return [
        f"link add {slot.veth1} type veth peer name {slot.veth0} netns {slot.namespace}",
        f"addr add {slot.veth1_address} dev {slot.veth1}",
        f"link set {slot.veth1} up",
        f"route add {slot.clone_ip}/32 via {slot.veth0_address.ip} dev {slot.veth1}",
    ]


def namespace_commands(slot: SlotAddresses) -> list[str]:
    """`ip -batch` lines for the inside. The neighbour entry spares a woken guest the ARP wait."""
    return [
        "link set lo up",
        f"tuntap add dev {slot.tap} mode tap",
        f"link set {slot.tap} address {slot.tap_mac}",
        f"addr add {slot.gateway} dev {slot.tap}",
        f"link set {slot.tap} up",
        f"addr add {slot.veth0_address} dev {slot.veth0}",
        f"link set {slot.veth0} up",
        f"neigh add {slot.guest.ip} lladdr {slot.guest_mac} dev {slot.tap} nud permanent",
    ]


def rules(slot: SlotAddresses) -> str:
    """The nftables ruleset of the namespace."""
    return f"""
table ip {TABLE} {{
    chain genuine {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{slot.tap}" ip saddr != {slot.guest.ip} drop
    }}
    chain to_guest {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "{slot.veth0}" ip daddr {slot.clone_ip} dnat to {slot.guest.ip}
    }}
    chain from_guest {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{slot.veth0}" ip saddr {slot.guest.ip} snat to {slot.clone_ip}
    }}
    chain forwarded {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "{slot.veth0}" oifname "{slot.tap}" tcp dport {AGENT_PORT} drop
        iifname "{slot.veth0}" oifname "{slot.tap}" ip daddr {slot.guest.ip} ct state new accept
    }}
    chain arriving {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
    }}
}}
"""


def _apply_inside(slot: SlotAddresses) -> None:
    for name, value in (
        ("ipv6/conf/all/disable_ipv6", "1"),
        ("ipv6/conf/default/disable_ipv6", "1"),
        ("ipv4/ip_forward", "1"),
    ):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            Path("/proc/sys/net", name).write_text(value)
    _ip(namespace_commands(slot))
    run(["nft", "-f", "-"], input_bytes=rules(slot).encode(), timeout_s=20)


def _ip(commands: list[str]) -> None:
    run(["ip", "-batch", "-"], input_bytes="\n".join([*commands, ""]).encode(), timeout_s=20)

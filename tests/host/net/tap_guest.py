"""A guest's side of a tap device, frame by frame, without a VM."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import select
import struct
import time
from typing import TYPE_CHECKING

from torpor.host.netns import in_namespace
from torpor.host.process import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.net.addresses import SlotAddresses

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TAP_NO_PI = 0x0002 | 0x1000
_UDP = 17


class TapGuest:
    """Sends and receives UDP as the guest of a slot would."""

    def __init__(self, slot: SlotAddresses, descriptor: int) -> None:
        self._slot = slot
        self._fd = descriptor

    def send_udp(
        self, target: str, *, source: str = "", source_port: int = 8080, port: int = 9999
    ) -> None:
        """One datagram to `target` through the gateway, from the guest's address or another."""
        payload = b"from the guest"
        udp = struct.pack("!HHHH", source_port, port, 8 + len(payload), 0) + payload
        header = struct.pack(
            "!BBHHHBBH4s4s",
            *(0x45, 0, 20 + len(udp), 1, 0, 64, _UDP, 0),
            ipaddress.IPv4Address(source or self._slot.guest.ip).packed,
            ipaddress.IPv4Address(target).packed,
        )
        checksum = _checksum(header)
        header = header[:10] + struct.pack("!H", checksum) + header[12:]
        frame = _mac(self._slot.tap_mac) + _mac(self._slot.guest_mac) + b"\x08\x00"
        os.write(self._fd, frame + header + udp)

    def receive(self, protocol: int, *, timeout_s: float) -> tuple[str, int, int] | None:
        """(source, source port, port) of the next packet of that IP protocol; None if none."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if not select.select([self._fd], [], [], left_s)[0]:
                break
            frame = os.read(self._fd, 2048)
            if frame[12:14] == b"\x08\x00" and frame[23] == protocol:
                source = str(ipaddress.IPv4Address(frame[26:30]))
                source_port, port = struct.unpack("!HH", frame[34:38])
                return source, source_port, port
        return None


@contextlib.contextmanager
def tap_guest(slot: SlotAddresses) -> Iterator[TapGuest]:
    """Hold the slot's tap device as a VMM does."""

    def attach() -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        request = struct.pack("16sH22x", slot.tap.encode(), _IFF_TAP_NO_PI)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
        return descriptor

    descriptor = in_namespace(slot.namespace_path, attach)
    try:
        in_namespace(slot.namespace_path, lambda: _wait_for_carrier(slot.tap))
        yield TapGuest(slot, descriptor)
    finally:
        os.close(descriptor)


def _wait_for_carrier(link: str) -> None:
    """The kernel notices the holder of a tap in a work queue and drops packets until then."""
    deadline = time.monotonic() + 30
    while json.loads(run(["ip", "-json", "link", "show", link]))[0]["operstate"] != "UP":
        assert time.monotonic() < deadline, f"{link} has no carrier"


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _checksum(header: bytes) -> int:
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

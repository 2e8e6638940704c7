"""Who answers? Asked by the malicious function in its guest, and by the tests on the host."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import selectors
import socket
import struct
import time

OWN, BORROWED = "172.16.0.2", "172.16.0.3"
GATEWAY_MAC = bytes.fromhex("0600ac100001")
BROADCAST = b"\xff" * 6
_ECHO = {4: (8, 0), 6: (128, 129)}  # type of request and reply: RFC 792, RFC 4443
_SOL_PACKET, _PACKET_QDISC_BYPASS = 263, 20  # linux/if_packet.h
_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD


def reach(targets: list[list[str]], limit_s: float = 1.5) -> list[str]:
    """Which of the targets answer, if only by a refusal.

    A target is `tcp`, `udp` or `ping`, an address and a port; it comes back as one text.
    """
    reached = []
    deadline = time.monotonic() + limit_s
    with selectors.DefaultSelector() as waiting, contextlib.ExitStack() as stack:
        for target in targets:
            probe = _Probe(*target)
            stack.enter_context(probe.socket)
            answered = probe.begin()
            if answered is None:
                waiting.register(probe.socket, probe.waits_for, probe)
            elif answered:
                reached.append(probe.name)
        while waiting.get_map() and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left_s):
                answered = key.data.look()
                if answered is not None:
                    waiting.unregister(key.fileobj)
                if answered:
                    reached.append(key.data.name)
    return reached


class _Probe:
    """One question to one target. Its answers: True, False (there is none), None (not yet)."""

    def __init__(self, kind: str, address: str, port: str) -> None:
        self.kind, self.name = kind, f"{kind} {address} {port}"
        self.version = 6 if ":" in address else 4
        self.waits_for = selectors.EVENT_WRITE if kind == "tcp" else selectors.EVENT_READ
        self._where = socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)[0][4]
        family = socket.AF_INET6 if self.version == 6 else socket.AF_INET
        protocol = socket.IPPROTO_ICMPV6 if self.version == 6 else socket.IPPROTO_ICMP
        made = {
            "tcp": (socket.SOCK_STREAM, 0),
            "udp": (socket.SOCK_DGRAM, 0),
            "ping": (socket.SOCK_RAW, protocol),
        }
        self.socket = socket.socket(family, *made[kind])
        self.socket.setblocking(False)

    def begin(self) -> bool | None:
        """Ask."""
        try:
            self.socket.connect(self._where)
            if self.kind == "udp":
                self.socket.send(b"who is there?")
            elif self.kind == "ping":
                self.socket.send(_echo(_ECHO[self.version][0]))
        except BlockingIOError:
            return None
        except OSError as error:
            return _is_answer(error.errno)
        return True if self.kind == "tcp" else None

    def look(self) -> bool | None:
        """Something happened."""
        if self.kind == "tcp":
            return _is_answer(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        try:
            packet = self.socket.recv(4096)
        except OSError as error:
            return _is_answer(error.errno)
        if self.kind == "udp":
            return True
        start = 4 * (packet[0] & 15) if self.version == 4 else 0
        return True if packet[start] == _ECHO[self.version][1] else None


def _is_answer(number: int | None) -> bool:
    return number in (0, errno.ECONNREFUSED)


def ask_arp(addresses: list[str], limit_s: float = 0.5) -> list[str]:
    """Which of the addresses somebody on the guest's link has (RFC 826)."""
    found = set()
    with _link(_ARP) as link:
        mac = link.getsockname()[4]
        for address in addresses:
            head = struct.pack("!HHBBH", 1, _IPV4, 6, 4, 1)
            asked = head + mac + _packed(BORROWED) + bytes(6) + _packed(address)
            link.send(_frame(BROADCAST, mac, _ARP, asked))
        deadline = time.monotonic() + limit_s
        while (left_s := deadline - time.monotonic()) > 0:
            link.settimeout(left_s)
            try:
                frame = link.recv(2048)
            except TimeoutError:
                break
            if frame[20:22] == b"\x00\x02":
                found.add(socket.inet_ntoa(frame[28:32]))
    return [address for address in addresses if address in found]


def send_strays(sources: list[str], targets: list[str], port: int) -> int:
    """Send frames from each source, false ones too, to each target: UDP, TCP and ICMP.

    At last IPv6 and one of a protocol that nobody has. How many.
    """
    sent = 0
    with _link(0) as link:
        mac = link.getsockname()[4]
        for source in sources:
            for target in targets:
                for protocol, payload in _payloads(source, target, port):
                    packet = _ipv4(source, target, protocol, payload)
                    sent += bool(link.send(_frame(GATEWAY_MAC, mac, _IPV4, packet)))
        everyone = bytes.fromhex("ff020000000000000000000000000001")
        echo = struct.pack("!BBHHH", 128, 0, 0, 7, 1)
        head = struct.pack("!IHBB", 6 << 28, len(echo), 58, 1)
        sent += bool(link.send(_frame(BROADCAST, mac, _IPV6, head + bytes(16) + everyone + echo)))
        sent += bool(
            link.send(_frame(BROADCAST, mac, 0x88B5, b"an experiment (IEEE 802)".ljust(46)))
        )
    return sent


def send_first_segments(address: str, count: int) -> int:
    """Send the first segments of so many TCP connections, each from another port; how many.

    That is five times as fast as to make sockets.
    """
    with _link(0) as link:
        link.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
        mac = link.getsockname()[4]
        head = _frame(GATEWAY_MAC, mac, _IPV4, _ipv4(OWN, address, 6, bytes(20))[:20])
        pseudo = _packed(OWN) + _packed(address) + struct.pack("!HH", 6, 20)
        rest = struct.pack("!IIHH", 1, 0, 0x5002, 1000)
        partial = _checksum(pseudo + rest) ^ 0xFFFF
        pack, send = struct.Struct("!HH12sHH").pack, link.send
        for number in range(count):
            source, target = 1024 + number % 64000, 1 + number // 8
            total = partial + source + target
            total = (total & 0xFFFF) + (total >> 16)
            total = (total & 0xFFFF) + (total >> 16)
            send(head + pack(source, target, rest, total ^ 0xFFFF, 0))
    return count


def _payloads(source: str, target: str, port: int) -> list[tuple[int, bytes]]:
    syn = struct.pack("!HHIIHHHH", 40000, port, 1, 0, 0x5002, 1000, 0, 0)
    pseudo = _packed(source) + _packed(target) + struct.pack("!HH", 6, len(syn))
    syn = syn[:16] + struct.pack("!H", _checksum(pseudo + syn)) + syn[18:]
    return [
        (17, struct.pack("!HHHH", 40000, port, 12, 0) + b"ping"),
        (6, syn),
        (1, _echo(8)),
    ]


def _link(protocol: int) -> socket.socket:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
    link.bind(("eth0", protocol))
    return link


def _frame(target: bytes, mac: bytes, protocol: int, packet: bytes) -> bytes:
    return target + mac + struct.pack("!H", protocol) + packet


def _ipv4(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    length = 20 + len(payload)
    head = struct.pack("!BBHHHBBH", 0x45, 0, length, 1, 0, 64, protocol, 0)
    head += _packed(source) + _packed(target)
    return head[:10] + struct.pack("!H", _checksum(head)) + head[12:] + payload


def _echo(kind: int) -> bytes:
    """An echo request; the kernel fills the checksum of ICMPv6 in."""
    body = struct.pack("!BBHHH", kind, 0, 0, os.getpid() & 0xFFFF, 1)
    return body[:2] + struct.pack("!H", _checksum(body)) + body[4:]


def _packed(address: str) -> bytes:
    return ipaddress.IPv4Address(address).packed


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

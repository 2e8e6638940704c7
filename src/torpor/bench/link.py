"""A network link of known speed: two namespaces, a veth pair between them, tbf at both ends."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from torpor.errors import HostUnfit, ProgramFailed
from torpor.host.netns import create_namespace, in_namespace, remove_namespace
from torpor.host.process import run
from torpor.net.addresses import NETNS_DIR
from torpor.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")

GIGABIT: Final = 1_000_000_000
"""Bits per second."""

_BURST_BYTES: Final = 256 * KiB
_LATENCY_MS: Final = 50
_NODE, _STORE = "192.0.2.1", "192.0.2.2"  # TEST-NET-1 (RFC 5737): nobody's outside
_DEVICE: Final = "tveth-bench"
_PIECE_BYTES: Final = MiB


@dataclass(frozen=True)
class Link:
    """A shaped link. In `store_side` the store listens on `store_address`.

    From `node_side` it is reached over the link, from `store_side` itself without it.
    """

    node_side: Path
    store_side: Path
    rate_bits_per_s: int
    store_address: str = _STORE

    def to_dict(self) -> dict[str, Any]:
        """The link as a report's parameter."""
        return {
            "rate_bits_per_s": self.rate_bits_per_s,
            "burst_bytes": _BURST_BYTES,
            "shaper": "tbf, both ways",
        }

    def measure(self, size_bytes: int) -> float:
        """Bytes per second of one TCP connection from the node's side to the store's."""
        with inside(self.store_side, lambda: socket.create_server((_STORE, 0))) as server:
            port = server.getsockname()[1]
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                received = pool.submit(_drain, server)
                began = time.perf_counter()
                connection = inside(
                    self.node_side, lambda: socket.create_connection((_STORE, port))
                )
                with connection:
                    for _ in range(0, size_bytes, _PIECE_BYTES):
                        connection.sendall(bytes(_PIECE_BYTES))
                return received.result() / (time.perf_counter() - began)


@contextlib.contextmanager
def shaped_link(name_prefix: str, *, rate_bits_per_s: int = GIGABIT) -> Iterator[Link]:
    """A link between two fresh namespaces, `<name_prefix>node` and `<name_prefix>store`.

    Both are gone after the body. Raises HostUnfit with the kernel's words; needs root and sch_tbf.
    """
    link = Link(
        NETNS_DIR / f"{name_prefix}node", NETNS_DIR / f"{name_prefix}store", rate_bits_per_s
    )
    with contextlib.ExitStack() as stack:
        try:
            for path in (link.node_side, link.store_side):
                create_namespace(path)
                stack.callback(remove_namespace, path)
            inside(link.node_side, lambda: _connect(link))
            inside(link.store_side, lambda: _set_up(_STORE, rate_bits_per_s))
            inside(link.node_side, lambda: _set_up(_NODE, rate_bits_per_s))
        except (OSError, ProgramFailed) as error:
            raise HostUnfit(
                "a shaped network link could not be made",
                reason=str(error),
                hint="it needs root, veth and the kernel's sch_tbf",
            ) from None
        yield link


def inside(namespace: Path, work: Callable[[], T]) -> T:
    """`in_namespace`, the work stopped with its caller (see `host.cancel`)."""
    context = contextvars.copy_context()
    return in_namespace(namespace, lambda: context.run(work))


def _connect(link: Link) -> None:
    peer = ["peer", "name", _DEVICE, "netns", link.store_side.name]
    run(["ip", "link", "add", _DEVICE, "type", "veth", *peer], timeout_s=20)


def _set_up(address: str, rate_bits_per_s: int) -> None:
    lines = f"link set lo up\naddr add {address}/24 dev {_DEVICE}\nlink set {_DEVICE} up\n"
    run(["ip", "-batch", "-"], input_bytes=lines.encode(), timeout_s=20)
    shape = ["rate", f"{rate_bits_per_s}bit", "burst", str(_BURST_BYTES)]
    tbf = ["tbf", *shape, "latency", f"{_LATENCY_MS}ms"]
    run(["tc", "qdisc", "add", "dev", _DEVICE, "root", *tbf], timeout_s=20)


def _drain(server: socket.socket) -> int:
    received = 0
    connection, _ = server.accept()
    with connection:
        while data := connection.recv(_PIECE_BYTES):
            received += len(data)
    return received

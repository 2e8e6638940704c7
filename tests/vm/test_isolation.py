"""A function that is malicious reaches nobody, and takes nothing from the others.

What is to be unreachable is there: the host reaches all of it with the same probe, and so does
the guest when the rules of its slot are taken away.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import select
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from data.intruder.probes import BORROWED, OWN, reach
from fixtures.commands import wait_until
from fixtures.daemons import daemon
from fixtures.strays import OPEN_V6, open_slot, stray_frames
from torpor.config import Settings
from torpor.host.netns import in_namespace
from torpor.host.process import run
from torpor.net.addresses import addresses_of
from torpor.net.registry import SlotRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor import Client
    from torpor.net.addresses import SlotAddresses

pytestmark = pytest.mark.vm

INTRUDER = Path(__file__).parents[1] / "data" / "intruder"
PORT = 8080
LINK_LOCAL = "169.254.77.7"
TAP_V6 = "fe80::400:acff:fe10:1"  # as its MAC gives it
METADATA = "169.254.169.254"
FLOOD = 50_000
SCRATCH_BYTES = 900 * 1024**2
SLOWEST_S = 5.0
PACE_S = 0.1

Target = tuple[str, str, str]


@dataclass
class Scene:
    """A daemon that listens everywhere, the intruder, and two functions beside it."""

    client: Client
    gateway: str
    intruder: SlotAddresses
    neighbour: SlotAddresses
    on_host: list[Target] = field(default_factory=list)
    """What listens or answers at each of the host's own addresses."""

    def attack(self, what: str, **arguments: object) -> Any:  # noqa: ANN401
        """Have the intruder do something; what it found."""
        url = f"http://{self.intruder.clone_ip}:{PORT}/{what}"
        request = urllib.request.Request(url, data=json.dumps(arguments).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=45) as answer:
            return json.loads(answer.read())

    def ask(self, name: str, body: bytes | None = None) -> dict[str, Any]:
        """What a function says to GET, or POST with a body, through the gateway."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.gateway}/f/{name}/", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=SLOWEST_S) as answer:
            return dict(json.loads(answer.read()))

    @property
    def neighbours(self) -> list[Target]:
        """The function beside the intruder."""
        clone = str(self.neighbour.clone_ip)
        return [("tcp", clone, str(PORT)), ("ping", clone, "0")]

    @property
    def beyond(self) -> list[Target]:
        """What is nowhere, or is the namespaces' own."""
        addresses = (
            *("172.16.0.1", METADATA, TAP_V6 + "%eth0", "ff02::2%eth0", "192.0.2.1"),
            *(str(slot.veth0_address.ip) for slot in (self.intruder, self.neighbour)),
        )
        ports = [port for _, _, port in self.on_host if port != "0"]
        return [
            target
            for address in addresses
            for target in (
                *(("tcp", address, port) for port in (*ports, "1024", "80")),
                ("udp", address, "53"),
                ("ping", address, "0"),
            )
        ]

    @contextlib.contextmanager
    def others_answering(self) -> Iterator[None]:
        """Ask both other functions in turns during the body: each answers soon.

        They are the same instances at the end, and lost nothing.
        """
        took: list[float] = []
        over = threading.Event()
        before = {one.id for one in self.client.instances()}
        counted = self.ask("ledger")["count"]

        def ask_on() -> None:
            while not over.wait(PACE_S):
                for name, body in (("hello", None), ("ledger", b'{"amount": 1}')):
                    began = time.monotonic()
                    assert self.ask(name, body)
                    took.append(time.monotonic() - began)

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask_on)
            try:
                wait_until(lambda: len(took) >= 2 or asking.done())
                took.clear()
                yield
                wait_until(lambda: len(took) >= 2 or asking.done())
            finally:
                over.set()
            asking.result()
        assert max(took) < SLOWEST_S
        assert self.ask("ledger")["count"] >= counted + len(took) // 2
        assert {one.id for one in self.client.instances()} == before


@pytest.fixture(scope="module")
def scene(deployed: Settings) -> Iterator[Scene]:
    """Three functions that run, and what of the host a guest might reach."""
    words = ("--listen", "0.0.0.0:0", "--api", "0.0.0.0:0")
    with (
        daemon(deployed.home, *words, api_token=secrets.token_hex(16)) as served,
        served.client() as client,
    ):
        client.deploy(INTRUDER)
        try:
            port = client.status().gateway.rpartition(":")[2]
            slots = [slot_of(client.restore(name).instance) for name in ("intruder", "hello")]
            made = Scene(client, f"http://127.0.0.1:{port}", *slots)
            made.ask("ledger")
            with listening(made, (port, str(served.tcp_address()[1]))):
                yield made
        finally:
            client.stop([one.id for one in client.instances()])
            client.remove_function("intruder")


def slot_of(instance: str) -> SlotAddresses:
    """The network slot of an instance."""
    records = SlotRegistry(Settings().runtime_dir).list()
    return next(addresses_of(one.slot) for one in records if one.instance == instance)


@contextlib.contextmanager
def listening(scene: Scene, ports: tuple[str, ...]) -> Iterator[None]:
    """Give the host a link-local address and a service that answers datagrams."""
    run(["ip", "addr", "add", f"{LINK_LOCAL}/32", "dev", scene.intruder.veth1])
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        services = []
        for address in host_addresses():  # each of its own, that its answers come from there
            service = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            service.bind((address, 0))
            services.append(service)
            scene.on_host += [
                *(("tcp", address, port) for port in ports),
                ("udp", address, str(service.getsockname()[1])),
                ("ping", address, "0"),
            ]

        def answer() -> None:
            while not over.is_set():
                for service in select.select(services, [], [], 0.1)[0]:
                    service.sendto(*service.recvfrom(100))

        answering = stack.enter_context(ThreadPoolExecutor(1)).submit(answer)
        stack.callback(over.set)
        yield
    answering.result()


def host_addresses() -> list[str]:
    """The host's own IPv4 addresses but for loopback."""
    links = json.loads(run(["ip", "-json", "-4", "addr", "show"]))
    found = [one["local"] for link in links for one in link["addr_info"]]
    return [address for address in found if not address.startswith("127.")]


def test_guest_reaches_nobody(scene: Scene) -> None:
    """Neither host, daemon, other guests nor link-local addresses answer a guest, only itself.

    Nothing that it begins leaves its namespace, whatever source it claims.
    """
    assert {LINK_LOCAL, str(scene.intruder.veth1_address.ip)} < set(host_addresses())
    there = [*scene.on_host, *scene.neighbours]
    assert set(reach(there)) == texts(there)
    itself = [("tcp", OWN, str(PORT)), ("ping", "127.0.0.1", "0"), ("udp", "127.0.0.1", "9")]
    with stray_frames(scene.intruder, port=PORT) as strays:
        tried = [*itself, *there, *scene.beyond]
        assert set(scene.attack("reach", targets=tried)) == texts(itself)
        addresses = sorted({address for _, address, _ in [*there, *scene.beyond]} | {OWN})
        numbers = [address for address in addresses if ":" not in address]
        veth0 = str(scene.intruder.veth0_address.ip)
        assert set(scene.attack("ask_arp", addresses=numbers)) == {"172.16.0.1", veth0}
        sources = [OWN, BORROWED, "127.0.0.1", veth0, *(address for _, address, _ in there)]
        arguments = {"sources": sorted(set(sources)), "targets": numbers, "port": PORT}
        assert scene.attack("send_strays", **arguments) > 3 * len(numbers)
    assert strays == []


def test_probes_find_an_open_slot(scene: Scene) -> None:
    """Without its slot's rules a guest reaches each of the host's addresses, and is seen at it."""
    v6 = ("ping", OPEN_V6 + "%eth0", "0")
    gateway = ("tcp", "172.16.0.1", "80")
    with stray_frames(scene.intruder, port=PORT) as strays, open_slot(scene.intruder):
        wanted = [*scene.on_host, gateway, v6]
        assert set(scene.attack("reach", targets=wanted)) == texts(wanted)
        own = str(scene.intruder.veth1_address.ip)
        scene.attack("send_strays", sources=[OWN, BORROWED], targets=[own], port=PORT)
    assert {line.split()[0] for line in strays} >= {"tcp", "udp", "icmp"}
    assert f"udp {BORROWED} > {own}" in strays
    assert scene.attack("reach", targets=[*scene.on_host, gateway, v6]) == []


def texts(targets: list[Target]) -> set[str]:
    """Targets as `reach` gives them back."""
    return {" ".join(target) for target in targets}


def test_full_memory(scene: Scene) -> None:
    """A guest that takes all memory it can get ends what took it; the others answer meanwhile."""
    with scene.others_answering():
        found = scene.attack("fill_memory")
    assert found["signal"] == signal.SIGKILL
    assert found["kills"] >= 1
    assert scene.attack("reach", targets=[("tcp", OWN, str(PORT))])


def test_full_disk(scene: Scene) -> None:
    """A guest that writes until its disk is full is told; the others answer and write meanwhile."""
    with scene.others_answering():
        found = scene.attack("fill_disk")
    assert found["errno"] == errno.ENOSPC
    assert found["bytes"] > SCRATCH_BYTES


def test_flood(scene: Scene) -> None:
    """A guest that begins 50,000 connections gets none; others answer, nothing is remembered."""
    with scene.others_answering():
        address = str(scene.intruder.veth1_address.ip)
        assert scene.attack("flood", address=address, count=FLOOD) == {"begun": FLOOD}
    path = scene.intruder.namespace_path
    assert int(in_namespace(path, lambda: run(["conntrack", "-C"]))) < 100

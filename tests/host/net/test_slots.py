"""Slots on the live host: made, checked field by field, isolated, given back, reclaimed."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.strays import stray_frames
from host.net.tap_guest import tap_guest
from torpor.errors import HostUnfit, NotFound
from torpor.host.netns import in_namespace
from torpor.host.process import run
from torpor.net import apply
from torpor.net.check import check_allocation
from torpor.net.log_line import FIELDS, allocation_fields, allocation_line, parse_log_line
from torpor.net.registry import Slot, SlotRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.host

FIRST = 9000
UDP, TCP = 17, 6


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home that slots are allocated for."""
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def registry(tmp_path: Path) -> SlotRegistry:
    """A registry of its own, with numbers that no other test uses."""
    return SlotRegistry(tmp_path / "run", first=FIRST)


@pytest.fixture
def slot(registry: SlotRegistry, home: Path) -> Iterator[Slot]:
    """One allocated slot."""
    made = registry.allocate(home, "hello-1")
    yield made
    registry.release_instance(home, "hello-1")


def wrong_fields(slot: Slot, registry: SlotRegistry, **changes: str) -> set[str]:
    """The names of the fields that do not fit the host."""
    fields = {**allocation_fields(slot.addresses, "hello-1"), **changes}
    return {check.name for check in check_allocation(fields, registry) if not check.ok}


def inside(slot: Slot, *command: str) -> None:
    """Run a program in the slot's namespace."""
    in_namespace(slot.addresses.namespace_path, lambda: run(command))


def test_fresh_slot_fits_in_every_field(slot: Slot, registry: SlotRegistry) -> None:
    """All twelve fields of the allocation are true of the host, also as read from the log line."""
    assert wrong_fields(slot, registry) == set()
    line = allocation_line(slot.addresses, "hello-1")
    checks = check_allocation(parse_log_line(line), registry)
    assert {check.name for check in checks} == set(FIELDS)
    assert all(check.ok for check in checks)


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_value_is_found(slot: Slot, registry: SlotRegistry, name: str) -> None:
    """An allocation with one wrong field is reported for that field."""
    wrong = "172.31.0.9/30" if name.endswith("CIDR") else "no-such-thing"
    assert name in wrong_fields(slot, registry, **{name: wrong})


BREAKAGES: dict[str, tuple[Callable[[Slot], None], set[str]]] = {
    "tap gone": (
        lambda slot: inside(slot, "ip", "link", "delete", "tap0"),
        {"HostDevName", "GatewayIP", "ContainerIP", "ContainerCIDR"},
    ),
    "tap address gone": (
        lambda slot: inside(slot, "ip", "addr", "flush", "dev", "tap0"),
        {"GatewayIP", "ContainerCIDR"},
    ),
    "rules gone": (lambda slot: inside(slot, "nft", "flush", "ruleset"), {"CloneIP"}),
    "route gone": (
        lambda slot: run(["ip", "route", "delete", f"{slot.addresses.clone_ip}/32"]) and None,
        {"CloneIP"},
    ),
    "veth0 address gone": (
        lambda slot: inside(slot, "ip", "addr", "flush", "dev", slot.addresses.veth0),
        {"Veth0CIDR"},
    ),
    "veth1 address gone": (
        lambda slot: run(["ip", "addr", "flush", "dev", slot.addresses.veth1]) and None,
        {"Veth1CIDR"},
    ),
    "veth gone": (
        lambda slot: run(["ip", "link", "delete", slot.addresses.veth1]) and None,
        {"Veth0Name", "Veth0CIDR", "Veth1Name", "Veth1CIDR", "CloneIP"},
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_part_is_found(slot: Slot, registry: SlotRegistry, breakage: str) -> None:
    """What is missing on the host is reported for the fields that it concerns."""
    break_it, fields = BREAKAGES[breakage]
    break_it(slot)
    assert wrong_fields(slot, registry) >= fields


def test_everything_is_absent_after_release(registry: SlotRegistry, home: Path) -> None:
    """After release nothing of the allocation is on the host, and the number is free again."""
    slot = registry.allocate(home, "hello-1")
    registry.release_instance(home, "hello-1")
    assert wrong_fields(slot, registry) == set(FIELDS)
    assert registry.list() == []
    with pytest.raises(NotFound):
        registry.get(slot.number)


def test_requests_reach_the_guest_and_answers_return(slot: Slot) -> None:
    """Host -> clone IP -> guest and back, translated both ways."""
    clone = str(slot.addresses.clone_ip)
    with (
        tap_guest(slot.addresses) as guest,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host,
    ):
        host.settimeout(5)
        arrived = None
        for _ in range(10):  # a datagram may be lost
            host.sendto(b"question", (clone, 8080))
            arrived = guest.receive(UDP, timeout_s=1)
            if arrived:
                break
        assert arrived is not None
        assert arrived[2] == 8080
        guest.send_udp(arrived[0], source_port=8080, port=arrived[1])
        answer, address = host.recvfrom(100)
        assert answer == b"from the guest"
        assert address == (clone, 8080)


def test_guest_begins_nothing(slot: Slot, registry: SlotRegistry, home: Path) -> None:
    """What a guest sends by itself - to the host, other clones, link-local - goes nowhere."""
    other = registry.allocate(home, "hello-2")
    try:
        received = Path(f"/sys/class/net/{slot.addresses.veth1}/statistics/rx_packets")
        with (
            tap_guest(slot.addresses) as guest,
            tap_guest(other.addresses) as neighbour,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
        ):
            service.bind(("0.0.0.0", 0))
            service.settimeout(0.3)
            port = service.getsockname()[1]
            before = int(received.read_text())
            for target in (
                str(slot.addresses.veth1_address.ip),
                str(other.addresses.clone_ip),
                str(other.addresses.veth1_address.ip),
                "169.254.169.254",
                "172.16.0.1",
                "192.0.2.1",
            ):
                guest.send_udp(target, port=port)
            with pytest.raises(TimeoutError):
                service.recv(100)
            assert neighbour.receive(UDP, timeout_s=0.2) is None
            assert int(received.read_text()) == before
    finally:
        registry.release_instance(home, "hello-2")


def test_false_sources(slot: Slot) -> None:
    """A guest that sends in the host's name cannot make its namespace send the host an error.

    It would quote what the guest made up. The kernel sends one a second.
    """
    host = str(slot.addresses.veth1_address.ip)
    with (
        stray_frames(slot.addresses, port=8080) as strays,
        tap_guest(slot.addresses) as guest,
    ):
        until_s = time.monotonic() + 1.3
        while time.monotonic() < until_s:
            guest.send_udp("192.0.2.1", source=host)
            time.sleep(0.05)
    assert strays == []


def test_agent_is_reachable_from_the_tap_side_only(slot: Slot) -> None:
    """The agent's port does not answer through the clone IP; another port gets there."""
    clone = str(slot.addresses.clone_ip)
    with tap_guest(slot.addresses) as guest:
        for port, arrives in ((apply.AGENT_PORT, False), (8080, True)):
            with socket.socket() as client:
                client.setblocking(False)
                client.connect_ex((clone, port))
                timeout_s = 5 if arrives else 0.5
                assert (guest.receive(TCP, timeout_s=timeout_s) is not None) == arrives


@pytest.mark.parametrize("step", ["_ip", "_apply_inside"])
def test_failing_step_leaves_nothing(
    registry: SlotRegistry, home: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A slot that fails half-way is undone, record and all."""

    def fail(*_: object) -> None:
        raise OSError("made to fail")

    monkeypatch.setattr(apply, step, fail)
    with pytest.raises(HostUnfit, match="made to fail"):
        registry.allocate(home, "hello-1")
    assert registry.list() == []


ALLOCATE = """
import sys
import time
from pathlib import Path
from torpor.net.registry import SlotRegistry
registry = SlotRegistry(Path(sys.argv[1]), first=int(sys.argv[4]))
sys.stdout.write(str(registry.allocate(Path(sys.argv[2]), sys.argv[3]).number))
"""


def test_processes_get_different_slots(tmp_path: Path, home: Path) -> None:
    """Four processes that allocate at the same time get four slots."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", ALLOCATE, tmp_path / "run", home, f"i-{index}", str(FIRST)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(4)
    ]
    got = sorted(child.communicate(timeout=60)[0] for child in children)
    registry = SlotRegistry(tmp_path / "run", first=FIRST)
    for index in range(4):
        registry.release_instance(home, f"i-{index}")
    assert got == [str(FIRST + index) for index in range(4)]


def test_slot_of_a_killed_maker_is_reclaimed(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it makes a slot: the next command removes what it left."""
    registry = SlotRegistry(tmp_path / "run", first=FIRST)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(apply, "_apply_inside", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        registry.allocate(home, "hello-1")
        os._exit(1)
    os.waitpid(child, 0)
    (record,) = registry.list()
    assert record.is_abandoned()
    registry.reclaim(home, [])
    assert registry.list() == []


def test_slot_of_a_deleted_home_is_reclaimed(tmp_path: Path, home: Path) -> None:
    """When a home is deleted, another home's command takes its slots back; not before."""
    registry = SlotRegistry(tmp_path / "run", first=FIRST)
    child = os.fork()
    if child == 0:
        registry.allocate(home, "hello-1")
        os._exit(0)
    os.waitpid(child, 0)
    registry.reclaim(tmp_path / "other", [])
    assert len(registry.list()) == 1
    home.rmdir()
    registry.reclaim(tmp_path / "other", [])
    assert registry.list() == []


def test_pool_gives_prepared_slots(tmp_path: Path, home: Path) -> None:
    """Prepared slots are given out as they are, go back to the pool, and forget connections."""
    registry = SlotRegistry(tmp_path / "run", pool_size=1, first=FIRST)
    registry.prepare(1)
    slot = registry.allocate(home, "hello-1")
    assert slot.number == FIRST
    assert wrong_fields(slot, registry) == set()
    registry.release_instance(home, "hello-1")
    assert [record.state for record in registry.list()] == ["free"]
    registry.prepare_more(1)
    assert registry.count_free() == 2
    assert registry.prune(keep=1) == 1
    assert registry.prune() == 1
    assert registry.list() == []


def test_allocation_is_logged_as_by_the_ancestor(
    registry: SlotRegistry, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both lines of the ancestor: the allocation, and the tap with gateway and namespace."""
    caplog.set_level(logging.DEBUG, "torpor.net")
    slot = registry.allocate(home, "hello-1")
    try:
        logged = "\n".join(f"2026-01-01 00:00:00,1 level=INFO {line}" for line in caplog.messages)
        assert wrong_fields(slot, registry, **parse_log_line(logged)) == set()
        (tap,) = [line for line in caplog.messages if "Creating tap" in line]
        assert tap.endswith(
            'level=debug msg="Creating tap for virtual network"'
            f" IP gateway=172.16.0.1/24 namespace=torpor-{slot.number} tap=tap0"
        )
    finally:
        registry.release_instance(home, "hello-1")


def test_net_check_of_a_log_line(slot: Slot, home: Path, tmp_path: Path) -> None:
    """The command says each field, exits 1 on any difference and 2 for what is no such line."""
    line = allocation_line(slot.addresses, "hello-1")
    elsewhere = line.replace("/run/netns/", "/var/run/netns/")

    def check(text: str) -> tuple[int, dict[str, bool]]:
        words = ["--home", home, "net", "check", "--json", "--log-line", text]
        environ = {**os.environ, "TORPOR_RUNTIME_DIR": str(tmp_path / "run")}
        answer = subprocess.run(
            [Path(sys.executable).with_name("torpor"), *words],
            capture_output=True,
            text=True,
            env=environ,
            check=False,
        )
        rows = json.loads(answer.stdout) if answer.stdout else []
        return answer.returncode, {row["field"]: row["ok"] for row in rows}

    assert check(elsewhere) == (0, dict.fromkeys(FIELDS, True))
    code, fields = check(line.replace("tap0", "tap1"))
    assert code == 1
    assert {name for name, ok in fields.items() if not ok} >= {"HostDevName", "GatewayIP"}
    assert check(line.replace("GatewayIP=", "GatewayIP "))[0] == 2


def test_translation_to_an_address_with_more_digits(slot: Slot, registry: SlotRegistry) -> None:
    """A translation to 172.16.0.20 is none to 172.16.0.2."""
    rules = apply.rules(slot.addresses).replace("dnat to 172.16.0.2", "dnat to 172.16.0.20")
    path = slot.addresses.namespace_path
    inside(slot, "nft", "flush", "ruleset")
    in_namespace(path, lambda: run(["nft", "-f", "-"], input_bytes=rules.encode()))
    assert wrong_fields(slot, registry) == {"CloneIP"}

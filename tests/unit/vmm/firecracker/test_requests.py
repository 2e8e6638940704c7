"""What Firecracker is asked: paths, order and fields."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures.configs import vm_config
from torpor.errors import InvalidInput
from torpor.snapshot.manifest import Machine
from torpor.units import MiB
from torpor.vmm.firecracker.program import Version
from torpor.vmm.firecracker.requests import (
    boot_requests,
    load_request,
    save_request,
    save_state_request,
)

CONFIG = vm_config(
    Path("/instances/a"),
    machine=Machine(256 * MiB, 2, 64 * MiB, MiB),
    kernel=Path("/boot/vmlinuz"),
    vmlinux=Path("/boot/vmlinux"),
    initramfs=Path("/boot/initramfs"),
    image=Path("/images/i"),
    app=Path("/images/a"),
    namespace="torpor-7",
)


def strings(value: Any) -> list[str]:  # noqa: ANN401
    """All strings in a body."""
    if isinstance(value, dict):
        return [text for entry in value.values() for text in strings(entry)]
    return [value] if isinstance(value, str) else []


def test_boot() -> None:
    """Everything is set before the start, the drives in the guest's order, the start comes last."""
    asked = boot_requests(CONFIG)
    assert [request.name for request in asked] == [
        "PUT /machine-config",
        "PUT /boot-source",
        "PUT /drives/image",
        "PUT /drives/scratch",
        "PUT /drives/app",
        "PUT /network-interfaces/net",
        "PUT /entropy",
        "PUT /actions",
    ]
    machine = asked[0].body
    assert machine == {
        "vcpu_count": 2,
        "mem_size_mib": 256,
        "smt": False,
        "track_dirty_pages": True,
    }
    read_only = [request.body["is_read_only"] for request in asked[2:5] if request.body]
    assert read_only == [True, False, True]


@pytest.mark.parametrize("version", [Version(1, 12, 0), Version(1, 16, 1)])
def test_no_path_is_absolute(version: Version) -> None:
    """What is baked into device state has to load in any other directory."""
    saving = save_request(whole=False), save_state_request()
    for request in (*boot_requests(CONFIG), load_request(version), *saving):
        assert not [text for text in strings(request.body) if text.startswith("/")]


def test_two_instances_are_asked_the_same() -> None:
    """Nothing of an instance's own gets into what its snapshot is made of."""
    other = replace(CONFIG, directory=Path("/b"), scratch=Path("/b/s"), namespace="torpor-9")
    assert boot_requests(other) == boot_requests(CONFIG)


def test_without_network_there_is_no_card() -> None:
    """Firecracker has no card that is connected to nothing."""
    asked = boot_requests(replace(CONFIG, namespace=None))
    assert not [request for request in asked if "network" in request.path]


@pytest.mark.parametrize(
    ("version", "field"),
    [
        (Version(1, 12, 1), "enable_diff_snapshots"),
        (Version(1, 13, 0), "track_dirty_pages"),
        (Version(1, 16, 1), "track_dirty_pages"),
        (Version(2, 0, 0), "track_dirty_pages"),
    ],
)
def test_tracking_is_asked_for_by_the_versions_own_name(version: Version, field: str) -> None:
    """An unknown field is refused, so each version gets its own and no other."""
    body = load_request(version).body
    assert body is not None
    assert body[field] is True
    assert set(body) == {"snapshot_path", "mem_backend", "resume_vm", field}


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (Machine(3073 * MiB, 1, MiB, MiB), "bytes of memory"),
        (Machine(128 * MiB + 4096, 1, MiB, MiB), "bytes of memory"),
        (Machine(128 * MiB, 33, MiB, MiB), "at most 32 CPUs"),
    ],
)
def test_machines_that_cannot_be(machine: Machine, words: str) -> None:
    """Refused in our words, before a process is started."""
    with pytest.raises(InvalidInput, match=words):
        boot_requests(replace(CONFIG, machine=machine))

"""deploy/systemd/torpor.service: systemd reads every line, and VMs outlive the daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "torpor.service"
OWN_MOUNTS = (
    *("ProtectSystem", "ProtectHome", "ProtectKernelTunables", "ProtectKernelModules"),
    *("ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ProcSubset", "PrivateTmp"),
    *("PrivateDevices", "PrivateMounts", "PrivateUsers", "PrivateNetwork", "DynamicUser"),
    *("ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "TemporaryFileSystem", "BindPaths"),
    *("RootDirectory", "RootImage", "MountFlags", "ProtectHostname"),
)
"""Settings that hide what the daemon mounts from the host (systemd.exec(5))."""


def verify(directory: Path, text: str) -> str:
    """What systemd has against a unit; its program is replaced by one that is there."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("there is no systemd-analyze")
    path = directory / "torpor.service"
    path.write_text(text.replace("/opt/torpor/bin/torpor", "/bin/true"))
    command = [analyze, "verify", "--man=no", "--recursive-errors=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr + (f"exit code {done.returncode}" if done.returncode else "")


def values() -> dict[str, list[str]]:
    """The unit's assignments."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def test_systemd_takes_it(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say; it has about a key that does not exist."""
    assert verify(tmp_path, UNIT.read_text()) == ""
    assert "KillModes" in verify(tmp_path, UNIT.read_text().replace("KillMode=", "KillModes="))


def test_vms_outlive_the_daemon() -> None:
    """Only the daemon is signalled, its runtime directory stays, an end by OOM is one VM's own."""
    unit = values()
    assert unit["KillMode"] == ["process"]
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]
    assert unit["OOMPolicy"] == ["continue"]


def test_mounts_and_namespaces_are_the_hosts() -> None:
    """No setting gives the daemon a mount namespace: what it mounts must be there for the next."""
    assert not set(values()) & set(OWN_MOUNTS)

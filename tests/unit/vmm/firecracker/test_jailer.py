"""What is laid out for Firecracker's jailer, and how it is called; it runs in the level-1 VM."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fixtures.configs import vm_config
from torpor.vmm.firecracker.jail import Jail
from torpor.vmm.firecracker.jailer import LockedJail, find_jailer

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.vmm.interface import VmConfig


def make_config(directory: Path, namespace: str | None = None) -> VmConfig:
    """A VM of files that are there."""
    directory.mkdir()
    for name in ("memory", "image", "scratch", "app", "kernel"):
        (directory / name).touch()
    kernel = directory / "kernel"
    return vm_config(directory, vmlinux=kernel, initramfs=kernel, namespace=namespace)


def test_command(tmp_path: Path) -> None:
    """The jailer gets an own user, the instance's jail and namespace; Firecracker the rest."""
    config = make_config(tmp_path / "a", namespace="torpor-3")
    program = tmp_path / "firecracker-v1.16.1"
    program.touch()
    jail = LockedJail.made_for(config, "/bin/jailer", str(program))
    command = jail.command(config, str(program))
    ours, theirs = command[: command.index("--")], command[command.index("--") + 1 :]
    options = dict(zip(ours[1::2], ours[2::2], strict=True))
    user = options.pop("--uid")
    assert int(user) >= 1 << 30
    assert options == {
        "--id": "vm",
        "--exec-file": str(program),
        "--gid": user,
        "--chroot-base-dir": str(tmp_path / "a" / "jail"),
        "--netns": "/run/netns/torpor-3",
    }
    assert theirs == ["--api-sock", "api.sock", "--log-path", "vmm.log", "--level", "Warn"]
    other = make_config(tmp_path / "b")
    there = LockedJail.made_for(other, "/bin/jailer", str(program))
    assert user not in there.command(other, str(program))
    assert "--netns" not in there.command(other, str(program))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")
def test_layout(tmp_path: Path) -> None:
    """A place for each file, what is written owned by the VM's user; found again by another."""
    config = make_config(tmp_path / "a")
    assert LockedJail.found(config) is None
    jail = LockedJail.made_for(config, "/bin/jailer", "/bin/true")
    config.memory.chmod(0o400)
    with jail.made(config) as inherited:
        assert not inherited
    assert config.memory.stat().st_mode & 0o777 == 0o404
    names = {path.name for path in jail.directory.iterdir()}
    files = {"image", "scratch", "app", "memory", "vmlinux", "initramfs", "vmm.log"}
    assert names == {*files, "saved"}
    assert config.scratch.stat().st_uid == config.vmm_log.stat().st_uid >= 1 << 30
    assert config.image.stat().st_uid == 0
    again = LockedJail.found(config)
    assert again is not None
    assert (again.directory, again.socket) == (jail.directory, jail.socket)
    assert jail.directory not in again.lost_memory.parents


def test_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    """A VMM that its guest took over gets no file of the host into a snapshot."""
    secret, saved = tmp_path / "secret", tmp_path / "vmstate"
    secret.write_text("secret")
    saved.symlink_to(secret)
    jail = LockedJail(tmp_path, tmp_path, "")
    with pytest.raises(OSError, match="symbolic links"):
        jail.open_saved(os.getpid(), str(saved))
    jail.drop_saved(os.getpid(), str(saved))
    assert not saved.is_symlink()
    assert secret.read_text() == "secret"


def test_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it is installed, torpor is root, and the setting is not empty."""
    jailer = tmp_path / "jailer"
    jailer.touch(mode=0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert find_jailer(str(jailer)) == str(jailer)
    assert find_jailer(str(tmp_path / "none")) is None
    assert find_jailer("") is None
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert find_jailer(str(jailer)) is None


def test_without_jailer(tmp_path: Path) -> None:
    """The jail is a directory of links; Firecracker is called as it is."""
    config = make_config(tmp_path / "a")
    jail = Jail.of(config)
    with jail.made(config) as inherited:
        assert len(inherited) == 2
    assert (jail.directory / "memory").resolve() == config.memory
    assert jail.prepare(config) is None
    assert jail.command(config, "/bin/fc")[0] == "/bin/fc"

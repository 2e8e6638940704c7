"""CPU models: the named ones are QEMU's own, and what a host lacks of one is told by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from torpor.config import Settings, load_settings
from torpor.errors import HostUnfit, InvalidInput
from torpor.units import Digest
from torpor.vmm.qemu.arguments import cpu_argument
from torpor.vmm.qemu.driver import QemuDriver
from torpor.vmm.qemu.models import check_model

if TYPE_CHECKING:
    from pathlib import Path

KERNEL = Digest("0" * 64)
MODELS = [
    {"name": "Denverton", "unavailable-features": []},
    {"name": "Skylake", "unavailable-features": ["pcid", "avx512f", "avx512f", "type"]},
]


def with_model(model: str) -> QemuDriver:
    """A driver under TCG, which lacks some features of newer processors."""
    return QemuDriver(Settings(accelerator="tcg", cpu_model=model))


def test_named_model_is_recorded() -> None:
    """A model that can be shown is in the manifest, which then needs no flags of the host."""
    platform = with_model("Nehalem-v1").platform(KERNEL)
    assert (platform.cpu_model, platform.cpu_flags) == ("Nehalem-v1", ())


def test_model_that_the_host_lacks() -> None:
    """What is missing is named, before anything runs."""
    with pytest.raises(HostUnfit, match=r"cannot be shown as Skylake-Server-v1.*avx512f"):
        with_model("Skylake-Server-v1").platform(KERNEL)


def test_model_that_nobody_knows() -> None:
    """A name that QEMU does not know is the user's mistake."""
    with pytest.raises(InvalidInput, match="no CPU model 'Tycho'"):
        with_model("Tycho").platform(KERNEL)


@pytest.mark.parametrize(
    "text", ["host,+svm", "host,-avx", "max,-avx", "EPYC,+avx", "max enforce", "-v1"]
)
def test_model_with_options_is_refused(text: str) -> None:
    """A setting names a model and what it is to lack; it brings no options of QEMU's along."""
    with pytest.raises(InvalidInput, match="not a CPU model"):
        load_settings({"cpu_model": text}, environ={})


def test_cpu_argument() -> None:
    """KVM gives all of a named model or nothing; TCG never shows cmpxchg16b."""
    assert cpu_argument("kvm", "host") == "host"
    assert cpu_argument("kvm", "EPYC-v3") == "EPYC-v3,enforce"
    assert cpu_argument("tcg", "max") == "max,-cx16"


@pytest.fixture
def qemu(tmp_path: Path) -> str:
    """A program that answers QMP's questions as QEMU does."""
    program = tmp_path / "qemu"
    answers = [{"QMP": {}}, {"return": {}}, {"return": MODELS}, {"return": {}}]
    lines = "\n".join(json.dumps(answer) for answer in answers)
    program.write_text(f"#!/bin/sh\ncat >/dev/null\ncat <<'END'\n{lines}\nEND\n")
    program.chmod(0o755)
    return str(program)


def test_features_taken_out_of_a_model(qemu: str) -> None:
    """What a host has passes; what it lacks is named, and may be taken out of the model."""
    check_model(qemu, "kvm", "Denverton")
    check_model(qemu, "kvm", "Skylake,-avx512f,-pcid,-aes")
    with pytest.raises(HostUnfit, match="as Skylake: it lacks avx512f, pcid") as lacking:
        check_model(qemu, "kvm", "Skylake")
    assert "Skylake,-avx512f,-pcid" in lacking.value.hint
    with pytest.raises(HostUnfit, match="as Skylake,-pcid: it lacks avx512f"):
        check_model(qemu, "kvm", "Skylake,-pcid")
    with pytest.raises(InvalidInput, match="QEMU knows no CPU model 'Pentium9'"):
        check_model(qemu, "kvm", "Pentium9,-sse")

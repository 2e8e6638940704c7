"""CPU models that QEMU knows, and what of one this host's processor lacks.

Source: QEMU's qapi/machine-target.json, query-cpu-definitions.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Final

from torpor.errors import HostUnfit, InvalidInput, VmmFailed
from torpor.host import process

if TYPE_CHECKING:
    from collections.abc import Mapping

_QUESTIONS: Final = ("qmp_capabilities", "query-cpu-definitions", "quit")
_NOT_MODELS: Final = frozenset({"type", "base"})


def check_model(program: str, accelerator: str, model: str) -> None:
    """Refuse a model that this host cannot show to guests, by the names of the missing features.

    `model` is a name, and features that are taken out of it, as in `qemu64,-cx16`. Blocking.
    Raises InvalidInput when QEMU knows no such model, HostUnfit with the CPUID features that the
    processor lacks, ProgramFailed with QEMU's words.
    """
    models = _missing_features(program, accelerator)
    name, *removed = model.split(",-")
    if name not in models:
        raise InvalidInput(
            f"QEMU knows no CPU model {name!r}",
            hint=f"`{program} -cpu help` lists them; host is this host's processor",
        )
    missing = [feature for feature in models[name] if feature not in removed]
    if missing:
        example = ",-".join([name, *removed, *missing])
        raise HostUnfit(
            f"this host's processor cannot be shown as {model}",
            reason=f"it lacks {', '.join(missing)}",
            hint=f"set cpu_model to one that all your nodes have, to {example}, or to host",
        )


@functools.lru_cache(maxsize=4)
def _missing_features(program: str, accelerator: str) -> Mapping[str, tuple[str, ...]]:
    """By model, the features that QEMU could not give it under this accelerator."""
    lines = "".join(json.dumps({"execute": question}) + "\n" for question in _QUESTIONS)
    answers = process.run(
        [
            *(program, "-M", "none", "-accel", accelerator, "-nodefaults", "-no-user-config"),
            *("-display", "none", "-qmp", "stdio"),
        ],
        input_bytes=lines.encode(),
        timeout_s=20,
    )
    for line in answers.splitlines():
        found = json.loads(line).get("return")
        if isinstance(found, list):
            return {entry["name"]: _lacking(entry) for entry in found}
    raise VmmFailed(f"{program} does not tell its CPU models", reason=answers[-500:])


def _lacking(entry: Mapping[str, object]) -> tuple[str, ...]:
    features = entry.get("unavailable-features", ())
    assert isinstance(features, list | tuple)
    return tuple(sorted({str(name) for name in features} - _NOT_MODELS))

"""The structures and numbers of host/fuse against the kernel's installed header."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from torpor.host.fuse import layouts

HEADER = Path("/usr/include/linux/fuse.h")
FILLING = ("padding", "unused", "spare", "dummy")  # newer headers put fields into them

NUMBERS = {
    **{f"FUSE_{opcode.name}": int(opcode) for opcode in layouts.Opcode},
    **{f"FUSE_{flag.name}": int(flag) for flag in layouts.InitFlag},
    **{f"FOPEN_{flag.name}": int(flag) for flag in layouts.OpenFlag},
    **{f"FUSE_NOTIFY_{code.name}": int(code) for code in layouts.NotifyCode},
    "FUSE_ROOT_ID": layouts.ROOT_ID,
    "FUSE_DEV_IOC_CLONE": layouts.DEVICE_CLONE,
    "FUSE_MIN_READ_BUFFER": layouts.MIN_READ_BUFFER,
    "FUSE_UNIQUE_RESEND": layouts.UNIQUE_RESEND,
}
PLACES = {
    f"{layout.name}.{field}": offset
    for layout in layouts.LAYOUTS
    for field, offset in layout.offsets.items()
    if field.rpartition(".")[2] not in FILLING
}
SIZES = {layout.name: layout.size for layout in layouts.LAYOUTS}


@pytest.fixture(scope="module")
def header() -> str:
    """The text of the installed header."""
    if not HEADER.exists():
        pytest.skip("linux-libc-dev is not installed")
    return HEADER.read_text()


@pytest.fixture(scope="module")
def measured(header: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler makes of all names that the header has."""
    words = set(re.findall(r"\w+", header))
    lines = [f'P("{name}", {name});' for name in NUMBERS if name in words]
    lines += [f'P("{name}", sizeof(struct {name}));' for name in SIZES if name in words]
    for place in PLACES:
        structure, _, field = place.partition(".")
        if structure in words and field.rpartition(".")[2] in words:
            lines.append(f'P("{place}", offsetof(struct {structure}, {field}));')
    directory = tmp_path_factory.mktemp("header")
    source = directory / "measure.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <linux/ioctl.h>\n"
        "#include <linux/fuse.h>\n"
        '#define P(name, value) printf("%s %llu\\n", name, (unsigned long long)(value))\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = directory / "measure"
    subprocess.run(["gcc", "-o", program, source], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in map(str.split, output.splitlines())}


def compare(name: str, ours: int, measured: dict[str, int]) -> None:
    """Skip what the header is too old for."""
    if name not in measured:
        pytest.skip(f"{name} is newer than the installed header")
    assert ours == measured[name]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str, measured: dict[str, int]) -> None:
    """An opcode, flag or constant has the header's value."""
    compare(name, NUMBERS[name], measured)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, measured: dict[str, int]) -> None:
    """A structure has the header's size."""
    compare(name, SIZES[name], measured)


def test_places(measured: dict[str, int]) -> None:
    """Every field of every structure is where the header has it; only total_extlen may be newer."""
    missing = [place for place in PLACES if place not in measured]
    assert set(missing) <= {"fuse_in_header.total_extlen"}
    assert {place: offset for place, offset in PLACES.items() if place in measured} == {
        place: measured[place] for place in PLACES if place in measured
    }


def test_misspelt_field_is_refused() -> None:
    """Packing a structure with a field that it does not have is an error, not a zero."""
    with pytest.raises(KeyError):
        layouts.FORGET_IN.pack(nlookups=1)

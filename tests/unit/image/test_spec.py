"""function.toml: what is accepted, and errors that name file, line and key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from torpor.errors import InvalidInput
from torpor.image.spec import load_spec
from torpor.image.toml_lines import find_line

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """\
name = "echo"
command = ["python3", "/app/echo.py"]
port = 9000
memory = "128MiB"
vcpus = 2
files = ["echo.py", { source = "echo.py", target = "/etc/torpor/wake.d/reseed" }]

[environment]
LEVEL = "high"

[image]
packages = ["python3", "ca-certificates", "python3"]
warmup = ["python3", "-c", "import json"]

[[warmup]]
method = "POST"
path = "/one"
body = "x"
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the good function in it."""
    (tmp_path / "echo.py").write_text("print('echo')\n")
    (tmp_path / "function.toml").write_text(GOOD)
    return tmp_path


def test_all_keys(directory: Path) -> None:
    """Every key arrives; packages are sorted and named once."""
    spec = load_spec(directory)
    assert (spec.name, spec.port, spec.memory_bytes, spec.vcpus) == ("echo", 9000, 128 << 20, 2)
    assert spec.image.packages == ("ca-certificates", "python3")
    assert [str(file.target) for file in spec.files] == [
        "/app/echo.py",
        "/etc/torpor/wake.d/reseed",
    ]
    assert spec.environment == (("LEVEL", "high"),)
    assert spec.base_warmup == ("python3", "-c", "import json")
    assert [(one.method, one.path, one.body) for one in spec.warmup] == [("POST", "/one", b"x")]


def test_name_from_the_command_line(directory: Path) -> None:
    """`--name` takes the place of the file's."""
    assert load_spec(directory, name="other").name == "other"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('name = "echo"', 'name = "Echo!"', 1, "not a name"),
        ("port = 9000", 'port = "9000"', 3, "port must be a whole number"),
        ("port = 9000", "port = 1024", 3, "agent"),
        ("port = 9000", "port = true", 3, "port must be a whole number"),
        ("port = 9000", "prot = 9000", 3, "unknown key 'prot'"),
        ('"128MiB"', '"much"', 4, "not a size"),
        ('"128MiB"', '"3MiB"', 4, "multiple of 2 MiB"),
        ("vcpus = 2", "vcpus = 0", 5, "vcpus"),
        ('["echo.py", {', '["missing.py", {', 6, "there is no file 'missing.py'"),
        ('["echo.py", {', '["../echo.py", {', 6, "not inside"),
        ('target = "/etc', 'target = "etc', 6, "absolute path"),
        ('LEVEL = "high"', "LEVEL = 3", 9, "LEVEL must be a string"),
        ('packages = ["python3",', 'packages = ["Python 3",', 12, "not a Debian package"),
        ("packages =", "package =", 12, "unknown key 'package'"),
        ('method = "POST"', 'method = "FETCH"', 16, "method must be one of"),
        ('path = "/one"', 'path = "one"', 17, "absolute path"),
        ('body = "x"', 'body_file = "nothing"', 18, "there is no file"),
        ('command = ["python3", "/app/echo.py"]\n', "", 1, "command is missing"),
        ('command = ["python3", "/app/echo.py"]', 'command = "python3"', 2, "list of strings"),
    ],
)
def test_errors_name_the_line(directory: Path, old: str, new: str, line: int, words: str) -> None:
    """Each mistake is told with the line on which it stands."""
    assert old in GOOD
    (directory / "function.toml").write_text(GOOD.replace(old, new, 1))
    with pytest.raises(InvalidInput) as caught:
        load_spec(directory)
    assert f"function.toml:{line}: " in caught.value.message
    assert words in caught.value.message


def test_near_miss_is_suggested(directory: Path) -> None:
    """A misspelt key's hint has the right one."""
    (directory / "function.toml").write_text(GOOD.replace("port =", "prot ="))
    with pytest.raises(InvalidInput) as caught:
        load_spec(directory)
    assert caught.value.hint == "did you mean 'port'?"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("", "there is no \\[image\\] table"),
        ("[image]\n", "either packages or rootfs"),
        ('[image]\npackages = ["a"]\nrootfs = "r"\n', "either packages or rootfs"),
        ('[image]\nrootfs = "echo.py"\n', "is not a directory"),
        ('[image]\nrootfs = "/etc"\n', "not inside"),
        ('[image]\nrootfs = "gone"\n', "is not a directory"),
    ],
)
def test_image_table(directory: Path, image: str, words: str) -> None:
    """An image is packages or a directory of the function, one of them."""
    text = GOOD[: GOOD.index("[image]")] + image
    (directory / "function.toml").write_text(text)
    with pytest.raises(InvalidInput, match=words):
        load_spec(directory)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """No file, no TOML, no text: each is said."""
    with pytest.raises(InvalidInput, match="there is no"):
        load_spec(tmp_path)
    (tmp_path / "function.toml").write_text("name = ")
    with pytest.raises(InvalidInput, match="is not TOML"):
        load_spec(tmp_path)
    (tmp_path / "function.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="cannot read"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("a",), 1),
        (("t", "b"), 6),
        (("t", "c"), 7),
        (("r", 0, "x"), 10),
        (("r", 1, "x"), 13),
        (("r", 1), 12),
        (("t", "unknown"), 5),
        (("nothing",), 1),
    ],
)
def test_find_line(path: tuple[str | int, ...], line: int) -> None:
    """Lines of keys in tables, arrays of tables and after values of several lines."""
    text = 'a = [\n  "[t]",\n  "b = 1",\n]\n[t]\nb = 1\nc = """\nb = 2"""\n'
    text += "[[r]]\nx = 1\n\n[[r]]\nx = 2\n"
    assert find_line(text, path) == line

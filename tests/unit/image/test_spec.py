"""function.toml: what is accepted, and errors that name file, line and key."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from torpor.errors import InvalidInput
from torpor.image.spec import load_spec
from torpor.snapshot.manifest import Scale

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
        ('"128MiB"', "128", 4, "memory needs a unit"),
        ('"128MiB"', "128.5", 4, "memory must be a string"),
        ('"128MiB"', '"128"', 4, "multiple of 2 MiB"),
        ('"128MiB"', f'"{"9" * 400}MiB"', 4, "not a size"),
        ("vcpus = 2", "vcpus = 2.0", 5, "vcpus must be a whole number"),
        ('name = "echo"', "name = 1979-05-27 07:32:00", 1, "name must be a string"),
        ('["python3", "/app/echo.py"]', '["", "x"]', 2, "is a program"),
        ('["python3", "/app/echo.py"]', '["a", 1]', 2, "list of strings"),
        ('["python3", "/app/echo.py"]', "[]", 2, "at least one word"),
        ('LEVEL = "high"', '"A=B" = "x"', 9, "A=B must be a string"),
        ('path = "/one"', 'path = "/a b"', 17, "percent-encoded"),
        ('path = "/one"', 'headers = { A = "x\\r\\ny" }', 17, "cannot be a header"),
        ('path = "/one"', '"body_file" = "echo.py"', 17, "either a body or a body_file"),
        ('body = "x"', "[warmup.headers]\nB = 7", 19, "headers.B must be a string"),
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
        ("[image]", "[scale]\nmin = 3\nmax = 2\n[image]", 12, "min is 3, more than max"),
        ("[image]", "[scale]\nmin = 9\n[image]", 12, "min is 9, more than max, which is 8"),
        ("[image]", "[scale]\nconcurrency = 0\n[image]", 12, "from 1 to 10000"),
        ("[image]", "[scale]\nqueue = -1\n[image]", 12, "from 0 to 100000"),
        ("[image]", "[scale]\nidle = 30\n[image]", 12, "idle needs a unit"),
        ("[image]", '[scale]\nidle = "30"\n[image]', 12, "idle needs a unit"),
        ("[image]", '[scale]\nidle = "soon"\n[image]', 12, "not a duration"),
        ("[image]", '[scale]\ndeadline = "1ms"\n[image]', 12, "deadline must be from 100 ms"),
        ("[image]", '[scale]\ndeadline = "2d"\n[image]', 12, "to 24 h, not 2d"),
        ("[image]", '[scale]\nsnapshot = "hourly"\n[image]', 12, "never, on-deploy, on-idle"),
        ("[image]", "[scale]\nmaximum = 2\n[image]", 12, "unknown key 'maximum'"),
        ("vcpus = 2", "vcpus = 2\nscale = 3", 6, "scale must be a table"),
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


def test_scale(directory: Path) -> None:
    """What [scale] says arrives, what it does not say is the usual; without it there is none."""
    assert load_spec(directory).scale is None
    table = """
    [scale]
    concurrency = 1
    max = 2
    idle = "1.5m"
    snapshot = "on-idle"
    """
    (directory / "function.toml").write_text(GOOD + table)
    assert load_spec(directory).scale == Scale(
        concurrency=1, max=2, idle_ms=90_000, snapshot="on-idle"
    )


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
    with pytest.raises(InvalidInput, match=r"function\.toml:1: not TOML"):
        load_spec(tmp_path)
    (tmp_path / "function.toml").unlink()
    (tmp_path / "function.toml").mkdir()
    with pytest.raises(InvalidInput, match="cannot read"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b'name = "a"\nport = 1\nname = "b"\n', 3, "Cannot overwrite a value"),
        (b"[image]\nx = 1\n[image]\nx = 2\n", 3, "Cannot declare"),
        (b'name = "a"\nport = = 3\n', 2, "Invalid value"),
        (b'name = "a"\nfiles = [\n  "x",\n', 3, "not TOML"),
        (b'name = "caf\xe9"\n', 1, "not UTF-8"),
        (b"# text\n# more\nname = '\xff\xfe'\n", 3, "not UTF-8"),
        (b"port = " + b"9" * 5000 + b"\n", 1, "not TOML"),
        (b"port = " + b"[" * 5000 + b"\n", 1, "not TOML"),
    ],
)
def test_what_is_no_toml_names_the_line(
    tmp_path: Path, content: bytes, line: int, words: str
) -> None:
    """Duplicate keys, broken syntax and bytes that are no text: the line at which it goes wrong."""
    (tmp_path / "function.toml").write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        load_spec(tmp_path)
    assert f"function.toml:{line}: " in caught.value.message
    assert words in caught.value.message


FILES = """\
name = "echo"
command = ["python3", "/app/echo.py"]
files = [
  "echo.py",
  # the next one is the one
  ENTRY,
]
[image]
packages = ["python3"]
"""


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('"missing.py"', "there is no file 'missing.py'"),
        ('{ source = "missing.py" }', "there is no file 'missing.py'"),
        ('"/etc/hostname"', "is not inside"),
        ('"HERE/echo.py"', "is not inside"),
        ('"sub/../echo.py"', "is not inside"),
        ('".."', "is not inside"),
        ('""', "is not inside"),
        ('"out.py"', "'out.py' is not inside"),
        ('"loop"', "loop"),
        (f'"{"n" * 300}"', "too long"),
        ('"links"', "link links/deep/out -> ../../../other is not inside"),
        ('"absolute"', "link absolute/etc -> /etc is not inside"),
        ('"special"', "special/pipe is neither a file nor a directory"),
        ("7", "an entry is a path"),
        ('["echo.py"]', "an entry is a path"),
        ("{ source = 3 }", "source must be a string"),
        ('{ source = "echo.py", mode = 3 }', "unknown key 'mode'"),
        ('{ source = "echo.py", target = "x" }', "absolute path"),
        ('{ source = "echo.py", target = "/a/../b" }', "absolute path"),
        ('{ source = "echo.py", target = "/" }', "is a directory"),
        ('{ source = "echo.py", target = "//app/" }', "is a directory"),
        ('{ source = "echo.py", target = "/run/x" }', "the guest mounts /run"),
        ('"echo.py"', "is also what"),
        ('{ source = "sub", target = "/app/echo.py/x" }', "is also what"),
    ],
)
def test_files_that_do_not_fit(directory: Path, entry: str, words: str) -> None:
    """Each unfit entry of a list over several lines is named with its own line."""
    for name in ("sub", "links/deep", "absolute", "special"):
        (directory / name).mkdir(parents=True)
    (directory / "out.py").symlink_to(directory.parent / "other.py")
    (directory / "loop").symlink_to("loop")
    (directory / "links" / "deep" / "out").symlink_to("../../../other")
    (directory / "absolute" / "etc").symlink_to("/etc")
    os.mkfifo(directory / "special" / "pipe")
    text = FILES.replace("ENTRY", entry.replace("HERE", str(directory)))
    (directory / "function.toml").write_text(text)
    with pytest.raises(InvalidInput) as caught:
        load_spec(directory)
    assert "function.toml:6: " in caught.value.message
    assert words in caught.value.message


def test_links_inside_are_kept(directory: Path) -> None:
    """A link that stays in the function's directory may be among its files."""
    (directory / "sub").mkdir()
    (directory / "sub" / "main.py").symlink_to("../echo.py")
    (directory / "sub" / "other").symlink_to("main.py")
    (directory / "function.toml").write_text(FILES.replace("ENTRY", '"sub"'))
    assert [str(file.target) for file in load_spec(directory).files] == ["/app/echo.py", "/app/sub"]

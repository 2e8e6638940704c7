"""function.toml: what a function is, checked at the edge, every error with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast, get_args

from torpor.errors import InvalidInput
from torpor.image.app import find_unfit
from torpor.image.toml_table import TomlTable
from torpor.snapshot.manifest import SCALE_LIMITS, Scale, SnapshotPolicy
from torpor.units import (
    GiB,
    MiB,
    format_duration,
    format_size,
    parse_duration,
    parse_name,
    parse_size,
)

FILE_NAME: Final = "function.toml"
_AGENT_PORT: Final = 1024
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+.](:[a-z0-9-]+)?")
_MOUNTED: Final = ("dev", "proc", "run", "sys", "tmp")
_POLICIES: Final = get_args(SnapshotPolicy)
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass(frozen=True)
class ImageSpec:
    """What an image is made of: Debian packages, or a directory that is the root file system."""

    packages: tuple[str, ...] = ()
    rootfs: Path | None = None


@dataclass(frozen=True)
class AppFile:
    """A file or directory of the function and its absolute path in the guest."""

    source: Path
    target: PurePosixPath


@dataclass(frozen=True)
class WarmupRequest:
    """A request that a function answers before its snapshot is made."""

    method: str = "GET"
    path: str = "/"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None


@dataclass(frozen=True)
class FunctionSpec:
    """A function as its function.toml describes it."""

    name: str
    command: tuple[str, ...]
    image: ImageSpec
    files: tuple[AppFile, ...]
    port: int = 8080
    memory_bytes: int = 256 * MiB
    vcpus: int = 1
    cwd: str = "/app"
    environment: tuple[tuple[str, str], ...] = ()
    base_warmup: tuple[str, ...] = ()
    warmup: tuple[WarmupRequest, ...] = (WarmupRequest(),)
    scale: Scale | None = None


def load_spec(directory: Path, *, name: str | None = None) -> FunctionSpec:
    """Read DIRECTORY/function.toml; `name` takes the place of its own. Blocking.

    Raises InvalidInput that names file, line and key.
    """
    path = directory / FILE_NAME
    try:
        table = _Table.load(path)
    except FileNotFoundError:
        raise InvalidInput(
            f"there is no {path}", hint="name a directory with a function.toml in it"
        ) from None
    except OSError as error:
        raise InvalidInput(f"cannot read {path}", reason=str(error)) from None
    return table.function(directory, name)


class _Table(TomlTable):
    """A table of function.toml."""

    def function(self, directory: Path, name: str | None) -> FunctionSpec:
        self.only(
            *("name", "command", "port", "memory", "vcpus", "cwd"),
            *("files", "environment", "image", "warmup", "scale"),
        )
        given = self.text("name", "")
        if not name and not given:
            raise self.error("name", "a function needs a name", missing="name" not in self.values)
        image = self.table("image")
        base_warmup = image.words("warmup", ()) if image else ()
        return FunctionSpec(
            name=parse_name(name) if name else self.parsed("name", given, parse_name),
            command=self._command(),
            image=self._image(image, directory),
            files=self._files(directory),
            port=self._port(),
            memory_bytes=self._memory(),
            vcpus=self.number("vcpus", 1, 1, 32),
            cwd=self.absolute("cwd", self.text("cwd", "/app")),
            environment=self.pairs("environment"),
            base_warmup=base_warmup,
            warmup=self._warmups(directory),
            scale=self._scale(self.table("scale")),
        )

    def _command(self) -> tuple[str, ...]:
        command = self.words("command", None)
        if not command[0]:
            raise self.error("command", "the first word of command is a program")
        return command

    def _image(self, image: _Table | None, directory: Path) -> ImageSpec:
        if image is None:
            raise self.error("image", "there is no [image] table", missing=True)
        image.only("packages", "rootfs", "warmup")
        if ("packages" in image.values) == ("rootfs" in image.values):
            raise self.error("image", "[image] needs either packages or rootfs")
        if "packages" in image.values:
            packages = image.words("packages", None)
            for index, package in enumerate(packages):
                if not _PACKAGE.fullmatch(package):
                    raise image.error(
                        "packages", f"{package!r} is not a Debian package's name", sub=index
                    )
            return ImageSpec(packages=tuple(sorted(set(packages))))
        rootfs = image.inside("rootfs", directory, image.text("rootfs", ""))
        if not rootfs.is_dir():
            raise image.error("rootfs", f"{rootfs} is not a directory")
        return ImageSpec(rootfs=rootfs)

    def _files(self, directory: Path) -> tuple[AppFile, ...]:
        value = self.values.get("files", [])
        if not isinstance(value, list):
            raise self.error("files", "files must be a list")
        files: list[AppFile] = []
        for index, entry in enumerate(value):
            file = self._file(index, entry, directory)
            for other in files:
                if _clash(file, other):
                    raise self.error(
                        "files", f"{file.target} is also what {other.target} needs", sub=index
                    )
            files.append(file)
        return tuple(files)

    def _file(self, index: int, entry: Any, directory: Path) -> AppFile:  # noqa: ANN401
        if isinstance(entry, str):
            entry = {"source": entry}
        if not isinstance(entry, dict):
            raise self.error("files", "an entry is a path or {source, target}", sub=index)
        table = self.inner(entry, "files", index)
        table.only("source", "target")
        given = table.text("source", "")
        source = table.inside("source", directory, given)
        if not source.exists():
            raise table.error("source", f"there is no file {given!r} in {directory}")
        unfit = find_unfit(source, directory)
        if unfit:
            raise table.error("source", unfit)
        return AppFile(source, table._target(f"/app/{given}", is_dir=source.is_dir()))

    def _target(self, default: str, *, is_dir: bool) -> PurePosixPath:
        text = self.absolute("target", self.text("target", default))
        target = PurePosixPath("/", *(part for part in text.split("/") if part not in ("", ".")))
        if str(target) in ("/", "/app") and not is_dir:
            raise self.error("target", f"{text} is a directory, the source is a file")
        if target.parts[1:2] and target.parts[1] in _MOUNTED:
            raise self.error("target", f"the guest mounts /{target.parts[1]}: {text} is hidden")
        return target

    def _warmups(self, directory: Path) -> tuple[WarmupRequest, ...]:
        value = self.values.get("warmup")
        if value is None:
            return (WarmupRequest(),)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.error("warmup", "warmup must be a list of requests: [[warmup]]")
        tables = (self.inner(entry, "warmup", index) for index, entry in enumerate(value))
        return tuple(table._warmup(directory) for table in tables)

    def _warmup(self, directory: Path) -> WarmupRequest:
        self.only("method", "path", "headers", "body", "body_file")
        method = self.text("method", "GET")
        if method not in _METHODS:
            raise self.error("method", f"method must be one of {', '.join(_METHODS)}")
        path = self.absolute("path", self.text("path", "/"))
        if not re.fullmatch(r"[!-~]+", path):
            raise self.error("path", "path must be percent-encoded: no spaces, ASCII only")
        if "body" in self.values and "body_file" in self.values:
            raise self.error("body_file", "a request has either a body or a body_file")
        body: bytes | None = None
        if "body" in self.values:
            body = self.text("body", "").encode()
        if "body_file" in self.values:
            source = self.inside("body_file", directory, self.text("body_file", ""))
            if not source.is_file():
                raise self.error("body_file", f"there is no file {source}")
            body = source.read_bytes()
        return WarmupRequest(method, path, self._headers(), body)

    def _headers(self) -> tuple[tuple[str, str], ...]:
        pairs = self.pairs("headers")
        for name, text in pairs:
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or set(text) & set("\r\n"):
                raise self.error("headers", f"{name!r} cannot be a header", sub=name)
        return pairs

    def _scale(self, table: _Table | None) -> Scale | None:
        if table is None:
            return None
        table.only("concurrency", "min", "max", "idle", "deadline", "queue", "snapshot")
        usual = Scale()
        count = {
            key: table.number(key, getattr(usual, key), *SCALE_LIMITS[key])
            for key in ("concurrency", "min", "max", "queue")
        }
        if count["min"] > count["max"]:
            given = "min" if "min" in table.values else "max"
            raise table.error(
                given, f"min is {count['min']}, more than max, which is {count['max']}"
            )
        snapshot = table.text("snapshot", usual.snapshot)
        if snapshot not in _POLICIES:
            raise table.error("snapshot", f"snapshot must be one of {', '.join(_POLICIES)}")
        return Scale(
            **count,
            idle_ms=table._duration_ms("idle", usual.idle_ms),
            deadline_ms=table._duration_ms("deadline", usual.deadline_ms),
            snapshot=cast("SnapshotPolicy", snapshot),
        )

    def _duration_ms(self, key: str, default_ms: int) -> int:
        if key not in self.values:
            return default_ms
        value = self.values[key]
        if not isinstance(value, str) or value.strip()[-1:].isdecimal():
            raise self.error(key, f"{key} needs a unit", hint='write it like "30s" or "5m"')
        least, most = SCALE_LIMITS[f"{key}_ms"]
        milliseconds = round(self.parsed(key, value, parse_duration) * 1000)
        if not least <= milliseconds <= most:
            raise self.error(
                key,
                f"{key} must be from {format_duration(least / 1000)}"
                f" to {most // 3_600_000} h, not {value}",
            )
        return milliseconds

    def _port(self) -> int:
        port = self.number("port", 8080, 1, 65535)
        if port == _AGENT_PORT:
            raise self.error("port", f"port {port} is the agent's")
        return port

    def _memory(self) -> int:
        value = self.values.get("memory")
        if isinstance(value, int):
            raise self.error("memory", "memory needs a unit", hint='write it like "256MiB"')
        text = self.text("memory", "256MiB")
        size_bytes = self.parsed("memory", text, parse_size)
        # below 80 MiB the guest's kernel has no room to unpack itself and never speaks
        if not 96 * MiB <= size_bytes <= 64 * GiB or size_bytes % (2 * MiB):
            shown = format_size(size_bytes)
            raise self.error(
                "memory", f"memory must be a multiple of 2 MiB from 96 MiB to 64 GiB, not {shown}"
            )
        return size_bytes


def _clash(one: AppFile, other: AppFile) -> bool:
    """Whether two targets are the same, or one is a file where the other needs a directory."""
    if one.target == other.target:
        return True
    below = one.target in other.target.parents and one.source.is_file()
    return below or (other.target in one.target.parents and other.source.is_file())

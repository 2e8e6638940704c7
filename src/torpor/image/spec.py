"""function.toml: what a function is, checked at the edge, every error with its line."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from torpor.errors import InvalidInput, TorporError
from torpor.image.toml_lines import find_line
from torpor.units import GiB, MiB, format_size, parse_name, parse_size

FILE_NAME: Final = "function.toml"
_AGENT_PORT: Final = 1024
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


def load_spec(directory: Path, *, name: str | None = None) -> FunctionSpec:
    """Read DIRECTORY/function.toml; `name` takes the place of its own. Blocking.

    Raises InvalidInput that names file, line and key.
    """
    path = directory / FILE_NAME
    try:
        text = path.read_text()
        table = tomllib.loads(text)
    except FileNotFoundError:
        raise InvalidInput(
            f"there is no {path}", hint="name a directory with a function.toml in it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {path}", reason=str(error)) from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path} is not TOML", reason=str(error)) from None
    spec = _Table(path, text, table, ()).function(directory, name)
    return spec


class _Table:
    """One table of the file and where it is, for error messages."""

    def __init__(
        self, path: Path, text: str, values: dict[str, Any], where: tuple[str | int, ...]
    ) -> None:
        self._path, self._text, self._values, self._where = path, text, values, where

    def function(self, directory: Path, name: str | None) -> FunctionSpec:
        self._only(
            *("name", "command", "port", "memory", "vcpus", "cwd"),
            *("files", "environment", "image", "warmup"),
        )
        given = self._text_value("name", "")
        if not name and not given:
            raise self._error("name", "a function needs a name", missing=True)
        image = self._table("image")
        base_warmup = image.words("warmup", ()) if image else ()
        return FunctionSpec(
            name=self._parsed("name", name or given, lambda text: parse_name(text)),
            command=self.words("command", None),
            image=self._image(image, directory),
            files=self._files(directory),
            port=self._port(),
            memory_bytes=self._memory(),
            vcpus=self._number("vcpus", 1, 1, 32),
            cwd=self._absolute("cwd", self._text_value("cwd", "/app")),
            environment=self._pairs("environment"),
            base_warmup=base_warmup,
            warmup=self._warmups(directory),
        )

    def words(self, key: str, default: tuple[str, ...] | None) -> tuple[str, ...]:
        """A list of strings, not empty; without `default` the key must be there."""
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise self._error(key, f"{key} is missing", missing=True)
            return default
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self._error(key, f"{key} must be a list of strings")
        if not value or any("\0" in word for word in value):
            raise self._error(key, f"{key} must have at least one word and no NUL in any")
        return tuple(value)

    def _image(self, image: _Table | None, directory: Path) -> ImageSpec:
        if image is None:
            raise self._error("image", "there is no [image] table", missing=True)
        image._only("packages", "rootfs", "warmup")
        if ("packages" in image._values) == ("rootfs" in image._values):
            raise self._error("image", "[image] needs either packages or rootfs")
        if "packages" in image._values:
            packages = image.words("packages", None)
            for package in packages:
                if not package or not set(package) <= set(
                    "abcdefghijklmnopqrstuvwxyz0123456789+-.:"
                ):
                    raise image._error("packages", f"{package!r} is not a Debian package's name")
            return ImageSpec(packages=tuple(sorted(set(packages))))
        rootfs = image._inside("rootfs", directory, image._text_value("rootfs", ""))
        if not rootfs.is_dir():
            raise image._error("rootfs", f"{rootfs} is not a directory")
        return ImageSpec(rootfs=rootfs)

    def _files(self, directory: Path) -> tuple[AppFile, ...]:
        value = self._values.get("files", [])
        if not isinstance(value, list):
            raise self._error("files", "files must be a list")
        return tuple(self._file(index, entry, directory) for index, entry in enumerate(value))

    def _file(self, index: int, entry: Any, directory: Path) -> AppFile:  # noqa: ANN401
        if isinstance(entry, str):
            entry = {"source": entry}
        if not isinstance(entry, dict):
            raise self._error("files", "an entry of files is a path or {source, target}")
        table = _Table(self._path, self._text, entry, (*self._where, "files", index))
        table._only("source", "target")
        given = table._text_value("source", "")
        source = table._inside("source", directory, given)
        if not source.exists():
            raise table._error("source", f"there is no file {given!r} in {directory}")
        target = table._text_value("target", f"/app/{given}")
        return AppFile(source, PurePosixPath(table._absolute("target", target)))

    def _warmups(self, directory: Path) -> tuple[WarmupRequest, ...]:
        value = self._values.get("warmup")
        if value is None:
            return (WarmupRequest(),)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self._error("warmup", "warmup must be a list of requests: [[warmup]]")
        tables = (
            _Table(self._path, self._text, entry, (*self._where, "warmup", index))
            for index, entry in enumerate(value)
        )
        return tuple(table._warmup(directory) for table in tables)

    def _warmup(self, directory: Path) -> WarmupRequest:
        self._only("method", "path", "headers", "body", "body_file")
        method = self._text_value("method", "GET")
        if method not in _METHODS:
            raise self._error("method", f"method must be one of {', '.join(_METHODS)}")
        path = self._absolute("path", self._text_value("path", "/"))
        body: bytes | None = None
        if "body" in self._values:
            body = self._text_value("body", "").encode()
        if "body_file" in self._values:
            source = self._inside("body_file", directory, self._text_value("body_file", ""))
            if not source.is_file():
                raise self._error("body_file", f"there is no file {source}")
            body = source.read_bytes()
        return WarmupRequest(method, path, self._pairs("headers"), body)

    def _port(self) -> int:
        port = self._number("port", 8080, 1, 65535)
        if port == _AGENT_PORT:
            raise self._error("port", f"port {port} is the agent's")
        return port

    def _memory(self) -> int:
        text = self._text_value("memory", "256MiB")
        size_bytes: int = self._parsed("memory", text, parse_size)
        # below 80 MiB the guest's kernel has no room to unpack itself and never speaks
        if not 96 * MiB <= size_bytes <= 64 * GiB or size_bytes % (2 * MiB):
            shown = format_size(size_bytes)
            raise self._error(
                "memory", f"memory must be a multiple of 2 MiB from 96 MiB to 64 GiB, not {shown}"
            )
        return size_bytes

    def _pairs(self, key: str) -> tuple[tuple[str, str], ...]:
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            raise self._error(key, f"{key} must be a table of strings")
        for name, text in value.items():
            if not isinstance(text, str) or "\0" in text or not name or "=" in name:
                raise self._error(key, f"{key}.{name} must be a string", sub=name)
        return tuple(value.items())

    def _number(self, key: str, default: int, low: int, high: int) -> int:
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._error(key, f"{key} must be a whole number from {low} to {high}")
        return value

    def _text_value(self, key: str, default: str) -> str:
        value = self._values.get(key, default)
        if not isinstance(value, str) or "\0" in value:
            raise self._error(key, f"{key} must be a string, not {type(value).__name__}")
        return value

    def _absolute(self, key: str, text: str) -> str:
        if not text.startswith("/") or ".." in text.split("/"):
            raise self._error(key, f"{key} must be an absolute path without '..'")
        return text

    def _inside(self, key: str, directory: Path, text: str) -> Path:
        """A path below the function's directory that no link leads out of."""
        path = directory / text
        if not text or not path.resolve().is_relative_to(directory.resolve()):
            raise self._error(key, f"{text!r} is not inside {directory}")
        return path

    def _parsed(self, key: str, text: str, parse: Any) -> Any:  # noqa: ANN401
        try:
            return parse(text)
        except TorporError as error:
            raise self._error(key, error.message, hint=error.hint) from None

    def _table(self, key: str) -> _Table | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._error(key, f"{key} must be a table")
        return _Table(self._path, self._text, value, (*self._where, key))

    def _only(self, *known: str) -> None:
        for key in self._values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise self._error(key, f"unknown key {key!r}", hint=hint)

    def _error(
        self, key: str, message: str, *, hint: str = "", sub: str = "", missing: bool = False
    ) -> InvalidInput:
        where = (*self._where, key, *((sub,) if sub else ()))
        line = find_line(self._text, self._where if missing else where)
        return InvalidInput(f"{self._path}:{line}: {message}", hint=hint)

"""Settings: one table row gives the file key, the environment name, the parser, default and help.

Sources, the later wins: the default, the TOML file (`--config`, `TORPOR_CONFIG`, else
/etc/torpor/torpor.toml if it is there), the environment, command-line flags. The result is frozen;
a component takes the few fields it needs.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torpor.errors import InvalidInput, TorporError
from torpor.units import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULT_FILE = Path("/etc/torpor/torpor.toml")


def _row(default: Any, parse: Callable[[str], Any], help_text: str, *, secret: bool = False) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"parse": parse, "help": help_text, "secret": secret})


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidInput(f"not a whole number: {text!r}") from None


def _parse_count(text: str) -> int:
    count = _parse_int(text)
    if count < 1:
        raise InvalidInput(f"not a count: {text!r}", hint="use 1 or more")
    return count


def _parse_yes_no(text: str) -> bool:
    match text.lower():
        case "yes" | "true" | "1" | "on":
            return True
        case "no" | "false" | "0" | "off":
            return False
        case _:
            raise InvalidInput(f"neither yes nor no: {text!r}", hint="write yes or no")


def _parse_transfer(text: str) -> str:
    if text not in ("repository", "whole"):
        raise InvalidInput(f"not a way to transfer: {text!r}", hint="use repository or whole")
    return text


def _parse_one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise InvalidInput(f"not a choice: {text!r}", hint=f"use {', '.join(choices)}")
        return text

    return parse


def _parse_listen(text: str) -> str:
    host, separator, port = text.rpartition(":")
    if text and not (separator and host and port.isascii() and port.isdigit()):
        raise InvalidInput(f"not an address: {text!r}", hint="write it like 127.0.0.1:8080")
    return text


def _parse_otlp(text: str) -> str:
    if text and not text.startswith(("http://", "https://")):
        raise InvalidInput(
            f"not a collector's URL: {text!r}", hint="write it like http://127.0.0.1:4318/v1/traces"
        )
    return text


def _parse_token(text: str) -> str:
    if text and (len(text) < 16 or not text.isascii() or not text.isprintable() or " " in text):
        raise InvalidInput(
            "not a token", hint="use 16 or more printable ASCII characters without spaces"
        )
    return text


def _parse_level(text: str) -> int:
    level = _parse_int(text)
    if not 1 <= level <= 19:
        raise InvalidInput(f"not a zstd level: {text!r}", hint="use 1 (fast) to 19 (small)")
    return level


def _parse_accelerator(text: str) -> str:
    if text not in ("auto", "tcg", "kvm"):
        raise InvalidInput(f"not an accelerator: {text!r}", hint="use auto, tcg or kvm")
    return text


def _parse_vmm(text: str) -> str:
    if text not in ("auto", "qemu", "firecracker"):
        raise InvalidInput(f"not a VMM: {text!r}", hint="use auto, qemu or firecracker")
    return text


def _parse_cpu_model(text: str) -> str:
    # what is left of a host's own processor says nothing of other hosts
    named = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*(,-[a-z0-9._-]+)*)?", text)
    if not named or text.startswith(("host,", "max,")):
        raise InvalidInput(f"not a CPU model: {text!r}", hint="see `qemu-system-x86_64 -cpu help`")
    return text


@dataclass(frozen=True)
class Settings:
    """What one torpor process runs with. Sizes in bytes, durations in seconds."""

    home: Path = _row(
        Path("/var/lib/torpor"), Path, "the node's own state: snapshots, images, journal"
    )
    store: str = _row(
        "",
        str,
        "object store URL: file:///dir or s3://bucket/prefix; empty: a file store below home",
    )
    boot_dir: Path = _row(
        Path("/var/cache/torpor/boot"),
        Path,
        "kernel and initramfs that `torpor kernel install` made",
    )
    runtime_dir: Path = _row(
        Path("/run/torpor"), Path, "state of this host that all homes share: network slots, locks"
    )
    vmm: Literal["auto", "qemu", "firecracker"] = _row(
        "auto",
        _parse_vmm,
        "auto boots Firecracker where it and KVM are, else QEMU, and wakes snapshots of both",
    )
    qemu: str = _row("qemu-system-x86_64", str, "QEMU program")
    firecracker: str = _row("firecracker", str, "Firecracker program, 1.12 or later")
    jailer: str = _row(
        "jailer", str, "Firecracker's jailer, used where it is installed; empty: it is not"
    )
    accelerator: Literal["auto", "tcg", "kvm"] = _row(
        "auto", _parse_accelerator, "auto takes KVM where it runs guests, else TCG"
    )
    cpu_model: str = _row(
        "",
        _parse_cpu_model,
        "the processor that QEMU shows guests; empty: this host's, or with TCG all that it can;"
        " a model's name, less features or not, Skylake-Server-v4,-pcid: snapshots wake on all"
        " processors that have as much",
    )
    scratch_bytes: int = _row(1024**3, parse_size, "capacity of an instance's scratch disk")
    app_bytes: int = _row(64 * 1024**2, parse_size, "capacity of an app disk")
    net_pool: int = _row(0, _parse_int, "network slots kept ready when nothing uses them")
    boot_timeout_s: float = _row(
        60.0, parse_duration, "a VM's agent must answer within this, booted or woken"
    )
    start_timeout_s: float = _row(30.0, parse_duration, "a function must listen within this")
    request_timeout_s: float = _row(60.0, parse_duration, "a function must answer within this")
    key: str = _row(
        "", str, "domain key, as `torpor key init` writes it; empty: the key file", secret=True
    )
    key_file: str = _row("", str, "file with the domain keys, mode 0600; empty: key below home")
    plain: bool = _row(
        False,
        _parse_yes_no,
        "push in the clear, and pull what was: whoever reads the store reads the memory",
    )
    transfer: Literal["repository", "whole"] = _row(
        "repository", _parse_transfer, "repository: only what is new, sealed; whole: for comparison"
    )
    zstd_level: int = _row(
        3, _parse_level, "compression of chunks, 1 to 19; from 3 on working sets are densest"
    )
    lazy: bool = _row(
        True,
        _parse_yes_no,
        "wake what is only in the store while it arrives; no, or without FUSE: fetch it first",
    )
    cache_bytes: int = _row(2 * 1024**3, parse_size, "the pager's chunk cache on disk, at most")
    pager_deadline_s: float = _row(
        30.0, parse_duration, "an instance ends when a window cannot be had within this"
    )
    pager_stays: bool = _row(
        False, _parse_yes_no, "leave the pager running when nothing is open any more"
    )
    hydrate_bytes: int = _row(
        0, parse_size, "fetch up to so much of a woken snapshot's rest in the background"
    )
    hydrate_s: float = _row(300.0, parse_duration, "hydrate no longer than this")
    s3_endpoint: str = _row("", str, "S3 endpoint URL, for stores other than AWS")
    s3_region: str = _row("us-east-1", str, "S3 region")
    s3_access_key_id: str = _row("", str, "S3 key id; empty: AWS_* variables", secret=True)
    s3_secret_access_key: str = _row("", str, "S3 secret; empty: AWS_* variables", secret=True)
    store_timeout_s: float = _row(30.0, parse_duration, "deadline of one request to the store")
    store_retry_s: float = _row(
        20.0, parse_duration, "a request to the store that failed in passing is repeated this long"
    )
    store_ask_s: float = _row(
        3.0,
        parse_duration,
        "a wake of what the node has waits no longer than this for the store's word on the name",
    )
    store_concurrency: int = _row(8, _parse_int, "requests to the store at the same time")
    snapshots: Literal["off", "local", "remote"] = _row(
        "local",
        _parse_one_of("off", "local", "remote"),
        "off: functions are booted; local: woken from this node's snapshots; remote: the store is"
        " asked before each cold start, and gets what is deployed or snapshotted",
    )
    socket: str = _row("", str, "the daemon's Unix socket; empty: torpor.sock below home")
    api_listen: str = _row(
        "", _parse_listen, "HOST:PORT on which the daemon's API listens too; needs api_token"
    )
    api_token: str = _row("", _parse_token, "who asks the API over TCP must have it", secret=True)
    gateway_listen: str = _row(
        "127.0.0.1:8080", _parse_listen, "HOST:PORT that takes invocations; empty: none"
    )
    drain: Literal["leave", "snapshot"] = _row(
        "leave",
        _parse_one_of("leave", "snapshot"),
        "at SIGTERM the daemon leaves instances running, or snapshots and stops them",
    )
    drain_s: float = _row(
        30.0, parse_duration, "requests under way at SIGTERM may take this long to end"
    )
    upload_retry_s: float = _row(
        60.0, parse_duration, "an upload that failed is tried again after this, at the latest"
    )
    log_format: Literal["text", "json"] = _row(
        "text",
        _parse_one_of("text", "json"),
        "the daemon's log: key=value, or JSON a line",
    )
    otlp_endpoint: str = _row(
        "",
        _parse_otlp,
        "http://HOST:4318/v1/traces of an OpenTelemetry collector that gets spans of requests and"
        " cold starts; empty: none",
    )
    gateway_domain: str = _row(
        "localhost", str, "requests for <function>.<this domain> go to the function; empty: none"
    )
    gateway_wakes: int = _row(2, _parse_count, "wakes of the gateway at the same time")
    gateway_connections: int = _row(10_000, _parse_count, "clients of the gateway at most")
    gateway_head_bytes: int = _row(64 * 1024, parse_size, "a request's head has at most this")
    gateway_body_bytes: int = _row(16 * 1024**3, parse_size, "a request's body has at most this")
    gateway_header_timeout_s: float = _row(
        10.0, parse_duration, "a request's head must arrive within this"
    )
    gateway_keep_alive_s: float = _row(
        75.0, parse_duration, "a client may be silent between two requests this long"
    )

    def socket_path(self) -> Path:
        """The daemon's Unix socket."""
        return Path(self.socket) if self.socket else self.home / "torpor.sock"

    def store_url(self) -> str:
        """The store to use: the one set, else a file store below home."""
        return self.store or f"file://{self.home.absolute()}/store"


def env_name(key: str) -> str:
    """The environment variable of a setting: `home` -> `TORPOR_HOME`."""
    return f"TORPOR_{key.upper()}"


def load_settings(
    flags: Mapping[str, str | None] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Settings:
    """Settings from all sources. Raises InvalidInput that names source and key."""
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    path = file or (Path(environ["TORPOR_CONFIG"]) if environ.get("TORPOR_CONFIG") else None)
    if path is not None or DEFAULT_FILE.exists():
        values |= _from_file(path or DEFAULT_FILE)
    for row in fields(Settings):
        name = env_name(row.name)
        if environ.get(name):
            values[row.name] = _parse(row.name, environ[name], source=name)
    for key, text in (flags or {}).items():
        if text is not None:
            values[key] = _parse(key, text, source=f"--{key.replace('_', '-')}")
    return Settings(**values)


def describe_settings(settings: Settings) -> list[dict[str, str]]:
    """One row a setting: key, environment, default, value in force (secrets masked), help."""
    rows = []
    for row in fields(Settings):
        value = getattr(settings, row.name)
        shown = "***" if row.metadata["secret"] and value else str(value)
        rows.append(
            {
                "key": row.name,
                "environment": env_name(row.name),
                "default": _write(row.default),
                "value": shown,
                "help": row.metadata["help"],
            }
        )
    return rows


def _write(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidInput(f"cannot read the settings file {path}", reason=str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the settings file {path} is not TOML", reason=str(error)) from None
    return {key: _parse(key, str(value), source=f"{path}: {key}") for key, value in table.items()}


def _parse(key: str, text: str, *, source: str) -> Any:  # noqa: ANN401
    row = next((row for row in fields(Settings) if row.name == key), None)
    if row is None:
        known = ", ".join(row.name for row in fields(Settings))
        raise InvalidInput(f"unknown setting in {source}", hint=f"known settings: {known}")
    try:
        return row.metadata["parse"](text)
    except TorporError as error:
        raise InvalidInput(
            f"bad value in {source}", reason=error.message, hint=error.hint
        ) from None

"""How `setup_minio.sh local` runs its server: start, stop, restart, systemd, failures."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import obstore
import pytest

from fixtures.minio import BINARY
from fixtures.setup_minio import SetupMinio, bucket_of, is_running, require_programs, values_in
from torpor.config import load_settings
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.minio, pytest.mark.host]
READY_WITHIN_S = 90.0


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[SetupMinio]:
    """A home with nothing in it; whatever a test starts there is stopped."""
    require_programs()
    setup = SetupMinio(tmp_path / "home")
    yield setup
    setup.must("--stop")
    assert setup.pid is None


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Look until a condition holds."""
    deadline = time.monotonic() + READY_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.1)


def test_changed_setting_restarts_and_unfinished_uploads_go(fresh: SetupMinio) -> None:
    """A new setting restarts the server, keeps keys and data; an unfinished upload then expires."""
    first = fresh.must()
    pid = fresh.pid
    settings = load_settings(environ=values_in(first.stdout))
    open_store(settings).put("refs/kept", b"kept")
    writer = obstore.open_writer(
        bucket_of(values_in(first.stdout)), "prod/packs/half", buffer_size=5 * 1024**2
    )
    writer.write(b"x" * 12_000_000)
    parts = fresh.home / "data" / ".minio.sys" / "multipart"
    wait_for("the upload of the first part", lambda: bool(list(parts.rglob("part.1"))))
    del writer
    second = fresh.must("--stale-uploads", "1s", "--stale-interval", "1s")
    assert second.stdout == first.stdout
    assert "the server was started" in second.stderr
    assert fresh.pid not in (None, pid)
    wait_for("the removal of the unfinished upload", lambda: not list(parts.rglob("part.1")))
    assert open_store(settings).get("refs/kept", limit_bytes=10)[0] == b"kept"


def test_stop_and_start_again(fresh: SetupMinio) -> None:
    """--stop ends the server and is fine without one; the next run finds the data again."""
    key = values_in(fresh.must().stdout)
    open_store(load_settings(environ=key)).put("refs/one", b"1")
    pid = fresh.pid
    assert "the server was stopped" in fresh.must("--stop").stderr
    assert pid is not None
    assert not is_running(pid)
    assert "nothing changed" in fresh.must("--stop").stderr
    result = fresh.must()
    assert values_in(result.stdout) == key
    assert open_store(load_settings(environ=key)).get("refs/one", limit_bytes=10)[0] == b"1"


def test_reused_pid_is_nobodys_server(fresh: SetupMinio) -> None:
    """A pid file that names a living process with another start time stops nothing."""
    fresh.home.mkdir()
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        try:
            (fresh.home / "minio.pid").write_text(f"{stranger.pid} 1\n")
            assert "nothing changed" in fresh.must("--stop").stderr
            assert stranger.poll() is None
        finally:
            stranger.kill()
    (fresh.home / "minio.pid").unlink()


def test_dry_run_does_nothing(fresh: SetupMinio) -> None:
    """--dry-run names files, command and bucket, prints no secret, makes nothing."""
    result = fresh.must("--dry-run")
    assert f"would: write {fresh.home}/root.env (mode 600)" in result.stderr
    assert f"would: start {BINARY} server" in result.stderr
    assert "would: make sure of bucket torpor" in result.stderr
    assert result.stdout == ""
    assert not fresh.home.exists()


def test_taken_port_is_refused(fresh: SetupMinio) -> None:
    """A port that somebody listens on is named; no server is left, no pid file."""
    with socket.create_server(("127.0.0.1", fresh.port)):
        result = fresh.run()
    assert result.returncode == 1
    assert f'failed at "server": something else listens on 127.0.0.1:{fresh.port}' in result.stderr
    assert fresh.pid is None
    assert result.stdout == ""


def test_server_that_ends_at_once_is_reported(fresh: SetupMinio) -> None:
    """A server that cannot use its data fails the health step with its own words."""
    system = fresh.home / "data" / ".minio.sys"
    system.mkdir(parents=True)
    (system / "format.json").write_text("{}")
    result = fresh.run()
    assert result.returncode == 1
    assert 'failed at "health": the server ended' in result.stderr
    assert f"{fresh.home}/data: " in result.stderr.split("failed at")[0], "the server's words"
    assert fresh.pid is None


def test_two_runs_at_a_time(fresh: SetupMinio) -> None:
    """While one run works in a home, another is refused."""
    fresh.home.mkdir()
    holder = ["flock", str(fresh.home / ".lock"), "cat"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"locked\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"locked\n"
        result = fresh.run()
        process.stdin.close()
    assert result.returncode == 1
    assert 'failed at "directories": another setup_minio.sh is at work' in result.stderr
    assert not (fresh.home / "root.env").exists()


def test_damaged_secret_file_is_not_replaced(fresh: SetupMinio) -> None:
    """A password that cannot be read is an error, never a reason for a new one."""
    fresh.home.mkdir()
    (fresh.home / "root.env").write_text("MINIO_ROOT_USER=torpor-root\n")
    result = fresh.run()
    assert result.returncode == 1
    assert 'failed at "root password": ' in result.stderr
    assert "has no MINIO_ROOT_PASSWORD" in result.stderr
    assert (fresh.home / "root.env").read_text() == "MINIO_ROOT_USER=torpor-root\n"


@pytest.mark.parametrize(
    ("flags", "step", "words"),
    [
        (["--minio", "/nowhere/minio"], "programs", "/nowhere/minio is no program"),
        (["--mc", "/nowhere/mc"], "programs", "/nowhere/mc is no program"),
        (["--user", "nobody", "--systemd", "no"], "programs", "leave --user out"),
        (["--home", "/dev/null/home"], "directories", "/dev/null/home cannot be made"),
        (["--data", "/dev/null/data"], "server files", "/dev/null/data cannot be made"),
    ],
)
def test_each_failure_names_its_step(
    fresh: SetupMinio, flags: list[str], step: str, words: str
) -> None:
    """A step that fails is named with the reason; exit code 1, nothing for eval to read."""
    result = fresh.run(*flags)
    assert result.returncode == 1
    assert f'failed at "{step}": ' in result.stderr
    assert words in result.stderr
    assert result.stdout == ""
    assert fresh.pid is None


SYSTEMCTL = """#!/bin/bash
# What systemd would do with one unit, as far as the script asks for it.
set -eu
echo "$*" >>"$HOME/systemctl.log"
pid=$HOME/unit.pid
case $1 in
--quiet) [[ -f $pid ]] && kill -0 "$(<"$pid")" ;;
restart)
    set -a
    while IFS='=' read -r key value; do
        case $key in EnvironmentFile) . "$value" ;; ExecStart) start=$value ;; esac
    done <"$HOME/torpor-minio.service"
    cd "$HOME"
    setsid $start </dev/null >"$HOME/unit.log" 2>&1 9>&- &
    echo $! >"$pid"
    ;;
disable) kill "$(<"$pid")"; tail --pid="$(<"$pid")" -f /dev/null; rm "$pid" ;;
esac
"""


def put_in_path(directory: Path, systemctl: str) -> dict[str, str]:
    """An environment in which this script is what systemctl means."""
    directory.mkdir()
    (directory / "systemctl").write_text(systemctl)
    (directory / "systemctl").chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_systemd_runs_the_unit(fresh: SetupMinio, tmp_path: Path) -> None:
    """With systemd the unit is written, enabled and started once; its own words start MinIO on
    data that belongs to the unit's user."""
    fresh.home.mkdir()
    fresh.environ = put_in_path(tmp_path / "programs", SYSTEMCTL) | {
        "TORPOR_MINIO_SYSTEMD": "yes",
        "TORPOR_MINIO_UNIT": str(fresh.home / "torpor-minio.service"),
        "TORPOR_MINIO_USER": "daemon",
    }
    key = values_in(fresh.must().stdout)
    open_store(load_settings(environ=key)).put("refs/one", b"1")
    assert "nothing changed" in fresh.must().stderr
    assert {path.owner() for path in (fresh.home / "data", fresh.home / "certs")} == {"daemon"}
    asked = (fresh.home / "systemctl.log").read_text().splitlines()
    assert [line for line in asked if "is-active" not in line] == [
        "daemon-reload",
        "enable torpor-minio.service",
        "restart torpor-minio.service",
    ]
    pid = int((fresh.home / "unit.pid").read_text())
    assert "the server was stopped" in fresh.must("--stop").stderr
    assert not is_running(pid)


def test_unit_is_sound(fresh: SetupMinio) -> None:
    """The unit starts the server with its files, may write its data only, comes back after a
    crash; systemd's own checker, where there is one, finds nothing in it."""
    unit = fresh.home.parent / "torpor-minio.service"
    fresh.environ = put_in_path(fresh.home.parent / "programs", "#!/bin/sh\nexit 1\n")
    result = fresh.must("--dry-run", "--systemd", "yes", "--unit", str(unit), "--user", "daemon")
    text = result.stderr[result.stderr.index("[Unit]") : result.stderr.index("WantedBy")]
    text += "WantedBy=multi-user.target\n"
    lines = text.splitlines()
    start = next(line for line in lines if line.startswith("ExecStart="))
    assert start.startswith(f"ExecStart={BINARY} server ")
    assert start.endswith(f"--address 127.0.0.1:{fresh.port} {fresh.home}/data")
    for line in (
        f"EnvironmentFile={fresh.home}/root.env",
        f"EnvironmentFile={fresh.home}/server.env",
        f"ReadWritePaths={fresh.home}/data {fresh.home}/certs",
        "User=daemon",
        "Restart=on-failure",
        "ProtectSystem=strict",
        "NoNewPrivileges=yes",
    ):
        assert line in lines
    checker = shutil.which("systemd-analyze")
    if checker is not None:
        unit.write_text(text)
        checked = subprocess.run(
            [checker, "verify", "--man=no", "--recursive-errors=no", str(unit)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stderr
        assert "torpor-minio" not in checked.stderr, checked.stderr

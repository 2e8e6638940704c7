"""What the agent's requests do, through the client, on the real binary."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from torpor.errors import FunctionFailed, GuestFailed
from torpor.image.agent import Ending

if TYPE_CHECKING:
    from tests.unit.guest.conftest import RunningAgent

    from torpor.image.agent import AgentClient

LISTEN = (
    "import socket, sys, signal\n"
    "s = socket.socket(); s.bind((sys.argv[1], int(sys.argv[2]))); s.listen(); signal.pause()"
)


@pytest.fixture
def port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_run_tells_how_the_command_ended(agent: RunningAgent) -> None:
    """`run` gives the exit status, or the signal that killed the command."""
    with agent.client() as client:
        assert client.run(["true"], timeout_s=20) == Ending(status=0)
        assert client.run(["sh", "-c", "exit 7"], timeout_s=20) == Ending(status=7)
        assert client.run(["sh", "-c", "kill -9 $$"], timeout_s=20) == Ending(signal=9)


def test_run_passes_arguments_environment_and_directory(agent: RunningAgent) -> None:
    """Every byte of arguments and environment arrives; the output is the console's."""
    text = "a b=c%d\n\"'\\\x01é\udcff"
    script = 'printf "%s|%s|%s" "$1" "$V" "$PWD" > result'
    with agent.client() as client:
        client.run(
            ["sh", "-c", script, "sh", text], env={"V": text}, cwd=str(agent.root), timeout_s=20
        )
    expected = os.fsencode(f"{text}|{text}|{agent.root}")
    assert (agent.root / "result").read_bytes() == expected


def test_run_of_a_missing_program_is_the_functions_fault(agent: RunningAgent) -> None:
    """A program that is not there, or cannot be executed, is named with errno's text."""
    with agent.client() as client:
        with pytest.raises(FunctionFailed, match="/no/program: No such file"):
            client.run(["/no/program"], timeout_s=20)
        with pytest.raises(FunctionFailed, match="Permission denied"):
            client.run(["/etc/passwd"], timeout_s=20)
        with pytest.raises(FunctionFailed, match="directory /no/where: No such file"):
            client.run(["true"], cwd="/no/where", timeout_s=20)


def test_run_ends_what_it_started(agent: RunningAgent) -> None:
    """Processes that a command leaves in its group are gone after the command's end."""
    with agent.client() as client:
        client.run(["sh", "-c", "sleep 1000 & echo $! > pid"], timeout_s=20)
        sleeper = int((agent.root / "pid").read_text())
        try:
            descriptor = os.pidfd_open(sleeper)
        except ProcessLookupError:
            return
        assert select.select([descriptor], [], [], 20)[0]
        os.close(descriptor)


def test_started_function_has_port_and_environment(agent: RunningAgent, port: int) -> None:
    """The function sees PORT and its environment, and counts as listening once it does."""
    with agent.client() as client:
        pid = client.start(
            [
                sys.executable,
                "-c",
                "import os\nopen('port','w').write(os.environ['PORT'])\n"
                "import sys\nsys.argv=['', '0.0.0.0', os.environ['PORT']]\n" + LISTEN,
            ],
            env={"PORT": "1"},
            port=port,
        )
        client.await_listening(port, timeout_s=20)
        stats = client.stats()
        assert (stats.function, stats.pid, stats.ending) == ("running", pid, None)
        assert (agent.root / "port").read_text() == str(port)
        with pytest.raises(GuestFailed, match="started already"):
            client.start(["true"], port=port)
        with pytest.raises(GuestFailed, match="before start"):
            client.run(["true"], timeout_s=20)


@pytest.mark.parametrize("address", ["::", "0.0.0.0"])
def test_listeners_of_both_families_count(agent: RunningAgent, port: int, address: str) -> None:
    """A function may listen on the any-address of IPv4 or of IPv6."""
    family = "AF_INET6" if ":" in address else "AF_INET"
    script = LISTEN.replace("socket.socket()", f"socket.socket(socket.{family})")
    with agent.client() as client:
        client.start([sys.executable, "-c", script, address, str(port)], port=port)
        client.await_listening(port, timeout_s=20)


def test_function_that_cannot_be_executed(agent: RunningAgent) -> None:
    """`start` reports a failed exec by errno's text, and another start may follow."""
    with agent.client() as client:
        with pytest.raises(FunctionFailed, match="cannot execute /no/function: No such file"):
            client.start(["/no/function"], port=8080)
        assert client.stats().function == "none"
        assert client.start(["sleep", "1000"], port=8080) > 0


@pytest.mark.parametrize(
    ("script", "ending", "words"),
    [
        ("exit 3", Ending(status=3), "exited with status 3"),
        ("kill -TERM $$", Ending(signal=15), r"was killed by signal 15 \(SIGTERM\)"),
    ],
)
def test_function_that_exits(agent: RunningAgent, script: str, ending: Ending, words: str) -> None:
    """An exit before it listens ends `await` at once; stats and the console tell it, too."""
    with agent.client() as client:
        client.start(["sh", "-c", script], port=8080)
        with pytest.raises(FunctionFailed, match=words):
            client.await_listening(8080, timeout_s=100)
        stats = client.stats()
        assert (stats.function, stats.ending) == ("exited", ending)
    console = agent.end()
    assert [line for line in console.splitlines() if "function" in line] == [
        f"torpor: function {words}".replace("\\", "")
    ]


@pytest.mark.slow
def test_function_that_listens_on_loopback_only(agent: RunningAgent, port: int) -> None:
    """A listener that nobody outside can reach is named as such at the deadline."""
    with agent.client() as client:
        client.start([sys.executable, "-c", LISTEN, "127.0.0.1", str(port)], port=port)
        with pytest.raises(FunctionFailed, match=r"not on 0\.0\.0\.0"):
            client.await_listening(port, timeout_s=3)


def test_function_that_never_listens(agent: RunningAgent, port: int) -> None:
    """At the deadline `await` fails and names the port; the function runs on."""
    with agent.client() as client:
        client.start(["sleep", "1000"], port=port)
        with pytest.raises(FunctionFailed, match=f"nothing listens on port {port}"):
            client.await_listening(port, timeout_s=0.1)
        assert client.stats().function == "running"


def wake(client: AgentClient, hostname: str = "clone-1", instance_id: str = "id-1") -> None:
    client.wake(time_ns=1, entropy=bytes(64), hostname=hostname, instance_id=instance_id)


def test_clock_is_set_again(agent: RunningAgent) -> None:
    """Outside a VM it is left alone, as by `wake`; an agent that knows no such request says so."""
    with agent.client() as client:
        assert client.set_clock(time_ns=1)


def test_wake_writes_the_identity(agent: RunningAgent) -> None:
    """Instance id, host name and hosts entry are in the root; a second wake replaces them."""
    (agent.root / "etc").mkdir()
    (agent.root / "etc/hosts").write_text("127.0.0.1 localhost\n10.0.0.9 db")
    with agent.client() as client:
        wake(client)
        wake(client, hostname="clone-2", instance_id="id-2")
    assert (agent.root / "run/torpor/instance-id").read_text() == "id-2\n"
    assert (agent.root / "etc/hostname").read_text() == "clone-2\n"
    assert (agent.root / "etc/hosts").read_text() == (
        "127.0.0.1 localhost\n10.0.0.9 db\n172.16.0.2 clone-2 # torpor\n"
    )


def test_files_put_in_place_of_names_give_way(agent: RunningAgent) -> None:
    """What a hosts file says is kept; it may be a file, or a link that leads out or nowhere."""
    etc, of_this_host = agent.root / "etc", Path("/etc/hosts").read_bytes()
    with agent.client() as client:
        wake(client)
        for number, put in enumerate(("file", "link out", "dangling link")):
            for name in ("hosts", "hostname"):
                (etc / name).unlink()
            if put == "file":
                (etc / "hosts").write_text("127.0.0.1 localhost\n10.0.0.9 db\n")
            else:
                for name in ("hosts", "hostname"):
                    (etc / name).symlink_to("/etc/hosts" if put == "link out" else "nowhere")
            wake(client, hostname=f"clone-{number}")
            assert (etc / "hostname").read_text() == f"clone-{number}\n", put
            lines = (etc / "hosts").read_text().splitlines()
            assert lines[-1] == f"172.16.0.2 clone-{number} # torpor", put
            assert "10.0.0.9 db" in lines or put != "file"
    assert Path("/etc/hosts").read_bytes() == of_this_host


def test_nothing_among_the_names_is_followed_or_waited_for(agent: RunningAgent) -> None:
    """A pipe or a link where a name goes is replaced; what a link points to stays as it was."""
    names, outside = agent.root / "run/torpor", agent.root / "outside"
    outside.write_text("10.0.0.9 db\n")
    with agent.client() as client:
        for put in (os.mkfifo, lambda path: path.symlink_to(outside)):
            wake(client)
            for name in ("hosts", "hostname", ".hosts", ".hostname", ".instance-id"):
                (names / name).unlink(missing_ok=True)
                put(names / name)
            wake(client, hostname="clone-2", instance_id="id-2")
            assert (names / "instance-id").read_text() == "id-2\n"
            assert (agent.root / "etc/hostname").read_text() == "clone-2\n"
            assert "10.0.0.9 db" not in (agent.root / "etc/hosts").read_text()
    assert outside.read_text() == "10.0.0.9 db\n"


def test_names_that_cannot_be_written(agent: RunningAgent) -> None:
    """The wake fails and says why; the next one is right again."""
    (agent.root / "run/torpor/hostname").mkdir(parents=True)
    with agent.client() as client:
        with pytest.raises(GuestFailed, match="names in /run/torpor: Is a directory"):
            wake(client)
        (agent.root / "run/torpor/hostname").rmdir()
        wake(client)
    assert (agent.root / "etc/hostname").read_text() == "clone-1\n"


def write_hook(root: Path, name: str, script: str, mode: int = 0o755) -> None:
    hook = root / "etc/torpor/wake.d" / name
    hook.parent.mkdir(parents=True, exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{script}\n")
    hook.chmod(mode)


def test_hooks_run_in_name_order_before_the_reply(agent: RunningAgent) -> None:
    """Executables run one after the other with the instance id; other files are left alone."""
    for name in ("20-second", "10-first", "30-third"):
        write_hook(agent.root, name, f"echo {name} $TORPOR_INSTANCE_ID >> log")
    write_hook(agent.root, "15-plain", "echo plain >> log", mode=0o644)
    write_hook(agent.root, ".hidden", "echo hidden >> log")
    with agent.client() as client:
        wake(client)
    log = (agent.root / "log").read_text()
    assert log == "10-first id-1\n20-second id-1\n30-third id-1\n"


def test_failing_hook_is_named(agent: RunningAgent) -> None:
    """A hook that fails fails the wake, with its name and status; later hooks do not run."""
    write_hook(agent.root, "10-bad", "exit 4")
    write_hook(agent.root, "20-next", "touch ran")
    with agent.client() as client:
        with pytest.raises(FunctionFailed, match=r"wake\.d/10-bad exited with status 4"):
            wake(client)
        assert not (agent.root / "ran").exists()
        (agent.root / "etc/torpor/wake.d/10-bad").unlink()
        wake(client)
    assert (agent.root / "ran").exists()


@pytest.mark.slow
def test_hook_that_hangs_is_killed(agent: RunningAgent) -> None:
    """A hook has ten seconds; pings are answered meanwhile."""
    write_hook(agent.root, "10-slow", "sleep 1000")
    with agent.client() as client, agent.client() as other:
        failures: list[FunctionFailed] = []

        def hang() -> None:
            with pytest.raises(FunctionFailed, match="10-slow did not end within 10 s") as failed:
                wake(client)
            failures.append(failed.value)

        waking = threading.Thread(target=hang)
        waking.start()
        assert other.ping().protocol == 1
        waking.join(timeout=30)
        assert failures


def test_sync_and_stats(agent: RunningAgent) -> None:
    """`sync` succeeds; `stats` has plausible figures and no function."""
    with agent.client() as client:
        client.sync()
        stats = client.stats()
    assert stats.function == "none"
    assert stats.pid is stats.ending is None
    assert 0 < stats.memory_free_bytes < stats.memory_total_bytes
    assert stats.clock_ns > 1_600_000_000 * 10**9


@pytest.mark.parametrize("command", ["exec sleep 1000", "trap '' TERM; while :; do sleep 1; done"])
def test_stop_ends_the_function(agent: RunningAgent, command: str) -> None:
    """`stop` ends a function by SIGTERM, one that ignores it by SIGKILL; nothing starts after."""
    with agent.client() as client:
        client.start(["sh", "-c", command], port=8080)
        client.stop(timeout_s=0.5)
        assert client.stats().function == "exited"
        with pytest.raises(GuestFailed, match="stopping"):
            client.start(["true"], port=8080)

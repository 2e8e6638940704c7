"""Level 1: a VM under TCG that emulates SVM, in which KVM runs guests."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from kvm.disks import Job, find_built, make_run_disk, unpack_results
from torpor.host.tsc import measure_tsc_khz

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MEMORY = "3G"
RESULT_BYTES = 2 << 30
PULSE_S = 0.5
SILENT_S = 90.0
"""It answers each beat of the pulse port as soon as it has its processor: seconds at the most."""
_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr cryptomgr.notests"
    # code is translated anew for each address that it has
    " norandmaps"
    # a processor that halts misses interrupts that come while its guest runs, and sleeps for ever
    " idle=poll"
)

_ALWAYS = (
    ",+svm,+npt"
    ",-cx16"  # QEMU 7.2 emulates it wrong, and kernels use it
    # emulated, these cost more than they save: twice the time of all that is copied or hashed
    ",-smap,-la57,-erms,-avx,-avx2,-sse4.1,-sse4.2,-aes,-pclmulqdq"
)


class Level1:
    """One run from power-on to power-off; ended on exit, whatever happened.

    `on_output` gets what the job prints, `on_report` each message of the report port: both are
    called from threads of this object. `wait` returns when both have got everything. `processor` is
    a CPU model of QEMU's, to which SVM is added.

    QEMU's SVM can lose an interrupt: `helper_vmrun` and `do_vmexit` of its
    target/i386/tcg/sysemu/svm_helper.c change the word of requested interrupts without the lock
    under which devices set bits in it. If that was the timer, a kernel that has programmed it for
    one event waits for ever. The next interrupt of any device brings the lost one too, so level 1
    gets one every PULSE_S; a level 1 that does not answer them for SILENT_S has stopped for good.
    """

    def __init__(
        self,
        job: Job,
        work: Path,
        *,
        on_output: Callable[[bytes], object],
        on_report: Callable[[dict[str, Any]], object] = lambda message: None,
        processor: str = "max",
    ) -> None:
        self._job, self._work, self._processor = job, work, processor
        self._on_output, self._on_report = on_output, on_report
        self._threads: list[threading.Thread] = []
        self.process: subprocess.Popen[bytes] | None = None
        """QEMU, once this was entered."""
        self._ports: dict[str, socket.socket] = {}
        self._answered_at: float | None = None
        self.code: int | None = None
        """The exit code of the job once it ended; None if the VM ended before."""

    @property
    def is_silent(self) -> bool:
        """Whether its kernel has stopped: it answered the pulse once, and does no longer."""
        at = self._answered_at
        return at is not None and time.monotonic() - at > SILENT_S

    @property
    def console(self) -> str:
        """What QEMU has printed, and level 1's kernel and init."""
        paths = (self._work / "said", self._work / "console")
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def __enter__(self) -> Self:
        debian, python = find_built()
        run = make_run_disk(self._job, self._work)
        results = self._work / "results"
        with results.open("xb") as stream:
            stream.truncate(RESULT_BYTES)
        ports = {
            "output": self._read_output,
            "report": self._read_reports,
            "pulse": self._read_answers,
        }
        with contextlib.ExitStack() as stack:
            arguments, descriptors = [], []
            for name, reader in ports.items():
                ours, theirs = socket.socketpair()
                stack.enter_context(theirs)
                descriptors.append(theirs.fileno())
                arguments += _port(name, theirs.fileno())
                self._threads.append(threading.Thread(target=reader, args=(ours,), name=name))
                self._ports[name] = ours
            disks = [debian / "disk", python / "disk", run, results]
            command = [
                *("setpriv", "--pdeathsig", "KILL"),
                *_machine(debian, self._work / "console", self._processor),
                *(word for place, disk in enumerate(disks) for word in _disk(place, disk)),
                *arguments,
            ]
            said = stack.enter_context((self._work / "said").open("xb"))
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=descriptors
            )
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()

    def wait(self, timeout_s: float, *, cancelled: threading.Event | None = None) -> bool:
        """Whether the VM ended within the time, before the event and before it was silent."""
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            over = time.monotonic() > deadline or self.is_silent
            if over or (cancelled is not None and cancelled.is_set()):
                return False
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PULSE_S)
            with contextlib.suppress(OSError):  # it is full, because nobody reads; or QEMU is gone
                self._ports["pulse"].send(b"\n", socket.MSG_DONTWAIT)
        for thread in self._threads:
            thread.join()
        return True

    def fetch_files(self, target: Path) -> None:
        """Unpack what the job left in /rig/out; after a job that ended."""
        unpack_results(self._work / "results", target)

    def _read_output(self, port: socket.socket) -> None:
        with port:
            while data := _receive(port):
                self._on_output(data)

    def _read_answers(self, port: socket.socket) -> None:
        with port:
            while _receive(port):
                self._answered_at = time.monotonic()

    def _read_reports(self, port: socket.socket) -> None:
        rest = b""
        with port:
            while data := _receive(port):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if message.get("rig") == "ended":
                        self.code = message["code"]
                    self._on_report(message)


def _receive(port: socket.socket) -> bytes:
    try:
        return port.recv(1 << 16)
    except ConnectionResetError:  # QEMU was killed
        return b""


def _machine(debian: Path, console: Path, processor: str) -> list[str]:
    rate_khz = measure_tsc_khz()
    return [
        "qemu-system-x86_64",
        *("-M", "q35", "-cpu", processor + _ALWAYS, "-accel", "tcg,thread=single,tb-size=1024"),
        *("-smp", "1", "-m", MEMORY),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-kernel", str(debian / "vmlinuz"), "-initrd", str(debian / "initramfs")),
        *("-append", f"{_COMMAND_LINE} tsc_early_khz={rate_khz}"),
        *("-serial", f"file:{console}"),
        *("-object", "rng-random,id=entropy,filename=/dev/urandom"),
        *("-device", "virtio-rng-pci,rng=entropy", "-device", "virtio-serial-pci"),
    ]


def _disk(place: int, path: Path) -> list[str]:
    cache = "cache.no-flush=on,discard=unmap"
    flags = f"read-only={'on' if place < 2 else 'off'},{cache}"
    return [
        "-blockdev",
        f"driver=raw,node-name=disk{place},{flags},file.driver=file,file.filename={path},file.locking=off",
        *("-device", f"virtio-blk-pci,drive=disk{place}"),
    ]


def _port(name: str, descriptor: int) -> list[str]:
    return [
        *("-chardev", f"socket,id={name},fd={descriptor}"),
        *("-device", f"virtserialport,chardev={name},name={name}"),
    ]

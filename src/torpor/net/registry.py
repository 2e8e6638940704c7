"""Who has which slot on this host: one small file a slot, shared by all homes.

    RUNTIME/slots/lock      taken for every change of who has what
    RUNTIME/slots/<n>.json  {"slot", "home", "instance", "state", "owner": [pid, start ticks]}

`state` is preparing, free, used or removing. A slot is written down before it is made and
forgotten after it is gone, so that whatever a killed process leaves is found by its number. The
directory lies on a file system that a reboot empties, as the slots do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from torpor.errors import Damaged, HostUnfit, NotFound
from torpor.host.lock import exclusive
from torpor.host.netns import in_namespace
from torpor.host.process import ProcessId, run
from torpor.net.addresses import LAST_SLOT, SlotAddresses, addresses_of
from torpor.net.apply import apply_slot, remove_slot
from torpor.net.log_line import allocation_line, tap_line
from torpor.structs import prepared

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

log = logging.getLogger("torpor.net")

State = Literal["preparing", "free", "used", "removing"]

_LOCK_WAIT_S = 30.0


class SlotRecord(msgspec.Struct, frozen=True):
    """What the registry knows of a slot. `home` and `instance` are empty while it is free."""

    slot: int
    home: str
    instance: str
    state: State
    owner: tuple[int, int]

    def is_abandoned(self) -> bool:
        """Whether nobody will finish or give back this slot: a dead maker, a deleted home."""
        if self.state == "free" or ProcessId(*self.owner).is_alive():
            return False
        return self.state != "used" or not (Path(self.home).is_dir() or self._is_inhabited())

    def _is_inhabited(self) -> bool:
        namespace = addresses_of(self.slot)
        return namespace.namespace_path.exists() and bool(
            run(["ip", "netns", "pids", namespace.namespace]).strip()
        )


@dataclass(frozen=True)
class Slot:
    """A slot that exists on this host."""

    addresses: SlotAddresses

    @property
    def number(self) -> int:
        """The integer from which everything follows."""
        return self.addresses.number

    def connect(self, port: int, *, timeout_s: float) -> socket.socket:
        """A TCP connection to the guest from inside the namespace; usable from anywhere.

        Blocking; raises OSError (TimeoutError, ConnectionRefusedError).
        """
        guest = str(self.addresses.guest.ip)
        connection = in_namespace(
            self.addresses.namespace_path,
            lambda: socket.create_connection((guest, port), timeout=timeout_s),
        )
        connection.settimeout(None)
        return connection


class SlotRegistry:
    """The slots of this host. Blocking; safe from any thread and any number of processes."""

    def __init__(self, runtime_dir: Path, *, pool_size: int = 0, first: int = 0) -> None:
        """`pool_size` free slots are kept at release; numbers are given out from `first`."""
        self._directory = runtime_dir / "slots"
        self._pool_size = pool_size
        self._first = first
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise HostUnfit(
                f"cannot use {self._directory}",
                reason=str(error),
                hint="run as root, or set runtime_dir",
            ) from None

    def allocate(self, home: Path, instance_id: str) -> Slot:
        """A slot for an instance: a free one if there is one, else a new one.

        Raises HostUnfit; nothing is left of a slot that could not be made.
        """
        with self._locked():
            record = next((r for r in self._records() if r.state == "free"), None)
            ready = record is not None
            number = record.slot if record else self._unused()
            self._write(number, home, instance_id, "used" if ready else "preparing")
        if not ready:
            self._make(number)
            self._write(number, home, instance_id, "used")
        slot = Slot(addresses_of(number))
        log.debug(tap_line(slot.addresses))
        log.info(allocation_line(slot.addresses, instance_id))
        return slot

    def prepare(self, count: int) -> None:
        """Have at least `count` free slots."""
        while True:
            with self._locked():
                if sum(record.state == "free" for record in self._records()) >= count:
                    return
                number = self._unused()
                self._write(number, None, "", "preparing")
            self._make(number)
            self._write(number, None, "", "free")

    def prepare_more(self, count: int) -> None:
        """Have so many free slots more than there are: who takes them leaves others theirs."""
        self.prepare(self.count_free() + count)

    def get(self, number: int) -> Slot:
        """The slot of that number. Raises NotFound if nobody has it."""
        if self._read(number) is None:
            raise NotFound(
                f"network slot {number} is not in use", hint="`torpor net ls` lists them"
            )
        return Slot(addresses_of(number))

    def list(self) -> list[SlotRecord]:
        """All slots that are written down, by number."""
        with self._locked():
            return list(self._records())

    def release_instance(self, home: Path, instance_id: str) -> None:
        """Take back what an instance has: to the pool while that has room, else removed."""
        with self._locked():
            records = list(self._records())
        for record in records:
            if (record.home, record.instance) == (str(home.absolute()), instance_id):
                self._release(record)

    def reclaim(self, home: Path, alive: Collection[str]) -> None:
        """Remove slots of a home's instances that are not `alive`, and those of dead makers."""
        with self._locked():
            records = list(self._records())
        for record in records:
            lost = record.home == str(home.absolute()) and record.instance not in alive
            if record.is_abandoned() or (lost and not ProcessId(*record.owner).is_alive()):
                self._remove(record)

    def count_free(self) -> int:
        """How many free slots there are, all homes' pools being one."""
        return sum(record.state == "free" for record in self.list())

    def prune(self, *, keep: int = 0) -> int:
        """Remove free slots but for so many; how many were removed."""
        with self._locked():
            free = [record for record in self._records() if record.state == "free"]
        return sum(self._remove(record) for record in free[keep:])

    def _release(self, record: SlotRecord) -> None:
        with self._locked():
            free = sum(other.state == "free" for other in self._records())
            keep = record.state == "used" and free < self._pool_size
            if keep:
                self._forget_connections(record.slot)
                self._write(record.slot, None, "", "free")
        if not keep:
            self._remove(record)

    def _forget_connections(self, number: int) -> None:
        """A slot's next guest must not get packets of its last one."""
        path = addresses_of(number).namespace_path
        in_namespace(path, lambda: run(["conntrack", "-F"], timeout_s=20))

    def _make(self, number: int) -> None:
        try:
            apply_slot(addresses_of(number))
        except BaseException:
            self._path(number).unlink(missing_ok=True)
            raise

    def _remove(self, record: SlotRecord) -> bool:
        """Remove a slot unless somebody changed its record since it was read."""
        with self._locked():
            if self._read(record.slot) != record:
                return False
            home = Path(record.home) if record.home else None
            self._write(record.slot, home, record.instance, "removing")
        remove_slot(addresses_of(record.slot))
        self._path(record.slot).unlink(missing_ok=True)
        return True

    def _unused(self) -> int:
        taken = {record.slot for record in self._records()}
        for number in range(self._first, LAST_SLOT + 1):
            if number not in taken and not addresses_of(number).namespace_path.exists():
                return number
        raise HostUnfit("all network slots are in use", hint="stop some instances")

    def _records(self) -> Iterator[SlotRecord]:
        numbers = sorted(int(path.stem) for path in self._directory.glob("*.json"))
        for number in numbers:
            record = self._read(number)
            if record is not None:
                yield record

    def _read(self, number: int) -> SlotRecord | None:
        path = self._path(number)
        try:
            return msgspec.json.decode(path.read_bytes(), type=prepared(SlotRecord))
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise Damaged(f"{path} cannot be read", reason=str(error), hint="delete it") from None

    def _write(self, number: int, home: Path | None, instance_id: str, state: State) -> None:
        me = ProcessId.of(os.getpid())
        record = SlotRecord(
            slot=number,
            home=str(home.absolute()) if home else "",
            instance=instance_id,
            state=state,
            owner=(me.pid, me.start_ticks),
        )
        path = self._path(number)
        fresh = path.with_suffix(f".{me.pid}.new")
        fresh.write_bytes(msgspec.json.encode(record))
        fresh.rename(path)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number}.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with exclusive(
            self._directory / "lock", timeout_s=_LOCK_WAIT_S, what="this host's network slots"
        ):
            yield

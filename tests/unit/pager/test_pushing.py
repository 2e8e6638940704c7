"""Pushing: what is pushed is the snapshot, in order, after go, and a damaged segment ends it."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import TYPE_CHECKING

import pytest

from fixtures.paged import DOMAIN, Gate, Ranges, file_of, put_pack, window
from torpor.host.fuse.answers import encode_store
from torpor.host.fuse.files import Tree
from torpor.pager.kept import KeptCopies
from torpor.pager.pushing import Pusher, Room, WakeData
from torpor.snapshot.repository.records import WakeLink
from torpor.snapshot.repository.working_set import seal_segments
from torpor.snapshot.windows import WINDOW_BYTES, Touched
from torpor.store.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import MakeFetcher
    from torpor.host.fuse.files import Node
    from torpor.host.fuse.server import Server
    from torpor.pager.served import StoredFile

KEY = "snapshots/00/00/wake"
HEADER = b"the header of a wake object"
SIZES = {"memory": 400 * WINDOW_BYTES, "image": 3 * WINDOW_BYTES + 100}
TOUCHED = [
    Touched("memory", (7, 8, 9, 300, 2, 3)),
    Touched("image", (3, 0)),
    Touched("memory", tuple(range(100, 290))),
]


def content_of(name: str, number: int) -> bytes:
    """A window of a test's file."""
    seed = number if name == "memory" else 1000 + number
    return window(seed, min(WINDOW_BYTES, SIZES[name] - number * WINDOW_BYTES))


class PageCache:
    """Stands for the kernel behind a server: takes pages, knows in which order they came."""

    def __init__(self, unknown: tuple[str, ...] = ()) -> None:
        self.stored: list[tuple[str, int, bytes]] = []
        self.gone = False
        self._unknown = unknown
        self._lock = threading.Lock()

    def store(self, node: Node, offset: int, data: memoryview) -> None:
        """See Server."""
        encode_store(node, offset, [data])
        if node.name in self._unknown:
            raise FileNotFoundError
        if self.gone:
            raise OSError(22, "the mount has ended")
        with self._lock:
            self.stored.append((node.name, offset, bytes(data)))

    def windows(self, name: str) -> dict[int, bytes]:
        """What came of a file, by window."""
        found = {}
        for file, offset, data in self.stored:
            if file == name:
                for begin in range(0, len(data), WINDOW_BYTES):
                    found[(offset + begin) // WINDOW_BYTES] = data[begin : begin + WINDOW_BYTES]
        return found


class World:
    """A wake object in a store, the files that its working set is of, and a page cache."""

    def __init__(self, store: Ranges, fetcher: MakeFetcher, directory: Path) -> None:
        self.store, self.directory = store, directory
        self.cache = PageCache()
        tree = Tree()
        self.targets: dict[str, tuple[StoredFile, Node]] = {}
        for number, (name, size) in enumerate(SIZES.items()):
            entries = put_pack(store, number, {0: window(0)})
            file = file_of(entries, size, store=store, fetcher=fetcher())
            self.targets[name] = (file, tree.add([name], size_bytes=size))
        segments = list(seal_segments(DOMAIN, KEY, TOUCHED, read=content_of, origin=500, level=1))
        self.records = tuple(record for record, _ in segments)
        self.data = HEADER + bytes(500) + b"".join(sealed for _, sealed in segments)
        store.put(KEY, self.data)
        self.link = WakeLink(
            key=KEY, size_bytes=len(self.data), header_bytes=len(HEADER), hash=bytes(32)
        )
        self.kept = KeptCopies(directory, 100 << 20)

    def pusher(self, **options: object) -> Pusher:
        """A push that has begun."""
        server: Server = self.cache  # type: ignore[assignment]
        wake = WakeData(self.store, self.link, DOMAIN, self.records)
        arguments = {"kept": self.kept, "room": Room(), "mapped": threading.Event(), **options}
        pusher = Pusher(wake, server, self.targets, **arguments)  # type: ignore[arg-type]
        pusher.start()
        return pusher

    def push(self, **options: object) -> Pusher:
        """A push that has ended."""
        pusher = self.pusher(**options)
        pusher.mapped.set()
        assert pusher.wait(60)
        return pusher

    def is_complete(self) -> bool:
        """Whether all windows of the working set are in the page cache, and no others."""
        return all(
            self.cache.windows(name)
            == {
                number: content_of(name, number)
                for part in TOUCHED
                if part.file == name
                for number in part.windows
            }
            for name in SIZES
        )


@pytest.fixture
def world(store: Ranges, make_fetcher: MakeFetcher, tmp_path: Path) -> World:
    """A wake object that was never here."""
    return World(store, make_fetcher, tmp_path)


def test_the_working_set_arrives(world: World) -> None:
    """Every window comes with its bytes, a short last one too, and is counted for its file."""
    pusher = world.push()
    assert world.is_complete()
    total = sum(len(part.windows) for part in TOUCHED)
    assert (pusher.counters.windows, pusher.counters.failure) == (total, "")
    assert world.targets["image"][0].counters.pushed == 2
    assert pusher.counters.fetched_bytes == len(world.data) - len(HEADER) - 500
    assert pusher.counters.began_s <= pusher.counters.ended_s


def test_order_and_requests(world: World) -> None:
    """A small first request, then longer ones, back to back; every window is stored once."""
    world.push()
    asked = sorted((offset, length) for key, offset, length in world.store.asked if key == KEY)
    assert asked[0][0] == len(HEADER) + 500
    assert asked[0][1] <= 256 << 10
    assert all(length <= (2 << 20) + (64 << 10) for _, length in asked)
    assert [begin + length for begin, length in asked] == [
        *(begin for begin, _ in asked[1:]),
        len(world.data),
    ]
    small = [(name, offset // WINDOW_BYTES) for name, offset, data in world.cache.stored]
    small = [place for place in small if place[1] not in range(100, 290)]
    assert sorted(small) == [
        ("image", 0),
        ("image", 3),
        ("memory", 2),
        ("memory", 7),
        ("memory", 300),
    ]


@pytest.mark.parametrize("segments", [0, 1, 2, 3, None])
def test_what_came_with_the_header(world: World, segments: int | None) -> None:
    """Whole segments in the wake object's beginning are pushed, and kept, without a request."""
    ends = [len(HEADER) + record.offset + record.length for record in world.records]
    here = len(HEADER) + 500 if segments == 0 else ends[-1 if segments is None else segments - 1]
    cut = min(here + 100, len(world.data))  # of the next one only a part
    pusher = world.push(beginning=world.data[:cut])
    assert world.is_complete()
    asked = sorted((offset, length) for key, offset, length in world.store.asked if key == KEY)
    assert all(begin >= here for begin, _ in asked)
    assert sum(length for _, length in asked) == len(world.data) - here
    assert pusher.counters.fetched_bytes == len(world.data) - len(HEADER) - 500
    world.store.asked.clear()
    world.cache.stored.clear()
    world.push()
    assert world.store.asked == []
    assert world.is_complete()


def test_damage_in_the_beginning(world: World) -> None:
    """It ends the push as damage in the store does, and is not kept."""
    data = bytearray(world.data)
    data[world.records[0].offset + len(HEADER) + 50] ^= 1
    assert KEY in world.push(beginning=bytes(data)).counters.failure
    world.push()
    assert world.is_complete()


def test_nothing_before_what_it_comes_after(world: World) -> None:
    """A push that comes after something asks for nothing before that, and can be stopped."""
    pushers = [world.pusher(after=threading.Event()) for _ in range(2)]
    pushers[0].mapped.set()
    assert not pushers[0].wait(0.05)
    pushers[0].stop()
    assert pushers[0].wait(60)
    assert world.store.asked == []
    after = threading.Event()
    pusher = world.pusher(after=after)
    after.set()
    pusher.mapped.set()
    assert pusher.wait(60)
    assert world.is_complete()
    pushers[1].stop()


def test_nothing_before_go(world: World) -> None:
    """Fetching begins at once, storing when somebody has opened the files."""
    fetched = threading.Event()
    pusher = world.pusher(trace=lambda place: fetched.set() if place == "push fetched" else None)
    assert fetched.wait(60)
    assert world.cache.stored == []
    pusher.mapped.set()
    assert pusher.wait(60)
    assert world.is_complete()


def test_go_that_is_late(world: World) -> None:
    """While nobody says go, a push holds no room that others need; later it still is complete."""
    room = Room(1)
    late = world.pusher(room=room, patience_s=0.0)
    world.push(room=room)
    assert world.is_complete()
    world.cache.stored.clear()
    late.mapped.set()
    assert late.wait(60)
    assert world.is_complete()


def test_a_copy_stays_here(world: World) -> None:
    """The second push of a wake object asks nothing of the store."""
    world.push()
    world.store.asked.clear()
    world.cache.stored.clear()
    assert world.push().counters.fetched_bytes == 0
    assert world.store.asked == []
    assert world.is_complete()


@pytest.mark.parametrize("harm", ["flip", "cut", "hole"])
def test_a_damaged_copy_is_mended(world: World, harm: str) -> None:
    """What is wrong in this node's copy comes from the store and is right there again."""
    world.push()
    (copy,) = world.directory.iterdir()
    data = bytearray(copy.read_bytes())
    match harm:
        case "flip":
            data[len(data) // 2] ^= 1
        case "cut":
            del data[len(data) // 2 :]
        case "hole":
            data[510:600] = bytes(90)
    copy.write_bytes(data)
    world.cache.stored.clear()
    assert 0 < world.push().counters.fetched_bytes < len(world.data)
    assert world.is_complete()
    assert world.push().counters.fetched_bytes == 0


def test_without_a_place_for_copies(world: World) -> None:
    """A disk that takes no copy costs the copy alone."""
    world.kept = KeptCopies(world.directory / "nowhere", 0)
    world.push()
    assert world.is_complete()


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_damage_in_the_store(world: World, kind: str) -> None:
    """A segment that is not right ends the push, naming the object; nothing wrong is pushed."""
    world.store.inject(Fault("get_range", kind, key=KEY))  # type: ignore[arg-type]
    pusher = world.push()
    assert KEY in pusher.counters.failure
    for name in SIZES:
        for number, data in world.cache.windows(name).items():
            assert data == content_of(name, number)
    assert not world.is_complete()


def test_a_store_that_is_gone(world: World) -> None:
    """A push that cannot fetch ends with the reason; demand is not its business."""
    world.store.inject(Fault("get_range", "missing", key=KEY, times=None))
    assert KEY in world.push().counters.failure


def test_stop(world: World) -> None:
    """A push that is stopped ends, also one that nobody ever told to go."""
    pusher = world.pusher()
    pusher.stop()
    assert pusher.wait(60)
    assert world.cache.stored == []
    for copy in world.directory.iterdir():  # if it had begun already
        copy.unlink()
    gate = Gate()
    world.store.inject(gate.fault(KEY))
    pusher = world.pusher()
    gate.wait()
    pusher.mapped.set()
    pusher.stop()
    gate.open()
    assert pusher.wait(60)


def test_files_that_nobody_opened(world: World) -> None:
    """Pages of a file without a page cache are skipped and not counted; the others are stored."""
    world.cache = PageCache(unknown=("image",))
    pusher = world.push()
    assert pusher.counters.windows == sum(len(p.windows) for p in TOUCHED if p.file == "memory")
    assert pusher.counters.failure == ""


def test_files_that_are_not_served(world: World) -> None:
    """Segments of an image that the node has itself are left out."""
    del world.targets["image"]
    assert world.push().counters.failure == ""
    assert world.cache.windows("image") == {}


def test_the_mount_ends(world: World) -> None:
    """A push into a mount that has ended ends with that reason."""
    world.cache.gone = True
    assert "ended" in world.push().counters.failure


def copies(directory: Path) -> set[str]:
    """Names of the copies that are here."""
    return {path.name for path in directory.iterdir()}


def test_copies_are_bounded_together(tmp_path: Path) -> None:
    """Of too many copies those go that were used longest ago."""
    kept = KeptCopies(tmp_path, 3 << 20)
    use: Callable[[str], None] = kept.used
    for name in "abc":
        kept.write(name, 0, bytes(1 << 20))
        use(name)
    assert copies(tmp_path) == {"a", "b", "c"}
    use("a")
    kept.write("d", 0, bytes(1 << 20))
    use("d")
    assert copies(tmp_path) == {"c", "a", "d"}


def test_readers_wait_for_what_is_being_brought(world: World) -> None:
    """A window whose request has begun is not asked for again: readers have it from the push."""
    gate = Gate()
    world.store.inject(gate.fault(KEY, times=None))
    pusher = world.pusher()
    gate.wait()
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        file, _ = world.targets["memory"]
        first = threads.submit(file.read, 2 * WINDOW_BYTES, 2 * WINDOW_BYTES)
        whole = threads.submit(file.read, 6 * WINDOW_BYTES, 4 * WINDOW_BYTES)
        pusher.mapped.set()
        gate.open()
        assert b"".join(first.result(60)) == content_of("memory", 2) + content_of("memory", 3)
        expected = [bytes(WINDOW_BYTES), *(content_of("memory", number) for number in (7, 8, 9))]
        assert b"".join(whole.result(60)) == b"".join(expected)
    assert pusher.wait(60)
    assert set(world.store.keys) == {KEY}
    assert file.counters.awaited == 5
    assert (file.counters.store, file.counters.zero) == (0, 1)
    assert file.counters.stalled_s["awaited"] > 0
    assert file.expected.among(range(400)) == {}


@pytest.mark.parametrize("kind", ["flip", "hang"])
def test_readers_do_not_depend_on_a_push(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What a push does not bring, or not soon, is asked for like everything else."""
    monkeypatch.setattr("torpor.pager.served._EXPECT_S", 0.05)
    entries = put_pack(world.store, 7, {number: content_of("memory", number) for number in (2, 7)})
    file, node = world.targets["memory"]
    file = file_of(entries, file.size_bytes, store=world.store, fetcher=file.fetcher)
    world.targets["memory"] = (file, node)
    gate = Gate()
    fault = gate.fault(KEY, times=None)
    world.store.inject(fault if kind == "hang" else Fault("get_range", "flip", key=KEY, times=None))
    pusher = world.pusher()
    pusher.mapped.set()
    if kind == "hang":
        gate.wait()
    assert b"".join(file.read(2 * WINDOW_BYTES, WINDOW_BYTES)) == content_of("memory", 2)
    assert file.counters.store == 1
    gate.open()
    assert pusher.wait(60)
    assert b"".join(file.read(7 * WINDOW_BYTES, 10)) == content_of("memory", 7)[:10]

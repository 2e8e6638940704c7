"""How a snapshot comes to a node: found here, opened in the store for a lazy wake, or fetched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torpor.errors import HostUnfit
from torpor.host.cancel import in_thread
from torpor.node.paging import Coming

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.node.catalogue import Catalogue
    from torpor.node.exchange import Exchange
    from torpor.node.paging import Paging
    from torpor.node.parts import Parts
    from torpor.node.remote import Remote
    from torpor.node.timeline import Timeline
    from torpor.snapshot.local import LocalSnapshot
    from torpor.units import Digest


class Arrival:
    """A snapshot to be woken that may be on its way to this node. Belongs to one asyncio loop.

    `snapshot` is enough to start a VM: outline of the manifest, memory and images. Device state and
    disk are there after `complete`. The caller holds the files lock shared until then.
    """

    def __init__(self, coming: Coming, timeline: Timeline | None = None) -> None:
        self._coming = coming
        self._timeline = timeline
        self.snapshot = coming.snapshot

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing of the snapshot."""
        return self._timeline is None

    async def complete(self) -> LocalSnapshot:
        """The snapshot with all files to restore from. Raises what a pull raises."""
        if self._timeline is not None:
            with self._timeline.step("open"):
                self.snapshot = await in_thread(self._coming.complete)
            self._timeline = None
        return self.snapshot


class Arrivals:
    """What makes snapshots ready to be woken. The caller holds the files lock shared."""

    def __init__(
        self,
        parts: Parts,
        catalogue: Catalogue,
        exchange: Exchange,
        paging: Paging,
        remote: Remote,
    ) -> None:
        self._parts = parts
        self._catalogue = catalogue
        self._exchange = exchange
        self._paging = paging
        self._remote = remote

    async def begin(
        self, reference: str, timeline: Timeline, *, expect: Digest | None = None
    ) -> Arrival:
        """A snapshot by name or digest, from the store if need be.

        `timeline` gets the steps `open` or `pull`, when there is something to do. Raises what a
        pull raises.
        """
        here = None
        newer = await in_thread(self._remote.newer, reference)
        if newer is None:
            here = await in_thread(self._catalogue.find, reference, expect=expect)
        if here is None:
            ref = b"" if newer is None else newer.ref
            return await self._from_store(reference, timeline, expect, ref)
        if here.served is None:
            return Arrival(Coming.of(here))
        return await self._arrive(
            timeline,
            lazily=partial(self._paging.begin, here.digest, timeline=timeline),
            whole=partial(self._exchange.complete, here.digest),
        )

    async def _from_store(
        self, reference: str, timeline: Timeline, expect: Digest | None, ref: bytes
    ) -> Arrival:
        def pull() -> LocalSnapshot:
            return took(self._exchange.pull(reference, expect=expect)[0].snapshot)

        def begin() -> Coming:
            coming = self._exchange.begin(reference, expect=expect, timeline=timeline, ref=ref)
            return replace(coming, complete=lambda: took(coming.complete()))

        def took(snapshot: LocalSnapshot) -> LocalSnapshot:
            self._remote.took(reference, snapshot.digest)
            return snapshot

        return await self._arrive(timeline, lazily=begin, whole=pull)

    async def _arrive(
        self,
        timeline: Timeline,
        *,
        lazily: Callable[[], Coming],
        whole: Callable[[], LocalSnapshot],
    ) -> Arrival:
        """Opened in the store if wakes are lazy; fetched if they are not, and without FUSE."""
        settings = self._parts.settings
        if settings.lazy and settings.transfer == "repository":
            try:
                with timeline.step("open"):
                    return Arrival(await in_thread(lazily), timeline)
            except HostUnfit as error:
                self._parts.reporter.say(f"{error}: fetching the snapshot whole first")
        with timeline.step("pull"):
            return Arrival(Coming.of(await in_thread(whole)))

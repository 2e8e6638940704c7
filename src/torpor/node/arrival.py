"""How a snapshot comes to a node: found here, opened in the store for a lazy wake, or fetched."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torpor.errors import HostUnfit
from torpor.host.cancel import in_thread

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

    async def get(
        self, reference: str, timeline: Timeline, *, expect: Digest | None = None
    ) -> LocalSnapshot:
        """A snapshot by name or digest, with files to restore from.

        `timeline` gets the step `open` or `pull`, when there is something to do. Raises what a pull
        raises.
        """
        here = None
        if not await in_thread(self._remote.newer, reference):
            here = await in_thread(self._catalogue.find, reference, expect=expect)
        if here is None:
            fetched = await self._from_store(reference, timeline, expect)
            await in_thread(self._remote.took, reference, fetched.digest)
            return fetched
        if here.served is None:
            return here
        return await self._arrive(
            timeline,
            lazily=partial(self._paging.open, here.digest, timeline=timeline),
            whole=partial(self._exchange.complete, here.digest),
        )

    async def _from_store(
        self, reference: str, timeline: Timeline, expect: Digest | None
    ) -> LocalSnapshot:
        def pull() -> LocalSnapshot:
            return self._exchange.pull(reference, expect=expect)[0].snapshot

        open_it = partial(self._exchange.open, reference, expect=expect, timeline=timeline)
        return await self._arrive(timeline, lazily=open_it, whole=pull)

    async def _arrive(
        self,
        timeline: Timeline,
        *,
        lazily: Callable[[], LocalSnapshot],
        whole: Callable[[], LocalSnapshot],
    ) -> LocalSnapshot:
        """Opened in the store if wakes are lazy; fetched if they are not, and without FUSE."""
        settings = self._parts.settings
        if settings.lazy and settings.transfer == "repository":
            try:
                with timeline.step("open"):
                    return await in_thread(lazily)
            except HostUnfit as error:
                self._parts.reporter.say(f"{error}: fetching the snapshot whole first")
        with timeline.step("pull"):
            return await in_thread(whole)

"""A store that is far away: a real MinIO behind a shaped link, whose GETs come late."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from msgspec import structs

from torpor.bench.late import late_server
from torpor.bench.link import shaped_link
from torpor.bench.minio import minio_server
from torpor.bench.transfer import Job, Push, Target, perform
from torpor.bench.workspace import workspace
from torpor.snapshot.repository.keys import new_key_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torpor.bench.link import Link
    from torpor.bench.transfer import Way
    from torpor.config import Settings
    from torpor.snapshot.local import LocalSnapshot
    from torpor.units import Digest

DELAY_S: Final = 0.02
_MINIO_PORT: Final = 9000


@dataclass(frozen=True)
class FarStore:
    """A store behind a link: `target` is how nodes reach it, `near` is how it is filled."""

    directory: Path
    link: Link
    near: Target
    target: Target

    def settings(self, base: Settings, home: Path) -> Settings:
        """Settings of a node with a home of its own that wakes from this store."""
        return dataclasses.replace(
            base,
            home=home,
            store=self.target.url,
            s3_endpoint=self.target.endpoint,
            s3_access_key_id=self.target.user,
            s3_secret_access_key=self.target.password,
            key=self.target.key,
            lazy=True,
            pager_stays=True,
        )

    def push(
        self,
        snapshot: LocalSnapshot,
        images: Mapping[Digest, Path],
        *,
        base: LocalSnapshot | None,
        ref: str,
        way: Way = "repository",
    ) -> None:
        """Put a snapshot and its images into the store, beside the link. Blocking."""
        task = Push(
            snapshots=str(snapshot.directory.parent),
            digest=snapshot.digest,
            images={digest: str(path) for digest, path in images.items()},
            base=base.digest if base else None,
            ref=ref,
        )
        perform(Job(self.near, task, way), namespace=self.link.store_side)


@contextlib.contextmanager
def far_store(program: Path, home: Path) -> Iterator[FarStore]:
    """An empty far store, all of it gone after the body. Blocking. Raises HostUnfit."""
    with workspace(home) as work, contextlib.ExitStack() as stack:
        link = stack.enter_context(shaped_link(work.namespace_prefix))
        minio = stack.enter_context(
            minio_server(
                program,
                work.directory / "minio",
                namespace=link.store_side,
                address=link.store_address,
            )
        )
        late = stack.enter_context(
            late_server(
                work.directory,
                namespace=link.store_side,
                address=link.store_address,
                upstream_port=_MINIO_PORT,
                delay_s=DELAY_S,
            )
        )
        near = Target(minio.url("wake"), minio.endpoint, minio.user, minio.password, new_key_line())
        yield FarStore(work.directory, link, near, structs.replace(near, endpoint=late.endpoint))

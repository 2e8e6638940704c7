"""The functions that a benchmark pushes and pulls: deployed ones, or made-up ones without VMs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from torpor.bench.synthetic import Subject, SyntheticNode, guest_like
from torpor.host.cancel import in_thread
from torpor.image.spec import AppFile, load_spec
from torpor.node.invoke import Request, send_request
from torpor.vmm.interface import finish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from torpor.bench.arena import Sizes
    from torpor.image.spec import FunctionSpec
    from torpor.node.node import Node
    from torpor.snapshot.local import LocalSnapshot
    from torpor.snapshot.manifest import Scale

FUNCTIONS: Final = 10
_REQUESTS: Final = 2
_OWN_ENTRIES: Final = 4000
_RUN_WITH_OWN: Final = "import own, runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


@dataclass(frozen=True)
class Subjects:
    """Small functions on one image, and further generations of the first, each of the last."""

    functions: list[Subject]
    generations: list[Subject]
    made_of: str

    @classmethod
    def made_up(cls, directory: Path, sizes: Sizes, *, count: int = FUNCTIONS) -> Subjects:
        """Functions of made-up content that share nothing but their base."""
        node, content = SyntheticNode(directory), guest_like()
        image = node.make_image(1, size_bytes=sizes.image_bytes)
        base = node.make_base(
            image,
            memory_bytes=sizes.guest_bytes,
            data_bytes=sizes.base_bytes,
            content=content,
        )
        functions = [
            node.make_function(base, seed, written_bytes=sizes.written_bytes, content=content)
            for seed in range(1, count + 1)
        ]
        return cls(functions, [], "made-up content, no VM")

    def parameters(self) -> dict[str, Any]:
        """As a report's parameters."""
        manifest = self.functions[0].snapshot.manifest
        return {
            "functions": self.made_of,
            "function_memory_bytes": manifest.memory.size_bytes,
            "function_nonzero_bytes": manifest.memory.data_bytes,
        }


@contextlib.asynccontextmanager
async def subjects_of(
    node: Node,
    *,
    function: Path,
    generations: int,
    vms: bool,
    count: int = FUNCTIONS,
    scale: Scale | None = None,
) -> AsyncIterator[Subjects | None]:
    """`count` deployed variants of a function, gone after the body; None without `vms`.

    They scale as the function does, unless `scale` is given.
    Each generation is a restore of the last one, two requests, a snapshot.
    """
    if not vms:
        yield None
        return
    work = node.parts.settings.home / "bench-functions"
    names = [f"bench-{number}" for number in range(count)]
    later = [f"bench-generation-{number}" for number in range(1, generations + 1)]
    try:
        spec = await in_thread(load_spec, function)
        spec = dataclasses.replace(spec, scale=scale or spec.scale)
        first, further = [], []
        for number, name in enumerate(names):
            variant = await in_thread(_variant, spec, name, number, work / name)
            first.append((await node.deploy_spec(variant)).captured.snapshot)
        for parent, name in itertools.pairwise([names[0], *later]):
            node.parts.reporter.say(f"making {name}")
            further.append(await _next_generation(node, parent, name))
        root = first[0].manifest.parent
        assert root is not None
        base = await in_thread(node.parts.snapshots.get, root)
        yield Subjects(
            [_subject(node, snapshot, base) for snapshot in first],
            [_subject(node, snapshot, base) for snapshot in further],
            f"{count} deployed variants of {spec.name}",
        )
    finally:
        for name in later:
            if node.parts.journal.ref(name) is not None:
                await node.remove_snapshot(name)
        for name in names:
            if node.parts.journal.ref(name) is not None:
                await node.remove_function(name)
        await in_thread(shutil.rmtree, work, ignore_errors=True)


def _variant(spec: FunctionSpec, name: str, number: int, directory: Path) -> FunctionSpec:
    """The function under another name, with a module of its own that it imports, if Python."""
    directory.mkdir(parents=True, exist_ok=True)
    made = random.Random(number)
    table = {made.randbytes(8).hex(): made.randbytes(12).hex() for _ in range(_OWN_ENTRIES)}
    (directory / "own.py").write_text(f"TABLE = {table!r}\n")
    command, own = spec.command, AppFile(directory / "own.py", PurePosixPath("/app/own.py"))
    if command[:1] == ("python3",) and len(command) == 2:
        command = ("python3", "-c", _RUN_WITH_OWN, command[1])
    return dataclasses.replace(
        spec,
        name=name,
        command=command,
        files=(*spec.files, own),
        environment=(*spec.environment, ("PYTHONPATH", "/app")),
    )


async def _next_generation(node: Node, parent: str, name: str) -> LocalSnapshot:
    instance = await node.restore(parent)
    try:
        assert instance.function is not None
        for _ in range(_REQUESTS):
            await in_thread(
                send_request,
                instance.address,
                instance.function.port,
                Request(),
                timeout_s=node.parts.settings.request_timeout_s,
            )
        return (await node.create_snapshot(instance.id, name=name)).snapshot
    finally:
        await finish(node.instances.destroy(instance.id, vmm=instance.vmm))


def _subject(node: Node, snapshot: LocalSnapshot, base: LocalSnapshot) -> Subject:
    manifest = snapshot.manifest
    assert manifest.function is not None
    digests = (manifest.image, manifest.function.app)
    return Subject(snapshot, {digest: node.parts.images.path(digest) for digest in digests}, base)

"""From a directory to a function that can be woken: image -> base -> function -> snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import blake3
import msgspec

from torpor.errors import Conflict, Damaged, FunctionFailed, GuestFailed, InvalidInput, NotFound
from torpor.host.cancel import in_thread
from torpor.node.capture import Captured, capture
from torpor.node.invoke import Request, Response, send_request
from torpor.node.parts import log
from torpor.node.tables import Recipe, Recipes
from torpor.node.timeline import Timeline
from torpor.snapshot.manifest import Function, Machine

if TYPE_CHECKING:
    from torpor.image.library import ImageInfo
    from torpor.image.spec import FunctionSpec
    from torpor.node.instance import Instances
    from torpor.node.live import Instance
    from torpor.node.parts import Parts
    from torpor.node.trials import Trials
    from torpor.snapshot.local import LocalSnapshot
    from torpor.units import Digest

_WARMUP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Deployed:
    """What a deploy made: the function's snapshot and where the time went."""

    name: str
    revision: int
    captured: Captured
    timeline: Timeline
    base_reused: bool
    image_bytes: int


class Deployer:
    """Deploys functions on one node."""

    def __init__(self, parts: Parts, instances: Instances, trials: Trials) -> None:
        self._parts = parts
        self._instances = instances
        self._trials = trials

    async def deploy(self, spec: FunctionSpec, *, revision: int) -> Deployed:
        """Build, start, warm up and snapshot a function, and prove that the snapshot wakes.

        Raises InvalidInput, FunctionFailed with the console's last lines, and what booting and
        restoring raise. Nothing is left of a failed deploy but finished images and bases.
        """
        timeline = Timeline()
        say = self._parts.reporter.say
        with timeline.step("image"):
            image = await in_thread(self._parts.images.build, spec.image, progress=say)
        machine = self._machine(spec)
        with timeline.step("app"):
            app = await in_thread(
                self._parts.images.build_app, spec, capacity_bytes=machine.app_bytes
            )
        with timeline.step("base"):
            base, reused = await self._base(spec, image, machine)
        function = Function(spec.name, revision, spec.port, app.digest, spec.scale)
        say(f"starting {spec.name} over the base")
        with timeline.step("function"):
            captured = await self._function(spec, base, function, timeline)
        say("waking the snapshot twice: a proof, and a trial of what it touches")
        with timeline.step("proof"):
            await self._trials.run(captured.snapshot, lambda woken: self._warm(spec, woken))
        return Deployed(spec.name, revision, captured, timeline, reused, image.size_bytes)

    async def start_cold(self, spec: FunctionSpec, timeline: Timeline) -> Instance:
        """Boot the image with the app and start the function in it, without any snapshot.

        This is the cold start that torpor exists to avoid: the comparison of every benchmark.
        """
        image = await in_thread(
            self._parts.images.build, spec.image, progress=self._parts.reporter.say
        )
        machine = self._machine(spec)
        app = await in_thread(self._parts.images.build_app, spec, capacity_bytes=machine.app_bytes)
        path = self._parts.images.path(app.digest)
        instance = await self._instances.boot(
            machine, image.digest, app=path, label=spec.name, timeline=timeline
        )
        try:
            with timeline.step("function start"):
                await self._start(spec.name, spec.port, recipe_of(spec), instance)
        except BaseException:
            await self._instances.destroy(instance.id, vmm=instance.vmm)
            raise
        instance.function = Function(spec.name, 1, spec.port, app.digest, spec.scale)
        return instance

    async def start_booted(self, snapshot: LocalSnapshot, timeline: Timeline) -> Instance:
        """Boot the image of a function's snapshot and start the function, without its memory.

        Raises InvalidInput for what was not deployed here, and what `deploy` raises at its start.
        """
        manifest = snapshot.manifest
        function = manifest.function
        recipe = await in_thread(Recipes(self._parts.journal).get, snapshot.digest)
        if manifest.kind != "function" or function is None or recipe is None:
            raise InvalidInput(
                f"snapshot {snapshot.digest[:12]} cannot be booted",
                reason="only a function that was deployed on this node can",
                hint="deploy it here, or choose another setting than snapshots = off",
            )
        instance = await self._instances.boot(
            manifest.machine,
            manifest.image,
            app=self._parts.images.path(function.app),
            label=function.name,
            timeline=timeline,
            function=function,
            snapshot=snapshot.digest,
        )
        try:
            with timeline.step("function start"):
                await self._start(function.name, function.port, recipe, instance)
        except BaseException:
            await self._instances.destroy(instance.id, vmm=instance.vmm)
            raise
        instance.parent = snapshot  # for who reads it: nothing is captured through this object
        return instance

    def _machine(self, spec: FunctionSpec) -> Machine:
        settings = self._parts.settings
        return Machine(spec.memory_bytes, spec.vcpus, settings.scratch_bytes, settings.app_bytes)

    async def _base(
        self, spec: FunctionSpec, image: ImageInfo, machine: Machine
    ) -> tuple[LocalSnapshot, bool]:
        key = await in_thread(self._base_key, spec, image.digest, machine)
        known = self._parts.journal.bases().get(key)
        if known is not None:
            try:
                return await in_thread(self._parts.snapshots.get, known), True
            except (NotFound, Damaged) as error:
                log.warning("base is made again digest=%s error=%s", known, error)
                self._parts.journal.drop_base(known)
        self._parts.reporter.say("booting the image to make its base")
        instance = await self._instances.boot(machine, image.digest)
        try:
            await self._warm_base(spec, instance)
            captured = await capture(self._parts, instance, kind="base", function=None, then="stop")
        finally:
            await self._instances.destroy(instance.id, vmm=instance.vmm)
        self._parts.journal.set_base(key, captured.snapshot.digest)
        return captured.snapshot, False

    def _base_key(self, spec: FunctionSpec, image: Digest, machine: Machine) -> str:
        boot = self._parts.boot_files()
        platform = self._parts.driver.platform(boot.kernel_digest)
        parts = (image, machine, platform, boot.initramfs_digest, spec.base_warmup)
        return blake3.blake3(msgspec.json.encode(parts, order="sorted")).hexdigest()

    async def _warm_base(self, spec: FunctionSpec, instance: Instance) -> None:
        if not spec.base_warmup:
            return
        ended = await instance.with_agent(
            lambda agent: agent.run(spec.base_warmup, timeout_s=_WARMUP_TIMEOUT_S),
            timeout_s=_WARMUP_TIMEOUT_S,
        )
        if not ended.succeeded:
            raise FunctionFailed(
                f"the base warm-up command failed with {ended}",
                reason=instance.last_words(),
                hint="run it on the image by hand, or leave it out of [image]",
            )

    async def _function(
        self, spec: FunctionSpec, base: LocalSnapshot, function: Function, timeline: Timeline
    ) -> Captured:
        app = self._parts.images.path(function.app)
        instance = await self._instances.restore(base, app=app, label=spec.name)
        try:
            with timeline.step("function start"):
                await self._start(spec.name, spec.port, recipe_of(spec), instance)
            with timeline.step("warm-up"):
                await self._warm(spec, instance)
            return await capture(
                self._parts, instance, kind="function", function=function, then="stop"
            )
        finally:
            await self._instances.destroy(instance.id, vmm=instance.vmm)

    async def _start(self, name: str, port: int, recipe: Recipe, instance: Instance) -> None:
        timeout_s = self._parts.settings.start_timeout_s
        try:
            await instance.with_agent(
                lambda agent: agent.start(
                    recipe.command, env=dict(recipe.environment), cwd=recipe.cwd, port=port
                ),
                timeout_s=timeout_s,
            )
            await instance.with_agent(
                lambda agent: agent.await_listening(port, timeout_s=timeout_s),
                timeout_s=timeout_s + 10,
            )
        except (FunctionFailed, GuestFailed) as error:
            raise FunctionFailed(
                f"{name} did not start",
                reason=f"{error}\n{instance.last_words()}".strip(),
                hint=error.hint or "see its console above; command and port are in function.toml",
            ) from None

    async def _warm(self, spec: FunctionSpec, instance: Instance) -> list[Response]:
        answers = []
        for warm in spec.warmup:
            request = Request(warm.method, warm.path, tuple(warm.headers), warm.body)
            answer = await self._ask(spec, instance, request)
            if answer.status >= 500:
                raise FunctionFailed(
                    f"{spec.name} answered its warm-up {warm.method} {warm.path} with"
                    f" {answer.status} {answer.reason}",
                    reason=instance.last_words(),
                )
            answers.append(answer)
        return answers

    async def _ask(self, spec: FunctionSpec, instance: Instance, request: Request) -> Response:
        try:
            return await in_thread(
                send_request,
                instance.address,
                spec.port,
                request,
                timeout_s=self._parts.settings.request_timeout_s,
            )
        except FunctionFailed as error:
            raise FunctionFailed(
                f"{spec.name} failed at its warm-up", reason=f"{error}\n{instance.last_words()}"
            ) from None


def recipe_of(spec: FunctionSpec) -> Recipe:
    """What is needed to start a function again when its directory is not there any more."""
    return Recipe(spec.command, spec.environment, spec.cwd)


def next_revision(parts: Parts, name: str) -> int:
    """Counted from the last one, as far as that can still be read. Blocking. Raises Conflict."""
    known = parts.journal.ref(name)
    if known is None:
        return 1
    try:
        snapshot = parts.snapshots.get(known.digest)
    except (NotFound, Damaged) as error:  # to deploy again is what mends it
        log.warning("revision begins again name=%s error=%s", name, error)
        return 1
    return _function_of(snapshot, name).revision + 1


def _function_of(snapshot: LocalSnapshot, name: str) -> Function:
    function = snapshot.manifest.function
    if function is None or snapshot.manifest.kind != "function":
        raise Conflict(
            f"{name!r} is the name of a snapshot, not of a function",
            hint="deploy under another name, or remove it with `torpor snapshot rm`",
        )
    return function

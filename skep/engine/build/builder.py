"""Runs Dockerfiles stage by stage and step by step.  Each step results in an image.

If a step already ran on the same image, its result comes from the cache (``cache``).  An instruction that changes only
the configuration produces an image at once.  COPY writes into an overlay on the stage's layers.  RUN runs in a
container of the engine.

Source: moby 20.10, builder/dockerfile (builder.go, evaluator.go, dispatchers.go, internals.go).
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from skep.aio.clock import Clock
from skep.aio.race import afterwards
from skep.aio.slots import Slots
from skep.engine.build import emulation, runs
from skep.engine.build.addresses import redacted, shown_errors
from skep.engine.build.bases import Bases
from skep.engine.build.cache.cache import CacheMounts, StepCache
from skep.engine.build.cache.results import Results, StepChange, options_of
from skep.engine.build.cache.step_records import inline_cache
from skep.engine.build.dockerfile import targets
from skep.engine.build.dockerfile.config import (
    BuildArguments,
    StageArguments,
    adapted,
    begun,
    changed,
    command_of_step,
    expanded,
    line_of_change,
    line_of_copy,
    line_of_run,
    variables_of,
)
from skep.engine.build.dockerfile.dockerfile import parse
from skep.engine.build.dockerfile.instructions import (
    Arg,
    Copy,
    Env,
    From,
    Healthcheck,
    Instruction,
    Run,
    Stage,
    Stages,
    Workdir,
    stages_of,
    trigger_of,
)
from skep.engine.build.dockerfile.mounts import parse_mount
from skep.engine.build.dockerfile.substitution import Budget, substituted
from skep.engine.build.files import copies
from skep.engine.build.files.context import KnownContext, KnownContexts
from skep.engine.build.files.remotes import KnownAnswers
from skep.engine.build.files.repositories import Fetching
from skep.engine.build.files.sources import digest_of
from skep.engine.build.inputs import Inputs
from skep.engine.build.interface import (
    BuildRequest,
    BuildResult,
    Builds,
    BuildStep,
    OpenContext,
    Progress,
    Provider,
)
from skep.engine.build.stage import (
    Changes,
    MountedTree,
    StagePosition,
    StepImage,
    in_thread,
    lower_directories,
    mounted_image,
    new_work,
)
from skep.engine.containers.container import StandardStream
from skep.engine.engine import Engine
from skep.engine.images import child
from skep.engine.images.digest import Digest
from skep.engine.images.image import ContainerDefaults, Image, ImageConfig
from skep.engine.images.platforms import ImagePlatform, best_for, best_platform, platform_in
from skep.engine.images.reference import Reference
from skep.errors import FailedPrecondition, InvalidArgument, SkepError
from skep.model.values.ids import new_container_id

SCRATCH = "scratch"
BUILDS_MAX = 16
"""Number of simultaneous builds.  Further ones wait."""
WAITING_MAX = 64
"""Number of waiting builds.  Further ones are refused."""
_PLAIN_CHARACTERS_MAX = 4096
"""Shorter instructions without variables are expanded without a thread, because starting a thread would take longer."""


class Builder(Builds):
    """All builds of one node."""

    def __init__(
        self, engine: Engine, directory: Path, clock: Clock, mounts: CacheMounts | None = None
    ) -> None:
        """``directory``: Has the data that is kept between builds.  ``mounts``: Its cache mounts, by default new."""
        self.engine = engine
        self.images = engine.images
        self.containers = runs.StepContainers(engine)
        self.steps = StepCache(directory / "steps.json", engine.images)
        self.mounts = mounts if mounts is not None else CacheMounts(directory / "mounts")
        self.contexts = KnownContexts()
        self.answers = KnownAnswers()
        self.clock = clock
        self.slots = Slots(BUILDS_MAX, WAITING_MAX, "builds are at work on this node")

    def env_of(self, name: str) -> Sequence[str] | None:
        """See ``Builds``."""
        found = self.images.lookup(name)
        return found.config.defaults.env or () if found is not None else None

    async def build(
        self,
        request: BuildRequest,
        context: OpenContext,
        progress: Progress,
        provider: Provider | None = None,
    ) -> BuildResult:
        """Build an image and tag it, in a slot.

        Cancellation ends the build's container and keeps only completed steps.

        Raises: SkepError: in Docker's words; nothing was tagged.
        """
        async with self.slots.hold():
            return await self.build_in_slot(request, context, progress, provider)

    async def name_index(self, ids: Sequence[Digest], tags: Sequence[Reference]) -> Digest:
        """See ``Builds``."""
        images = [self.images.get(id) for id in ids]
        here = best_for(images, best_platform()) or images[0]
        await self.images.name_index(ids, tags, here.id)
        return here.id

    async def build_in_slot(
        self,
        request: BuildRequest,
        context: OpenContext,
        progress: Progress,
        provider: Provider | None = None,
        known: KnownContext | None = None,
    ) -> BuildResult:
        """Build for a caller that already holds a slot.

        ``known``: Remembered content of the context.  The context is opened only if a step needs more.
        """
        with shown_errors():
            parsed = await asyncio.to_thread(parse, request.dockerfile)
            stages = targets.chosen(await asyncio.to_thread(stages_of, parsed), request)
            targets.wanted_platform(request.platform)
        async with AsyncExitStack() as stack:
            workspace = await stack.enter_async_context(self.images.workspace("build"))
            build = Build(self, request, stages, Inputs(context, provider, known), progress, workspace, stack)
            async with afterwards(self.steps.save):
                return await build.run(parsed.warnings)


class Build:
    """One build."""

    def __init__(
        self,
        builder: Builder,
        request: BuildRequest,
        stages: Stages,
        inputs: Inputs,
        progress: Progress,
        workspace: Path,
        stack: AsyncExitStack,
    ) -> None:
        self._builder = builder
        self._images = builder.images
        self._request = request
        self._inputs = inputs
        self._progress = progress
        self._workspace = workspace
        self._stack = stack
        self._bases = Bases(builder.images, request, inputs, progress, stack)
        self._platform = targets.wanted_platform(request.platform)
        automatic: Mapping[str, str] = {}
        if request.is_buildkit:
            automatic = targets.automatic_arguments(stages, request.target, request.platform)
        self._arguments = BuildArguments(request.arguments, automatic, is_buildkit=request.is_buildkit)
        self._budget = Budget()
        self._stages = stages
        self._scopes: dict[int, tuple[StageArguments, int]] = {}
        """Arguments of completed stages, with the number of history entries that their base images had."""
        self._platforms: dict[int, ImagePlatform | None] = {}
        """Platforms of completed stages."""
        self._done: dict[int, StepImage | None] = {}
        self._stage = 0
        self._steps = 0
        self._areas = 0
        self._results = Results(self._bases, builder.steps, builder.clock)

    async def run(self, warnings: Sequence[str]) -> BuildResult:
        """Carry out every step that the target needs."""
        stages = self._stages
        for text in warnings:
            self._progress.warning(BuildStep(number=0, total=stages.steps, text=""), text)
        if not self._request.is_buildkit:
            targets.require_distinct_names(stages)
        for arg in stages.arguments:
            step = self._next_step(arg)
            self._progress.started(step)
            ready = await self._expand(arg, self._arguments.of_stages)
            assert isinstance(ready, Arg), "expanding keeps the type"
            for name, value in ready.pairs:
                self._arguments.declare(name, value, before_stages=True)
            self._progress.finished(step, None)
        known = dict(self._arguments.of_stages)
        needed = await asyncio.to_thread(targets.carried_out, stages, self._request, known, self._budget)
        for number, stage in enumerate(stages.stages):
            if number in needed:
                await self._run_stage(number, stage)
            else:
                self._steps += 1 + len(stage.instructions)
        made, records = self._results.position.image, tuple(self._results.records.values())
        if made is None:
            raise FailedPrecondition("No image was generated. Is your Dockerfile empty?")
        made = await self._bases.limit_times(made, self._results.inherited, self._arguments.of_stages)
        if self._request.inline_cache:
            made = await self._bases.add_cache(made, inline_cache(records, made.link, made.config.diff_ids))
        await self._images.add(made.content, self._request.tags)
        self._images.announce("create", made.id, made.id)
        for tag in self._request.tags:
            self._images.announce("tag", made.id, tag.familiar)
        return BuildResult(
            image_id=made.id, unused_arguments=self._arguments.unused, records=records, last=made.link
        )

    def _next_step(self, instruction: Instruction) -> BuildStep:
        self._steps += 1
        stage = self._stages.stages[self._stage]
        return BuildStep(
            number=self._steps,
            total=self._stages.steps,
            text=redacted(instruction.text),
            stage=self._stage,
            stage_name=stage.base.name,
        )

    async def _run_stage(self, number: int, stage: Stage) -> None:
        self._stage = number
        without = stage.base.name.lower() in self._request.stages_without_cache
        self._results.begin_stage(uses_cache=self._request.use_cache and not without)
        await self._run_step(stage.base)
        for instruction in stage.instructions:
            await self._run_step(instruction)
        self._done[number] = self._results.position.image
        self._scopes[number] = self._arguments.stage, self._results.inherited
        self._platforms[number] = self._results.platform

    async def _run_stage_apart(self, number: int) -> None:
        """Run a stage that only a trigger of the current stage's base image uses."""
        place, results = (self._stage, self._steps, self._arguments.stage), self._results.place
        self._steps = self._stages.steps_before(number)
        await self._run_stage(number, self._stages.stages[number])
        self._stage, self._steps, self._arguments.stage = place
        self._results.place = results

    async def _run_step(self, instruction: Instruction) -> None:
        step = self._next_step(instruction)
        self._progress.started(step)
        try:
            with shown_errors():
                if isinstance(instruction, From):
                    await self._begin_stage(step, instruction)
                else:
                    await self._carry_out(step, instruction)
        except Exception as error:
            self._progress.failed(step, error)
            raise
        self._progress.finished(step, self._results.position.image_id)

    # --- FROM -----------------------------------------------------------------------------------------------------

    async def _begin_stage(self, step: BuildStep, base: From) -> None:
        arguments = dict(self._arguments.of_stages)
        self._results.platform = self._platform
        if base.platform:
            platform = await self._substitute(base.platform, arguments)
            if not platform:
                raise InvalidArgument(f"empty platform value from expression {base.platform}")
            self._results.platform = targets.wanted_platform(platform)
        name = await self._substitute(base.base, arguments)
        if not name:
            raise InvalidArgument(f"base name ({base.base}) should not be blank")
        if targets.context_name(name) in self._request.directories:
            await self._begin_with_directory(step, name)
            return
        index = self._stages.index(name, before=self._stage) if not name.isdigit() else None
        is_stage = index is not None and targets.context_name(name) not in self._request.images
        made = await self._stage_or_image(step, name, is_base=True)
        defaults = made.config.defaults if made is not None else self._options_of_scratch()
        inherited, self._results.inherited = (
            None,
            child.history_length(made.content) if made is not None else 0,
        )
        if is_stage and index in self._scopes:
            inherited, self._results.inherited = self._scopes[index]
            self._results.platform = self._platforms[index]
        self._arguments.begin_stage(inherited, defaults.env or ())
        state = begun(defaults)
        triggers = state.config.on_build or ()
        state = msgspec.structs.replace(state, config=msgspec.structs.replace(state.config, on_build=None))
        self._results.position = StagePosition(state=state, image=made)
        if triggers:
            plural = "s" if len(triggers) > 1 else ""
            text = f"# Executing {len(triggers)} build trigger{plural}\n"
            self._progress.output(step, StandardStream.STDOUT, text.encode())
        for trigger in triggers:
            await self._carry_out(step, trigger_of(trigger))

    def _options_of_scratch(self) -> ContainerDefaults:
        """Return the options of a stage without a base image.  BuildKit sets the working directory."""
        return ContainerDefaults(working_dir="/" if self._request.is_buildkit else "")

    async def _begin_with_directory(self, step: BuildStep, name: str) -> None:
        """Start a stage on a named context that is a directory: an image with these files only."""
        self._arguments.begin_stage()
        self._results.inherited = 0
        self._results.position = StagePosition(state=begun(self._options_of_scratch()), image=None)
        text = f"COPY --from={name} / /"
        await self._copy(step, Copy(text=text, keyword="COPY", sources=("/",), destination="/", origin=name))

    async def _stage_or_image(self, step: BuildStep, name: str, *, is_base: bool = False) -> StepImage | None:
        """Return the image of a stage, or a pulled image.  None for ``scratch``.

        ``is_base``: Whether FROM names it.  In FROM, a number is an image, and only earlier stages are known.
        """
        if image := self._request.images.get(targets.context_name(name)):
            return await self._bases.pull(step, image, self._results.platform)
        index = None
        if not is_base or not name.isdigit():
            index = self._stages.index(name, before=self._stage if is_base else None)
        if index is not None:
            if index < self._stage and index not in self._done:
                await self._run_stage_apart(index)
            if index in self._done:
                return self._done[index]
            if index == self._stage:
                raise InvalidArgument(f"invalid from flag value {name}: refers to current build stage")
            if self._request.is_buildkit:
                raise InvalidArgument(f"stage {name} needs to be defined before the present stage")
        elif not is_base and name.isascii() and name.isdigit():
            raise InvalidArgument(f"invalid from flag value {name}: index out of bounds")
        if name == SCRATCH:
            return None
        return await self._bases.pull(step, name, self._results.platform)

    # --- the other instructions -----------------------------------------------------------------------------------

    async def _carry_out(self, step: BuildStep, instruction: Instruction) -> None:
        state = self._results.state
        visible = self._arguments.visible(state.config.env or ())
        ready = await self._expand(instruction, variables_of(state, visible))
        match ready:
            case Run():
                await self._run(step, ready, visible)
            case Copy():
                await self._copy(step, ready)
            case _:
                if isinstance(ready, Arg):
                    for name, value in ready.pairs:
                        self._arguments.declare(name, value)
                if isinstance(ready, Workdir) and not ready.path and self._request.is_buildkit:
                    ready = msgspec.structs.replace(ready, path=".")  # the classic builder refuses it
                if isinstance(ready, Env):
                    self._arguments.hide(name for name, _ in ready.pairs)
                if isinstance(ready, Healthcheck) and state.config.healthcheck is not None:
                    old = state.config.healthcheck.test
                    if old and old[0] != "NONE":
                        text = f"Note: overriding previous HEALTHCHECK: [{' '.join(old)}]\n"
                        self._progress.output(step, StandardStream.STDOUT, text.encode())
                await self._change(step, ready)

    async def _expand(self, instruction: Instruction, variables: Mapping[str, str]) -> Instruction:
        given, text = self._request.arguments, instruction.text
        if "$" not in text and not instruction.heredocs and len(text) <= _PLAIN_CHARACTERS_MAX:
            return expanded(instruction, variables, self._stages.escape, self._budget, given)
        # In a thread: patterns in substitutions may take seconds of computation.
        return await asyncio.to_thread(
            expanded, instruction, variables, self._stages.escape, self._budget, given
        )

    async def _substitute(self, word: str, variables: Mapping[str, str]) -> str:
        return await asyncio.to_thread(substituted, word, variables, self._stages.escape, self._budget)

    async def _change(self, step: BuildStep, instruction: Instruction) -> None:
        """Carry out an instruction that changes the configuration.  WORKDIR also creates its directory."""
        before = self._results.state
        state, comment = changed(before, instruction)
        state = adapted(state, before, instruction, is_buildkit=self._request.is_buildkit)
        is_workdir = isinstance(instruction, Workdir)
        words = (f"#(nop) {comment}",) if is_workdir else ("#(nop) ", comment)
        container = options_of(msgspec.structs.replace(state.config, cmd=(*state.shell, *words)))
        line = line_of_change(instruction, comment) if self._request.is_buildkit else None
        change = self._results.change(state, container, line, adds_layer=None if is_workdir else False)
        if await self._results.take_cached(step, change):
            return
        id = new_container_id()  # Docker creates a container here. This id only stands for it in the output.
        self._progress.running(step, id)
        if is_workdir and (changes := await self._make_directory(state.config)) is not None:
            await self._results.commit_changes(change, changes.upper)
        else:
            await self._results.commit(change)
        self._progress.removed(step, id)

    async def _make_directory(self, config: ContainerDefaults) -> Changes | None:
        changes = self._changes()
        work = new_work(self._images, self._workspace)
        user = config.user if self._request.is_buildkit else ""
        is_new = await in_thread(work, partial(copies.make_directory, changes, config.working_dir, user))
        return changes if is_new else None

    async def _copy(self, step: BuildStep, copy: Copy) -> None:
        """Carry out COPY or ADD."""
        state, is_buildkit = self._results.state, self._request.is_buildkit
        copies.check_copy(copy, is_buildkit=is_buildkit)
        known = self._inputs.known if len(copies.local_sources(copy)) == len(copy.sources) > 0 else None
        known = None if copy.origin else known
        if known is not None and self._results.may_be_cached:
            digest = known.digest(copy.sources, is_add=copy.is_add)
            if digest and await self._results.take_cached(step, self._change_of_copy(copy, digest)):
                return
        fetching = Fetching(self._images.limits, self._builder.answers, self._inputs.provider, self._area)
        remotes = fetching.remotes(copy)
        async with AsyncExitStack() as stack:
            if remotes and len(remotes) == len(copy.sources) and self._results.may_be_cached:
                digest = digest_of([await remote.resolve() for remote in remotes.values()])
                if await self._results.take_cached(step, self._change_of_copy(copy, digest)):
                    return
            root = None
            if copies.local_sources(copy):
                tree = self._tree_of(step, copy.origin) if copy.origin else None
                root = (await stack.enter_async_context(tree)).root if tree else await self._inputs.context()
            fetched = {name: await remote.fetch() for name, remote in remotes.items()}
            prepared = await copies.prepare(
                self._images, copy, root, self._workspace, fetched, is_buildkit=is_buildkit
            )
            digest = digest_of([one.digest for one in prepared.sources]) or "inline"
            if known is not None:
                known.note(copy.sources, digest, is_add=copy.is_add)
            change = self._change_of_copy(copy, digest)
            if await self._results.take_cached(step, change):
                return
            directory = state.config.working_dir
            target = copies.target_of(copy, directory, self._changes(), self._area(), is_buildkit=is_buildkit)
            await copies.perform(self._images, copy, prepared, target)
            await self._results.commit_changes(change, target.changes.upper)

    def _change_of_copy(self, copy: Copy, digest: str) -> StepChange:
        """Return the step of a COPY or ADD whose sources have this digest."""
        state = self._results.state
        config = msgspec.structs.replace(
            state.config, cmd=(*state.shell, f"#(nop) {copies.shown_copy(copy, digest)}")
        )
        line = line_of_copy(copy) if self._request.is_buildkit else None
        more = copies.key_of_options(copy)
        return self._results.change(state, options_of(config), line, *more, adds_layer=True)

    @asynccontextmanager
    async def _tree_of(self, step: BuildStep, origin: str) -> AsyncIterator[MountedTree]:
        """Mount the file system of a named context, a stage or an image."""
        if (directory := await self._inputs.open_named(self._request, origin)) is not None:
            yield MountedTree(directory)
            return
        try:
            made = await self._stage_or_image(step, origin)
        except SkepError as error:
            text = str(error)
            prefix = f"invalid from flag value {origin}: "
            raise type(error)(text if text.startswith(prefix) else prefix + text) from error
        changes = Changes(self._area(), lower_directories(self._images, made))
        async with mounted_image(changes, new_work(self._images, self._workspace)) as root:
            yield MountedTree(root, changes.layers)

    async def _run(self, step: BuildStep, run: Run, visible: Mapping[str, str]) -> None:
        """Carry out RUN."""
        state = self._results.state
        if self._results.position.image is None:
            raise InvalidArgument("Please provide a source image with `from` prior to run")
        if run.flags and not self._request.is_buildkit:
            raise InvalidArgument(copies.NEEDS_BUILDKIT.format(run.flags[0]))
        network = runs.network_of(run, has_host_network=self._request.has_host_network)
        command, script = runs.command_of(run, state.shell)
        shown = command_of_step(command, self._arguments, visible)
        container = options_of(msgspec.structs.replace(state.config, cmd=shown, entrypoint=None))
        variables = variables_of(state, visible)
        words = (*state.shell, *command) if script else command
        line = line_of_run(words, self._arguments.stage.declared, variables)
        expand = partial(substituted, variables=variables, escape=self._stages.escape, budget=self._budget)
        mounts = [await asyncio.to_thread(parse_mount, text, expand) for text in run.mounts]
        async with AsyncExitStack() as stack:
            sources = runs.MountSources(
                stack,
                runs.Areas(self._area, self._builder.containers.users),
                self._builder.mounts,
                self._request.cache_namespace,
                self._inputs,
                self._images,
                partial(self._tree_of, step),
            )
            extras = (*run.mounts, run.network, script, *await sources.find(mounts))
            change = self._results.change(
                state,
                container,
                line if self._request.is_buildkit else None,
                *(extras if any(extras) else ()),
            )
            if await self._results.take_cached(step, change):
                return
            env = {**visible, **self._arguments.proxies}
            prepared = await sources.prepare(command, script, env, mounts, state.config.working_dir)
            prepared = msgspec.structs.replace(prepared, network=network)
            await self._run_command(step, prepared, change)

    async def _run_command(self, step: BuildStep, prepared: runs.PreparedRun, change: StepChange) -> None:
        config = msgspec.structs.replace(change.state.config, healthcheck=None)
        if self._request.is_buildkit:  # BuildKit mounts no volumes in a step
            config = msgspec.structs.replace(config, volumes=None)
        position = self._results.position.image
        assert position is not None, "RUN on scratch is refused"
        await asyncio.to_thread(_require_runnable, position.config)
        image = Image(id=position.id, config=msgspec.structs.replace(position.config, config=config))
        containers = self._builder.containers
        async with containers.create(image, self._request, prepared) as container:
            self._progress.running(step, container.id)
            missing = await asyncio.to_thread(containers.missing_targets, container, prepared.mounts)
            output, is_buildkit = partial(self._progress.output, step), self._request.is_buildkit
            await containers.run(container, prepared, output, is_buildkit=is_buildkit)
            upper = await containers.changes_of(container, missing)
            await self._results.commit_changes(change, upper, without=runs.MADE_BY_THE_RUNTIME)
        self._progress.removed(step, container.id)

    def _area(self) -> Path:
        """Create an empty directory."""
        self._areas += 1
        area = self._workspace / f"{self._areas}"
        area.mkdir(mode=0o700)
        return area

    def _changes(self) -> Changes:
        return Changes(self._area(), lower_directories(self._images, self._results.position.image))


def _require_runnable(config: ImageConfig) -> None:
    """Check that this machine runs the programs of an image.  Raises: FailedPrecondition."""
    if config.architecture:
        emulation.require_runnable(platform_in(config), emulation.read_emulators())

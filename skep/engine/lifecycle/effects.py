"""The effects in the life of a container: on files, mounts, networks, processes and events.

Each effect is idempotent, so that the next node process can repeat it.  A cancellation interrupts only the effects in
``machine.INTERRUPTIBLE``.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any, TypeAlias

from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.failures import describe_error, retry
from skep.aio.race import LostRace
from skep.engine.containers import health
from skep.engine.containers.attachment import WaitingClients
from skep.engine.containers.container import Container, ContainerState, NotRunning
from skep.engine.containers.shared_namespaces import shared_by
from skep.engine.containers.state import ContainerStore
from skep.engine.events import NamedNetwork
from skep.engine.lifecycle import life_events, network_rules
from skep.engine.lifecycle.background import Background
from skep.engine.lifecycle.container_locks import ForcedRemovals
from skep.engine.lifecycle.life_events import LifeEvent
from skep.engine.lifecycle.machine import INTERRUPTIBLE, Effect
from skep.engine.networks.networking import Networking, endpoint_network, publish_networks, sandbox_config
from skep.engine.runtime import machine_files, runtime_spec
from skep.engine.runtime.conmon import StartError, resize_terminal
from skep.engine.runtime.mapped_mounts import ViewMounts
from skep.engine.runtime.runtime import Runtime
from skep.engine.volumes.volumes import Volumes
from skep.errors import FailedPrecondition, SkepError
from skep.model.values.ids import ContainerId
from skep.model.values.times import Timestamp, timestamp
from skep.tracing import within

_RUNS = ("running", "paused", "stopped")
"""The runtime's states of a container whose command was started."""


class Program:
    """The effects that follow one event, in progress."""

    def __init__(self, container: Container, cause: LifeEvent, held: AsyncExitStack) -> None:
        """``cause`` is the first event.  ``held`` has the resources to release at the end."""
        self.id = container.id
        self.before = self.last = container
        """The record before the first event (``before``) and after the latest one (``last``)."""
        self.cause = self.event = cause
        """The first event (``cause``) and the latest one (``event``)."""
        self.held = held
        self.todo = deque[Effect | LifeEvent]()
        """The next effects and events."""
        self.fails: type[life_events.EffectFailed] | None = None
        self.error: BaseException | None = None
        """The first failure.  All further effects clean up."""
        self.shared = runtime_spec.NOTHING_SHARED

    @property
    def may_be_interrupted(self) -> bool:
        """Whether a cancellation interrupts the next effect.  Cleaning up is never interrupted."""
        return self.error is None and self.todo[0] in INTERRUPTIBLE

    @property
    def secret_env(self) -> tuple[str, ...]:
        """Variables of this run, which no record contains."""
        return self.cause.secret_env if isinstance(self.cause, life_events.Start) else ()

    @property
    def by_policy(self) -> bool:
        """Whether the restart policy starts the container."""
        return isinstance(self.cause, life_events.Start) and self.cause.by_policy

    def failure(self, kind: type[life_events.EffectFailed], error: BaseException) -> life_events.EffectFailed:
        """Return the event of a failed effect."""
        return kind(
            reason=describe_error(error),
            exit_code=error.exit_code if isinstance(error, StartError) else 128,
            is_cancelled=isinstance(error, asyncio.CancelledError),
            by_policy=self.by_policy,
            old_name=self.before.name,
        )


Action: TypeAlias = Callable[[Container, Program], Awaitable[LifeEvent | None]]
"""Carries out an effect on a container.  Returns the event that it reports."""


class Effects:
    """Carries out effects, except the driver's own."""

    def __init__(
        self, runtime: Runtime, network: Networking, volumes: Volumes, store: ContainerStore, clock: Clock
    ) -> None:
        self._runtime = runtime
        self._bundles = runtime.bundles
        self._network = network
        self._volumes = volumes
        self._store = store
        self._events = volumes.events
        self._background: Background = volumes.background
        self._clock = clock
        self.waiting = WaitingClients()
        self.forced = ForcedRemovals()
        self._views = ViewMounts()
        self._detached: set[ContainerId] = set()
        """Containers whose networks this process has detached since it last attached them."""
        self._cleared: set[ContainerId] = set()
        """Containers whose cgroups and runtime state this process has removed since it last created their process."""
        self.actions: Mapping[Effect, Action] = {
            Effect.MAKE_DIRECTORIES: self._make_directories,
            Effect.FIND_SHARED: self._find_shared,
            Effect.ATTACH_NETWORKS: self._attach_networks,
            Effect.WRITE_BUNDLE: self._write_bundle,
            Effect.MOUNT_VOLUMES: self._mount_volumes,
            Effect.CREATE_PROCESS: self._create_process,
            Effect.SERVE_CLIENTS: self._serve_clients,
            Effect.START_COMMAND: self._start_command,
            Effect.FORGET_SECRETS: self._forget_secrets,
            Effect.PUBLISH_START: self._publish_start,
            Effect.FREEZE: self._freeze,
            Effect.THAW: self._thaw,
            Effect.THAW_FOR_SIGNAL: self._thaw_for_signal,
            Effect.SEE_FROZEN: self._see_frozen,
            Effect.PUBLISH_PAUSE: self._publish_pause,
            Effect.PUBLISH_UNPAUSE: self._publish_unpause,
            Effect.PUBLISH_HEALTH: self._publish_health,
            Effect.APPLY_LIMITS: self._apply_limits,
            Effect.PUBLISH_UPDATE: self._publish_update,
            Effect.CHANGE_NETWORKS: self._change_networks,
            Effect.WRITE_NAME_FILES: self._write_name_files,
            Effect.PUBLISH_NETWORKS: self._publish_change,
            Effect.RENAME_ON_NETWORKS: self._rename_on_networks,
            Effect.RENAME_BACK: self._rename_back,
            Effect.RELEASE_NAME: self._release_name,
            Effect.PUBLISH_RENAME: self._publish_rename,
            Effect.DELETE_PROCESS: self._delete_process,
            Effect.ENSURE_DELETED: self._ensure_deleted,
            Effect.DETACH_NETWORKS: self._detach_networks,
            Effect.CLEAR_CGROUPS: self._clear_cgroups,
            Effect.RELEASE_ROOT: self._release_root,
            Effect.UNMOUNT_VOLUMES: self._unmount_volumes,
            Effect.PUBLISH_EXIT: self._publish_exit,
            Effect.PUBLISH_UNMOUNT: self._publish_unmount,
            Effect.REFUSE_CLIENTS: self._refuse_clients,
            Effect.REMOVE_DIRECTORIES: self._remove_directories,
            Effect.FORGET_RECORD: self._forget_record,
            Effect.PUBLISH_DESTROY: self._publish_destroy,
            Effect.ADOPT_VOLUMES: self._adopt_volumes,
            Effect.ADOPT_API: self._adopt_api,
        }

    # --- making -------------------------------------------------------------------------------------------------

    async def _make_directories(self, container: Container, _: Program) -> LifeEvent:
        self._bundles.make(container)
        return life_events.DirectoriesMade()

    async def _find_shared(self, container: Container, program: Program) -> None:
        program.shared = shared_by(container, self._store.get, self._bundles.shm)

    async def _attach_networks(self, container: Container, program: Program) -> LifeEvent:
        config = replace(sandbox_config(container), userns=program.shared.namespaces.get("user", ""))
        self._detached.discard(container.id)
        return life_events.Attached(await self._network.attach(config))

    async def _write_bundle(self, container: Container, program: Program) -> LifeEvent:
        config = container.config
        env = runtime_spec.merged_environment(config.env, program.secret_env)
        run = replace(container, config=replace(config, env=env))
        return life_events.BundleWritten(await asyncio.to_thread(self._bundles.prepare, run, program.shared))

    async def _mount_volumes(self, container: Container, _: Program) -> None:
        """Mount, but give up for a forced removal, because a file server may not respond."""
        parts = self._bundles.parts(container)
        points = (*container.config.mounts, *machine_files.mounts(container.config))
        await self._unless_removed(container, self._volumes.mount(container.id, points, parts))

    async def _unless_removed(self, container: Container, mount: Coroutine[Any, Any, None]) -> None:
        try:
            await self.forced.mount(container.id, mount)
        except LostRace as error:
            raise NotRunning(f"Container {container.id} is being removed") from error
        if container.config.mount_label:  # before a start slot is taken, because a large tree takes long
            await asyncio.to_thread(self._bundles.label_sources, container)

    async def _create_process(self, container: Container, _: Program) -> LifeEvent:
        if container.users is not None:
            work = partial(self._bundles.map_volumes, container)
            await self._unless_removed(container, self._views.mount(container.name, work))
        self._cleared.discard(container.id)
        with within("runc create"):
            started = await self._runtime.create(container)
        self._volumes.release_parts(self._bundles.parts(container))
        if container.users is not None:
            self._bundles.release_views(container.id)
        if container.plain is not None and all(container.plain.console_size):
            resize_terminal(started.monitor, *container.plain.console_size)
        return life_events.ProcessCreated(started.process, started.monitor)

    async def _serve_clients(self, container: Container, _: Program) -> None:
        await self.waiting.serve(container.id, self._bundles.bundle(container.id))

    async def _start_command(self, container: Container, program: Program) -> LifeEvent:
        assert container.process is not None, "the process was recorded after its creation"
        with within("runc start"):
            await self._runtime.start(container.id, container.process)
        initial = health.initial(container.config.healthcheck)
        return life_events.Started(self.now(), initial, program.by_policy)

    async def _forget_secrets(self, container: Container, program: Program) -> None:
        if program.secret_env:
            self._runtime.forget_environment(container.id, program.secret_env)

    # --- pausing ------------------------------------------------------------------------------------------------

    async def _freeze(self, container: Container, _: Program) -> LifeEvent:
        await self._runtime.pause(container.id)
        return life_events.Frozen(container.process)

    async def _thaw(self, container: Container, _: Program) -> LifeEvent:
        await self._runtime.resume(container.id)
        return life_events.Thawed(container.process)

    async def _thaw_for_signal(self, container: Container, _: Program) -> LifeEvent | None:
        """Thaw a run that received a signal.  If the signal has ended the run, there is nothing to thaw or report."""
        with suppress(SkepError):  # the next effect reads its state
            await self._runtime.resume(container.id)
            present = self._store.require(container.id)
            if present.is_running and present.process == container.process:
                return life_events.Thawed(container.process)
        return None

    async def _see_frozen(self, container: Container, _: Program) -> LifeEvent | None:
        """Report a change that the record does not show."""
        is_frozen = container.is_running and self._runtime.is_frozen(container)
        if is_frozen == (container.state is ContainerState.PAUSED):
            return None
        return life_events.Frozen(container.process) if is_frozen else life_events.Thawed(container.process)

    # --- changing -----------------------------------------------------------------------------------------------

    async def _apply_limits(self, container: Container, program: Program) -> LifeEvent | None:
        """Apply a change to the processes.  Reports nothing if it changes nothing."""
        assert isinstance(program.event, life_events.Update)
        after = program.event.change(container)
        if after == container:
            return None
        warnings = await self._runtime.update(after) if after.config != container.config else ()
        restart = None if after.plain is None else after.plain.restart
        return life_events.Updated(after.config, restart, tuple(warnings))

    async def _change_networks(self, container: Container, program: Program) -> LifeEvent:
        """Connect a run to a network, or disconnect it from one.  The caller holds the lock of its networks."""
        event, before = program.event, container.sandbox
        assert isinstance(event, life_events.Connect | life_events.Disconnect)
        assert before is not None, "a running container has one"
        plain, config = network_rules.options_after(container, event), sandbox_config(container)
        if network_rules.is_builtin(event):
            config = sandbox_config(replace(container, plain=plain))
            sandbox = await self._network.change_bridge(config, before)
            network = NamedNetwork(self._network.predefined_ids.get("bridge", ""), "bridge", "bridge")
        elif isinstance(event, life_events.Connect):
            sandbox = await self._network.connect(config, before, event.request)
            network = endpoint_network(sandbox.endpoints[-1])
        else:
            left = network_rules.endpoint(container, event)
            assert left is not None, "the condition of its rule"
            sandbox = await self._network.disconnect(config, before, left.network_id)
            network = endpoint_network(left)
        return life_events.NetworksChanged(
            sandbox=sandbox,
            mode=plain.mode,
            networks=plain.networks,
            mac_address=plain.mac_address,
            action="connect" if isinstance(event, life_events.Connect) else "disconnect",
            network=network,
        )

    async def _write_name_files(self, container: Container, program: Program) -> None:
        await asyncio.to_thread(self._bundles.refresh_name_files, program.before, container)

    async def _rename_on_networks(self, container: Container, _: Program) -> None:
        sandbox = container.sandbox if container.is_running else None
        await self._network.rename(sandbox_config(container), sandbox)

    async def _rename_back(self, container: Container, program: Program) -> None:
        if not isinstance(program.error, FailedPrecondition):  # otherwise the networks kept the old name
            await self._rename_on_networks(container, program)

    async def _release_name(self, container: Container, _: Program) -> None:
        self._store.release_name(container.id)

    # --- freeing ------------------------------------------------------------------------------------------------

    async def _delete_process(self, container: Container, _: Program) -> None:
        await self._runtime.delete(container)
        self._cleared.add(container.id)

    async def _ensure_deleted(self, container: Container, program: Program) -> None:
        """Delete the process and cgroups of an earlier node process's run, or after a failure of ``_clear_cgroups``."""
        if container.id not in self._cleared:
            await self._delete_process(container, program)

    async def _detach_networks(self, container: Container, _: Program) -> None:
        if container.sandbox is not None and container.id not in self._detached:
            await self._network.detach(container.id, container.sandbox)
            self._detached.add(container.id)

    async def _clear_cgroups(self, container: Container, _: Program) -> None:
        await self._runtime.clear(container)
        self._cleared.add(container.id)

    async def _release_root(self, container: Container, _: Program) -> None:
        await asyncio.to_thread(self._bundles.release, container.id)

    async def _unmount_volumes(self, container: Container, _: Program) -> None:
        await self._volumes.unmount(container.id, self._bundles.parts(container))

    async def _remove_directories(self, container: Container, _: Program) -> None:
        await self._bundles.discard(container.id)

    async def _forget_record(self, container: Container, _: Program) -> None:
        self._store.forget(container.id)
        self._detached.discard(container.id)
        self._cleared.discard(container.id)

    # --- telling ------------------------------------------------------------------------------------------------

    async def _publish_start(self, container: Container, _: Program) -> None:
        self._publish_networks("connect", container)
        self._events.publish_mounts("mount", container)
        self._events.publish("start", container)

    async def _publish_pause(self, container: Container, _: Program) -> None:
        self._events.publish("pause", container)

    async def _publish_unpause(self, container: Container, _: Program) -> None:
        self._events.publish("unpause", container)

    async def _publish_health(self, container: Container, _: Program) -> None:
        assert container.health is not None, "it was probed"
        self._events.publish(f"health_status: {container.health.status.value}", container)

    async def _publish_update(self, container: Container, _: Program) -> None:
        self._events.publish("update", container)

    async def _publish_change(self, container: Container, program: Program) -> None:
        assert isinstance(program.event, life_events.NetworksChanged)
        self._events.publish_network(program.event.action, program.event.network, container.id)

    async def _publish_rename(self, container: Container, program: Program) -> None:
        self._events.publish("rename", container, oldName=f"/{program.before.name}")

    async def _publish_exit(self, container: Container, _: Program) -> None:
        if container.oom_killed:
            self._events.publish("oom", container)
        self._events.publish("die", container, exitCode=str(container.exit_code))
        self._publish_networks("disconnect", container)

    async def _publish_unmount(self, container: Container, _: Program) -> None:
        self._events.publish_mounts("unmount", container)

    async def _publish_destroy(self, container: Container, _: Program) -> None:
        self._events.publish("destroy", container)

    async def _refuse_clients(self, container: Container, program: Program) -> None:
        reason = program.error or f"Container {container.id} was removed"
        self.waiting.fail(container.id, NotRunning(str(reason)))

    def _publish_networks(self, action: str, container: Container) -> None:
        publish_networks(self._events, action, container, container.sandbox, self._network.predefined_ids)

    # --- adopting -----------------------------------------------------------------------------------------------

    def hold_volumes(self, container: Container) -> None:
        """Record a run of an earlier process as a user of its volumes."""
        self._volumes.adopt(container.id, container.config.mounts)

    async def _adopt_volumes(self, container: Container, _: Program) -> None:
        self.hold_volumes(container)

    async def _adopt_api(self, container: Container, _: Program) -> None:
        apis, id = self._bundles.apis, container.id
        adopt = partial(asyncio.to_thread, apis.adopt, container, self._bundles.api(id))
        try:
            await adopt()
        except Exception:  # the container keeps running meanwhile
            event = "API socket not adopted yet"
            retrying = retry(adopt, event, clock=self._clock, container=id)
            self._background.spawn(retrying, name=f"api-{id[:12]}")

    async def look(self, container: Container, *, has_network: bool) -> life_events.Adopted:
        """Examine what an earlier process has left of a container.  Raises: Unavailable: that fails."""
        id, at, has_process = container.id, self.now(), container.process is not None
        if container.is_running:
            return life_events.Adopted(at, is_frozen=self._runtime.is_frozen(container))
        if container.state is ContainerState.REMOVING:
            return life_events.Adopted(at)
        return life_events.Adopted(
            at,
            # A run without its networks is a failed start that was not cleaned up completely.
            has_run=has_process and has_network and await self._runtime.status(id) in _RUNS,
            has_network=has_network,
            has_leftovers=has_process
            or (container.sandbox is not None and not container.was_started)
            or self._runtime.has(id)
            or self._bundles.is_mounted(id),
            health=health.initial(container.config.healthcheck),
        )

    def now(self) -> Timestamp:
        """Return the current time in the form of the records."""
        return timestamp(self._clock.now_ns())

"""The leader's loop for cluster volumes: one job per volume, which ends in calls of its driver.

A volume whose driver hangs or fails is retried with growing delays and does not delay other volumes: each is handled
separately, and a driver's calls are limited in number and time.

Drivers know no fencing: a call by a deposed leader may be executed after the next leader's first call.  CSI allows
several calls for one volume only if they request the same.  So a leader confirms its term before each step, which ends
within ``STEP_S``.  In the first ``SETTLED_S`` of a term it undoes nothing for the volumes that existed before: it may
safely repeat a creation or publication that an earlier leader may have in progress, but not delete or unpublish.  An
entry stays until it has been undone, so a leader also cannot repeat what an earlier leader may be undoing.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Protocol, TypeAlias, TypeVar, assert_never

import structlog
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error, log_error
from skep.aio.groups import first_alone
from skep.csi.driver import UnusableResponse, discrepancy
from skep.errors import FailedPrecondition, NotFound, SkepError, Unavailable
from skep.manager.informer import CatchUp, run_exact_informer
from skep.manager.revocation import removal_of
from skep.manager.volume_index import VolumeIndex
from skep.manager.volumes.steps import (
    Create,
    Delete,
    Forget,
    Publish,
    Step,
    Unpublish,
    doubted,
    removal_wait_s,
    settled,
    steps,
)
from skep.manager.work_queue import WorkQueue
from skep.model.ids import NodeId, TaskId, VolumeId
from skep.model.node import Node
from skep.model.node_removal import NodeRemoval
from skep.model.task import Task
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeInfo, VolumeScope
from skep.store.interface import (
    Commit,
    Created,
    Deleted,
    LoopStore,
    NotLeader,
    Transaction,
    Updated,
    View,
    WatchLagged,
)
from skep.store.kinds import Payload, Revocation

log = structlog.get_logger(__name__)

BATCH = 100
"""Volumes taken from the queue at once."""
LANES = 8
"""Concurrent steps of one volume, so that a step for a node that hangs does not delay those for others."""
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
"""Limits of the delay between retries of a volume."""
MESSAGE_CHARACTERS_MAX = 500
"""Maximum length of a step's error on the volume."""
STEP_S = 45.0
"""Maximum seconds of a step's driver calls, including the wait for their turn."""
SETTLED_S = 60.0
"""Seconds after the beginning of a term from which on no call of an earlier leader can be in progress."""
_STOPPING = "waiting until the removed node has stopped its containers"
_HELD = "waiting until no call of an earlier leader can be in progress"
INFO_PART, PUBLISH_PART = "info", "publish"
_DAMAGED = "the store's record of where the volume is published is unreadable: remove the volume with force"


class ControllerDriver(Protocol):
    """The controller half of ``skep.csi.driver.Driver``."""

    async def create(self, volume: Volume, secrets: Mapping[str, str]) -> VolumeInfo: ...

    async def delete(self, volume_id: str, secrets: Mapping[str, str]) -> None: ...

    async def publish(
        self, volume: Volume, driver_node_id: str, secrets: Mapping[str, str]
    ) -> Mapping[str, str]: ...

    async def unpublish(self, volume_id: str, driver_node_id: str, secrets: Mapping[str, str]) -> None: ...


T = TypeVar("T")

FindDriver: TypeAlias = Callable[[str], Awaitable[ControllerDriver]]
"""Returns the driver with that name on this machine.  Raises NotFound."""


Confirm: TypeAlias = Callable[[], Awaitable[None]]
"""Returns while the term lasts.  Raises NotLeader or Unavailable."""


async def skip_confirmation() -> None:
    """Do nothing, for a store without terms."""


async def no_drivers(name: str) -> ControllerDriver:
    """Raise NotFound, on a manager without drivers."""
    raise NotFound(f'driver "{name}" not found')


class ClusterVolumes:
    """Has drivers create, publish and delete cluster volumes as tasks need them.  Leader only."""

    def __init__(
        self, term: LoopStore, clock: Clock, random: Random, find_driver: FindDriver, confirm: Confirm
    ) -> None:
        self._term = term
        self._clock = clock
        self._random = random
        self._find_driver = find_driver
        self._confirm = confirm
        self._inherited: frozenset[VolumeId] = frozenset()
        """Volumes for which an earlier leader's calls may be in progress."""
        self._settled_at = 0.0
        self._doubted: set[VolumeId] = set()
        """Volumes that all nodes were asked to unpublish.

        That happens once per term, since a driver may refuse for other reasons."""
        self._reset()

    async def run(self) -> None:
        """Handle volumes until cancelled."""
        self._inherited = frozenset(volume.id for volume in self._term.view().find(Volume))
        self._settled_at = self._clock.monotonic() + SETTLED_S
        await run_exact_informer(
            self._term,
            (Volume, Task, Node),
            on_snapshot=self._on_snapshot,
            on_commit=self._on_commit,
            work=self._work,
        )

    def _reset(self) -> None:
        self._queue: WorkQueue[VolumeId] = WorkQueue(self._clock)
        self._creation = asyncio.Lock()
        """Volumes get their ids one after the other: two volumes with the same id would share a disk."""
        self._backoffs: dict[VolumeId, Backoff] = {}
        self._users: dict[VolumeId, dict[TaskId, NodeId]] = {}
        """Tasks that have a volume and have not ended, with their nodes."""
        self._by_node = VolumeIndex()
        self._handled: set[VolumeId] = set()
        self._requeued: set[VolumeId] = set()
        """Volumes that changed while they were handled."""

    # -- keeping up with the store ---------------------------------------------------------------------------------

    def _on_snapshot(self, view: View) -> None:
        self._reset()
        volumes = view.find(Volume)
        for task in view.find(Task) if volumes else ():
            self._enter(task)
        self._by_node.reset(volumes)
        self._queue.add(volume.id for volume in volumes)

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Updated(Task() as old, Task() as new):
                    if old.volumes or new.volumes:
                        self._leave(old)
                        self._enter(new)
                case Deleted(Task() as task):
                    self._leave(task)
                case Updated(Volume() as old, Volume() as new):
                    self._by_node.change(old, new)
                    if _decides(old) != _decides(new):
                        self._queue.add((new.id,))
                case Deleted(Volume() as volume):
                    self._by_node.change(volume, None)
                    self._backoffs.pop(volume.id, None)
                    self._doubted.discard(volume.id)
                case Updated(Node() as old, Node() as new):
                    if old.status.state is not new.status.state or _drivers_of(old) != _drivers_of(new):
                        self._queue.add(self._by_node.on(new.id))
                case Deleted(Node() as node):
                    self._queue.add(self._by_node.on(node.id))
                case Created(Task() as task):
                    self._enter(task)
                case Created(Volume() as volume):
                    self._by_node.change(None, volume)
                    self._queue.add((volume.id,))

    def _enter(self, task: Task) -> None:
        if task.volumes and task.node_id and not task.status.state.is_terminal:
            for attachment in task.volumes:
                self._users.setdefault(VolumeId(attachment.id), {})[task.id] = task.node_id
                self._queue.add((VolumeId(attachment.id),))

    def _leave(self, task: Task) -> None:
        for attachment in task.volumes:
            id = VolumeId(attachment.id)
            users = self._users.get(id, {})
            if users.pop(task.id, None) is not None:
                self._queue.add((id,))
                if not users:
                    del self._users[id]

    # -- deciding and calling --------------------------------------------------------------------------------------

    async def _work(self, read_waiting: CatchUp) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                ids = await self._queue.take(BATCH)
                for id in ids:
                    if id in self._handled:
                        self._requeued.add(id)
                        continue
                    self._handled.add(id)
                    group.create_task(self._handle(id, read_waiting), name=f"volume-{id}")

    async def _handle(self, id: VolumeId, read_waiting: CatchUp) -> None:
        """Handle a volume once.  Only errors that end the term are raised."""
        try:
            await read_waiting()
            is_done = await self._advance(id)
        except (NotLeader, WatchLagged):
            raise
        except Exception as error:
            log_error(error, "volume not handled", volume=id)
            is_done = False
        finally:
            self._handled.discard(id)
        if is_done:
            self._backoffs.pop(id, None)
        else:
            backoff = self._backoffs.get(id)
            if backoff is None:
                backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
                self._backoffs[id] = backoff
            self._queue.add_at(id, self._clock.monotonic() + backoff.next_delay_s())
        if id in self._requeued:
            self._requeued.discard(id)
            self._queue.add((id,))

    async def _advance(self, id: VolumeId) -> bool:
        """Settle the volume and carry out its steps.  Returns whether all of them succeeded."""
        needed = frozenset(self._users.get(id, {}).values())
        volume = await self._term.update(_settle, id, needed)
        if volume is None:
            return True
        left = deque([step async for step in self._allowed_steps(steps(volume, needed), volume)])
        with first_alone(NotLeader):
            async with asyncio.TaskGroup() as group:
                lanes = [
                    group.create_task(self._carry_out_each(left, volume))
                    for _ in range(min(LANES, len(left)))
                ]
        return all(lane.result() for lane in lanes)

    async def _allowed_steps(self, found: Iterable[Step], volume: Volume) -> AsyncIterator[Step]:
        """Yield the steps that may be carried out now.

        A step has to wait if it undoes something that an earlier leader may be doing, or takes a volume from a removed
        node that may still write to it.  The volume is then queued for later.
        """
        id, now = volume.id, self._clock.monotonic()
        is_settled = id not in self._inherited or self._settled_at <= now
        for step in found:
            removal = self._removal_of(step)
            wait_s = removal_wait_s(step, volume, removal, self._clock.now_ns())
            if not is_settled and isinstance(step, Delete | Unpublish):
                await self._term.update(_note, id, step, _HELD)
                self._queue.add_at(id, self._settled_at)
            elif wait_s:
                await self._term.update(_note, id, step, _STOPPING)
                self._queue.add_at(id, now + wait_s)
            else:
                yield step

    def _removal_of(self, step: Step) -> NodeRemoval | None:
        if not isinstance(step, Unpublish):
            return None
        return removal_of(self._term.view().lookup(Revocation, step.node_id))

    async def _carry_out_each(self, left: deque[Step], volume: Volume) -> bool:
        """Carry out steps until none is left.  Returns whether all of them succeeded."""
        is_done = True
        while left:
            step = left.popleft()
            try:
                await self._carry_out(step, volume)
            except NotLeader:
                raise
            except Exception as error:
                words = (str(error) if isinstance(error, SkepError) else describe_error(error)) or "failed"
                if not isinstance(error, SkepError):
                    log_error(error, "step of a volume failed", volume=volume.id, step=type(step).__name__)
                # CSI's code for a volume that is on another node.  If the store has no such node, an earlier volume had
                # the same name.
                is_elsewhere = isinstance(error, FailedPrecondition) and volume.id not in self._doubted
                if is_elsewhere and await self._term.update(_mark_doubtful, volume.id, step):
                    self._doubted.add(volume.id)
                await self._term.update(_note, volume.id, step, words[:MESSAGE_CHARACTERS_MAX])
                is_done = False
        return is_done

    async def _carry_out(self, step: Step, volume: Volume) -> None:
        """Carry out one step.  Raises SkepError."""
        if isinstance(step, Forget):
            await self._term.update(_forget, volume.id)
            return
        driver = await self._find_driver(volume.spec.driver.name)
        secrets = self._secrets_of(volume)
        match step:
            case Create():
                if await self._term.update(_announce_creation, volume.id):
                    info = await self._call_driver(lambda: driver.create(volume, secrets))
                    await self._enter_created(volume, info)
            case Delete():
                await self._call_driver(lambda: driver.delete(_id_of(volume), secrets))
                await self._term.update(_forget, volume.id)
            case Publish(node_id, driver_node_id):
                context = await self._call_driver(lambda: driver.publish(volume, driver_node_id, secrets))
                await self._term.update(_published, volume.id, node_id, context)
            case Unpublish(node_id, driver_node_id):
                await self._call_driver(lambda: driver.unpublish(_id_of(volume), driver_node_id, secrets))
                await self._term.update(_unpublished, volume.id, node_id)
            case _:
                assert_never(step)
        log.info("volume", volume=volume.spec.name, id=volume.id, done=type(step).__name__.lower())

    async def _call_driver(self, call: Callable[[], Awaitable[T]]) -> T:
        """Confirm the term, make a driver call and return its result.  Raises NotLeader or another SkepError."""
        await self._confirm()
        try:
            async with asyncio.timeout(STEP_S):
                return await call()
        except TimeoutError as error:
            raise Unavailable(f"the driver did not finish within {STEP_S:g} s") from error

    async def _enter_created(self, volume: Volume, info: VolumeInfo) -> None:
        """Record a created volume.  Raises UnusableResponse if it is not as requested, or another volume."""
        # It is not deleted: drivers find volumes by name, so it may be an earlier volume with data.
        if not volume.pending_delete and (words := discrepancy(volume, info)):
            raise UnusableResponse(f"{words}; removing the volume deletes it")
        async with self._creation:
            for other in self._term.view().find(Volume):
                taken = other.info is not None and other.info.volume_id == info.volume_id
                if taken and other.id != volume.id and other.spec.driver.name == volume.spec.driver.name:
                    raise UnusableResponse(
                        f"the driver gave it the id of volume {other.spec.name}: {info.volume_id}"
                    )
            await self._term.update(_created, volume.id, info)

    def _secrets_of(self, volume: Volume) -> Mapping[str, str]:
        """Return the driver secrets of a volume.  Raises Unavailable if one is unreadable."""
        view, found = self._term.view(), {}
        for one in volume.spec.secrets:
            payload = view.lookup(Payload, f"secret/{one.secret}")
            if payload is None:
                raise Unavailable(f"secret {one.secret} of the volume cannot be read")
            found[one.key] = payload.data.decode(errors="replace")
        return found


def _id_of(volume: Volume) -> str:
    assert volume.info is not None, "it is there"
    return volume.info.volume_id


# -- transactions ------------------------------------------------------------------------------------------------------


def _settle(tx: Transaction, id: VolumeId, needed: frozenset[NodeId]) -> Volume | None:
    volume = tx.rely_on(Volume, id)
    if volume is None:
        return None
    if PUBLISH_PART in tx.damaged(Volume).get(id, ()):
        # It looks unpublished: with another entry it might be on two nodes, and the damage would be hidden.
        tx.put(replace(volume, message=_DAMAGED))
        return None
    changed = settled(volume, needed, lambda node_id: tx.lookup(Node, node_id))
    return tx.put(changed) if changed != volume else volume


def _announce_creation(tx: Transaction, id: VolumeId) -> bool:
    """Announce that the driver will be asked to create the volume.  Returns False if it was removed before."""
    volume = tx.rely_on(Volume, id)
    if volume is None or volume.info is not None or (volume.pending_delete and not volume.is_creating):
        return False
    tx.put(replace(volume, is_creating=True))
    return True


def _created(tx: Transaction, id: VolumeId, info: VolumeInfo) -> None:
    volume = tx.rely_on(Volume, id)
    if volume is not None and volume.info is None:
        tx.put(replace(volume, info=info, is_creating=False, message=""))


def _published(tx: Transaction, id: VolumeId, node_id: NodeId, context: Mapping[str, str]) -> None:
    _change(
        tx,
        id,
        node_id,
        PublishState.PENDING,
        lambda one: replace(
            one, state=PublishState.PUBLISHED, publish_context=context, is_doubtful=False, message=""
        ),
    )


def _unpublished(tx: Transaction, id: VolumeId, node_id: NodeId) -> None:
    _change(tx, id, node_id, PublishState.PENDING_UNPUBLISH, lambda _: None)


def _change(
    tx: Transaction,
    id: VolumeId,
    node_id: NodeId,
    state: PublishState,
    change: Callable[[PublishStatus], PublishStatus | None],
) -> None:
    """Change the volume's status on a node, if it is still in ``state``."""
    volume = tx.rely_on(Volume, id)
    if volume is None:
        return
    changed = [
        change(one) if one.node_id == node_id and one.state is state else one for one in volume.publish_status
    ]
    tx.put(replace(volume, publish_status=tuple(one for one in changed if one is not None)))


def _forget(tx: Transaction, id: VolumeId) -> None:
    volume = tx.rely_on(Volume, id)
    if volume is None or not volume.pending_delete or volume.publish_status:
        return
    if tx.damaged(Volume).get(id):
        return  # the driver may have it
    tx.delete(Volume, id)


def _mark_doubtful(tx: Transaction, id: VolumeId, step: Step) -> bool:
    """Have all nodes unpublish the volume, except the node that it is published for.

    Returns False if the step does not concern other nodes.
    """
    volume = tx.rely_on(Volume, id)
    match step:
        case Publish(node_id) if volume is not None and volume.spec.access_mode.scope is VolumeScope.SINGLE:
            tx.put(doubted(volume, frozenset({node_id}), tx.find(Node)))
        case Delete() if volume is not None and not volume.publish_status:
            tx.put(doubted(volume, frozenset(), tx.find(Node)))
        case _:
            return False
    return True


def _note(tx: Transaction, id: VolumeId, step: Step, words: str) -> None:
    """Show why a step failed, on the volume or on its entry for the step's node."""
    volume = tx.rely_on(Volume, id)
    if volume is None:
        return
    match step:
        case Publish(node_id) | Unpublish(node_id):
            statuses = tuple(
                replace(one, message=words) if one.node_id == node_id else one
                for one in volume.publish_status
            )
            tx.put(replace(volume, publish_status=statuses))
        case _:
            tx.put(replace(volume, message=words))


def _decides(volume: Volume) -> tuple[object, ...]:
    """Return the inputs of decisions about the volume, without messages, so that failures are retried with a delay."""
    entries: Sequence[object] = [(one.node_id, one.state, one.is_closing) for one in volume.publish_status]
    return volume.pending_delete, volume.info, tuple(entries)


def _drivers_of(node: Node) -> tuple[object, ...]:
    return node.description.csi_info

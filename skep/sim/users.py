"""What users do: requests to managers of their choice, by the control functions that the API calls.

Requests run beside each other and beside every fault.  What was answered is kept in ``Promises``.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from random import Random

from msgspec.structs import replace

from skep.errors import SkepError, Unavailable
from skep.manager.control.nodes import update_node
from skep.manager.control.services import create_service, remove_service, rollback_service, update_service
from skep.model.container import ContainerSpec
from skep.model.ids import NodeId, ServiceId
from skep.model.labels import PROGRESS_DEADLINE
from skep.model.node import Availability, Node
from skep.model.service import (
    GlobalService,
    ReplicatedJob,
    ReplicatedService,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
)
from skep.model.times import SECOND_NS, timestamp
from skep.sim.cluster import SimulatedCluster
from skep.store.etcd.store import EtcdStore

SERVICES_MAX = 3
NAMES = ("web", "api", "db")
"""Few, so that several users want the same one."""
BROKEN, CRASHING, HANGING = "broken:1", "crashing:1", "hanging:1"
"""Images that no node can prepare, whose containers fail soon, and whose preparation does not end."""
HOPELESS = (BROKEN, CRASHING, HANGING)
IMAGES = ("app:1", "app:2", "app:3", "app:4", *HOPELESS)
JOB_IMAGES = ("job:1", "job:2", BROKEN, CRASHING)
ENDING_IMAGES = {CRASHING: (0.4, 1), "job:1": (0.5, 0), "job:2": (1.5, 0)}
"""When their containers end (seconds), and with which exit code."""


class Users:
    """All users of one cluster."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._random = cluster.random
        self._promises = cluster.observer.promises
        cluster.observer.rules.append(self._promises)
        self._numbers = count(1)
        self._requests: set[asyncio.Task[None]] = set()
        self._deeds: tuple[Callable[[], Awaitable[None]], ...] = (
            *(self._create,) * 2,
            *(self._scale,) * 3,
            *(self._update,) * 3,
            *(self._rollback, self._remove, self._availability, self._read, self._read),
        )

    def act(self) -> None:
        """Somebody begins a request; sometimes two do at once."""
        for _ in range(self._random.choice((1, 1, 1, 2))):
            self._begin(self._random.choice(self._deeds))

    def create(self) -> None:
        """Somebody begins to create a service."""
        self._begin(self._create)

    async def finished(self) -> None:
        """Return when every request was answered."""
        while self._requests:
            await asyncio.wait(self._requests)

    async def activate_all(self) -> None:
        """Make all nodes active again, however often that has to be asked."""
        for id in self._cluster.workers:
            while not await self._set_availability(id, Availability.ACTIVE):
                await self._cluster.clocks[id].sleep(0.2)

    async def remove_all(self) -> None:
        """Remove every service, however often that has to be asked."""
        for promise in list(self._promises.services.values()):
            while not promise.is_removed and promise.acknowledged:
                await self._removed(promise.id)
                await asyncio.sleep(0.1)

    # -- requests --------------------------------------------------------------------------------------------------

    def _begin(self, deed: Callable[[], Awaitable[None]]) -> None:
        async def guarded() -> None:
            try:
                await deed()
            except SkepError as error:
                self._cluster.trace.add(f"user: {type(error).__name__}: {error}")

        task = self._cluster.loop.create_task(guarded(), name=deed.__name__)
        self._requests.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._requests.discard(task)
        if not task.cancelled():
            task.result()

    async def _store(self) -> EtcdStore:
        """A manager's store that shows the present, and everything that was acknowledged before.

        Raises: Unavailable: no manager is there, or it has no quorum.
        """
        running = [
            manager for manager in self._cluster.running_managers.values() if manager.store is not None
        ]
        if not running:
            raise Unavailable("no manager serves")
        store = self._random.choice(running).store
        assert store is not None
        given = self._promises.given()
        await store.barrier()
        self._cluster.observer.note(self._cluster.loop.time(), self._promises.broken(store.view(), given))
        return store

    async def _read(self) -> None:
        await self._store()

    async def _create(self) -> None:
        if len(self._living()) >= SERVICES_MAX:
            return
        store = await self._store()
        id = ServiceId(f"s{len(self._promises.services) + 1}")
        spec = self._new_spec(self._random.choice(NAMES))
        promise = self._promises.asked(id, spec)
        self._cluster.trace.add(f"user: create {id} {spec.name}")
        body = partial(create_service, new_id=lambda: id, new_name=lambda: id, now=timestamp(self._now_ns()))
        try:
            service = await store.update(body, spec)
        except Unavailable:
            raise
        except SkepError:
            self._cluster.observer.note(
                self._cluster.loop.time(), self._promises.refused(promise, self._cluster.view)
            )
            raise
        self._told(service)

    async def _scale(self) -> None:
        def scaled(spec: ServiceSpec) -> ServiceSpec:
            if spec.mode.name == "global":
                return spec
            if (job := spec.mode.replicated_job) is not None:
                wish = replace(job, total_completions=self._random.randint(0, 6))
                return replace(spec, mode=ServiceMode(replicated_job=wish))
            replicas = self._random.randint(0, 6)
            return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)))

        await self._changed(scaled)

    async def _update(self) -> None:
        def updated(spec: ServiceSpec) -> ServiceSpec:
            container = spec.task_template.container_spec
            assert container is not None
            images = JOB_IMAGES if spec.mode.replicated_job is not None else IMAGES
            template = replace(
                spec.task_template, container_spec=replace(container, image=self._random.choice(images))
            )
            return replace(spec, task_template=template)

        await self._changed(updated)

    async def _changed(self, change: Callable[[ServiceSpec], ServiceSpec]) -> None:
        if not (living := self._living()):
            return
        id = self._random.choice(living)
        store = await self._store()
        service = store.view().get(Service, id)
        # No two requests ask for the same, so that each can be told by what it leaves.
        labels = {**service.spec.labels, "request": str(next(self._numbers))}
        spec = replace(change(service.spec), labels=labels)
        self._promises.asked(id, spec)
        self._cluster.trace.add(f"user: update {id}")
        body = partial(update_service, now=timestamp(self._now_ns()))
        try:
            updated = await store.update(body, id, spec, service.version.index)
        except Unavailable:
            raise
        except SkepError:
            self._cluster.observer.note(
                self._cluster.loop.time(), self._promises.refused_update(id, spec, self._cluster.view)
            )
            raise
        self._told(updated)

    async def _rollback(self) -> None:
        if not (living := self._living()):
            return
        id = self._random.choice(living)
        store = await self._store()
        service = store.view().get(Service, id)
        self._cluster.trace.add(f"user: rollback {id}")
        body = partial(rollback_service, now=timestamp(self._now_ns()))
        self._told(await store.update(body, id, service.spec, service.version.index))

    async def _remove(self) -> None:
        if living := self._living():
            await self._removed(self._random.choice(living))

    async def _removed(self, id: ServiceId) -> None:
        promise = self._promises.services[id]
        try:
            store = await self._store()
            promise.is_removal_asked = True
            self._cluster.trace.add(f"user: remove {id}")
            await store.update(partial(remove_service, now=timestamp(self._now_ns())), id)
        except Unavailable:
            return
        except SkepError:  # it is gone: an earlier attempt of unknown outcome
            pass
        promise.is_removed = True

    async def _availability(self) -> None:
        id = self._random.choice(self._cluster.workers)
        wish = self._random.choice((Availability.DRAIN, Availability.PAUSE, *(Availability.ACTIVE,) * 2))
        await self._set_availability(id, wish)

    async def _set_availability(self, id: NodeId, availability: Availability) -> bool:
        self._cluster.trace.add(f"user: {id} {availability.value}")
        try:
            store = await self._store()
            node = store.view().get(Node, id)
            if node.spec.availability is not availability:
                wish = replace(node.spec, availability=availability)
                await store.update(update_node, id, wish, node.version.index)
        except SkepError:
            return False
        return True

    # -- what they know --------------------------------------------------------------------------------------------

    def _living(self) -> list[ServiceId]:
        return [
            promise.id
            for promise in self._promises.services.values()
            if not promise.is_refused and not promise.is_removal_asked and promise.acknowledged
        ]

    def _told(self, service: Service) -> None:
        self._cluster.trace.add(f"user: told that {service.id} is at {service.version.index}")
        self._cluster.observer.note(
            self._cluster.loop.time(), self._promises.told(service, self._cluster.truth.view)
        )

    def _now_ns(self) -> int:
        return self._cluster.clocks[self._cluster.managers[0]].now_ns()

    def _new_spec(self, name: str) -> ServiceSpec:
        return a_spec(name, self._random)


def a_spec(name: str, random: Random) -> ServiceSpec:
    """Any service."""
    mode = a_mode(random)
    is_job = mode.replicated_job is not None
    memory = random.choice((0, 0, 512 << 20))
    update = an_update_config(random)
    rollback = UpdateConfig(order=update.order, monitor=SECOND_NS) if random.random() < 0.8 else None
    return ServiceSpec(
        name=name,
        labels={PROGRESS_DEADLINE: "1s"} if random.random() < 0.7 else {},
        task_template=TaskSpec(
            container_spec=ContainerSpec(
                image=random.choice(JOB_IMAGES[:2]) if is_job else "app:1", stop_grace_period=SECOND_NS
            ),
            restart_policy=RestartPolicy(delay=random.choice((0, SECOND_NS // 2, 2 * SECOND_NS))),
            resources=ResourceRequirements(reservations=Resources(memory_bytes=memory)) if memory else None,
        ),
        mode=mode,
        update_config=None if is_job else update,
        rollback_config=None if is_job else rollback,
    )


def a_mode(random: Random) -> ServiceMode:
    """Mostly replicated, sometimes global, sometimes a job."""
    match random.choices(("replicated", "global", "job"), (65, 20, 15))[0]:
        case "global":
            return ServiceMode(global_=GlobalService())
        case "job":
            job = ReplicatedJob(max_concurrent=random.randint(1, 3), total_completions=random.randint(1, 6))
            return ServiceMode(replicated_job=job)
        case _:
            return ServiceMode(replicated=ReplicatedService(replicas=random.randint(1, 5)))


def an_update_config(random: Random) -> UpdateConfig:
    """Any way to update a service."""
    return UpdateConfig(
        parallelism=random.randint(0, 3),
        delay=random.choice((0, SECOND_NS // 2)),
        monitor=random.choice((SECOND_NS // 2, 2 * SECOND_NS)),
        order=UpdateOrder.START_FIRST if random.random() < 0.4 else UpdateOrder.STOP_FIRST,
        failure_action=random.choice(list(UpdateFailureAction)),
        max_failure_ratio=random.choice((0.0, 0.5)),
    )

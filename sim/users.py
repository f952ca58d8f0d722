"""Simulated users: requests to random managers, by the control functions that the API calls.

Requests are concurrent with each other and with faults.  Their responses are recorded in ``Acknowledgements``, and
compared with Docker's (``ResponseCheck``).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from itertools import count
from typing import TypeVar

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.random_specs import IMAGES, JOB_IMAGES, NAMES, ZONE, ZONES, Around, a_spec, made_odd
from sim.reference import Create, Remove, Request, Rollback, SetNode, Update
from sim.responses import ResponseCheck
from skep.api.errors import status_of
from skep.errors import SkepError, Unavailable
from skep.manager.control.files import create_secret, remove_secret
from skep.manager.control.networks import create_network, remove_network
from skep.manager.control.nodes import update_node
from skep.manager.control.services import create_service, remove_service, rollback_service, update_service
from skep.manager.membership.service import resign
from skep.model.ids import NodeId, ServiceId
from skep.model.meta import Driver
from skep.model.network import Network, NetworkSpec
from skep.model.node import Availability, Node, NodeRole, NodeSpec
from skep.model.secret import Secret, SecretSpec
from skep.model.service import (
    GlobalService,
    ReplicatedService,
    Service,
    ServiceMode,
    ServiceSpec,
)
from skep.model.times import timestamp
from skep.store.etcd.store import EtcdStore
from skep.store.space import refusal

T = TypeVar("T")

SERVICES_MAX = 3
NETWORK = "overlay"
"""What the names of users' networks begin with."""
NETWORKS_MAX, SECRETS_MAX = 4, 2
LATE = 0.1
"""How often somebody changes a service or node as it was a version ago."""


class Users:
    """All users of one cluster."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._random = cluster.random
        self._promises = cluster.observer.acknowledgements
        self._answers = ResponseCheck(cluster.view)
        cluster.observer.rules += [self._promises, self._answers]
        self._numbers = count(1)
        self._requests: set[asyncio.Task[None]] = set()
        self._deeds: tuple[Callable[[], Awaitable[None]], ...] = (
            *(self._create,) * 2,
            *(self._scale,) * 3,
            *(self._update,) * 3,
            *(self._rollback, self._remove, self._availability, self._read, self._read),
            *(self._label, self._ask_what_is_refused),
            *(self._network, self._network, self._secret),
        )

    def act(self) -> None:
        """Somebody begins a request; sometimes two do at once."""
        for _ in range(self._random.choice((1, 1, 1, 2))):
            self._begin(self._random.choice(self._deeds))

    def update(self, id: ServiceId, image: str) -> None:
        """Somebody begins to update a service to ``image``."""

        async def updated() -> None:
            await self._changed(partial(_with_image, image=image), id)

        self._begin(updated)

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
            # One whose create was never answered may be there all the same.
            is_there = self._cluster.view.lookup(Service, promise.id) is not None
            while not promise.is_removed and (promise.acknowledged or is_there):
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

    async def _store(self, *, creates: bool | None = None) -> EtcdStore:
        """A manager's store that shows the present, and everything that was acknowledged before.

        ``creates``: whether something is to be created; None: nothing is that makes the store grow.
        Raises: Unavailable: no manager is there, it has no quorum, or the store is nearly full.
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
        view = store.view()
        damaged = view.unreadable(Service)
        self._note(self._promises.broken(view, [one for one in given if one[0].id not in damaged]))
        if creates is not None and (why := refusal(await store.space(), creates=creates)):
            raise Unavailable(why)
        return store

    async def _read(self) -> None:
        await self._store()

    async def _create(self) -> None:
        if len(self._living()) >= SERVICES_MAX:
            return
        since = self._answers.present
        store = await self._store(creates=True)
        id = ServiceId(f"s{len(self._promises.services) + 1}")
        await self._created(store, since, id, self._a_spec(store))

    def _a_spec(self, store: EtcdStore) -> ServiceSpec:
        view = store.view()
        networks = [one.id for one in view.find(Network) if one.spec.name.startswith(NETWORK)]
        around = Around(tuple(networks), tuple(one.id for one in view.find(Secret)))
        return a_spec(self._random.choice(NAMES), self._random, around)

    async def _created(self, store: EtcdStore, since: int, id: ServiceId, spec: ServiceSpec) -> None:
        promise = self._promises.asked(id, spec)
        self._cluster.trace.add(f"user: create {id} {spec.name}")
        body = partial(create_service, new_id=lambda: id, new_name=lambda: id, now=timestamp(self._now_ns()))
        try:
            service = await self._answered(Create(id, spec), since, store.update(body, spec))
        except Unavailable:
            raise
        except SkepError:
            self._note(self._promises.refused(promise, self._cluster.view))
            raise
        self._told(service)

    async def _scale(self) -> None:
        def scaled(spec: ServiceSpec) -> ServiceSpec:
            if spec.mode.name in ("global", "global-job"):
                return spec
            if (job := spec.mode.replicated_job) is not None:
                wish = replace(job, total_completions=self._random.randint(0, 6))
                return replace(spec, mode=ServiceMode(replicated_job=wish))
            replicas = self._random.randint(0, 6)
            return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)))

        await self._changed(scaled)

    async def _update(self) -> None:
        def updated(spec: ServiceSpec) -> ServiceSpec:
            images = JOB_IMAGES if spec.mode.name in ("replicated-job", "global-job") else IMAGES
            return _with_image(spec, self._random.choice(images))

        await self._changed(updated)

    async def _changed(
        self, change: Callable[[ServiceSpec], ServiceSpec], id: ServiceId | None = None
    ) -> None:
        """``id``: None for any service."""
        if not (living := self._living()):
            return
        id = id or self._random.choice(living)
        since = self._answers.present
        store = await self._store(creates=False)
        service = store.view().get(Service, id)
        # No two requests ask for the same, so that each can be told by what it leaves.
        wish = change(service.spec)
        spec = replace(wish, labels={**wish.labels, "request": str(next(self._numbers))})
        self._promises.asked(id, spec)
        version = self._version(service.version.index)
        self._cluster.trace.add(f"user: update {id} at {version}")
        body = partial(update_service, now=timestamp(self._now_ns()))
        try:
            updated = await self._answered(
                Update(id, spec, version), since, store.update(body, id, spec, version)
            )
        except Unavailable:
            raise
        except SkepError:
            self._note(self._promises.refused_update(id, spec, self._cluster.view))
            raise
        self._told(updated)

    async def _ask_what_is_refused(self) -> None:
        """Something odd, another mode or another name."""
        since = self._answers.present
        if self._random.random() < 0.5:
            store = await self._store(creates=True)
            id = ServiceId(f"s{len(self._promises.services) + 1}")
            await self._created(store, since, id, made_odd(self._a_spec(store), self._random))
            return
        await self._changed(self._random.choice((self._odd, _of_another_mode, _renamed)))

    def _odd(self, spec: ServiceSpec) -> ServiceSpec:
        return made_odd(spec, self._random)

    async def _rollback(self) -> None:
        if not (living := self._living()):
            return
        id = self._random.choice(living)
        since = self._answers.present
        store = await self._store(creates=False)
        service = store.view().get(Service, id)
        version = self._version(service.version.index)
        self._cluster.trace.add(f"user: rollback {id} at {version}")
        body = partial(rollback_service, now=timestamp(self._now_ns()))
        writing = store.update(body, id, service.spec, version)
        self._told(await self._answered(Rollback(id, version), since, writing))

    async def _remove(self) -> None:
        if living := self._living():
            await self._removed(self._random.choice(living))

    async def _removed(self, id: ServiceId) -> None:
        promise, since = self._promises.services[id], self._answers.present
        try:
            store = await self._store()
            promise.is_removal_asked = True
            self._cluster.trace.add(f"user: remove {id}")
            body = partial(remove_service, now=timestamp(self._now_ns()))
            await self._answered(Remove(id), since, store.update(body, id))
        except Unavailable:
            return
        except SkepError:  # it is gone: an earlier attempt of unknown outcome
            pass
        promise.is_removed = True

    async def _network(self) -> None:
        """Somebody makes an overlay network, or removes one that is there."""
        store = await self._store(creates=True)
        present = [one for one in store.view().find(Network) if one.spec.name.startswith(NETWORK)]
        if len(present) >= NETWORKS_MAX or (present and self._random.random() < 0.4):
            id = self._random.choice(present).id
            self._cluster.trace.add(f"user: remove network {id}")
            await store.update(remove_network, id)
            return
        number = next(self._numbers)
        spec = NetworkSpec(
            name=f"{NETWORK}{number % NETWORKS_MAX}", driver_configuration=Driver(name="overlay")
        )
        self._cluster.trace.add(f"user: create network x{number} {spec.name}")
        body = partial(create_network, new_id=lambda: f"x{number}", now=timestamp(self._now_ns()))
        await store.update(body, spec)

    async def _secret(self) -> None:
        """Somebody makes a secret, or removes one that is there."""
        store = await self._store(creates=True)
        present = store.view().find(Secret)
        if len(present) >= SECRETS_MAX or (present and self._random.random() < 0.4):
            await store.update(remove_secret, self._random.choice(present).id)
            return
        id = f"k{next(self._numbers)}"
        body = partial(create_secret, new_id=lambda: id, now=timestamp(self._now_ns()))
        await store.update(body, SecretSpec(name=id), b"hidden")

    async def _availability(self) -> None:
        id = self._random.choice(self._cluster.workers)
        wish = self._random.choice((Availability.DRAIN, Availability.PAUSE, *(Availability.ACTIVE,) * 2))
        await self._set_availability(id, wish)

    async def _label(self) -> None:
        """A node moves to another zone, or to none."""
        zone = self._random.choice((*ZONES, ""))

        def labelled(spec: NodeSpec) -> NodeSpec:
            return replace(spec, labels={ZONE: zone} if zone else {})

        await self._set_node(self._random.choice(self._cluster.workers), labelled)

    async def _set_availability(self, id: NodeId, availability: Availability) -> bool:
        return await self._set_node(id, lambda spec: replace(spec, availability=availability))

    async def set_role(self, id: NodeId, role: NodeRole) -> bool:
        """Gives whether the node is wished to be in ``role``."""
        return await self._set_node(id, lambda spec: replace(spec, role=role))

    async def resign(self, id: NodeId) -> None:
        """A manager that leaves asks to be demoted.  Raises: SkepError: the others cannot do without it."""
        store = await self._store()
        node = store.view().get(Node, id)
        spec = replace(node.spec, role=NodeRole.WORKER)
        self._answers.asked(SetNode(id, spec, node.version.index), self._answers.present)
        await store.update(resign, id)

    async def _set_node(self, id: NodeId, change: Callable[[NodeSpec], NodeSpec]) -> bool:
        """Gives whether the node is as was asked."""
        since = self._answers.present
        try:
            store = await self._store()
            if id in store.view().unreadable(Node):
                return False  # what stands for it is not what was asked for
            node = store.view().get(Node, id)
            spec, version = change(node.spec), node.version.index
            self._cluster.trace.add(f"user: {id} {spec.availability.value} {dict(spec.labels)}")
            if spec != node.spec:
                writing = store.update(update_node, id, spec, version)
                await self._answered(SetNode(id, spec, version), since, writing)
        except SkepError:
            return False
        return True

    async def _answered(self, request: Request, since: int, writing: Awaitable[T]) -> T:
        """Do as asked, and compare the answer with Docker's.  Raises: what it was answered."""
        asked = self._answers.asked(request, since)
        try:
            result = await writing
        except Unavailable:
            raise  # nobody knows what comes of it
        except SkepError as error:
            self._cluster.trace.add(f"user: refused: {error}")
            self._note(self._answers.refused(asked, status_of(error)))
            raise
        self._note(self._answers.accepted(asked))
        return result

    def _version(self, present: int) -> int:
        """Mostly the present one."""
        return present if self._random.random() >= LATE else present - 1

    # -- what they know --------------------------------------------------------------------------------------------

    def _living(self) -> list[ServiceId]:
        return [
            promise.id
            for promise in self._promises.services.values()
            if not promise.is_refused and not promise.is_removal_asked and promise.acknowledged
        ]

    def _told(self, service: Service) -> None:
        self._cluster.trace.add(f"user: told that {service.id} is at {service.version.index}")
        self._note(self._promises.told(service, self._cluster.committed.view))

    def _note(self, violations: Iterable[str]) -> None:
        self._cluster.observer.note(self._cluster.loop.time(), violations)

    def _now_ns(self) -> int:
        return self._cluster.clocks[self._cluster.managers[0]].now_ns()


def _of_another_mode(spec: ServiceSpec) -> ServiceSpec:
    if spec.mode.name == "global":
        return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=1)))
    return replace(spec, mode=ServiceMode(global_=GlobalService()), update_config=None)


def _renamed(spec: ServiceSpec) -> ServiceSpec:
    return replace(spec, name=f"{spec.name}2")


def _with_image(spec: ServiceSpec, image: str) -> ServiceSpec:
    container = spec.task_template.container_spec
    assert container is not None
    return replace(
        spec, task_template=replace(spec.task_template, container_spec=replace(container, image=image))
    )

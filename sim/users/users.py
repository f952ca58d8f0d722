"""Simulated users: requests to random managers, through the control functions that the API calls.

Requests are concurrent with each other and with faults.  ``Acknowledgements`` records their responses, and
``ResponseCheck`` compares them with Docker's.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from random import Random
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.users.random_specs import (
    IMAGES,
    JOB_IMAGES,
    MEMORY_BYTES,
    MORE_NAMES,
    NAMES,
    PRIORITIES,
    RESERVES,
    STACKS,
    ZONE,
    ZONES,
    Dependencies,
    a_spec,
    invalidated,
    with_image,
    with_labels,
)
from sim.users.receivers import TARGET, Receiver
from sim.users.reference import Create, Remove, Request, Rollback, SetNode, Update
from sim.users.responses import ResponseCheck
from sim.users.role_users import RoleUsers
from sim.users.stack_commands import StackCommands
from sim.users.upgrades import Upgrades
from sim.world.certificates import root
from sim.world.storage import DRIVER
from skep.api.errors import status_of
from skep.cli.apps.service import returned_to
from skep.errors import AlreadyExists, FailedPrecondition, NotFound, SkepError, Unavailable
from skep.manager.control.files import create_secret, remove_secret
from skep.manager.control.jobs import retry_job, run_job
from skep.manager.control.networks import create_network, remove_network
from skep.manager.control.nodes import update_node
from skep.manager.control.quotas import remove_quota, set_quota
from skep.manager.control.services import create_service, remove_service, rollback_service, update_service
from skep.manager.control.swarm import Rotations, update_swarm
from skep.manager.control.users import create_user, remove_user, set_roles
from skep.manager.control.volumes import create_volume, remove_volume
from skep.manager.failover.editing import add_address, remove_address
from skep.manager.failover.records import addresses_in
from skep.manager.membership.service import resign
from skep.manager.notify.records import targets_in
from skep.manager.notify.writing import add_target
from skep.manager.rebalance.records import (
    AFTER_RETURN_S_MIN,
    rebalancing_in,
    set_after_return,
    start_run,
    stop_run,
)
from skep.manager.services.freezes import end_freeze, has_freezes, set_freeze, set_window
from skep.manager.services.quotas import quota_of
from skep.manager.services.spec_history import comparable, revisions
from skep.model.network import Network, NetworkSpec
from skep.model.networks.failover import AddressRequest
from skep.model.node import Availability, Node, NodeRole, NodeSpec
from skep.model.options.freezes import FreezeRequest, MaintenanceWindow
from skep.model.options.labels import (
    DRAIN_NOW,
    FORGET_NODES,
    MAINTENANCE,
    PREEMPTION,
    PRIORITY,
    RESERVE_MEMORY,
    STOPPED,
    is_stopped,
)
from skep.model.options.schedules import CRON, CRON_SUSPEND, JOB_MODES
from skep.model.permissions.rights import ALLOW_LABEL
from skep.model.permissions.user import User, UserSpec
from skep.model.quota import QuotaSpec
from skep.model.secret import Secret, SecretSpec
from skep.model.service import (
    GlobalService,
    ReplicatedService,
    Service,
    ServiceMode,
    ServiceSpec,
)
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId, ServiceId, VolumeId
from skep.model.values.meta import Driver
from skep.model.values.times import SECOND_NS, moment, timestamp
from skep.model.volume import AccessMode, TypeMount, Volume, VolumeScope, VolumeSharing, VolumeSpec
from skep.store.etcd.store import EtcdStore
from skep.store.interface import Transaction, View
from skep.store.space import refusal

T = TypeVar("T")

SERVICES_MAX, EXTENDED_SERVICES_MAX = 3, 5
FIRST_SERVICES = 3
"""Number of services with which a run with extensions begins."""
NETWORK = "overlay"
"""Prefix of the names of users' networks."""
NETWORKS_MAX, SECRETS_MAX = 4, 2
VOLUMES_MAX, USERS_MAX = 3, 2
ADDRESSES = ("192.168.7.100/24", "fd07::100/64")
"""Failover addresses, outside of the address pools and of the nodes' addresses."""
ATTEMPTS_MAX = 25
"""Number of attempts after which a request counts as refused permanently."""
ACCESS_MODES = (
    AccessMode(mount_volume=TypeMount()),
    AccessMode(sharing=VolumeSharing.ONE_WRITER, mount_volume=TypeMount()),
    AccessMode(scope=VolumeScope.MULTI, sharing=VolumeSharing.ALL, mount_volume=TypeMount()),
)
WITH_TARGET = 0.4
"""Share of the runs with extensions that begin with a target of notifications."""
WITH_ADDRESSES = 0.4
"""Share of the runs with extensions that begin with failover addresses."""
DRAWS_MAX = 100
"""Maximum number of drawn specs.  About one in ten is of a service that can be steady."""
DRAINED_NOW = 0.3
"""Probability that a drain does not wait for replacements."""
COMMANDED = 0.3
"""Share of the runs with extensions that have stack commands, which keeps the others cheap."""
LATE = 0.1
"""Probability that a change is based on the previous version of an object."""


def _own_secrets(view: View) -> tuple[str, ...]:
    """Return the ids of secrets that a spec may name by id.  Those of users with roles have other names."""
    return tuple(one.id for one in view.find(Secret) if one.spec.name == one.id)


class Users:
    """All users of one cluster."""

    def __init__(
        self, cluster: SimulatedCluster, extensions: Random | None = None, commands: Random | None = None
    ) -> None:
        """Create the users.

        Args:
            extensions: draws features that Docker does not have, or None if users do not request such features.
            commands: draws commands on a stack, in some of the runs, or None for no such commands.
        """
        self._extensions = extensions
        self._cluster = cluster
        self._random = cluster.random
        self._acknowledgements = cluster.observer.acknowledgements
        self._responses = ResponseCheck(cluster.view)
        cluster.observer.rules += [self._acknowledgements, self._responses]
        self._numbers = count(1)
        self._requests: set[asyncio.Task[None]] = set()
        self._actions: tuple[Callable[[], Awaitable[None]], ...] = (
            *(self._create,) * 2,
            *(self._scale,) * 3,
            *(self._update,) * 3,
            *(self._rollback, self._remove, self._availability, self._read_barrier, self._read_barrier),
            *(self._label, self._request_invalid),
            *(self._network, self._network, self._secret),
        )
        self._served_by = cluster.managers[0]
        """Manager that received the last request."""
        self._services_max = SERVICES_MAX if extensions is None else EXTENDED_SERVICES_MAX
        self._upgrades = (
            Upgrades(cluster, extensions, self._responses, self._acknowledgements)
            if extensions is not None
            else None
        )
        self._stack_commands = None
        if commands is not None and commands.random() < COMMANDED:
            self._stack_commands = StackCommands(cluster, commands, self._note)
        self.receiver = Receiver(Random(f"receiver {cluster.loop.time()}"), self._note)
        """The target of notifications, if users add one."""
        self._role_users = RoleUsers(cluster, extensions, self._note) if extensions is not None else None
        if extensions is not None:
            self._actions += (
                *(self._create, self._scale, self._update),
                *(self._run_job, self._retry_job, self._retry_job, self._suspend),
                *(self._reprioritize, self._stop_or_start, self._rotate, self._quota, self._quota),
                *(self._volume, self._set_cluster, self._user, self._load, self._rotate_root),
                *(self._upgrade, self._upgrade),
                self._return_to_revision,
                *(self._act_in_role,) * 4,
            )
        if self._stack_commands is not None:
            self._actions += (self._command_stack,) * 4

    def act(self) -> None:
        """Begin one random request, sometimes two at once."""
        for _ in range(self._random.choice((1, 1, 1, 2))):
            self._begin(self._random.choice(self._actions))

    def maintain(self) -> None:
        """Begin one random request that maintains nodes or services."""
        changes = (self._create, self._scale, self._update, self._return_to_revision, self._stop_or_start)
        self._begin(self._random.choice((*changes, self._availability, self._upgrade, self._upgrade)))

    def update(self, id: ServiceId, image: str) -> None:
        """Begin an update of a service to ``image``."""

        async def run_update() -> None:
            await self._change(partial(with_image, image=image), id)

        self._begin(run_update)

    def begin(self) -> None:
        """Make the first requests: create a service, or several with volumes to share and settings of the cluster."""
        actions = [self._create]
        if self._extensions is not None:
            first = (self._volume, self._volume, self._set_cluster, self._quota, self._user)
            actions = [*first, *[self._create] * FIRST_SERVICES, self._first_addresses, self._first_target]
        for action in actions:
            self._begin(action)

    async def wait_until_finished(self) -> None:
        """Return when every request has its response."""
        while self._requests:
            await asyncio.wait(self._requests)

    async def activate_all(self) -> None:
        """Make all nodes active again, with retries."""
        for id in self._cluster.workers:
            while not await self._set_availability(id, Availability.ACTIVE):
                await self._cluster.clocks[id].sleep(0.2)

    async def pause_all_but(self, id: NodeId) -> None:
        """Pause all workers but ``id``, with retries, so that new tasks run there alone."""
        for other in self._cluster.workers:
            while other != id and not await self._set_availability(other, Availability.PAUSE):
                await self._cluster.clocks[other].sleep(0.2)

    async def end_stack_commands(self) -> None:
        """End all commands on stacks, and deploy and remove the stack once more."""
        if self._stack_commands is not None:
            await self._stack_commands.end()

    async def remove_all(self) -> None:
        """Remove every service, with retries."""
        for record in list(self._acknowledgements.services.values()):
            # A service whose creation got no response may exist.
            is_there = self._cluster.view.lookup(Service, record.id) is not None
            while not record.is_removed and (record.acknowledged or is_there):
                await self._request_removal(record.id)
                await asyncio.sleep(0.1)

    # -- requests --------------------------------------------------------------------------------------------------

    def _begin(self, action: Callable[[], Awaitable[None]]) -> None:
        async def run_guarded() -> None:
            try:
                await action()
            except SkepError as error:
                self._cluster.trace.add(f"user: {type(error).__name__}: {error}")

        task = self._cluster.loop.create_task(run_guarded(), name=action.__name__)
        self._requests.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._requests.discard(task)
        if not task.cancelled():
            task.result()

    async def _store(self, *, creates: bool | None = None) -> EtcdStore:
        """Return the store of a random manager after a barrier, and check that it shows all acknowledged requests.

        ``creates``: whether the request creates an object.  None if the request does not make the store grow.

        Raises: Unavailable: no manager serves, it has no quorum, or the store is nearly full.
        """
        running = [
            manager for manager in self._cluster.running_managers.values() if manager.store is not None
        ]
        if not running:
            raise Unavailable("no manager serves")
        manager = self._random.choice(running)
        self._served_by, store = manager.id, manager.store
        assert store is not None
        given = self._acknowledgements.given()
        await store.barrier()
        view = store.view()
        damaged = view.unreadable(Service)
        self._note(self._acknowledgements.broken(view, [one for one in given if one[0].id not in damaged]))
        if creates is not None and (why := refusal(await store.space(), creates=creates)):
            raise Unavailable(why)
        return store

    async def _read_barrier(self) -> None:
        await self._store()

    async def _create(self) -> None:
        if len(self._active()) >= self._services_max:
            return
        since = self._responses.present
        store = await self._store(creates=True)
        id = self.next_id()
        await self._request_service(store, since, id, self._draw(store.view()))

    def next_id(self) -> ServiceId:
        """Return the ID of the next service."""
        return ServiceId(f"s{len(self._acknowledgements.services) + 1}")

    def _draw(self, view: View) -> ServiceSpec:
        networks = [one.id for one in view.find(Network) if one.spec.name.startswith(NETWORK)]
        dependencies = Dependencies(
            networks=tuple(networks),
            secrets=_own_secrets(view),
            services=tuple(one.spec.name for one in view.find(Service)),
            volumes=tuple(one.spec.name for one in view.find(Volume)),
        )
        names = NAMES if self._extensions is None else (*NAMES, *MORE_NAMES)
        return a_spec(self._random.choice(names), self._random, dependencies, self._extensions)

    async def _request_service(self, store: EtcdStore, since: int, id: ServiceId, spec: ServiceSpec) -> None:
        record = self._acknowledgements.requested(id, spec)
        self._cluster.trace.add(f"user: create {id} {spec.name}")
        body = partial(create_service, new_id=lambda: id, new_name=lambda: id, now=timestamp(self._now_ns()))
        try:
            service = await self._compare(Create(id, spec), since, store.update(body, spec))
        except Unavailable:
            raise
        except SkepError:
            self._note(self._acknowledgements.refused(record, self._cluster.view))
            raise
        self._acknowledged(service)

    async def _scale(self) -> None:
        def scaled(spec: ServiceSpec) -> ServiceSpec:
            if spec.mode.name in ("global", "global-job"):
                return spec
            if (job := spec.mode.replicated_job) is not None:
                scaled_job = replace(job, total_completions=self._random.randint(0, 6))
                return replace(spec, mode=ServiceMode(replicated_job=scaled_job))
            replicas = self._random.randint(0, 6)
            return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)))

        await self._change(scaled)

    async def _update(self) -> None:
        def updated(spec: ServiceSpec) -> ServiceSpec:
            images = JOB_IMAGES if spec.mode.name in ("replicated-job", "global-job") else IMAGES
            return with_image(spec, self._random.choice(images))

        await self._change(updated)

    async def _change(
        self, change: Callable[[ServiceSpec], ServiceSpec], id: ServiceId | None = None
    ) -> None:
        """Update the service ``id``, or any service if ``id`` is None."""
        if not (active := self._active()):
            return
        id = id or self._random.choice(active)
        since = self._responses.present
        store = await self._store(creates=False)
        service = store.view().get(Service, id)
        # Every request has a unique label, so that its effect can be attributed to it.
        changed = change(service.spec)
        spec = replace(changed, labels={**changed.labels, "request": str(next(self._numbers))})
        self._acknowledgements.requested(id, spec)
        version = self._version(service.version.index)
        self._cluster.trace.add(f"user: update {id} at {version}")
        body = partial(update_service, now=timestamp(self._now_ns()))
        try:
            updated = await self._compare(
                Update(id, spec, version), since, store.update(body, id, spec, version)
            )
        except Unavailable:
            raise
        except SkepError:
            self._note(self._acknowledgements.refused_update(id, spec, self._cluster.view))
            raise
        self._acknowledged(updated)

    async def _request_invalid(self) -> None:
        """Request an invalid spec, another mode or another name."""
        since = self._responses.present
        if self._random.random() < 0.5:
            store = await self._store(creates=True)
            id = self.next_id()
            await self._request_service(store, since, id, invalidated(self._draw(store.view()), self._random))
            return
        await self._change(self._random.choice((self._invalidated, _of_another_mode, _renamed)))

    def _invalidated(self, spec: ServiceSpec) -> ServiceSpec:
        return invalidated(spec, self._random)

    async def _rollback(self) -> None:
        if not (active := self._active()):
            return
        id = self._random.choice(active)
        since = self._responses.present
        store = await self._store(creates=False)
        service = store.view().get(Service, id)
        version = self._version(service.version.index)
        self._cluster.trace.add(f"user: rollback {id} at {version}")
        body = partial(rollback_service, now=timestamp(self._now_ns()))
        writing = store.update(body, id, service.spec, version)
        self._acknowledged(await self._compare(Rollback(id, version), since, writing))

    async def _remove(self) -> None:
        if active := self._active():
            await self._request_removal(self._random.choice(active))

    async def _request_removal(self, id: ServiceId) -> None:
        record, since = self._acknowledgements.services[id], self._responses.present
        try:
            store = await self._store()
            record.is_removal_asked = True
            self._cluster.trace.add(f"user: remove {id}")
            body = partial(remove_service, now=timestamp(self._now_ns()))
            await self._compare(Remove(id), since, store.update(body, id))
        except Unavailable:
            return
        except SkepError:  # removed by an earlier attempt of unknown outcome
            pass
        record.is_removed = True

    async def _network(self) -> None:
        """Create an overlay network, or remove an existing one."""
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
        """Create a secret, or remove an existing one."""
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
        availability = self._random.choice(
            (Availability.DRAIN, Availability.PAUSE, *(Availability.ACTIVE,) * 2)
        )
        await self._set_availability(id, availability)
        with suppress(SkepError):
            await self._rebalance(await self._store(creates=False), Random(self._now_ns()))

    async def _label(self) -> None:
        """Set the labels of a node, or remove them, perhaps after a freeze: its zone, and memory for its system."""
        reserve = ""
        if self._extensions is not None:
            with suppress(SkepError):
                await self._freeze(await self._store(creates=False), Random(self._now_ns()))
            reserve = Random(self._now_ns()).choice(("", *RESERVES))
        zone = self._random.choice((*ZONES, ""))
        labels = {name: value for name, value in ((ZONE, zone), (RESERVE_MEMORY, reserve)) if value}

        def labeled(spec: NodeSpec) -> NodeSpec:
            return replace(spec, labels=labels)

        await self._set_node(self._random.choice(self._cluster.workers), labeled)

    async def _set_availability(self, id: NodeId, availability: Availability) -> bool | None:
        is_now = availability is Availability.DRAIN and self._random.random() < DRAINED_NOW

        def available(spec: NodeSpec) -> NodeSpec:
            labels = {name: value for name, value in spec.labels.items() if name != DRAIN_NOW}
            labels |= {DRAIN_NOW: "true"} if is_now else {}
            return replace(spec, availability=availability, labels=labels)

        return await self._set_node(id, available)

    async def set_role(self, id: NodeId, role: NodeRole) -> bool | None:
        """Request a role for a node.  Return whether its desired role is now ``role``, or None if that is unknown."""
        return await self._set_node(id, lambda spec: replace(spec, role=role))

    async def resign(self, id: NodeId) -> None:
        """Request the demotion of a leaving manager.  Raises: SkepError: the others would lose their quorum."""
        store = await self._store()
        node = store.view().get(Node, id)
        spec = replace(node.spec, role=NodeRole.WORKER)
        self._responses.requested(SetNode(id, spec, node.version.index), self._responses.present)
        await store.update(resign, id)

    async def _set_node(self, id: NodeId, change: Callable[[NodeSpec], NodeSpec]) -> bool | None:
        """Request a change of a node.  Return whether the node has the requested spec, or None if that is unknown."""
        since = self._responses.present
        try:
            store = await self._store()
            if id in store.view().unreadable(Node):
                return False  # the node's placeholder does not show the requested spec
            node = store.view().get(Node, id)
            spec, version = change(node.spec), node.version.index
            self._cluster.trace.add(f"user: {id} {spec.availability.value} {dict(spec.labels)}")
            if spec != node.spec:
                writing = store.update(update_node, id, spec, version)
                await self._compare(SetNode(id, spec, version), since, writing)
        except Unavailable:
            return None
        except SkepError:
            return False
        return True

    # -- requests that Docker does not have ------------------------------------------------------------------------

    async def settle(self) -> None:
        """Suspend every schedule, and end all freezes and the measurements of tasks, so that the cluster can come to
        rest.
        """
        while has_freezes(self._cluster.view):
            with suppress(SkepError):
                await (await self._store()).update(_unfrozen)
            await asyncio.sleep(0.2)
        while (found := rebalancing_in(self._cluster.view)).run is not None or found.after_return_s:
            with suppress(SkepError):
                await (await self._store()).update(set_after_return, 0)
                await (await self._store()).update(stop_run)
            await asyncio.sleep(1.0)
        while addresses := addresses_in(self._cluster.view).addresses:
            for one in addresses:
                with suppress(SkepError):
                    await (await self._store()).update(remove_address, one.address)
            await asyncio.sleep(1.0)
        self._cluster.nano_cpus = lambda _: None
        if self._upgrades is not None:
            await self._upgrades.end()
        if self._role_users is not None:
            await self._role_users.end()
        for service in self._cluster.view.find(Service):
            attempts = 0
            while CRON in service.spec.labels and not self._is_suspended(service.id):
                attempts += 1
                if attempts > ATTEMPTS_MAX:  # it refers to a deleted object, or exceeds a new quota
                    await self._request_removal(service.id)
                with suppress(SkepError):
                    await self._change(_suspended, service.id)
                await asyncio.sleep(0.2)

    async def force(self, id: ServiceId) -> None:
        """Update a service by force, with retries."""
        before = self._cluster.view.get(Service, id).spec.task_template.force_update
        for _ in range(ATTEMPTS_MAX):
            service = self._cluster.view.lookup(Service, id)
            if service is None or service.spec.task_template.force_update > before:
                return
            with suppress(SkepError):
                await self._change(forced, id)
            await asyncio.sleep(0.2)

    def a_free_spec(self, is_usable: Callable[[ServiceSpec], bool]) -> ServiceSpec | None:
        """Draw specs, and return the first usable one with a free name, or None after ``DRAWS_MAX`` draws."""
        view = self._cluster.view
        taken = {one.spec.name.lower() for one in view.find(Service)}
        drawn = (self._draw(view) for _ in range(DRAWS_MAX))
        return next((one for one in drawn if one.name.lower() not in taken and is_usable(one)), None)

    async def create(self, id: ServiceId, spec: ServiceSpec) -> None:
        """Create a service once a manager serves.  A refusal is recorded in the trace.

        The outcome may be unknown, so the request is not repeated.  A repetition of a committed request would be
        refused.
        """
        since = self._responses.present
        for _ in range(ATTEMPTS_MAX):
            try:
                store = await self._store(creates=True)
            except Unavailable:
                await asyncio.sleep(0.2)
                continue
            try:
                await self._request_service(store, since, id, spec)
            except SkepError as error:
                self._cluster.trace.add(f"user: {type(error).__name__}: {error}")
            return

    def _is_suspended(self, id: ServiceId) -> bool:
        service = self._cluster.view.lookup(Service, id)
        return service is None or service.removed_at is not None or CRON_SUSPEND in service.spec.labels

    async def _run_job(self) -> None:
        await self._of_job(partial(run_job, now=timestamp(self._now_ns()), replaces=self._is_heads()))

    async def _retry_job(self) -> None:
        await self._of_job(retry_job)

    async def _of_job(self, request: Callable[[Transaction, ServiceId], Service]) -> None:
        store = await self._store(creates=False)
        present = (store.view().lookup(Service, id) for id in self._active())
        if jobs := [one.id for one in present if one is not None and one.job_status is not None]:
            id = self._random.choice(jobs)
            self._cluster.trace.add(f"user: {getattr(request, '__name__', 'run_job')} {id}")
            await store.update(request, id)

    async def _suspend(self) -> None:
        def turned(spec: ServiceSpec) -> ServiceSpec:
            if CRON_SUSPEND in spec.labels:
                return replace(spec, labels={k: v for k, v in spec.labels.items() if k != CRON_SUSPEND})
            return _suspended(spec)

        await self._change(turned)

    async def _return_to_revision(self) -> None:
        """Run ``skep service rollback --to`` with a random revision.  Each one has to be a spec that was requested."""
        if not (active := self._active()):
            return
        store = await self._store(creates=False)
        random = Random(self._now_ns())
        service = store.view().get(Service, random.choice(active))
        revision = random.choice(revisions(store.view(), service))
        requested = [comparable(one) for one in self._acknowledgements.services[service.id].specs]
        if comparable(revision.spec) not in requested:
            self._note([f"revision {revision.number} of {service.id} is not a spec that was requested"])

        def returned(spec: ServiceSpec) -> ServiceSpec:
            built = returned_to(msgspec.to_builtins(revision.spec), msgspec.to_builtins(spec))
            return msgspec.convert(built, ServiceSpec)

        self._cluster.trace.add(f"user: return {service.id} to revision {revision.number}")
        await self._change(returned, service.id)

    async def _reprioritize(self) -> None:
        priority = str(self._random.choice((0, *PRIORITIES)))
        await self._change(lambda spec: with_labels(spec, {PRIORITY: priority}))

    async def _stop_or_start(self) -> None:
        def turned(spec: ServiceSpec) -> ServiceSpec:
            if spec.mode.name in JOB_MODES:
                return spec
            return with_labels(spec, {STOPPED: "false" if is_stopped(spec.labels) else "true"})

        await self._change(turned)

    async def _rotate(self) -> None:
        """Replace each secret of a service with another one."""
        present = [one.id for one in self._cluster.view.find(Secret)]

        def rotated(spec: ServiceSpec) -> ServiceSpec:
            container = spec.task_template.container_spec
            if container is None or not container.secrets or not present:
                return spec
            new = self._random.choice(present)
            secrets = tuple(replace(one, secret_id=new, secret_name=new) for one in container.secrets)
            template = replace(spec.task_template, container_spec=replace(container, secrets=secrets))
            return replace(spec, task_template=template)

        await self._change(rotated)

    async def _quota(self) -> None:
        """Set the quota of a stack, or remove it."""
        store = await self._store(creates=True)
        stack = self._random.choice(STACKS)
        if quota_of(store.view(), stack) is not None and self._random.random() < 0.3:
            await store.update(remove_quota, stack)
            return
        tasks, memory = self._random.choice(((4, 0), (8, 0), (0, 4 * MEMORY_BYTES), (6, 2 * MEMORY_BYTES)))
        self._cluster.trace.add(f"user: quota of {stack}: {tasks} tasks, {memory >> 20} MiB")
        spec = QuotaSpec(name=stack, tasks=tasks, memory_bytes=memory)
        id = f"q{next(self._numbers)}"
        await store.update(set_quota, spec, new_id=lambda: id, now=timestamp(self._now_ns()))

    async def _volume(self) -> None:
        """Create a cluster volume, or remove one."""
        store = await self._store(creates=True)
        present = store.view().find(Volume)
        if len(present) >= VOLUMES_MAX or (present and self._random.random() < 0.2):
            id = self._random.choice(present).id
            self._cluster.trace.add(f"user: remove volume {id}")
            await store.update(partial(remove_volume, id=id, force=False))
            return
        id = VolumeId(f"v{next(self._numbers)}")
        mode = self._random.choice(ACCESS_MODES)
        self._cluster.trace.add(f"user: create volume {id}, {mode.scope.value}, {mode.sharing.value}")
        spec = VolumeSpec(name=id, driver=Driver(name=DRIVER), access_mode=mode)
        await store.update(create_volume, spec, new_id=lambda: id, now=timestamp(self._now_ns()))

    async def _set_cluster(self) -> None:
        """Choose at random whether the cluster allows preemption, and whether it removes lost nodes."""
        labels = {PREEMPTION: "true"} if self._random.random() < 0.7 else {}
        if self._is_heads():
            labels[FORGET_NODES] = "1m"
        store = await self._store(creates=False)
        self._cluster.trace.add(f"user: the cluster has {labels}")
        await store.update(_relabeled, labels)
        await self._freeze(store, Random(self._now_ns()))

    async def _freeze(self, store: EtcdStore, random: Random) -> None:
        """Freeze the cluster or a stack, end the cluster's freeze, or set or remove a window.  Sometimes do nothing.

        Args:
            random: Draws the request.  It is separate, so that other requests of a seed stay the same.
        """
        now_ns = self._now_ns()
        until = FreezeRequest(until=timestamp(now_ns + random.randint(2, 40) * SECOND_NS))
        stack = random.choice(STACKS)
        window = MaintenanceWindow(cron="*/2 * * * *", length=60 * SECOND_NS)
        requests: dict[str, Callable[[Transaction], object]] = {
            "freeze": lambda tx: set_freeze(tx, "", until, by="", now_ns=now_ns),
            "freeze a stack": lambda tx: set_freeze(tx, stack, until, by="", now_ns=now_ns),
            "unfreeze": lambda tx: end_freeze(tx, ""),
            "window": lambda tx: set_window(tx, window, now_ns=now_ns),
            "no window": lambda tx: set_window(tx, None, now_ns=now_ns),
            "window of a stack": lambda tx: set_window(tx, window, stack, now_ns=now_ns),
            "no window of a stack": lambda tx: set_window(tx, None, stack, now_ns=now_ns),
        }
        name = random.choice([*requests, "", "", ""])
        if name:
            self._cluster.trace.add(f"user: {name}")
            with suppress(NotFound):
                await store.update(requests[name])
        await self._rebalance(store, random)

    async def _rebalance(self, store: EtcdStore, random: Random) -> None:
        """Let the leader rebalance now or after nodes return, or stop that.  Sometimes do nothing."""
        now = timestamp(self._now_ns())
        requests: dict[str, Callable[[Transaction], object]] = {
            "rebalance": lambda tx: start_run(tx, "", now),
            "rebalance after returns": lambda tx: set_after_return(tx, AFTER_RETURN_S_MIN),
            "stop rebalancing": stop_run,
        }
        name = random.choice([*requests, "rebalance", ""])
        if name:
            self._cluster.trace.add(f"user: {name}")
            with suppress(NotFound, FailedPrecondition):
                await store.update(requests[name])
        await self._address(store, random)

    async def _first_addresses(self) -> None:
        """Begin some runs with failover addresses, which every later fault then meets."""
        if Random(self._now_ns()).random() < WITH_ADDRESSES:
            self._cluster.hold_addresses()
            for text in ADDRESSES:
                store = await self._store(creates=False)
                await store.update(add_address, AddressRequest(address=text))

    async def _first_target(self) -> None:
        """Begin some runs with a target of notifications, once all managers know them."""
        if Random(self._now_ns()).random() < WITH_TARGET:
            self._cluster.network.receive_notification = self.receiver.notify
            while not targets_in(self._cluster.view):
                with suppress(SkepError):
                    await (await self._store(creates=True)).update(add_target, TARGET)
                await asyncio.sleep(0.5)

    async def _address(self, store: EtcdStore, random: Random) -> None:
        """Add or remove a failover address.  Mostly do nothing, because each one causes writes all the time."""
        text = random.choice(ADDRESSES)
        requests: dict[str, Callable[[Transaction], object]] = {
            "add": lambda tx: add_address(tx, AddressRequest(address=text)),
            "remove": lambda tx: remove_address(tx, text),
        }
        name = random.choice(["add", "add", "remove", *[""] * 6])
        if name:
            self._cluster.trace.add(f"user: {name} {text}")
            self._cluster.hold_addresses()
            with suppress(NotFound, AlreadyExists, FailedPrecondition):
                await store.update(requests[name])

    async def _rotate_root(self) -> None:
        """Run ``docker swarm ca --rotate``, perhaps while the root is being rotated."""
        store = await self._store(creates=False)
        if not (found := store.view().find(Swarm)):
            raise Unavailable("this manager cannot read the cluster's settings")
        spec, number = found[0].spec, next(self._numbers)
        forced = replace(spec.ca_config, force_rotate=spec.ca_config.force_rotate + 1)
        self._cluster.trace.add(f"user: rotate the root to {number}")
        body = partial(
            update_swarm,
            new_id=lambda: f"token{number}",
            now=moment(self._now_ns()),
            new_root=lambda: root(number),
        )
        spec = replace(spec, ca_config=forced)
        await store.update(body, spec, found[0].version.index, Rotations())

    async def _upgrade(self) -> None:
        """Begin ``skep upgrade`` of all workers."""
        if self._upgrades is not None:
            self._upgrades.act()

    async def _command_stack(self) -> None:
        """Begin ``skep stack deploy`` or another command on a stack."""
        if self._stack_commands is not None:
            self._stack_commands.act()

    async def _act_in_role(self) -> None:
        """Let a user with roles send a request."""
        if self._role_users is not None:
            self._role_users.act()

    async def _user(self) -> None:
        """Create a user, change a user's roles, or remove a user."""
        store = await self._store(creates=True)
        now, present = timestamp(self._now_ns()), store.view().find(User)
        roles = (self._random.choice(("viewer", f"operator:{STACKS[0]}", "admin")),)
        if len(present) < USERS_MAX:
            id = f"u{next(self._numbers)}"
            await store.update(create_user, UserSpec(name=id, roles=roles), new_id=lambda: id, now=now)
        elif self._is_heads():
            await store.update(set_roles, self._random.choice(present).id, roles, now=now)
        else:
            await store.update(remove_user, self._random.choice(present).id)

    async def _load(self) -> None:
        """Change the CPU use of every task from now on, or stop measuring it."""
        used = self._random.choice((None, 0, 300_000_000, 1_500_000_000))
        self._cluster.nano_cpus = lambda _: used

    def _is_heads(self) -> bool:
        return self._random.random() < 0.5

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _compare(self, request: Request, since: int, writing: Awaitable[T]) -> T:
        """Await the request, and compare its response with Docker's.  Raises: the error in the response."""
        asked = self._responses.requested(request, since)
        try:
            result = await writing
        except Unavailable:
            raise  # the outcome is unknown
        except SkepError as error:
            self._cluster.trace.add(f"user: refused: {error}")
            self._note(self._responses.refused(asked, status_of(error)))
            raise
        self._note(self._responses.accepted(asked))
        return result

    def _version(self, present: int) -> int:
        """Return the current version in most cases, otherwise the previous one."""
        return present if self._random.random() >= LATE else present - 1

    # -- records ---------------------------------------------------------------------------------------------------

    def _active(self) -> list[ServiceId]:
        return [
            record.id
            for record in self._acknowledgements.services.values()
            if not record.is_refused and not record.is_removal_asked and record.acknowledged
        ]

    def _acknowledged(self, service: Service) -> None:
        self._cluster.trace.add(f"user: acknowledged: {service.id} is at {service.version.index}")
        self._note(self._acknowledgements.acknowledge(service, self._cluster.committed.view))

    def _note(self, violations: Iterable[str]) -> None:
        self._cluster.observer.note(self._cluster.loop.time(), violations)

    def _now_ns(self) -> int:
        """Return the current time by the clock of the manager that serves the request."""
        return self._cluster.clocks[self._served_by].now_ns()


def forced(spec: ServiceSpec) -> ServiceSpec:
    """Return the spec that ``docker service update --force`` sends."""
    template = spec.task_template
    return replace(spec, task_template=replace(template, force_update=template.force_update + 1))


def _suspended(spec: ServiceSpec) -> ServiceSpec:
    return with_labels(spec, {CRON_SUSPEND: "true"}) if CRON in spec.labels else spec


def _relabeled(tx: Transaction, labels: Mapping[str, str]) -> None:
    if not (found := tx.find(Swarm)):
        raise Unavailable("this manager cannot read the cluster's settings")
    (swarm,) = found
    kept = {name: text for name, text in swarm.spec.labels.items() if name in (MAINTENANCE, ALLOW_LABEL)}
    tx.put(replace(swarm, spec=replace(swarm.spec, labels={**labels, **kept})))


def _unfrozen(tx: Transaction) -> None:
    for swarm in tx.find(Swarm):
        tx.put(replace(swarm, change_freezes={}, window=None, stack_windows={}))


def _of_another_mode(spec: ServiceSpec) -> ServiceSpec:
    if spec.mode.name == "global":
        return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=1)))
    return replace(spec, mode=ServiceMode(global_=GlobalService()), update_config=None)


def _renamed(spec: ServiceSpec) -> ServiceSpec:
    return replace(spec, name=f"{spec.name}2")

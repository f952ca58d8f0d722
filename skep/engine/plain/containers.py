"""The plain containers of a node: made, started, connected and removed for their users, who are not asked again.

The containers themselves are ``oci.Containers``', as tasks' are.  Here is what nobody else does for them: their restart
policies, and the removal of those that go with their end.
"""

import asyncio
from collections import defaultdict

import msgspec
import structlog

from skep.agent.executor.mounting import Mounting
from skep.aio.clock import Clock
from skep.aio.guard import report
from skep.dataplane.container_network import ContainerNetwork
from skep.engine.container import Container, ContainerWish, MountPoint
from skep.engine.containers import Containers
from skep.engine.images.store import ImageStore
from skep.engine.options import Plain
from skep.engine.plain import names, restarts, wish
from skep.engine.plain.requests import CreateBody
from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SkepError,
)
from skep.model.ids import ContainerId
from skep.model.meta import Driver
from skep.model.readable import NameSource, free_name
from skep.model.sandbox import EndpointRequest, NetworkMode
from skep.model.times import unix_ns

log = structlog.get_logger()

_SHARES_THE_HOSTS = (
    "container sharing network namespace with another container or host cannot be connected to any other "
    "network"
)
_HAS_NONE = (
    "container cannot be connected to multiple networks with one of the networks in private (none) mode"
)


class PlainContainers:
    """Containers that no service asked for."""

    def __init__(
        self,
        *,
        containers: Containers,
        images: ImageStore,
        mounting: Mounting,
        network: ContainerNetwork,
        clock: Clock,
        new_name: NameSource,
        hostname: str,
        log_default: Driver,
    ) -> None:
        """``hostname``: of the node; ``log_default``: driver and options of containers that name none."""
        self._containers = containers
        self._images = images
        self._mounting = mounting
        self._network = network
        self._clock = clock
        self._new_name = new_name
        self._hostname = hostname
        self._log_default = log_default
        self._changing: defaultdict[ContainerId, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._delays_s: dict[ContainerId, float] = {}
        self._following: dict[ContainerId, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Do what is to follow the end of each container, until cancelled.  They run on afterwards."""
        async with asyncio.TaskGroup() as group:
            for container in self._all():
                if not container.is_running and container.plain is not None:
                    first = restarts.after_restart_of_the_node(
                        container.plain, container.exit_code, was_started=container.was_started
                    )
                    self._follow(group, container.id, first)
            while True:
                try:
                    with self._containers.events.subscribed() as subscription:
                        for container in self._all():
                            self._look(group, container.id)
                        async for event in subscription:
                            if event.action == "die":
                                self._look(group, event.container_id)
                except ResourceExhausted as error:  # some ends were missed: all are looked at again
                    log.warning("ends of containers missed", reason=str(error))
                    await self._clock.sleep(restarts.FIRST_DELAY_S)

    # --- their lives ------------------------------------------------------------------------------------------

    async def create(self, name: str, body: CreateBody) -> Container:
        """Make a container that is not started.  ``name``: empty: one is made up.

        Raises: NotFound: no such image; AlreadyExists: the name is taken; InvalidArgument; Unimplemented.
        """
        chosen = names.checked(name) if name else self._free_name()
        plain = wish.plain_of(body)
        self._containers.check_free(chosen)  # before any volume is made
        image = self._images.get(body.image)
        defaults = image.config.defaults
        mounts = wish.mounts_of(body, defaults)
        gateway = self._network.gateway.subnet
        points: list[MountPoint] = []
        labels = wish.labels_of(body, defaults)
        config = wish.config_of(
            body,
            defaults,
            hostname=self._hostname,
            gateway=str(gateway[1]) if gateway is not None else "",
            log_default=self._log_default,
        )
        try:
            points = self._mounting.points(mounts, defaults.volumes or {})
            async with self._images.pinned(image.chain):
                container = await self._containers.create(
                    ContainerWish(
                        name=chosen,
                        image=body.image,
                        image_id=image.id,
                        layers=tuple(map(str, self._images.layers(image))),
                        config=msgspec.structs.replace(config, mounts=tuple(points)),
                        labels=labels,
                        plain=plain,
                    )
                )
            await self._mounting.fill(container, mounts)
        except SkepError as error:
            await self._mounting.discard_nameless(points)
            raise wish.worded(error) from error
        return container

    async def start(self, word: str) -> Container:
        """Start it for its user.  One that was to go with its end goes if it cannot be started.

        Raises: NotFound; SkepError: why not.
        """
        container, plain = self._plain(word)
        self._delays_s.pop(container.id, None)
        self._containers.change_plain(
            container.id, msgspec.structs.replace(plain, is_stopped=False, restarts=0)
        )
        try:
            async with self._changing[container.id]:
                return await self._containers.start(container.id)
        except SkepError:
            if plain.auto_remove:
                await self.remove(container.id, force=True, with_volumes=True)
            raise

    async def remove(self, word: str, *, force: bool = False, with_volumes: bool = False) -> None:
        """Free everything it holds, ``with_volumes`` those made for it alone, too.

        Raises: NotFound; StillRunning.
        """
        container = self._containers.get(word)
        await self._containers.remove(container.id, force=force)
        self._delays_s.pop(container.id, None)
        self._changing.pop(container.id, None)
        if with_volumes:
            await self._mounting.discard_nameless(container.config.mounts)

    async def rename(self, word: str, name: str) -> None:
        """Raises: NotFound; AlreadyExists; InvalidArgument; FailedPrecondition: the cluster knows its name."""
        container, _ = self._plain(word)
        chosen = names.checked(name)
        if chosen == container.name:
            raise InvalidArgument("Renaming a container with the same name as its current name")
        self._containers.check_free(chosen)  # before the network is told
        await self._network.rename(msgspec.structs.replace(container, name=chosen))
        self._containers.rename(container.id, chosen)

    # --- their networks ---------------------------------------------------------------------------------------

    async def connect(self, word: str, wanted: EndpointRequest) -> None:
        """Put it on one more network, now or with its start.

        Raises: NotFound; FailedPrecondition: it is there; SkepError, in Docker's words.
        """
        container, _ = self._plain(word)
        async with self._changing[container.id]:
            container, plain = self._plain(container.id)
            if plain.mode is NetworkMode.HOST:
                raise FailedPrecondition(_SHARES_THE_HOSTS)
            if plain.mode is NetworkMode.NONE:
                raise FailedPrecondition(_HAS_NONE)
            if container.is_running:
                sandbox = await self._network.connect(container, wanted)
                self._containers.change_sandbox(container.id, sandbox)
            elif any(one.network == wanted.network for one in plain.networks):
                raise FailedPrecondition(
                    f"endpoint with name {container.name} already exists in network {wanted.network}"
                )
            networks = (*plain.networks, wanted)
            self._containers.change_plain(container.id, msgspec.structs.replace(plain, networks=networks))

    async def disconnect(self, word: str, network: str, network_id: str = "") -> None:
        """Take it from a network.  ``network``: as its user says; ``network_id``: where that is known.

        Raises: NotFound; FailedPrecondition: it is not there; SkepError.
        """
        container, _ = self._plain(word)
        async with self._changing[container.id]:
            container, plain = self._plain(container.id)
            known, is_there = {network, network_id}, False
            sandbox = container.sandbox if container.is_running else None
            for place in sandbox.endpoints if sandbox is not None else ():
                if {place.network_id, place.network_name} & known:
                    is_there = True
                    known |= {place.network_id, place.network_name}
                    left = await self._network.disconnect(container, place.network_id)
                    self._containers.change_sandbox(container.id, left)
            networks = tuple(one for one in plain.networks if one.network not in known)
            if not is_there and len(networks) == len(plain.networks):
                raise FailedPrecondition(f"container {container.id} is not connected to network {network}")
            self._containers.change_plain(container.id, msgspec.structs.replace(plain, networks=networks))

    async def evict(self, container_id: ContainerId, network_id: str) -> None:
        """The cluster wants a place back."""
        try:
            await self.disconnect(container_id, network_id, network_id)
        except (NotFound, FailedPrecondition) as error:
            log.info("container was not there any more", container=container_id, reason=str(error))

    # --- what follows an end ----------------------------------------------------------------------------------

    def _look(self, group: asyncio.TaskGroup, id: ContainerId) -> None:
        container = next((one for one in self._all() if one.id == id), None)
        if container is None or container.plain is None or container.is_running or not container.was_started:
            return
        ran_s = (unix_ns(container.finished_at) - unix_ns(container.started_at)) / 1e9
        before_s = self._delays_s.get(id, 0.0)
        self._follow(group, id, restarts.after_end(container.plain, container.exit_code, ran_s, before_s))

    def _follow(self, group: asyncio.TaskGroup, id: ContainerId, next_: restarts.Next) -> None:
        if id in self._following or isinstance(next_, restarts.Rest):
            return
        task = group.create_task(self._do(group, id, next_), name=f"after the end of {id[:12]}")
        self._following[id] = task
        task.add_done_callback(lambda _: self._following.pop(id, None))

    async def _do(self, group: asyncio.TaskGroup, id: ContainerId, next_: restarts.Next) -> None:
        try:
            if isinstance(next_, restarts.Remove):
                await self.remove(id, with_volumes=True)
                return
            while isinstance(next_, restarts.StartAgain):
                self._delays_s[id] = next_.delay_s
                next_ = await self._start_again(id, next_)
        except NotFound:
            pass  # its user was faster
        except Exception as error:
            report(error, "plain container left as it is", container=id)

    async def _start_again(self, id: ContainerId, due: restarts.StartAgain) -> restarts.Next:
        """Start it, unless its user has decided otherwise meanwhile; gives what follows.  Raises: NotFound."""
        was_stopped = self._plain(id)[1].is_stopped
        await self._clock.sleep(due.delay_s)
        async with self._changing[id]:
            container, plain = self._plain(id)
            if container.is_running or (plain.is_stopped and not was_stopped):
                return restarts.Rest()
            changed = msgspec.structs.replace(plain, restarts=plain.restarts + 1, is_stopped=False)
            self._containers.change_plain(id, changed)
            try:
                await self._containers.start(id)
            except SkepError as error:
                log.info("plain container not started again", container=id, reason=str(error))
                return restarts.after_end(changed, self._containers.get(id).exit_code or 1, 0.0, due.delay_s)
        return restarts.Rest()

    def _all(self) -> list[Container]:
        return [one for one in self._containers.list() if one.plain is not None]

    def _plain(self, word: str) -> tuple[Container, Plain]:
        container = self._containers.get(word)
        if container.plain is None:
            raise FailedPrecondition(f"container {container.name} belongs to a task")
        return container, container.plain

    def _free_name(self) -> str:
        name = free_name(self._new_name, self._is_taken, attempts=100)
        if name is None:
            raise ResourceExhausted("no free name was found: give the container one (--name)")
        return name

    def _is_taken(self, name: str) -> bool:
        return any(one.name == name for one in self._containers.list())

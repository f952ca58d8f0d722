"""What a node in a swarm runs: its agent, its manager process; and what it says of itself when it registers."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random

import msgspec
import structlog

from skep import __version__
from skep.agent.agent import Agent
from skep.agent.assignments import LogSource
from skep.agent.executor.attaching import ClusterAttachments, is_attachment
from skep.agent.executor.interface import Executor
from skep.agent.managers import ManagerList
from skep.agent.path_stream import PathSource
from skep.agent.reports import Reports
from skep.agent.revisions import SeenRevision
from skep.agent.worker import Worker
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.errors import Untranslated
from skep.api.swarm_requests import Joining, advertised
from skep.configuration.configuration import Configuration
from skep.dataplane.encrypted.methods import Refusal, label
from skep.dataplane.tables.keeper import TableKeeper
from skep.engine.cgroups import Cgroups
from skep.errors import InvalidArgument, SkepError, Unavailable
from skep.linux.routes import read_routes
from skep.model.addresses import host_of
from skep.model.ids import NodeId
from skep.model.node import EngineDescription, EnginePlugin, NodeDescription, NodeRole
from skep.model.pair_keys import KeysTold, Method
from skep.model.planes import DATA_PATH_LABEL, NODE_LABEL, PATHS_LABEL
from skep.model.routes import ROUTES_LABEL, MachineRoute, routes_label
from skep.model.service import Platform, Resources
from skep.node.conditions import Conditions
from skep.node.contact import Contact
from skep.node.features import Features, labels
from skep.node.interfaces import read_interfaces
from skep.node.joining import join
from skep.node.load import LoadMeter, reader_of
from skep.node.local import LocalNode, Peer
from skep.node.machine import Machine
from skep.node.management import ManagerProcess
from skep.node.manager_files import ManagerFiles
from skep.node.participation import AgentConnection
from skep.node.renewal import KeyPairCredentials
from skep.node.resigning import resign
from skep.security import keypair
from skep.security.keypair import KeyPair
from skep.security.locking import KeyLock

log = structlog.get_logger()

REVISION_FILE = "seen.json"
"""Among the certificates, with which it goes: the newest assignments this node has seen."""

_REMOVAL_TIMEOUT_S = 60.0
_PLACES_TIMEOUT_S = 5.0
_PLUGINS = (
    *(EnginePlugin(type="Network", name=name) for name in ("bridge", "host", "null")),
    EnginePlugin(type="Log", name="json-file"),
    EnginePlugin(type="Volume", name="local"),
)
_OVERLAY = EnginePlugin(type="Network", name="overlay")
_OVERLAY_NEEDS = ("veth", "bridge", "vxlan", "nftables")
"""Tasks on overlay networks stay away from a machine that lacks one of these."""


class NodeParts:
    """Composes the parts that ``Membership`` runs.

    Args:
        configuration: the present one; asked at each use, since it may be reloaded.
        manager: makes the supervisor of this node's manager process.
        manager_stands_by: has one ready to be started in an instant (True), or none (False).
        manager_files: what the manager of this node reads at its start.
        method: how this node encrypts overlays; overlay_keys: is told the keys.
        paths: probes other nodes; None: there is nothing to probe with.
        places: of plain containers on the cluster's networks; None: the node runs none.
    """

    def __init__(
        self,
        *,
        certificates: Path,
        lock: KeyLock,
        machine: Machine,
        features: Features,
        configuration: Callable[[], Configuration],
        executor: Executor,
        worker: Worker,
        reports: Reports,
        contact: Contact,
        conditions: Conditions,
        logs: LogSource,
        tables: TableKeeper,
        clock: Clock,
        random: Random,
        manager: Callable[[], ManagerProcess],
        manager_stands_by: Callable[[bool], Awaitable[None]],
        manager_files: ManagerFiles,
        method: Method | Refusal,
        overlay_keys: Callable[[KeysTold], None],
        paths: PathSource | None,
        places: ClusterAttachments | None,
    ) -> None:
        self._certificates = certificates
        self._lock = lock
        self._machine = machine
        self._features = features
        self._configuration = configuration
        self._executor = executor
        self._worker = worker
        self._reports = reports
        self._contact = contact
        self._conditions = conditions
        self._logs = logs
        self._tables = tables
        self._clock = clock
        self._random = random
        self._manager = manager
        self._manager_stands_by = manager_stands_by
        self.manager_files = manager_files
        self._method = method
        self._overlay_keys = overlay_keys
        self._paths = paths if self._carries_overlays() else None
        self._places = places
        self._meter = LoadMeter(reader_of(machine, Cgroups(configuration().cgroup_parent)), clock)

    def manager(self) -> ManagerProcess:
        return self._manager()

    async def manager_stands_by(self, wanted: bool) -> None:
        try:
            await self._manager_stands_by(wanted)
        except Unavailable as error:
            log.warning("no manager process stands by", reason=str(error))

    def agent(
        self,
        node: LocalNode,
        remember: Callable[[tuple[Peer, ...]], None],
        certified: Callable[[NodeRole], None],
    ) -> AgentConnection:
        self._executor.identify(node.node_id)
        credentials = KeyPairCredentials(
            self._certificates,
            self._clock,
            self._random,
            changed=lambda pair: certified(pair.identity.role),
            lock=self._lock,
        )
        agent = Agent(
            credentials=credentials,
            managers=ManagerList(self._known_managers(node), remember),
            describe=lambda: self.description(node.data_path_addr),
            sink=self._worker,
            reports=self._reports,
            logs=self._logs,
            clock=self._clock,
            random=self._random,
            address_of=node.reach,
            contact=self._contact,
            load=self._meter.load,
            overlay_keys=self._overlay_keys,
            paths=self._paths,
            tables=self._tables,
            unreached=self._note_unreached,
            seen=SeenRevision(
                self._certificates / REVISION_FILE, credentials.identity.cluster_id, self._clock
            ),
        )
        if self._places is not None:
            self._places.ask_through(agent)
        return agent

    def _note_unreached(self, sentence: str) -> None:
        if sentence:
            self._conditions.raise_("no-manager", sentence)
        else:
            self._conditions.clear("no-manager")

    def _known_managers(self, node: LocalNode) -> tuple[Peer, ...]:
        """Those heard of last, and those that the configuration names."""
        heard_of = {peer.addr for peer in node.managers}
        named = (addr for addr in self._configuration().managers if addr not in heard_of)
        return (*node.managers, *(Peer(NodeId(""), addr) for addr in named))

    async def placed(self, node: LocalNode) -> LocalNode:
        """The node with the address that the configuration says; one that cannot be found out changes nothing."""
        wished = self._configuration().advertise_addr
        if wished:
            try:
                addr = advertised(wished, node.listen_addr, await read_interfaces())
                node = msgspec.structs.replace(node, advertise_addr=addr, local_addr=host_of(addr))
            except SkepError as error:
                log.warning("the address of this node stays", configured=wished, reason=str(error))
        if node.is_manager:
            await asyncio.to_thread(self.manager_files.update, node)
        return node

    async def request_certificate(self, plan: Joining) -> KeyPair:
        try:
            return await join(plan.remote_addrs[0], plan.token, self._clock, plan.availability)
        except InvalidArgument as error:
            raise Untranslated(str(error)) from error  # the engine answers 500 to a bad token

    async def resign(self, managers: Sequence[str]) -> None:
        pair = await asyncio.to_thread(keypair.load, self._certificates, self._lock)
        await resign(managers, pair)

    async def give_places_back(self) -> None:
        """Take plain containers from the cluster's networks; what no manager hears in time goes with the node."""
        if self._places is None:
            return
        try:
            async with asyncio.timeout(_PLACES_TIMEOUT_S):
                for task in filter(is_attachment, tuple(self._worker.tasks().values())):
                    await self._places.evict(task)
        except (TimeoutError, SkepError) as error:
            log.warning("places on networks not given back", reason=str(error))

    async def remove_tasks(self) -> None:
        """Have every task killed and removed, as Docker does; waits for up to a minute, what is left then is logged."""
        if self._places is not None:
            self._places.ask_through(None)
        self._note_unreached("")
        await self._worker.clear()
        backoff = Backoff(0.02, 0.5, chance=self._random.random)
        try:
            async with asyncio.timeout(_REMOVAL_TIMEOUT_S):
                while await self._executor.leftovers():
                    await backoff.sleep(self._clock)
                await self._tables.clear()
                if self._paths is not None:
                    self._paths.wish(None)
        except TimeoutError:
            log.error("tasks left behind", tasks=await self._executor.leftovers())

    def description(self, data_path_addr: str = "") -> NodeDescription:
        """What the managers know of this machine.

        ``data_path_addr``: where its VXLAN arrives; empty: where it connects from.
        """
        configuration = self._configuration()
        own = {NODE_LABEL: "true", ROUTES_LABEL: routes_label(MachineRoute(*one) for one in read_routes())}
        if self._paths is not None:
            own[PATHS_LABEL] = "1"
        if data_path_addr:
            own[DATA_PATH_LABEL] = data_path_addr
        return NodeDescription(
            hostname=self._machine.hostname,
            platform=Platform(architecture=self._machine.architecture, os="linux"),
            resources=Resources(
                nano_cpus=self._machine.nano_cpus,
                memory_bytes=self._machine.memory_bytes,
                generic_resources=configuration.generic_resources,
            ),
            engine=EngineDescription(
                engine_version=__version__,
                labels={
                    **labels(self._features),
                    **configuration.labels,
                    **label(self._method),
                    **own,
                    **self._conditions.labels(),
                },
                plugins=(*_PLUGINS, _OVERLAY) if self._carries_overlays() else _PLUGINS,
            ),
        )

    def _carries_overlays(self) -> bool:
        return all(map(self._features.has, _OVERLAY_NEEDS))

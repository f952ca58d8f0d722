"""Dependencies of the request handlers: the store, the clock, and the manager's parts."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import msgspec
from aiohttp import web

from skep.aio.clock import Clock
from skep.aio.event_loop.loop_lag import LoopLag
from skep.aio.slots import Slots
from skep.api.access.identity import identity_of
from skep.api.backups import BackupRequest, Sealer
from skep.api.errors import rpc_errors
from skep.api.formats.gosyntax import BOOLEANS
from skep.api.http.responses import KnownJson
from skep.errors import InvalidArgument, ResourceExhausted, SkepError, Unavailable
from skep.manager.journal.loop import Journal
from skep.manager.journal.past import PastStates
from skep.manager.quorum import Quorum
from skep.manager.telemetry.events import ClusterEvents
from skep.manager.telemetry.metrics import ClusterMetrics
from skep.manager.telemetry.node_events import AllEvents
from skep.manager.telemetry.task_usages import no_routes, no_usages
from skep.model.door.traffic import RouteTraffic
from skep.model.logs import LogLine, LogQuery
from skep.model.measures.readings import ScalingMeasurements
from skep.model.networks.paths import DiagnosticsResult
from skep.model.swarm import CAConfig, Swarm
from skep.model.task import Task
from skep.model.values.ids import IdSource, NodeId
from skep.model.values.name_generator import NameSource
from skep.model.values.times import Timestamp, timestamp
from skep.security.rotation import PreparedRoots, Roots
from skep.store.interface import Store, Transaction, View
from skep.store.space import refusal
from skep.tracing import within
from skep.wire.tunnel import Tunnel

R = TypeVar("R")
P = ParamSpec("P")


class Logs(Protocol):
    """The output of tasks (``manager.logbroker``)."""

    def subscribe(self, query: LogQuery) -> AsyncIterator[LogLine]:
        """Yield lines of all tasks that ``query`` selects, as they arrive.  Ends after the last one unless
        ``query.follow``.

        Closing the iterator ends the subscription on all nodes.

        Raises:
            SkepError: Raised at the end, if nodes did not respond.  It names them.
        """

    def batches(self, query: LogQuery) -> AsyncGenerator[Sequence[LogLine], None]:
        """Yield the lines of ``subscribe``, some at a time."""


class Sent(msgspec.Struct, frozen=True):
    """A message to a viewer of the cluster.  ``event`` is ``snapshot`` or ``change``."""

    event: str
    cursor: str
    data: bytes


class Backing(Protocol):
    """Creates backups (``manager.storage.backup``)."""

    def check(self) -> None:
        """Check that a backup could be restored.  Raises: FailedPrecondition."""

    def begin(self, request: BackupRequest) -> Sealer:
        """Return the sealer that encrypts the backup.  Raises: InvalidArgument."""

    def pieces(self, sealer: Sealer) -> AsyncIterator[bytes]:
        """Yield the backup file.  Raises: SkepError: the file is incomplete."""


class PathDiagnostics(Protocol):
    """Makes nodes probe the paths between them (``manager.probes.diagnostics``)."""

    def require_throughput(self) -> None:
        """Raise RetryLater while a throughput test runs, and for a short time after it."""

    async def run_all(
        self, on_result: Callable[[DiagnosticsResult], Awaitable[None]], *, throughput: bool = False
    ) -> None:
        """Call ``on_result`` with each node's result as it arrives, within 25 s, or with the reason of its absence."""


class ExternalRoots(Protocol):
    """Requests to external authorities for a change of the cluster's root (``manager.ca.external``)."""

    async def prepare(self, swarm: Swarm, roots: Roots, config: CAConfig) -> PreparedRoots:
        """Prepare the change, within seconds.  Raises: InvalidArgument, Unavailable."""


class Tunnelling(Protocol):
    """Connections to the containers of all nodes (``manager.nodes.tunnels``)."""

    def open(
        self, task: Task, *, head: bytes = b"", port: int = 0, is_admin: bool = False
    ) -> AbstractAsyncContextManager[Tunnel]:
        """Open a tunnel to the container of ``task``: an HTTP exchange that starts with ``head``, or a connection to
        ``port``.

        Raises:
            SkepError: No tunnel can be opened, with the reason.
        """


class Watching(Protocol):
    """Rows of the cluster for the dashboard (``manager.view``)."""

    def prepare(self) -> None:
        """Prepare for a viewer that is about to connect."""

    async def snapshot(self) -> bytes:
        """Return all rows as one JSON object.  Raises: Unavailable."""

    async def snapshot_of(self, past: View, at_s: float) -> bytes:
        """Return the rows of an earlier state, which existed at Unix time ``at_s``."""

    def watch(self, cursor: str = "") -> AsyncGenerator[Sent | None, None]:
        """Yield a snapshot, or the changes after ``cursor``, then new changes.  Yields None after an idle period.

        Raises:
            Unavailable: There are too many viewers.
        """


class ManagerApi(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a manager that the request handlers use."""

    store: Store
    logs: Logs
    events: ClusterEvents
    all_events: AllEvents
    clock: Clock
    new_id: IdSource
    new_name: NameSource
    backups: Backing
    diagnostics: PathDiagnostics
    external: ExternalRoots
    tunnels: Tunnelling
    collect_usages: Callable[[], Awaitable[ScalingMeasurements]] = no_usages
    """Collects measurements of autoscaled services from all managers."""
    collect_routes: Callable[[], Awaitable[Sequence[RouteTraffic]]] = no_routes
    """Collects the recent requests by route over all front doors, from all managers."""
    quorum: Callable[[], Quorum] = Quorum
    """Returns whether a leader exists, as seen by this manager."""
    lag: LoopLag = msgspec.field(default_factory=LoopLag)
    metrics: ClusterMetrics | None = None
    cluster_view: Watching | None = None
    journal: Journal | None = None
    past: PastStates | None = None
    nodes: KnownJson = msgspec.field(default_factory=KnownJson)
    services: KnownJson = msgspec.field(default_factory=KnownJson)
    plans: Slots = msgspec.field(default_factory=lambda: Slots(2, 8, "plans are made by this manager"))
    checks: Slots = msgspec.field(
        default_factory=lambda: Slots(2, 128, "deploys are checked by this manager")
    )
    """Slots for checks.  A check takes milliseconds, so a hundred deploys that start at once wait for each other."""
    catalog_readers: Slots = msgspec.field(
        default_factory=lambda: Slots(256, 0, "readers of the catalog are served by this manager")
    )
    """Slots for requests that wait for a change of the catalog, one for each machine with a balancer."""
    own: NodeId = NodeId("")
    """This manager's node."""
    own_error: Callable[[], str] = str
    """Returns this manager's own problem, such as a full disk, as a sentence.  Empty without a known problem."""

    def now(self) -> Timestamp:
        """Return the current time for an object's timestamp."""
        return timestamp(self.clock.now_ns())

    async def update(
        self, operation: Callable[Concatenate[Transaction, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run an operation of ``manager.control``, and translate its errors to the wording of SwarmKit's API."""
        try:
            with within("store") as part:
                result = await self.store.update(operation, *args, **kwargs)
                if part is not None:
                    part.result = result
                return result
        except SkepError:
            with rpc_errors(), self.with_own_error():
                raise

    async def require_room(self, *, creates: bool, adds: int = 0) -> None:
        """Refuse a request that makes the store grow if it is nearly full.

        Args:
            adds: bytes that the request and those after it add together.

        Raises: ResourceExhausted; Unavailable.
        """
        with rpc_errors(), self.with_own_error():
            space = await self.store.space()
            if space is not None and (why := refusal(space, creates=creates, adds=adds)):
                raise ResourceExhausted(why)

    @contextmanager
    def with_own_error(self) -> Iterator[None]:
        """Append ``own_error`` to an ``Unavailable``, because the cause may be this manager alone."""
        try:
            yield
        except Unavailable as error:
            if own_error := self.own_error():
                raise Unavailable(f"{error} {own_error}") from error
            raise


MANAGER = web.AppKey("manager", ManagerApi)
WORKER_HEADER = "X-Skep-Worker"
"""Header of requests that a manager answers for a worker's client.  Its value is the worker's id."""


def manager_of(request: web.Request) -> ManagerApi:
    """Return the manager that serves ``request``."""
    return request.app[MANAGER]


def plan_slot(request: web.Request) -> AbstractAsyncContextManager[None]:
    """Return a slot for planning.  One user below administrator has only a share of them.

    Raises, when entered: ResourceExhausted: too many requests are waiting.
    """
    identity, plans = identity_of(request), manager_of(request).plans
    return plans.hold() if identity.is_admin else plans.hold_share(str(identity))


def past_of(request: web.Request) -> PastStates:
    """Return the earlier states of the cluster.  Raises: Unavailable."""
    past = manager_of(request).past
    if past is None:
        raise Unavailable("this manager keeps no history")
    return past


async def current_view(request: web.Request) -> View:
    """Return a view with everything acknowledged before ``request``, or any view for ``X-Skep-Stale: 1``.

    Raises:
        Unavailable: There is no quorum.
    """
    manager = manager_of(request)
    if request.headers.get("X-Skep-Stale") != "1":
        with manager.with_own_error():
            await manager.store.barrier()
    return manager.store.view()


_DIGITS = re.compile(r"[0-9]+")


def strict_flag(request: web.Request, name: str) -> bool | None:
    """Return the query parameter ``name`` parsed like Go's ``strconv.ParseBool``, or None if it is missing or empty.

    Raises:
        ValueError: The value is not a boolean.  The callers' errors differ in their text.
    """
    word = request.query.get(name, "")
    if not word:
        return None
    if word not in BOOLEANS:
        raise ValueError(word)
    return BOOLEANS[word]


def wrapped_flag(request: web.Request, name: str) -> bool:
    """Return ``strict_flag``, with the error text of the service and network routes.  Raises: InvalidArgument."""
    try:
        return bool(strict_flag(request, name))
    except ValueError as error:
        word = str(error)
        raise InvalidArgument(
            f'invalid value for {name}: {word}: strconv.ParseBool: parsing "{word}": invalid syntax'
        ) from error


def version_parameter(request: web.Request, noun: str) -> int:
    """Return the ``version`` parameter of an update.  Raises: InvalidArgument with Go's error text."""
    word = request.query.get("version", "")
    if not _DIGITS.fullmatch(word):
        problem = "invalid syntax"
    elif len(word.lstrip("0")) > 20 or int(word) >= 2**64:
        problem = "value out of range"
    else:
        return int(word)
    raise InvalidArgument(
        f"invalid {noun} version '{word}': strconv.ParseUint: parsing \"{word}\": {problem}"
    )

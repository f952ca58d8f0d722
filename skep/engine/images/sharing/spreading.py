"""Fetches an image from the nodes of the cluster if no registry provides it.

Only managers resolve names, because any node could call any image ``nginx``.  A digest is accepted from any node,
because the content is verified.  Nodes are tried in the order in which they responded, the nearest first.  A busy node
is skipped, and a node that has sent wrong content is not used again.  When many nodes fetch an image at once, they get
each layer from each other as soon as one of them has it (``serving`` limits the uploads of a node).  While some nodes
have it and are busy, or are about to have it, the fetch waits with growing, jittered pauses.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from enum import Enum
from typing import Protocol, TypeAlias

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.engine.images.digest import is_digest
from skep.engine.images.reference import Reference
from skep.engine.images.registry.endpoints import TRANSFERS
from skep.engine.images.registry.registry import Document, RegistryError
from skep.errors import NotFound, ResourceExhausted, RetryLater, SkepError, Unavailable

log = structlog.get_logger(__name__)

RESPONSE_S = 20.0
"""Time limit in seconds for a manifest, and for the start of a blob, including the connection."""
GRACE_S = 0.05
"""Seconds after the first manifest in which further responses still determine the order of nodes."""
PIECE_S = 30.0
"""Longest time in seconds between two pieces of a blob."""
BYTES_PER_S_MIN = 64 << 10
"""Slowest accepted rate of a node, checked after a first half minute.  Slower transfers are abandoned."""
WAIT_S_MAX = 600.0
"""Seconds to wait for a blob that a node has, or is about to have, while none sends it."""
FAILURES_MAX = 2
"""Consecutive failures after which a node counts as not having the image."""
ROUNDS_WITHOUT_MAX = 3
"""Consecutive rounds in which no node has a blob, or is about to have it, before the fetch fails."""
DISTRUST_S = 3600.0
"""Seconds for which a node that sent wrong bytes is not asked."""
DISTRUSTED_MAX = 256
"""Limit for the number of distrusted nodes that are remembered."""
PAUSE_S, PAUSE_S_MAX = 0.1, 2.0
"""First and longest pause in seconds between two attempts to find a node with a layer."""


class ImageSource(Protocol):
    """A node that may have the image.  ``name`` is its node id."""

    @property
    def name(self) -> str: ...

    @property
    def is_manager(self) -> bool: ...

    async def manifest(self, target: str, bytes_max: int) -> Document:
        """Return a manifest, which is not verified.  See ``ServedImages.manifest``.  Raises: SkepError."""

    def blob(self, digest: str, *, last_resort: bool) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Stream the pieces of a blob, which are not verified.

        Raises:
            NotFound: the node does not have it.
            RetryLater: it will have it soon.
            ResourceExhausted: it is busy.
            SkepError.
        """


FindSources: TypeAlias = Callable[[], Awaitable[Sequence[ImageSource]]]
"""Returns the nodes that may have an image by now.  The same node is always the same object.  Raises: SkepError."""


class Neighbors(Protocol):
    """Other nodes of the cluster (``agent.images.ClusterSources``)."""

    def sources(self, reference: Reference) -> AbstractAsyncContextManager[FindSources]:
        """Find the nodes that may have an image.  Connections to them are kept while the context is open.

        Raises: Unavailable: this node is not in a cluster, or reaches no manager.
        """


class FetchOutcome(Enum):
    """A node's response to the request for a blob."""

    SENT = "sent"
    BUSY = "busy"
    ARRIVING = "arriving"
    ABSENT = "absent"
    FAILED = "failed"


class SpreadStep(Enum):
    """Next step after a round in which no node sent the blob."""

    WAIT = "wait"
    INSIST = "insist"
    """Wait, then request the blob as a last resort."""
    GIVE_UP = "give up"


def after_round(outcomes: Sequence[FetchOutcome], empty_rounds: int) -> SpreadStep:
    """Decide what to do after a round of requests.

    ``empty_rounds``: Consecutive earlier rounds in which no node had the blob, or was about to have it.
    """
    if FetchOutcome.ARRIVING in outcomes:
        return SpreadStep.WAIT
    if FetchOutcome.BUSY in outcomes:
        return SpreadStep.WAIT if FetchOutcome.FAILED in outcomes else SpreadStep.INSIST
    return SpreadStep.GIVE_UP if empty_rounds + 1 >= ROUNDS_WITHOUT_MAX else SpreadStep.WAIT


class SourceRecord(msgspec.Struct, frozen=True):
    """Experience with a source from earlier requests.

    Args:
        response_s: Seconds that it took to respond, or None before its first response.
        failures: Consecutive failures.
    """

    response_s: float | None = None
    failures: int = 0


def in_order(sources: Sequence[ImageSource], records: dict[str, SourceRecord]) -> Sequence[ImageSource]:
    """Return the sources with the fewest failures first, then the fastest, then those without a response yet."""

    def key(source: ImageSource) -> tuple[int, bool, float]:
        record = records.get(source.name, SourceRecord())
        return record.failures, record.response_s is None, record.response_s or 0.0

    return sorted(sources, key=key)


class NodeFetcher:
    """Fetches images from other nodes, and remembers distrusted nodes.

    ``rng`` returns random numbers from 0 to 1.
    """

    def __init__(self, neighbors: Neighbors, clock: Clock, rng: Callable[[], float] = random.random) -> None:
        self._neighbors = neighbors
        self._clock = clock
        self._rng = rng
        self._distrusted: dict[str, float] = {}

    @asynccontextmanager
    async def repository(
        self, reference: Reference, *, only_own: bool = False
    ) -> AsyncIterator["ImageSpread"]:
        """Provide the nodes that may have ``reference`` as if they were one repository.

        For ``only_own`` see ``ImageSpread``.  Raises: Unavailable: this node is not in a cluster, or reaches no
        manager.
        """
        async with self._neighbors.sources(reference) as find:
            yield ImageSpread(reference, find, self._clock, self._rng, self._distrusted, only_own=only_own)


class ImageSpread:
    """One image on many nodes.  Implements ``pulling.Repository``.

    Args:
        distrusted: Time when a node sent wrong content, by node.  Shared by all fetches of this node.
        only_own: Whether the registry denies the image to the caller, so that only images that came from no registry
            are accepted.
    """

    transfers = TRANSFERS

    def __init__(
        self,
        reference: Reference,
        find: FindSources,
        clock: Clock,
        rng: Callable[[], float],
        distrusted: dict[str, float],
        *,
        only_own: bool = False,
    ) -> None:
        self._reference = reference
        self._only_own = only_own
        self._find = find
        self._clock = clock
        self._rng = rng
        self._distrusted = distrusted
        self._records: dict[str, SourceRecord] = {}
        self._senders: dict[str, ImageSource] = {}
        """Last sender of each blob."""

    async def manifest(self, target: str, bytes_max: int) -> Document:
        """Return the manifest or index for ``target``, a tag or a digest.

        Raises: NotFound: no node that may answer has it; Unavailable: no manager is reached.
        """
        sources = await self._sources()
        if is_digest(target):
            text = str(self._reference.with_digest(target))
        else:
            text = str(self._reference)
            sources = [source for source in sources if source.is_manager]
        document = await self._first(sources, text, target, bytes_max)
        if document is None:
            raise NotFound(f"no node of the cluster has {self._reference.familiar}")
        return document

    async def _first(
        self, sources: Sequence[ImageSource], text: str, target: str, bytes_max: int
    ) -> Document | None:
        """Return the first manifest that arrives.  Responses soon after it still determine the order of sources."""
        started, found = self._clock.monotonic(), list[Document]()
        unanswered, is_decided = set(sources), asyncio.Event()

        async def ask(source: ImageSource) -> None:
            document = await self._manifest_of(source, text, target, bytes_max, started)
            if document is not None:
                found.append(document)
            unanswered.discard(source)
            if found or not unanswered:
                is_decided.set()

        if not sources:
            return None
        with suppress(TimeoutError):
            async with asyncio.timeout(RESPONSE_S), asyncio.TaskGroup() as group:
                requests = [group.create_task(ask(source), name="manifest of a node") for source in sources]
                await is_decided.wait()
                await asyncio.wait(requests, timeout=GRACE_S)
                for request in requests:
                    request.cancel()
        return found[0] if found else None

    async def _manifest_of(
        self, source: ImageSource, text: str, target: str, bytes_max: int, started: float
    ) -> Document | None:
        """Return a node's manifest, or None if it has none or the wrong one."""
        try:
            document = await source.manifest(text, bytes_max)
        except NotFound:
            self._responded(source, started)
            return None
        except (SkepError, OSError) as error:  # any error affects only one node
            self._failed(source, error)
            return None
        self._responded(source, started)
        if len(document.content) > bytes_max or (is_digest(target) and document.digest != target):
            self._distrust(source, f"a manifest that does not match {target}")
            return None
        return document if document.is_own or not self._only_own else None

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Stream a whole blob from one node, since parts from two nodes could not be verified separately.

        Raises:
            NotFound: no node has it.
            RegistryError: the transfer was interrupted.
            Unavailable: no node sends it in time.
        """
        async with AsyncExitStack() as stack:
            source, pieces = await self._open(stack, digest)
            self._senders[digest] = source
            yield 0, self._relay(source, pieces)

    def mistrust(self, digest: str) -> bool:
        """Distrust the last sender of a blob that does not match ``digest``.  Return whether there was one."""
        source = self._senders.pop(digest, None)
        if source is None:
            return False
        self._distrust(source, f"a blob that does not match {digest}")
        return True

    async def _open(self, stack: AsyncExitStack, digest: str) -> tuple[ImageSource, AsyncIterator[bytes]]:
        """Open the blob on the first node, in order, that sends it."""
        began = self._clock.monotonic()
        pauses = Backoff(PAUSE_S, PAUSE_S_MAX, rng=self._rng)
        empty_rounds, last_resort = 0, False
        while True:
            outcomes = []
            for source in in_order(await self._sources(), self._records):
                outcome, pieces = await self._request(stack, source, digest, last_resort)
                if pieces is not None:
                    return source, pieces
                outcomes.append(outcome)
            step = after_round(outcomes, empty_rounds)
            if step is SpreadStep.GIVE_UP:
                raise NotFound(f"no node of the cluster has {digest} of {self._reference.familiar}")
            last_resort = step is SpreadStep.INSIST
            empty_rounds = (
                0 if {FetchOutcome.BUSY, FetchOutcome.ARRIVING} & set(outcomes) else empty_rounds + 1
            )
            if self._clock.monotonic() - began > WAIT_S_MAX:
                # Not a RegistryError, because the download would then retry and wait as long again.
                raise Unavailable(f"no node of the cluster sends {digest}: every node that has it is busy")
            await pauses.sleep(self._clock)

    async def _request(
        self, stack: AsyncExitStack, source: ImageSource, digest: str, last_resort: bool
    ) -> tuple[FetchOutcome, AsyncIterator[bytes] | None]:
        started = self._clock.monotonic()
        try:
            async with asyncio.timeout(RESPONSE_S):
                pieces = await stack.enter_async_context(source.blob(digest, last_resort=last_resort))
        except TimeoutError as error:
            return self._failed(source, error), None
        except NotFound:
            outcome = FetchOutcome.ABSENT
        except RetryLater:
            outcome = FetchOutcome.ARRIVING
        except ResourceExhausted:
            outcome = FetchOutcome.BUSY
        except (SkepError, OSError) as error:
            return self._failed(source, error), None
        else:
            self._responded(source, started)
            return FetchOutcome.SENT, pieces
        self._responded(source, started)
        return outcome, None

    async def _relay(self, source: ImageSource, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield ``pieces`` as long as they arrive in time.  Raises: RegistryError: they do not."""
        began, received = self._clock.monotonic(), 0
        try:
            while True:
                async with asyncio.timeout(PIECE_S):
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                received += len(piece)
                yield piece
                if self._clock.monotonic() - began > PIECE_S + received / BYTES_PER_S_MIN:
                    raise Unavailable("it sends too slowly")
        except (TimeoutError, SkepError) as error:
            self._failed(source, error)
            raise RegistryError(f"node {source.name} stopped sending: {error or 'no data'}") from error

    async def _sources(self) -> Sequence[ImageSource]:
        now = self._clock.monotonic()
        return [
            source
            for source in await self._find()
            if now - self._distrusted.get(source.name, -DISTRUST_S) >= DISTRUST_S
        ]

    def _responded(self, source: ImageSource, started: float) -> None:
        before = self._records.get(source.name, SourceRecord()).response_s
        took = self._clock.monotonic() - started
        self._records[source.name] = SourceRecord(took if before is None else min(took, before))

    def _failed(self, source: ImageSource, error: Exception) -> FetchOutcome:
        record = self._records.get(source.name, SourceRecord())
        self._records[source.name] = msgspec.structs.replace(record, failures=record.failures + 1)
        log.info(
            "image not fetched from node",
            node=source.name,
            image=self._reference.familiar,
            reason=str(error) or "timeout",
        )
        return FetchOutcome.FAILED if record.failures + 1 < FAILURES_MAX else FetchOutcome.ABSENT

    def _distrust(self, source: ImageSource, what: str) -> None:
        self._distrusted.pop(source.name, None)
        self._distrusted[source.name] = self._clock.monotonic()
        while len(self._distrusted) > DISTRUSTED_MAX:
            del self._distrusted[next(iter(self._distrusted))]
        log.warning("node sent wrong content", node=source.name, image=self._reference.familiar, what=what)

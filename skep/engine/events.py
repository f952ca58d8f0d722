"""Events of the node's containers, volumes and networks (``docker events``).

The last events are kept in memory, as the engine does (256), so that ``--since`` finds the recent past.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from skep.aio.clock import Clock
from skep.engine.containers.container import Container, ContainerEvent
from skep.errors import ResourceExhausted
from skep.model.values.ids import ContainerId

RECENT_MAX = 256
"""Events that are kept for ``--since``, as many as in Docker."""
PENDING_MAX = 4096
"""Limit for the events that wait for one subscriber."""
SUBSCRIBERS_MAX = 256
"""Limit for the clients that follow events at the same time."""


class NamedNetwork(NamedTuple):
    """The properties of a network that its events show."""

    id: str
    name: str
    driver: str


class EventSubscription:
    """The events since a client subscribed.  Only one reader may iterate over it."""

    def __init__(self) -> None:
        self._pending: deque[ContainerEvent] = deque()
        self._arrived = asyncio.Event()
        self._lagged = False

    def offer(self, event: ContainerEvent) -> None:
        """Queue an event.

        If more than ``PENDING_MAX`` wait, the subscription ends, because the publisher never waits for readers.
        """
        if len(self._pending) >= PENDING_MAX:
            self._lagged = True
        else:
            self._pending.append(event)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[ContainerEvent]:
        """Yield the events.  Raises: ResourceExhausted: the reader fell behind."""
        while True:
            while self._pending:
                yield self._pending.popleft()
            if self._lagged:
                raise ResourceExhausted(f"more than {PENDING_MAX} events were waiting to be read")
            self._arrived.clear()
            await self._arrived.wait()


class Events:
    """The events of the node's containers, volumes and networks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._recent: deque[ContainerEvent] = deque(maxlen=RECENT_MAX)
        self._subscriptions: set[EventSubscription] = set()

    def publish(self, action: str, container: Container, **attributes: str) -> None:
        """Send an event of ``container``, with Docker's attributes, to all subscribers."""
        self._publish(
            ContainerEvent(
                action=action,
                container_id=container.id,
                time_ns=self._clock.now_ns(),
                attributes={**attributes_of(container), **attributes},
            )
        )

    def publish_volume(self, action: str, name: str, attributes: Mapping[str, str]) -> None:
        """Send an event of a volume to all subscribers."""
        self._publish_object("volume", action, name, attributes)

    def publish_network(self, action: str, network: NamedNetwork, container_id: str = "") -> None:
        """Send an event of a network to all subscribers.

        Args:
                action: create, destroy, connect or disconnect.  The last two name the container.
        """
        attributes = {"container": container_id} if container_id else {}
        attributes |= {"name": network.name, "type": network.driver}
        self._publish_object("network", action, network.id, attributes)

    def _publish_object(self, type: str, action: str, id: str, attributes: Mapping[str, str]) -> None:
        self._publish(
            ContainerEvent(
                action=action,
                container_id=ContainerId(id),
                time_ns=self._clock.now_ns(),
                attributes=attributes,
                type=type,
            )
        )

    def publish_mounts(self, action: str, container: Container) -> None:
        """Send an event ``mount`` or ``unmount`` for each volume of ``container``.

        Source: moby 20.10, daemon/volumes_unix.go (setupMounts), container/container_unix.go (UnmountVolumes).
        """
        for point in container.config.mounts:
            if point.type != "volume" or not point.name:
                continue
            attributes = {"driver": point.driver or "local", "container": container.id}
            if action == "mount":
                attributes |= {
                    "destination": point.destination,
                    "read/write": str(not point.read_only).lower(),
                    "propagation": point.propagation,
                }
            self.publish_volume(action, point.name, attributes)

    def _publish(self, event: ContainerEvent) -> None:
        self._recent.append(event)
        for subscription in self._subscriptions:
            subscription.offer(event)

    def recent(self, since_ns: int) -> list[ContainerEvent]:
        """Return the kept events at or after ``since_ns`` (Unix time), oldest first."""
        return [event for event in self._recent if event.time_ns >= since_ns]

    @contextmanager
    def subscribed(self) -> Iterator[EventSubscription]:
        """Subscribe for the block.  Raises: ResourceExhausted: too many subscribers."""
        if len(self._subscriptions) >= SUBSCRIBERS_MAX:
            raise ResourceExhausted(f"{SUBSCRIBERS_MAX} clients already follow the events of this node")
        subscription = EventSubscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)


def attributes_of(container: Container) -> Mapping[str, str]:
    """Return the attributes of every container event in Docker: its labels, image and name."""
    return {**container.labels, "image": container.image, "name": container.name}

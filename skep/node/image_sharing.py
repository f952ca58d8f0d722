"""Serves the images of this node to other nodes of its cluster, and removes unused ones when their disk fills."""

from collections.abc import Callable
from functools import partial

from skep.agent.images import ClusterSources, ImagePort, needed_images
from skep.agent.renewal import KeyPairCredentials
from skep.agent.session.session_state import SessionState
from skep.aio.clock import Clock
from skep.configuration.configuration import Configuration
from skep.engine.api.containers import image_users
from skep.engine.engine import Engine
from skep.engine.images.collecting import ImageCollector, Marks
from skep.engine.images.sharing.serving import ServedImages
from skep.model.networks.addresses import host_of
from skep.node.cluster.local import LocalNode


class ImageSharing:
    """Tasks of a node that concern its images: serving them to other nodes, and removing unused ones.

    Args:
        engine: The node's engine, or None on a node without images.
        configuration: Returns the present configuration, which may be reloaded.
        sources: Finds other nodes from which images can be fetched.
    """

    def __init__(
        self,
        engine: Engine | None,
        session: SessionState,
        sources: ClusterSources,
        clock: Clock,
        configuration: Callable[[], Configuration],
    ) -> None:
        self._engine = engine
        self._session = session
        self._sources = sources
        self._clock = clock
        self._configuration = configuration
        self._port = (
            ImagePort(ServedImages(engine.images, clock), session, clock, configuration().image_port)
            if engine is not None
            else None
        )

    def port(self) -> int:
        """Return the port at which other nodes fetch images from this one, or 0."""
        return self._port.port if self._port is not None else 0

    async def exchange(self, credentials: KeyPairCredentials, node: LocalNode) -> None:
        """Exchange images with the other nodes of the cluster until cancelled."""
        with self._sources.using(lambda: credentials.pair):
            if self._port is not None:
                await self._port.run(lambda: credentials.pair, host_of(node.listen_addr))

    async def collect(self) -> None:
        """Remove unused images when their disk fills, while this node is in a cluster."""
        engine = self._engine
        if engine is None:
            return

        def marks() -> Marks:
            configuration = self._configuration()
            return Marks(configuration.image_gc_high, configuration.image_gc_low)

        await self._session.wait_session()
        needed = partial(needed_images, self._session)
        await ImageCollector(engine.images, lambda: image_users(engine), needed, self._clock, marks).run()

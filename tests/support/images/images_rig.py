"""Nodes of one cluster in this process, each with its own images, which they exchange over mutual TLS."""

import asyncio
import gzip
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from skep.agent.images import ClusterSources, ImagePort
from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.engine.images.digest import Digest, chain_ids
from skep.engine.images.image import Image
from skep.engine.images.local import ImageEvent
from skep.engine.images.reference import parse_reference
from skep.engine.images.sharing.serving import ServedImages
from skep.engine.images.sharing.spreading import NodeFetcher
from skep.engine.images.store import ImageStore
from skep.manager.nodes.image_directory import ImageDirectory
from skep.model.container import ContainerSpec
from skep.model.networks.data_planes import IMAGES_LABEL
from skep.model.node import EngineDescription, Node, NodeRole
from skep.model.options.labels import SHARE_IMAGES
from skep.model.service import ServiceSpec, TaskSpec
from skep.model.swarm import Swarm, SwarmSpec
from skep.model.task import Task
from skep.model.values.ids import new_id
from skep.security.keypair import KeyPair
from skep.security.tls import MANAGER_NAME, ServerTls, client_context
from skep.store.interface import Transaction
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import open_channel
from skep.wire.server import serve
from tests.support.builders import a_node, a_service, a_task
from tests.support.images.archives import a_config, a_file, a_tar, sha256
from tests.support.images.registry_rig import a_manifest
from tests.support.managers.wire_rig import Cluster, until

CLOCK = SystemClock()
APP = "localhost:1/app:1"
"""Image of a registry that does not exist."""


class SlowPort(ImagePort):
    """Responds to requests for manifests after ``delay_s``."""

    delay_s = 0.0

    async def _manifest(
        self, request: skep.ImageManifestRequest, caller: Caller
    ) -> skep.ImageManifestResponse:
        await asyncio.sleep(self.delay_s)
        return await super()._manifest(request, caller)


ServeImages = Callable[[ImageStore], ServedImages]
"""Makes what serves the images of one node."""


def as_usual(images: ImageStore) -> ServedImages:
    return ServedImages(images, CLOCK)


class ImageNode:
    """A node with its images, and a record of the images it has sent."""

    def __init__(
        self, root: Path, pair: KeyPair, on_event: Callable[[ImageEvent], None], serve_images: ServeImages
    ) -> None:
        self.pair = pair
        self.id = pair.identity.node_id
        self.session = SessionState(CLOCK)
        self.sources = ClusterSources(self.session)
        self.images = ImageStore(root, nodes=NodeFetcher(self.sources, CLOCK), on_event=on_event)
        self.served = serve_images(self.images)
        self.port = SlowPort(self.served, self.session, CLOCK)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port.port}"


class ImageCluster:
    """A manager, which knows where each image is, and nodes.  See ``image_cluster``.

    ``shares_images``: whether workers may read images for which they have no task.
    """

    def __init__(self, root: Path, *, shares_images: bool = True) -> None:
        self._root = root
        self._shares_images = shares_images
        self._stack = AsyncExitStack()
        self._address = ""
        self.cluster = Cluster()
        self.manager: ImageNode

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ImageCluster"]:
        store, own = self.cluster.store, self.cluster.pair(new_id(), NodeRole.MANAGER)
        directory = ImageDirectory(store, self.cluster.id, CLOCK, random.Random(1), answered_s=0.0)
        async with self._stack:
            bound = await self._stack.enter_async_context(
                serve(
                    directory.services(),
                    host="127.0.0.1",
                    port=0,
                    tls=ServerTls(own).front,
                    cluster_id=self.cluster.id,
                )
            )
            self._address = f"127.0.0.1:{bound.port}"
            if self._shares_images:
                await store.update(self._share)
            self.manager = await self.add(own)
            yield self

    async def add(
        self,
        pair: KeyPair | None = None,
        *,
        root: Path | None = None,
        on_event: Callable[[ImageEvent], None] = lambda _: None,
        serve_images: ServeImages = as_usual,
    ) -> ImageNode:
        """Add a node, a worker unless ``pair`` is a manager's.  It is ready, and known to the manager."""
        pair = pair or self.cluster.pair(new_id())
        node = ImageNode(root or self._root / new_id(), pair, on_event, serve_images)
        await node.images.open()
        channel = await self._stack.enter_async_context(
            open_channel(self._address, client_context(node.pair), MANAGER_NAME)
        )
        node.session.join(node.id)
        node.session.begin(channel)
        self._stack.enter_context(node.sources.using(lambda: node.pair))
        task = asyncio.create_task(node.port._serve(lambda: node.pair, "127.0.0.1", 0))
        self._stack.push_async_callback(_end, task)
        await until(lambda: node.port.port)
        await self._describe(node)
        return node

    async def _describe(self, node: ImageNode) -> None:
        known = a_node(node.id, role=node.pair.identity.role)
        engine = EngineDescription(engine_version="1", labels={IMAGES_LABEL: str(node.port.port)})
        known = msgspec.structs.replace(
            known, description=msgspec.structs.replace(known.description, engine=engine)
        )
        await self.cluster.store.update(lambda tx: tx.put(known))

    async def run_service(self, image: str, *nodes: ImageNode) -> None:
        """Create a service of ``image`` with a task on each of ``nodes``."""
        template = TaskSpec(container_spec=ContainerSpec(image=image))
        service = a_service(new_id(), spec=ServiceSpec(name=new_id(), task_template=template))
        tasks = [
            a_task(new_id(), slot=slot, node=node.id, service=service) for slot, node in enumerate(nodes)
        ]

        def put(tx: Any) -> None:
            tx.put(service)
            for task in tasks:
                tx.put(task)

        await self.cluster.store.update(put)

    async def remove_tasks(self, node: ImageNode) -> None:
        """Delete the tasks of the node, including its history."""

        def remove(tx: Transaction) -> None:
            for task in tx.find(Task, node_id=node.id):
                tx.delete(Task, task.id)

        await self.cluster.store.update(remove)

    def _share(self, tx: Transaction) -> None:
        tx.put(Swarm(id=self.cluster.id, spec=SwarmSpec(labels={SHARE_IMAGES: "true"})))

    async def forget(self, node: ImageNode) -> None:
        """Remove the node from the cluster."""
        await self.cluster.store.update(lambda tx: tx.delete(Node, node.id))


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


class MadeImage(msgspec.Struct, frozen=True):
    """An image in the form that a registry stores."""

    config: bytes
    blobs: tuple[bytes, ...]

    @property
    def manifest(self) -> bytes:
        return a_manifest(self.config, self.blobs)

    @property
    def digests(self) -> Sequence[str]:
        """Return the digests of its compressed layers."""
        return [sha256(blob) for blob in self.blobs]


def an_image(*sizes: int) -> MadeImage:
    """Return an image with a layer of random bytes of each size."""
    layers = [a_tar(a_file(f"data-{number}", os.urandom(size))) for number, size in enumerate(sizes)]
    return MadeImage(
        a_config(*layers), tuple(gzip.compress(layer, compresslevel=0, mtime=0) for layer in layers)
    )


async def give(node: ImageNode, made: MadeImage, name: str = APP, *, with_manifest: bool = False) -> Image:
    """Add an image to ``node`` as if it were built or loaded there, or (``with_manifest``) pulled from its
    registry.
    """
    images = node.images
    diff_ids = msgspec.json.decode(made.config)["rootfs"]["diff_ids"]
    async with images.workspace("test") as directory:
        chain = chain_ids(diff_ids)
        async with images.pin(chain):
            for number, (blob, chain_id, diff_id) in enumerate(zip(made.blobs, chain, diff_ids, strict=True)):
                path = directory / str(number)
                path.write_bytes(blob)
                await images.layer_store.add(
                    path, chain_id=chain_id, diff_id=Digest(diff_id), blob=Digest(sha256(blob))
                )
            reference = parse_reference(name)
            names = [reference]
            if with_manifest:
                names.append(reference.with_digest(sha256(made.manifest)))
            image = await images.add(made.config, names)
    if with_manifest:
        await images.keep_documents(image, [made.manifest])
    return image

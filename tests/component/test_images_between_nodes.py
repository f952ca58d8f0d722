"""Images that no registry gives, between nodes of one cluster over mutual TLS."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from skep.engine.images.collecting import ImageCollector, Marks
from skep.engine.images.layers import NO_BLOB
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry.registry import DOCKER_MANIFEST, Document, RegistryError
from skep.engine.images.sharing.serving import COPIES_MAX, UPLOADS_PER_NODE_MAX, PaceLimits, ServedImages
from skep.errors import NotFound, PermissionDenied, ResourceExhausted, SkepError, Unavailable
from skep.model.node import NodeRole
from skep.model.values.ids import new_id
from skep.rpc.client import ClientStream
from skep.security.tls import client_context, joining_context
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel, open_channel
from tests.support.file_faults import file_faults
from tests.support.images.archives import sha256
from tests.support.images.bent_registry import Registry, Respond
from tests.support.images.images_rig import APP, CLOCK, ImageCluster, ImageNode, MadeImage, an_image, give
from tests.support.managers.counted_calls import calls_of
from tests.support.managers.wire_rig import until


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ImageCluster]:
    async with ImageCluster(tmp_path).running() as running:
        yield running


def at_digest(made: MadeImage) -> str:
    return str(parse_reference(APP).with_digest(sha256(made.manifest)))


async def test_a_node_fetches_what_no_registry_gives_by_name_and_by_digest(cluster: ImageCluster) -> None:
    built, pulled = an_image(100_000, 3), an_image(2_000_000)
    worker, other = await cluster.add(), await cluster.add()
    await give(cluster.manager, built)
    await give(other, pulled, "localhost:1/other:1", with_manifest=True)
    digest = str(parse_reference("localhost:1/other").with_digest(sha256(pulled.manifest)))
    await cluster.run_service(f"localhost:1/other:1@{sha256(pulled.manifest)}", other)

    by_name = await worker.images.pull(APP)
    by_digest = await worker.images.pull(digest)

    assert by_name.id == sha256(built.config)
    assert by_digest.id == sha256(pulled.config)
    assert worker.images.get(APP).id == by_name.id
    assert worker.images.get(digest).id == by_digest.id
    assert not by_name.digests, "no registry has given it a digest"
    (data,) = worker.images.layers(by_digest)
    assert (data / "data-0").stat().st_size == 2_000_000


async def test_an_image_goes_on_from_the_node_that_fetched_it(cluster: ImageCluster) -> None:
    made = an_image(1000)
    await give(cluster.manager, made, with_manifest=True)
    first, second = await cluster.add(), await cluster.add()
    await first.images.pull(at_digest(made))
    await cluster.run_service(at_digest(made), first)
    await cluster.forget(cluster.manager)
    assert (await second.images.pull(at_digest(made))).id == sha256(made.config)
    assert first.served.copies(made.digests[0]) == 1


async def test_a_name_is_not_taken_from_a_worker(cluster: ImageCluster) -> None:
    made = an_image(1000)
    worker, other = await cluster.add(), await cluster.add()
    await give(worker, made)
    await cluster.run_service(APP, worker)
    with pytest.raises(RegistryError, match="connection refused"):
        await other.images.pull(APP)


async def test_what_no_node_has_is_the_registrys_error(cluster: ImageCluster) -> None:
    worker = await cluster.add()
    with pytest.raises(RegistryError, match="connection refused"):
        await worker.images.pull("localhost:1/nothing:1")


async def _ask_for(channel: ManagerChannel, digest: str) -> None:
    """The begin of a blob."""
    async with channel.stream(methods.IMAGE_BLOB) as call:
        await call.send(skep.ImageBlobRequest(digest=digest), end=True)
        await call.receive()


async def _refused(channel: ManagerChannel, made: MadeImage) -> None:
    with pytest.raises(PermissionDenied):
        await channel.call(methods.IMAGE_MANIFEST, skep.ImageManifestRequest(target=APP))
    with pytest.raises(PermissionDenied):
        await _ask_for(channel, made.digests[0])


async def test_who_is_no_node_of_the_cluster_gets_nothing(cluster: ImageCluster) -> None:
    made = an_image(1000)
    await give(cluster.manager, made)
    address, authority = cluster.manager.address, cluster.cluster
    removed = await cluster.add()
    await cluster.forget(removed)
    never_joined = authority.pair(new_id())
    of_another_cluster = authority.pair(new_id(), cluster="another")
    for pair in (removed.pair, never_joined, of_another_cluster):
        async with open_channel(address, client_context(pair), "swarm-manager") as channel:
            await _refused(channel, made)
    async with open_channel(
        address, joining_context(authority.authority.root_pem), "swarm-manager"
    ) as channel:
        await _refused(channel, made)
    assert cluster.manager.served.copies(made.digests[0]) == 0


@pytest.fixture
async def strict(tmp_path: Path) -> AsyncIterator[ImageCluster]:
    async with ImageCluster(tmp_path / "strict", shares_images=False).running() as running:
        yield running


async def test_a_worker_reads_the_images_of_its_own_tasks_only(strict: ImageCluster) -> None:
    own, other = an_image(1000), an_image(2000)
    await give(strict.manager, own, with_manifest=True)
    await give(strict.manager, other, "localhost:1/other:1", with_manifest=True)
    worker, elsewhere = await strict.add(), await strict.add()
    await strict.run_service(APP, worker)
    await strict.run_service("localhost:1/other:1", elsewhere)
    async with open_channel(strict.manager.address, client_context(worker.pair), "swarm-manager") as channel:
        for target in ("localhost:1/other:1", sha256(other.manifest), sha256(other.config)):
            with pytest.raises(PermissionDenied, match="has no task of this image"):
                await channel.call(methods.IMAGE_MANIFEST, skep.ImageManifestRequest(target=target))
        for digest in (other.digests[0], sha256(other.config)):
            with pytest.raises(PermissionDenied, match="has no task of this image"):
                await _ask_for(channel, digest)
        with pytest.raises(NotFound):
            await channel.call(methods.IMAGE_MANIFEST, skep.ImageManifestRequest(target="localhost:1/none:1"))
    assert not strict.manager.served.copies(other.digests[0])
    assert (await worker.images.pull(APP)).id == sha256(own.config)
    with pytest.raises(RegistryError, match="connection refused"):
        await worker.images.pull("localhost:1/other:1")


async def test_a_manager_reads_every_image(strict: ImageCluster) -> None:
    made = an_image(1000)
    worker = await strict.add()
    second = await strict.add(strict.cluster.pair(new_id(), NodeRole.MANAGER))
    await give(worker, made, with_manifest=True)
    await strict.run_service(at_digest(made), worker)
    assert (await second.images.pull(at_digest(made))).id == sha256(made.config)


async def test_a_fetch_may_outlast_its_task(strict: ImageCluster) -> None:
    made = an_image(1000, 3)
    await give(strict.manager, made)
    worker = await strict.add()
    await strict.run_service(APP, worker)
    async with open_channel(strict.manager.address, client_context(worker.pair), "swarm-manager") as channel:
        await channel.call(methods.IMAGE_MANIFEST, skep.ImageManifestRequest(target=APP))
        await strict.remove_tasks(worker)
        await _ask_for(channel, made.digests[1])


async def test_a_layer_is_read_from_a_node_whose_pull_is_under_way(strict: ImageCluster) -> None:
    """Nodes send on a layer before they have the whole image: it belongs to what they pull."""
    made = an_image(1000, 2)
    await give(strict.manager, made)
    first, second = await strict.add(), await strict.add()
    await strict.run_service(APP, first, second)
    reference = parse_reference(APP)
    with first.images.arriving.expecting(made.digests, (reference,)):
        assert first.served.names_with(made.digests[0]) == frozenset(reference.spellings)
    assert not first.served.names_with(made.digests[0])


async def test_one_node_takes_half_of_the_places_at_most(cluster: ImageCluster) -> None:
    made = an_image(*range(1000, 1001 + UPLOADS_PER_NODE_MAX))
    await give(cluster.manager, made)
    greedy, other = await cluster.add(), await cluster.add()
    async with AsyncExitStack() as stack:
        for digest in made.digests[:UPLOADS_PER_NODE_MAX]:
            await stack.enter_async_context(cluster.manager.served.blob(digest, greedy.id))
        with pytest.raises(ResourceExhausted):
            await stack.enter_async_context(cluster.manager.served.blob(made.digests[-1], greedy.id))
        await stack.enter_async_context(cluster.manager.served.blob(made.digests[-1], other.id))


async def test_without_a_manager_to_ask_a_node_gives_nothing(cluster: ImageCluster) -> None:
    worker = await cluster.add()
    cluster.manager.session.end()
    async with open_channel(cluster.manager.address, client_context(worker.pair), "swarm-manager") as channel:
        with pytest.raises(Unavailable, match="no manager"):
            await channel.call(methods.IMAGE_MANIFEST, skep.ImageManifestRequest(target=APP))


async def test_a_node_that_serves_a_wrong_layer_is_not_asked_again(cluster: ImageCluster) -> None:
    made, later = an_image(5000), an_image(6000)
    liar, victim = await cluster.add(), await cluster.add()
    for node in (liar, cluster.manager):
        await give(node, made, with_manifest=True)
        await give(node, later, "localhost:1/later:1", with_manifest=True)
    await cluster.run_service(at_digest(made), liar)
    cluster.manager.port.delay_s = 0.2  # so that the other one is the nearest
    for image in liar.images.images():
        content = liar.images.layer_store.content(image.chain[0])
        content.write_bytes(bytes(content.stat().st_size))

    image = await victim.images.pull(at_digest(made))
    assert (victim.images.layers(image)[0] / "data-0").stat().st_size == 5000
    assert liar.served.copies(made.digests[0]) == 1, "it was tried"

    await cluster.run_service("localhost:1/later:1", liar)
    await victim.images.pull("localhost:1/later:1")
    assert liar.served.copies(later.digests[0]) == 0


async def test_a_layer_that_ends_early_or_never_is_fetched_elsewhere(cluster: ImageCluster) -> None:
    made = an_image(5000)
    cut, victim = await cluster.add(), await cluster.add()
    for node in (cut, cluster.manager):
        await give(node, made, with_manifest=True)
    await cluster.run_service(at_digest(made), cut)
    cluster.manager.port.delay_s = 0.2
    (image,) = cut.images.images()
    content = cut.images.layer_store.content(image.chain[0])
    content.write_bytes(content.read_bytes()[:1000])
    assert (await victim.images.pull(at_digest(made))).id == sha256(made.config)
    assert cluster.manager.served.copies(made.digests[0]) == 1


async def test_a_layer_of_two_images_comes_once(cluster: ImageCluster) -> None:
    one = an_image(3_000_000)
    await give(cluster.manager, one)
    two = MadeImage(one.config.replace(b'"test": "yes"', b'"test": "two"'), one.blobs)
    await give(cluster.manager, two, "localhost:1/two:1")
    worker = await cluster.add()
    await asyncio.gather(worker.images.pull(APP), worker.images.pull("localhost:1/two:1"))
    assert cluster.manager.served.copies(one.digests[0]) == 1


async def _spread(cluster: ImageCluster, made: MadeImage, source: ImageNode) -> None:
    """Ten nodes fetch ``made`` at once."""
    await give(source, made, with_manifest=True)
    nodes = [await cluster.add() for _ in range(10)]
    await cluster.run_service(at_digest(made), source, *nodes)
    images = await asyncio.gather(*(node.images.pull(at_digest(made)) for node in nodes))
    assert {image.id for image in images} == {sha256(made.config)}
    for digest in made.digests:
        copies = [node.served.copies(digest) for node in (source, *nodes)]
        assert copies[0] <= COPIES_MAX
        assert sum(copies) == 10, "each node got it once"


async def test_ten_nodes_get_an_image_of_which_the_first_sends_few_copies(cluster: ImageCluster) -> None:
    await _spread(cluster, an_image(4_000_000, 1000), cluster.manager)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_ten_nodes_get_300_mb_in_six_layers_of_which_the_first_sends_few_copies(
    cluster: ImageCluster,
) -> None:
    await _spread(cluster, an_image(*[50_000_000] * 6), cluster.manager)


async def test_a_node_sends_a_layer_to_few_others_at_one_time(cluster: ImageCluster) -> None:
    made = an_image(20_000_000)
    await give(cluster.manager, made)
    worker = await cluster.add()
    async with open_channel(cluster.manager.address, client_context(worker.pair), "swarm-manager") as channel:
        request = skep.ImageBlobRequest(digest=made.digests[0], last_resort=True)
        streams = [channel.stream(methods.IMAGE_BLOB) for _ in range(COPIES_MAX + 1)]
        calls = [await stream.__aenter__() for stream in streams]
        try:
            for call in calls[:-1]:
                await call.send(request, end=True)
                assert (first := await call.receive()) is not None
                assert first.size == len(made.blobs[0])
            await calls[-1].send(request, end=True)
            with pytest.raises(ResourceExhausted):
                await calls[-1].receive()
        finally:
            for stream in streams:
                await stream.__aexit__(None, None, None)


async def test_nodes_that_take_nothing_give_their_places_to_others(cluster: ImageCluster) -> None:
    made, pace = an_image(20_000_000), PaceLimits(stalled_s=1.0)
    source = await cluster.add(serve_images=lambda images: ServedImages(images, CLOCK, pace))
    stalled, worker = await cluster.add(), await cluster.add()
    await give(source, made, with_manifest=True)
    await cluster.run_service(at_digest(made), source)
    async with (
        open_channel(source.address, client_context(stalled.pair), "swarm-worker") as channel,
        AsyncExitStack() as stack,
    ):
        request = skep.ImageBlobRequest(digest=made.digests[0], last_resort=True)
        for _ in range(COPIES_MAX):
            call = await stack.enter_async_context(channel.stream(methods.IMAGE_BLOB))
            await call.send(request, end=True)
            assert await call.receive() is not None
        assert source.served.uploads == COPIES_MAX
        await until(lambda: not source.served.uploads)
        with pytest.raises(Unavailable, match="took too long"):
            async for _piece in call:
                pass
    assert source.served.copies(made.digests[0]) == 0
    assert (await worker.images.pull(at_digest(made))).id == sha256(made.config)


@pytest.mark.parametrize("kind", ["huge", "another", "no manifest"])
async def test_a_node_that_gives_a_wrong_manifest_is_passed_over(cluster: ImageCluster, kind: str) -> None:
    content = {"huge": b" " * (5 << 20), "another": an_image(1).manifest, "no manifest": b"[]"}[kind]
    asked = []

    class Lying(ServedImages):
        async def names_of(self, target: str) -> frozenset[str]:
            return frozenset((target,))

        async def manifest(self, target: str) -> Document:
            asked.append(target)
            return Document(content, DOCKER_MANIFEST)

    made, victim = an_image(5000), await cluster.add()
    liar = await cluster.add(serve_images=lambda images: Lying(images, CLOCK))
    await give(cluster.manager, made, with_manifest=True)
    await cluster.run_service(at_digest(made), liar)
    cluster.manager.port.delay_s = 0.2
    with calls_of(ClientStream.take_data) as received:
        assert (await victim.images.pull(at_digest(made))).id == sha256(made.config)
    assert asked, "it was asked"
    assert sum(len(call["data"]) for call in received.of(ClientStream.take_data)) < 1 << 20


async def test_what_is_no_image_is_refused(cluster: ImageCluster) -> None:
    worker = await cluster.add()
    async with open_channel(cluster.manager.address, client_context(worker.pair), "swarm-manager") as channel:
        for target in ("", "../../etc/shadow", "sha256:" + "0" * 64, "Upper", "x" * 5000):
            with pytest.raises(SkepError):
                await channel.call(methods.IMAGE_MANIFEST, skep.ImageManifestRequest(target=target))
        for digest in ("", "sha256:../../..", "sha256:" + "0" * 64):
            with pytest.raises(SkepError):
                await _ask_for(channel, digest)


async def test_a_service_is_pinned_to_the_digest_of_the_managers_image_while_the_registry_is_away(
    cluster: ImageCluster,
) -> None:
    made = an_image(1000)
    reference = parse_reference(APP)
    await give(cluster.manager, made, with_manifest=True)
    found = await cluster.manager.images.inspect_remote(reference, "")
    assert found["Descriptor"]["digest"] == sha256(made.manifest)
    worker = await cluster.add()
    assert (await worker.images.pull(f"{APP}@{found['Descriptor']['digest']}")).id == sha256(made.config)


async def test_an_image_that_no_registry_has_sent_is_not_pinned(cluster: ImageCluster) -> None:
    await give(cluster.manager, an_image(1000))
    with pytest.raises(RegistryError):
        await cluster.manager.images.inspect_remote(parse_reference(APP), "")


async def _status(status: int, **headers: str) -> web.Response:
    return web.Response(
        status=status, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


async def _without_credentials(_request: web.Request) -> web.Response:
    return await _status(401, WWW_Authenticate='Basic realm="x"')


async def _malformed_challenge(_request: web.Request) -> web.Response:
    return await _status(401, WWW_Authenticate='Bearer realm="https://["')


async def _repository_denied(request: web.Request) -> web.Response:
    return await _status(200 if request.path == "/v2/" else 403)


def _token_refused(status: int) -> Respond:
    async def respond(request: web.Request) -> web.Response:
        if request.path == "/token":
            return await _status(status)
        return await _status(401, WWW_Authenticate=f'Bearer realm="http://{request.host}/token",service="x"')

    return respond


async def _credentials_not_read(request: web.Request) -> web.Response:
    return await (_status(431) if "Authorization" in request.headers else _without_credentials(request))


@pytest.mark.parametrize(
    ("respond", "auth"),
    [
        (_without_credentials, ""),
        (_repository_denied, ""),
        (_token_refused(403), ""),
        (_malformed_challenge, ""),
        (_without_credentials, "eyJyZWdpc3RyeXRva2VuIjoiYVxuYiJ9"),
        (_without_credentials, "eyJ1c2VybmFtZSI6ImE6YiIsInBhc3N3b3JkIjoieCJ9"),
        (_token_refused(400), "eyJpZGVudGl0eXRva2VuIjoieCJ9"),
        (_credentials_not_read, "eyJ1c2VybmFtZSI6InVzZXIiLCJwYXNzd29yZCI6Im9sZCJ9"),
    ],
)
async def test_what_its_registry_denies_is_not_given_by_a_node_that_pulled_it(
    cluster: ImageCluster, respond: Respond, auth: str
) -> None:
    pulled, older, built = an_image(1000), an_image(2000), an_image(3000)
    registry = Registry()
    registry.bend = respond
    async with registry.serving():
        name = f"{registry.address}/app"
        await give(cluster.manager, pulled, f"{name}:pulled", with_manifest=True)
        digest = parse_reference(name).with_digest(sha256(older.manifest))
        image = await give(cluster.manager, older, f"{name}:older")
        await cluster.manager.images.add(older.config, [digest])  # its manifest was not kept
        await give(cluster.manager, built, f"{name}:built")
        worker = await cluster.add()
        for word in (f"{name}:pulled", f"{name}@{sha256(pulled.manifest)}", f"{name}:older"):
            with pytest.raises(SkepError) as raised:
                await worker.images.pull(word, auth)
            assert not isinstance(raised.value, RegistryError), "the registry is there"
        assert worker.images.lookup(image.id) is None
        assert (await worker.images.pull(f"{name}:built", auth)).id == sha256(built.config)


async def test_a_digest_is_given_under_a_name_that_its_image_has(cluster: ImageCluster) -> None:
    """Else a name without a registry would get what the registry denies under its own."""
    made = an_image(1000)
    await give(cluster.manager, made, with_manifest=True)
    worker = await cluster.add()
    with pytest.raises(RegistryError, match="connection refused"):
        await worker.images.pull(f"localhost:1/another@{sha256(made.manifest)}")
    async with open_channel(cluster.manager.address, client_context(worker.pair), "swarm-manager") as channel:
        request = skep.ImageManifestRequest(target=f"localhost:1/another@{sha256(made.manifest)}")
        with pytest.raises(NotFound):
            await channel.call(methods.IMAGE_MANIFEST, request)
    assert (await worker.images.pull(at_digest(made))).id == sha256(made.config)


async def test_a_layer_that_is_read_for_longer_than_a_node_waits_is_read_once(
    cluster: ImageCluster, tmp_path: Path
) -> None:
    built, read, may_end = an_image(1000), list[Path](), threading.Event()
    await give(cluster.manager, built)
    layers = cluster.manager.images.layer_store
    for chain_id, layer in tuple(layers.all().items()):  # as one that came uncompressed
        layers.layers[chain_id] = msgspec.structs.replace(layer, blob=NO_BLOB)

    def slow(call: str, path: Path) -> None:
        if (call, path.name) == ("open", "content"):
            read.append(path)
            assert may_end.wait(60)

    with file_faults(tmp_path) as files:
        files.before_each = slow
        asked = [asyncio.create_task(cluster.manager.served.manifest(APP)) for _ in range(3)]
        await until(lambda: read)
        asked[0].cancel()
        await asyncio.wait(asked[:1])
        last = asyncio.create_task(cluster.manager.served.manifest(APP))
        await asyncio.sleep(0)
        may_end.set()
        documents = await asyncio.gather(*asked[1:], last)
    assert len(read) == 1
    assert sha256(built.blobs[0]).encode() in documents[0].content


async def test_an_image_that_came_again_a_moment_ago_is_not_collected(cluster: ImageCluster) -> None:
    made, worker = an_image(1000), await cluster.add()
    await give(cluster.manager, made)
    image = await worker.images.pull(APP)

    async def nothing(_names: Sequence[str]) -> Sequence[str]:
        return ()

    collector = ImageCollector(worker.images, lambda: (), nothing, CLOCK, lambda: Marks(high=1, low=0))
    os.utime(worker.images.config_file(image), (0, 0))
    await worker.images.add(made.config, [parse_reference(APP)], is_fetched=True)
    assert await collector.collect() == []
    os.utime(worker.images.config_file(image), (0, 0))
    assert await collector.collect() == [image.id]


async def test_a_blob_that_is_taken_too_slowly_on_average_is_not_sent_on(cluster: ImageCluster) -> None:
    made = an_image(2_000_000)
    await give(cluster.manager, made)
    served = ServedImages(cluster.manager.images, CLOCK, PaceLimits(stalled_s=0.0, bytes_per_s=1 << 60))
    async with served.blob(made.digests[0], "n1") as blob:
        assert 0 < len(await anext(blob.pieces)) < blob.size
        with pytest.raises(Unavailable, match="received too slowly"):
            await anext(blob.pieces)
    assert not served.uploads

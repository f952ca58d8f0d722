"""Caches of build steps: what one node exports, another one finds; sources that lie change nothing."""

import asyncio
import json
import os
from base64 import b64decode, b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from aiohttp import web

from skep.aio.clock import SystemClock
from skep.engine.build.builder import Builder
from skep.engine.build.cache.step_exports import export_steps
from skep.engine.build.cache.step_records import CACHE_CONFIG_TYPE, CONFIG_BYTES_MAX, StepTable, is_time
from skep.engine.build.cache.step_sources import SOURCES_MAX, HistorySteps, Pace, history_sources, read_source
from skep.engine.build.interface import BuildRequest, BuildResult, StepSource, WantedStep
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.caches import Caches
from skep.engine.buildkit.options import CacheEntry
from skep.engine.buildkit.progress import BuildLog, Vertices
from skep.engine.buildkit.results import BuiltImages
from skep.engine.images.child import EMPTY_LAYER, INLINE_CACHE
from skep.engine.images.digest import digest_of
from skep.engine.images.image import parse_config
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry.registry import OCI_MANIFEST
from skep.engine.images.registry.uploads import BlobUpload
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, NotFound, SkepError
from tests.support.builds.cache_artifact import Artifact
from tests.support.images.bent_registry import Registry
from tests.support.images.registry_rig import docker_registry, guarded_registry
from tests.support.lying_records import (
    give_impossible_times,
    give_odd_digests,
    give_odd_times,
    name_empty_layers,
    point_nowhere,
    swap_layers,
    swap_parents,
    tie_rings,
)

pytestmark = pytest.mark.needs("root")

DOCKERFILE = """FROM scratch AS tools
COPY tool /tool
ENV TOOL=1
FROM scratch
COPY first /first
LABEL step=two
COPY --from=tools /tool /tool
COPY second /second
"""

AUTH = urlsafe_b64encode(json.dumps({"username": "user", "password": "secret"}).encode()).decode()


class Node:
    """A node that builds, without containers, with a context of its own."""

    def __init__(self, place: Path, images: ImageStore) -> None:
        self.images = images
        engine: Any = SimpleNamespace(images=images)
        self.builder = Builder(engine, place / "builds", SystemClock())
        self.caches = Caches(images)
        self.context = place / "context"
        self.context.mkdir()
        for name in ("tool", "first", "second"):
            (self.context / name).write_text(name)
        self.log = BuildLog()
        self.vertices = Vertices("r", self.log, SystemClock().now_ns)
        self.progress = MagicMock()
        self.provider: Any = SimpleNamespace(credentials=self.credentials)
        self.auth = ""

    async def credentials(self, _domain: str) -> str:
        return self.auth

    async def build(
        self,
        *sources: CacheEntry,
        dockerfile: str = DOCKERFILE,
        inline: bool = False,
        tag: str = "",
        also: tuple[StepSource, ...] = (),
        is_buildkit: bool = True,
    ) -> BuildResult:
        """Build the context with cache sources."""

        async def open_context() -> Path:
            return self.context

        self.progress.reset_mock()
        found = await self.caches.sources(self.vertices, MagicMock(), self.provider, sources)
        request = BuildRequest(
            dockerfile=dockerfile,
            is_buildkit=is_buildkit,
            step_sources=(*found, *also),
            inline_cache=inline,
            tags=(parse_reference(tag).with_default_tag(),) if tag else (),
        )
        return await self.builder.build(request, open_context, self.progress)

    async def export(self, result: BuildResult, **attributes: str) -> str:
        """``--cache-to type=registry``."""
        entry = CacheEntry("registry", {name.replace("_", "-"): text for name, text in attributes.items()})
        response = await self.caches.export(self.vertices, MagicMock(), self.provider, [entry], [result])
        return response["cache.manifest"]

    @property
    def cached(self) -> list[str]:
        """Instructions that came from a cache in the last build."""
        return [call.args[0].text for call in self.progress.cached.call_args_list]

    @property
    def warnings(self) -> list[str]:
        """What the last build and its sources warned of."""
        said = [call.args[1] for call in self.progress.warning.call_args_list]
        return said + self.log_warnings()

    def log_warnings(self) -> list[str]:
        """Warnings of sources and exports."""
        found = []
        for event in self.log._events:
            found += [one.short.decode() for one in pb.StatusResponse.FromString(event).warnings]
        return found

    def text(self, result: BuildResult, name: str) -> str:
        """A file of an image."""
        for directory in self.images.layers(self.images.get(result.image_id)):
            if (directory / name).is_file():
                return (directory / name).read_text()
        raise FileNotFoundError(name)


async def a_node(place: Path) -> Node:
    place.mkdir()
    images = ImageStore(place / "images")
    await images.open()
    return Node(place, images)


@pytest.fixture
async def one(tmp_path: Path) -> Node:
    return await a_node(tmp_path / "one")


@pytest.fixture
async def two(tmp_path: Path) -> Node:
    return await a_node(tmp_path / "two")


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[str]:
    async with docker_registry(tmp_path / "registry") as address:
        yield address


def of_registry(ref: str) -> CacheEntry:
    return CacheEntry("registry", {"ref": ref})


LAST_STAGE = ["COPY first /first", "LABEL step=two", "COPY --from=tools /tool /tool", "COPY second /second"]


@pytest.mark.parametrize(
    "form", [{}, {"image_manifest": "false"}, {"image_manifest": "false", "oci_mediatypes": "false"}]
)
async def test_steps_of_one_node_are_found_by_another(
    one: Node, two: Node, registry: str, form: dict[str, str]
) -> None:
    built = await one.build()
    descriptor = json.loads(await one.export(built, ref=f"{registry}/cache:1", mode="max", **form))
    assert descriptor["digest"].startswith("sha256:")
    again = await two.build(of_registry(f"{registry}/cache:1"))
    assert two.cached == ["COPY tool /tool", "ENV TOOL=1", *LAST_STAGE]
    assert again.image_id == built.image_id, "times are those of the first build"
    assert two.text(again, "second") == "second"
    assert two.warnings == []


async def test_the_mode_min_has_the_steps_of_the_target_only(one: Node, two: Node, registry: str) -> None:
    await one.export(await one.build(), ref=f"{registry}/cache:1")
    again = await two.build(of_registry(f"{registry}/cache:1"))
    assert two.cached == LAST_STAGE, "the other stage is carried out, and gives the same files"
    assert two.text(again, "tool") == "tool"


async def test_an_image_is_a_cache_of_its_own_steps(one: Node, two: Node, registry: str) -> None:
    reference = parse_reference(f"{registry}/app:1")
    built = await one.build(inline=True, tag=str(reference))
    assert (await one.build(inline=True)).image_id == built.image_id, "a rebuild gives the same image"
    await one.images.push(reference, "")
    again = await two.build(of_registry(str(reference)), inline=True)
    assert two.cached == LAST_STAGE
    assert again.image_id == built.image_id
    await two.images.pull(str(reference))
    await two.build(of_registry(str(reference)))
    assert two.cached[-4:] == LAST_STAGE, "of an image that is here, nothing is fetched"


async def test_a_changed_file_is_a_step_of_its_own(one: Node, two: Node, registry: str) -> None:
    await one.export(await one.build(), ref=f"{registry}/cache:1", mode="max")
    (two.context / "first").write_text("changed")
    again = await two.build(of_registry(f"{registry}/cache:1"))
    assert two.cached == ["COPY tool /tool", "ENV TOOL=1"]
    assert two.text(again, "first") == "changed"
    assert two.text(again, "second") == "second"


async def test_later_builds_do_not_trust_a_source_that_they_do_not_name(
    one: Node, two: Node, registry: str
) -> None:
    await one.export(await one.build(), ref=f"{registry}/cache:1", mode="max")
    await two.build(of_registry(f"{registry}/cache:1"))
    await two.build()
    assert two.cached == []


async def test_the_users_credentials_are_for_the_registry(one: Node, two: Node, tmp_path: Path) -> None:
    async with guarded_registry(tmp_path / "guarded") as address:
        built = await one.build()
        with pytest.raises(SkepError, match="no basic auth credentials"):
            await one.export(built, ref=f"{address}/cache:1")
        one.auth = AUTH
        await one.export(built, ref=f"{address}/cache:1")
        await two.build(of_registry(f"{address}/cache:1"))
        assert two.cached == []
        assert "no basic auth credentials" in two.warnings[0]
        two.auth = AUTH
        await two.build(of_registry(f"{address}/cache:1"), dockerfile=DOCKERFILE + "LABEL more=1\n")
        assert "COPY first /first" in two.cached


def blobs(directory: Path) -> Sequence[Path]:
    """Files of the blobs of a registry."""
    return sorted((directory / "files/docker/registry/v2/blobs").rglob("data"))


def is_json(path: Path) -> bool:
    return path.read_bytes().startswith(b"{")


async def test_a_layer_that_is_another_one_is_not_used(
    one: Node, two: Node, registry: str, tmp_path: Path
) -> None:
    await one.export(await one.build(), ref=f"{registry}/cache:1", mode="max")
    for path in blobs(tmp_path / "registry"):
        if not is_json(path):
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = await two.build(of_registry(f"{registry}/cache:1"))
    assert two.cached == []
    assert two.text(again, "second") == "second"
    assert any("verification failed" in text for text in two.warnings), two.warnings


@pytest.mark.parametrize(
    "lie",
    [
        *(swap_layers, swap_parents, tie_rings, point_nowhere),
        *(give_odd_times, give_impossible_times, give_odd_digests, name_empty_layers),
    ],
)
async def test_records_that_lie_change_nothing(
    one: Node, two: Node, lie: Callable[[dict[str, Any]], None]
) -> None:
    built, artifact = await one.build(), Artifact()
    await export_steps(one.images, built.records, artifact, media_type=OCI_MANIFEST)
    artifact.change(lie)
    source = await read_source(two.images, artifact, "latest")
    assert source is not None
    again = await two.build(also=(source,))
    assert not any(text.startswith("COPY") for text in two.cached), "steps without files may be right"
    assert [two.text(again, name) for name in ("first", "tool", "second")] == ["first", "tool", "second"]
    config = json.loads(two.images.config_file(two.images.get(again.image_id)).read_bytes())
    assert all(is_time(entry["created"]) for entry in config["history"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"layers": 7}',
        b"[" * 100_000,
        b'{"records": [{"digest": 1}]}',
        b'{"records": [' + b"{}," * 20_000 + b"{}]}",
        b'{"records": [], "x": [' + b"{}," * 300_000 + b"{}]}",
        b" " * (CONFIG_BYTES_MAX + 1),
    ],
)
async def test_records_that_cannot_be_read_are_refused(one: Node, content: bytes) -> None:
    artifact = Artifact()
    await artifact.put(BlobUpload(digest=digest_of(content), size=len(content), content=content))
    config = {"mediaType": CACHE_CONFIG_TYPE, "digest": digest_of(content), "size": len(content)}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []}
    artifact.manifest_bytes = json.dumps(manifest).encode()
    with pytest.raises(InvalidArgument):
        await read_source(one.images, artifact, "latest")


async def test_sources_that_are_not_there_are_warnings(one: Node, registry: str) -> None:
    sources = [of_registry(f"{registry}/gone:1"), of_registry("127.0.0.1:1/gone:1"), of_registry("bad//name")]
    sources += [of_registry(""), CacheEntry("s3"), CacheEntry("local", {"src": "/x"})]
    await one.build(*sources, *sources * SOURCES_MAX)
    assert len(one.warnings) == len(sources), "each source is read once"
    assert all(text.startswith("cache source ") for text in one.warnings)


async def test_further_sources_are_one_warning(one: Node) -> None:
    await one.build(*[CacheEntry("s3", {"bucket": f"{number}"}) for number in range(100 * SOURCES_MAX)])
    assert len(one.warnings) == SOURCES_MAX + 1
    assert one.warnings[-1] == "1584 cache sources are not used: a build has at most 16 cache sources"


async def test_an_image_with_odd_records_is_a_warning(one: Node, two: Node) -> None:
    built = await one.build(inline=True, tag="app:1")
    content = json.loads(one.images.config_file(one.images.get(built.image_id)).read_bytes())
    assert json.loads(b64decode(content[INLINE_CACHE]))[0]["digest"].startswith("sha256:")
    nested = b64encode(b'[{"x":' + b"[" * 1000 + b"]" * 1000 + b"}]").decode()
    for cache in ("!", "AA==", "W10=", 7, nested):
        await one.images.add(
            json.dumps({**content, INLINE_CACHE: cache}).encode(), (parse_reference("odd:1"),)
        )
        await one.build(of_registry("odd:1"))
    assert len(one.warnings) == 4, "an empty list is no fault"


async def test_buildkits_own_records_are_read_and_fit_no_step(one: Node) -> None:
    """As BuildKit 0.12 writes them, with chained results and selectors."""
    records = (
        b'[{"layers":[{"layer":0,"createdAt":"2024-01-01T00:00:00.5Z"}],"digest":"sha256:aa","inputs":'
        b'[[{"selector":"sha256:bb","link":1}],[{"link":2}]]},{"digest":"random:cc"},'
        b'{"digest":"sha256:dd","chains":[{"layers":[0,1],"createdAt":"2024-01-01T00:00:00Z"}]}]'
    )
    table = StepTable.of_image(records, [])
    assert len(table) == 3
    assert table.find(WantedStep(key="aa")) is None


async def test_the_classic_builder_finds_steps_in_the_history_of_an_image(
    one: Node, two: Node, registry: str
) -> None:
    """As an engine, of images that are here, by their commands; a source that is not here is passed over."""
    name = f"{registry}/app:1"
    built = await one.build(is_buildkit=False, tag=name)
    await one.images.push(parse_reference(name), "")
    await two.images.pull(name)
    sources = history_sources(two.images, [name, "gone:1", "bad//name"])
    again = await two.build(also=sources, is_buildkit=False)
    assert two.cached == LAST_STAGE
    assert two.images.get(again.image_id).chain == one.images.get(built.image_id).chain
    (two.context / "second").write_text("changed")
    again = await two.build(also=sources, is_buildkit=False)
    assert two.cached[-3:] == LAST_STAGE[:3]
    assert two.text(again, "second") == "changed"


async def test_the_image_that_was_built_is_pushed_whatever_has_its_tag_by_then(
    one: Node, two: Node, registry: str
) -> None:
    names = [parse_reference(f"{registry}/{name}") for name in ("app:1", "app:2", "other:1")]
    built = await one.build(tag=str(names[0]))
    other = await one.build(dockerfile="FROM scratch\nCOPY second /only\n", tag=str(names[0]))
    assert one.images.resolve(str(names[0])) == one.images.get(other.image_id)
    pushed = BuiltImages({"": built.image_id}, built.image_id)
    digest = await one.caches.push(one.vertices, one.provider, pushed, names)
    for name in names:
        pulled = await two.images.pull(str(name))
        assert pulled.id == built.image_id
        assert digest in {reference.digest for reference in pulled.digests}
    await one.images.prune(lambda image: image.id == built.image_id, users=tuple)
    with pytest.raises(NotFound, match=f"No such image: {built.image_id}"):
        await one.caches.push(one.vertices, one.provider, pushed, names)


class SlowArtifact(Artifact):
    """A cache whose layers come as a test lets them."""

    def __init__(self, send: Callable[[bytes], AsyncIterator[bytes]]) -> None:
        super().__init__()
        self.send = send

    @asynccontextmanager
    async def blob(self, digest: str, start: int = 0) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        content = self.blobs[digest]
        if content.startswith(b"{"):
            async with super().blob(digest, start) as found:
                yield found
        else:
            yield 0, self.send(content)


async def nothing(_: bytes) -> AsyncIterator[bytes]:
    """Send nothing, for ever."""
    await asyncio.Event().wait()
    yield b""


async def bytewise(content: bytes) -> AsyncIterator[bytes]:
    """Send a byte now and then."""
    for number in range(len(content)):
        yield content[number : number + 1]
        await asyncio.sleep(0.01)


async def in_halves(content: bytes) -> AsyncIterator[bytes]:
    """Send half of a large layer at once, and the rest after more than two seconds."""
    half = len(content) // 2
    yield content[:half]
    if half > 1 << 20:
        await asyncio.sleep(2.5)
    yield content[half:]


async def slow_source(one: Node, two: Node, send: Any, pace: Pace) -> tuple[BuildResult, StepSource]:
    """A cache with a layer of 3 MB, as another node reads it."""
    for node in (one, two):
        (node.context / "first").write_bytes(LARGE)
    built, artifact = await one.build(), SlowArtifact(send)
    await export_steps(one.images, built.records, artifact, media_type=OCI_MANIFEST)
    source = await read_source(two.images, artifact, "latest", pace)
    assert source is not None
    return built, source


LARGE = os.urandom(3 << 20)


@pytest.mark.parametrize("send", [nothing, bytewise])
async def test_a_source_that_sends_too_slowly_is_given_up(one: Node, two: Node, send: Any) -> None:
    built, source = await slow_source(one, two, send, Pace(silent_s=0.5))
    async with asyncio.timeout(60):
        again = await two.build(also=(source,))
    assert two.cached == [], "the source is asked for one layer only"
    assert two.text(again, "second") == "second"
    (warning,) = two.warnings
    assert warning.startswith("cache source a lie is not used: layer ")
    assert warning.endswith(" arrives at less than 1048576 bytes per second")
    assert list(two.images.scratch.iterdir()) == [], "nothing is left, and the disk is free"
    artifact = Artifact()  # the locks of the layers are free
    await export_steps(one.images, built.records, artifact, media_type=OCI_MANIFEST)
    good = await read_source(two.images, artifact, "latest")
    assert good is not None
    await two.images.prune(lambda _: True, users=tuple)
    async with asyncio.timeout(60):
        await two.build(also=(good,))
    assert two.cached[-4:] == LAST_STAGE


async def test_a_source_may_pause_if_it_is_fast_on_average(one: Node, two: Node) -> None:
    assert (Pace().seconds_for(0), Pace().seconds_for(60 << 20)) == (60, 120)
    built, source = await slow_source(one, two, in_halves, Pace(silent_s=2, bytes_per_s=100_000))
    again = await two.build(also=(source,))
    assert two.cached[-4:] == LAST_STAGE
    assert again.image_id == built.image_id


class HeldArtifact(SlowArtifact):
    """A cache that sends its large layer when a test opens the gate."""

    def __init__(self) -> None:
        super().__init__(self._held)
        self.asked, self.gate = asyncio.Event(), asyncio.Event()
        self.downloads = 0

    async def _held(self, content: bytes) -> AsyncIterator[bytes]:
        if len(content) > 1 << 20:
            self.downloads += 1
            self.asked.set()
            await self.gate.wait()
        yield content


async def two_builds_of_one_layer(
    one: Node, two: Node, pace: Pace
) -> tuple[HeldArtifact, asyncio.Task[BuildResult], asyncio.Task[BuildResult]]:
    """A build whose cache does not send yet, and another one that waits for the same layer."""
    for node in (one, two):
        (node.context / "first").write_bytes(LARGE)
    artifact = HeldArtifact()
    await export_steps(one.images, (await one.build()).records, artifact, media_type=OCI_MANIFEST)
    patient = await read_source(two.images, artifact, "latest", Pace(silent_s=100))
    waiting = await read_source(two.images, artifact, "latest", pace)
    assert patient is not None
    assert waiting is not None
    first = asyncio.create_task(two.build(also=(patient,)))
    await artifact.asked.wait()
    return artifact, first, asyncio.create_task(two.build(also=(waiting,)))


async def test_a_wait_for_the_download_of_another_build_is_not_a_slow_source(one: Node, two: Node) -> None:
    silent_s = 2.0  # a busy machine may let the second build's other requests wait for a second
    async with asyncio.timeout(60):
        artifact, *builds = await two_builds_of_one_layer(one, two, Pace(silent_s=silent_s))
        done, _ = await asyncio.wait(builds, timeout=1.5 * silent_s)
        assert not done, "the second build still waits, for longer than its source may be silent"
        artifact.gate.set()
        first, second = await asyncio.gather(*builds)
    assert first.image_id == second.image_id
    assert artifact.downloads == 1
    assert two.warnings == []


async def test_a_wait_for_the_download_of_another_build_has_an_end(one: Node, two: Node) -> None:
    async with asyncio.timeout(60):
        pace = Pace(silent_s=0.5, bytes_per_s=8 << 20)
        artifact, first, second = await two_builds_of_one_layer(one, two, pace)
        assert two.text(await second, "second") == "second"
        (warning,) = two.warnings
        assert warning.startswith("cache source a lie is not used: layer ")
        assert warning.endswith(" is fetched by another build or pull, which has not ended in 1 seconds")
        artifact.gate.set()
        await first
    assert two.warnings == [warning]


async def test_an_export_survives_a_failure_of_the_registry(one: Node, two: Node) -> None:
    """As a push: the first question for each blob fails."""
    failed: set[str] = set()

    async def fail_once(request: web.Request) -> web.StreamResponse | None:
        if request.method != "HEAD" or request.path in failed:
            return None
        failed.add(request.path)
        return web.Response(status=503)

    async with Registry().serving() as registry:
        registry.bend = fail_once
        await one.export(await one.build(), ref=f"{registry.address}/cache:1", mode="max")
        assert failed
        await two.build(of_registry(f"{registry.address}/cache:1"))
        assert two.cached[-4:] == LAST_STAGE


async def test_histories_that_lie_change_nothing(one: Node, two: Node) -> None:
    built = await one.build(is_buildkit=False, tag="app:1")
    image = two.images
    config = json.loads(one.images.config_file(one.images.get(built.image_id)).read_bytes())
    for entry in config["history"]:
        entry["created"] = "yesterday"
    config["rootfs"]["diff_ids"][0] = EMPTY_LAYER
    found = HistorySteps(image, "a lie", parse_config(json.dumps(config).encode()))
    again = await two.build(also=(found,), is_buildkit=False)
    assert not any(text.startswith("COPY") for text in two.cached)
    again_config = json.loads(two.images.config_file(two.images.get(again.image_id)).read_bytes())
    assert all(is_time(entry["created"]) for entry in again_config["history"])


async def test_an_image_is_a_source_once(one: Node) -> None:
    await one.build(tag="app:1", is_buildkit=False)
    assert len(history_sources(one.images, ["app:1", "app:1", "docker.io/library/app:1"] * 100)) == 1


async def test_no_cache_gives_copy_an_empty_layer(one: Node, two: Node) -> None:
    """The layer is what its digests say, so nothing but the rule refuses it."""
    dockerfile = "FROM scratch\nCOPY first /first\n"
    built, artifact = await one.build(dockerfile=dockerfile), Artifact()
    await export_steps(one.images, built.records, artifact, media_type=OCI_MANIFEST)
    empty = bytes(1024)
    assert digest_of(empty) == EMPTY_LAYER
    artifact.blobs[EMPTY_LAYER] = empty
    artifact.manifest_bytes = artifact.manifest_bytes.replace(
        json.loads(artifact.manifest_bytes)["layers"][0]["digest"].encode(), EMPTY_LAYER.encode()
    )
    manifest = json.loads(artifact.manifest_bytes)
    manifest["layers"][0]["size"] = len(empty)
    artifact.manifest_bytes = json.dumps(manifest).encode()

    def lie(config: dict[str, Any]) -> None:
        config["layers"][0] |= {"blob": EMPTY_LAYER, "annotations": {"diffID": EMPTY_LAYER}}

    artifact.change(lie)
    source = await read_source(two.images, artifact, "latest")
    assert source is not None
    again = await two.build(also=(source,), dockerfile=dockerfile)
    assert two.cached == []
    assert two.text(again, "first") == "first"

"""``--cache-from`` and ``--cache-to`` of BuildKit's clients: cache sources of a build, and exports of its steps.

A source never fails a build.  If it is missing, refused or malformed, the build has a warning.  A failed export fails
the build, unless its option ``ignore-error`` is set, as in BuildKit.

Source: moby/buildkit, solver/llbsolver/solver.go (runCacheExporters), cache/remotecache/registry,
cache/remotecache/local; moby, builder/builder-next/adapters/localinlinecache.
"""

import asyncio
from collections.abc import Mapping, Sequence

from skep.engine.build.cache.step_exports import RegistryDestination, export_steps
from skep.engine.build.cache.step_records import chosen
from skep.engine.build.cache.step_sources import SOURCES_MAX, RegistryPlace, image_source, read_source
from skep.engine.build.interface import BuildResult, Provider, StepSource
from skep.engine.buildkit.options import CacheEntry, is_true
from skep.engine.buildkit.progress import Vertices
from skep.engine.buildkit.protocol.content import ClientStore
from skep.engine.buildkit.protocol.sessions import BuildSession
from skep.engine.buildkit.results import BuiltImages
from skep.engine.images.digest import Digest
from skep.engine.images.platforms import best_for, parse_platform
from skep.engine.images.reference import Reference, parse_reference
from skep.engine.images.registry.registry import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST, RegistryRepository
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, SkepError

_INLINE = "inline"
_PLACES = {"registry": "registry", "local": "client directory"}


class Caches:
    """Reads and writes the caches of builds, and pushes their images.  ``images``: Store with the layers."""

    def __init__(self, images: ImageStore) -> None:
        self._images = images

    async def sources(
        self,
        vertices: Vertices,
        session: BuildSession,
        provider: Provider,
        entries: Sequence[CacheEntry],
        platform: str = "",
    ) -> tuple[StepSource, ...]:
        """Return the usable sources without duplicates.  The build gets warnings for the others.

        ``platform``: Platform of the build, for images with several.  Empty for this machine's.
        """
        found: list[StepSource] = []
        distinct = list({entry.key: entry for entry in entries}.values())
        for entry in distinct[:SOURCES_MAX]:
            with vertices.doing(f"importing cache manifest from {entry.name}") as vertex:
                try:
                    source = await self._source(session, provider, entry, platform)
                except (SkepError, OSError, ValueError) as error:
                    vertices.warn(vertex, f"cache source {entry.name} is not used: {error}")
                else:
                    found += [source] if source is not None else []
        if further := distinct[SOURCES_MAX:]:
            with vertices.doing("importing further cache manifests") as vertex:
                text = f"a build has at most {SOURCES_MAX} cache sources"
                vertices.warn(vertex, f"{len(further)} cache sources are not used: {text}")
        return tuple(found)

    async def _source(
        self, session: BuildSession, provider: Provider, entry: CacheEntry, platform: str
    ) -> StepSource | None:
        if entry.type == "local":
            store = ClientStore(session, entry.attrs.get("src", ""))
            return await read_source(self._images, store, entry.attrs.get("digest", ""))
        if entry.type != "registry":
            raise InvalidArgument(f"type {entry.type} is not supported; use registry or local")
        reference = _reference(entry)
        present = self._images.named(str(reference))
        image = best_for(present, parse_platform(platform)) if platform else next(iter(present), None)
        if image is not None:
            return await asyncio.to_thread(image_source, self._images, image, entry.name)
        auth = await provider.credentials(reference.domain)
        place = RegistryPlace(self._images, reference, auth)
        target = reference.digest or reference.tag
        source = await read_source(self._images, place, target, platform=platform)
        if source is None:
            raise InvalidArgument("the image has no cache; build it with --cache-to type=inline")
        return source

    async def export(
        self,
        vertices: Vertices,
        session: BuildSession,
        provider: Provider,
        entries: Sequence[CacheEntry],
        results: Sequence[BuildResult],
    ) -> Mapping[str, str]:
        """Export the steps of a build and return the entries of the client's response.  Raises: SkepError.

        ``results``: Result for each platform.
        """
        response: dict[str, str] = {}
        for entry in entries:
            if entry.type == _INLINE:  # an inline cache is part of the image
                continue
            with vertices.doing(f"exporting cache to {_PLACES[entry.type]}") as vertex:
                try:
                    descriptor = await self._export(session, provider, entry, results)
                except (SkepError, OSError) as error:
                    if not is_true(entry.attrs.get("ignore-error", "")):
                        raise
                    vertices.warn(vertex, f"cache {entry.name} is not exported: {error}")
                else:
                    response |= {"cache.manifest": descriptor} if descriptor else {}
        return response

    async def push(
        self, vertices: Vertices, provider: Provider, built: BuiltImages, tags: Sequence[Reference]
    ) -> Digest:
        """Push a result under its tags, and return the digest of its manifest or index.  Raises: SkepError.

        Another build may have taken the tags since.
        """
        digest = built.here
        for tag in tags:
            with vertices.doing(f"pushing {tag.familiar}"):
                auth = await provider.credentials(tag.domain)
                digest = await self._images.push_image(built.here, tag, auth, built.index)
        return digest

    async def _export(
        self, session: BuildSession, provider: Provider, entry: CacheEntry, results: Sequence[BuildResult]
    ) -> str:
        mode = entry.attrs.get("mode", "min")
        if mode not in ("min", "max"):
            raise InvalidArgument(f"unsupported mode {mode} of a cache; use min or max")
        found = [one for each in results for one in chosen(each.records, each.last, is_max=mode == "max")]
        records = list({one.key: one for one in found}.values())
        media_type = _media_type(entry.attrs)
        if entry.type == "local":
            store = ClientStore(session, entry.attrs.get("dest", ""))
            return await export_steps(self._images, records, store, media_type=media_type)
        reference = _reference(entry)

        async def push(repository: RegistryRepository) -> str:
            destination = RegistryDestination(repository, reference)
            return await export_steps(self._images, records, destination, media_type=media_type)

        auth = await provider.credentials(reference.domain)
        return await self._images.at_registry(reference, auth, push, to_push=True)


def _reference(entry: CacheEntry) -> Reference:
    if not entry.attrs.get("ref"):
        raise InvalidArgument(f"a {entry.type} cache needs the option ref")
    return parse_reference(entry.attrs["ref"]).with_default_tag()


def _media_type(attributes: Mapping[str, str]) -> str:
    """Return the type of the manifest to write.

    Source: buildkit, cache/remotecache/registry/registry.go (ResolveCacheExporterFunc).
    """
    is_oci = is_true(attributes.get("oci-mediatypes", "true"))
    if is_true(attributes.get("image-manifest", "true" if is_oci else "false")):
        if not is_oci:
            raise InvalidArgument("image-manifest=true needs oci-mediatypes=true")
        return OCI_MANIFEST
    return OCI_INDEX if is_oci else DOCKER_LIST

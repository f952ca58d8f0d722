"""Images of this node in the Engine API.

Source: moby 20.10, api/server/router/image/image_routes.go, api/server/router/distribution/distribution_routes.go.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from skep.aio.clock import Clock, SystemClock
from skep.api.errors import Untranslated
from skep.api.formats.bodies import decode_body
from skep.api.formats.filters import until_of
from skep.api.http.server import (
    ApiVersion,
    Filters,
    api_version,
    flag,
    is_of_administrator,
    json_list_response,
    json_response,
    read_body,
)
from skep.api.http.tables import RouteTable
from skep.engine.api.commits import import_image
from skep.engine.api.responses import image_responses
from skep.engine.api.streams.progress import respond_with_progress
from skep.engine.api.streams.uploads import TAKEN_S, drain, pieces_of, send_piece
from skep.engine.images.digest import digest_of, is_digest
from skep.engine.images.image import Image
from skep.engine.images.listing import ImageFilter, Listed, prunable, select
from skep.engine.images.platforms import ImagePlatform, require_platform
from skep.engine.images.progress import ProgressMessage, Report
from skep.engine.images.reference import DEFAULT_DOMAIN, Reference, parse_reference
from skep.engine.images.registry.credentials import RegistryCredentials, decode_credentials
from skep.engine.images.registry.registry import DOCKER_MANIFEST, login
from skep.engine.images.registry.searching import LIMIT_DEFAULT, SearchFilter, search, shown
from skep.engine.images.removal import Users
from skep.engine.images.store import ImageStore, Removed
from skep.errors import InvalidArgument, NotFound, SkepError, Unimplemented
from skep.model.permissions.processes import is_empty_image

_V1_48 = ApiVersion("1.48")
_V1_49 = ApiVersion("1.49")
_V1_50 = ApiVersion("1.50")
_V1_51 = ApiVersion("1.51")
_V1_52 = ApiVersion("1.52")
_V1_54 = ApiVersion("1.54")
_V1_55 = ApiVersion("1.55")
_WITHOUT_FILTER = ApiVersion("1.41")
"""API version since which the parameter ``filter`` with a pattern of names no longer exists."""


class ImageRoutes(msgspec.Struct, frozen=True):
    """Dependencies of these routes."""

    images: ImageStore
    users: Users
    clock: Clock
    taken_s: float
    """Seconds after which a client that reads no data of a saved image is disconnected."""


_table = RouteTable[ImageRoutes]()


def image_routes(
    images: ImageStore, users: Users, *, clock: Clock | None = None, taken_s: float = TAKEN_S
) -> Iterable[web.AbstractRouteDef]:
    """Return the routes ``/images/...``, ``/distribution/...`` and ``/auth``."""
    return _table.bound(ImageRoutes(images, users, clock or SystemClock(), taken_s))


@_table.get("/images/json")
async def list_images(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker images``."""
    filters = Filters.of(request)
    filters.refuse_unknown("dangling", "label", "before", "since", "reference", "until")
    filter = _filter(served.images, filters, served.clock)
    version = api_version(request)
    if (pattern := request.query.get("filter", "")) and version < _WITHOUT_FILTER:
        filter = _replaced(filter, patterns=(*filter.patterns, pattern))
    listed = select(served.images.images(), _replaced(filter, all=flag(request, "all")))
    if version >= _V1_54 and flag(request, "identity") and not flag(request, "manifests"):
        raise InvalidArgument("conflicting options: identity requires manifests=1")
    shared = shared_bytes(served.images, listed) if flag(request, "shared-size") else {}
    is_counted = version >= _V1_51 and is_of_administrator(request)  # others do not see every container
    counts = Counter(user.image_id for user in served.users()) if is_counted else None
    return json_list_response(
        [
            image_responses.summary(
                one,
                version,
                shared_bytes=shared.get(one.image.id, -1),
                containers=-1 if counts is None else counts[one.image.id],
            )
            for one in listed
        ]
    )


@_table.post("/images/create")
async def create_image(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker pull`` and ``docker import``, with their progress."""
    if "fromImage" not in request.query:
        return await import_image(served.images, served.clock, request)
    reference = _wanted(request.query["fromImage"], request.query.get("tag", ""))
    auth = request.headers.get("X-Registry-Auth", "")
    platform = request.query.get("platform", "")

    async def pull(report: Report) -> None:
        await served.images.pull_all(reference, auth, report, platform=platform)

    return await respond_with_progress(request, pull, early_errors=True)


@_table.post("/images/load")
async def load_images(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker load``, with its progress."""
    is_quiet = flag(request, "quiet") if "quiet" in request.query else True
    platforms = _platforms(request)

    async def load(report: Report) -> None:
        def report_unless_quiet(message: ProgressMessage) -> None:
            if not is_quiet or message.stream:
                report(message)

        try:
            await served.images.load(pieces_of(request), report_unless_quiet, platforms=platforms)
        except SkepError:
            await drain(request)
            raise

    return await respond_with_progress(request, load, early_errors=False)


@_table.get("/images/get")
async def save_images(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker save`` of several images, as one archive."""
    return await _send_images(served, request, request.query.getall("names", []))


@_table.get("/images/{name:.+}/get")
async def save_image(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker save`` of one image."""
    return await _send_images(served, request, [request.match_info["name"]])


async def _send_images(served: ImageRoutes, request: web.Request, names: list[str]) -> web.StreamResponse:
    async with aclosing(served.images.save(names, platforms=_platforms(request))) as pieces:
        first = await anext(pieces, b"")  # first, because an unknown image can still be reported as a status
        response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
        await response.prepare(request)
        await send_piece(request, response, first, served.taken_s)
        async for piece in pieces:
            await send_piece(request, response, piece, served.taken_s)
    return response


@_table.post("/images/prune")
async def prune_images(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker image prune``."""
    filters = Filters.of(request)
    filters.refuse_unknown("dangling", "label", "label!", "until")
    removed, freed_bytes = await served.images.prune(
        prunable(_filter(served.images, filters, served.clock)), users=served.users
    )
    response = {"ImagesDeleted": _removed(removed) or None, "SpaceReclaimed": freed_bytes}
    return json_response(response)


@_table.get("/images/{name:.+}/json")
async def inspect_image(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker image inspect``."""
    name = request.match_info["name"]
    try:
        image = served.images.get(name)
    except (NotFound, InvalidArgument) as error:
        raise type(error)(f"no such image: {name}: {error}") from error
    if (text := request.query.get("platform", "")) and api_version(request) >= _V1_49:
        if flag(request, "manifests"):
            raise InvalidArgument("conflicting options: manifests and platform options cannot both be set")
        require_platform(image, name, _decode_platform(text))
    return json_response(image_responses.inspected(image, served.images, api_version(request)))


@_table.get("/images/{name:.+}/history")
async def image_history(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker history``."""
    name = request.match_info["name"]
    image = served.images.get(name)
    if (text := request.query.get("platform", "")) and api_version(request) >= _V1_48:
        require_platform(image, name, _decode_platform(text))
    return json_list_response(image_responses.history(image, served.images))


@_table.get("/images/{name:.+}/attestations")
async def image_attestations(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Refuse ``docker image attestations``, because a pull does not fetch attestations."""
    if api_version(request) < _V1_55:
        raise NotFound("page not found")
    served.images.get(request.match_info["name"])
    raise Unimplemented("This node keeps no attestations of images: read them from the image's registry.")


@_table.post("/images/{name:.+}/tag")
async def tag_image(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker tag``."""
    served.images.get(request.match_info["name"])
    try:
        reference = parse_reference(request.query.get("repo", ""))
        tag = request.query.get("tag", "")
        reference = reference.with_tag(tag) if tag else reference.with_default_tag()
    except InvalidArgument as error:
        raise Untranslated(str(error)) from error
    if reference.digest:
        raise Untranslated("refusing to create a tag with a digest reference")
    await served.images.tag(request.match_info["name"], reference)
    return web.Response(status=201)


@_table.post("/images/{name:.+}/push")
async def push_image(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker push``, with its progress.  Without a tag it pushes all tags."""
    reference = parse_reference(request.match_info["name"])
    tag = request.query.get("tag", "")
    reference = reference.repository.with_tag(tag) if tag else reference
    if "platform" in request.query:
        _require_platform(served.images, reference, request.query["platform"])
    auth = request.headers.get("X-Registry-Auth", "")

    async def push(report: Report) -> None:
        await served.images.push(reference, auth, report)

    return await respond_with_progress(request, push, early_errors=True)


class _WantedPlatform(msgspec.Struct, frozen=True):
    """The parameter ``platform`` of a push.  This node has an image for one platform only."""

    os: str = ""
    architecture: str = ""
    variant: str = ""


def _require_platform(images: ImageStore, reference: Reference, text: str) -> None:
    """Raise InvalidArgument for an invalid platform, and NotFound if this node has the image for another platform."""
    platform = _decode_platform(text)
    require_platform(images.get(str(reference.with_default_tag())), reference.familiar, platform)


def _decode_platform(text: str) -> ImagePlatform:
    """Decode a platform in the form of the OCI image specification.  Raises: InvalidArgument."""
    try:
        wanted = decode_body(text.encode(), _WantedPlatform)
    except InvalidArgument as error:
        raise InvalidArgument(f"failed to parse platform: {error}") from error
    if not wanted.os or not wanted.architecture:
        raise InvalidArgument("both OS and Architecture must be provided")
    return ImagePlatform(wanted.os, wanted.architecture, wanted.variant)


def _platforms(request: web.Request) -> tuple[ImagePlatform, ...]:
    """Return the platforms that the images of an archive must have.  Empty for any.  Raises: InvalidArgument.

    Source: moby, daemon/server/router/image/image_routes.go (getImagesGet, postImagesLoad).
    """
    texts = request.query.getall("platform", [])
    if api_version(request) < _V1_48:
        return ()
    if len(texts) > 1 and api_version(request) < _V1_52:
        raise InvalidArgument(
            "multiple platform parameters are not supported in this API version; use API version 1.52 or later"
        )
    return tuple(_decode_platform(text) for text in texts if text)


@_table.get("/images/search")
async def search_images(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker search``."""
    filters = Filters.of(request)
    filters.refuse_unknown("is-automated", "is-official", "stars")
    wanted = SearchFilter(
        is_automated=_truth(filters, "is-automated"),
        is_official=_truth(filters, "is-official"),
        stars=max((_stars(text) for text in filters["stars"]), default=0),
    )
    text = request.query.get("limit", "")
    try:
        limit = int(text) if text else LIMIT_DEFAULT
    except ValueError as error:
        raise InvalidArgument(f'strconv.Atoi: parsing "{text}": invalid syntax') from error
    credentials = decode_credentials(request.headers.get("X-Registry-Auth", ""))
    found = await search(served.images.policy, request.query.get("term", ""), credentials, limit, wanted)
    return json_list_response([shown(one) for one in found])


def _truth(filters: Filters, key: str) -> bool | None:
    match filters[key]:
        case ():
            return None
        case ("true",):
            return True
        case ("false",):
            return False
        case values:
            raise InvalidArgument(f"Invalid filter '{key}=[{' '.join(values)}]'")


def _stars(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InvalidArgument(f"Invalid filter 'stars=[{text}]'") from error


@_table.post("/auth")
async def check_credentials(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker login``: try the credentials at the registry.  This node does not keep them."""
    body = await read_body(request)
    wanted = decode_body(body, _Login)
    credentials = decode_body(body, RegistryCredentials)
    token = await login(served.images.policy, _domain(wanted.serveraddress), credentials)
    return json_response({"Status": "Login Succeeded", "IdentityToken": token})


class _Login(msgspec.Struct, frozen=True):
    serveraddress: str = ""


def _domain(address: str) -> str:
    """Return the registry that the address of a login means.  Source: moby 20.10, registry/service.go (Auth)."""
    url = address if "://" in address else f"https://{address or DEFAULT_DOMAIN}"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidArgument(f"unable to parse server address: {error}") from error
    if not host or "@" in parts.netloc:
        raise InvalidArgument(f"unable to parse server address: {address[:200]!r} names no host")
    return DEFAULT_DOMAIN if host in (DEFAULT_DOMAIN, "index.docker.io") else parts.netloc


@_table.delete("/images/{name:.+}")
async def remove_image(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker rmi``."""
    name = request.match_info["name"]
    if not name.strip():
        raise InvalidArgument("image name cannot be blank")
    platforms = request.query.getall("platforms", []) if api_version(request) >= _V1_50 else []
    if len(platforms) > 1:
        raise InvalidArgument("multiple platforms are not supported")
    for text in platforms:
        require_platform(served.images.get(name), name, _decode_platform(text))
    removed = await served.images.remove(
        name, force=flag(request, "force"), prune=not flag(request, "noprune"), users=served.users
    )
    return json_response(_removed(removed))


@_table.get("/distribution/{name:.+}/json")
async def inspect_distribution(served: ImageRoutes, request: web.Request) -> web.StreamResponse:
    """Return digest and platforms of a name in a registry, without a pull."""
    name = request.match_info["name"]
    if is_digest(name):
        raise InvalidArgument(f"unknown image reference format: {name}")
    if is_empty_image(name):
        # No registry has it.  Without a digest, docker would warn at each service of a plain process.
        empty = {"mediaType": DOCKER_MANIFEST, "digest": digest_of(b""), "size": 0}
        return json_response({"Descriptor": empty, "Platforms": []})
    reference = parse_reference(name).with_default_tag()
    auth = request.headers.get("X-Registry-Auth", "")
    uses_helper = is_of_administrator(request)
    return json_response(await served.images.inspect_remote(reference, auth, uses_helper=uses_helper))


def _wanted(name: str, tag: str) -> Reference:
    """Return the reference of a ``docker pull``.  ``tag`` may be a digest.  Without either, all tags are meant."""
    reference = parse_reference(name.removesuffix(":"))
    if not tag:
        return reference
    return reference.with_digest(tag) if is_digest(tag) else reference.repository.with_tag(tag)


def _filter(images: ImageStore, filters: Filters, clock: Clock) -> ImageFilter:
    """Return the filters of the request.  Raises: InvalidArgument, NotFound."""
    return ImageFilter(
        dangling=_dangling(filters),
        labels=filters["label"],
        without_labels=filters["label!"],
        before=_only(images, filters["before"]),
        since=_only(images, filters["since"]),
        until_ns=until_of(filters, clock.now_ns()),
        patterns=filters["reference"],
    )


def _dangling(filters: Filters) -> bool | None:
    match filters["dangling"]:
        case ():
            return None
        case ("true" | "1",):
            return True
        case ("false" | "0",):
            return False
        case values:
            raise InvalidArgument(f"Invalid filter 'dangling=[{' '.join(values)}]'")


def _only(images: ImageStore, words: tuple[str, ...]) -> Image | None:
    return images.get(words[-1]) if words else None


def _replaced(filter: ImageFilter, **fields: Any) -> ImageFilter:
    return msgspec.structs.replace(filter, **fields)


def shared_bytes(images: ImageStore, listed: Collection[Listed]) -> dict[str, int]:
    """Return, for each image, the size of the layers that it shares with other images."""
    counts: dict[str, int] = {}
    for image in images.images():
        for chain_id in image.chain:
            counts[chain_id] = counts.get(chain_id, 0) + 1
    layers = images.layer_store.all()
    return {
        one.image.id: sum(layers[id].size_bytes for id in one.image.chain if counts[id] > 1) for one in listed
    }


def _removed(removed: Removed) -> list[dict[str, str]]:
    return [{"Untagged": name} for name in removed.untagged] + [{"Deleted": id} for id in removed.deleted]

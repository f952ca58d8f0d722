"""``docker build`` by the classic API: receives an archive and responds with lines of progress.

Source: moby 20.10, api/server/router/build/build_routes.go, builder/dockerfile (its output).
"""

import base64
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
from aiohttp import web

from skep.api.errors import Untranslated
from skep.api.formats.bodies import decode_body
from skep.api.formats.timestamps import parse_time
from skep.api.http.server import Filters, flag, json_response
from skep.api.http.tables import RouteTable
from skep.engine.api.queries import integer
from skep.engine.api.streams.progress import respond_with_progress
from skep.engine.api.streams.uploads import drain, pieces_of
from skep.engine.build.addresses import shown, shown_errors
from skep.engine.build.builder import Builder
from skep.engine.build.cache.step_sources import SOURCES_MAX, history_sources
from skep.engine.build.dockerfile.targets import tags_of
from skep.engine.build.files import context
from skep.engine.build.files.context import fetch_context
from skep.engine.build.interface import BuildRequest, BuildResult, BuildStep, OpenContext, StepLimits
from skep.engine.confinement.limits import nano_cpus_of
from skep.engine.containers.container import StandardStream
from skep.engine.images.digest import Digest, short
from skep.engine.images.progress import ProgressMessage, Report
from skep.errors import InvalidArgument, SkepError, Unimplemented
from skep.model.container import Ulimit

_REFUSED = {"cpushares": "0", "memswap": "0", "cpusetcpus": "", "cpusetmems": "", "cgroupparent": ""}
"""Options that are not supported, with the neutral value that clients send if the user does not set them."""
_ALWAYS_REMOVED = "[Warning] --rm=false has no effect: no step leaves its container\n"
_TOO_MANY_SOURCES = f"[Warning] {{}} cache sources are not used: a build has at most {SOURCES_MAX}\n"
_HUB = frozenset({"index.docker.io", "registry-1.docker.io"})
_CREDENTIALS_MAX = 256
"""Maximum number of registries in one request's credentials."""
_KEPT_CHARACTERS_MAX = 1 << 20
"""Number of characters of a quiet build's output that are kept in memory."""
_SILENT_S = 300.0
"""Seconds without data after which a client that uploads its build context loses its build slot."""

_PRUNE_BOUNDS = ("keep-storage", "reserved-space", "max-used-space", "min-free-space")
_TIME_FILTERS = ("until", "unused-for")
"""The second is a deprecated synonym of the first."""
_CACHE_FIELDS = ("id", "parent", "type", "description", "inuse", "shared", "private")
"""Filters that select entries of the engine's build cache, which has other entries than this node's."""

T = TypeVar("T")

_table = RouteTable[Builder]()


def build_routes(builder: Builder) -> list[web.RouteDef]:
    """Return the routes ``/build`` and ``/build/prune``."""
    return _table.bound(builder)


@_table.post("/build")
async def build_image(builder: Builder, request: web.Request) -> web.StreamResponse:
    """Handle ``docker build``."""
    is_quiet = flag(request, "q")
    template = _template(request, builder)

    async def build(report: Report) -> None:
        with shown_errors():
            await build_and_report(report)

    async def build_and_report(report: Report) -> None:
        kept = _KeptMessages()
        say = kept.add if is_quiet else report
        progress = _ClassicProgress(say)
        keeps_containers = "rm" in request.query and not flag(request, "rm")
        # Wait before anything is unpacked, so that a waiting request has a connection, but neither a process nor files.
        async with builder.slots.hold(), builder.images.workspace("context") as directory:
            name = request.query.get("dockerfile") or context.DEFAULT_NAME
            if remote := request.query.get("remote", ""):
                text, files = await fetch_context(remote, directory, builder.images.limits, name)
                open_context, known = _opening(files), None
            else:
                received = context.BuildContext(directory, builder.images.limits, name)
                try:
                    await received.receive(pieces_of(request, silent_s=_SILENT_S), builder.contexts)
                except SkepError:
                    await drain(request)
                    raise
                text, open_context, known = await received.dockerfile(), received.directory, received.known
            sources = template.step_sources
            wanted = msgspec.structs.replace(template, dockerfile=text, step_sources=sources[:SOURCES_MAX])
            if len(sources) > SOURCES_MAX:
                say(ProgressMessage(stream=_TOO_MANY_SOURCES.format(len(sources) - SOURCES_MAX)))
            if keeps_containers and not is_quiet:  # docker-py's default
                report(ProgressMessage(stream=_ALWAYS_REMOVED))
            try:
                result = await builder.build_in_slot(wanted, open_context, progress, known=known)
            except SkepError:
                kept.give(report)
                raise
        if is_quiet:
            report(ProgressMessage(stream=f"{result.image_id}\n"))
        else:
            _report_end(report, wanted, result)

    return await respond_with_progress(request, build, early_errors=True)


@_table.post("/build/prune")
async def prune_build_cache(builder: Builder, request: web.Request) -> web.StreamResponse:
    """Handle ``docker builder prune``: the directories of ``RUN --mount=type=cache``.

    Results of steps are images, which ``docker image prune`` removes.  With a filter by label, no directory is removed,
    because they have no labels.  ``docker system prune --filter`` also sends its filters here.
    """
    for name in _PRUNE_BOUNDS:
        if integer(request, name, 0):
            raise Unimplemented(f"docker builder prune --{name} is not supported")
    filters = Filters.of(request)
    try:
        unused_since_ns = _unused_since(filters, builder.clock.now_ns())
    except InvalidArgument as error:
        raise InvalidArgument(f"failed to prune build cache: {error}") from error
    if filters["label"] or filters["label!"]:
        return json_response({"CachesDeleted": None, "SpaceReclaimed": 0})
    gone, freed_bytes = await builder.mounts.prune(unused_since_ns)
    return json_response({"CachesDeleted": gone or None, "SpaceReclaimed": freed_bytes})


def _unused_since(filters: Filters, now_ns: int) -> int | None:
    """Return the time since which a directory must be unused, or None for any.

    Source: moby 28.5, builder/builder-next/builder.go (Prune, toBuildkitPruneInfo).

    Raises: InvalidArgument: the engine refuses the filter as well; Unimplemented: the engine knows the filter.
    """
    filters.refuse_unknown(*_TIME_FILTERS, "label", "label!", *_CACHE_FIELDS)
    given = [name for name in _TIME_FILTERS if filters[name]]
    if len(given) == len(_TIME_FILTERS):
        raise InvalidArgument('conflicting filters: "until" and "unused-for"')
    since_ns = None
    for name in given:
        moment, *others = filters[name]
        if others:
            raise InvalidArgument("filters expect only one value")
        try:
            since_ns = parse_time(moment, now_ns)
        except InvalidArgument as error:
            expected = "filter expects a duration (e.g., '24h') or a timestamp"
            raise InvalidArgument(f'"{name}" {expected}: {error}') from error
    for name in _CACHE_FIELDS:
        if name in filters:
            raise Unimplemented(f"docker builder prune --filter {name} is not supported")
    return since_ns


def _opening(files: Path) -> OpenContext:
    async def open_context() -> Path:
        return files

    return open_context


def _report_end(report: Report, request: BuildRequest, result: BuildResult) -> None:
    if result.unused_arguments:
        names = " ".join(result.unused_arguments)
        report(ProgressMessage(stream=f"[Warning] One or more build-args [{names}] were not consumed\n"))
    report(ProgressMessage(aux={"ID": result.image_id}))
    report(ProgressMessage(stream=f"Successfully built {short(result.image_id)}\n"))
    for tag in request.tags:
        report(ProgressMessage(stream=f"Successfully tagged {tag.familiar}\n"))


class _KeptMessages:
    """Messages that a quiet build shows only on failure.  Long output is cut at its start."""

    def __init__(self) -> None:
        self._messages: deque[ProgressMessage] = deque()
        self._characters = 0

    def add(self, message: ProgressMessage) -> None:
        """Keep a message."""
        self._messages.append(message)
        self._characters += _characters_of(message)
        while self._characters > _KEPT_CHARACTERS_MAX:
            self._characters -= _characters_of(self._messages.popleft())

    def give(self, report: Report) -> None:
        """Report the kept messages."""
        for message in self._messages:
            report(message)


def _characters_of(message: ProgressMessage) -> int:
    return 100 + len(message.stream) + len(message.status) + len(message.progress)


class _ClassicProgress:
    """Reports progress as the classic builder's lines."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def _say(self, text: str) -> None:
        self._report(ProgressMessage(stream=text))

    def started(self, step: BuildStep) -> None:
        self._say(f"Step {step.number}/{step.total} : {step.text}\n")

    def cached(self, step: BuildStep) -> None:
        self._say(" ---> Using cache\n")

    def pulling(self, step: BuildStep, message: ProgressMessage) -> None:
        self._report(message)

    def running(self, step: BuildStep, container_id: str) -> None:
        self._say(f" ---> Running in {short(container_id)}\n")

    def output(self, step: BuildStep, stream: StandardStream, data: bytes) -> None:
        text = data.decode(errors="replace")
        self._say(f"\x1b[91m{text}\x1b[0m" if stream is StandardStream.STDERR else text)

    def removed(self, step: BuildStep, container_id: str) -> None:
        self._say(f"Removing intermediate container {short(container_id)}\n")

    def warning(self, step: BuildStep, text: str) -> None:
        self._say(f"\x1b[91m[WARNING]: {shown(text)}\n\x1b[0m")

    def finished(self, step: BuildStep, image_id: Digest | None) -> None:
        if image_id is not None:
            self._say(f" ---> {short(image_id)}\n")

    def failed(self, step: BuildStep, error: Exception) -> None:
        """Report nothing, because the last line of the response has the error."""


def _template(request: web.Request, builder: Builder) -> BuildRequest:
    """Return the request without its Dockerfile.  Raises: InvalidArgument, Unimplemented."""
    query = request.query
    _refuse(request)
    cpu_quota = integer(request, "cpuquota", 0)
    cache_names = _decoded(query.get("cachefrom") or "[]", list[str], "cache-from")
    return BuildRequest(
        dockerfile="",
        tags=tags_of(query.getall("t", []), Untranslated),
        target=query.get("target", ""),
        arguments=_decoded(query.get("buildargs") or "{}", dict[str, str | None], "build args"),
        labels=_decoded(query.get("labels") or "{}", dict[str, str], "labels"),
        use_cache=not flag(request, "nocache"),
        step_sources=history_sources(builder.images, cache_names),
        only_sources=bool(cache_names),
        pull=flag(request, "pull"),
        network=query.get("networkmode", ""),
        hosts=tuple(query.getall("extrahosts", [])),
        limits=StepLimits(
            memory_bytes=integer(request, "memory", 0),
            nano_cpus=nano_cpus_of(cpu_quota, integer(request, "cpuperiod", 0)) if cpu_quota > 0 else 0,
            shm_bytes=integer(request, "shmsize", 0) or (64 << 20),
            ulimits=tuple(_decoded(query.get("ulimits") or "[]", list[Ulimit], "ulimit settings")),
        ),
        credentials=_credentials(request.headers.get("X-Registry-Config", "")),
        platform=query.get("platform", "").lower(),
    )


def _refuse(request: web.Request) -> None:
    """Refuse unsupported options by name.  Raises: InvalidArgument, Unimplemented."""
    query = request.query
    version = query.get("version", "")
    if version not in ("", "1", "2"):
        raise InvalidArgument(f"invalid version {version}")
    if version == "2":
        raise Unimplemented("BuildKit builds are not supported here: set DOCKER_BUILDKIT=0")
    if flag(request, "squash"):
        raise InvalidArgument("squash is only supported with experimental mode")
    if query.get("securityopt"):
        raise InvalidArgument(
            "The daemon on this platform does not support setting security options on build"
        )
    if query.get("isolation", "") not in ("", "default"):
        raise InvalidArgument(f'Unsupported isolation: "{query["isolation"]}"')
    if _decoded(query.get("outputs") or "[]", list[object], "outputs"):
        raise Unimplemented("docker build --output is not supported")
    for name, nothing in _REFUSED.items():
        if query.get(name, "") not in ("", nothing):
            raise Unimplemented(f"docker build: {name} is not supported")


def _decoded(text: str, type: type[T], what: str) -> T:
    """Decode a JSON query parameter.  Raises: InvalidArgument."""
    try:
        return decode_body(text.encode(), type)
    except InvalidArgument as error:
        raise InvalidArgument(f"error reading {what}: {error}") from error


def _credentials(header: str) -> Mapping[str, str]:
    """Return ``X-Registry-Auth`` values by registry.  An unreadable header means no credentials, as in Docker."""
    try:
        given = msgspec.json.decode(
            base64.urlsafe_b64decode(header + "=="), type=dict[str, dict[str, object]]
        )
    except (ValueError, RecursionError):
        return {}
    found = {}
    for address, one in list(given.items())[:_CREDENTIALS_MAX]:
        host = address.removeprefix("https://").removeprefix("http://").split("/")[0]
        domain = "docker.io" if host in _HUB else host
        found[domain] = base64.urlsafe_b64encode(msgspec.json.encode(one)).decode()
    return found

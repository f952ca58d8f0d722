"""Streams of a container: ``logs``, ``attach``, ``stats``.

Source: moby 20.10, api/server/router/container/container_routes.go, api/server/httputils/write_log_stream.go,
daemon/stats.go.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import NamedTuple
from urllib.parse import quote_plus

import msgspec
from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.api.formats.timestamps import parse_unix_time
from skep.api.http.responses import Hijacked
from skep.api.http.server import (
    ApiVersion,
    JsonLines,
    OutputFrames,
    OutputStream,
    api_version,
    flag,
    json_response,
)
from skep.api.http.tables import RouteTable
from skep.engine.api.streams.detach import DetachKeys, parse_keys
from skep.engine.api.streams.hijack import MULTIPLEXED, RAW, hijack
from skep.engine.api.streams.terminal import ALL_STREAMS, SessionEnd, TerminalClient, join
from skep.engine.api.streams.websocket import check_handshake, open_websocket
from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import (
    Container,
    ContainerState,
    LogEntry,
    LogFilter,
    NotRunning,
    StandardStream,
)
from skep.engine.engine import Engine
from skep.engine.log_drivers.facts import attributes_of
from skep.engine.metrics.stats import Stats
from skep.errors import InvalidArgument, NotFound, Unavailable
from skep.model.values.times import ZERO_TIME, timestamp

_NAMES_ITS_FORM = _WEBSOCKET_CHOOSES = ApiVersion("1.42")
_WITH_OS_TYPE = ApiVersion("1.52")
_STATS_PERIOD_S = 1.0
"""Seconds between two samples, as in Docker."""


class OutputRoutes(msgspec.Struct, frozen=True):
    """Dependencies of these routes."""

    engine: Engine
    clock: Clock


_table = RouteTable[OutputRoutes]()


def output_routes(engine: Engine, clock: Clock) -> list[web.RouteDef]:
    """Return the routes ``/containers/{id}/logs``, ``.../attach``, ``.../stats``."""
    return _table.bound(OutputRoutes(engine, clock))


@_table.get("/containers/{id}/logs")
async def show_logs(served: OutputRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker logs``."""
    filter = _log_filter(request, follow=flag(request, "follow"))
    container = served.engine.get(request.match_info["id"])
    frames = OutputFrames(request, tty=container.config.tty, content_type=_content_type(request, container))
    async with aclosing(served.engine.logs(container.id, filter)) as entries, frames:
        async for entry in entries:
            await frames.send(OutputStream(entry.stream.value), _line(entry, request, container))
    return frames.response


@_table.post("/containers/{id}/attach")
async def attach(served: OutputRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker attach``, and the streams of ``docker run``.

    Source: moby, daemon/attach.go (ContainerAttach).
    """
    container, keys = _attachable(served.engine, request)
    wanted = _Wanted(streams=_streams(request), takes_input=flag(request, "stdin"), keys=keys)
    async with hijack(request, tty=container.config.tty) as client:
        await _attach(served.engine, request, container, client, wanted)
    return Hijacked()


@_table.get("/containers/{id}/attach/ws")
async def attach_by_websocket(served: OutputRoutes, request: web.Request) -> web.StreamResponse:
    """Attach like ``attach``, for clients that cannot hijack a connection.  Before API 1.42 always all streams."""
    check_handshake(request)
    container, keys = _attachable(served.engine, request)
    wanted = _Wanted(streams=ALL_STREAMS, takes_input=True, keys=keys)
    if api_version(request) >= _WEBSOCKET_CHOOSES:
        wanted = _Wanted(streams=_streams(request), takes_input=flag(request, "stdin"), keys=keys)
    async with open_websocket(request) as (client, response):
        with suppress(ConnectionError):
            await _attach(served.engine, request, container, client, wanted)
    return response


class _Wanted(NamedTuple):
    """Options of a client that attaches.  ``keys`` are its detach keys."""

    streams: frozenset[StandardStream]
    takes_input: bool
    keys: bytes


def _attachable(engine: Engine, request: web.Request) -> tuple[Container, bytes]:
    """Return the container, and the client's detach keys.  Raises: NotFound; NotRunning; InvalidArgument."""
    keys = parse_keys(request.query.get("detachKeys", ""))
    word = request.match_info["id"]
    container = engine.get(word)
    if container.state is ContainerState.PAUSED:
        raise NotRunning(f"container {word} is paused, unpause the container before attach")
    if container.is_restarting:
        raise NotRunning(f"container {word} is restarting, wait until the container is running")
    return container, keys


async def _attach(
    engine: Engine, request: web.Request, container: Container, client: TerminalClient, wanted: _Wanted
) -> None:
    follows = flag(request, "stream")
    process: Attachment | None = None
    try:
        if flag(request, "logs") and wanted.streams:
            filter = LogFilter(streams=wanted.streams, catches_up=follows)
            async with aclosing(engine.log_batches(container.id, filter)) as batches:
                async for entries in batches:
                    for entry in entries:
                        await client.send(OutputStream(entry.stream.value), entry.data)
                    if not entries and follows and process is None and _has_process(engine, container):
                        # Attach before the rest of the log is read, otherwise output between both would be lost.  A
                        # part of it may come twice instead, as in Docker.
                        process = await _streams_of(engine, container)
                        follows = process is not None
        if follows and process is None:
            process = await _streams_of(engine, container)
        if process is None:
            return
        end = await join(
            client,
            process,
            takes_input=wanted.takes_input and container.config.open_stdin,
            streams=wanted.streams,
            keys=DetachKeys(wanted.keys) if container.config.tty else None,
        )
    finally:
        if process is not None:
            process.close()
    if end is not SessionEnd.OUTPUT:
        engine.events.publish("detach", container)


def _has_process(engine: Engine, container: Container) -> bool:
    """Return whether a client can attach now, without a wait for the start."""
    present = engine.store.lookup(container.id)
    return present is not None and present.process is not None


async def _streams_of(engine: Engine, container: Container) -> Attachment | None:
    """Return the container's streams, after its start, or None if it has ended."""
    try:
        return await engine.attach(container.id)
    except (NotRunning, NotFound):
        return None


@_table.get("/containers/{id}/stats")
async def show_stats(served: OutputRoutes, request: web.Request) -> web.StreamResponse:
    """Handle ``docker stats``: one sample, or one per second."""
    container = served.engine.get(request.match_info["id"])
    streams = flag(request, "stream") if "stream" in request.query else True
    os_type = "linux" if api_version(request) >= _WITH_OS_TYPE else ""
    if not streams and (flag(request, "one-shot") or not container.is_running):
        return json_response(replace(await served.engine.stats(container.id), os_type=os_type))
    samples = _samples(served.engine, container, served.clock)
    if not streams:
        return json_response(replace(await anext(samples), os_type=os_type))
    async with JsonLines(request) as lines:
        async for sample in samples:
            await lines.send(replace(sample, os_type=os_type))
    return lines.response


async def _samples(engine: Engine, container: Container, clock: Clock) -> AsyncIterator[Stats]:
    """Yield a sample each second, with the previous one, until the container is removed.

    Raises: Unavailable: the first sample fails.  Later failures are skipped.
    """
    try:
        before = await engine.stats(container.id)
        while True:
            await clock.sleep(_STATS_PERIOD_S)
            try:
                sample = await engine.stats(container.id)
            except Unavailable:
                continue
            if sample.read != ZERO_TIME and before.read != ZERO_TIME:
                yield replace(sample, preread=before.read, precpu_stats=before.cpu_stats)
            else:
                yield sample
            before = sample
    except NotFound:
        return


def _log_filter(request: web.Request, *, follow: bool) -> LogFilter:
    streams = _streams(request)
    if not streams:
        raise InvalidArgument("Bad parameters: you must choose at least one stream")
    tail = request.query.get("tail", "all")
    return LogFilter(
        streams=streams,
        follow=follow,
        tail=int(tail) if tail.isascii() and tail.isdigit() and len(tail) < 10 else None,
        since_ns=parse_unix_time(request.query.get("since", "")) or 0,
        until_ns=parse_unix_time(request.query.get("until", "")) or 0,
    )


def _streams(request: web.Request) -> frozenset[StandardStream]:
    wanted = {StandardStream.STDOUT: flag(request, "stdout"), StandardStream.STDERR: flag(request, "stderr")}
    return frozenset(stream for stream, is_wanted in wanted.items() if is_wanted)


def _line(entry: LogEntry, request: web.Request, container: Container) -> bytes:
    prefix = b""
    if flag(request, "timestamps"):
        prefix += _fixed_timestamp(entry.timestamp_ns).encode() + b" "
    if flag(request, "details"):
        prefix += _details(container).encode() + b" "
    return prefix + entry.data


def _fixed_timestamp(moment_ns: int) -> str:
    """Format a time with nine decimals, so that lines are aligned."""
    return f"{timestamp(moment_ns - moment_ns % 1_000_000_000)[:-1]}.{moment_ns % 1_000_000_000:09d}Z"


def _details(container: Container) -> str:
    """Return the tag, and the labels and variables that the log options name: ``a=1,b=two+words``.

    Source: moby, api/server/httputils/write_log_stream.go (stringAttrs).
    """
    return ",".join(
        f"{quote_plus(name)}={quote_plus(value)}" for name, value in sorted(attributes_of(container).items())
    )


def _content_type(request: web.Request, container: Container) -> str | None:
    if api_version(request) < _NAMES_ITS_FORM:
        return None
    return RAW if container.config.tty else MULTIPLEXED

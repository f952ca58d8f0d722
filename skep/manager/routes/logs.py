"""``/services/{id}/logs`` and ``/tasks/{id}/logs``.

Source: moby 20.10, api/server/router/swarm/helpers.go (swarmLogs), daemon/cluster/services.go (ServiceLogs),
api/server/httputils/write_log_stream.go.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from urllib.parse import quote_plus

from aiohttp import web
from msgspec.structs import replace

from skep.api.errors import Untranslated
from skep.api.formats.timestamps import parse_unix_time
from skep.api.http.responses import MULTIPLEXED_STREAM, RAW_STREAM
from skep.api.http.server import ApiVersion, OutputFrames, OutputStream, Routes, api_version, flag
from skep.errors import SkepError
from skep.manager.routes.access import current_view, manager_of
from skep.model.container import ContainerSpec
from skep.model.logs import LogLine, LogQuery, LogStream
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.times import SECOND_NS, timestamp

routes = Routes()

_STREAMS = {"stdout": LogStream.STDOUT, "stderr": LogStream.STDERR}
_FRAMES = {LogStream.STDOUT: OutputStream.STDOUT, LogStream.STDERR: OutputStream.STDERR}
_TYPED_FROM = ApiVersion("1.42")


@routes.get("/services/{id}/logs")
async def stream_service_logs(request: web.Request) -> web.StreamResponse:
    """Send the output of all tasks of a service."""
    query = _query(request)
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    container = _container(service.spec.task_template.container_spec)
    return await _stream(request, replace(query, services=(service.id,)), tty=container.tty)


@routes.get("/tasks/{id}/logs")
async def stream_task_logs(request: web.Request) -> web.StreamResponse:
    """Send the output of one task."""
    query = _query(request)
    task = (await current_view(request)).resolve(Task, request.match_info["id"])
    container = _container(task.spec.container_spec)
    return await _stream(request, replace(query, tasks=(task.id,)), tty=container.tty)


def _query(request: web.Request) -> LogQuery:
    """Return the log query in the parameters.  Raises: Untranslated: invalid parameters (the engine
    responds with 500).
    """
    streams = tuple(stream for name, stream in _STREAMS.items() if flag(request, name))
    if not streams:
        raise Untranslated("Bad parameters: you must choose at least one stream")
    try:
        since_ns = parse_unix_time(request.query.get("since", ""))
    except Untranslated as error:
        raise Untranslated(f"could not parse since timestamp: {error}") from error
    return LogQuery(
        streams=streams,
        follow=flag(request, "follow"),
        tail=_tail(request.query.get("tail", "")),
        since_ns=since_ns or 0,
    )


def _tail(word: str) -> int | None:
    if word in {"", "all"}:
        return None
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", word):
        raise Untranslated('tail value must be a positive integer or "all"')
    if int(word) < 0:
        raise Untranslated("negative tail values not supported")
    return int(word)


def _container(spec: ContainerSpec | None) -> ContainerSpec:
    if spec is None:
        raise Untranslated("error making log selector: logs only supported on container tasks")
    return spec


async def _stream(request: web.Request, query: LogQuery, *, tty: bool) -> web.StreamResponse:
    details, timestamps = flag(request, "details"), flag(request, "timestamps")
    frames = OutputFrames(request, tty=tty, content_type=_content_type(request, tty))
    async with frames, aclosing(manager_of(request).logs.batches(query)) as batches:
        try:
            async for lines in batches:
                await frames.send_all(
                    (_FRAMES[line.stream], _line(line, details=details, timestamps=timestamps))
                    for line in lines
                )
        except SkepError as error:
            # The response has started, so this is the only way to send the error.  Clients print it and fail.
            await frames.send(OutputStream.SYSTEM, f"Error grabbing logs: {error}\n".encode())
    return frames.response


@asynccontextmanager
async def closing(lines: AsyncIterator[LogLine]) -> AsyncIterator[AsyncIterator[LogLine]]:
    """Return ``lines`` as a context that closes the generator, which ends the subscription."""
    try:
        yield lines
    finally:
        if isinstance(lines, AsyncGenerator):
            await lines.aclose()


def _content_type(request: web.Request, tty: bool) -> str | None:
    if api_version(request) < _TYPED_FROM:
        return None
    return RAW_STREAM if tty else MULTIPLEXED_STREAM


def _line(entry: LogLine, *, details: bool, timestamps: bool) -> bytes:
    line = entry.data
    if details:
        line = _context(entry) + b" " + line
    if timestamps:
        line = _fixed_timestamp(entry.timestamp_ns).encode() + b" " + line
    return line


def _context(entry: LogLine) -> bytes:
    """Return the origin of a line, in order of the keys.  A user's own labels with these names are ignored."""
    attributes = {
        **entry.attrs,
        "com.docker.swarm.node.id": entry.node_id,
        "com.docker.swarm.service.id": entry.service_id,
        "com.docker.swarm.task.id": entry.task_id,
    }
    pairs = (f"{quote_plus(key)}={quote_plus(value)}" for key, value in sorted(attributes.items()))
    return ",".join(pairs).encode()


def _fixed_timestamp(unix_ns: int) -> str:
    """Return a timestamp with nine decimals, so that columns line up (Go's RFC3339NanoFixed)."""
    seconds, nanoseconds = divmod(unix_ns, SECOND_NS)
    return f"{timestamp(seconds * SECOND_NS)[:-1]}.{nanoseconds:09d}Z"

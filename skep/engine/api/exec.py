"""``docker exec``: create, start, inspect and resize additional processes in containers.

Source: moby 20.10, api/server/router/container/exec.go.
"""

from typing import Any

from aiohttp import web

from skep.api.errors import Untranslated
from skep.api.formats.forwarded_requests import ExecRequest, ExecStart
from skep.api.http.responses import Hijacked
from skep.api.http.server import ApiVersion, OutputStream, api_version, json_response, read_body, read_json
from skep.api.http.tables import RouteTable
from skep.engine.api.queries import integer
from skep.engine.api.streams.detach import DetachKeys, parse_keys
from skep.engine.api.streams.hijack import Duplex, hijack
from skep.engine.api.streams.terminal import SessionEnd, join
from skep.engine.containers.container import Exec, ExecConfig, StandardStream
from skep.engine.containers.execs import Execs
from skep.errors import InvalidArgument, SkepError

_table = RouteTable[Execs]()

_WITH_CONSOLE_SIZE = ApiVersion("1.42")


def exec_routes(execs: Execs) -> list[web.RouteDef]:
    """Return the routes ``/containers/{id}/exec`` and ``/exec/...``."""
    return _table.bound(execs)


@_table.post("/containers/{id}/exec")
async def create_exec(execs: Execs, request: web.Request) -> web.StreamResponse:
    """Create an exec.  Another request starts it."""
    body = await read_json(request, ExecRequest)
    if not body.cmd:
        raise InvalidArgument("No exec command specified")
    try:
        parse_keys(body.detach_keys)
    except InvalidArgument as error:
        raise Untranslated(f"Invalid escape keys ({body.detach_keys}) provided") from error
    has_size = body.tty and api_version(request) >= _WITH_CONSOLE_SIZE
    exec_id = execs.create(
        request.match_info["id"], _config_of(body), _size_of(body.console_size) if has_size else None
    )
    return json_response({"Id": exec_id}, 201)


@_table.post("/exec/{id}/start")
async def start_exec(execs: Execs, request: web.Request) -> web.StreamResponse:
    """Start an exec, attached to the connection unless ``Detach`` is given."""
    id = request.match_info["id"]
    options = await read_json(request, ExecStart) if await read_body(request) else ExecStart()
    exec = execs.get(id)
    if options.detach:
        (await execs.start(id)).close()
        return web.Response()
    async with hijack(request, tty=options.tty) as client:
        try:
            await _run(execs, client, exec, options)
        except SkepError as error:
            # It is too late for an HTTP status.  Docker also sends the error as output.
            await client.send(OutputStream.STDOUT, f"{error}\r\n".encode())
    return Hijacked()


async def _run(execs: Execs, client: Duplex, exec: Exec, options: ExecStart) -> None:
    process, config = await execs.start(exec.id), exec.config
    try:
        if config.tty and (size := _size_of(options.console_size)) is not None:
            execs.resize(exec.id, *size)
        keys = DetachKeys(parse_keys(config.detach_keys)) if config.tty else None
        attached = (
            (StandardStream.STDOUT, config.attach_stdout),
            (StandardStream.STDERR, config.attach_stderr),
        )
        streams = {stream for stream, is_attached in attached if is_attached}
        end = await join(client, process, takes_input=config.attach_stdin, streams=streams, keys=keys)
    finally:
        process.close()
    if end is SessionEnd.OUTPUT:
        await execs.wait(exec.id)  # clients read the exit code as soon as the connection closes
    elif end is SessionEnd.DETACHED:
        execs.publish_detach(exec.id)


@_table.get("/exec/{id}/json")
async def inspect_exec(execs: Execs, request: web.Request) -> web.StreamResponse:
    """Return whether the exec runs, and its exit code."""
    return json_response(_inspected(execs.get(request.match_info["id"])))


@_table.post("/exec/{id}/resize")
async def resize_exec(execs: Execs, request: web.Request) -> web.StreamResponse:
    """Set the size of an exec's terminal to ``h`` rows and ``w`` columns."""
    execs.resize(request.match_info["id"], integer(request, "h"), integer(request, "w"))
    return web.Response()


def _size_of(console_size: tuple[int, ...]) -> tuple[int, int] | None:
    return (console_size[0], console_size[1]) if len(console_size) == 2 else None


def _config_of(body: ExecRequest) -> ExecConfig:
    return ExecConfig(
        command=body.cmd,
        env=body.env,
        working_dir=body.working_dir,
        user=body.user,
        tty=body.tty,
        attach_stdin=body.attach_stdin,
        attach_stdout=body.attach_stdout,
        attach_stderr=body.attach_stderr,
        privileged=body.privileged,
        detach_keys=body.detach_keys,
    )


def _inspected(exec: Exec) -> dict[str, Any]:
    config = exec.config
    process: dict[str, Any] = {
        "tty": config.tty,
        "entrypoint": config.command[0],
        "arguments": list(config.command[1:]),
        "privileged": config.privileged,
    }
    if config.user:
        process["user"] = config.user
    return {
        "ID": exec.id,
        "Running": exec.running,
        "ExitCode": exec.exit_code,
        "ProcessConfig": process,
        "OpenStdin": config.attach_stdin,
        "OpenStderr": config.attach_stderr,
        "OpenStdout": config.attach_stdout,
        "CanRemove": False,
        "ContainerID": exec.container_id,
        "DetachKeys": config.detach_keys,
        "Pid": exec.pid,
    }

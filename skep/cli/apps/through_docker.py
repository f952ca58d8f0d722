"""Runs the docker command on containers of any node: ``skep cp``, ``attach``, ``stats`` and ``task top``.

They behave like docker's commands, because docker itself runs them, on a temporary socket.  On this socket, names of
tasks are names of containers, and requests about these are forwarded to a manager.
"""

import asyncio
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

import click

from skep.api.client.raw import READ_BYTES, RawClient
from skep.cli import passthrough
from skep.cli.apps.targets import CommandTarget, OrDocker, find_target_or_docker, to_docker
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests
from skep.errors import SkepError, Unavailable

_HEAD_BYTES_MAX = 64 * 1024
"""Size of a request's head.  The docker command on this machine sends some hundred bytes."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ABOUT = re.compile(r"(?P<version>/v[0-9.]+)?/containers/(?P<name>[^/?]+)/(?P<rest>[a-z]+(?:\?.*)?)")

Names = Callable[[Sequence[str]], Sequence[str]]
"""Returns the words of a command that may name tasks."""


def rewritten(target: str, tasks: Mapping[str, CommandTarget]) -> str:
    """Return the path and query of docker's request, rewritten for a manager."""
    match = _ABOUT.fullmatch(target)
    task = tasks.get(unquote(match["name"])) if match is not None else None
    if match is None or task is None:
        return target
    return f"{match['version'] or ''}{task.container}/{match['rest']}"


async def run_docker(
    host: HostOptions, command: Sequence[str], words: Sequence[str], names: Sequence[str]
) -> int | None:
    """Run ``docker COMMAND WORDS``, in which ``names`` may name tasks, and return its exit code.

    Returns None without running docker if none of the names is a task's, because docker then needs no such
    socket.
    """
    async with host.raw_client() as client:
        found = {name: await find_target_or_docker(client, name) for name in dict.fromkeys(names)}
        tasks = {name: task for name, task in found.items() if task is not None}
        if not tasks:
            return None
        docker = passthrough.find_docker()
        async with _socket(client, tasks) as socket:
            process = await asyncio.create_subprocess_exec(
                docker, "--host", f"unix://{socket}", *command, *words
            )
            with _signals_passed_on(process):
                code = await process.wait()
        if code:
            for reason in await lost_connections(client, tasks.values()):
                click.echo(f"Error: {reason}", err=True)
        return code


async def lost_connections(client: RawClient, tasks: Iterable[CommandTarget]) -> Sequence[str]:
    """Return why the containers of ``tasks`` cannot be reached.  Docker only sees that its connection has ended."""
    reasons: list[str] = []
    for task in tasks:
        try:
            await client.get(f"{task.container}/json")
        except Unavailable as error:
            reasons.append(str(error))
        except SkepError:
            pass  # Its node responds, so docker has shown the error.
    return reasons


@asynccontextmanager
async def _socket(client: RawClient, tasks: Mapping[str, CommandTarget]) -> AsyncIterator[Path]:
    """Serve a socket that only this user can reach, and forward its requests to ``client``'s host."""
    with tempfile.TemporaryDirectory(prefix="skep-docker-") as directory:
        path = Path(directory) / "api.sock"
        serving = set[asyncio.Task[None]]()
        """Held here, because a loop has only weak references to tasks, and none may outlive the block."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            serving.add(task)
            task.add_done_callback(serving.discard)
            with suppress(asyncio.CancelledError, SkepError):
                # Docker has ended, or will notice the closed connection.
                await _pass_on(client, tasks, reader, writer)
            writer.close()

        server = await asyncio.start_unix_server(serve, path, limit=_HEAD_BYTES_MAX)
        try:
            yield path
        finally:
            server.close()
            for task in serving:
                task.cancel()
            if serving:
                await asyncio.wait(serving)


async def _pass_on(
    client: RawClient,
    tasks: Mapping[str, CommandTarget],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Forward a connection with one request.  Docker opens another connection for its next request."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        first, _, rest = head.partition(b"\r\n")
        method, target, protocol = first.decode("latin-1").split(" ", 2)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, OSError):
        return
    if not re.search(rb"(?i)\r\nupgrade:", head):
        rest = b"Connection: close\r\n" + re.sub(rb"(?i)(?<=\n)connection:[^\r]*\r\n", b"", b"\n" + rest)[1:]
    line = f"{method} {rewritten(target, tasks)} {protocol}\r\n".encode("latin-1")
    async with client.connection() as (their_reader, their_writer):
        their_writer.write(line + rest)
        async with asyncio.TaskGroup() as group:
            up = group.create_task(copy(reader, their_writer), name="request")
            await copy(their_reader, writer)
            up.cancel()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction, including its end, until either side has closed."""
    with suppress(OSError):
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


@contextmanager
def _signals_passed_on(process: asyncio.subprocess.Process) -> Iterator[None]:
    """Forward signals to docker within the block.  A terminal sends Ctrl+C to docker by itself."""
    loop = asyncio.get_running_loop()

    def send(number: int) -> None:
        if number != signal.SIGINT or not sys.stdin.isatty():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, send, number)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def arguments_of(words: Sequence[str], valued: str) -> list[str]:
    """Return the words that are not options.  ``valued``: a pattern of options whose value is the next word."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            return [*found, *rest]
        if word.startswith("-") and word != "-":
            if re.fullmatch(valued, word):
                next(rest, None)
        else:
            found.append(word)
    return found


def _command(name: str, docker: Sequence[str], names: Names, help: str, arguments: str) -> click.Command:
    """Return a command that passes its words to docker, after looking up ``names`` among them."""

    @click.command(
        name,
        cls=OrDocker,
        help=help,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar=arguments)
    @click.pass_context
    def run(ctx: click.Context, /, words: Sequence[str]) -> None:
        host: HostOptions = ctx.obj
        code = run_requests(run_docker(host, docker, words, names(words)))
        if code is None:
            to_docker(ctx)
        sys.exit(code)

    return run


def _of_copy(words: Sequence[str]) -> list[str]:
    """Return the names in the words of cp: ``web.1`` in ``web.1:/etc/hosts``.  Local paths begin with / or a dot."""
    return [
        word.partition(":")[0]
        for word in arguments_of(words, "-(?!-).*[^-aLq].*|$^")
        if ":" in word and not word.startswith(("/", "."))
    ]


cp = _command(
    "cp",
    ["cp"],
    _of_copy,
    """Copy files to or from a task's container on any node.

    One of SOURCE and DESTINATION is SERVICE[.SLOT]:PATH or TASK:PATH. Takes the options of docker cp.

    \b
    Examples:
      skep cp web.1:/etc/nginx/nginx.conf .
      skep cp ./site web.2:/usr/share/nginx/html
      skep cp web:/var/log - | tar tv
    """,
    "SOURCE DESTINATION",
)
attach = _command(
    "attach",
    ["attach", "--sig-proxy=false"],
    lambda words: arguments_of(words, "--detach-keys")[:1],
    """Attach to a task's container on any node.

    Takes the options of docker attach. Signals are not forwarded to the task.

    \b
    Examples:
      skep attach --no-stdin web.1
      skep attach --detach-keys ctrl-x game
    """,
    "SERVICE[.SLOT]|TASK",
)
stats = _command(
    "stats",
    ["stats"],
    lambda words: arguments_of(words, "--format"),
    """Show resource usage of tasks' containers on any node.

    Takes the options of docker stats. Without an argument, shows the containers of this node.

    \b
    Examples:
      skep stats web.1 web.2
      skep stats --no-stream --format json db
    """,
    "[SERVICE[.SLOT]|TASK]...",
)
top = _command(
    "top",
    ["top"],
    lambda words: words[:1],
    """Show the processes in a task's container.

    Takes the options of ps.

    \b
    Examples:
      skep task top web.1
      skep task top db -o pid,rss,args
    """,
    "SERVICE[.SLOT]|TASK [PS OPTIONS]",
)


@click.group()
def task() -> None:
    """Manage tasks.

    \b
    Example:
      skep task top web.1
    """


task.add_command(top)

"""Finds the tasks for commands that access a container, with docker as the fallback.

``skep exec web ls`` means the service ``web``.  Without such a service, docker gets the command as typed, so that
commands for containers of this node work as before.
"""

from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import click
import msgspec

from skep.api.client.raw import RawClient
from skep.cli import passthrough
from skep.cli.endpoint import HostOptions
from skep.errors import NotFound, Unavailable

_NO_MANAGER = "not a swarm manager"
"""Part of the error of a node that has no manager, in Docker's words."""
_NO_SWARM = 'Use "docker swarm init"'
"""Part of that error outside of a swarm, where services cannot exist."""

T = TypeVar("T")


class CommandTarget(msgspec.Struct, frozen=True, rename="pascal"):
    """A running task, as shown by a manager."""

    task_id: str = msgspec.field(name="TaskID")
    node_id: str = msgspec.field(name="NodeID")
    name: str
    hostname: str = ""

    @property
    def path(self) -> str:
        """Return the task's path in the API."""
        return f"/skep/tasks/{self.task_id}"

    @property
    def container(self) -> str:
        """Return its container's path in the API."""
        return f"{self.path}/container"


async def find_target(client: RawClient, word: str) -> CommandTarget:
    """Find the running task for ``SERVICE``, ``SERVICE.SLOT`` or ``TASK``.  Raises: NotFound, FailedPrecondition."""
    if not word or "/" in word:
        raise NotFound(f"no such service or task: {word}. List services with skep service ls.")
    return msgspec.convert(await client.get(f"/skep/tasks/{quote(word, safe='')}/target"), CommandTarget)


async def find_target_or_docker(client: RawClient, word: str) -> CommandTarget | None:
    """Find the running task for ``word``, or return None if it may be one of docker's containers.

    Raises: Unavailable: this node has no such container, and only managers know services.
    """
    try:
        return await find_target(client, word)
    except NotFound:
        return None
    except Unavailable as error:
        if _NO_MANAGER not in str(error):
            raise
        if _NO_SWARM not in str(error) and not await _is_container(client, word):
            raise
        return None


async def _is_container(client: RawClient, word: str) -> bool:
    try:
        await client.get(f"/containers/{quote(word, safe='')}/json")
    except NotFound:
        return False
    return True


async def or_docker(looking: Awaitable[T]) -> T | None:
    """Return the result of ``looking``.  Return None to let docker try if the object is unknown or this node is a
    worker.
    """
    try:
        return await looking
    except NotFound:
        return None
    except Unavailable as error:
        if _NO_MANAGER in str(error):
            return None
        raise


class OrDocker(click.Command):
    """A command that has the same name as one of docker's.  Words that Skep cannot parse are passed to docker as
    typed.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words, and pass them to docker if Skep cannot parse them."""
        ctx.meta[_WORDS] = tuple(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            to_docker(ctx)
            raise


_WORDS = "words as they were typed"


def to_docker(ctx: click.Context) -> None:
    """Run docker's command of the same name with the same words, without returning."""
    words: Sequence[str] = ctx.meta[_WORDS]
    host: Any = ctx.obj
    assert isinstance(host, HostOptions)
    passthrough.execute(host, (str(ctx.info_name),), words)

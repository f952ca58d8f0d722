"""What the commands that reach into a container have in common: finding the task, and docker for everything else.

``skep exec web ls`` means the service ``web``; where there is none, docker gets the command as it was typed, so that
containers of this node are reached as before.
"""

from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import click
import msgspec

from skep.api.raw import RawClient
from skep.cli import passthrough
from skep.cli.endpoint import HostOptions
from skep.errors import NotFound, Unavailable

T = TypeVar("T")


class Target(msgspec.Struct, frozen=True, rename="pascal"):
    """A running task, as a manager shows it."""

    task_id: str = msgspec.field(name="TaskID")
    node_id: str = msgspec.field(name="NodeID")
    name: str
    hostname: str = ""

    @property
    def path(self) -> str:
        """Where the API has it."""
        return f"/skep/tasks/{self.task_id}"

    @property
    def container(self) -> str:
        """Where the API has its container."""
        return f"{self.path}/container"


async def find_target(client: RawClient, word: str) -> Target:
    """The running task that ``SERVICE``, ``SERVICE.SLOT`` or ``TASK`` means.  Raises: NotFound, FailedPrecondition."""
    if not word or "/" in word:
        raise NotFound(f"no such service or task: {word} (skep service ls; skep service ps SERVICE)")
    return msgspec.convert(await client.get(f"/skep/tasks/{quote(word, safe='')}/target"), Target)


async def find_target_or_docker(client: RawClient, word: str) -> Target | None:
    """As ``find_target``; None: docker may have it."""
    return await or_docker(find_target(client, word))


async def or_docker(looking: Awaitable[T]) -> T | None:
    """What ``looking`` finds; None: docker may have it: there is no such object, or this node is no manager."""
    try:
        return await looking
    except NotFound:
        return None
    except Unavailable as error:
        if "not a swarm manager" in str(error):
            return None
        raise


class OrDocker(click.Command):
    """A command of docker's name.  What cannot be parsed as ours goes to docker, as it was typed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words; hand over to docker where they are not ours."""
        ctx.meta[_WORDS] = tuple(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            to_docker(ctx)
            raise


_WORDS = "words as they were typed"


def to_docker(ctx: click.Context) -> None:
    """Run docker's command of the same name with the same words; does not return."""
    words: Sequence[str] = ctx.meta[_WORDS]
    host: Any = ctx.obj
    assert isinstance(host, HostOptions)
    passthrough.execute(host, (str(ctx.info_name),), words)

"""Runs the requests of a command, and turns errors into one line and exit code 1."""

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import click

from skep.aio.groups import first_alone
from skep.cli.endpoint import HostOptions
from skep.errors import SkepError, reason_of
from skep.model.task_end import printable

T = TypeVar("T")

_RPC = re.compile(r"\brpc error: code = \w+ desc = ")
"""Prefix of SwarmKit's errors in Docker's API, which is not shown to people.  An error may quote another one."""
_NOT_FOUND = re.compile(r"(service|node|network|secret|config|volume|user) \S+ not found")
_NO_TARGET = re.compile(r"notification target \S+ not found")
_HANGS = re.compile(r"no response from \S+ within [0-9.]+ s")
"""A daemon that accepts connections and does not respond."""
_SILENT = re.compile(r"(unix|tcp|ssh)://\S+ does not answer(: .+)?")
_NO_LEADER = "The swarm does not have a leader. "
_NO_HOST = re.compile(r"unable to parse docker host `[^`]*`")


def run_requests(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` and return its result."""
    with errors_shown(), first_alone((SkepError, OSError)):
        return asyncio.run(work)


async def delete_each(host: HostOptions, path: str, names: Iterable[str]) -> None:
    """Delete the objects below ``path`` one after the other, and print each name.

    Raises: SkepError: some were not deleted.  The others are, as in docker's commands.
    """
    async with host.requests() as client:

        async def delete(name: str) -> None:
            await client.delete(f"{path}/{quote(name, safe='')}")
            click.echo(name)

        await do_each(names, delete)


async def do_each(names: Iterable[str], work: Callable[[str], Coroutine[Any, Any, None]]) -> None:
    """Run ``work`` for each name, one after the other, also if an earlier one fails.

    Raises: SkepError: the first error.  The further ones are shown before it.
    """
    errors: list[SkepError] = []
    for name in names:
        try:
            await work(name)
        except SkepError as error:
            errors.append(error)
    for further in errors[1:]:
        say(f"Error: {with_next_step(without_code(str(further)))}")
    if errors:
        raise errors[0]


def say(text: str) -> None:
    """Print a message on standard error, without control characters, as it may come from a node."""
    click.echo(printable(without_code(text)), err=True)


def without_code(text: str) -> str:
    """Return ``text`` without the codes of the errors in it."""
    return _RPC.sub("", text)


@contextmanager
def errors_shown() -> Iterator[None]:
    """End the command with the message of an expected error, without control characters, as it may come from a node."""
    try:
        yield
    except BrokenPipeError:
        raise  # The reader of the output, such as head, has ended. click then ends the command silently.
    except (SkepError, OSError) as error:
        text = with_next_step(without_code(_words_of(error)))
        raise click.ClickException("\n".join(map(printable, text.split("\n")))) from error


def _words_of(error: SkepError | OSError) -> str:
    """Return the text of an error.  The error of a file is its name and the reason, without a number."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {reason_of(error)}"
    return str(error)


def with_next_step(text: str) -> str:
    """Return an error of a node or of the connection with the next step that it does not name."""
    if found := _NOT_FOUND.fullmatch(text):
        return f"{text}. List {found[1]}s with skep {found[1]} ls."
    if _NO_TARGET.fullmatch(text):
        return f"{text}. List targets with skep notify ls."
    if text.startswith(_NO_LEADER):
        return f"{text} Run skep status to see which managers do not respond."
    if _HANGS.fullmatch(text):
        return f"{text}. Check the load and the log of that node, or choose another one with --host."
    if _SILENT.fullmatch(text):
        return f"{text}. Check that the node runs, or choose another one with --host."
    if _NO_HOST.fullmatch(text):
        return f"{text}. Use unix:///path, tcp://address:port or ssh://user@machine."
    return text

"""Running a command's requests: errors become one line and exit status 1."""

import asyncio
import re
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from skep.errors import SkepError
from skep.model.task_end import printable

T = TypeVar("T")

_RPC = re.compile(r"^rpc error: code = \w+ desc = ")
"""SwarmKit's words before an error's own, which Docker's API has and people need not read."""


def run_requests(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``."""
    with errors_shown():
        return asyncio.run(work)


def say(text: str) -> None:
    """What is not the result, on standard error.  It may be a node's: it is cleaned."""
    click.echo(printable(text), err=True)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Errors that a user can act on end the command with their message, which may be a node's: it is cleaned."""
    try:
        yield
    except BrokenPipeError:
        raise  # by what reads the output, such as head: click ends the command without a word
    except (SkepError, OSError) as error:
        text = _RPC.sub("", str(error))
        raise click.ClickException("\n".join(map(printable, text.split("\n")))) from error

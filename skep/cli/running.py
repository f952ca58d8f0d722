"""Running a command's requests: errors become one line and exit status 1."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from skep.errors import SkepError

T = TypeVar("T")


def run_requests(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``."""
    with errors_shown():
        return asyncio.run(work)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Errors that a user can act on end the command with their message."""
    try:
        yield
    except (SkepError, OSError) as error:
        raise click.ClickException(str(error)) from error

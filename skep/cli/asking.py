"""How commands ask a node: errors become one line and exit status 1."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from skep.errors import SkepError

T = TypeVar("T")


def answer_of(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives."""
    with errors_shown():
        return asyncio.run(work)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Errors that a user can act on end the command with their sentence."""
    try:
        yield
    except (SkepError, OSError) as error:
        raise click.ClickException(str(error)) from error

"""Refuses users' changes during a strict freeze."""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from aiohttp import web

from skep.api.access.identity import identity_of
from skep.manager.services.freezes import unless_frozen
from skep.model.permissions.access import OVERRIDE_HEADER, REVISION_HEADER
from skep.store.interface import Transaction

P = ParamSpec("P")
R = TypeVar("R")


def unfrozen(
    request: web.Request,
    operation: Callable[Concatenate[Transaction, P], R],
    *stacks: str,
    is_fenced: bool = False,
) -> Callable[Concatenate[Transaction, P], R]:
    """Return ``operation`` with a check that no strict freeze of the cluster or of one of ``stacks`` refuses it.

    A deploy that has begun may end, so only the record of its revision is checked.

    Args:
        is_fenced: Whether the operation checks that the deploy which the request names is in progress.
    """
    if is_fenced and request.headers.get(REVISION_HEADER):
        return operation
    return unless_frozen(
        operation,
        *stacks,
        is_override=request.headers.get(OVERRIDE_HEADER, "").lower() == "true",
        is_admin=identity_of(request).is_admin,
    )

"""Updates objects through the API, based on the version that was read."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from skep.api.client.requests import Requests
from skep.errors import OutOfSequence, SkepError

ATTEMPTS: Final = 10
"""Largest number of attempts to update an object that others update concurrently."""


async def update(
    client: Requests,
    kind: str,
    word: str,
    change: Callable[[Any], Any],
    *,
    timeout_s: float,
    query: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> bool:
    """Apply ``change`` to the object ``word``; read the object and try again if another update came first.

    Args:
        headers: headers of the update request.
        kind: the kind in the path: ``services``, ``nodes``, ``configs``.
        change: returns the new spec for an object in the API's form, or None if nothing changes.
        query: further parameters of the update, like ``rollback``.

    Returns:
        Whether the object was changed.

    Raises: errors of ``Client.get``; OutOfSequence: another update came first in every attempt.
    """
    for attempt in range(ATTEMPTS):
        found = await client.get(f"/{kind}/{word}", timeout_s=timeout_s)
        spec = change(found)
        if spec is None:
            return False
        version = str(found["Version"]["Index"])
        try:
            path, sent = f"/{kind}/{found['ID']}/update", {**(query or {}), "version": version}
            await client.request("POST", path, body=spec, query=sent, headers=headers, timeout_s=timeout_s)
            return True
        except SkepError as error:
            if not is_race(error) or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def is_race(error: SkepError) -> bool:
    """Return whether a change was refused because the object had changed since it was read."""
    return isinstance(error, OutOfSequence) or "update out of sequence" in str(error)

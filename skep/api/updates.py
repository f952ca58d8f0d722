"""Changing an object through the API at the version that was read, as every update has to."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from skep.api.requests import Requests
from skep.errors import OutOfSequence, SkepError

ATTEMPTS: Final = 10
"""To update an object that others update, too."""


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
    """Write ``change`` of the object ``word``; read and changed anew where others were faster.

    Args:
        headers: of the update.
        kind: as in the path: ``services``, ``nodes``, ``configs``.
        change: of the object, as the API has it, gives its new spec; None: there is nothing to change.
        query: further parameters of the update: ``rollback``.

    Returns:
        Whether it was changed.

    Raises: as ``Client.get``; OutOfSequence: others were faster every time.
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
    """Whether a change was refused because the object had changed since it was read."""
    return isinstance(error, OutOfSequence) or "update out of sequence" in str(error)

"""Requests of the playground to its nodes' Engine API."""

from skep.api.client.client import ApiClient
from skep.errors import FailedPrecondition, SkepError

_RESPONSE_TIMEOUT_S = 2.0
"""Time limit in seconds for one response of an engine that is starting."""


async def is_up(endpoint: str) -> bool:
    """Return whether the node at ``endpoint`` responds."""
    try:
        async with ApiClient.at(endpoint) as client:
            await client.get("/version", timeout_s=_RESPONSE_TIMEOUT_S)
    except SkepError:
        return False
    return True


async def load(endpoint: str, archive: bytes) -> None:
    """Load an image archive into the node.

    Raises: FailedPrecondition: it was refused, with the node's reason.  Other SkepErrors: the node does not respond.
    """
    headers = {"Content-Type": "application/x-tar"}
    async with (
        ApiClient.at(endpoint) as client,
        client.stream("/images/load", method="POST", body=archive, headers=headers) as response,
    ):
        # The status 200 is sent before the archive is read.  Errors follow as lines of the body.
        async for line in response.objects():
            if message := line.get("error"):
                raise FailedPrecondition(message)

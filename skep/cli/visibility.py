"""Texts for empty lists: a user of some stacks does not see the objects of others, so an empty list is no absence."""

from contextlib import suppress

from skep.api.client.requests import Requests
from skep.cli.endpoint import RESPONSE_TIMEOUT_S
from skep.errors import SkepError
from skep.model.permissions.access import are_of_stacks


async def sees_all_services(client: Requests) -> bool:
    """Return whether the user sees more than the services of some stacks.  Without an answer, True."""
    with suppress(SkepError):
        roles = (await client.get("/skep/access", timeout_s=RESPONSE_TIMEOUT_S))["Roles"]
        return not roles or not are_of_stacks(roles)
    return True


def none_visible(none: str) -> str:
    """Return the text of an empty list for a user of some stacks.  ``none``: such as "No services of your stacks"."""
    return f"{none}, and you do not see others. Run skep user whoami to see your roles."


async def empty_text(client: Requests, absent: str, none: str) -> str:
    """Return the text of an empty list: ``absent``, or ``none_visible(none)`` for a user of some stacks."""
    return absent if await sees_all_services(client) else none_visible(none)

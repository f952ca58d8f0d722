"""The claim of a running deploy on its stack, which lasts until a newer deploy replaces it.

The managers refuse requests of a deploy that was replaced (``manager/control/deploys.py``).
"""

from collections.abc import Mapping

from skep.api.client.requests import Requests
from skep.errors import FailedPrecondition, NotFound
from skep.model.options.labels import REPLACED, STACK_STATE
from skep.model.permissions.access import REVISION_HEADER
from skep.stack.cluster_state import RESPONSE_TIMEOUT_S, known_revisions
from skep.stack.project import Stack


class Replaced(FailedPrecondition):
    """A newer deploy of the stack with other content has replaced this deploy."""


class DeployClaim:
    """One deploy's claim on its stack, held by the revision that records the deploy."""

    def __init__(self, client: Requests, asked: Stack, id: str) -> None:
        """
        Args:
            asked: the desired stack of the deploy.
            id: id of the config that records the deploy.
        """
        self._client = client
        self._asked = asked
        self.id = id
        """Id of the adopted revision, or of the deploy's own."""
        self.state = ""
        """State of that revision when it was last read."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the requests that change services."""
        return {REVISION_HEADER: self.id}

    async def follow(self) -> bool:
        """Return whether a newer deploy of the same content has replaced this one, and adopt its revision.

        Raises: Replaced: a deploy with other content has replaced this one.
        """
        try:
            config = await self._client.get(f"/configs/{self.id}", timeout_s=RESPONSE_TIMEOUT_S)
            self.state = str((config["Spec"].get("Labels") or {}).get(STACK_STATE, ""))
        except NotFound:  # the revision was the oldest one and has been removed
            self.state = f"{REPLACED}?"
        if not self.state.startswith(REPLACED):
            return False
        revisions = await known_revisions(self._client, self._asked.name)
        newest = revisions[-1] if revisions else None
        if newest is None:
            raise Replaced(f"{self._asked.name} was removed meanwhile")
        if not newest.is_of(self._asked):
            raise Replaced(
                f"{self._asked.name} was changed meanwhile by another deploy (revision {newest.number}), which has "
                f"replaced this one. To compare them, run skep stack diff {self._asked.name}."
            )
        self.id = newest.id
        return True

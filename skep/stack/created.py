"""The objects that a deploy has created, which its undo may remove."""

import msgspec
from msgspec.structs import replace

from skep.model.service import Service
from skep.stack.claims import DeployClaim
from skep.stack.planning import PlannedChange


class CreatedObjects(msgspec.Struct):
    """The objects that a deploy has created so far.  An undo of the deploy removes only these."""

    began_ns: int = 0
    """Time at which the deploy began, in nanoseconds since 1970, or 0 if it does not matter (``unfinished_of``)."""
    services: list[Service] = []
    """Created services with their last written specs, which name networks instead of giving ids."""
    files: list[tuple[str, str, str]] = []
    """Kind, name and id of each created network, secret and config."""
    revision: str = ""
    """Id of the config that records the deploy."""
    claim: DeployClaim | None = None
    """The deploy's claim on the stack, or None without a revision."""
    known: frozenset[str] = frozenset()
    """Ids of the revisions that existed before the deploy."""
    inherited: tuple[str, ...] = ()
    """Ids of the revisions of unfinished deploys, which this deploy completes.  Their objects count as its own."""
    is_whole: bool = False
    """Whether unfinished deploys have created all services that the stack had before this deploy."""

    def note_updated(self, change: PlannedChange) -> None:
        """Note the new spec of a service that an unfinished deploy had created."""
        for at, one in enumerate(self.services):
            if one.id == change.id and change.spec is not None:
                self.services[at] = replace(one, spec=change.spec)

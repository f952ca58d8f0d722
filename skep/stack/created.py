"""The objects that a deploy has created, and the services that it has updated, for its undo."""

import msgspec
from msgspec.structs import replace

from skep.model.service import Service, ServiceSpec
from skep.stack.claims import DeployClaim
from skep.stack.planning import PlannedChange


class CreatedObjects(msgspec.Struct):
    """The objects that a deploy has created or updated so far.  An undo of the deploy removes only created ones."""

    began_ns: int = 0
    """Time at which the deploy began, in nanoseconds since 1970, or 0 if it does not matter (``unfinished_of``)."""
    services: list[Service] = []
    """Created services with their last written specs, which name networks instead of giving ids."""
    updated: dict[str, tuple[ServiceSpec, ServiceSpec]] = {}
    """Spec before the deploy and last written spec of each updated service, by name, also with names of networks."""
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
        """Note the specs of an updated service, which this or an unfinished deploy may have created."""
        if change.spec is None:
            return
        for at, one in enumerate(self.services):
            if one.id == change.id:
                self.services[at] = replace(one, spec=change.spec)
        before, _ = self.updated.get(change.name, (change.rolls_back_to, None))
        if before is not None:
            self.updated[change.name] = before, change.spec

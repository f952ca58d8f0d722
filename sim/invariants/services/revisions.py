"""Rule on the revisions of services: every spec that was in force is one, under a number that stays."""

from collections.abc import Iterable, Sequence

from sim.world.committed import Change
from skep.manager.services.spec_history import ServiceRevision, comparable, revisions
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import ServiceId
from skep.store.interface import Deleted, Updated, View

KEPT_MAX = 10
"""Number of revisions that the documents promise at most."""


class RevisionsAreKept:
    """A service has its last specs, at most ten.  The last but one is the spec that was in force before.

    The number of a former spec means this spec forever, and numbers increase.
    """

    def __init__(self) -> None:
        self._known: dict[ServiceId, dict[int, ServiceSpec]] = {}

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                # A user's request writes its author with the spec.  Autoscaling does not.
                case Updated(Service() as old, Service() as new) if old.spec != new.spec:
                    found = revisions(view, new)
                    yield from self._changed(new.id, found)
                    if old.author != new.author:
                        yield from _lost(old, new, found)
                case Deleted(Service() as service):
                    self._known.pop(service.id, None)

    def _changed(self, id: ServiceId, found: Sequence[ServiceRevision]) -> Iterable[str]:
        numbers = [one.number for one in found]
        if numbers != sorted(set(numbers)) or len(numbers) > KEPT_MAX:
            yield f"the revisions of {id} are {numbers}"
        known = self._known.setdefault(id, {})
        for one in found[:-1]:
            if known.setdefault(one.number, one.spec) != one.spec:
                yield f"revision {one.number} of {id} is another spec than before"


def _lost(old: Service, new: Service, found: Sequence[ServiceRevision]) -> Iterable[str]:
    """Yield that the former spec is missing, unless it is among ``found``."""
    if all(comparable(one.spec) != comparable(old.spec) for one in found):
        yield f"the former spec of {new.id} is not among its revisions {[one.number for one in found]}"

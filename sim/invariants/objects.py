"""Rules on objects: no used one is removed, none is written again and again, and at rest the live objects bound the
number of all others.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from sim.world.committed import Change
from skep.manager.verify.objects import leftovers, missing_files
from skep.model.container import SecretReference
from skep.model.secret import Secret
from skep.model.service import Service, TaskSpec
from skep.model.task import Task
from skep.store.interface import Deleted, Updated, View

WRITES_MAX = 150
"""Maximum writes of one object within a second.  A task takes ten steps in its whole life.  A volume with a single
writer takes eight for each task that its node rejects, and each of five nodes may reject three at once before the delay
between attempts grows.
"""


class FewWrites:
    """No object is written again and again, as by two rules that undo each other."""

    def __init__(self) -> None:
        self._second = 0
        self._writes: Counter[tuple[type, str]] = Counter()
        """Writes of each object in the present second."""

    def __call__(self, change: Change, _: View) -> Iterable[str]:
        if self._second != int(change.time_s):
            self._second = int(change.time_s)
            self._writes.clear()
        for event in change.events:
            if isinstance(event, Updated):
                key = type(event.new), str(getattr(event.new, "id", ""))
                self._writes[key] += 1
                if self._writes[key] == WRITES_MAX + 1:
                    yield f"{key[0].__name__} {key[1]} was written over {WRITES_MAX} times in a second"


def used_secrets_stay(change: Change, view: View) -> Iterable[str]:
    """Yield the removed secrets that a service uses, or the current run of a job, which keeps the spec of its start."""
    gone = {
        one.object.id for one in change.events if isinstance(one, Deleted) and isinstance(one.object, Secret)
    }
    for service in view.find(Service) if gone else ():
        for one in missing_files(service, view.find(Task, service_id=service.id), view):
            if gone.intersection(one.ids):
                yield one.text


def secrets_of(spec: TaskSpec) -> Sequence[SecretReference]:
    """Return the secrets that a task needs."""
    return spec.container_spec.secrets if spec.container_spec is not None else ()


def unbounded_objects(view: View) -> Iterable[str]:
    """Yield leftovers of a cluster at rest, in which services, slots and nodes limit the number of objects."""
    return (one.text for one in leftovers(view))

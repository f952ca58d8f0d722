"""Rules on objects: no used one is removed, and at rest the live objects bound the number of all others."""

from collections.abc import Iterable, Sequence

from sim.invariants.committed import Change
from skep.manager.verify.objects import leftovers, missing_files
from skep.model.container import SecretReference
from skep.model.secret import Secret
from skep.model.service import Service, TaskSpec
from skep.model.task import Task
from skep.store.interface import Deleted, View


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

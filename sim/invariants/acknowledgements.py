"""Acknowledged requests, and what later reads must show.

* An acknowledged write is committed when its acknowledgement arrives.  Only later requests undo it, or a rollback that
  the service's settings allow.
* A read that begins after the acknowledgement shows the write, on every manager.
* A refused request never takes effect.
* A request without a response may take effect completely or not at all, at any later time.
"""

from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from sim.world.committed import Change
from skep.manager.services.spec_history import comparable
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.labels import JOB_TTL, is_stopped
from skep.model.service import Service, ServiceSpec
from skep.model.staging.updates import stages_of
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import STACK_LABEL
from skep.store.interface import Created, Deleted, Updated, View

COMMANDED_STACK = "orders"
"""The stack that only stack commands change."""


def is_of_commands(service: Service) -> bool:
    """Return whether the service belongs to the stack that only ``StackCommands`` changes and judges."""
    return service.spec.labels.get(STACK_LABEL) == COMMANDED_STACK


class ServiceRecord(msgspec.Struct):
    """The requests for one service, and their responses."""

    id: ServiceId
    specs: list[ServiceSpec]
    """All specs that were requested."""
    acknowledged: int = 0
    """Latest acknowledged version, or 0 before the first."""
    is_refused: bool = False
    is_removal_asked: bool = False
    is_removed: bool = False
    """Whether its removal was acknowledged."""


class Acknowledgements:
    """The records of all services of one run; a rule on commits."""

    def __init__(self) -> None:
        self.services: dict[ServiceId, ServiceRecord] = {}

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Service() as service):
                    record = self.services.get(service.id)
                    if is_of_commands(service):
                        continue
                    if record is None or record.is_refused:
                        yield f"service {service.id} was created without a request, or its creation was refused"
                case Updated(Service() as old, Service() as new):
                    yield from self._changed(old, new)
                case Deleted(Service() as service):
                    record = self.services.get(service.id)
                    if record is not None and not record.is_removal_asked:
                        yield f"service {service.id} vanished"

    def requested(self, id: ServiceId, spec: ServiceSpec) -> ServiceRecord:
        """Record that this spec of a service is requested."""
        record = self.services.setdefault(id, ServiceRecord(id, []))
        record.specs.append(spec)
        if is_stopped(spec.labels):
            # A rollback after an update that starts the service writes it without the stop.
            record.specs.append(comparable(spec))
        return record

    def acknowledge(self, service: Service, view: View) -> Iterable[str]:
        """Record an acknowledgement that returned ``service``."""
        record = self.services[service.id]
        record.acknowledged = max(record.acknowledged, service.version.index)
        yield from self.broken(view, [(record, service.version.index)])
        stored = view.lookup(Service, service.id)
        if stored is not None and stored.version == service.version and stored.spec != service.spec:
            yield f"service {service.id} at {service.version.index} is not what was acknowledged"

    def refused(self, record: ServiceRecord, view: View) -> Iterable[str]:
        """Record that the creation of the service was refused."""
        record.is_refused = True
        if view.lookup(Service, record.id) is not None:
            yield f"service {record.id} exists, though its creation was refused"

    def refused_update(self, id: ServiceId, spec: ServiceSpec, view: View) -> Iterable[str]:
        """Record that an update to ``spec``, which no other request has, was refused."""
        self.services[id].specs.remove(spec)
        service = view.lookup(Service, id)
        if service is not None and spec in (service.spec, service.previous_spec):
            yield f"service {id} got a spec that was refused"

    def given(self) -> list[tuple[ServiceRecord, int]]:
        """Return the acknowledged versions that a read which begins now must show."""
        return [
            (record, record.acknowledged)
            for record in self.services.values()
            if record.acknowledged and not record.is_removal_asked
        ]

    def broken(self, view: View, given: Iterable[tuple[ServiceRecord, int]]) -> Iterable[str]:
        """Yield the versions of ``given`` that ``view`` does not show, unless a removal was requested meanwhile."""
        for record, version in given:
            service = view.lookup(Service, record.id)
            if record.is_removal_asked:
                continue
            if service is None or service.removed_at is not None:
                yield f"service {record.id}, acknowledged at {version}, is not there"
            elif service.version.index < version:
                yield f"service {record.id} is at {service.version.index}, {version} was acknowledged"

    def _changed(self, old: Service, new: Service) -> Iterable[str]:
        record = self.services.get(new.id)
        if record is None:
            return
        if new.removed_at is not None and JOB_TTL in new.spec.labels and new.job_status is not None:
            record.is_removal_asked = record.is_removed = True  # its own label requests the removal
        if (AUTOSCALE in new.spec.labels or stages_of(old.spec.labels)) and any(
            replace(one, mode=new.spec.mode) == new.spec for one in record.specs
        ):
            record.specs.append(new.spec)  # by autoscaling, or by a rollback that keeps the number of tasks
        if new.removed_at is not None and not record.is_removal_asked:
            yield f"service {new.id} was removed without a request"
        if new.removed_at is None and old.removed_at is not None:
            yield f"service {new.id} came back"
        if new.spec != old.spec and new.spec not in record.specs:
            yield f"service {new.id} got a spec that was not requested"
        if new.version.index < old.version.index:
            yield f"service {new.id} went back from {old.version.index} to {new.version.index}"

"""Acknowledged requests, and what reads must show from then on.

An acknowledged write is there when its acknowledgement arrives and never undone by anybody but users (and by a
rollback, which users asked for); a read begun after it shows it, whichever manager is asked; what was refused never
happens; of what had no answer, all or nothing may happen, at any later time.
"""

from collections.abc import Iterable

import msgspec

from sim.committed import Change
from skep.model.ids import ServiceId
from skep.model.service import Service, ServiceSpec
from skep.store.interface import Created, Deleted, Updated, View


class ServiceRecord(msgspec.Struct):
    """The requests about one service, and their responses."""

    id: ServiceId
    specs: list[ServiceSpec]
    """All that were ever asked for."""
    acknowledged: int = 0
    """The latest version that somebody was told; 0: none."""
    is_refused: bool = False
    is_removal_asked: bool = False
    is_removed: bool = False
    """Somebody was told that it is removed."""


class Acknowledgements:
    """All services of one run."""

    def __init__(self) -> None:
        self.services: dict[ServiceId, ServiceRecord] = {}

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Service() as service):
                    promise = self.services.get(service.id)
                    if promise is None or promise.is_refused:
                        yield f"service {service.id} was created, which nobody asked for or was refused"
                case Updated(Service() as old, Service() as new):
                    yield from self._changed(old, new)
                case Deleted(Service() as service):
                    promise = self.services.get(service.id)
                    if promise is not None and not promise.is_removal_asked:
                        yield f"service {service.id} vanished"

    def asked(self, id: ServiceId, spec: ServiceSpec) -> ServiceRecord:
        """Somebody asks for this spec of a service."""
        promise = self.services.setdefault(id, ServiceRecord(id, []))
        promise.specs.append(spec)
        return promise

    def told(self, service: Service, view: View) -> Iterable[str]:
        """Somebody was told that the service is as in ``service``."""
        promise = self.services[service.id]
        promise.acknowledged = max(promise.acknowledged, service.version.index)
        yield from self.broken(view, [(promise, service.version.index)])
        stored = view.lookup(Service, service.id)
        if stored is not None and stored.version == service.version and stored.spec != service.spec:
            yield f"service {service.id} at {service.version.index} is not what was acknowledged"

    def refused(self, promise: ServiceRecord, view: View) -> Iterable[str]:
        """Somebody was told that the service could not be created."""
        promise.is_refused = True
        if view.lookup(Service, promise.id) is not None:
            yield f"service {promise.id} exists, which was refused"

    def refused_update(self, id: ServiceId, spec: ServiceSpec, view: View) -> Iterable[str]:
        """Somebody was told that the service does not become ``spec``, which nobody else asked for."""
        self.services[id].specs.remove(spec)
        service = view.lookup(Service, id)
        if service is not None and spec in (service.spec, service.previous_spec):
            yield f"service {id} became what was refused"

    def given(self) -> list[tuple[ServiceRecord, int]]:
        """What a read that begins now must show."""
        return [
            (promise, promise.acknowledged)
            for promise in self.services.values()
            if promise.acknowledged and not promise.is_removal_asked
        ]

    def broken(self, view: View, given: Iterable[tuple[ServiceRecord, int]]) -> Iterable[str]:
        """What of ``given`` a view does not show; removals asked for meanwhile do not count."""
        for promise, version in given:
            service = view.lookup(Service, promise.id)
            if promise.is_removal_asked:
                continue
            if service is None or service.removed_at is not None:
                yield f"service {promise.id}, acknowledged at {version}, is not there"
            elif service.version.index < version:
                yield f"service {promise.id} is at {service.version.index}, {version} was acknowledged"

    def _changed(self, old: Service, new: Service) -> Iterable[str]:
        promise = self.services.get(new.id)
        if promise is None:
            return
        if new.removed_at is not None and not promise.is_removal_asked:
            yield f"service {new.id} was removed, which nobody asked for"
        if new.removed_at is None and old.removed_at is not None:
            yield f"service {new.id} came back"
        if new.spec != old.spec and new.spec not in promise.specs:
            yield f"service {new.id} got a spec that nobody asked for"
        if new.version.index < old.version.index:
            yield f"service {new.id} went back from {old.version.index} to {new.version.index}"

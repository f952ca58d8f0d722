"""Certificates and challenges that the nodes of the front door get with their assignments."""

from collections.abc import Iterator, Mapping

from skep.manager.acme.own_certificates import own_certificates
from skep.manager.acme.records import (
    NAMES_ID,
    challenges_in,
    names_in,
    readable_record,
    record_id,
    records_in,
)
from skep.model.assignment import SecretFile
from skep.model.door.payloads import DoorPayload, door_file
from skep.model.door.routes import has_routes, http_labels
from skep.model.service import Service
from skep.model.values.ids import SecretId
from skep.model.values.stacks import stack_of
from skep.store.interface import Created, Deleted, Event, Updated, View
from skep.store.kinds import Payload


class DoorFiles:
    """The present files, kept until something changes on which they depend.

    They may lag behind a view by the commits that have not been read yet.
    """

    def __init__(self) -> None:
        self._files: Mapping[SecretId, SecretFile] | None = None
        self._by_host: dict[str, SecretFile] = {}

    def reset(self) -> None:
        """Forget the files."""
        self._files = None

    def on_event(self, event: Event) -> bool:
        """Return whether the files may have changed.  They are then made from the next view."""
        match event:
            case Created(Payload(id=id)) | Updated(_, Payload(id=id)) | Deleted(Payload(id=id)):
                is_concerned = id == NAMES_ID or id.startswith((record_id(""), "secret/"))
            case Updated(Service() as old, Service() as new):
                is_concerned = _routes(old) != _routes(new)
            case Created(Service() as one) | Deleted(Service() as one):
                is_concerned = one.removed_at is None and has_routes(one.spec.labels)
            case _:
                is_concerned = False
        if is_concerned:
            self.reset()
        return is_concerned

    def present(self, view: View) -> Mapping[SecretId, SecretFile]:
        """Return the files by id.  A host keeps its file while the store cannot say which one it has."""
        if self._files is None:
            self._by_host = dict(_certificates(view, self._by_host))
            challenges = challenges_in(records_in(view))
            others = [door_file(DoorPayload(challenges=challenges))] if challenges else []
            self._files = {one.id: one for one in (*self._by_host.values(), *others)}
        return self._files


def _routes(service: Service) -> tuple[str, Mapping[str, str]]:
    """Return the labels of routes, and the stack, which may not choose the certificates of another stack's hosts."""
    labels = http_labels(service.spec.labels) if service.removed_at is None else {}
    return stack_of(service.spec.labels) if labels else "", labels


def _certificates(view: View, before: Mapping[str, SecretFile]) -> Iterator[tuple[str, SecretFile]]:
    """Yield a file for each host, so that a renewal sends only that one.  One of the authority serves as well."""
    own = own_certificates(view)
    names = {*names_in(view), *own}
    if view.unreadable(Service):
        names |= before.keys()  # such a service may have any of them
    for name in sorted(names):
        chosen, record = own.get(name), readable_record(view, name)
        is_known = record is not None and (chosen is None or not chosen.is_unreadable)
        if chosen is not None and chosen.pem:
            yield name, _file(name, chosen.pem, chosen.not_before_ns)
        elif name in before and not is_known:
            yield name, before[name]
        elif record is not None and record.pem:
            yield name, _file(name, record.pem, record.not_before_ns)
        elif name in before and name not in own and view.unreadable(Service):
            yield name, before[name]


def _file(name: str, pem: str, issued_ns: int) -> SecretFile:
    return door_file(DoorPayload(certificates={name: pem}, issued_ns=issued_ns))

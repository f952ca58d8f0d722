"""Certificates and challenges that the nodes of the front door get with their assignments."""

from collections.abc import Iterator, Mapping

from skep.manager.acme.own_certificates import own_certificates
from skep.manager.acme.records import NAMES_ID, certificates_in, challenges_in, record_id, records_in
from skep.model.assignment import SecretFile
from skep.model.door.payloads import DoorPayload, door_file
from skep.model.door.routes import http_labels
from skep.model.service import Service
from skep.model.values.ids import SecretId
from skep.store.interface import Created, Deleted, Event, Updated, View
from skep.store.kinds import Payload


class DoorFiles:
    """The present files, kept until something changes on which they depend.

    They may lag behind a view by the commits that have not been read yet.
    """

    def __init__(self) -> None:
        self._files: Mapping[SecretId, SecretFile] | None = None

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
                is_concerned = bool(_routes(one))
            case _:
                is_concerned = False
        if is_concerned:
            self.reset()
        return is_concerned

    def present(self, view: View) -> Mapping[SecretId, SecretFile]:
        """Return the files by id."""
        if self._files is None:
            self._files = {one.id: one for one in map(door_file, _payloads(view))}
        return self._files


def _routes(service: Service) -> Mapping[str, str]:
    return http_labels(service.spec.labels) if service.removed_at is None else {}


def _payloads(view: View) -> Iterator[DoorPayload]:
    """Yield a payload for each certificate, so that a renewal sends only that one, and one for all challenges."""
    records = records_in(view)
    own = own_certificates(view)
    for name, one in own.items():
        if one.pem:
            yield DoorPayload(certificates={name: one.pem}, issued_ns=one.not_before_ns)
    for name, pem in certificates_in(records).items():
        if name in own:
            continue
        yield DoorPayload(certificates={name: pem}, issued_ns=records[name].not_before_ns)
    if challenges := challenges_in(records):
        yield DoorPayload(challenges=challenges)

"""Certificates and challenges that the nodes of the front door get with their assignments."""

from collections.abc import Iterator, Mapping

from skep.manager.acme.records import NAMES_ID, certificates_in, challenges_in, record_id, records_in
from skep.model.assignment import SecretFile
from skep.model.door.payloads import DoorPayload, door_file
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
            case Created(Payload(id=id)) | Updated(_, Payload(id=id)) | Deleted(Payload(id=id)) if (
                id == NAMES_ID or id.startswith(record_id(""))
            ):
                self.reset()
                return True
            case _:
                return False

    def present(self, view: View) -> Mapping[SecretId, SecretFile]:
        """Return the files by id."""
        if self._files is None:
            self._files = {one.id: one for one in map(door_file, _payloads(view))}
        return self._files


def _payloads(view: View) -> Iterator[DoorPayload]:
    """Yield a payload for each certificate, so that a renewal sends only that one, and one for all challenges."""
    records = records_in(view)
    for name, pem in certificates_in(records).items():
        yield DoorPayload(certificates={name: pem}, issued_ns=records[name].not_before_ns)
    if challenges := challenges_in(records):
        yield DoorPayload(challenges=challenges)

"""Two versions side by side: a manager of a version to come writes a field more, which all others have to keep."""

from collections.abc import Callable, Iterable

import msgspec

from sim.committed import Change
from skep.model.ids import NodeId
from skep.store.etcd.cipher import Cipher
from skep.store.etcd.requests import etcd_key
from skep.store.interface import View

FIELD = "FromTomorrow"
_KEPT = f'"{FIELD}":'.encode()
_OBJECTS = etcd_key("o/")
_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def write_as_tomorrow(cipher: Cipher) -> None:
    """From now on every part of an object that is written with ``cipher`` has the field."""
    encrypt = cipher.encrypt

    def encrypt_with_field(name: bytes, value: bytes) -> bytes:
        if name.startswith(_OBJECTS) and value.startswith(b"{"):
            value = msgspec.json.encode({**_fields_of(value), FIELD: True})
        return encrypt(name, value)

    vars(cipher)["encrypt"] = encrypt_with_field


class UnknownFieldsAreKept:
    """What a newer version has written into a part of an object is there for as long as that part is."""

    def __init__(self, cannot_read: Callable[[NodeId], bool]) -> None:
        """``cannot_read``: whether a manager has values that it cannot read, which it overwrites as a whole."""
        self._cannot_read = cannot_read
        self._written: set[str] = set()

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for one in change.keys:
            if one.value is not None and _KEPT in one.value:
                self._written.add(one.key)
            elif one.key in self._written:
                self._written.discard(one.key)
                if one.value is not None and not self._cannot_read(change.origin):
                    yield f"{change.origin} lost what a newer version had written into {one.key}"

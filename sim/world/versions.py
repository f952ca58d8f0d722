"""Two versions side by side: a manager of a newer version writes an additional field, which the others must keep."""

from collections.abc import Callable, Iterable

import msgspec

from sim.world.committed import Change
from skep.model.values.ids import NodeId
from skep.store.etcd.encryption.cipher import Cipher
from skep.store.etcd.requests import etcd_key
from skep.store.interface import View

FIELD = "NewerVersion"
_KEPT = f'"{FIELD}":'.encode()
_OBJECTS = etcd_key("o/")
_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def write_newer_fields(cipher: Cipher) -> None:
    """Add the field to every part of an object that is written with ``cipher`` from now on."""
    encrypt = cipher.encrypt

    def encrypt_with_field(name: bytes, value: bytes) -> bytes:
        if name.startswith(_OBJECTS) and value.startswith(b"{"):
            value = msgspec.json.encode({**_fields_of(value), FIELD: True})
        return encrypt(name, value)

    vars(cipher)["encrypt"] = encrypt_with_field


class UnknownFieldsAreKept:
    """A field of a newer version stays in a part of an object until that part is deleted."""

    def __init__(self, cannot_read: Callable[[NodeId], bool]) -> None:
        """``cannot_read``: returns whether a manager has unreadable values, which it overwrites completely."""
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

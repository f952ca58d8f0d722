"""The JSON names of the model's Structs.

The model *is* the Engine API: Python names inside, Docker's spelling outside, one definition for the API,
the store and the tests.  Go's ``omitempty`` decides per field whether an empty value is written:

* an ordinary default is left out when the value equals it (``omitempty``), an empty list or map too;
* ``always(default)`` is written even when it is the default.
"""

from itertools import repeat
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform

import msgspec

T = TypeVar("T")

Uint64 = Annotated[int, msgspec.Meta(ge=0, extra={"go": "uint64"})]
Uint32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1, extra={"go": "uint32"})]
GoInt = Annotated[int, msgspec.Meta(extra={"go": "int"})]
Float32 = Annotated[float, msgspec.Meta(extra={"go": "float32"})]
Words = Annotated[tuple[str, ...], msgspec.Meta(extra={"go": "strslice.StrSlice"})]
"""A list of strings, for which clients may also write one string."""
FileMode = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1, extra={"go": "fs.FileMode"})]
"""Integers with a range.  ``go`` is the type's name in Go, for the error about a value outside the range (see
``api.formats.bodies``).
"""

_INITIALISMS = {
    word.lower(): word
    for word in (
        *("ID", "CA", "CAs", "TLS", "IP", "IPs", "IPAM", "DNS", "OS", "UID", "GID", "CPU", "CPUs"),
        *("PID", "TTY", "URL", "CSI", "API", "MAC", "IPv4", "IPv6", "SELinux", "VXLAN"),
    )
}


def go_name(name: str) -> str:
    """``nano_cpus`` -> ``NanoCPUs``: Docker's name of a field.

    Words that Go writes as initialisms keep that form; every other word is capitalized.
    """
    return "".join(_INITIALISMS.get(word, word.capitalize()) for word in name.split("_"))


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class _ApiMeta(msgspec.StructMeta):
    """Declares to type checkers that subclasses of ``ApiObject`` are frozen and keyword-only like it."""


class ApiObject(
    msgspec.Struct,
    metaclass=_ApiMeta,
    frozen=True,
    kw_only=True,
    gc=False,
    omit_defaults=True,
    forbid_unknown_fields=True,
    rename=go_name,
):
    """Base of every object of the Engine API: immutable, keyword-only, with Docker's names.

    Decoding rejects unknown fields at any depth, which costs nothing.  The store keeps such fields
    (``model.values.unknown``), other readers of data from another version ignore them
    (``model.values.unknown.leniently``), and the API strips them from request bodies before decoding.

    ``gc=False`` is safe because an immutable tree cannot hold a cycle; it halves the time to decode.
    """

    __go_name__: ClassVar[str | None] = None
    """Go's name of the type, if it is not the name of the class in package ``swarm``."""


def always(default: T) -> T:
    """A default that is always encoded (a Go field without ``omitempty``)."""
    # msgspec omits a value that equals a plain default, but never the value of a default factory. The factory is a C
    # function, because it runs for every object that is decoded without the field.
    return msgspec.field(default_factory=repeat(default).__next__)


def to_json(value: Any) -> bytes:
    """Encode ``value`` as Docker's JSON."""
    return msgspec.json.encode(value)

"""Encodes the parts of objects as JSON with Docker's field names, so that a store can be read with etcdctl.

Each part has its own Struct, which is built from fields of the kind.  A field that is missing in the data gets its
default, so data that was written before a field was added stays readable.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import attrgetter
from typing import Any, TypeAlias

import msgspec

from skep.model.values.unknown import NOTHING, Unknown, divided, joined
from skep.store.interface import KindSchema, Object
from skep.store.keys import HEAD
from skep.store.schema import head_fields

_SPEC_VERSION = "answers_version"
"""Field that says which version of the spec a status reports on (``AnswersVersion`` in the store)."""

_encode = msgspec.json.Encoder().encode


class PartCodec:
    """Encodes and decodes one part of the objects of a kind.  ``fields`` has their names."""

    def __init__(self, schema: KindSchema, part: str) -> None:
        self.part = part
        known = {field.name: field for field in msgspec.structs.fields(schema.type)}
        fields = schema.parts[part] if part else head_fields(schema)
        # Required fields come first, so that a part can be created with positional arguments, which is twice as fast as
        # with keywords.
        self.fields = tuple(sorted(fields, key=lambda name: not known[name].required))
        self.is_spec_status = part in schema.spec_statuses
        self._get = attrgetter(
            *self.fields
        )  # for a single field, this returns the value itself and not a tuple
        self._is_single = len(self.fields) == 1
        definition: list[Any] = [(name, known[name].type, _field_like(known[name])) for name in self.fields]
        if self.is_spec_status:
            definition.append((_SPEC_VERSION, int, msgspec.field(name="AnswersVersion", default=0)))
        self._struct = msgspec.defstruct(
            f"{schema.type.__name__}{part.capitalize() or 'Head'}",
            definition,
            frozen=True,
            gc=False,
            omit_defaults=True,
            forbid_unknown_fields=True,
        )
        self._decoder = msgspec.json.Decoder(self._struct)
        self._defaults = (
            None if part == HEAD else {name: getattr(self._struct(), name) for name in self.fields}
        )
        # A changed head always has a new version object (`LocalTransaction._stamped`), so comparing the version is
        # enough.
        self._is_versioned = part == HEAD and "version" in self.fields
        self._compared = attrgetter("version") if self._is_versioned else self._get
        self._last: tuple[bytes | None, Decoded] = (None, ({}, 0, NOTHING))
        """The last encoded value with its decoded form.  Many tasks get the same status at the same time, and then
        share one object.
        """
        self._last_encoded: tuple[Any, bytes] = (object(), b"")
        """The last encoded value of a single field."""
        self._default_values = tuple(self._defaults.values()) if self._defaults is not None else None

    def encode(self, object: Object) -> bytes | None:
        """Encode this part of ``object``.  Returns None if all fields have their defaults, so that no key is needed."""
        values = self._get(object)
        if self._is_single:
            return self._encoded_single(object, values)
        if values == self._default_values:
            return None
        if self.is_spec_status:
            values = (*values, _spec_version(object))
        return _encode(self._struct(*values))

    def _encoded_single(self, object: Object, value: Any) -> bytes | None:
        if value is self._last_encoded[0]:
            return self._last_encoded[1]
        if self._default_values == (value,):
            return None
        if self.is_spec_status:
            return _encode(self._struct(value, _spec_version(object)))
        encoded = _encode(self._struct(value))
        self._last_encoded = value, encoded
        return encoded

    def decode(self, data: bytes) -> "Decoded":
        """Decode a part.  Do not modify the result.  Raises msgspec.ValidationError."""
        known, decoded = self._last
        if data == known:
            return decoded
        extras = NOTHING
        try:
            part = self._decoder.decode(data)
        except msgspec.ValidationError:
            # The data has a field of a newer version, or is damaged.
            kept, extras = divided(data, self._struct)
            if extras is NOTHING:
                raise
            part = self._decoder.decode(kept)
        values = msgspec.structs.asdict(part)
        decoded = values, values.pop(_SPEC_VERSION, 0) if self.is_spec_status else 0, extras
        self._last = data, decoded
        return decoded

    def with_unknown(self, encoded: bytes | None, extras: Unknown) -> bytes:
        """Add fields that a newer version has written to the part that ``encode`` returned."""
        return joined(encoded, extras, self._struct) if extras is not NOTHING or encoded is None else encoded

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The values of the fields if the part does not exist.  Empty for the head, which always exists."""
        assert self._defaults is not None, "an object without a head does not exist"
        return self._defaults

    def is_same(self, one: Object, other: Object) -> bool:
        """Return whether two objects have the same values in this part."""
        first, second = self._compared(one), self._compared(other)
        return first is second or (not self._is_versioned and bool(first == second))


Decoded: TypeAlias = tuple[dict[str, Any], int, Unknown]
"""The fields of a part, the spec version that it reports on (0 for none), and its unknown fields."""


@cache
def head_decoder(kind: type[Object]) -> Callable[[bytes], tuple[Any, Unknown]]:
    """Return a function that decodes a head into an object whose other parts have their defaults, and into the unknown
    fields.

    The function raises msgspec.MsgspecError or UnicodeDecodeError.
    """
    decode = msgspec.json.Decoder(kind).decode

    def decoded(data: bytes) -> tuple[Any, Unknown]:
        try:
            return decode(data), NOTHING
        except msgspec.ValidationError:
            kept, extras = divided(data, kind)
            if extras is NOTHING:
                raise
            return decode(kept), extras

    return decoded


def values_of(fields: Iterable[str]) -> Callable[[Object], tuple[Any, ...]]:
    """Return a function that returns these fields of an object as a tuple.  Comparing tuples of identical values is
    fast.
    """
    fields = tuple(fields)
    if len(fields) > 1:
        return attrgetter(*fields)
    getters = tuple(map(attrgetter, fields))
    return lambda one: tuple(get(one) for get in getters)


def codecs_of(schema: KindSchema) -> Mapping[str, PartCodec]:
    """Return the codec of each part of a kind.  Cached, because creating structs and decoders takes milliseconds, and
    every load of the store needs them.
    """
    known = _codecs.get(schema.type)
    if known is None or known[0] is not schema:
        known = (schema, {part: PartCodec(schema, part) for part in (HEAD, *schema.parts)})
        _codecs[schema.type] = known
    return known[1]


_codecs: dict[type[Object], tuple[KindSchema, Mapping[str, PartCodec]]] = {}


def _field_like(known: msgspec.structs.FieldInfo) -> Any:
    """Return a field with the name and default of ``known``."""
    if known.default is not msgspec.NODEFAULT:
        return msgspec.field(name=known.encode_name, default=known.default)
    if known.default_factory is not msgspec.NODEFAULT and not known.default_factory():
        # Empty fields that responses always show are not stored, because they would be decoded for every object.
        return msgspec.field(name=known.encode_name, default=known.default_factory())
    if known.default_factory is not msgspec.NODEFAULT:
        return msgspec.field(name=known.encode_name, default_factory=known.default_factory)
    return msgspec.field(name=known.encode_name)


def _spec_version(object: Any) -> int:
    """Return the spec version that a status written with ``object`` reports on."""
    return object.spec_version.index if object.spec_version is not None else 0

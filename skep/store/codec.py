"""Parts of objects as bytes: JSON with Docker's field names, so that a store can be read with etcdctl.

Each part has a Struct of its own, made from the fields of the kind; missing fields take the kind's defaults, so
a field added later reads well from older data.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import attrgetter
from typing import Any, TypeAlias

import msgspec

from skep.model.unknown import NOTHING, Unknown, divided, joined
from skep.store.interface import KindSchema, Object
from skep.store.keys import HEAD
from skep.store.schema import head_fields

_ANSWERS = "answers_version"

_encode = msgspec.json.Encoder().encode


class PartCodec:
    """Takes one part out of objects of a kind, and reads it back.  ``fields``: what it consists of."""

    def __init__(self, schema: KindSchema, part: str) -> None:
        self.part = part
        known = {field.name: field for field in msgspec.structs.fields(schema.type)}
        fields = schema.parts[part] if part else head_fields(schema)
        # What has no default comes first, so that a part is made by position, which is twice as fast as by name.
        self.fields = tuple(sorted(fields, key=lambda name: not known[name].required))
        self.is_answer = part in schema.answers
        self._get = attrgetter(*self.fields)  # of a single field: the value itself
        self._is_single = len(self.fields) == 1
        definition: list[Any] = [(name, known[name].type, _field_like(known[name])) for name in self.fields]
        if self.is_answer:
            definition.append((_ANSWERS, int, msgspec.field(name="AnswersVersion", default=0)))
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
        # A head's version is made anew whenever the head changes (`LocalTransaction._stamped`), and tells by itself.
        self._is_versioned = part == HEAD and "version" in self.fields
        self._telling = attrgetter("version") if self._is_versioned else self._get
        self._last: tuple[bytes | None, Decoded] = (None, ({}, 0, NOTHING))
        """What was decoded last: many tasks get the same status in one moment, and share it then."""
        self._last_encoded: tuple[Any, bytes] = (object(), b"")
        """The same of what was encoded, of a single field."""
        self._default_values = tuple(self._defaults.values()) if self._defaults is not None else None

    def encode(self, object: Object) -> bytes | None:
        """This part of ``object``; None when it holds nothing but defaults, and so needs no key."""
        values = self._get(object)
        if self._is_single:
            return self._encoded_single(object, values)
        if values == self._default_values:
            return None
        if self.is_answer:
            values = (*values, _answered(object))
        return _encode(self._struct(*values))

    def _encoded_single(self, object: Object, value: Any) -> bytes | None:
        if value is self._last_encoded[0]:
            return self._last_encoded[1]
        if self._default_values == (value,):
            return None
        if self.is_answer:
            return _encode(self._struct(value, _answered(object)))
        encoded = _encode(self._struct(value))
        self._last_encoded = value, encoded
        return encoded

    def decode(self, data: bytes) -> "Decoded":
        """What a value of this part says, not to be changed.  Raises: msgspec.ValidationError."""
        known, decoded = self._last
        if data == known:
            return decoded
        extras = NOTHING
        try:
            part = self._decoder.decode(data)
        except msgspec.ValidationError:
            # A newer version has written a field more, or it is damaged.
            kept, extras = divided(data, self._struct)
            if extras is NOTHING:
                raise
            part = self._decoder.decode(kept)
        values = msgspec.structs.asdict(part)
        decoded = values, values.pop(_ANSWERS, 0) if self.is_answer else 0, extras
        self._last = data, decoded
        return decoded

    def with_unknown(self, encoded: bytes | None, extras: Unknown) -> bytes:
        """This part as ``encode`` gave it, with what a newer version has written there."""
        return joined(encoded, extras, self._struct) if extras is not NOTHING or encoded is None else encoded

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What the fields are while the part does not exist.  The head has none."""
        assert self._defaults is not None, "an object exists by its head"
        return self._defaults

    def is_same(self, one: Object, other: Object) -> bool:
        """Whether two objects agree in this part."""
        first, second = self._telling(one), self._telling(other)
        return first is second or (not self._is_versioned and bool(first == second))


Decoded: TypeAlias = tuple[dict[str, Any], int, Unknown]
"""The fields of a part, the spec version that it answers (0: none), and what of it this version does not know."""


@cache
def head_decoder(kind: type[Object]) -> Callable[[bytes], tuple[Any, Unknown]]:
    """Decodes heads of a kind, as objects whose other parts hold their defaults, and what of them is unknown.

    Raises, when called: msgspec.MsgspecError, UnicodeDecodeError.
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
    """Takes these fields out of an object.  Tuples of the same values compare without looking into them."""
    fields = tuple(fields)
    if len(fields) > 1:
        return attrgetter(*fields)
    getters = tuple(map(attrgetter, fields))
    return lambda one: tuple(get(one) for get in getters)


def codecs_of(schema: KindSchema) -> Mapping[str, PartCodec]:
    """The codec of each part of a kind.  Made once: structs and decoders take milliseconds, and every load of the
    store begins with an empty state."""
    known = _codecs.get(schema.type)
    if known is None or known[0] is not schema:
        known = (schema, {part: PartCodec(schema, part) for part in (HEAD, *schema.parts)})
        _codecs[schema.type] = known
    return known[1]


_codecs: dict[type[Object], tuple[KindSchema, Mapping[str, PartCodec]]] = {}


def _field_like(known: msgspec.structs.FieldInfo) -> Any:
    """A field with the name and default that ``known`` has."""
    if known.default is not msgspec.NODEFAULT:
        return msgspec.field(name=known.encode_name, default=known.default)
    if known.default_factory is not msgspec.NODEFAULT and not known.default_factory():
        # What answers always show, even empty, need not be written: it would be read again for every object.
        return msgspec.field(name=known.encode_name, default=known.default_factory())
    if known.default_factory is not msgspec.NODEFAULT:
        return msgspec.field(name=known.encode_name, default_factory=known.default_factory)
    return msgspec.field(name=known.encode_name)


def _answered(object: Any) -> int:
    """The spec version that an answer written with ``object`` is about."""
    return object.spec_version.index if object.spec_version is not None else 0

"""Preserve unknown fields, written by a newer version, at any depth of a JSON value.

They are separated when a value is decoded, and merged again when it is encoded.  Structs of the model reject unknown
fields at no cost, and only after such a rejection this module is used.

* Unknown fields of an object are kept as long as the object exists, even if all its known fields have their defaults.
* Unknown fields of a list's item are kept with the item whose known fields are equal, or else with the item of the same
  name (the first field of ``NAMES`` that it has).  Without such an item, they are dropped.
* Unknown fields of a mapping's value are kept with its key.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar

import msgspec
from msgspec import inspect

T = TypeVar("T")

NAMES = ("ID", "SecretID", "ConfigID", "NetworkID", "Network", "Target", "Name", "Subnet", "Serial", "URL")
"""Fields that identify items of lists, in the model's objects."""


class Unknown(msgspec.Struct, frozen=True):
    """The unknown fields of one object (or mapping)."""

    fields: Mapping[str, bytes] = {}
    inside: Mapping[str, "Unknown | UnknownOfItems"] = {}
    """Unknown fields of nested values, by field (or key)."""


class UnknownOfItems(msgspec.Struct, frozen=True):
    """The unknown fields of a list's items."""

    items: Sequence[tuple[bytes, bytes, Unknown]] = ()
    """Known fields, name (or empty) and unknown fields of each item with unknown fields."""


Extras: TypeAlias = Unknown | UnknownOfItems

_NULL = b"null"
_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items_of = msgspec.json.Decoder(list[msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def divided(data: bytes, type_: Any) -> tuple[bytes, Unknown]:
    """Separate an encoded object of ``type_`` from its unknown fields.  Raises: msgspec.DecodeError."""
    known, extras = _divided(data, _shape_of(type_))
    return known, extras if isinstance(extras, Unknown) else NOTHING


def joined(encoded: bytes | None, extras: Unknown, type_: Any) -> bytes:
    """Return an encoded object, or None if it has only defaults, with its unknown fields merged in."""
    return _joined(encoded or b"{}", extras, _shape_of(type_))


def leniently(data: bytes, type_: type[T]) -> T:
    """Decode a value, ignoring unknown fields.  Raises: msgspec.DecodeError."""
    try:
        return msgspec.json.decode(data, type=type_)
    except msgspec.ValidationError:
        known, extras = _divided(data, _shape_of(type_))  # type: ignore[arg-type]  # every class is hashable
        if extras is None:
            raise
        return msgspec.json.decode(known, type=type_)


NOTHING = Unknown()


def _divided(data: bytes, shape: inspect.Type) -> tuple[bytes, Extras | None]:
    match shape:
        case inspect.StructType() | inspect.DictType():
            return _divided_object(data, shape)
        case inspect.VarTupleType() | inspect.ListType():
            return _divided_items(data, _core(shape.item_type))
        case _:
            return data, None


def _divided_object(data: bytes, shape: inspect.StructType | inspect.DictType) -> tuple[bytes, Extras | None]:
    known: dict[str, msgspec.Raw] = {}
    unknown: dict[str, bytes] = {}
    inside: dict[str, Extras] = {}
    shapes = _shapes_of(shape)
    for name, value in _fields_of(data).items():
        if shapes is not None and name not in shapes:
            unknown[name] = bytes(value)
            continue
        core = shapes[name] if shapes is not None else _core(shape.value_type)  # type: ignore[union-attr]
        rest: Extras | None = None
        if _is_deep(core) and bytes(value) != _NULL:
            kept, rest = _divided(bytes(value), core)
        known[name] = msgspec.Raw(kept) if rest is not None else value
        if rest is not None:
            inside[name] = rest
    if not unknown and not inside:
        return data, None
    return _encode(known), Unknown(unknown, inside)


def _divided_items(data: bytes, shape: inspect.Type) -> tuple[bytes, Extras | None]:
    items: list[msgspec.Raw] = []
    found: list[tuple[bytes, bytes, Unknown]] = []
    for item in _items_of(data):
        known, rest = _divided(bytes(item), shape)
        items.append(msgspec.Raw(known))
        if isinstance(rest, Unknown) and isinstance(shape, inspect.StructType):
            same = _encode(msgspec.json.decode(known, type=shape.cls))  # re-encoded, for comparison
            found.append((same, _name_of(same), rest))
    return (_encode(items), UnknownOfItems(found)) if found else (data, None)


def _joined(encoded: bytes, extras: Extras, shape: inspect.Type) -> bytes:
    if isinstance(extras, UnknownOfItems):
        return _joined_items(encoded, extras, _core(shape.item_type))  # type: ignore[attr-defined]
    ours = _fields_of(encoded)
    fields = {name: msgspec.Raw(value) for name, value in extras.fields.items() if name not in ours} | ours
    shapes = _shapes_of(shape)
    for name, rest in extras.inside.items():
        core = shapes[name] if shapes is not None else _core(shape.value_type)  # type: ignore[attr-defined]
        if name in ours and bytes(ours[name]) != _NULL:
            fields[name] = msgspec.Raw(_joined(bytes(ours[name]), rest, core))
        elif isinstance(rest, Unknown) and name not in ours and _defaults_to_object(shape, name):
            fields[name] = msgspec.Raw(_joined(b"{}", rest, core))
    return _encode(fields)


def _joined_items(encoded: bytes, extras: UnknownOfItems, shape: inspect.Type) -> bytes:
    items = [bytes(item) for item in _items_of(encoded)]
    left = list(extras.items)
    extras_of: dict[int, Unknown] = {}
    for index, item in enumerate(items):
        for kept in left:
            if kept[0] == item:
                left.remove(kept)
                extras_of[index] = kept[2]
                break
    for index, item in enumerate(items):
        name = _name_of(item) if index not in extras_of and left else b""
        for kept in left:
            if name and kept[1] == name:
                left.remove(kept)
                extras_of[index] = kept[2]
                break
    return _encode(
        [
            msgspec.Raw(_joined(item, extras_of[index], shape) if index in extras_of else item)
            for index, item in enumerate(items)
        ]
    )


def _name_of(item: bytes) -> bytes:
    """Return the value of a list item's identifying field, or an empty text."""
    fields = _fields_of(item)
    for name in NAMES:
        value = bytes(fields.get(name, b""))
        if value.startswith(b"{"):
            value = _name_of(value)
        if value not in (b"", b'""', _NULL):
            return b"%b=%b" % (name.encode(), value)
    return b""


@cache
def _shape_of(type_: Any) -> inspect.Type:
    return _core(inspect.type_info(type_))


def _core(shape: inspect.Type) -> inspect.Type:
    """Return ``shape`` without metadata and without ``| None``."""
    while True:
        if isinstance(shape, inspect.Metadata):
            shape = shape.type
        elif isinstance(shape, inspect.UnionType):
            shape = next(part for part in shape.types if not isinstance(part, inspect.NoneType))
        else:
            return shape


def _shapes_of(shape: inspect.Type) -> Mapping[str, inspect.Type] | None:
    """Return the fields of a Struct by their JSON names, or None for a mapping."""
    return _shapes_by_class(shape.cls) if isinstance(shape, inspect.StructType) else None


@cache
def _shapes_by_class(cls: type) -> Mapping[str, inspect.Type]:
    shape = _shape_of(cls)
    assert isinstance(shape, inspect.StructType), "called for Structs only"
    return {field.encode_name: _core(field.type) for field in shape.fields}


def _defaults_to_object(shape: inspect.Type, name: str) -> bool:
    """Return whether an absent field means an object with defaults instead of None."""
    if not isinstance(shape, inspect.StructType):
        return False
    field = next(field for field in shape.fields if field.encode_name == name)
    return not any(isinstance(part, inspect.NoneType) for part in _parts(field.type))


def _parts(shape: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(shape, inspect.Metadata):
        yield from _parts(shape.type)
    elif isinstance(shape, inspect.UnionType):
        yield from shape.types
    else:
        yield shape


def _is_deep(shape: inspect.Type) -> bool:
    """Return whether a value of this shape may contain an object."""
    match shape:
        case inspect.StructType():
            return True
        case inspect.VarTupleType() | inspect.ListType():
            return _is_deep(_core(shape.item_type))
        case inspect.DictType():
            return _is_deep(_core(shape.value_type))
        case _:
            return False

"""Decoding of clients' JSON into Structs, with Go's rules and Go's error texts.

It differs from msgspec's own decoding in the points that clients rely on or can observe:

* ``null`` means *missing*, unknown fields are ignored, and field names match without regard to case;
* a list of words may be one string, where Go's type is ``strslice.StrSlice``;
* bytes after the first value of a body are ignored;
* errors read as Go's: ``json: cannot unmarshal string into Go struct field ServiceSpec.Name of type string``, and a
  syntax error anywhere takes precedence over a type error before it;
* values outside an enumeration are refused with the engine's error text for it (``Unrecognized``).

Source: Go 1.19, src/encoding/json/decode.go; moby 20.10, api/server/router/swarm/cluster_routes.go.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from skep.api.formats import gosyntax
from skep.errors import InvalidArgument, SkepError

T = TypeVar("T")

Unrecognized = Mapping[type[Enum], Callable[[str], SkepError | Enum]]
"""A function for each enumeration.  It takes a value that is not in the enumeration, and returns the error, or the
value that the engine uses instead.
"""

EMPTY_BODY = "got EOF while reading request body"

_INTEGER_BITS = {
    "int": 64,
    "int64": 64,
    "uint64": 64,
    "uint32": 32,
    "int32": 32,
    "time.Duration": 64,
    "fs.FileMode": 32,
}
_UNSIGNED = frozenset({"uint64", "uint32", "fs.FileMode"})


_ONE_OR_SEVERAL = "strslice.StrSlice"
"""Go type of a list that may also be one string (``model.values.encoding.Words``)."""


class _Fraction(str):
    """A number with a point or an exponent, as written in the body."""

    __slots__ = ()


_decoder = msgspec.json.Decoder(float_hook=_Fraction)


def decode_body(body: bytes, type_: type[T], *, unrecognized: Unrecognized | None = None) -> T:
    """Decode ``body`` into a value of ``type_``.

    Raises:
        InvalidArgument: with Go's or the engine's text; ``unrecognized`` may supply other classes.
    """
    return from_builtins(parse(body), type_, unrecognized=unrecognized)


def parse(body: bytes) -> Any:
    """Decode the first JSON value in ``body`` into dicts, lists and scalars.

    Raises:
        InvalidArgument: the body is empty or not JSON.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return _parse_leniently(body)


def _parse_leniently(body: bytes) -> Any:
    """Parse a body that Go accepts and msgspec does not: with trailing bytes, invalid UTF-8 or lone surrogates."""
    if not body.strip(b" \t\r\n"):
        raise InvalidArgument(EMPTY_BODY)
    problem = gosyntax.first_error(body)
    if problem is not None:
        raise InvalidArgument(problem)
    text = body[: gosyntax.end_of_first_value(body)].decode(errors="replace")
    try:
        return _without_surrogates(json.loads(text, parse_float=_Fraction, parse_int=_integer))
    except (ValueError, RecursionError):
        raise InvalidArgument("exceeded max depth") from None


def _integer(digits: str) -> int | _Fraction:
    return int(digits) if len(digits) <= 20 else _Fraction(digits)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _without_surrogates(value: Any) -> Any:
    match value:
        case _Fraction():
            return value
        case str():
            return _SURROGATE.sub("�", value)
        case list():
            return [_without_surrogates(item) for item in value]
        case dict():
            return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
        case _:
            return value


def from_builtins(value: Any, type_: type[T], *, unrecognized: Unrecognized | None = None) -> T:
    """Convert ``value`` (from ``parse``) into ``type_``.  Raises: InvalidArgument."""
    walk = _Walk(unrecognized or {})
    shape: inspect.Type = _shape_of(type_)  # type: ignore[arg-type]  # every class is hashable
    clean = walk.value(value, shape)
    if clean is _MISSING:
        clean = _zero(shape)
    if walk.problem is not None:
        raise walk.problem
    try:
        return msgspec.convert(clean, type_)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InvalidArgument(f"json: {error}") from error


@lru_cache(maxsize=256)
def _shape_of(type_: Any) -> inspect.Type:
    return inspect.type_info(type_)


_MISSING = object()


class _Walk:
    """One pass over a value.  It keeps the parts that fit the shape, and records the first part that does not fit."""

    def __init__(self, unrecognized: Unrecognized) -> None:
        self.problem: SkepError | None = None
        self._unrecognized = unrecognized
        self._struct: inspect.Type | None = None
        """Shape of the innermost object around the present value, or None outside objects."""
        self._path: list[str] = []

    def value(self, value: Any, shape: inspect.Type) -> Any:
        """Return the parts of ``value`` that fit ``shape``, or ``_MISSING`` without any."""
        if value is None:
            return _MISSING
        return self._fitting(value, shape, _core(shape))

    def _fitting(self, value: Any, shape: inspect.Type, core: inspect.Type) -> Any:
        match core:
            case inspect.StrType():  # the most frequent shapes come first
                if type(value) is str:
                    return value
            case inspect.StructType():
                if isinstance(value, dict):
                    return self._object(value, core.cls, shape)
            case inspect.DictType():
                if isinstance(value, dict):
                    return self._mapping(value, core)
            case inspect.VarTupleType() | inspect.ListType() | inspect.FrozenSetType():
                if isinstance(value, list):
                    return self._items(value, core.item_type)
                if type(value) is str and _go_type(shape) == _ONE_OR_SEVERAL:
                    return [value]
            case inspect.BytesType():
                if isinstance(value, str) and not isinstance(value, _Fraction):
                    return self._binary(value)
            case inspect.EnumType():
                if isinstance(value, str) and not isinstance(value, _Fraction):
                    return self._word(value, core.cls)
            case inspect.BoolType():
                if isinstance(value, bool):
                    return value
            case inspect.IntType():
                if isinstance(value, (int, _Fraction)) and not isinstance(value, bool):
                    return self._integer(value, shape)
            case inspect.FloatType():
                if isinstance(value, (int, _Fraction)) and not isinstance(value, bool):
                    return self._float(value)
            case inspect.AnyType():
                return value
            case _:
                if isinstance(value, str) and not isinstance(value, _Fraction):
                    return value
        return self._mismatch(_json_kind(value), shape)

    def _object(self, value: dict[str, Any], cls: type, shape: inspect.Type) -> dict[str, Any]:
        fields, folded = _fields_of(cls)
        clean: dict[str, Any] = {}
        outer, self._struct = self._struct, shape
        for key, item in value.items():
            field = fields.get(key) or folded.get(key.casefold())
            if field is None or item is None:
                continue
            self._path.append(field.name)
            kept = self._fitting(item, field.shape, field.core)
            self._path.pop()
            if kept is not _MISSING:
                clean[field.name] = kept
        self._struct = outer
        return clean

    def _mapping(self, value: dict[str, Any], shape: inspect.DictType) -> dict[str, Any]:
        clean = {}
        for key, item in value.items():
            kept = self.value(item, shape.value_type)
            clean[key] = _zero(shape.value_type) if kept is _MISSING else kept
        return clean

    def _items(self, value: list[Any], shape: inspect.Type) -> list[Any]:
        clean = []
        for item in value:
            kept = self.value(item, shape)
            clean.append(_zero(shape) if kept is _MISSING else kept)
        return clean

    def _binary(self, value: str) -> str | object:
        text = value.replace("\r", "").replace("\n", "")
        try:
            return base64.b64encode(base64.b64decode(text, validate=True)).decode()
        except (binascii.Error, ValueError):
            return self._refuse(
                InvalidArgument(f"illegal base64 data at input byte {_first_bad_base64(value)}")
            )

    def _word(self, value: str, cls: type[Enum]) -> str | object:
        if not value:
            return _MISSING
        if value in cls._value2member_map_:
            return value
        meaning = self._unrecognized.get(cls)
        if meaning is None:
            return self._refuse(InvalidArgument(f"invalid {cls.__name__}: {value!r}"))
        outcome = meaning(value)
        return outcome.value if isinstance(outcome, Enum) else self._refuse(outcome)

    def _integer(self, value: int | _Fraction, shape: inspect.Type) -> int | object:
        name = _go_type(shape)
        bits = _INTEGER_BITS.get(name, 64)
        low, high = (0, 2**bits - 1) if name in _UNSIGNED else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if isinstance(value, int) and low <= value <= high:
            return min(value, 2**63 - 1)  # msgspec has no larger bounds, and no field accepts larger numbers
        return self._mismatch(f"number {value}", shape)

    def _float(self, value: int | _Fraction) -> float | object:
        number = float(value) if isinstance(value, _Fraction) or abs(value) < 2**1023 else float("inf")
        if abs(number) == float("inf"):
            return self._refuse(
                InvalidArgument(f"json: cannot unmarshal number {value} into Go value of type float64")
            )
        return number

    def _mismatch(self, found: str, shape: inspect.Type) -> object:
        where = "Go value"
        if self._path:
            struct = _go_type(self._struct).rpartition(".")[2] if self._struct is not None else ""
            where = f"Go struct field {struct}.{'.'.join(self._path)}"
        return self._refuse(
            InvalidArgument(f"json: cannot unmarshal {found} into {where} of type {_go_type(shape)}")
        )

    def _refuse(self, error: SkepError) -> object:
        if self.problem is None:
            self.problem = error
        return _MISSING


class _Field(msgspec.Struct, frozen=True):
    """A field of a Struct.  ``name``: its JSON name.  ``core``: its shape without metadata and ``| None``."""

    name: str
    shape: inspect.Type
    core: inspect.Type


@lru_cache(maxsize=256)
def _fields_of(cls: type) -> tuple[Mapping[str, _Field], Mapping[str, _Field]]:
    """Return the fields of a Struct by their JSON names, and by these names without regard to case."""
    shape = _core(_shape_of(cls))
    assert isinstance(shape, inspect.StructType)
    by_name = {
        field.encode_name: _Field(field.encode_name, field.type, _core(field.type)) for field in shape.fields
    }
    folded: dict[str, _Field] = {}
    for name, field in by_name.items():
        folded.setdefault(name.casefold(), field)
    return by_name, folded


def _core(shape: inspect.Type) -> inspect.Type:
    """Return ``shape`` without metadata and without ``| None``."""
    while True:
        if isinstance(shape, inspect.Metadata):
            shape = shape.type
        elif isinstance(shape, inspect.UnionType):
            shape = next(part for part in shape.types if not isinstance(_bare(part), inspect.NoneType))
        else:
            return shape


def _bare(shape: inspect.Type) -> inspect.Type:
    return shape.type if isinstance(shape, inspect.Metadata) else shape


def _zero(shape: inspect.Type) -> Any:
    """Return Go's zero value, which replaces null inside a list or map."""
    match _core(shape):
        case inspect.StructType() | inspect.DictType():
            return {}
        case inspect.VarTupleType() | inspect.ListType():
            return []
        case inspect.BoolType():
            return False
        case inspect.IntType() | inspect.FloatType():
            return 0
        case inspect.AnyType():
            return None
        case _:
            return ""


def _json_kind(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int() | _Fraction():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _go_name(cls: type) -> str:
    """Return the Go type that ``cls`` models: ``__go_name__`` if set, else the class name in package ``swarm``."""
    return getattr(cls, "__go_name__", None) or f"swarm.{cls.__name__}"


def _go_type(shape: inspect.Type) -> str:
    """Return the type that ``shape`` models, as Go prints it."""
    while True:
        if isinstance(shape, inspect.Metadata):
            if shape.extra and "go" in shape.extra:
                return str(shape.extra["go"])
            shape = shape.type
        elif isinstance(shape, inspect.UnionType):
            shape = next(part for part in shape.types if not isinstance(_bare(part), inspect.NoneType))
        else:
            break
    match shape:
        case inspect.StructType() | inspect.EnumType():
            return _go_name(shape.cls)
        case inspect.DictType():
            return f"map[{_go_type(shape.key_type)}]{_go_type(shape.value_type)}"
        case inspect.VarTupleType() | inspect.ListType():
            return f"[]{_go_type(shape.item_type)}"
        case inspect.BytesType():
            return "[]uint8"
        case inspect.BoolType():
            return "bool"
        case inspect.IntType():
            return "int64"
        case inspect.FloatType():
            return "float64"
        case _:
            return "string"


_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]*")


def _first_bad_base64(text: str) -> int:
    """Return the position at which Go's decoder stops: the first invalid character."""
    match = _BASE64.match(text)
    assert match is not None
    return match.end()

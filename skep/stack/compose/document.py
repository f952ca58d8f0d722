"""YAML documents as trees of nodes with their positions in the files.

The dialect is Compose's: YAML 1.2 with octal numbers that begin with 0, merge keys (``<<``), and the tags
``!reset`` and ``!override``.  A repeated key is an error, as is an anchor that contains itself.

Source: compose-spec, spec.md; go.yaml.in/yaml v3, resolve.go (what a plain scalar is).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgspec
import yaml

from skep.errors import InvalidArgument

FILE_BYTES_MAX: Final = 8 << 20
"""Largest size of a file in bytes, because it is parsed in memory."""
_NODES_MAX: Final = 500_000
"""Largest number of nodes of a document with all aliases expanded.  Without it, a small file could expand to
billions.
"""
_DEPTH_MAX: Final = 100
"""Deepest nesting of values.  Python's own stack ends at a thousand calls."""

Scalar: TypeAlias = str | int | float | bool | None
TAGS: Final = ("!reset", "!override")

SCALAR_TAG: Final = "tag:skep,scalar"
"""Tag that makes the serializer write a scalar without quotes, because it is not a text."""
_TEXT_TAG: Final = "tag:yaml.org,2002:str"
_BOOLEANS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_DECIMAL: Final = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_OCTAL: Final = re.compile(r"([-+]?)0o?([0-7_]+)")
_HEXADECIMAL: Final = re.compile(r"([-+]?)0x([0-9a-fA-F_]+)")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class FilePosition(msgspec.Struct, frozen=True, gc=False):
    """A position in a file.  ``line`` and ``column`` begin at 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class FileProblem(msgspec.Struct, frozen=True):
    """An error or warning at a place in a file.

    ``path``: the keys down to it, as ``services.web.image``, or empty for the whole file.
    """

    place: FilePosition
    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.path}: {self.text}" if self.path else f"{self.place}: {self.text}"


class FileProblems(InvalidArgument):
    """All errors in the files of a stack, in the order of the files."""

    def __init__(self, problems: Sequence[FileProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class YamlNode(msgspec.Struct, frozen=True):
    """A value in a document.

    ``value``: a scalar, a mapping of names to nodes, or a sequence of nodes.  ``text``: the scalar as written in the
    file, so that ``1.10`` stays ``1.10`` if it is used as a text.  ``tag``: an item of ``TAGS``, or empty.
    """

    value: "Scalar | Mapping[str, YamlNode] | tuple[YamlNode, ...]"
    place: FilePosition
    text: str = ""
    is_plain: bool = False
    """Whether a scalar is written without quotes.  After interpolation, it is then parsed again as a number or
    boolean.
    """
    tag: str = ""
    keys: Mapping[str, FilePosition] = {}
    """Positions of a mapping's keys."""

    @property
    def entries(self) -> "Mapping[str, YamlNode] | None":
        """Return the entries of a mapping, or None for other nodes."""
        return self.value if isinstance(self.value, dict) else None

    @property
    def items(self) -> "tuple[YamlNode, ...] | None":
        """Return the items of a sequence, or None for other nodes."""
        return self.value if isinstance(self.value, tuple) else None

    @property
    def kind(self) -> str:
        """Return a description of the value for error texts."""
        match self.value:
            case None:
                return "nothing"
            case bool():
                return f"the boolean {self.text}"
            case int() | float():
                return f"the number {self.text}"
            case str():
                return f"the text {self.text!r}"
            case tuple():
                return "a list"
            case _:
                return "a mapping"

    def plain(self) -> Any:
        """Return the tree without positions, as a JSON decoder would return it."""
        if (entries := self.entries) is not None:
            return {key: node.plain() for key, node in entries.items()}
        if (items := self.items) is not None:
            return [node.plain() for node in items]
        return self.value

    def as_yaml(self) -> yaml.Node:
        """Return the tree for a YAML serializer.  Scalars keep their text, with ``$$`` for each dollar sign."""
        if (entries := self.entries) is not None:
            pairs = [(_yaml_scalar(key), node.as_yaml()) for key, node in entries.items()]
            return yaml.MappingNode("tag:yaml.org,2002:map", pairs)
        if (items := self.items) is not None:
            return yaml.SequenceNode("tag:yaml.org,2002:seq", [node.as_yaml() for node in items])
        if isinstance(self.value, str):
            return _yaml_scalar(self.value.replace("$", "$$"))
        return yaml.ScalarNode(SCALAR_TAG, self.text if self.text not in _NULLS else "null")


def _yaml_scalar(text: str) -> yaml.Node:
    return yaml.ScalarNode(_TEXT_TAG, text, style="|" if "\n" in text else None)


def scalar(text: str, place: FilePosition, *, is_plain: bool = False) -> YamlNode:
    """Return a scalar node.  A plain text may be a number, a boolean or null."""
    return YamlNode(resolved(text) if is_plain else text, place, text=text, is_plain=is_plain)


def mapping(
    entries: Mapping[str, YamlNode], place: FilePosition, keys: Mapping[str, FilePosition] | None = None
) -> YamlNode:
    """Return a mapping node.  ``keys``: positions of the keys.  A key without one gets the position of its value."""
    return YamlNode(
        entries, place, keys={name: node.place for name, node in entries.items()} | dict(keys or {})
    )


def resolved(text: str) -> Scalar:
    """Return the value of a scalar without quotes."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text[0] not in "-+.0123456789" or len(text) > 40:
        # More digits stay text, because the conversion takes quadratic time.
        return text
    if _DECIMAL.fullmatch(text):
        return int(text.replace("_", ""))
    for pattern, base in ((_OCTAL, 8), (_HEXADECIMAL, 16)):
        if (match := pattern.fullmatch(text)) and match[2].replace("_", ""):
            return int(match[1] + match[2].replace("_", ""), base)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def parse(content: bytes | str, file: str) -> YamlNode:
    """Parse a document and return the mapping at its top.  Raises: FileProblems."""
    start = FilePosition(file, 1, 1)
    if len(content) > FILE_BYTES_MAX:
        raise FileProblems(
            [
                FileProblem(
                    start,
                    "",
                    f"the file is larger than {FILE_BYTES_MAX >> 20} MiB: split it, and use include",
                )
            ]
        )
    try:
        text = content.decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        line = bytes(content[: error.start]).count(b"\n") + 1  # type: ignore[arg-type]
        raise FileProblems(
            [FileProblem(FilePosition(file, line, 1), "", "the file is not UTF-8 text")]
        ) from None
    try:
        top = _Builder(file).build(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = FilePosition(file, mark.line + 1, mark.column + 1) if mark is not None else start
        raise FileProblems(
            [FileProblem(place, "", f"this is not YAML: {_syntax_error(error, text, place)}")]
        ) from None
    except yaml.YAMLError as error:  # errors about disallowed characters have no position
        raise FileProblems(
            [FileProblem(start, "", f"this is not YAML: {' '.join(str(error).split())}")]
        ) from None
    if top is None or top.value is None:
        raise FileProblems([FileProblem(start, "", "the file is empty: it has no services")])
    if top.entries is None:
        raise FileProblems(
            [FileProblem(top.place, "", f"the top of the file is {top.kind}, not a mapping with services")]
        )
    return top


def _syntax_error(error: yaml.MarkedYAMLError, text: str, place: FilePosition) -> str:
    problem = error.problem or "it cannot be read"
    lines = text.splitlines()
    line = lines[place.line - 1] if place.line <= len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return f"{problem}; the line is indented by a tab: use spaces"
    return problem


class _Open(msgspec.Struct):
    """A mapping or sequence under construction.  ``key`` and ``key_place``: the key that the next value belongs to."""

    is_mapping: bool
    place: FilePosition
    tag: str
    anchor: str | None
    entries: dict[str, YamlNode]
    keys: dict[str, FilePosition]
    items: list[YamlNode]
    merged: list[YamlNode]
    key: str | None = None
    key_place: FilePosition | None = None
    size: int = 1


class _Builder:
    """Builds nodes from events without recursion, so that a deep file cannot exhaust the interpreter's stack."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[YamlNode, int]] = {}
        """Anchored nodes by name, each with the number of nodes that it contains."""
        self._top: YamlNode | None = None
        self._count = 0

    def build(self, events: Iterator[Any]) -> YamlNode | None:
        """Return the top node.  Raises: FileProblems; yaml.YAMLError: the text is not YAML."""
        for event in events:
            self._handle(event)
        return self._top

    def _handle(self, event: Any) -> None:
        place = FilePosition(self._file, event.start_mark.line + 1, event.start_mark.column + 1)
        match event:
            case yaml.DocumentStartEvent() if self._top is not None:
                self._refuse(place, "a second document begins here: a stack is one document")
            case yaml.ScalarEvent():
                self._scalar(event, place)
            case yaml.AliasEvent():
                self._alias(event, place)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._begin(event, place)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._end()

    def _refuse(self, place: FilePosition, text: str) -> None:
        path = ".".join(one.key for one in self._open if one.key is not None)
        raise FileProblems([FileProblem(place, path, text)])

    def _grow(self, count: int, place: FilePosition) -> None:
        self._count += count
        if self._count > _NODES_MAX:
            self._refuse(place, f"the document has more than {_NODES_MAX} values, its aliases unfolded")

    def _scalar(self, event: Any, place: FilePosition) -> None:
        self._grow(1, place)
        owner = self._open[-1] if self._open else None
        if owner is not None and owner.is_mapping and owner.key is None:
            self._begin_entry(owner, event.value, place, is_plain=event.implicit[0])
            return
        tag = self._tag(event.tag, place)
        is_plain = bool(tag) or (event.implicit[0] and not event.style)
        node = scalar(event.value, place, is_plain=is_plain and event.tag != "tag:yaml.org,2002:str")
        self._add(msgspec.structs.replace(node, tag=tag) if tag else node, 1, event.anchor)

    def _begin_entry(self, owner: _Open, key: str, place: FilePosition, *, is_plain: bool) -> None:
        if key in owner.entries and not (key == "<<" and is_plain):
            before = owner.keys[key]
            self._refuse(place, f"duplicate key {key!r}: line {before.line} has it already")
        owner.key, owner.key_place = key, place

    def _tag(self, tag: str | None, place: FilePosition) -> str:
        if tag is None or tag.startswith("tag:yaml.org,2002:") or tag == "!":
            return ""
        if tag not in TAGS:
            self._refuse(place, f"unknown tag {tag}: stack files support {' and '.join(TAGS)}")
        return tag

    def _alias(self, event: Any, place: FilePosition) -> None:
        if any(one.anchor == event.anchor for one in self._open):
            self._refuse(
                place, f"*{event.anchor} is inside &{event.anchor}, so the value would contain itself"
            )
        found = self._anchors.get(event.anchor)
        if found is None:
            self._refuse(place, f"undefined alias *{event.anchor}: define &{event.anchor} before it")
        assert found is not None
        node, size = found
        self._grow(size, place)
        owner = self._open[-1] if self._open else None
        if owner is not None and owner.is_mapping and owner.key is None:
            if isinstance(node.value, dict | tuple):
                self._refuse(place, "a key cannot be a list or a mapping")
            self._begin_entry(owner, node.text, place, is_plain=node.is_plain)
            return
        self._add(node, size, None)

    def _begin(self, event: Any, place: FilePosition) -> None:
        self._grow(1, place)
        if len(self._open) >= _DEPTH_MAX:
            self._refuse(place, f"values are nested more than {_DEPTH_MAX} levels deep")
        owner = self._open[-1] if self._open else None
        if owner is not None and owner.is_mapping and owner.key is None:
            self._refuse(place, "a key cannot be a list or a mapping: quote a value that begins with { or [")
        tag, is_mapping = self._tag(event.tag, place), isinstance(event, yaml.MappingStartEvent)
        self._open.append(_Open(is_mapping, place, tag, event.anchor, {}, {}, [], []))

    def _end(self) -> None:
        one = self._open.pop()
        if not one.is_mapping:
            self._add(YamlNode(tuple(one.items), one.place, tag=one.tag), one.size, one.anchor)
            return
        for merged in one.merged:  # explicit entries win over merged ones, and earlier merges over later ones
            entries = merged.entries
            assert entries is not None
            for key, node in entries.items():
                if key not in one.entries:
                    one.entries[key], one.keys[key] = node, merged.keys[key]
        self._add(YamlNode(one.entries, one.place, tag=one.tag, keys=one.keys), one.size, one.anchor)

    def _add(self, node: YamlNode, size: int, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = node, size
        if not self._open:
            self._top = node
            return
        owner = self._open[-1]
        owner.size += size
        if not owner.is_mapping:
            owner.items.append(node)
            return
        key, place = owner.key, owner.key_place
        assert key is not None
        assert place is not None
        if key == "<<":
            self._merge(owner, node, place)
        else:
            owner.entries[key], owner.keys[key] = node, place
        owner.key = owner.key_place = None

    def _merge(self, owner: _Open, node: YamlNode, place: FilePosition) -> None:
        for one in node.items if node.items is not None else (node,):
            if one.entries is None:
                self._refuse(place, f"<< merges mappings, and this is {one.kind}")
            owner.merged.append(one)

"""Reads the values of mappings by type, collects all problems, and never ignores a key silently.

The caller reads every supported key of a mapping.  ``close`` then reports the remaining keys, each with the most
similar supported key.
"""

import difflib
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec

from skep.model.values.times import duration_ns
from skep.stack.compose.document import FilePosition, FileProblem, FileProblems, YamlNode

T = TypeVar("T")

_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([kmgt]?)i?b?", re.IGNORECASE)
_FACTORS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class ProblemReport:
    """Collected errors and warnings about a stack's files."""

    def __init__(self) -> None:
        self.problems: list[FileProblem] = []
        self.warnings: list[FileProblem] = []

    def raise_problems(self) -> None:
        """Raise all collected errors, in the order of the files.  Raises: FileProblems."""
        if self.problems:
            raise FileProblems(sorted(set(self.problems), key=lambda one: msgspec.structs.astuple(one.place)))


class MappingReader:
    """Reads the keys of one mapping.  For a missing or invalid key, methods return None or an empty value."""

    def __init__(self, node: YamlNode, path: str, report: ProblemReport) -> None:
        self.place = node.place
        self.path = path
        self.report = report
        self._node = node
        self._read: dict[str, None] = {}
        entries = node.entries
        if entries is None and node.value is not None:
            self._problem(node.place, path, f"expected a mapping, not {node.kind}")
        self._entries = entries or {}

    def __contains__(self, key: str) -> bool:
        self._read[key] = None
        return key in self._entries

    def node(self, key: str) -> YamlNode | None:
        """Return the node of ``key``, or None if the key is missing or its value is null."""
        self._read[key] = None
        found = self._entries.get(key)
        return None if found is None or found.value is None else found

    def at(self, key: str) -> str:
        """Return the path of ``key``."""
        return f"{self.path}.{key}" if self.path else key

    def problem_at(self, node: YamlNode, path: str, text: str) -> None:
        """Report an error in a value below this mapping."""
        self._problem(node.place, path, text)

    def problem(self, key: str, text: str) -> None:
        """Report an error in ``key``."""
        found = self._entries.get(key)
        self._problem(found.place if found is not None else self.place, self.at(key), text)

    def warn(self, key: str, text: str) -> None:
        """Warn that ``key`` has no effect, or an unexpected effect."""
        found = self._entries.get(key)
        self.report.warnings.append(
            FileProblem(found.place if found is not None else self.place, self.at(key), text)
        )

    def refuse(self, key: str, why: str) -> None:
        """Report an error if the file has ``key``, which Skep does not support."""
        if self.node(key) is not None:
            self.problem(key, why)

    def ignore(self, key: str, why: str) -> None:
        """Warn if the file has ``key``, which has no effect on a cluster."""
        if self.node(key) is not None:
            self.warn(key, why)

    def skip(self, *keys: str) -> None:
        """Mark keys as read, because they are read elsewhere."""
        self._read.update(dict.fromkeys(keys))

    def text(self, key: str) -> str:
        """Return a text.  Numbers and booleans are returned as written in the file."""
        found = self.node(key)
        return self._text(found, self.at(key)) if found is not None else ""

    def integer(self, key: str, least: int = 0, most: int = 2**63 - 1) -> int | None:
        """Return a whole number."""
        found = self.node(key)
        if found is None:
            return None
        value: object = found.value
        if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]{1,19}", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(key, f"expected a whole number, not {found.kind}")
            return None
        if not least <= value <= most:
            self.problem(key, f"{value} is out of range: expected {least} to {most}")
            return None
        return value

    def mode(self, key: str) -> int | None:
        """Return file permissions.  The file has a number in any form of YAML, or a text of octal digits."""
        found = self.node(key)
        if (
            found is not None
            and isinstance(found.value, str)
            and re.fullmatch(r"0?o?[0-7]{1,5}", found.value)
        ):
            return int(found.value.replace("o", ""), 8)
        return self.integer(key, 0, 0o7777)

    def number(self, key: str) -> float | None:
        """Return a number that is not negative."""
        found = self.node(key)
        if found is None:
            return None
        value: object = found.value
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,15}(\.[0-9]{0,15})?|\.[0-9]{1,15}", value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
            self.problem(key, f"expected a number, not {found.kind}")
            return None
        return float(value)

    def boolean(self, key: str) -> bool | None:
        """Return a boolean.  A quoted ``true`` or ``false`` counts as well, because the value of a variable is a
        text.
        """
        found = self.node(key)
        if found is None:
            return None
        if isinstance(found.value, bool):
            return found.value
        known = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if isinstance(found.value, str) and found.value.lower() in known:
            return known[found.value.lower()]
        self.problem(key, f"expected true or false, not {found.kind}")
        return None

    def duration(self, key: str) -> int | None:
        """Return a duration such as ``1m30s`` in nanoseconds.  A number without a unit is in seconds."""
        found = self.node(key)
        if found is None:
            return None
        text = f"{found.text}s" if isinstance(found.value, int | float) and found.text != "0" else found.text
        value = _duration(text) if isinstance(found.value, str | int | float) else None
        if value is None or not 0 <= value < 2**63:
            self.problem(key, f"expected a duration like 10s or 1m30s, not {found.kind}")
            return None
        return value

    def size(self, key: str) -> int | None:
        """Return the bytes of a size such as ``64m``, ``1.5gb`` or ``4096``, or -1 for ``-1``."""
        found = self.node(key)
        return self.size_of(found, self.at(key)) if found is not None else None

    def size_of(self, node: YamlNode, path: str) -> int | None:
        """Return the bytes of the size in ``node``, as ``size`` does."""
        if node.text == "-1":
            return -1
        match = _SIZE.fullmatch(node.text) if isinstance(node.value, str | int | float) else None
        if match is None:
            self._problem(node.place, path, f"expected a size like 64m or 1g, not {node.kind}")
            return None
        whole = (
            round(float(match[1]) * _FACTORS[match[2].lower()])
            if "." in match[1]
            else int(match[1]) * _FACTORS[match[2].lower()]
        )
        if whole >= 2**63:
            self._problem(node.place, path, f"{node.text} is too large")
            return None
        return whole

    def choice(self, key: str, *known: str) -> str:
        """Return one of the ``known`` words, or an empty text without the key."""
        text = self.text(key)
        if text and text not in known:
            self.problem(key, f"{text!r} is unknown: expected {_either(known)}{meant_by(text, known)}")
            return ""
        return text

    def words(self, key: str) -> tuple[str, ...] | None:
        """Return arguments from a list, or from a text, which is split by a shell's rules without running a shell."""
        found = self.node(key)
        if found is None:
            return None
        if found.items is not None:
            return self.texts(key)
        try:
            return tuple(shlex.split(self._text(found, self.at(key))))
        except ValueError as error:
            self.problem(key, f"it cannot be split into arguments: {str(error).lower()}")
            return None

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts.  A single text becomes a list with one item."""
        found = self.node(key)
        if found is None:
            return ()
        if found.items is None:
            return (self._text(found, self.at(key)),)
        return tuple(self._text(one, f"{self.at(key)}[{at}]") for at, one in enumerate(found.items))

    def pairs(self, key: str, separators: str = "=") -> dict[str, str | None]:
        """Return a mapping or a list of ``NAME=VALUE`` as a dict, with None for names without a value."""
        found = self.node(key)
        if found is None:
            return {}
        if (entries := found.entries) is not None:
            return {
                name: None if one.value is None else self._text(one, f"{self.at(key)}.{name}")
                for name, one in entries.items()
            }
        made: dict[str, str | None] = {}
        for text in self.texts(key):
            cut = min((at for at in map(text.find, separators) if at > 0), default=-1)
            made[text if cut < 0 else text[:cut]] = None if cut < 0 else text[cut + 1 :]
        return made

    def labels(self, key: str) -> dict[str, str]:
        """Return ``pairs`` with an empty text for names without a value."""
        return {name: value or "" for name, value in self.pairs(key).items()}

    def reader(self, key: str) -> "MappingReader | None":
        """Return a reader of the mapping below ``key``."""
        found = self.node(key)
        return MappingReader(found, self.at(key), self.report) if found is not None else None

    def each(self, key: str) -> "list[tuple[YamlNode, str]]":
        """Return the items of the list below ``key``, with their paths."""
        found = self.node(key)
        if found is None:
            return []
        if found.items is None:
            self.problem(key, f"expected a list, not {found.kind}")
            return []
        return [(one, f"{self.at(key)}[{at}]") for at, one in enumerate(found.items)]

    def named(self, key: str) -> "dict[str, YamlNode]":
        """Return the entries of the mapping below ``key``.  A list of names becomes entries with null values."""
        found = self.node(key)
        if found is None:
            return {}
        if found.entries is not None:
            return dict(found.entries)
        if found.items is None:
            self.problem(key, f"expected a mapping or a list of names, not {found.kind}")
            return {}
        return {
            self._text(one, f"{self.at(key)}[{at}]"): YamlNode(None, one.place)
            for at, one in enumerate(found.items)
        }

    def names(self) -> dict[str, YamlNode]:
        """Return all entries except extensions (``x-``), and mark them as read."""
        self._read.update(dict.fromkeys(self._entries))
        return {name: one for name, one in self._entries.items() if not name.startswith("x-")}

    def checked(self, key: str, make: Callable[[], T]) -> T | None:
        """Return the result of ``make``, or report its ValueError as an error in ``key`` and return None."""
        try:
            return make()
        except ValueError as error:
            self.problem(key, str(error))
            return None

    def close(self, *, hint_of: Callable[[str], str | None] | None = None) -> None:
        """Report the keys that were not read.  ``hint_of``: hints for some keys, in place of the most similar key."""
        for name in self._entries:
            if name in self._read or name.startswith("x-"):
                continue
            place = self._node.keys.get(name, self.place)
            hint = (hint_of(name) if hint_of else None) or meant_by(name, tuple(self._read))
            self._problem(place, self.at(name), f"unknown key{hint}")

    def _text(self, node: YamlNode, path: str) -> str:
        if isinstance(node.value, str):
            return node.value
        if node.value is None or node.entries is not None or node.items is not None:
            self._problem(node.place, path, f"expected a text, not {node.kind}")
            return ""
        return node.text

    def _problem(self, place: FilePosition, path: str, text: str) -> None:
        self.report.problems.append(FileProblem(place, path, text))


def _duration(text: str) -> int | None:
    """Parse Go's durations, and Compose's days and weeks, into nanoseconds."""
    match = re.fullmatch(r"(?:([0-9]{1,6})w)?(?:([0-9]{1,6})d)?(.*)", text)
    assert match is not None
    days = int(match[1] or 0) * 7 + int(match[2] or 0)
    rest = duration_ns(match[3]) if match[3] else (0 if days else None)
    return None if rest is None else rest + days * 24 * 3600 * 10**9


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def meant_by(text: str, known: Iterable[str]) -> str:
    """Return a hint with the most similar known word, or an empty text without one."""
    close = difflib.get_close_matches(text, tuple(known), n=1, cutoff=0.7)
    return f": did you mean {close[0]}?" if close else ""

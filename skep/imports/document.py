"""The result of an import: a Compose document, and notes on settings that it cannot express."""

import json
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import yaml

from skep.model.task_end import printable
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import FileProblem, parse
from skep.stack.compose.interpolation import interpolated
from skep.stack.compose.merging import canonical
from skep.stack.compose.reading import ProblemReport
from skep.stack.project import Stack

FILE: Final = "imported"
_ROUNDS_MAX: Final = 50
"""Maximum number of conversion rounds.  Each round but the last removes at least one key that cannot be converted."""


class Note(msgspec.Struct, frozen=True, order=True):
    """A setting that the document lacks or expresses differently.  ``path`` is like ``services.web.mac_address``."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else self.text


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """A Compose document: a stack's name, its sections in order, and notes on them."""

    document: dict[str, Any]
    notes: tuple[Note, ...] = ()

    @property
    def text(self) -> str:
        """Return the file, with the notes as a comment above it."""
        head = "".join(f"# {line}\n" for line in _wrapped(self.notes))
        return head + rendered(self.document)


def rendered(document: dict[str, Any]) -> str:
    """Return the document as YAML, in its order and without anchors."""
    copied = json.loads(json.dumps(document))  # PyYAML writes an object that occurs twice as an anchor
    return yaml.dump(copied, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def escaped(text: str) -> str:
    """Escape ``text`` for a Compose file, where a dollar begins a variable."""
    return text.replace("$", "$$")


def read_back(document: dict[str, Any]) -> tuple[Stack, ProblemReport]:
    """Return the stack that ``skep stack`` makes of the document, without the contents of files."""
    report = ProblemReport()
    node = canonical(interpolated(parse(rendered(document), FILE), {}, lambda text: None))
    return stack_of(node, str(document.get("name", "")), {}, report), report


def accepted(document: dict[str, Any]) -> Imported:
    """Return the document without the keys that a cluster refuses.

    Notes name the removed keys, and the keys without effect.
    """
    notes: dict[Note, None] = {}
    for _ in range(_ROUNDS_MAX):
        _, report = read_back(document)
        removed = [one for one in report.problems if _remove(document, one)]
        notes |= {Note(one.path, f"dropped: {one.text}"): None for one in removed}
        if not removed:
            break
    remaining = (Note(one.path, f"fix by hand: {one.text}") for one in report.problems)
    warnings = (Note(one.path, one.text) for one in report.warnings)
    return Imported(document=document, notes=(*notes, *remaining, *warnings))


def _remove(document: dict[str, Any], problem: FileProblem) -> bool:
    """Remove the key that a problem names, if a service can do without it."""
    keys = problem.path.split(".")
    if len(keys) < 3 or keys[2] in ("image", "build", "depends_on", "networks"):
        return False
    parent: Any = document
    for key in keys[:-1]:
        parent = parent.get(key) if isinstance(parent, dict) else None
    last = keys[-1]
    if not isinstance(parent, dict) or last not in parent:
        return False
    del parent[last]
    return True


def _wrapped(notes: tuple[Note, ...]) -> Iterator[str]:
    if notes:
        yield "Settings of the source that this file lacks or expresses differently:"
    for note in notes:
        yield printable(f"  {' '.join(str(note).split())}")  # YAML has no other characters in comments


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that indents lists below their keys, as people write them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

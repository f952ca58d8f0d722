"""Text produced by templates, which counts against their budget while it is written.

Users write templates, and the process that expands them is shared. A template of a few kilobytes may name the
same large label thousands of times, so text is counted before it is kept, not when a function returns.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

_CHUNK = 4_096
"""Number of characters escaped at a time.  An escape may turn one character into twelve, and creates an object for
each.
"""


class TooMuchText(Exception):
    """The text exceeds the budget."""


@dataclass
class TemplateBudget:
    """Resources that templates may still use."""

    tokens: int = 50_000
    """Tokens in the texts."""
    steps: int = 100_000
    """Executed statements and commands."""
    produced: int = 8 << 20
    """Characters passed to and produced by functions, and printed."""
    output: int = 1 << 20
    """Bytes written."""

    def produce(self, characters: int) -> None:
        """Count text that is passed to a function, or about to be kept.  Raises: TooMuchText."""
        self.produced -= characters
        if self.produced < 0:
            raise TooMuchText


class BoundedText:
    """A text under construction.  Each piece is counted before it is kept."""

    def __init__(self, budget: TemplateBudget) -> None:
        self.budget = budget
        self._buffer = io.StringIO()

    def write(self, piece: str) -> None:
        """Append ``piece``.  Raises: TooMuchText."""
        self.budget.produce(len(piece))
        self._buffer.write(piece)

    def write_escaped(self, text: str, escape: Callable[[str], str]) -> None:
        """Append ``text`` escaped by ``escape``, which treats each character separately.  Raises: TooMuchText."""
        for start in range(0, len(text), _CHUNK):
            self.write(escape(text[start : start + _CHUNK]))

    def __str__(self) -> str:
        return self._buffer.getvalue()

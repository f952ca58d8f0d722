"""Variables in a Dockerfile: ``$name``, ``${name}``, ``${name:-word}`` and similar, with quotes and escapes.

The size of values is bounded.  Otherwise ``ENV A=$A$A`` in fifty lines would fill the memory.

Source: buildkit, frontend/dockerfile/shell/lex.go.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from skep.errors import InvalidArgument

VALUE_BYTES_MAX = 1 << 20
"""Each use of a variable may repeat its value, so that values could double with every line."""
BUDGET = 64_000_000
"""Characters that all substitutions of a Dockerfile may produce together."""
_PATTERN_STEPS_MAX = 4_000_000
"""Maximum number of comparisons for one pattern.  For a value of 1,000 characters, a pattern may have four
characters.
"""
_SPECIAL = frozenset("@*#?-$!0")
_DEPTH_MAX = 32
"""Levels of nested ``${a:-${b}}``.  Each level is a level of recursion here."""
_STAR: Final = "*"
_ANY: Final = "?"


class Budget:
    """Cost limit for all substitutions of one build: characters written, and comparisons of patterns.

    A limit for each value would not be enough, because one line can have ten thousand variables.
    """

    def __init__(self, steps: int = BUDGET) -> None:
        self._total = self._left = steps

    def spend(self, steps: int) -> None:
        """Take ``steps`` from the budget.  Raises: InvalidArgument: less is left."""
        self._left -= steps
        if self._left < 0:
            raise InvalidArgument(f"substitutions take more than {self._total} steps")


def substituted(
    word: str, variables: Mapping[str, str], escape: str = "\\", budget: Budget | None = None
) -> str:
    """Return ``word`` with its variables replaced and its quotes removed.

    ``budget``: None for a budget of this call.  Raises: InvalidArgument, in BuildKit's words.
    """
    return _Reader(word, variables, escape, budget=budget).run()[0]


def split(
    word: str, variables: Mapping[str, str], escape: str = "\\", budget: Budget | None = None
) -> list[str]:
    """Return the words that ``word`` consists of after substitution.  Raises: InvalidArgument."""
    return _Reader(word, variables, escape, budget=budget).run()[1]


def substituted_document(text: str, variables: Mapping[str, str], budget: Budget | None = None) -> str:
    """Replace the variables of a here-document.  Quotes stay, and a backslash protects the next character.

    The Dockerfile's escape character has no meaning in it.  Raises: InvalidArgument, in BuildKit's words.
    """
    if "$" not in text and "\\" not in text:
        return text
    return _Reader(text, variables, "\\", keeps_quotes=True, budget=budget).run()[0]


def raw_words(line: str) -> list[str]:
    """Return the words of a line with quotes and escapes, without substitution.  Empty if it cannot be read."""
    reader = _Reader(line, None, "\\", raw_quotes=True, raw_escapes=True)
    try:
        return reader.run()[1]
    except InvalidArgument:
        return []


def unquoted_word(text: str) -> tuple[str, bool] | None:
    """Return the single word in ``text``, and whether part of it is quoted.  None if it is not one word."""
    words = _Reader(text, None, "\\").run()[1]
    if len(words) != 1:
        return None
    raw = _Reader(text, None, "\\", raw_quotes=True).run()[1]
    quotes = sum(words[0].count(one) for one in "'\"")
    return words[0], quotes != sum(raw[0].count(one) for one in "'\"")


class _Words:
    """Words of a text that is split at spaces outside quotes."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._pending: list[str] = []
        self._in_word = False

    def add(self, text: str) -> None:
        for character in text:
            if not character.isspace():
                self.add_raw(character)
            elif self._in_word and any(self._pending):
                self.words.append("".join(self._pending))
                self._pending, self._in_word = [], False

    def add_raw(self, text: str) -> None:
        self._pending.append(text)
        self._in_word = True

    def all(self) -> list[str]:
        if any(self._pending):
            self.words.append("".join(self._pending))
            self._pending = []
        return self.words


class _Reader:
    """Reads one word from start to end.  ``variables``: None to leave variables as they are."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str] | None,
        escape: str,
        *,
        raw_quotes: bool = False,
        raw_escapes: bool = False,
        keeps_quotes: bool = False,
        budget: Budget | None = None,
    ) -> None:
        """``keeps_quotes``: Whether quotes are ordinary characters."""
        self._budget = budget or Budget()
        self._keeps_quotes = keeps_quotes
        self._source = source
        self._variables = variables
        self._escape = escape
        self._raw_quotes = raw_quotes
        self._raw_escapes = raw_escapes
        self._at = 0
        self._depth = 0

    def run(self) -> tuple[str, list[str]]:
        try:
            return self._until("")
        except InvalidArgument as error:
            raise InvalidArgument(f'failed to process "{self._source[:200]}": {error}') from error

    def _peek(self) -> str:
        return self._source[self._at] if self._at < len(self._source) else ""

    def _next(self) -> str:
        character = self._peek()
        self._at += 1
        return character

    def _until(self, stop: str, *, raw_escapes: bool | None = None) -> tuple[str, list[str]]:
        """Read up to the character ``stop``, and consume it.  An empty ``stop`` reads to the end."""
        raw_escapes = self._raw_escapes if raw_escapes is None else raw_escapes
        self._depth += 1
        if self._depth > _DEPTH_MAX:
            raise InvalidArgument("substitutions are nested too deeply")
        special: dict[str, Callable[[], str]] = {"$": self._dollar, "<": self._less_than}
        if not self._keeps_quotes:
            special["'"] = self._single_quoted
            special['"'] = lambda: self._double_quoted(raw_escapes)
        result: list[str] = []
        words = _Words()
        length = 0
        while character := self._peek():
            if stop and character == stop:
                self._next()
                break
            if character in special:
                text = special[character]()
                words.add(text) if character == "$" else words.add_raw(text)
            else:
                text = self._next()
                if text == self._escape:
                    escaped = self._next()
                    text = (text if raw_escapes else "") + escaped
                    words.add_raw(text)
                else:
                    words.add(text)
            result.append(text)
            length += len(text)
            _check_size(length)
            self._budget.spend(len(text))
        else:
            if stop:
                raise InvalidArgument(f"unexpected end of statement while looking for matching {stop}")
        self._depth -= 1
        return "".join(result), words.all()

    def _less_than(self) -> str:
        """Read ``<<`` and the spaces after it.  They do not end the word: ``<< EOF`` also starts a here-document."""
        start = self._at
        self._next()
        if self._peek() == "<":
            self._next()
            while self._peek() and self._peek() in "\t\r ":
                self._next()
        return self._source[start : self._at]

    def _single_quoted(self) -> str:
        self._next()
        end = self._source.find("'", self._at)
        if end < 0:
            raise InvalidArgument("unexpected end of statement while looking for matching single-quote")
        text, self._at = self._source[self._at : end], end + 1
        return f"'{text}'" if self._raw_quotes else text

    def _double_quoted(self, raw_escapes: bool) -> str:
        quote = self._next()
        result = [quote] if self._raw_quotes else []
        length = 0
        while True:
            match character := self._peek():
                case "":
                    raise InvalidArgument(
                        "unexpected end of statement while looking for matching double-quote"
                    )
                case '"':
                    self._next()
                    if self._raw_quotes:
                        result.append(character)
                    return "".join(result)
                case "$":
                    result.append(self._dollar())
                    length += len(result[-1])
                    _check_size(length)
                    self._budget.spend(len(result[-1]))
                case _:
                    self._next()
                    if character == self._escape:
                        if raw_escapes:
                            result.append(character)
                        following = self._peek()
                        if not following:
                            continue
                        if following in ('"', "$", self._escape):
                            character = self._next()
                    result.append(character)

    def _dollar(self) -> str:
        self._next()
        if self._peek() != "{":
            name = self._name()
            if not name:
                return "$"
            return f"${name}" if self._variables is None else self._variables.get(name, "")
        self._next()
        if not self._peek():
            raise InvalidArgument("syntax error: missing '}'")
        if self._peek() in "{}:":
            raise InvalidArgument("syntax error: bad substitution")
        name = self._name()
        modifier = self._next()
        if modifier == "}":
            return f"${{{name}}}" if self._variables is None else self._variables.get(name, "")
        if modifier == "/":
            return self._replacement(name)
        if modifier == ":":
            modifier += self._next()
        if modifier.removeprefix(":") not in ("+", "-", "?", "#", "%") or modifier in (":#", ":%"):
            raise InvalidArgument(f"unsupported modifier ({modifier}) in substitution")
        word = self._word("}", raw_escapes=modifier in ("#", "%"))
        if self._variables is None:
            return f"${{{name}{modifier}{word}}}"
        value = self._variables.get(name)
        if modifier in ("#", "%"):
            self._compare(len(value or "") * len(word))
        return _modified(name, value, modifier, word)

    def _compare(self, steps: int) -> None:
        """Take ``steps`` comparisons of a pattern from the budget.  Raises: InvalidArgument: they are too many."""
        if steps > _PATTERN_STEPS_MAX:
            raise InvalidArgument("the value is too long for a pattern")
        self._budget.spend(steps)

    def _replacement(self, name: str) -> str:
        """Read ``${name/pattern/replacement}``, or with ``//`` for every match."""
        every = self._peek() == "/"
        if every:
            self._next()
        pattern = self._word("/", raw_escapes=True)
        replacement = self._word("}", raw_escapes=True)
        if self._variables is None:
            return f"${{{name}/{pattern}/{replacement}}}"
        value, tokens = self._variables.get(name, ""), _tokens(pattern)
        self._compare(len(value) ** 2 * len(tokens))
        return _replaced(value, tokens, replacement, every=every)

    def _word(self, stop: str, *, raw_escapes: bool) -> str:
        try:
            return self._until(stop, raw_escapes=raw_escapes)[0]
        except InvalidArgument as error:
            if self._peek():
                raise
            missing = "'/' in ${}" if stop == "/" else "'}'"
            raise InvalidArgument(f"syntax error: missing {missing}") from error

    def _name(self) -> str:
        start = self._at
        if self._peek().isdigit():
            while self._peek().isdigit():
                self._at += 1
        elif self._peek() and self._peek() in _SPECIAL:
            self._at += 1
        else:
            while self._peek().isalnum() or self._peek() == "_":
                self._at += 1
        return self._source[start : self._at]


def _modified(name: str, value: str | None, modifier: str, word: str) -> str:
    """Return the value of ``${name<modifier>word}``."""
    is_unset = value is None or (modifier.startswith(":") and not value)
    match modifier.removeprefix(":"):
        case "-":
            return word if is_unset else value or ""
        case "+":
            return "" if is_unset else word
        case "?":
            if is_unset:
                what = "unset" if value is None else "empty"
                raise InvalidArgument(f"{name}: {word or f'is not allowed to be {what}'}")
            return value or ""
        case side:
            greedy = word.startswith(side)
            tokens = _tokens(word[1:] if greedy else word)
            return _trimmed(value or "", tokens, at_start=side == "#", greedy=greedy)


def _tokens(pattern: str) -> list[str]:
    """Split a shell pattern into literals, ``*`` and ``?``.  A literal has a leading dot."""
    tokens, characters = [], iter(pattern)
    for character in characters:
        if character == "\\":
            escaped = next(characters, "")
            if escaped not in ("*", "?", "\\", "}", "/"):
                raise InvalidArgument(
                    f"invalid pattern ({pattern}) in substitution: invalid escape '\\{escaped}'"
                )
            tokens.append(f".{escaped}")
        else:
            tokens.append(character if character in (_STAR, _ANY) else f".{character}")
    return tokens


def _ends(tokens: list[str], text: str, start: int) -> Iterator[int]:
    """Yield the ends of the pattern's matches that start at ``start``, the shortest first."""
    states = _closed({0}, tokens)
    for at in range(start, len(text) + 1):
        if len(tokens) in states:
            yield at
        if at == len(text) or not states:
            return
        following = set()
        for state in states:
            if state == len(tokens):
                continue
            if tokens[state] == _STAR:
                following.add(state)
            elif tokens[state] == _ANY or tokens[state][1] == text[at]:
                following.add(state + 1)
        states = _closed(following, tokens)


def _closed(states: set[int], tokens: list[str]) -> set[int]:
    """Add the states that a star leads to without a character."""
    found = set()
    for state in states:
        while state not in found:
            found.add(state)
            if state < len(tokens) and tokens[state] == _STAR:
                state += 1
    return found


def _check_size(length: int) -> None:
    if length > VALUE_BYTES_MAX:
        raise InvalidArgument(f"a value has more than {VALUE_BYTES_MAX} characters")


def _trimmed(value: str, tokens: list[str], *, at_start: bool, greedy: bool) -> str:
    if not at_start:
        return _trimmed(value[::-1], tokens[::-1], at_start=True, greedy=greedy)[::-1]
    ends = list(_ends(tokens, value, 0))
    return value[ends[-1 if greedy else 0] :] if ends else value


def _replaced(value: str, tokens: list[str], replacement: str, *, every: bool) -> str:
    result, at, length = [], 0, 0
    while at <= len(value):
        end = max(_ends(tokens, value, at), default=None)
        if end is None or end == at:
            result.append(value[at : at + 1])
            at += 1
            continue
        result.append(replacement)
        length += len(replacement)
        _check_size(length)
        at = end
        if not every:
            break
    return "".join(result) + value[at:]

"""Parses the text of a Dockerfile into lines of words.

Lines are joined and split into words as in BuildKit's parser, which the classic builder also uses.  Messages are the
parser's own.  Variables are not substituted here.

Source: buildkit, frontend/dockerfile/parser (parser.go, line_parsers.go, split_command.go, directives.go).
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from skep.engine.build.dockerfile.substitution import raw_words, unquoted_word
from skep.errors import InvalidArgument

FILE_BYTES_MAX = 4 << 20
"""The file is read into memory and parsed on the node for any client, so its size needs a limit."""
LINE_BYTES_MAX = 65535
"""Length of one line, as in Go's scanner."""
LINES_MAX = 100_000
"""Each line becomes an object.  A file of 4 MiB could have four million lines."""

_COMMENTS_MAX = 100
"""Maximum number of comments kept before an instruction: the nearest ones, because they may describe it."""

_SPACES = re.compile(r"[\t\v\f\r ]+")
_HEREDOC = re.compile(r"(\d*)<<(-?)\s*([^<]*)")
_DIRECTIVE = re.compile(r"#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(.+?)\s*")
_DIRECTIVES = frozenset({"syntax", "escape", "check"})
_WITH_HEREDOCS = frozenset({"add", "copy", "run"})


class Heredoc(msgspec.Struct, frozen=True):
    """Here-document in the Dockerfile.

    ``expands``: Whether variables are substituted.  ``chomps``: Whether leading tabs are removed.
    """

    name: str
    content: str
    expands: bool = True
    chomps: bool = False

    @property
    def text(self) -> str:
        """Return the content as a file."""
        return re.sub(r"(?m)^\t+", "", self.content) if self.chomps else self.content


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One instruction as words.

    ``keyword`` is as written, ``original`` is the joined line, and ``arguments`` is the rest, split by the
    instruction's own rule.  ENV has three words for each variable: name, value, separator.
    """

    keyword: str
    original: str
    number: int = 0
    flags: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    is_json: bool = False
    heredocs: tuple[Heredoc, ...] = ()
    last: int = 0
    """Number of the instruction's last line."""
    comments: tuple[str, ...] = ()
    """Last comments before the instruction."""


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """All lines of a Dockerfile.

    ``escape``: Its escape character.  ``syntax``: The front end that its directive names.
    """

    lines: tuple[Line, ...]
    escape: str = "\\"
    syntax: str = ""
    check: str = ""
    """The author's selection of build checks."""
    warnings: tuple[str, ...] = ()
    empty_continuations: tuple[int, ...] = ()
    """Last line numbers of instructions that have empty lines in them."""


def parse(text: str) -> Parsed:
    """Parse a Dockerfile into lines.

    Raises: InvalidArgument: it has no line, or an invalid one, in BuildKit's words.
    """
    return _Parser(text.removeprefix("\ufeff")).run()


def quoted(text: str) -> str:
    """Quote a text like Go's ``%q``."""
    return msgspec.json.encode(readable(text)).decode()


def readable(text: str) -> str:
    """Return ``text`` for messages and JSON.  Bytes that are not UTF-8 are replaced, as in Go."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _Parser:
    def __init__(self, text: str) -> None:
        self._lines: list[str] = re.findall(r"[^\n]*\n|[^\n]+", text)
        self._at = 0
        self._escape = "\\"
        self._directives: dict[str, str] = {}
        self._may_be_directive = True
        self._warnings: list[str] = []
        self._empty_continuations: list[int] = []

    def run(self) -> Parsed:
        if len(self._lines) > LINES_MAX:
            raise InvalidArgument(f"the Dockerfile has more than {LINES_MAX} lines")
        lines = tuple(self._all())
        if not lines:
            raise InvalidArgument("file with no instructions")
        if self._warnings:
            self._warnings.append("Empty continuation lines will become errors in a future release.")
        return Parsed(
            lines=lines,
            escape=self._escape,
            syntax=self._directives.get("syntax", ""),
            check=self._directives.get("check", ""),
            warnings=tuple(self._warnings),
            empty_continuations=tuple(self._empty_continuations),
        )

    def _take(self) -> str:
        line = self._lines[self._at]
        if len(line) > LINE_BYTES_MAX:
            raise InvalidArgument(f"dockerfile line greater than max allowed size of {LINE_BYTES_MAX}")
        self._at += 1
        return line

    def _all(self) -> Iterator[Line]:
        comments = deque[str](maxlen=_COMMENTS_MAX)
        while self._at < len(self._lines):
            line = self._take().rstrip("\r\n").lstrip()
            is_directive = self._directive(line)
            if line.startswith("#"):
                comment = line[1:].strip()
                if comment and not is_directive:
                    comments.append(comment)
                else:
                    comments.clear()
                line = ""
            number = self._at
            line, is_whole = self._continued(line)
            if is_whole and not line:
                continue
            parts, has_empty = [line], False
            while not is_whole and self._at < len(self._lines):
                line = self._take().rstrip("\r\n")
                if line.lstrip().startswith("#"):
                    continue
                if not line.strip():
                    has_empty = True
                    continue
                line, is_whole = self._continued(line)
                parts.append(line)
            joined = "".join(parts)
            if has_empty:
                self._warnings.append(f"Empty continuation line found in: {joined}")
                self._empty_continuations.append(self._at)
            found = line_of(joined, self._escape, number)
            documents = self._heredocs(found)
            yield msgspec.structs.replace(found, heredocs=documents, last=self._at, comments=tuple(comments))
            comments.clear()

    def _directive(self, line: str) -> bool:
        """Return whether the line is a parser directive, and apply it."""
        if not self._may_be_directive:
            return False
        found = _DIRECTIVE.fullmatch(line)
        name = found[1].lower() if found else ""
        if found is None or name not in _DIRECTIVES:
            self._may_be_directive = False
            return False
        if name in self._directives:
            raise InvalidArgument(f"only one {name} parser directive can be used")
        self._directives[name] = found[2]
        if name == "escape":
            if found[2] not in ("`", "\\"):
                raise InvalidArgument(f"invalid escape token '{found[2]}' does not match ` or \\")
            self._escape = found[2]
        return True

    def _continued(self, line: str) -> tuple[str, bool]:
        """Return the line without its continuation character, and whether it is the instruction's last."""
        stripped = line.rstrip(" \t")
        if not stripped.endswith(self._escape) or stripped.endswith(self._escape * 2):
            return line, True
        return stripped.removesuffix(self._escape), False

    def _heredocs(self, line: Line) -> tuple[Heredoc, ...]:
        keyword = line.keyword.lower()
        if keyword == "onbuild" and line.arguments:
            keyword = line.arguments[0].lower()
        if keyword not in _WITH_HEREDOCS or line.is_json or "<<" not in line.original:
            return ()
        found = []
        for word in raw_words(line.original):
            document = heredoc_of(word)
            if document is not None:
                found.append(msgspec.structs.replace(document, content=self._document(document)))
        return tuple(found)

    def _document(self, document: Heredoc) -> str:
        content: list[str] = []
        while self._at < len(self._lines):
            line = self._take()
            end = line.rstrip("\r\n")
            if (end.lstrip("\t") if document.chomps else end) == document.name:
                return "".join(content)
            content.append(line)
        raise InvalidArgument("unterminated heredoc")


def heredoc_of(word: str) -> Heredoc | None:
    """Return the document that ``<<NAME`` starts, without its content, or None if the word is not ``<<NAME``."""
    found = _HEREDOC.fullmatch(word)
    if found is None or not found[3]:
        return None
    name = unquoted_word(found[3])
    return Heredoc(name[0], "", expands=not name[1], chomps=found[2] == "-") if name is not None else None


def line_of(text: str, escape: str = "\\", number: int = 0) -> Line:
    """Parse a joined line as an instruction.  Raises: InvalidArgument."""
    keyword, *rest = _SPACES.split(text.strip(), maxsplit=1)
    flags, arguments = _flags(rest[0], escape) if rest else ((), "")
    words, is_json = _RULES.get(keyword.lower(), _ignored)(arguments.strip(), escape)
    return Line(
        keyword=keyword, original=text, number=number, flags=flags, arguments=tuple(words), is_json=is_json
    )


def _flags(text: str, escape: str) -> tuple[tuple[str, ...], str]:
    """Return the leading words that start with ``--``, and the rest of the line."""
    flags: list[str] = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        if not text.startswith("--", at):
            return tuple(flags), text[at:]
        word, at = _flag(text, at, escape)
        if word == "--":
            return tuple(flags), text[at:]
        flags.append(word)
    return tuple(flags), ""


def _flag(text: str, at: int, escape: str) -> tuple[str, int]:
    """Return the word that starts at ``at``, without quotes, and its end."""
    word, quote = [], ""
    while at < len(text):
        character = text[at]
        if not quote and character.isspace():
            break
        at += 1
        if character == quote:
            quote = ""
        elif not quote and character in "'\"":
            quote = character
        elif character == escape:
            word.append(text[at : at + 1])
            at += 1
        else:
            word.append(character)
    return "".join(word), at


_Words = tuple[Sequence[str], bool]


def _ignored(rest: str, escape: str) -> _Words:
    return (), False


def _text(rest: str, escape: str) -> _Words:
    return ([rest] if rest else []), False


def _list(rest: str, escape: str) -> _Words:
    return (_SPACES.split(rest) if rest else []), False


def _json_list(rest: str) -> Sequence[str] | None:
    """Return the strings of a JSON array, or None if it is not an array.

    Raises: InvalidArgument: an element is not a string.
    """
    if not rest.startswith("["):
        return None
    try:
        values = msgspec.json.decode(rest, type=list[object])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if not all(isinstance(value, str) for value in values):
        raise InvalidArgument("when using JSON array syntax, arrays must be comprised of strings only")
    return [str(value) for value in values]


def _json_or_text(rest: str, escape: str) -> _Words:
    values = _json_list(rest.lstrip())
    return (values, True) if values is not None else _text(rest, escape)


def _json_or_list(rest: str, escape: str) -> _Words:
    values = _json_list(rest.lstrip())
    return (values, True) if values is not None else _list(rest, escape)


def _health(rest: str, escape: str) -> _Words:
    kind, *command = rest.split(maxsplit=1)[:2] if rest else [""]
    if not kind:
        return (), False
    words, is_json = _json_or_text(command[0] if command else "", escape)
    return (kind, *words), is_json


def _sub_command(rest: str, escape: str) -> _Words:
    if not rest:
        return (), False
    if rest.lower().startswith("onbuild"):  # refused at any depth
        return ("ONBUILD",), False
    inner = line_of(rest, escape)
    return (inner.keyword, *inner.arguments), inner.is_json


def _names(rest: str, escape: str) -> _Words:
    return _quoted_words(rest, escape), False


def _pairs(keyword: str) -> Callable[[str, str], _Words]:
    def rule(rest: str, escape: str) -> _Words:
        words = _quoted_words(rest, escape)
        if not words:
            return (), False
        if "=" not in words[0]:
            name, *value = _SPACES.split(rest, maxsplit=1)
            if not value:
                raise InvalidArgument(f"{keyword} must have two arguments")
            return (name, value[0], ""), False
        found = []
        for word in words:
            name, separator, text = word.partition("=")
            if not separator:
                raise InvalidArgument(
                    f"Syntax error - can't find = in {quoted(word)}. Must be of the form: name=value"
                )
            found += [name, text, separator]
        return found, False

    return rule


def _quoted_words(rest: str, escape: str) -> list[str]:
    """Split at spaces outside quotes.  Quotes and escapes are kept."""
    words: list[str] = []
    word: list[str] | None = None
    quote, at = "", 0
    while at < len(rest):
        character = rest[at]
        at += 1
        if not quote and character.isspace():
            if word is not None:
                words.append("".join(word))
            word = None
            continue
        word = word if word is not None else []
        if character == quote:
            quote = ""
        elif not quote and character in "'\"":
            quote = character
        if character == escape and quote != "'":
            if at == len(rest):
                continue  # an escape at the end of the line is an ordinary character
            word.append(character)
            character = rest[at]
            at += 1
        word.append(character)
    if word:
        words.append("".join(word))
    return words


_RULES: Mapping[str, Callable[[str, str], _Words]] = {
    "add": _json_or_list,
    "arg": _names,
    "cmd": _json_or_text,
    "copy": _json_or_list,
    "entrypoint": _json_or_text,
    "env": _pairs("ENV"),
    "expose": _list,
    "from": _list,
    "healthcheck": _health,
    "label": _pairs("LABEL"),
    "maintainer": _text,
    "onbuild": _sub_command,
    "run": _json_or_text,
    "shell": _json_or_text,
    "stopsignal": _text,
    "user": _text,
    "volume": _json_or_list,
    "workdir": _text,
}

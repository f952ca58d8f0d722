"""Parses a template's tokens into its tree.

Source: Go 1.24, text/template/parse/parse.go.
"""

import re
from collections.abc import Collection, Sequence

from skep.errors import InvalidArgument
from skep.gotemplate import tree
from skep.gotemplate.functions import BUILTINS
from skep.gotemplate.lex import Kind, Token, lex
from skep.gotemplate.text import TemplateBudget
from skep.gotemplate.tree import NAME
from skep.gotemplate.values import quoted, to_bytes, to_text

NESTING_MAX = 100
"""Nesting depth of parentheses, and of actions within actions."""

_OPERANDS = frozenset(
    {"bool", "char", "dot", "field", "identifier", "number", "nil", "raw", "string", "variable", "("}
)
VARIABLES_MAX = 1_000
"""Maximum number of variables in a scope, because each use searches them."""


class TemplateError(InvalidArgument):
    """A text is not a valid template, or its execution failed.  The message is Go's."""


def parse(text: str, functions: Collection[str], budget: TemplateBudget) -> tree.Template:
    """Parse ``text`` and reduce ``budget``.  ``functions`` are names in addition to Go's.  Raises: TemplateError."""
    tokens = lex(text, budget.tokens)
    budget.tokens -= len(tokens)
    return _Parser(text, tokens, functions).template()


class _Parser:
    def __init__(self, text: str, tokens: Sequence[Token], functions: Collection[str]) -> None:
        self._text = text
        self._functions = functions
        self._tokens = tokens
        self._next = 0
        self._variables = ["$"]
        self._ranges = 0
        self._depth = 0
        self._bodies: dict[str, tree.Body] = {}

    def template(self) -> tree.Template:
        body = self._list(at_top=True)
        return tree.Template(self._text, {NAME: body, **self._bodies})

    # -- tokens ----------------------------------------------------------------------------------------------

    def _take(self) -> Token:
        token = self._tokens[self._next]
        if token.kind not in ("eof", "error"):
            self._next += 1
        return token

    def _peek(self) -> Token:
        return self._tokens[self._next]

    def _skip_space(self) -> Token:
        """Skip spaces and return the next token without consuming it."""
        while self._peek().kind == "space":
            self._next += 1
        return self._peek()

    def _expect(self, kind: Kind, context: str) -> Token:
        self._skip_space()
        token = self._take()
        if token.kind != kind:
            self._unexpected(token, context)
        return token

    def _fail(self, message: str) -> "TemplateError":
        line = self._tokens[min(self._next, len(self._tokens) - 1)].line
        return TemplateError(f"template: {NAME}:{line}: {message}")

    def _unexpected(self, token: Token, context: str) -> None:
        if token.kind == "error":
            raise TemplateError(f"template: {NAME}:{token.line}: {token.text}")
        raise TemplateError(f"template: {NAME}:{token.line}: unexpected {token} in {context}")

    def _nested(self) -> None:
        self._depth += 1
        if self._depth > NESTING_MAX:
            raise self._fail("exceeded maximum nesting depth")

    # -- statements ------------------------------------------------------------------------------------------

    def _list(self, *, at_top: bool = False) -> tree.Body:
        """Parse statements up to the end of the text, ``{{else`` or ``{{end``, which is not consumed."""
        found: list[tree.Statement] = []
        while True:
            token = self._peek()
            match token.kind:
                case "text":
                    self._take()
                    found.append(tree.TextNode(token.position, token.text))
                case "left":
                    word = self._word_after(token)
                    if word in ("else", "end"):
                        if at_top:
                            raise self._fail(f"unexpected {{{{{word}}}}}")
                        return tuple(found)
                    self._take()
                    if word == "define" and at_top:
                        self._define()
                    else:
                        found.append(self._action())
                case "eof" if at_top:
                    return tuple(found)
                case "eof":
                    raise self._fail("unexpected EOF")
                case _:
                    self._unexpected(token, "input")

    def _word_after(self, left: Token) -> str:
        """Return the keyword after the delimiter, or ""."""
        for token in self._tokens[self._next + 1 : self._next + 3]:
            if token.kind != "space":
                return token.text if token.kind == "keyword" else ""
        return ""

    def _action(self) -> tree.Statement:
        """Parse the statement after an opening delimiter."""
        token = self._skip_space()
        if token.kind == "keyword":
            match token.text:
                case "if" | "with" | "range":
                    self._take()
                    return self._branch(token)
                case "template":
                    self._take()
                    return self._include()
                case "block":
                    self._take()
                    return self._block()
                case "break" | "continue":
                    self._take()
                    return self._jump(token)
        pipeline = self._pipeline("command", "right")
        return tree.PrintNode(token.position, pipeline)

    def _branch(self, token: Token) -> tree.Branch:
        self._nested()
        scope = len(self._variables)
        pipeline = self._pipeline(token.text, "right")
        self._ranges += token.text == "range"
        body = self._list()
        self._ranges -= token.text == "range"
        otherwise: tree.Body = ()
        self._take()  # {{
        word = self._skip_space()
        self._take()
        if word.text == "else":
            again = self._skip_space()
            chained = {"if": "if", "with": "with"}.get(token.text)
            if chained is not None and again.kind == "keyword" and again.text == chained:
                self._take()
                otherwise = (self._branch(again),)
                del self._variables[scope:]
                self._depth -= 1
                return tree.Branch(token.position, token.text, pipeline, body, otherwise)
            self._expect("right", "else")
            otherwise = self._list()
            self._take()
            last = self._skip_space()
            self._take()
            if last.text != "end":
                raise self._fail("expected end; found {{else}}")
        self._expect("right", "end")
        del self._variables[scope:]
        self._depth -= 1
        return tree.Branch(token.position, token.text, pipeline, body, otherwise)

    def _jump(self, token: Token) -> tree.Jump:
        following = self._skip_space()
        if following.kind != "right":
            self._unexpected(following, f"{{{{{token.text}}}}}")
        self._take()
        if not self._ranges:
            raise self._fail(f"{{{{{token.text}}}}} outside {{{{range}}}}")
        return tree.Jump(token.position, token.text)

    def _include(self) -> tree.Include:
        token = self._template_name("template clause")
        pipeline = None
        if self._skip_space().kind == "right":
            self._take()
        else:
            pipeline = self._pipeline("template clause", "right")
        return tree.Include(token.position, self._unquoted(token), pipeline)

    def _block(self) -> tree.Include:
        token = self._template_name("block clause")
        pipeline = self._pipeline("block clause", "right")
        self._body_of(self._unquoted(token), "block clause")
        return tree.Include(token.position, self._unquoted(token), pipeline)

    def _define(self) -> None:
        self._skip_space()
        self._take()
        token = self._template_name("define clause")
        self._expect("right", "define clause")
        self._body_of(self._unquoted(token), "define clause")

    def _body_of(self, name: str, context: str) -> None:
        """Parse a nested template definition up to its ``{{end}}``."""
        self._nested()
        outside, self._variables = self._variables, ["$"]
        ranges, self._ranges = self._ranges, 0
        body = self._list()
        self._take()
        word = self._skip_space()
        self._take()
        if word.text != "end":
            raise self._fail(f"unexpected {{{{else}}}} in {context}")
        self._expect("right", context)
        self._variables, self._ranges = outside, ranges
        self._depth -= 1
        # An empty definition does not replace a non-empty one, as in Go.
        if name not in self._bodies or any(
            not isinstance(one, tree.TextNode) or one.text.strip() for one in body
        ):
            self._bodies[name] = body

    def _template_name(self, context: str) -> Token:
        self._skip_space()
        token = self._take()
        if token.kind not in ("string", "raw"):
            self._unexpected(token, context)
        return token

    # -- pipelines -------------------------------------------------------------------------------------------

    def _pipeline(self, context: str, end: Kind) -> tree.Pipeline:
        position = self._skip_space().position
        variables, assigns = self._declarations(context)
        commands: list[tree.CommandNode] = []
        while True:
            token = self._skip_space()
            if token.kind == end:
                self._take()
                break
            if token.kind in _OPERANDS:
                commands.append(self._command())
            else:
                self._unexpected(token, context)
        if not commands:
            raise self._fail(f"missing value for {context}")
        for number, command in enumerate(commands[1:], 2):
            first = command.operands[0]
            if isinstance(first, tree.Constant | tree.Dot | tree.Nil):
                raise self._fail(f"non executable command in pipeline stage {number}")
        if not assigns:
            self._variables.extend(variables)
            if len(self._variables) > VARIABLES_MAX:
                raise self._fail("too many variables")
        return tree.Pipeline(position, variables, assigns, tuple(commands))

    def _declarations(self, context: str) -> tuple[tuple[str, ...], bool]:
        """Parse the variables that a pipeline sets.  Return them, and whether they exist already."""
        names: list[str] = []
        while True:
            first = self._skip_space()
            following = [
                token for token in self._tokens[self._next + 1 : self._next + 3] if token.kind != "space"
            ]
            if first.kind != "variable" or not following:
                return tuple(names), False
            sign = following[0]
            if sign.kind in ("declare", "assign"):
                while self._take() is not sign:
                    pass
                return (*names, first.text), sign.kind == "assign"
            if sign.text != ",":
                return tuple(names), False
            while self._take() is not sign:
                pass
            names.append(first.text)
            if context != "range" or len(names) == 2:
                raise self._fail(f"too many declarations in {context}")
            if self._skip_space().kind not in ("variable", "right", ")"):
                raise self._fail("range can only initialize variables")

    def _command(self) -> tree.CommandNode:
        """Parse one command and consume the ``|`` after it."""
        position = self._skip_space().position
        operands: list[tree.Operand] = []
        while True:
            self._skip_space()
            operand = self._operand()
            if operand is not None:
                operands.append(operand)
            token = self._peek()
            match token.kind:
                case "space":
                    continue
                case "right" | ")":
                    pass
                case "pipe":
                    self._take()
                case _:
                    self._unexpected(token, "operand")
            break
        if not operands:
            raise self._fail("empty command")
        return tree.CommandNode(position, tuple(operands))

    def _operand(self) -> tree.Operand | None:
        """Parse a term and its fields, or return None if there is no term."""
        term = self._term()
        if term is None or self._peek().kind != "field":
            return term
        position = self._peek().position
        names: list[str] = []
        while self._peek().kind == "field":
            names.append(self._take().text[1:])
        match term:
            case tree.FieldNode():
                return tree.FieldNode(position, (*term.names, *names))
            case tree.Variable():
                return tree.Variable(position, term.name, (*term.names, *names))
            case tree.Pipeline() | tree.FunctionCall():
                return tree.Chain(position, term, tuple(names))
        raise self._fail(f"unexpected . after term {quoted(str(term))}")

    def _term(self) -> tree.Operand | None:
        token = self._peek()
        position = token.position
        match token.kind:
            case "identifier":
                self._take()
                if token.text not in BUILTINS and token.text not in self._functions:
                    raise self._fail(f"function {quoted(token.text)} not defined")
                return tree.FunctionCall(position, token.text)
            case "dot":
                self._take()
                return tree.Dot(position)
            case "nil":
                self._take()
                return tree.Nil(position)
            case "variable":
                self._check_known(token.text)
                self._take()
                return tree.Variable(position, token.text)
            case "field":
                self._take()
                return tree.FieldNode(position, (token.text[1:],))
            case "bool":
                self._take()
                return tree.Constant(position, token.text == "true", token.text)
            case "char" | "number":
                self._take()
                return tree.Constant(position, self._number(token), token.text)
            case "string" | "raw":
                self._take()
                return tree.Constant(position, self._unquoted(token), token.text)
            case "(":
                self._take()
                self._nested()
                pipeline = self._pipeline("parenthesized pipeline", ")")
                self._depth -= 1
                return pipeline
        return None

    def _check_known(self, name: str) -> None:
        if name not in self._variables:
            raise self._fail(f"undefined variable {quoted(name)}")

    # -- literals --------------------------------------------------------------------------------------------

    def _number(self, token: Token) -> int | float:
        if token.kind == "char":
            text = self._unescaped(token.text[1:-1], "'")
            if len(text) != 1:
                raise self._fail(f"malformed character constant: {token.text}")
            return ord(text)
        return self._parsed_number(token.text)

    def _parsed_number(self, text: str) -> int | float:
        plain = text.replace("_", "")
        try:
            if not re.match(r"[+-]?0[xXoObB]", plain) and any(char in plain for char in ".eE"):
                return float(plain)
            octal = re.fullmatch(r"([+-]?)0([0-7]+)", plain)
            value = int(octal[1] + octal[2], 8) if octal else int(plain, 0)
        except ValueError:
            problem = "integer overflow" if plain.lstrip("+-").isdigit() else "illegal number syntax"
            raise self._fail(f"{problem}: {quoted(text)}") from None
        if not -(1 << 63) <= value < 1 << 63:
            raise self._fail(f"integer overflow: {quoted(text)}")
        return value

    def _unquoted(self, token: Token) -> str:
        if token.kind == "raw":
            return token.text[1:-1].replace("\r", "")
        return self._unescaped(token.text[1:-1], '"')

    def _unescaped(self, text: str, quote: str) -> str:
        """Unquote a string like ``strconv.Unquote``."""
        parts: list[bytes] = []
        position = 0
        for match in _ESCAPE.finditer(text):
            parts.append(to_bytes(text[position : match.start()]))
            parts.append(self._escape(match, quote))
            position = match.end()
        parts.append(to_bytes(text[position:]))
        return to_text(b"".join(parts))

    def _escape(self, match: "re.Match[str]", quote: str) -> bytes:
        if byte := match["byte"]:
            return bytes([int(byte, 16)])
        if (octal := match["octal"]) and int(octal, 8) < 256:
            return bytes([int(octal, 8)])
        if code := match["code"] or match["long"]:
            number = int(code, 16)
            if number < 0x110000 and not 0xD800 <= number < 0xE000:
                return chr(number).encode()
        single = match["single"] or ""
        if single in _SIMPLE or single == quote:
            return _SIMPLE.get(single, single).encode()
        raise self._fail("invalid syntax")


_ESCAPE = re.compile(
    r"\\(?:x(?P<byte>[0-9a-fA-F]{2})|(?P<octal>[0-7]{3})|u(?P<code>[0-9a-fA-F]{4})|U(?P<long>[0-9a-fA-F]{8})|(?P<single>.))",
    re.DOTALL,
)
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}

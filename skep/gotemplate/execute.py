"""Executes a template's tree.

Source: Go 1.24, text/template/exec.go.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeAlias

from skep.gotemplate import tree
from skep.gotemplate.functions import BUILTINS, LOGICAL, CallError, Function, shown
from skep.gotemplate.parse import TemplateError
from skep.gotemplate.text import BoundedText, TemplateBudget, TooMuchText
from skep.gotemplate.tree import NAME
from skep.gotemplate.values import Struct, Value, is_true, printed, to_bytes, type_name

DEPTH_MAX = 100
"""Nesting depth of templates, branches and parentheses during execution."""
_SHOWN_MAX = 200
"""An error shows at most this many characters of a node."""


class _Nothing:
    """The missing result before the first command of a pipeline."""


_NOTHING = _Nothing()
_Final: TypeAlias = Value | _Nothing


class _Jumped(Exception):
    """``break`` or ``continue`` (``word``)."""

    def __init__(self, word: str) -> None:
        self.word = word


def execute(
    template: tree.Template, data: Struct, functions: Mapping[str, Function], budget: TemplateBudget
) -> str:
    """Render ``template`` with ``data`` as ``.`` and reduce ``budget``.  Raises: TemplateError."""
    run = _Execution(template, functions, budget)
    run.template(NAME, data)
    return run.output()


class _Execution:
    """One execution.  Methods that take a node and ``dot`` are named after the kind of node."""

    def __init__(
        self, template: tree.Template, functions: Mapping[str, Function], budget: TemplateBudget
    ) -> None:
        self._template = template
        self._functions = {**BUILTINS, **functions}
        self._budget = budget
        self._parts: list[str] = []
        self._depth = 0
        self._variables: list[tuple[str, Value]] = []
        self._keys_by_map: dict[int, tuple[Mapping[str, str], Sequence[str]]] = {}
        self._name = NAME
        self._node: object = None
        self._position = 0

    def output(self) -> str:
        return "".join(self._parts)

    # -- errors and limits -----------------------------------------------------------------------------------

    def _at(self, node: tree.Operand | tree.CommandNode | tree.Statement) -> None:
        """Attribute errors to ``node`` from here on."""
        self._node, self._position = node, node.position

    def _fail(self, message: str) -> NoReturn:
        text = self._template.text
        before = text[: self._position]
        line = before.count("\n") + 1
        column = len(to_bytes(before.rpartition("\n")[2]))
        node = str(self._node)
        shown = node if len(node) <= _SHOWN_MAX else f"{node[:_SHOWN_MAX]}..."
        where = f'{NAME}:{line}:{column}: executing "{self._name}" at <{shown}>'
        raise TemplateError(f"template: {where}: {message}")

    def _step(self) -> None:
        self._budget.steps -= 1
        if self._budget.steps < 0:
            self._fail("it takes too many steps")

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            self._fail(f"exceeded maximum template depth ({DEPTH_MAX})")
        try:
            yield
        finally:
            self._depth -= 1

    def _count(self, values: Sequence[Value]) -> None:
        self._budget.produce(sum(len(value) for value in values if isinstance(value, str)))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except TooMuchText:
            self._fail("it handles too much text")

    def _write(self, text: str) -> None:
        self._budget.output -= len(to_bytes(text))
        if self._budget.output < 0:
            self._fail("its output is too long")
        self._parts.append(text)

    def _print(self, value: Value) -> None:
        with self._counting():
            text = "<no value>" if value is None else printed(value, self._budget)
        self._write(text)

    # -- statements ------------------------------------------------------------------------------------------

    def template(self, name: str, dot: Value) -> None:
        """Execute the template ``name``, which has its own variables."""
        outside = self._variables, self._name
        self._variables, self._name = [("$", dot)], name
        with self._deeper():
            self._body(self._template.bodies[name], dot)
        self._variables, self._name = outside

    def _body(self, body: tree.Body, dot: Value) -> None:
        for statement in body:
            self._statement(statement, dot)

    def _statement(self, statement: tree.Statement, dot: Value) -> None:
        self._step()
        match statement:
            case tree.TextNode():
                self._write(statement.text)
            case tree.PrintNode():
                self._at(statement)
                value = self._pipeline(statement.pipeline, dot)
                if not statement.pipeline.variables:
                    self._at(statement)
                    self._print(value)
            case tree.Branch():
                with self._deeper():
                    self._branch(statement, dot)
            case tree.Include():
                self._at(statement)
                if statement.name not in self._template.bodies:
                    self._fail(f'template "{statement.name}" not defined')
                inner = self._pipeline(statement.pipeline, dot) if statement.pipeline is not None else None
                self.template(statement.name, inner)
            case tree.Jump():
                raise _Jumped(statement.word)

    def _branch(self, branch: tree.Branch, dot: Value) -> None:
        scope = len(self._variables)
        if branch.word == "range":
            self._range(branch, dot)
        else:
            value = self._pipeline(branch.pipeline, dot)
            if is_true(value):
                self._body(branch.body, value if branch.word == "with" else dot)
            else:
                self._body(branch.otherwise, dot)
        del self._variables[scope:]

    def _range(self, branch: tree.Branch, dot: Value) -> None:
        value = self._pipeline(branch.pipeline, dot)
        names = branch.pipeline.variables
        keys: Sequence[str] | range = ()
        match value:
            case None:
                pass
            case bool() | float() | str() | Struct():
                self._fail(f"range can't iterate over {shown(value)}")
            case int():
                if len(names) > 1:
                    self._fail(f"can't use {value} to iterate over more than one variable")
                keys = range(value)
            case _:
                keys = self._keys(value)
        if not keys:
            self._body(branch.otherwise, dot)
            return
        scope = len(self._variables)
        for key in keys:
            element = value[key] if isinstance(value, Mapping) and isinstance(key, str) else key
            for name, item in zip(names, (element,) if len(names) == 1 else (key, element), strict=False):
                self._set(name, item)
            try:
                self._step()
                self._body(branch.body, element)
            except _Jumped as jump:
                if jump.word == "break":
                    break
            finally:
                del self._variables[scope:]

    def _keys(self, value: Mapping[str, str]) -> Sequence[str]:
        """Return the sorted keys of a map, computed once for each map, because loops over labels may be nested."""
        if id(value) not in self._keys_by_map:
            self._keys_by_map[id(value)] = value, sorted(value)
        return self._keys_by_map[id(value)][1]

    def _set(self, name: str, value: Value) -> None:
        """Set the innermost variable ``name``."""
        for number in range(len(self._variables) - 1, -1, -1):
            if self._variables[number][0] == name:
                self._variables[number] = name, value
                return
        self._fail(f"undefined variable: {name}")

    # -- pipelines -------------------------------------------------------------------------------------------

    def _pipeline(self, pipeline: tree.Pipeline, dot: Value) -> Value:
        value: _Final = _NOTHING
        for command in pipeline.commands:
            value = self._command(command, dot, value)
        assert not isinstance(value, _Nothing), "a pipeline has a command"
        for name in pipeline.variables:
            if pipeline.assigns:
                self._set(name, value)
            else:
                self._variables.append((name, value))
        return value

    def _command(self, command: tree.CommandNode, dot: Value, final: _Final) -> Value:
        self._step()
        first, *arguments = command.operands
        match first:
            case tree.FunctionCall():
                return self._call(first, arguments, dot, final, command)
            case tree.FieldNode() | tree.Variable() | tree.Chain():
                has_arguments = bool(arguments) or not isinstance(final, _Nothing)
                return self._operand(first, dot, has_arguments=has_arguments)
        self._at(first)
        if arguments or not isinstance(final, _Nothing):
            self._fail(f"can't give argument to non-function {first}")
        if isinstance(first, tree.Nil):
            self._fail("nil is not a command")
        return self._operand(first, dot)

    def _operand(self, operand: tree.Operand, dot: Value, *, has_arguments: bool = False) -> Value:
        """Return the value of an operand.  A function is called without arguments."""
        self._at(operand)
        match operand:
            case tree.Constant():
                return operand.value
            case tree.Nil():
                return None
            case tree.Dot():
                return dot
            case tree.FieldNode():
                return self._fields(dot, operand.names, has_arguments=has_arguments)
            case tree.Variable():
                value = next(value for name, value in reversed(self._variables) if name == operand.name)
                if not operand.names and has_arguments:
                    self._fail(f"can't give argument to non-function {operand}")
                return self._fields(value, operand.names, has_arguments=has_arguments)
            case tree.Chain():
                value = self._operand(operand.first, dot)
                return self._fields(value, operand.names, has_arguments=has_arguments)
            case tree.Pipeline():
                with self._deeper():
                    return self._pipeline(operand, dot)
            case tree.FunctionCall():
                return self._call(operand, [], dot, _NOTHING, operand)

    def _fields(self, value: Value, names: Sequence[str], *, has_arguments: bool = False) -> Value:
        for number, name in enumerate(names):
            value = self._field(value, name, has_arguments=has_arguments and number == len(names) - 1)
        return value

    def _field(self, value: Value, name: str, *, has_arguments: bool) -> Value:  # noqa: RET503
        match value:
            case None:
                self._fail(f'nil data; no entry for key "{name}"')
            case Struct():
                if name not in value.fields:
                    self._fail(f"can't evaluate field {name} in type {type_name(value)}")
                if has_arguments:
                    self._fail(f"{name} has arguments but cannot be invoked as function")
                return value.fields[name]
            case str() | bool() | int() | float():
                self._fail(f"can't evaluate field {name} in type {type_name(value)}")
            case _:
                if has_arguments:
                    self._fail(f"{name} is not a method but has arguments")
                if name not in value:
                    self._fail(f'map has no entry for key "{name}"')
                return value[name]

    # -- functions -------------------------------------------------------------------------------------------

    def _call(
        self,
        call: tree.FunctionCall,
        operands: Sequence[tree.Operand],
        dot: Value,
        final: _Final,
        whole: tree.CommandNode | tree.FunctionCall,
    ) -> Value:
        """Call a function.  Its own errors show ``whole``."""
        self._at(call)
        function = self._functions[call.name]
        given = len(operands) + (not isinstance(final, _Nothing))
        if function.is_variadic and given < function.parameters:
            least = function.parameters
            self._fail(f"wrong number of args for {call.name}: want at least {least} got {given}")
        if not function.is_variadic and given != function.parameters:
            self._fail(f"wrong number of args for {call.name}: want {function.parameters} got {given}")
        arguments: list[Value] = []
        for number, operand in enumerate(operands):
            value = self._operand(operand, dot)
            self._check_text(function, number, operand, value)
            arguments.append(value)
            if call.name in LOGICAL and is_true(value) is (call.name == "or"):
                return value
        if not isinstance(final, _Nothing):
            self._check_text(function, len(arguments), None, final)
            arguments.append(final)
        self._at(call)
        try:
            with self._counting():
                return self._called(function, arguments)
        except CallError as error:
            self._at(whole)
            self._fail(f"error calling {call.name}: {error}")

    def _called(self, function: Function, arguments: Sequence[Value]) -> Value:
        self._count(arguments)
        if function.writes:
            out = BoundedText(self._budget)
            function.call(out, *arguments)
            return str(out)
        result = function.call(*arguments)
        self._count([result])
        return result

    def _check_text(
        self, function: Function, number: int, operand: tree.Operand | None, value: Value
    ) -> None:
        """Refuse a non-string argument that must be a string.

        ``operand`` is None for the previous command's result.
        """
        if isinstance(value, str) or number >= function.texts:
            return
        if isinstance(operand, tree.Nil):
            self._fail("cannot assign nil to string")
        if isinstance(operand, tree.Constant):
            self._fail(f"expected string; found {operand}")
        self._fail(f"wrong type for value; expected string; got {type_name(value)}")

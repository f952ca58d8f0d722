"""Placeholders of a service that no node could expand: refused when the service is created.

Supported are field paths (``{{.Node.Hostname}}``) and ``{{index .Service.Labels "x"}}``, as on nodes; the error texts
follow Go's as far as possible.

Source: swarmkit, template/{context,expand}.go; Go 1.19, text/template.
"""

import re
from collections.abc import Iterator

from skep.errors import InvalidArgument
from skep.model.container import ContainerSpec, Mount

_PATHS = frozenset(
    {
        *(".Service.ID", ".Service.Name", ".Service.Labels"),
        *(".Node.ID", ".Node.Hostname", ".Node.Platform", ".Node.Platform.Architecture", ".Node.Platform.OS"),
        *(".Task.ID", ".Task.Name", ".Task.Slot", ".Service", ".Node", ".Task"),
    }
)
_ACTION = re.compile(r"\{\{-?(\s*)(.*?)\s*-?\}\}", re.DOTALL)
_PATH = re.compile(r"(?:\.\w+)+")
_INDEX = re.compile(r'index\s+\.Service\.Labels\s+"(?:[^"\\]|\\.)*"')


def check_templates(container: ContainerSpec) -> None:
    """Refuse placeholders that mean nothing.  Raises: InvalidArgument."""
    for variable in container.env:
        value = variable.partition("=")[2]
        _check(value, f'expanding env failed: expanding env "{variable}": ')
    for mount in container.mounts:
        for text, where in _texts(mount):
            _check(text, f"expanding mounts failed: {where}: ")
    _check(container.hostname, "expanding hostname failed: ")


def _texts(mount: Mount) -> Iterator[tuple[str, str]]:
    """The fields of a mount that may hold placeholders, and Go's name of each field."""
    yield mount.source, f'expanding mount source "{mount.source}"'
    yield mount.target, f'expanding mount target "{mount.target}"'
    options = mount.volume_options
    if options is not None:
        for key, value in options.labels.items():
            yield value, f'expanding volume labels: expanding map entry "{key}"="{value}"'
        for key, value in options.driver_config.options.items() if options.driver_config else ():
            yield value, f'expanding volume driver config: expanding map entry "{key}"="{value}"'


def _check(text: str, context: str) -> None:
    if "{{" not in text:
        return
    position = 0
    while (start := text.find("{{", position)) >= 0:
        action = _ACTION.match(text, start)
        if action is None:
            raise InvalidArgument(f"{context}template: expansion:{_line(text, start)}: unclosed action")
        problem = _problem(action[2], start + 2 + len(action[1]))
        if problem:
            raise InvalidArgument(f"{context}template: expansion:{_line(text, start)}:{problem}")
        position = action.end()


def _problem(expression: str, offset: int) -> str:
    """What is wrong with one action that begins at byte ``offset``; "" if nothing is."""
    if expression in _PATHS or _INDEX.fullmatch(expression):
        return ""
    if not _PATH.fullmatch(expression):
        return f"{offset}: only fields and index can be used here, not {expression!r}"
    known = ""
    for name in expression[1:].split("."):
        if f"{known}.{name}" not in _PATHS:
            type_ = f"the type of {known}" if known else "type *template.Context"
            return (
                f'{offset}: executing "expansion" at <{expression}>: can\'t evaluate field {name} in {type_}'
            )
        known = f"{known}.{name}"
    return ""


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1

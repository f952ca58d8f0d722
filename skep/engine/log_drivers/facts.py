"""Collects a container's data for its log driver, and derives the attributes and the tag that the user's options
define.

Source: moby, daemon/logger/loginfo.go, daemon/logger/loggerutils/log_tag.go, daemon/logger/templates/templates.go.
"""

import asyncio
import json
import sys
from collections.abc import Iterable, Mapping

import msgspec
from msgspec.structs import replace

from skep.engine.containers.container import Container, ContainerConfig
from skep.engine.log_drivers.options import FILE_DRIVERS
from skep.errors import InvalidArgument
from skep.gotemplate import (
    BoundedText,
    CallError,
    Function,
    Struct,
    TemplateBudget,
    TemplateError,
    Value,
    expand,
)
from skep.linux.commands import communicate

DEFAULT_TAG = "{{.ID}}"
_REGEX_DEADLINE_S = 10.0
"""Time limit in seconds for evaluating a user's regular expression."""
_COUNT_MAX = 1024
"""Largest number for ``pad`` and ``truncate`` in a tag's template, so that tags stay short."""
_MATCH = """
import json, re, sys
pattern, names = json.load(sys.stdin)
try:
    compiled = re.compile(pattern)
except re.error as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([name for name in names if compiled.search(name)]))
"""


class LogFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A container's data for its log driver.  ``name`` has no leading slash."""

    id: str
    name: str
    image_id: str
    image: str
    command: str
    created: str
    hostname: str
    """Hostname of the node."""
    attributes: Mapping[str, str] = {}
    """Labels and variables that the log options name."""

    def struct(self) -> Struct:
        """Return the data for templates."""
        return Struct(
            "*logger.Info",
            {
                "ID": self.id[:12],
                "FullID": self.id,
                "Name": self.name,
                "ImageID": short_id(self.image_id),
                "ImageFullID": self.image_id,
                "ImageName": self.image,
                "Command": self.command,
                "Hostname": self.hostname,
                "DaemonName": "docker",
                "ContainerID": self.id,
                "ContainerName": f"/{self.name}",
                "ContainerImageID": self.image_id,
                "ContainerImageName": self.image,
            },
        )


def facts_of(container: Container, hostname: str) -> LogFacts:
    """Return the data of ``container`` on the node ``hostname``."""
    config = container.config
    return LogFacts(
        id=container.id,
        name=container.name,
        image_id=container.image_id,
        image=container.image,
        command=" ".join((config.path, *config.args)),
        created=container.created_at,
        hostname=hostname,
        attributes=attributes_of(container),
    )


async def with_attributes(config: ContainerConfig, labels: Mapping[str, str]) -> ContainerConfig:
    """Return ``config`` with the attributes that its log options add to each line.  Raises: InvalidArgument."""
    found = await all_attributes(config.log.options, labels, config.env)
    return replace(config, log=replace(config.log, attributes=found))


def with_tag(container: Container, hostname: str) -> Container:
    """Return ``container`` with its tag.

    Lines in files have a tag only if the user sets one.  Raises: InvalidArgument.
    """
    log = container.config.log
    if not log.options.get("tag"):
        return container
    tag = tag_of(log.options, facts_of(container, hostname))
    if log.type not in FILE_DRIVERS:
        return container
    log = replace(log, attributes={**(log.attributes or {}), "tag": tag})
    return replace(container, config=replace(container.config, log=log))


def short_id(image_id: str) -> str:
    """Return the first twelve digits of an image id."""
    return image_id.removeprefix("sha256:")[:12]


def tag_of(options: Mapping[str, str], facts: LogFacts, default: str = DEFAULT_TAG) -> str:
    """Return the option ``tag`` with its placeholders replaced.  Raises: InvalidArgument."""
    try:
        return expand(options.get("tag") or default, facts.struct(), _FUNCTIONS, budget=_tag_budget())
    except TemplateError as error:
        raise InvalidArgument(f"failed to initialize logging driver: {error}") from error


def attributes_of(container: Container) -> Mapping[str, str]:
    """Return the attributes that the log options ``labels``, ``env`` and similar ones add to each line."""
    log = container.config.log
    if log.attributes is not None:
        return log.attributes
    return named_attributes(log.options, container.labels, container.config.env)


def named_attributes(
    options: Mapping[str, str], labels: Mapping[str, str], env: Iterable[str]
) -> dict[str, str]:
    """Return the existing labels and variables that the options name."""
    found = {name: labels[name] for name in _names(options, "labels") if name in labels}
    variables = variables_of(env)
    return found | {name: variables[name] for name in _names(options, "env") if name in variables}


async def all_attributes(
    options: Mapping[str, str], labels: Mapping[str, str], env: Iterable[str]
) -> dict[str, str]:
    """Return the named attributes, and attributes that match a regular expression.

    A separate process evaluates the user's expression, because it may take forever.
    Raises: InvalidArgument: it is invalid, or takes too long.
    """
    found = named_attributes(options, labels, env)
    for option, values in (("labels-regex", labels), ("env-regex", variables_of(env))):
        if pattern := options.get(option):
            found |= {name: values[name] for name in await _matching(option, pattern, tuple(values))}
    return found


def variables_of(env: Iterable[str]) -> Mapping[str, str]:
    """Return the values of ``name=value`` by name."""
    return dict(one.partition("=")[::2] for one in env if "=" in one)


async def _matching(option: str, pattern: str, names: tuple[str, ...]) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _MATCH),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"LANG": "C.UTF-8"},
    )
    try:
        output, _ = await communicate(process, _REGEX_DEADLINE_S, json.dumps((pattern, names)).encode())
        result = msgspec.json.decode(output, type=list[str] | str)
    except (TimeoutError, msgspec.DecodeError) as error:
        raise InvalidArgument(f"{option}: the expression could not be evaluated: {pattern}") from error
    if isinstance(result, str):
        raise InvalidArgument(f"error parsing regexp: {result}: `{pattern}`")
    return result


def _names(options: Mapping[str, str], option: str) -> list[str]:
    return [name for name in options.get(option, "").split(",") if name]


def _tag_budget() -> TemplateBudget:
    """Return the limits for a tag.

    They are tight, because the tag is in every log line and may quote a command of 2 MiB.
    """
    return TemplateBudget(tokens=2_000, steps=2_000, produced=256 << 10, output=64 << 10)


def _json(out: BoundedText, value: Value) -> None:
    if isinstance(value, Struct):
        value = {name: str(one) for name, one in value.fields.items()}
    if not isinstance(value, Mapping):
        _json_value(out, value)
        return
    out.write("{")
    for number, (name, one) in enumerate(value.items()):
        out.write("," if number else "")
        _json_value(out, name)
        out.write(":")
        _json_value(out, one)
    out.write("}")


def _json_value(out: BoundedText, value: Value) -> None:
    if isinstance(value, str):
        out.write('"')
        out.write_escaped(value, lambda text: json.dumps(text, ensure_ascii=False)[1:-1])
        out.write('"')
    else:
        out.write(json.dumps(value))


def _pad(text: str, before: Value, after: Value) -> str:
    left, right = _count(before), _count(after)
    return f"{' ' * left}{text}{' ' * right}" if text else text


def _truncate(text: str, length: Value) -> str:
    return text[: _count(length)]


def _count(value: Value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _COUNT_MAX:
        raise CallError(f"expected a number from 0 to {_COUNT_MAX}")
    return value


_FUNCTIONS: Mapping[str, Function] = {
    "json": Function(_json, 1, writes=True),
    "lower": Function(str.lower, 1, texts=1),
    "upper": Function(str.upper, 1, texts=1),
    "title": Function(lambda text: text.title(), 1, texts=1),
    "pad": Function(_pad, 3, texts=1),
    "truncate": Function(_truncate, 2, texts=1),
}

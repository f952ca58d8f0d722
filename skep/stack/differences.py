"""Compares two specs of a service field by field.  Pure."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.api.formats.service_form import with_defaults
from skep.model.container import ConfigReference, SecretReference
from skep.model.service import ServiceSpec
from skep.model.values.encoding import to_json

_AMBIGUOUS: Final = re.compile(r"[\s'\"]")
_MAPPINGS: Final = ("Labels", "Options", "DriverOpts", "Sysctls")
"""Fields with names and values that users choose.  A name without a value differs from a missing name."""
_HIDDEN: Final = frozenset({"SecretID", "ConfigID"})
"""Ids in references.  They are not compared, because they follow from the names."""


class Difference(msgspec.Struct, frozen=True):
    """A changed field of a spec: its path, and both values as text, empty if unset."""

    path: str
    before: str
    after: str

    @property
    def restarts(self) -> bool:
        """Return whether the change replaces all tasks.  A changed placement moves only tasks that no longer fit."""
        if self.path.startswith("TaskTemplate.Placement."):
            return False
        return self.path.startswith(("TaskTemplate.", "EndpointSpec."))


def differences(before: ServiceSpec, after: ServiceSpec) -> Iterator[Difference]:
    """Yield the fields in which two specs differ, with defaults filled in and unordered lists sorted."""
    old, new = dict(_flat(_comparable(before))), dict(_flat(_comparable(after)))
    for path in [*new, *(path for path in old if path not in new)]:
        if old.get(path) != new.get(path):
            yield Difference(path, old.get(path, ""), new.get(path, ""))


def _comparable(spec: ServiceSpec) -> Mapping[str, Any]:
    spec = with_defaults(spec)
    template = spec.task_template
    container = template.container_spec
    assert container is not None
    template = replace(
        template,
        container_spec=replace(
            container,
            env=tuple(sorted(container.env)),
            secrets=tuple(sorted(container.secrets, key=_reference_key)),
            configs=tuple(sorted(container.configs, key=_reference_key)),
        ),
        networks=tuple(sorted(template.networks, key=lambda one: one.target)),
    )
    endpoint = spec.endpoint_spec
    if endpoint is not None:
        ports = tuple(
            sorted(endpoint.ports, key=lambda one: (one.published_port, one.target_port, one.protocol))
        )
        spec = replace(spec, endpoint_spec=replace(endpoint, ports=ports))
    decoded = msgspec.json.decode(to_json(replace(spec, task_template=template)))
    assert isinstance(decoded, dict)
    return decoded


def _reference_key(reference: SecretReference | ConfigReference) -> tuple[str, str]:
    name = reference.secret_name if isinstance(reference, SecretReference) else reference.config_name
    return name, reference.file.name if reference.file is not None else ""


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and value of each leaf of a spec.  A list of texts is one leaf.

    Empty values are left out, except the values of labels and options, and the mode, whose name is its value.
    """
    match value:
        case dict() if not value and path.startswith("Mode."):
            yield path, "true"
        case dict():
            for key, one in value.items():
                if one == "" and path.endswith(_MAPPINGS):
                    yield f"{path}.{key}", _word(one)
                elif key not in _HIDDEN:
                    yield from _flat(one, f"{path}.{key}" if path else key)
        case list() if value and all(isinstance(one, str) for one in value):
            yield path, " ".join(map(_word, value))
        case list():
            for at, one in enumerate(value):
                yield from _flat(one, f"{path}[{at}]")
        case None | "" | 0 | False:
            return
        case True:
            yield path, "true"
        case _:
            yield path, str(value)


def _word(text: str) -> str:
    """Return a text so that lists of other texts are other texts once they are joined with spaces."""
    return shlex.quote(text) if not text or _AMBIGUOUS.search(text) else text

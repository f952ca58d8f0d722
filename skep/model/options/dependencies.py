"""Dependencies between services: the label ``skep.depends-on`` delays a service's tasks.

The value is ``NAME=CONDITION`` for each service it depends on, separated by commas.  A condition may be followed by
``+restart`` (an update of that service restarts this one) and ``+optional`` (do not wait for a service that does not
exist or that fails).  Names are service names and not ids, because a service may be removed and created again.

Source: compose-spec, 05-services.md (depends_on), which defines the conditions.
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final

import msgspec

from skep.errors import InvalidArgument

DEPENDS_ON: Final = "skep.depends-on"
WAITS_FOR: Final = "waits for "
"""A task that waits for a service has an error that starts with these words."""
DOES_NOT_EXIST: Final = ", which does not exist"
HAS_FAILED: Final = ", which has failed"
IS_STOPPED: Final = ", which is stopped"
HAS_ENDED: Final = ", which has ended"
"""The error ends with these words if the other service cannot become ready."""
DEPENDENCIES_MAX: Final = 100
"""Largest number of dependencies of one service."""
_RESTART: Final = "restart"
_OPTIONAL: Final = "optional"


class DependencyCondition(Enum):
    """The required state of the other service."""

    STARTED = "service_started"
    HEALTHY = "service_healthy"
    COMPLETED = "service_completed_successfully"

    @property
    def words(self) -> str:
        """Return the words that follow ``waits for db`` in a task's error."""
        match self:
            case DependencyCondition.STARTED:
                return "to be started"
            case DependencyCondition.HEALTHY:
                return "to be healthy"
            case DependencyCondition.COMPLETED:
                return "to complete"


class Dependency(msgspec.Struct, frozen=True):
    """One dependency.  ``service`` is a name.  If ``restarts``, that service's updates restart this one."""

    service: str
    condition: DependencyCondition = DependencyCondition.STARTED
    is_required: bool = True
    restarts: bool = False

    @property
    def key(self) -> str:
        """The service's name in lower case.  Names that differ only in case are equal."""
        return self.service.lower()

    @property
    def text(self) -> str:
        """The dependency as it is written in the label."""
        options = [_RESTART] * self.restarts + [_OPTIONAL] * (not self.is_required)
        return "+".join([f"{self.service}={self.condition.value}", *options])


def is_wait(error: str) -> bool:
    """Return whether ``error`` of a task says that it waits for a service that may still become ready.

    During such a wait, the progress deadline of an update is suspended.  It keeps running while a task waits for a
    service that does not exist or for a job that was given up, because that wait could be endless.
    """
    return error.startswith(WAITS_FOR) and not endless_wait(error)


def endless_wait(error: str) -> str:
    """Return ``error`` of a task if it waits for a service that cannot become ready without a user's action, else an
    empty string.
    """
    ends = (DOES_NOT_EXIST, IS_STOPPED, HAS_FAILED, HAS_ENDED)
    return error if error.startswith(WAITS_FOR) and error.endswith(ends) else ""


def label_of(dependencies: Iterable[Dependency]) -> dict[str, str]:
    """Return the label with the dependencies, or no label without dependencies."""
    text = ",".join(one.text for one in sorted(dependencies, key=lambda one: one.service))
    return {DEPENDS_ON: text} if text else {}


def dependencies_of(labels: Mapping[str, str]) -> tuple[Dependency, ...]:
    """Return the dependencies in a service's labels, or none if the label is invalid."""
    try:
        return parsed_dependencies(labels)
    except InvalidArgument:
        return ()


def parsed_dependencies(labels: Mapping[str, str]) -> tuple[Dependency, ...]:
    """Return the dependencies in a service's labels.  Raises: InvalidArgument: the label is invalid."""
    text = labels.get(DEPENDS_ON)
    if text is None:
        return ()
    made = tuple(_dependency(part, text) for part in text.split(",", DEPENDENCIES_MAX - 1))
    if len({one.service for one in made}) < len(made):
        raise InvalidArgument(f"invalid label {DEPENDS_ON}={text}: it names a service twice")
    return made


def _dependency(part: str, text: str) -> Dependency:
    name, _, rest = part.partition("=")
    word, *options = rest.split("+")
    try:
        condition = DependencyCondition(word)
    except ValueError:
        condition = None
    if not name or condition is None or not {_RESTART, _OPTIONAL}.issuperset(options):
        raise InvalidArgument(
            f"invalid label {DEPENDS_ON}={text}: expected SERVICE=CONDITION[+{_RESTART}][+{_OPTIONAL}],... with one of "
            f"{', '.join(one.value for one in DependencyCondition)}, at most {DEPENDENCIES_MAX} services"
        )
    return Dependency(name, condition, _OPTIONAL not in options, _RESTART in options)

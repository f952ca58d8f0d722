"""Autoscaling of a service: the settings in its labels, and the leader's last action.

``skep.autoscale=2..10`` enables it.  The other labels set the measures and the delay.
"""

import re
from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.service import REPLICAS_MAX, ReplicatedService, ServiceMode, ServiceSpec
from skep.model.values.times import SECOND_NS, duration_ns

AUTOSCALE: Final = "skep.autoscale"
"""Label of replicated services with the smallest and largest number of tasks, such as ``2..10``."""
AUTOSCALE_CPU: Final = "skep.autoscale.cpu"
"""Label with the CPU target in percent of a task's limit.  Without a limit, of its reservation, and without both, of
one processor.
"""
AUTOSCALE_MEMORY: Final = "skep.autoscale.memory"
"""Label with the memory target in percent of a task's limit."""
AUTOSCALE_DOWN_AFTER: Final = "skep.autoscale.down-after"
"""Label with the time for which fewer tasks must suffice before autoscaling removes tasks."""
_LABELS: Final = (AUTOSCALE, AUTOSCALE_CPU, AUTOSCALE_MEMORY, AUTOSCALE_DOWN_AFTER)

CPU_DEFAULT: Final = 70
CPU_MAX: Final = 1000
"""Largest CPU target in percent.  It exceeds 100 because a task without a limit can use more than it reserves, or more
than one processor.
"""
DOWN_AFTER_DEFAULT_S: Final = 300.0
"""Seconds of low load before a service shrinks.  Source: Kubernetes' default for its autoscaler."""
DOWN_AFTER_S_MIN, DOWN_AFTER_S_MAX = 15.0, 24 * 3600.0
"""Smallest and largest value of that label.  Usage is averaged over 10 s, so a shorter time would depend on a single
average.
"""
_ONE_CPU: Final = 1_000_000_000
_NANO_CPUS_MAX: Final = 4096 * _ONE_CPU
"""No machine has more processors, so a report of more is ignored."""
_MEMORY_BYTES_MAX: Final = 1 << 50
"""No machine has more memory, so a report of more is ignored."""
_RANGE: Final = re.compile(r"([0-9]{1,6})\.\.([0-9]{1,6})")
_PERCENT: Final = re.compile(r"([0-9]{1,4})%?")


class Autoscaling(msgspec.Struct, frozen=True, kw_only=True):
    """The parsed labels of a service.  ``cpu`` and ``memory`` are targets in percent, or None if not measured."""

    least: int
    most: int
    cpu: int | None = CPU_DEFAULT
    memory: int | None = None
    down_after_s: float = DOWN_AFTER_DEFAULT_S

    def clamped(self, replicas: int) -> int:
        """Return the nearest number within the range."""
        return min(max(replicas, self.least), self.most)


class TaskUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One task's resource use, as measured by its node.

    ``nano_cpus`` is averaged over some seconds.  ``memory_bytes`` excludes caches that the kernel can reclaim at once.
    """

    nano_cpus: int
    memory_bytes: int

    @property
    def is_plausible(self) -> bool:
        """Return whether a machine can use that much.  Nodes are not trusted, and may report any number."""
        return 0 <= self.nano_cpus <= _NANO_CPUS_MAX and 0 <= self.memory_bytes <= _MEMORY_BYTES_MAX


def autoscaling_of(labels: Mapping[str, str]) -> Autoscaling | None:
    """Return the settings in a service's labels, or None if they are missing or invalid."""
    if (
        AUTOSCALE not in labels
    ):  # Most services have no such label, and every loop over services calls this function.
        return None
    try:
        return parsed_autoscaling(labels)
    except InvalidArgument:
        return None


def check_autoscaling(spec: ServiceSpec) -> None:
    """Check the service's autoscaling labels.  Raises: InvalidArgument: they cannot be applied."""
    given = [name for name in spec.labels if name == AUTOSCALE or name.startswith(f"{AUTOSCALE}.")]
    if not given:
        return
    for name in given:
        if name not in _LABELS:
            raise InvalidArgument(f"unknown label {name}: expected one of {', '.join(_LABELS)}")
    if AUTOSCALE not in spec.labels:
        raise InvalidArgument(f"the label {given[0]} needs {AUTOSCALE}, such as {AUTOSCALE}=2..10")
    if spec.mode.name != "replicated":
        raise InvalidArgument(
            f"the label {AUTOSCALE} is for replicated services, not for a {spec.mode.name} one"
        )
    if parsed_autoscaling(spec.labels).memory is not None and not memory_of_a_task(spec):
        raise InvalidArgument(f"the label {AUTOSCALE_MEMORY} is a percentage of the memory limit: set one")


def nano_cpus_of_a_task(spec: ServiceSpec) -> int:
    """Return the CPU that counts as 100 %: the limit, else the reservation, else one processor."""
    resources = spec.task_template.resources
    if resources is None:
        return _ONE_CPU
    given = [one.nano_cpus for one in (resources.limits, resources.reservations) if one is not None]
    return next(filter(None, given), _ONE_CPU)


def memory_of_a_task(spec: ServiceSpec) -> int:
    """Return the memory that counts as 100 %: the limit, or 0 without a limit."""
    resources = spec.task_template.resources
    return resources.limits.memory_bytes if resources is not None and resources.limits is not None else 0


def with_replicas(spec: ServiceSpec, replicas: int) -> ServiceSpec:
    """Return the spec of a replicated service with another number of tasks."""
    return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)))


def with_number_kept(spec: ServiceSpec, present: ServiceSpec | None) -> ServiceSpec:
    """Return the autoscaled spec with a number of tasks.  If it has none, it gets the present number, or the smallest
    for a new service.
    """
    scaling = autoscaling_of(spec.labels)
    replicated = spec.mode.replicated
    if scaling is None or replicated is None or replicated.replicas is not None:
        return spec
    if present is None or present.mode.replicated is None:
        return with_replicas(spec, scaling.least)
    return with_replicas(spec, scaling.clamped(present.given_replicas) if present.given_replicas else 0)


def with_present_number(spec: ServiceSpec, present: ServiceSpec) -> ServiceSpec:
    """Return the new spec of a deploy.  If the service was and stays autoscaled, it keeps the number of tasks that
    autoscaling chose.
    """
    if autoscaling_of(spec.labels) is not None and autoscaling_of(present.labels) is not None:
        return with_replicas(spec, present.given_replicas) if spec.mode.name == present.mode.name else spec
    return with_number_kept(spec, present)


def parsed_autoscaling(labels: Mapping[str, str]) -> Autoscaling:
    """Parse the labels.  Raises: InvalidArgument: one of them is invalid."""
    text = labels[AUTOSCALE]
    match = _RANGE.fullmatch(text)
    if match is None or not match[0].isascii():
        raise InvalidArgument(
            f"invalid label {AUTOSCALE}={text}: expected the fewest and the most tasks, like 2..10"
        )
    least, most = int(match[1]), int(match[2])
    if not least:
        raise InvalidArgument(
            f"invalid label {AUTOSCALE}={text}: autoscaling never scales to zero, expected at least 1"
        )
    if not least <= most <= REPLICAS_MAX:
        raise InvalidArgument(
            f"invalid label {AUTOSCALE}={text}: expected the smaller number first, and at most {REPLICAS_MAX}"
        )
    memory = _percent(labels, AUTOSCALE_MEMORY, 100)
    cpu = _percent(labels, AUTOSCALE_CPU, CPU_MAX)
    if cpu is None and memory is None:
        cpu = CPU_DEFAULT
    return Autoscaling(least=least, most=most, cpu=cpu, memory=memory, down_after_s=_down_after_s(labels))


def _percent(labels: Mapping[str, str], name: str, largest: int) -> int | None:
    text = labels.get(name)
    if text is None:
        return None
    match = _PERCENT.fullmatch(text)
    if match is None or not text.isascii() or not 1 <= int(match[1]) <= largest:
        raise InvalidArgument(f"invalid label {name}={text}: expected a percentage from 1 to {largest}")
    return int(match[1])


def _down_after_s(labels: Mapping[str, str]) -> float:
    text = labels.get(AUTOSCALE_DOWN_AFTER)
    if text is None:
        return DOWN_AFTER_DEFAULT_S
    duration = duration_ns(text)
    if duration is None or not DOWN_AFTER_S_MIN * SECOND_NS <= duration <= DOWN_AFTER_S_MAX * SECOND_NS:
        raise InvalidArgument(
            f"invalid label {AUTOSCALE_DOWN_AFTER}={text}: expected a duration from "
            f"{DOWN_AFTER_S_MIN:g}s to {DOWN_AFTER_S_MAX / 3600:g}h"
        )
    return duration / SECOND_NS

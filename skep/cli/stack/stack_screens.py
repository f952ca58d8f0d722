"""Output of the stack commands."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import Any, Final

import click
import yaml

from skep.cli.formatting import age, size
from skep.cli.output import Screen, Shown, table
from skep.cli.running import say, without_code
from skep.model.needs import CPU_NANO, host_ports
from skep.model.options.labels import STACK_FILES, STOPPED
from skep.model.options.schedules import CRON, JOB_MODES
from skep.model.service import ServiceSpec
from skep.model.staging.updates import BLUE_GREEN, UPDATE, stages_of
from skep.model.task_end import printable
from skep.model.values.counts import counted
from skep.model.values.times import exact_duration
from skep.stack.compose.document import SCALAR_TAG, FileProblem, YamlNode, resolved
from skep.stack.differences import Difference, differences
from skep.stack.planning import (
    PlacementRefusal,
    PlanAction,
    PlannedChange,
    PredictedPlacement,
    StackPlan,
)
from skep.stack.progress import FAILURES_MAX
from skep.stack.project import IMAGE, Stack
from skep.stack.revisions import StackRevision

_COLORS = {PlanAction.CREATE: "green", PlanAction.UPDATE: "yellow", PlanAction.REMOVE: "red"}
_IMAGE_PATH = "TaskTemplate.ContainerSpec.Image"
_CONSTRAINTS = "TaskTemplate.Placement.Constraints"
_TIMES = frozenset(
    {"Interval", "Timeout", "StartPeriod", "StartInterval", "Delay", "Monitor", "Window", "StopGracePeriod"}
)
_BYTES = frozenset({"MemoryBytes", "SizeBytes", "SwapBytes"})
_VALUE_MAX = 60
"""Characters of a value in a plan."""
_UNBROKEN: Final = 1 << 20
"""Width of YAML lines, large enough to keep texts on one line."""
_NODES_MAX = 8
"""Maximum number of nodes that are named for one service."""


def warn(warning: FileProblem | str) -> None:
    text = printable(without_code(str(warning)))
    click.echo(f"{click.style('Warning', fg='yellow')}: {text}", err=True)


class ProgressPrinter:
    """Prints progress lines on stderr when they change."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def show(self, name: str, text: str) -> None:
        if self._shown.get(name) != text:
            self._shown[name] = text
            say(f"{name}: {text}")


max_failures = click.option(
    "--max-failures",
    type=click.IntRange(0),
    default=FAILURES_MAX,
    show_default=True,
    metavar="N",
    help="Stop waiting after N failures of a task in a row. 0: never stop.",
)
"""Option of commands that wait for services."""


def planned(plan: StackPlan, unfinished: Mapping[str, str] = MappingProxyType({})) -> Shown:
    """Return the output of a plan, with exit code 2 if it changes anything.

    ``unfinished``: progress of services that do not run with their spec, by name.
    """
    rows = [
        {
            "Action": one.action.name.lower(),
            "Kind": one.kind,
            "Name": one.name,
            "Restarts": one.restarts,
            "Placement": plan.placements.get(one.name) if one.kind == "service" else None,
            "Differences": [_fields(each) for each in one.differences],
        }
        for one in plan.effective
    ]
    return Shown(
        data=rows,
        rows=rows,
        lines=lambda screen: iter([*lines_of(plan, is_wide=screen.is_wide), *_unfinished_lines(unfinished)]),
        exit_code=2 if rows else 0,
    )


def _unfinished_lines(unfinished: Mapping[str, str]) -> list[str]:
    lines = [click.style(printable(f"  {name}: {text}"), fg="red") for name, text in unfinished.items()]
    return [*lines, f"  Next: skep explain {next(iter(unfinished))}"] if lines else []


def dumped(document: YamlNode) -> str:
    """Return a Compose document as YAML that can be read again, with ``$$`` for each dollar sign."""
    return str(
        yaml.serialize(document.as_yaml(), Dumper=_Dumper, allow_unicode=True, width=_UNBROKEN)
    ).rstrip()


class _Dumper(yaml.SafeDumper):
    """Quotes texts that would not be read as text, by the rules of Compose (``document.resolved``) or of YAML 1.1."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and not isinstance(resolved(value), str):
            return SCALAR_TAG
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


def compared(one: Stack, other: Stack) -> Shown:
    """Return the differences between the services of two revisions."""
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[Difference]] = {}
    for name in sorted({*one.services, *other.services}):
        if name not in one.services or name not in other.services:
            is_gone, found = name in one.services, []
            action = PlanAction.REMOVE if is_gone else PlanAction.CREATE
        else:
            found = list(differences(one.services[name].spec, other.services[name].spec))
            action = PlanAction.UPDATE
        if found or action is not PlanAction.UPDATE:
            rows.append(
                {
                    "Action": action.name.lower(),
                    "Service": name,
                    "Differences": [_fields(each) for each in found],
                }
            )
            lines[f"{action.value} {name}"] = found

    def shown(screen: Screen) -> Iterator[str]:
        for line, found in lines.items():
            yield line
            yield from (f"    {line_of(each, is_wide=screen.is_wide)}" for each in _worth_a_line(found))

    return Shown(data=rows, rows=rows, lines=shown)


def differing(one: ServiceSpec, other: ServiceSpec) -> Shown:
    """Return the differences between two specs of a service."""
    found = list(differences(one, other))
    rows = [_fields(each) for each in found]
    return Shown(
        data=rows,
        rows=rows,
        lines=lambda screen: (line_of(each, is_wide=screen.is_wide) for each in _worth_a_line(found)),
    )


def _fields(difference: Difference) -> Mapping[str, str]:
    return {"Path": difference.path, "Before": difference.before, "After": difference.after}


def _worth_a_line(found: Sequence[Difference]) -> Iterator[Difference]:
    """Return the differences without the label that repeats the image of the file, if the image also changes."""
    has_image = any(each.path == _IMAGE_PATH for each in found)
    return (each for each in found if not (has_image and each.path == f"Labels.{IMAGE}"))


def shortened(before: str, after: str) -> tuple[str, str]:
    """Return both values, cut around their first difference if one is long."""
    if max(len(before), len(after)) <= _VALUE_MAX:
        return before, after
    pairs = zip(before, after, strict=False)
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(before), len(after)))
    begin = max(same - _VALUE_MAX // 3, 0) if same > _VALUE_MAX // 2 else 0
    return _cut(before, begin), _cut(after, begin)


def _cut(text: str, begin: int) -> str:
    end = begin + _VALUE_MAX
    return f"{'...' if begin else ''}{text[begin:end]}{'...' if len(text) > end else ''}"


def lines_of(plan: StackPlan, *, is_wide: bool = False) -> list[str]:
    """Return the lines of a plan for a terminal: one for each object, and one for each changed field.

    ``is_wide``: do not cut long values.
    """
    effective = plan.effective
    if not effective:
        return [f"Stack {plan.stack} is up to date."]
    counts = [
        f"{counted(len(found), 'object')} to {verb}"
        for verb, action in (
            ("create", PlanAction.CREATE),
            ("update", PlanAction.UPDATE),
            ("remove", PlanAction.REMOVE),
        )
        if (found := [one for one in effective if one.action is action])
    ]
    made = [f"Stack {plan.stack}: {', '.join(counts)}"]
    for one in effective:
        made.append(
            click.style(printable(f"  {one.action.value} {one.kind} {one.name}"), fg=_COLORS[one.action])
            + printable(_note(one))
        )
        made += [
            printable(f"      {line_of(each, is_wide=is_wide)}") for each in _worth_a_line(one.differences)
        ]
        if (placement := plan.placements.get(one.name)) is not None and one.kind == "service":
            made += [f"      {line}" for line in placement_lines(placement)]
    return made


def placement_lines(placement: PredictedPlacement) -> list[str]:
    """Return lines about a service's predicted placement, or why not all tasks fit, without control characters."""
    shares = sorted(placement.nodes, key=lambda one: (-one.tasks, one.hostname))
    is_even = all(one.tasks == 1 for one in shares)
    named = printable(
        ", ".join(
            one.hostname if is_even else f"{one.tasks} on {one.hostname}" for one in shares[:_NODES_MAX]
        )
    )
    others = f" and {len(shares) - _NODES_MAX} more nodes" if len(shares) > _NODES_MAX else ""
    fitting = sum(one.tasks for one in shares)
    where = (f" on {named}{others}" if is_even else f": {named}{others}") if named else ""
    stopped = ", ".join(f"{counted(one.tasks, 'task')} of {one.name}" for one in placement.preempted)
    preempts = [click.style(f"preempts {printable(stopped)}", fg="yellow")] if stopped else []
    if not placement.error:
        return [f"{counted(placement.desired, 'task')}{where}", *preempts] if placement.desired else []
    if not placement.desired:
        return [click.style(f"would be refused: {printable(placement.error)}", fg="red")]
    kind, next_to = ("new task", f", next to {placement.old} old") if placement.old else ("task", "")
    head = f"does not fit: {fitting} of {counted(placement.desired, kind)} would run{where}{next_to}"
    lines = [click.style(head, fg="red"), *preempts, f"  {printable(placement.error)}"]
    return lines + [printable(f"  {name}: {reason}") for name, reason in _refusals(placement.verdicts)]


def _refusals(verdicts: Sequence[PlacementRefusal]) -> list[tuple[str, str]]:
    """Return each node's reasons, or the common reasons once if they are the same on all nodes."""
    if len(verdicts) > 1 and len({one.reasons for one in verdicts}) == 1:
        return [(f"all {len(verdicts)} nodes", reason) for reason in verdicts[0].reasons]
    return [(one.hostname, reason) for one in verdicts[:_NODES_MAX] for reason in one.reasons]


def revisions(found: Sequence[StackRevision], now: float) -> Shown:
    """Return the list of a stack's revisions.  ``now``: seconds since the epoch."""
    rows = [
        {"Revision": one.number, "Deployed": one.created_at, "Changes": one.changes, "State": one.state}
        for one in found
    ]
    cells = [(str(one.number), f"{age(one.created_at, now)} ago", one.changes, one.state) for one in found]
    head = ("REVISION", "DEPLOYED", "CHANGES", "STATE")
    return Shown(data=rows, rows=rows, lines=lambda screen: table(head, cells, screen))


def line_of(difference: Difference, *, is_wide: bool = False) -> str:
    """Return a line with a field of a spec, before and after."""
    field = difference.path.rpartition(".")[2]
    before, after = (_value(field, text) for text in (difference.before, difference.after))
    if not is_wide:
        before, after = shortened(before, after)
    return f"{_field(difference.path)}: {before or '(unset)'} -> {after or '(unset)'}"


def _value(field: str, text: str) -> str:
    """Return a value on one line, with its unit if it is a number of nanoseconds, bytes or billionths of a CPU."""
    if text.isdecimal():
        if field in _TIMES:
            return exact_duration(int(text))
        if field in _BYTES:
            return size(int(text))
        if field == "NanoCPUs":
            return counted(int(text) / CPU_NANO, "CPU")
    return text.replace("\n", "\\n")


_STOPPED = f"Labels.{STOPPED}"


def _note(change: PlannedChange) -> str:
    if change.action is not PlanAction.UPDATE:
        return ""
    if change.spec is not None and change.spec.mode.name in JOB_MODES:
        has_schedule = CRON in change.spec.labels
        return (
            "   applies from its next run on"
            if has_schedule
            else "   stops its last run, and starts a new one"
        )
    if not change.restarts:
        for each in change.differences:
            if each.path == _STOPPED:
                return "   stops all tasks" if each.after.lower() == "true" else "   starts its tasks"
        moves = any(each.path.startswith(_CONSTRAINTS) for each in change.differences)
        return "   replaces only tasks on nodes that no longer fit" if moves else "   restarts no tasks"
    config = change.spec.update_config if change.spec is not None else None
    at_once = config.parallelism if config is not None else 1
    order = (
        "starting new tasks first"
        if config is not None and config.order is not None and config.order.value == "start-first"
        else "stopping old tasks first"
    )
    if order.startswith("starting") and change.spec is not None and host_ports(change.spec):
        order = "starting new tasks first, or stopping old ones if no other node has a free host port"
    causes = dict.fromkeys(
        _field(each.path).partition("[")[0] for each in change.differences if each.restarts
    )
    if change.keeps_old:
        return (
            f"   ends its update: old tasks stay, and new ones are replaced, because of {', '.join(causes)}"
        )
    how = _staged(change.spec) if change.spec is not None else ""
    how = how or f"{at_once or 'all'} at a time, {order}"
    return f"   replaces tasks, {how}, because of {', '.join(causes)}"


def _staged(spec: ServiceSpec) -> str:
    """Return how a staged update replaces tasks, or an empty text for an ordinary update."""
    stages = stages_of(spec.labels)
    if not stages:
        return ""
    end = f"skep update promote {spec.name}" if stages[0].least_s == inf else ""
    if spec.labels[UPDATE] == BLUE_GREEN:
        return f"starting all new tasks, which get connections {f'at {end}' if end else 'once all run'}"
    shares = ", ".join(f"{stage.percent} %" for stage in stages if stage.percent is not None)
    return f"in steps of new connections ({shares}){f', each until {end}' if end else ''}"


def _field(path: str) -> str:
    path = path.removeprefix("TaskTemplate.").removeprefix("ContainerSpec.")
    return "mounted files" if path == f"Labels.{STACK_FILES}" else path

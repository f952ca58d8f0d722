"""Changes that ``skep top`` can make, and their descriptions.  Pure, except for ``perform``."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from skep.api.client.client import ApiClient
from skep.api.client.updates import update
from skep.cli.stack.stack_screens import line_of
from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.service import ServiceSpec
from skep.model.values.counts import counted
from skep.model.values.unknown import leniently
from skep.stack.differences import differences
from skep.top.snapshot import Snapshot, mode_of, tasks_of

_RESPONSE_TIMEOUT_S = 20.0
"""Timeout of one change in seconds."""
_NAMED_MAX = 5
"""Largest number of fields that a question names."""
_REPLICAS_MAX = 1_000_000
"""Largest number of replicas.  More is a typing error."""


class Action(msgspec.Struct, frozen=True):
    """A change of one object.

    ``title`` is the question, ``consequences`` are sentences about the effects, and ``done`` confirms the change.
    ``change`` returns the new spec for the object's current state, or None if nothing changes.  It raises
    FailedPrecondition if the change would differ from the confirmed one.
    """

    kind: str
    id: str
    title: str
    consequences: tuple[str, ...]
    done: str
    change: Callable[[Mapping[str, Any]], Any]
    query: Mapping[str, str] = {}


async def perform(client: ApiClient, action: Action) -> None:
    """Change the object in its current state.  Raises: SkepError."""
    await update(
        client, f"{action.kind}s", action.id, action.change, timeout_s=_RESPONSE_TIMEOUT_S, query=action.query
    )


def replicas_of(service: Mapping[str, Any]) -> int:
    """Return how many tasks, or completions of a job, the spec requests.

    Raises:
        InvalidArgument: The mode has no number, in Docker's words.
    """
    mode = service["Spec"].get("Mode") or {}
    match mode_of(service):
        case "replicated":
            return int((mode.get("Replicated") or {}).get("Replicas", 1))
        case "job":
            return int(mode["ReplicatedJob"].get("TotalCompletions") or 0)
    raise InvalidArgument("scale can only be used with replicated or replicated-job mode")


def scale(service: Mapping[str, Any], typed: str) -> Action:
    """Return an action that scales a service.

    ``typed`` is a number, or a difference with its sign.  Raises: InvalidArgument.
    """
    now = replicas_of(service)
    wanted = _number(typed, now)
    name, is_job = str(service["Spec"]["Name"]), mode_of(service) == "job"
    noun = "completion" if is_job else "replica"
    if wanted == now:
        raise InvalidArgument(f"{name} already has {counted(now, noun)}")
    if wanted > now:
        effect = f"Starts {wanted - now} more {'task' if wanted == now + 1 else 'tasks'}."
    else:
        effect = (
            f"Stops {counted(now - wanted, 'task')}, first on the nodes with the most tasks of the service."
        )
    effects = [effect] + (
        ["No tasks remain: the service stops until you scale it up."] if wanted == 0 else []
    )
    return Action(
        "service",
        service["ID"],
        f"Scale {name} from {now} to {counted(wanted, noun)}?",
        tuple(effects),
        f"{name} scaled to {wanted}",
        lambda found: _scaled(found, now, wanted),
    )


def _number(typed: str, now: int) -> int:
    text = typed.strip()
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 7:
        raise InvalidArgument("Enter a number of replicas, +N or -N.")
    number = now + int(text) if text[0] in "+-" else int(text)
    if not 0 <= number <= _REPLICAS_MAX:
        raise InvalidArgument(f"Enter a number from 0 to {_REPLICAS_MAX:,}.")
    return number


def _scaled(service: Mapping[str, Any], shown: int, number: int) -> Mapping[str, Any] | None:
    present = replicas_of(service)
    if present == number:
        return None
    if present != shown:
        raise _changed(service, f"It has {counted(present, 'replica')} now.")
    spec, is_job = service["Spec"], mode_of(service) == "job"
    key, field = ("ReplicatedJob", "TotalCompletions") if is_job else ("Replicated", "Replicas")
    return {**spec, "Mode": {key: {**(spec["Mode"].get(key) or {}), field: number}}}


def image_of(service: Mapping[str, Any]) -> str:
    """Return the image of the service's containers without the digest, or an empty text."""
    container = service["Spec"]["TaskTemplate"].get("ContainerSpec") or {}
    return str(container.get("Image") or "").partition("@")[0]


def update_image(service: Mapping[str, Any], typed: str) -> Action:
    """Return an action that sets the image.  Tasks are replaced even if the image is the same.  Raises:
    InvalidArgument.
    """
    name, image, now = str(service["Spec"]["Name"]), typed.strip(), image_of(service)
    if not now:
        raise InvalidArgument(f"{name} has no image, because it runs no containers")
    if not image or not image.isascii() or not image.isprintable() or " " in image:
        raise InvalidArgument("Enter the name of an image, such as nginx:1.27.")
    same = image == now
    first = "The image stays the same." if same else f"{now} -> {image}"
    return Action(
        "service",
        service["ID"],
        f"Update the image of {name}?",
        (first, *_rollout(service, "UpdateConfig")),
        f"Updating {name}",
        lambda found: _with_image(found, now, image),
    )


def _with_image(service: Mapping[str, Any], shown: str, image: str) -> Mapping[str, Any]:
    spec = service["Spec"]
    template = spec["TaskTemplate"]
    if (present := image_of(service)) != shown:
        raise _changed(service, f"Its image is {present} now.")
    changed = {**template, "ContainerSpec": {**template["ContainerSpec"], "Image": image}}
    if image == shown:
        changed["ForceUpdate"] = int(template.get("ForceUpdate") or 0) + 1
        changed["ContainerSpec"] = template["ContainerSpec"]
    return {**spec, "TaskTemplate": changed}


def _rollout(service: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Describe how tasks are replaced, by the update or rollback settings of the service's spec."""
    settings = service["Spec"].get(key) or {}
    tasks = int((service.get("ServiceStatus") or {}).get("DesiredTasks") or 0)
    parallelism = int(settings.get("Parallelism", 1))
    order = (
        "starting new tasks first" if settings.get("Order") == "start-first" else "stopping old tasks first"
    )
    action = str(settings.get("FailureAction") or "pause")
    return (
        f"Replaces {counted(tasks, 'task')}, {parallelism or 'all'} at a time, {order}.",
        _ON_FAILURE.get(action, f"If a new task fails: {action}."),
    )


def roll_back(service: Mapping[str, Any]) -> Action:
    """Return an action that restores the previous spec, listing changed fields.

    Raises:
        FailedPrecondition: There is no previous spec, in Docker's words.
    """
    name, previous = str(service["Spec"]["Name"]), service.get("PreviousSpec")
    if previous is None:
        raise FailedPrecondition(f"service {name} does not have a previous spec")
    before, after = (
        leniently(msgspec.json.encode(spec), ServiceSpec) for spec in (service["Spec"], previous)
    )
    fields = [line_of(one) for one in differences(before, after)]
    shown = fields[:_NAMED_MAX] + (
        [f"and {len(fields) - _NAMED_MAX} more fields"] if len(fields) > _NAMED_MAX else []
    )
    is_replaced = (before.task_template, before.networks) != (after.task_template, after.networks)
    rollout = _rollout(service, "RollbackConfig") if is_replaced else ("Replaces no tasks.",)
    return Action(
        "service",
        service["ID"],
        f"Roll {name} back to its previous spec?",
        (*(shown or ["The specs are equal."]), *rollout),
        f"Rolling back {name}",
        lambda found: _rolled_back(found, service),
        {"rollback": "previous"},
    )


_ON_FAILURE = {
    "pause": "If a new task fails, the change is paused.",
    "continue": "If a new task fails, the change continues.",
    "rollback": "If a new task fails, the change is rolled back.",
}


def _rolled_back(found: Mapping[str, Any], shown: Mapping[str, Any]) -> Any:
    if (found["Spec"], found.get("PreviousSpec")) != (shown["Spec"], shown["PreviousSpec"]):
        raise _changed(found, "Its spec is different now.")
    return found["Spec"]


def _changed(service: Mapping[str, Any], how: str) -> FailedPrecondition:
    name = service["Spec"]["Name"]
    return FailedPrecondition(f"{name} has changed since you were asked. {how} Nothing was done. Try again.")


def set_availability(snapshot: Snapshot, node: Mapping[str, Any], availability: str) -> Action:
    """Return an action that drains or activates a node.  Raises: InvalidArgument: the node already has that
    availability.
    """
    name = snapshot.node_name(node["ID"])
    if node["Spec"].get("Availability") == availability:
        raise InvalidArgument(f"{name} is already {'drained' if availability == 'drain' else availability}")
    if availability == "drain":
        title, effects = f"Drain {name}?", _drained(snapshot, node["ID"])
    else:
        title = f"Activate {name}?"
        effects = ["The node accepts tasks again.", "Running tasks do not move back to it."]
    return Action(
        "node",
        node["ID"],
        title,
        tuple(effects),
        f"Draining {name}" if availability == "drain" else f"{name} is active",
        lambda found: {**found["Spec"], "Availability": availability},
    )


def _drained(snapshot: Snapshot, id: str) -> list[str]:
    tasks = [task for task in tasks_of(snapshot, node=id) if task.is_active]
    if not tasks:
        return ["The node has no tasks, and gets no new ones."]
    modes = {task.service_id: _mode(snapshot, task.service_id) for task in tasks}
    moving = [task for task in tasks if "global" not in modes[task.service_id]]
    names = [snapshot.task_name(task) for task in tasks]
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    effects = [f"Stops {counted(len(tasks), 'task')}: {', '.join(names[:_NAMED_MAX])}{more}."]
    others = [one for one in snapshot.nodes.values() if one["ID"] != id and _takes_tasks(one)]
    if moving and others:
        elsewhere = "the other node" if len(others) == 1 else f"the other {len(others)} nodes"
        effects.append(f"Starts {counted(len(moving), 'task')} on {elsewhere} if the free resources suffice.")
    elif moving:
        effects.append(f"No other node accepts tasks. {_tasks(len(moving), 'wait')} until one does.")
    if staying := len(tasks) - len(moving):
        effects.append(f"{_tasks(staying, 'stay')} stopped: global services run no replacement elsewhere.")
    return effects


def _tasks(number: int, verb: str) -> str:
    return f"{counted(number, 'task')} {verb}{'s' if number == 1 else ''}"


def _mode(snapshot: Snapshot, id: str) -> str:
    service = snapshot.services.get(id)
    return mode_of(service) if service is not None else "replicated"


def _takes_tasks(node: Mapping[str, Any]) -> bool:
    return bool(node["Status"]["State"] == "ready" and node["Spec"].get("Availability") == "active")

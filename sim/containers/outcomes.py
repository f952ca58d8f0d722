"""Rules that hold as soon as a user has the result of a request, if no other request overlapped it."""

from collections.abc import Iterator, Sequence

import msgspec

from sim.containers.node import BRIDGE, is_up
from sim.containers.rules import CHANGES, STARTING, STOPPING, Request
from sim.containers.world import World
from skep.engine.containers.container import Container, ContainerEvent, ContainerState, NotRunning
from skep.errors import NotFound
from skep.model.networks.sandbox import NetworkMode


class Outcome(msgspec.Struct, frozen=True):
    """The result of a request, and what its user sees of the container."""

    request: Request
    result: object
    """The result, or the error."""
    before: Container | None
    """The container when the request was sent, or None if it did not exist."""
    after: Container | None
    """The container when the result arrived, or None if it does not exist."""
    is_idle: bool
    """Whether nothing changes the container at this moment."""
    events: Sequence[ContainerEvent]
    """The node's events since the request was sent."""

    @property
    def is_done(self) -> bool:
        """Whether the request has succeeded."""
        return not isinstance(self.result, Exception)


def contradictions(world: World, outcome: Outcome) -> Iterator[str]:
    """Yield how the container and its events contradict the result."""
    request, before, after = outcome.request, outcome.before, outcome.after
    if before is None:
        return
    for text in (
        *_untold(world, outcome, before),
        *(_changed(outcome, before, after) if after is not None and request.kind in CHANGES else ()),
        *(_networks_changed(world, outcome, before, after) if after is not None else ()),
        *_kept(world, outcome, before),
        *_exec_accepted(outcome, before),
    ):
        yield f"{request.id[:4]}: {request.kind} {'done' if outcome.is_done else 'refused'}, but {text}"


def _changed(outcome: Outcome, before: Container, after: Container) -> Iterator[str]:
    """A change that was done is in the record.  A refused one is not, and the container keeps its name."""
    request = outcome.request
    if request.kind == "rename" and after.name != (request.wanted if outcome.is_done else before.name):
        yield f"its name is {after.name}"
    if request.kind == "update":
        expected = request.wanted if outcome.is_done else before.config.pids
        if after.config.pids != expected:
            yield f"its limit is {after.config.pids}"


def _networks_changed(world: World, outcome: Outcome, before: Container, after: Container) -> Iterator[str]:
    """A change of networks changes the networks, and the files of a run that name them.  One name counts on all."""
    request, id = outcome.request, outcome.request.id
    if request.kind == "rename" and is_up(after) and ("name", id) not in world.unfreed:
        others = set(world.networks.get(id, {}).values()) - {after.name}
        if others and outcome.is_idle:
            yield f"it is {', '.join(sorted(others))} on its networks"
    if request.kind not in ("connect", "disconnect") or not outcome.is_done:
        return
    is_wanted = request.kind == "connect"
    if (request.wanted in _networks(before)) == is_wanted:
        yield "its networks were as wanted before"
    if (request.wanted in _networks(after)) != is_wanted:
        yield "its networks are not as wanted"
    named = tuple(one.network_id for one in after.sandbox.endpoints) if after.sandbox is not None else ()
    is_same_run = is_up(before) and is_up(after) and before.process == after.process
    is_written = ("name files", id) not in world.unfreed
    if is_same_run and is_written and outcome.is_idle and world.name_files[id] != named:
        yield "its name files are those of other networks"


def _networks(container: Container) -> set[str]:
    if container.plain is None:
        return set()
    bridge = {BRIDGE} if container.plain.mode is NetworkMode.BRIDGE else set()
    return {one.network for one in container.plain.networks} | bridge


def _kept(world: World, outcome: Outcome, before: Container) -> Iterator[str]:
    """A failed start, a retirement and a removal free everything that only a run needs."""
    request, after = outcome.request, outcome.after
    retires = request.kind == "retire" and outcome.is_done and _waits(before)
    if retires and after is not None and not after.is_retired:
        yield "it may still be started"
    failed = (
        request.kind in STARTING
        and not outcome.is_done
        and after is not None
        and after.state in (ContainerState.CREATED, ContainerState.EXITED)
        and after.error != ""
        and after.sandbox is None
    )
    removed = request.kind == "remove" and outcome.is_done
    if (retires or failed or removed) and outcome.is_idle:
        yield from (f"its {what} is left" for what in world.held_by(request.id))


def _waits(container: Container) -> bool:
    return container.plain is None and container.state is ContainerState.CREATED


def _exec_accepted(outcome: Outcome, before: Container) -> Iterator[str]:
    """An exec is refused as such while the container does not run."""
    may_run = before.state is ContainerState.RUNNING or before.is_restarting or before.process is not None
    if (
        outcome.request.kind == "exec"
        and not may_run
        and not isinstance(outcome.result, NotRunning | NotFound)
    ):
        yield f"it did not run: {outcome.result}"


def _untold(world: World, outcome: Outcome, before: Container) -> Iterator[str]:
    """``docker events`` shows each change that a request has made."""
    request, after = outcome.request, outcome.after
    if not outcome.is_done:
        return
    id, expected = request.id, ""
    actions = {one.action for one in outcome.events if one.container_id == id}
    match request.kind:
        case "rename" | "pause" | "unpause":
            expected = request.kind
        case "update" if before.config.pids != request.wanted:
            expected = "update"
        case "remove":
            expected = "destroy"
        case kind if kind in STARTING and world.starts[id] > request.starts_before:
            expected = "start"
        case kind if kind in STOPPING and is_up(before) and after is not None and not is_up(after):
            expected = "die"
        case "connect" | "disconnect" if is_up(before) and after is not None and is_up(after):
            expected = request.kind
            actions = {one.action for one in outcome.events if one.attributes.get("container") == id}
    if expected and expected not in actions:
        yield f"there is no event {expected}"

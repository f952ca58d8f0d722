"""Rules that hold for the containers of a node once faults and requests have ended."""

from collections.abc import Iterator, Sequence

import msgspec

from sim.containers.node import BRIDGE, WARNINGS, is_up
from sim.containers.world import World
from skep.engine.containers.container import Container, ContainerEvent, ContainerState, HealthStatus
from skep.model.networks.sandbox import NetworkMode
from skep.model.values.ids import ContainerId
from skep.model.values.times import SECOND_NS, unix_ns

PROBED_S_MAX = 120.0
"""Seconds between two probes at most: interval, deadline, and the wait for a killed probe."""
HEALTH_EVENT = "health_status: "
STARTING = frozenset({"start", "restart"})
STOPPING = frozenset({"stop", "kill"})
CHANGES = frozenset({"rename", "update", "connect", "disconnect"})
DECISIVE = STARTING | STOPPING | {"remove", "signal"}
"""Requests that decide whether a container runs.  A process may ignore a signal."""


class Request(msgspec.Struct):
    """One request of a user."""

    kind: str
    id: ContainerId
    issued_s: float
    starts_before: int = 0
    """Runs of the container so far."""
    ended_s: float = float("inf")
    wanted: str | int = ""
    """The name, network or limit that it asks for."""
    is_forced: bool = False
    """Whether it removes a container that runs."""
    outcome: str = "unknown"
    """``done``, ``refused``, or ``unknown`` after a crash or a disconnect."""

    def overlaps(self, other: "Request") -> bool:
        """Return whether both were in progress at one time."""
        return self.issued_s <= other.ended_s and other.issued_s <= self.ended_s


def leftovers(world: World, containers: Sequence[Container]) -> Iterator[str]:
    """Yield resources without an owner, and missing resources of a container."""
    by_id = {one.id: one for one in containers}
    live = {id for id, one in by_id.items() if is_up(one)}
    removing = {id for id, one in by_id.items() if one.state is ContainerState.REMOVING}
    created = {id for id, one in by_id.items() if one.state is ContainerState.CREATED and not one.is_retired}
    retried = {id for _, id in world.unfreed if id in by_id}
    for what, owners, found in (
        ("directory", by_id.keys(), world.directories),
        ("record on disk", by_id.keys(), world.records.keys()),
        ("process", live | retried | removing, world.processes.keys()),
        ("cgroup", live | retried | removing, world.cgroups),
        ("namespace", live | removing | created, world.namespaces.keys()),
        ("root", live | retried | removing | created, world.roots),
        ("volume", live, world.volumes),
        ("port", live | removing | created, set(world.ports.values())),
    ):
        yield from (f"a {what} of {id[:4]} has no owner" for id in sorted(found - owners))
    for id in sorted(by_id.keys() - removing - world.records.keys()):
        yield f"{id[:4]} has no record on disk"
    for id, one in by_id.items():
        if one != world.records.get(id, one):
            yield f"the record of {id[:4]} on disk is an older one"
    for id in sorted(removing):
        if not {("directory", id), ("process", id)} & world.unfreed:
            yield f"{id[:4]} is being removed for ever"
        if not by_id[id].error:
            yield f"{id[:4]} does not say why it is not removed"
    for id in sorted(live):
        if by_id[id].warnings != WARNINGS:
            yield f"{id[:4]} lacks the warnings of its preparation"
        process = world.processes.get(id)
        if process is None or process.exit_code is not None or process.name != by_id[id].process:
            yield f"{id[:4]} is recorded as {by_id[id].state.value} and has no process"
        elif process.is_frozen != (by_id[id].state is ContainerState.PAUSED):
            yield f"{id[:4]} is recorded as {by_id[id].state.value} and is not"
        if world.limits[id] != by_id[id].config.pids and ("limit", id) not in world.unfreed:
            yield f"{id[:4]} has another limit than its record"
        yield from _networks(world, by_id[id])
        for what, found in (
            ("namespace", world.namespaces.keys()),
            ("root", world.roots),
            ("volume", world.volumes),
        ):
            if id not in found:
                yield f"{id[:4]} runs without its {what}"


def _networks(world: World, container: Container) -> Iterator[str]:
    """Yield how a running plain container's networks differ from its record."""
    if container.plain is None or container.sandbox is None:
        return
    id, plain, found = container.id, container.plain, world.networks.get(container.id, {})
    requested = {one.network for one in plain.networks}
    if {one.network_id for one in container.sandbox.endpoints} != requested:
        yield f"the record of {id[:4]} has other networks for this run than for the next"
    if found.keys() != requested | ({BRIDGE} if plain.mode is NetworkMode.BRIDGE else set()):
        yield f"{id[:4]} is on other networks than its record"
    if set(found.values()) - {container.name} and ("name", id) not in world.unfreed:
        yield f"{id[:4]} has another name on its networks than in its record"


def unprobed(containers: Sequence[Container], now_ns: int) -> Iterator[str]:
    """Yield running containers whose health is not that of probes of this run."""
    for one in containers:
        if one.config.healthcheck is None or one.state is not ContainerState.RUNNING or one.health is None:
            continue
        started_ns, log = unix_ns(one.started_at), one.health.log
        if any(unix_ns(probe.start) < started_ns for probe in log):
            yield f"{one.id[:4]} has the health of an earlier run"
        last_ns = unix_ns(log[-1].start) if log else started_ns
        if now_ns - last_ns > PROBED_S_MAX * SECOND_NS:
            yield f"{one.id[:4]} is not probed"


def untold(containers: Sequence[Container], events: Sequence[ContainerEvent]) -> Iterator[str]:
    """Yield running containers whose health differs from the last health event of this run."""
    for one in containers:
        if one.health is None or not is_up(one):
            continue
        actions = [event.action for event in events if event.container_id == one.id]
        if "start" not in actions:  # an earlier process has shown it
            continue
        run = actions[len(actions) - actions[::-1].index("start") :]
        shown = [action.removeprefix(HEALTH_EVENT) for action in run if action.startswith(HEALTH_EVENT)]
        if (shown or [HealthStatus.STARTING.value])[-1] != one.health.status.value:
            yield f"{one.id[:4]} is {one.health.status.value}, and its events do not show that"


def misreported(world: World, containers: Sequence[Container]) -> Iterator[str]:
    """Yield ended containers whose record has another end than the runtime reported, as for a killed monitor."""
    for one in containers:
        ended = world.reported.get(one.id)
        if ended is None or one.state is not ContainerState.EXITED or one.id in world.lost:
            continue
        is_same_code = (
            one.exit_code == ended.exit_code or one.error != ended.error
        )  # of a later start that failed
        if one.interruption is not ended.interruption or not is_same_code:
            yield f"{one.id[:4]} has ended otherwise than its record shows"


def unadopted(world: World, one: Container, *, is_watched: bool) -> Iterator[str]:
    """Yield how an adopted container differs from its record.  No request for it has been sent since the crash."""
    id, process = one.id, world.processes.get(one.id)
    if one.state is ContainerState.REMOVING:
        return
    if is_up(one):
        is_paused = one.state is ContainerState.PAUSED
        # If a crash has lost the record of its end, the watch finds that end, perhaps at a later attempt.
        is_known = one.process == process.name if process is not None else id in world.lost
        if not is_known or not is_watched:
            yield f"{id[:4]} was adopted as {one.state.value} and is not watched"
        elif process is not None and process.exit_code is None and process.is_frozen != is_paused:
            yield f"{id[:4]} was adopted as {one.state.value} and is not"
        return
    if ("process", id) not in world.unfreed and (one.process is not None or process is not None):
        yield f"{id[:4]} was adopted as {one.state.value} and has a process"
    if one.plain is not None:
        yield from (
            f"{id[:4]} was adopted and its {what} is left" for what in world.held_by(id) if what != "volume"
        )
        if one.is_at_rest:
            yield f"{id[:4]} was adopted and its policy does not apply"
    if one.state is ContainerState.CREATED and one.plain is None and not one.is_retired and not one.error:
        for what, found in (("namespace", world.namespaces), ("root", world.roots)):
            if id not in found:
                yield f"{id[:4]} was adopted without its {what}"
        if world.namespaces.get(id, "") != world.prepared_for.get(id):
            yield f"{id[:4]} was adopted with the bundle of an earlier namespace"


def unchanged(containers: Sequence[Container], requests: Sequence[Request]) -> Iterator[str]:
    """Yield containers that are not as their user's last change wants them.

    A change that could not be written fails, so no crash loses one that was done.
    """

    def is_certain(last: Request, others: Sequence[Request]) -> bool:
        return _is_alone(last, others) and last.outcome == "done"

    for one in containers:
        own = sorted((r for r in requests if r.id == one.id and r.kind in CHANGES), key=lambda r: r.issued_s)
        for kind, present in (("rename", one.name), ("update", one.config.pids)):
            changes = [request for request in own if request.kind == kind]
            if changes and is_certain(changes[-1], changes) and changes[-1].wanted != present:
                yield f"{one.id[:4]} is not as its last {kind} wants it"
        if one.plain is None:
            continue
        present_networks = {request.network for request in one.plain.networks}
        if one.plain.mode is NetworkMode.BRIDGE:
            present_networks.add(BRIDGE)
        changes = [request for request in own if request.kind in ("connect", "disconnect")]
        for network in {request.wanted for request in changes}:
            last = [request for request in changes if request.wanted == network][-1]
            if is_certain(last, changes) and (network in present_networks) != (last.kind == "connect"):
                yield f"{one.id[:4]} is not on its networks as its last {last.kind} wants it"


def unwanted(
    world: World, containers: Sequence[Container], requests: Sequence[Request], crashes_s: Sequence[float]
) -> Iterator[str]:
    """Yield containers whose state contradicts their user's last request and their restart policy."""
    by_id = {one.id: one for one in containers}
    for id in sorted({one.id for one in requests}):
        own = sorted((one for one in requests if one.id == id), key=lambda one: one.issued_s)
        decisive = [one for one in own if one.kind in DECISIVE]
        for number, one in enumerate(decisive):
            counts = one.outcome == "done" or (one.is_forced and one.outcome == "refused")
            if not _is_alone(one, decisive) or not counts:
                continue
            later = next((other for other in decisive[number + 1 :] if other.kind in STARTING), None)
            runs = world.starts[id] if later is None else later.starts_before
            may_start = id in world.lost or _starts_at_boot(by_id.get(id), one, later, crashes_s)
            if (one.kind in STOPPING or one.is_forced) and not may_start:
                if runs > one.starts_before + _running_start(one):
                    yield f"{id[:4]} was started after its user had stopped it"
                is_last = number == len(decisive) - 1 and one.outcome == "done"
                if is_last and id in by_id and by_id[id].is_active:
                    yield f"{id[:4]} runs although its user has stopped it"
            if one.kind == "remove" and one.outcome == "done" and id in by_id:
                yield f"{id[:4]} exists although its user has removed it"
        yield from _kept_going(by_id.get(id), decisive)
        uncounted = len(crashes_s) + world.refused_writes[id]
        yield from _restarts(world, id, decisive, by_id.get(id), uncounted)


def _kept_going(container: Container | None, decisive: Sequence[Request]) -> Iterator[str]:
    """Yield a violation if a container has ended although its policy always restarts it and its user's last request
    started it.
    """
    if container is None or container.plain is None or not decisive or container.is_active:
        return
    last = decisive[-1]
    is_last = _is_alone(last, decisive)
    always = container.plain.restart.name in ("always", "unless-stopped")
    if always and is_last and last.kind in STARTING and last.outcome == "done":
        yield f"{container.id[:4]} has ended, and its policy does not restart it"


def _restarts(
    world: World, id: ContainerId, decisive: Sequence[Request], container: Container | None, uncounted: int
) -> Iterator[str]:
    """Yield a violation if a container was started more often than its user and its policy allow.

    ``uncounted`` starts may be missing in its record, because of a crash or a full disk.
    """
    if container is None or not decisive:
        return
    by_user = sum(one.kind in STARTING for one in decisive)
    plain = container.plain
    name = "no" if plain is None else plain.restart.name
    tries = plain.restart.attempts_max if plain is not None else 0
    most = {"no": by_user, "on-failure": by_user * (tries + 1) + uncounted}.get(name)
    if most is not None and world.starts[id] > most:
        yield f"{id[:4]} was started {world.starts[id]} times, {most} at most by its user and policy {name}"
    last = decisive[-1]
    if name == "on-failure" and last.kind in STARTING and _is_alone(last, decisive):
        runs = world.starts[id] - last.starts_before
        if runs > tries + 1 + uncounted:
            yield f"{id[:4]} was started {runs} times since its user did, and its policy has {tries} attempts"


def _is_alone(request: Request, others: Sequence[Request]) -> bool:
    """Return whether no other request was in progress at the same time."""
    return not any(request.overlaps(other) for other in others if other is not request)


def _running_start(_: Request) -> int:
    """Return the number of runs that may begin during a stop, because the stop waits for a start by the policy."""
    return 1


def _starts_at_boot(
    container: Container | None, stop: Request, later: Request | None, crashes_s: Sequence[float]
) -> bool:
    """Return whether the policy ``always`` may have started a container because a node process began."""
    until = float("inf") if later is None else later.issued_s
    is_always = container is None or (
        container.plain is not None and container.plain.restart.name == "always"
    )
    return is_always and any(stop.issued_s <= at <= until for at in crashes_s)

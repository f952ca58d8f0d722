"""``skep node``: docker's commands, and drain, forget and evict.  Evict replaces every key that a node has had."""

import asyncio
import getpass
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote

import click
import msgspec

from skep.api.client.requests import Requests, overriding
from skep.api.client.updates import update
from skep.api.client.waiting import persistently
from skep.cli import options, passthrough
from skep.cli.apps.service import is_job
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.formatting import named
from skep.cli.running import do_each, run_requests, say
from skep.errors import FailedPrecondition, NotFound, SkepError, Unavailable
from skep.model.node_reports.departures import STAYS
from skep.model.node_reports.node_refusals import is_no_node
from skep.model.options.labels import DRAIN_NOW, VOLUME_AFFINITY, VolumeAffinity, volume_affinity
from skep.model.options.overlap import why_stop_first
from skep.model.options.schedules import CRON
from skep.model.options.slot_volumes import (
    SLOT_VOLUMES_LABEL,
    SlotVolume,
    local_volumes,
    names_there,
    slot_volumes_in,
)
from skep.model.service import RestartCondition, ServiceSpec, TaskSpec
from skep.model.values.counts import counted
from skep.model.values.encoding import to_json
from skep.model.values.unknown import leniently
from skep.stack.progress import UNPLACED_S
from skep.stack.waiting import HeldTimes

_LOOK_S = 0.5
"""Seconds between two looks at a node that is drained or evicted.  Both take seconds to minutes."""
_PATH = "/skep/cluster/evict"
_ASKED_MAX = 20
"""Tasks whose reasons one look asks for, as each is a request."""
_AVAILABILITY = "docker node update --availability"
_CONTAINERS = {
    False: "It stops its containers when it reaches a manager. Run docker swarm leave --force there to remove them.",
    True: "Its containers keep running until you run docker swarm leave --force on the node.",
}
"""Texts about an evicted node's containers, by whether they are kept."""
_WANTED = frozenset({"ready", "running", "complete"})
"""Desired states of tasks that a drain moves.  Those of jobs are to complete."""
_MOVING = frozenset({"Replicated", "ReplicatedJob"})
"""Modes of services whose tasks start on other nodes when a node is drained."""
_ENDED = frozenset({"complete", "shutdown", "failed", "rejected", "remove", "orphaned"})


class _Node(passthrough.WithDockers):
    dockers = "ls, inspect, ps, update, rm"
    instead: Mapping[str, str] = {
        **dict.fromkeys(("activate", "resume", "uncordon", "undrain"), f"{_AVAILABILITY} active"),
        **dict.fromkeys(("cordon", "pause"), f"{_AVAILABILITY} pause"),
    }


@click.group(cls=_Node)
def node() -> None:
    """Manage nodes.

    \b
    Examples:
      skep node ls
      skep node drain w2
      skep node evict m3
    """


@node.command()
@click.option(
    "--detach/--wait",
    "-d/",
    default=False,
    help="Return at once instead of waiting until the tasks have stopped.",
)
@click.option("--now", is_flag=True, help="Stop tasks before their replacements run, as Docker does.")
@options.timeout()
@options.override_freeze
@click.argument("name", metavar="NODE")
@click.pass_obj
def drain(
    host: HostOptions, name: str, detach: bool, now: bool, timeout: float, override_freeze: bool
) -> None:
    """Drain a node and wait until its tasks have stopped.

    You can then switch the node off. To undo the drain, run skep node update --availability active NODE. To see its
    effects before, run skep what-if drain NODE.

    A task stops when its replacement runs on another node. Until then it stays, and the command shows why. Tasks of
    jobs, and tasks that write to a volume or host path, stop first, and the command names their services.

    \b
    Examples:
      skep node drain w2
      skep node drain --now w2
    """
    wait_s = None if detach else timeout
    run_requests(_drain(host, name, wait_s, now=now, is_override=override_freeze))
    if not detach:
        click.echo(f"{name} is drained: no tasks are left")
        click.echo(f"To give it tasks again, run {_AVAILABILITY} active {name}.")


async def _drain(
    host: HostOptions, name: str, wait_s: float | None, *, now: bool = False, is_override: bool = False
) -> None:
    async with host.client() as plain:
        client = overriding(plain, is_override=is_override)
        node = await client.get(f"/nodes/{quote(name, safe='')}", timeout_s=RESPONSE_TIMEOUT_S)
        here = await _tasks_of(client, name)
        lines = await _consequences(client, name, node, here, now=now)
        await _set_draining(client, name, now=now)
        for line in lines:
            say(line)
        if wait_s is None:
            return
        moved = {str(task.get("ServiceID", "")) for task in here}
        await _wait_until_empty(client, name, wait_s)
        services = await client.get("/services", timeout_s=RESPONSE_TIMEOUT_S)
        filters = {"desired-state": ["running"]}
        tasks = [*await client.get("/tasks", filters=filters, timeout_s=RESPONSE_TIMEOUT_S)]
        left = [one for one in services if one["ID"] in moved]
        # The tasks of jobs are to complete, not to run.
        if jobs := [one["ID"] for one in left if is_job(one["Spec"])]:
            tasks += await client.get("/tasks", filters={"service": jobs}, timeout_s=RESPONSE_TIMEOUT_S)
        for line in without_node(left, tasks):
            say(line)


def without_node(services: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each of the services whose tasks no other node takes."""
    waiting = Counter(task.get("ServiceID", "") for task in tasks if _is_unplaced(task))
    names = sorted((str(one["Spec"]["Name"]), waiting[one["ID"]]) for one in services)
    return [
        f"{name}: no other node takes {counted(number, 'task')}. Run skep explain {name}."
        for name, number in names
        if number
    ]


async def _consequences(
    client: Requests,
    name: str,
    node: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    *,
    now: bool,
) -> Sequence[str]:
    """Return the effects of a drain: services whose tasks stop first, and services with local volumes on the node.

    ``tasks``: those on the node that have not ended.
    """
    services = await client.get("/services", timeout_s=RESPONSE_TIMEOUT_S)
    # A task that waits on the node for its restart is desired to be ready.  Its data is there as well.
    here: dict[str, set[int]] = {}
    for task in tasks:
        if task.get("DesiredState") in _WANTED:
            here.setdefault(task.get("ServiceID", ""), set()).add(task.get("Slot", 0))
    filters = {"desired-state": ["running"]}
    homes: dict[str, set[str]] = {}
    for task in await client.get("/tasks", filters=filters, timeout_s=RESPONSE_TIMEOUT_S):
        homes.setdefault(task.get("ServiceID", ""), set()).add(task.get("NodeID", ""))
    labels = (node["Description"].get("Engine") or {}).get("Labels") or {}
    found = slot_volumes_in(labels.get(SLOT_VOLUMES_LABEL, ""))
    lines: list[str] = []
    for one in sorted(services, key=lambda one: str(one["Spec"]["Name"])):
        slots, mode = here.get(one["ID"]), one["Spec"]["Mode"]
        if slots is None:
            continue
        if "GlobalJob" in mode:
            lines.append(interrupts(one["Spec"], name))
        is_final = _is_never_restarted(one["Spec"])
        if is_final:
            lines.append(
                f"{one['Spec']['Name']} stops its tasks on {name} for good, by its restart condition none"
            )
        if _MOVING.isdisjoint(mode) or is_final:
            continue
        is_away = homes.get(one["ID"]) == {node["ID"]}
        spec = with_names_there(one["Spec"], found, slots)
        lines.append(stops_first(spec, name, is_away=is_away, now=now))
        lines.append(left_behind(spec, name))
    return [line for line in lines if line]


def with_names_there(
    spec: Mapping[str, Any], found: Sequence[SlotVolume], slots: Collection[int]
) -> dict[str, Any]:
    """Return a service's spec with the names that its volumes have for ``slots`` on a node, as the node reports them.

    A mount with a placeholder in its name becomes one for each of these volumes.
    """
    template = dict(spec.get("TaskTemplate") or {})
    container = dict(template.get("ContainerSpec") or {})
    if not container.get("Mounts"):
        return dict(spec)
    users = {(str(spec["Name"]), slot) for slot in slots}
    mounts: list[Mapping[str, Any]] = []
    for mount in container["Mounts"]:
        source = str(mount.get("Source") or "")
        is_volume = mount.get("Type", "") in ("", "volume")
        names = names_there([source], found, users) if is_volume else (source,)
        mounts += [mount if one == source else {**mount, "Source": one} for one in names]
    return {**spec, "TaskTemplate": {**template, "ContainerSpec": {**container, "Mounts": mounts}}}


def stops_first(spec: Mapping[str, Any], node: str, *, is_away: bool, now: bool) -> str:
    """Return that a service's or job's tasks on ``node`` stop before their replacements run; empty if they do not.

    Args:
        is_away: Whether the service has no task on another node.
        now: Whether every task stops first, so that only services that will be down are named.
    """
    down = ", and is down until they run elsewhere" if is_away else ""
    if now:
        return f"{spec['Name']} has all its tasks on {node}{down}" if is_away else ""
    if is_job(spec):
        return (
            f"{spec['Name']} stops its tasks on {node} before their replacements start, because it is a job"
        )
    try:
        data = why_stop_first(leniently(to_json(spec), ServiceSpec))
    except msgspec.DecodeError:  # The spec is from a newer version, so the warning is left out.
        return ""
    if not data:
        return ""
    return f"{spec['Name']} stops its tasks on {node} before their replacements start (they write to {data}){down}"


def _is_never_restarted(spec: Mapping[str, Any]) -> bool:
    """Return whether nothing replaces a task of the service that is stopped."""
    policy = (spec.get("TaskTemplate") or {}).get("RestartPolicy") or {}
    return policy.get("Condition") == RestartCondition.NONE.value and not is_job(spec)


def interrupts(spec: Mapping[str, Any], node: str) -> str:
    """Return that a drain stops the task of a global job on ``node``, which no other node replaces."""
    has_schedule = CRON in (spec.get("Labels") or {})
    unless = ", or else this run fails" if has_schedule else ""
    return f"{spec['Name']} stops its task on {node}, and starts it again if {node} takes tasks again{unless}"


def left_behind(spec: Mapping[str, Any], node: str) -> str:
    """Return what happens to the local volumes of a service or job when ``node`` is drained; empty if it has none."""
    try:
        task = leniently(to_json(spec.get("TaskTemplate") or {}), TaskSpec)
    except msgspec.DecodeError:  # The spec is from a newer version, so the warning is left out.
        return ""
    volumes = local_volumes(task)
    if not volumes:
        return ""
    has = f"{spec['Name']} has local volumes on {node} ({named(volumes)})"
    if volume_affinity(spec.get("Labels") or {}) is VolumeAffinity.REQUIRED:
        return f"{has}, and waits until {node} accepts tasks again ({VOLUME_AFFINITY}={VolumeAffinity.REQUIRED.value})"
    return f"{has}: the data stays on {node}, and a task that starts elsewhere has empty volumes"


async def _set_draining(client: Requests, name: str, *, now: bool) -> None:
    def draining(node: Mapping[str, Any]) -> dict[str, Any]:
        labels = dict(node["Spec"].get("Labels") or {})
        labels.pop(DRAIN_NOW, None)
        if now:
            labels[DRAIN_NOW] = "true"
        return {**node["Spec"], "Availability": "drain", "Labels": labels}

    await update(client, "nodes", name, draining, timeout_s=RESPONSE_TIMEOUT_S)


async def drain_and_wait(client: Requests, name: str, within_s: float, *, now: bool = False) -> None:
    """Drain a node and wait until its tasks have ended.

    Raises: Unavailable: some are left, no node has accepted replacements of the tasks that are left, or someone else
        has ended the drain.

    Args:
        now: Stop tasks before their replacements run.
    """
    await _set_draining(client, name, now=now)
    await _wait_until_empty(client, name, within_s)


async def _wait_until_empty(client: Requests, name: str, within_s: float) -> None:
    services = await client.get("/services", timeout_s=RESPONSE_TIMEOUT_S)
    names = {one["ID"]: str(one["Spec"]["Name"]) for one in services}
    jobs = {one["ID"] for one in services if "ReplicatedJob" in (one["Spec"].get("Mode") or {})}
    shown, first = "", name
    held = HeldTimes()
    try:
        async with asyncio.timeout(within_s):
            while True:
                node = await persistently(partial(_node, client, name), say)
                left = await persistently(partial(_tasks_of, client, name), say)
                _require_drain(node, name, len(left))
                if not left:
                    return
                tasks = {_task_name(task, names, jobs): task for task in left}
                some = sorted(tasks)
                first = some[0]
                shown_names = [f"{one}{_whose(tasks[one], names)}" for one in some]
                text = f"{counted(len(left), 'task')} left: {named(shown_names)}"
                if node["Status"]["State"] == "down":
                    text += (
                        f". {name} is down and reports no end of them until it is back. "
                        f"If it is lost for good, run skep node forget {name}"
                    )
                else:
                    stays = await persistently(partial(_stays, client, tasks), say)
                    first = stays.name or first
                    if stays.why:
                        text += f". {first}: {stays.why}. To stop it all the same, run skep node drain --now {name}"
                    now_s = asyncio.get_running_loop().time()
                    if held.held_s(len(left), now_s, holds=stays.are_all_unplaced) >= UNPLACED_S:
                        raise Unavailable(
                            f"no node has accepted a replacement for {UNPLACED_S:.0f} s: {text}. {name} stays drained. "
                            f"Run skep explain {first}."
                        )
                if text != shown:
                    say(text)
                shown = text
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise Unavailable(f"not drained within {within_s:g} s: {shown}. Run skep explain {first}.") from None


class _Stays(NamedTuple):
    """The first known reason for tasks on a drained node, and whether no node takes replacements."""

    name: str = ""
    why: str = ""
    are_all_unplaced: bool = False


async def _stays(client: Requests, tasks: Mapping[str, Mapping[str, Any]]) -> _Stays:
    """Return the first known reason why ``tasks``, by name, stay, and whether no node takes their replacements."""
    are_unplaced = await _are_unplaced(client, tuple(tasks.values()))
    for one in sorted(tasks)[:_ASKED_MAX]:
        if why := await _why_it_stays(client, str(tasks[one]["ID"])):
            return _Stays(one, why, are_unplaced)
    return _Stays()


async def _are_unplaced(client: Requests, tasks: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all ``tasks`` still run because no node accepts their replacements.

    The replacements' states decide, because the words of an explanation name first what a task needs.
    """
    if any(task.get("DesiredState") != "running" for task in tasks):
        return False
    services = sorted({str(task.get("ServiceID", "")) for task in tasks})
    filters = {"service": services, "desired-state": ["running"]}
    try:
        found = await client.get("/tasks", filters=filters, timeout_s=RESPONSE_TIMEOUT_S)
    except NotFound:  # A service has just been removed.
        return False
    unplaced = {_slot(task) for task in found if _is_unplaced(task)}
    return all(_slot(task) in unplaced for task in tasks)


def _is_unplaced(task: Mapping[str, Any]) -> bool:
    return task["Status"]["State"] == "pending" and is_no_node(task["Status"].get("Err", ""))


def _slot(task: Mapping[str, Any]) -> tuple[str, int]:
    return str(task.get("ServiceID", "")), int(task.get("Slot", 0))


async def _why_it_stays(client: Requests, task_id: str) -> str:
    """Return why a task is still on its drained node; empty if it is stopping, or if the manager does not know."""
    try:
        found = await client.get(f"/skep/tasks/{task_id}/explain", timeout_s=RESPONSE_TIMEOUT_S)
    except NotFound:  # The task has just been removed.
        return ""
    summary = str(found.get("Summary") or "")
    return summary if summary.startswith(STAYS) else ""


async def _node(client: Requests, name: str) -> Mapping[str, Any]:
    node: Mapping[str, Any] = await client.get(f"/nodes/{quote(name, safe='')}", timeout_s=RESPONSE_TIMEOUT_S)
    return node


def _require_drain(node: Mapping[str, Any], name: str, left: int) -> None:
    """Check that a node is drained still, or its tasks would stay.  Raises: Unavailable."""
    availability = node["Spec"].get("Availability", "drain")
    if availability != "drain":
        raise Unavailable(
            f"{name} is no longer drained, because someone else has set it to {availability}: "
            f"{counted(left, 'task')} left. Run skep node drain {name} again."
        )


async def _tasks_of(client: Requests, name: str) -> Sequence[Mapping[str, Any]]:
    """Return the tasks on a node that have not ended."""
    tasks = await client.get("/tasks", filters={"node": [name]}, timeout_s=RESPONSE_TIMEOUT_S)
    return [task for task in tasks if task["Status"]["State"] not in _ENDED]


def _task_name(task: Mapping[str, Any], services: Mapping[str, str], jobs: Collection[str]) -> str:
    """Return a task's name: ``web.3``, ``web`` for a global service, or the task's id if its service was removed.

    ``jobs``: ids of the replicated jobs.  Their slots begin at 0, which the API omits.
    """
    id = task.get("ServiceID", "")
    name, slot = services.get(id), task.get("Slot", 0 if id in jobs else None)
    return f"{name}.{slot}" if name and slot is not None else name or str(task["ID"])


def _whose(task: Mapping[str, Any], services: Mapping[str, str]) -> str:
    """Return why a task has no name other than its id, in brackets, or an empty text if it has one."""
    return "" if task.get("ServiceID", "") in services else " (its service was removed)"


@node.command()
@click.option("-f", "--force", is_flag=True, help="Also remove nodes that may only be cut off.")
@click.argument("names", metavar="NODE...", nargs=-1, required=True)
@click.pass_obj
def forget(host: HostOptions, names: tuple[str, ...], force: bool) -> None:
    """Remove nodes that left or are lost for good.

    Deletes everything that the cluster knows about them. A forgotten node has to join again.

    Only nodes that are down can be forgotten. To remove a node that you no longer trust, use skep node evict.

    If most nodes went down at once, their containers may still run. The cluster then refuses to remove such nodes.
    With --force, their tasks also start elsewhere, so that they may run twice.

    \b
    Example:
      skep node forget w2 w3
    """
    run_requests(_forget(host, names, force=force))


async def _forget(host: HostOptions, names: Sequence[str], *, force: bool) -> None:
    async with host.client() as client:

        async def forget_one(name: str) -> None:
            found = await client.get(f"/nodes/{quote(name, safe='')}", timeout_s=RESPONSE_TIMEOUT_S)
            state = found["Status"]["State"]
            if state != "down":
                raise FailedPrecondition(
                    f"{name} is {state}, not down. Drain it and run docker swarm leave there, or run skep node "
                    f"evict {name}."
                )
            forced = {"force": "1"} if force else {}
            await client.delete(f"/nodes/{found['ID']}", **forced, timeout_s=RESPONSE_TIMEOUT_S)
            click.echo(name)

        await do_each(names, forget_one)


@node.command()
@click.option("--keep", is_flag=True, help="Keep the containers on the node running.")
@options.yes
@click.argument("name", metavar="NODE")
@click.pass_obj
def evict(host: HostOptions, name: str, keep: bool, yes: bool) -> None:
    """Remove an untrusted node and rotate all its keys.

    Replaces the managers' keys, the root certificate, the join tokens and the unlock key. The node's tasks start
    elsewhere, and the node stops its containers when it reaches a manager.

    If you interrupt the command, the managers continue. Rerun it to see the progress. Use the full ID for a node that
    was already removed. Afterwards, rotate the secrets that the node had (skep secret rotate).

    \b
    Examples:
      skep node evict m3
      skep node evict --yes 4pwj9jbl5hxo2wadgmuzktzve
    """
    if not yes:
        click.confirm(
            f"Remove {name}, and replace the managers' keys, the root certificate, join tokens and the unlock key?",
            abort=True,
            err=True,
        )
    if unlock_key := run_requests(_evict(host, name, keep)):
        click.echo(
            "To unlock a swarm manager after it restarts, run the `docker swarm unlock`\n"
            f"command and provide the following key:\n\n    {unlock_key}\n\n"
            "Please remember to store this key in a password manager, since without it you\n"
            "will not be able to restart the manager."
        )


async def _evict(host: HostOptions, name: str, keep: bool) -> str:
    """Evict a node, wait for the end, and return the new unlock key, or an empty text."""
    by = f"{getpass.getuser()}@{socket.gethostname()}"
    async with host.client() as client:
        progress = _Progress()
        # Former names too, for managers of earlier versions.
        body: dict[str, Any] = {"Node": name, "RequestedBy": by, "By": by}
        if keep:
            body |= {"KeepContainers": True, "Keep": True}
        state = await client.post(_PATH, body, timeout_s=RESPONSE_TIMEOUT_S)
        while not progress.show(state):
            await asyncio.sleep(_LOOK_S)
            # Requests are repeated, because the manager's etcd restarts during the eviction.
            state = await persistently(
                partial(client.get, _PATH, timeout_s=RESPONSE_TIMEOUT_S), progress.note
            )
        try:
            response = await client.get("/swarm/unlockkey", timeout_s=RESPONSE_TIMEOUT_S)
        except SkepError as error:
            raise Unavailable(
                f"the node is evicted, but the unlock key could not be read: {error}. Run docker swarm unlock-key."
            ) from error
        return str(response.get("UnlockKey") or "")


class _Progress:
    """Prints steps and notes when they change."""

    def __init__(self) -> None:
        self._done: set[str] = set()
        self._damaged: set[str] = set()
        self._last_note = ""

    def show(self, state: Mapping[str, Any]) -> bool:
        """Print the new steps, and return whether the eviction is complete."""
        for step in state["Steps"]:
            if step["Done"] and step["Text"] not in self._done:
                self._done.add(step["Text"])
                click.echo(f"done: {step['Text']}")
        if damaged := [key for key in state.get("Damaged") or () if key not in self._damaged]:
            self._damaged.update(damaged)
            click.echo(f"      could not be read and stay unchanged: {', '.join(damaged)}", err=True)
        if state["Complete"]:
            click.echo(
                f"{state['Hostname'] or state['NodeID']} is evicted. All its keys are revoked or replaced."
            )
            click.echo(_CONTAINERS[bool(state.get("KeepContainers"))])
            return True
        self.note(str(state.get("WaitingFor") or ""))
        return False

    def note(self, reason: str) -> None:
        """Print the reason for the wait, if it has changed."""
        if reason and reason != self._last_note:
            click.echo(f"      {reason}", err=True)
        self._last_note = reason

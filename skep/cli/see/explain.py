"""``skep explain``: the reason why an object is not in its desired state."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import click

from skep.api.client.requests import Requests
from skep.cli.cluster.door import traffic_cells, traffic_of
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.formatting import age, duration, seconds_since
from skep.cli.output import OutputOptions, Screen, Shown, shows
from skep.cli.see.quorum import UNREACHABLE, headers_for, quorum_of, silence
from skep.cli.see.verify import about as about_violations
from skep.errors import InvalidArgument, NotFound, SkepError
from skep.model.node import plain_message
from skep.model.options.label_suggestions import NODE_LABELS, PREFIX, suggested_label
from skep.model.options.labels import system_reserve
from skep.model.swarm import FROZEN
from skep.model.task_end import printable
from skep.model.values.counts import counted
from skep.model.values.times import minute

_PAUSED = ("paused", "rollback_paused")
_WAITS_FOR = re.compile(r"it waits for (?:.*, which waits for )?(?:service )?([A-Za-z0-9][\w.-]*)")
_KILLED_BY_SKEP = ("unhealthy", "stop-timeout")
"""Causes after which Skep itself sends the signal."""
_ENTRIES_MAX = 100
"""Entries of the history in which a removal is looked for.  It is among the last ones about its object."""


@click.command()
@click.argument("name")
@shows
@click.pass_obj
def explain(host: HostOptions, name: str, output: OutputOptions) -> None:
    """Explain why an object is not in its desired state.

    NAME is a service, a task (web.2), a node, a network or a registered service. IDs and their prefixes also work.

    \b
    Examples:
      skep explain web
      skep explain web.3
      skep explain w1 --watch
    """
    output.show(lambda: _ask(host, name))


async def _ask(host: HostOptions, name: str) -> Shown:
    """Return the explanation of the object ``name``.  Raises: NotFound: no object has this name."""
    async with host.requests() as client:
        headers = await headers_for(client)
        get = partial(client.get, headers=headers, timeout_s=RESPONSE_TIMEOUT_S)
        now, escaped = time.time(), quote(name, safe="")
        for path, about in (
            (f"/skep/services/{escaped}/explain", about_service),
            (f"/skep/tasks/{escaped}/explain", about_task),
        ):
            try:
                found = await get(path)
            except NotFound:
                continue
            # Without a leader, only reads of the last known state are answered at once.
            if (id := found.get("ServiceID") if about is about_service else None) and not headers:
                routes = [one for one in await traffic_of(client) if one["ServiceID"] == id]
                found = {**found, "Routes": routes}
            return _report(name, found, about, now, await _violations(client, headers))
        try:
            node = await get(f"/nodes/{escaped}")
        except NotFound:
            pass
        except InvalidArgument as error:
            several = await get("/nodes", filters={"name": [name]})
            ids = ", ".join(f"{one['ID']} ({one['Status']['State']})" for one in several)
            raise InvalidArgument(f"{error}: use an ID{f': {ids}' if ids else ''}") from None
        else:
            tasks = await get("/tasks", filters={"node": [node["ID"]]})
            states = Counter(task["Status"]["State"] for task in tasks)
            quorum = await quorum_of(client) if headers else None
            found = {
                **node,
                "TaskStates": dict(states),
                "Silence": silence(quorum, node["ID"]) if quorum else "",
                "HasLeader": not headers,
            }
            return _report(name, found, about_node, now, await _violations(client, headers))
        try:
            network = await get(f"/networks/{escaped}")
        except NotFound:
            if not headers and (registered := await _find_registered(client, name)):
                return _report(name, registered, about_registration, now)
            if not headers and await _was_removed(client, name):
                raise NotFound(
                    f"{name} was removed. Run skep history {name} to see when and by whom."
                ) from None
            raise NotFound(
                f"no such service, task, node or network: {name}. Run skep status to list services and nodes."
            ) from None
        services = [one["Spec"]["Name"] for one in await get("/services") if network["Id"] in _targets(one)]
        found = {**network, "ServiceNames": sorted(services)}
        return _report(name, found, about_network, now, await _violations(client, headers))


async def _was_removed(client: Requests, name: str) -> bool:
    """Return whether the history has the removal of a service, node or network ``name``."""
    limit = str(_ENTRIES_MAX)
    try:
        page = await client.get(
            "/skep/history", timeout_s=RESPONSE_TIMEOUT_S, about=name, kind="change", limit=limit
        )
    except SkepError:  # also an earlier version
        return False
    return any(one.get("Action") == "remove" and one.get("Name") == name for one in page.get("Entries") or ())


async def _find_registered(client: Requests, name: str) -> Mapping[str, Any]:
    """Return the registered instances of the service ``name``, or nothing.  ``db@db1`` selects one instance."""
    try:
        answer = await client.get("/skep/catalog", timeout_s=RESPONSE_TIMEOUT_S)
    except SkepError:  # also an earlier version
        return {}
    service, _, instance = name.partition("@")
    for one in (answer.get("Catalog") or {}).get("Services") or ():
        instances = [
            each for each in one["Instances"] if each["IsRegistered"] and instance in ("", each["ID"])
        ]
        if one["Name"] == service and instances:
            return {**one, "Instances": instances}
    return {}


def about_registration(name: str, found: Mapping[str, Any], now: float) -> Iterator[str]:
    """Return a service on machines outside of the cluster as text, without control characters."""
    instances = found["Instances"]
    yield printable(f"{name}: registered outside of the cluster, {counted(len(instances), 'instance')}")
    for one in instances:
        tags = f", tags {', '.join(one['Tags'])}" if one["Tags"] else ""
        yield printable(f"  {one['ID']} at {one['Address']}:{one['Port']}{tags}")
    yield (
        "  an instance leaves the catalog with its lease, when its skep register no longer runs or its check fails. "
        "See skep catalog ls"
    )


async def _violations(client: Requests, headers: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
    """Return the violated invariants that the leader has found.

    Returns nothing if the user may not see them, or without a leader, which ``headers`` say.
    """
    if headers:
        return ()
    try:
        found = await client.get("/skep/verify", timeout_s=RESPONSE_TIMEOUT_S, last="true")
    except SkepError:  # also an earlier version, or no leader
        return ()
    violations: Sequence[Mapping[str, Any]] = found["Violations"]
    return violations


_About = Callable[[str, Mapping[str, Any], float], Iterator[str]]


def _report(
    name: str,
    found: Mapping[str, Any],
    about: _About,
    now: float,
    violations: Sequence[Mapping[str, Any]] = (),
) -> Shown:
    ids = [found[key] for key in ("ServiceID", "TaskID", "ID", "Id") if found.get(key)]

    def lines(screen: Screen) -> Iterator[str]:
        for number, line in enumerate((*about(name, found, now), *about_violations(violations, ids))):
            indent = len(line) - len(line.lstrip()) + 2
            for part in screen.fitted(line, indent=indent):
                yield screen.styled(part, bold=number == 0)

    return Shown(data=found, lines=lines)


def _targets(service: Mapping[str, Any]) -> list[str]:
    spec = service["Spec"]
    attached = spec["TaskTemplate"].get("Networks") or spec.get("Networks") or ()
    return [one["Target"] for one in attached]


def about_node(name: str, node: Mapping[str, Any], now: float) -> Iterator[str]:
    """Return a node as text, without control characters: its state and its properties."""
    return map(printable, _node_lines(name, node, now))


def _fate(name: str, message: str, *, is_manager: bool) -> str:
    """Return the fate of the tasks of a node that is down, and the commands for a node that is lost for good."""
    forget = f"run {f'docker node demote {name} and then ' if is_manager else ''}skep node forget {name}"
    if FROZEN in message:
        return (
            "  its tasks stay until the freeze ends. If their containers cannot run any longer, run skep cluster "
            f"resume to replace them now. If the node is lost for good, then {forget}."
        )
    return (
        "  services replace its tasks on other nodes, unless the tasks need this node or its volumes. If the node is "
        f"lost for good, {forget}."
    )


def _node_lines(name: str, node: Mapping[str, Any], now: float) -> Iterator[str]:
    description, status, spec = node["Description"], node["Status"], node["Spec"]
    silent = node.get("Silence", "")
    message = plain_message(status.get("Message", ""), node.get("SilentSince") or "")
    words = (UNREACHABLE if silent else status["State"], silent, message)
    yield ": ".join(filter(None, (description.get("Hostname") or node["ID"], *words)))
    if status["State"] == "down":
        if node.get("HasLeader", True):
            yield _fate(name, message, is_manager=spec["Role"] == "manager")
        else:
            yield "  nothing replaces its tasks while there is no leader."
    if spec["Availability"] != "active":
        word = spec["Availability"]
        yield (
            f"  it gets no tasks, because its availability is {word}. Run skep node update --availability active "
            f"{name}."
        )
    manager = node.get("ManagerStatus")
    role = spec["Role"]
    if manager is not None:
        role = "manager, leader" if manager.get("Leader") and not silent else "manager"
        if manager.get("Reachability") != "reachable":
            role += f", {manager.get('Reachability')}"
    resources = description.get("Resources") or {}
    cpus, memory = resources.get("NanoCPUs", 0) / 1e9, resources.get("MemoryBytes", 0) / (1 << 30)
    engine = (description.get("Engine") or {}).get("EngineVersion", "")
    yield f"  {role}, at {status.get('Addr') or 'no address'}, {counted(cpus, 'CPU')}, {memory:.1f} GiB, {engine}"
    yield from _label_lines(spec.get("Labels") or {})
    tasks = ", ".join(f"{count} {state}" for state, count in sorted(node["TaskStates"].items()))
    yield f"  tasks: {tasks or 'none'}"
    yield f"  joined {age(node['CreatedAt'], now)} ago, ID {node['ID']}"


def _label_lines(labels: Mapping[str, str]) -> Iterator[str]:
    """Yield what a node's labels keep for its system, and its labels without effect."""
    nano_cpus, memory_bytes = system_reserve(labels)
    kept = [counted(nano_cpus / 1e9, "CPU")] * bool(nano_cpus) + [f"{memory_bytes >> 20} MiB"] * bool(
        memory_bytes
    )
    if kept:
        yield f"  keeps {' and '.join(kept)} for the system, which tasks cannot reserve"
    for label in sorted(labels):
        if label.startswith(PREFIX) and label not in NODE_LABELS:
            meant = suggested_label(label, NODE_LABELS)
            yield f"  unknown label {label}: it has no effect" + (f", did you mean {meant}?" if meant else "")


def about_network(_: str, network: Mapping[str, Any], now: float) -> Iterator[str]:
    """Return a network as text, without control characters."""
    return map(printable, _network_lines(network, now))


def _network_lines(network: Mapping[str, Any], now: float) -> Iterator[str]:
    services = network["ServiceNames"]
    used = f"used by {', '.join(services)}" if services else "no service uses it"
    yield f"{network['Name']}: {network['Driver']} network of the {network['Scope']}, {used}"
    yield from (f"  {warning}" for warning in network.get("Warnings") or ())
    for subnet in (network.get("IPAM") or {}).get("Config") or ():
        yield f"  {subnet.get('Subnet')}" + (
            f", gateway {subnet['Gateway']}" if subnet.get("Gateway") else ""
        )
    kinds = [
        word for word, key in (("internal", "Internal"), ("attachable", "Attachable")) if network.get(key)
    ]
    if kinds:
        yield f"  {', '.join(kinds)}"
    yield f"  created {age(network['Created'], now)} ago, ID {network['Id']}"


def about_service(name: str, explanation: Mapping[str, Any], now: float) -> Iterator[str]:
    """Return a service's explanation as text, without control characters.  ``now``: seconds since the epoch."""
    return map(printable, _service_lines(name, explanation, now))


def _service_lines(name: str, explanation: Mapping[str, Any], now: float) -> Iterator[str]:
    ended = explanation.get("EndedAt", "")
    ago = f", {age(ended, now)} ago" if ended else ""
    result, separator, rest = str(explanation["Summary"]).partition(";")
    yield f"{name}: {result}{ago}{separator}{rest}"
    update = explanation.get("UpdateStatus") or {}
    if update.get("Message"):
        yield f"  update: {update['Message']}"
    if (state := update.get("State")) in _PAUSED:
        other = f", or skep update abort {name}" if state == "paused" else ""
        yield f"  it is paused. Run skep update resume {name}{other}."
    if progress := explanation.get("Update"):
        left = seconds_since(progress.get("Deadline", ""), now)
        until = f", for {duration(-left)} more" if left is not None else ""
        yield f"  update: {progress['Step']}, waiting for {progress['WaitingFor']}{until}"
    yield from _autoscaling(explanation.get("Autoscaling") or {}, now)
    yield from map(_route_line, explanation.get("Routes") or ())
    if schedule := explanation.get("Schedule"):
        yield f"  schedule: {schedule}"
    main = explanation.get("Reason", "")
    for title, reasons in (("waiting", explanation["Reasons"]), ("failed", explanation["Failures"])):
        for reason in reasons:
            example = reason.get("Name") or reason["Example"]
            # The headline already has this reason.
            words = "" if reason["Summary"] == main else f": {reason['Summary']}"
            yield f"  {reason['Tasks']} {title}{words}  (skep explain {example})"
    if change := explanation.get("SmallestChange"):
        yield f"  smallest change: {change}"
    problem = explanation.get("Problem") or {}
    yield from (f"  {line}" for line in _output(problem.get("End") or {}))
    if problem.get("Kind") in ("waiting", "dependency") and (found := _WAITS_FOR.match(main)) is not None:
        yield f"  Next: skep explain {found[1]}"


def _route_line(one: Mapping[str, Any]) -> str:
    """Return a route with its recent requests, the share of new tasks and the end of its certificate."""
    rate, errors, p50, p95, p99 = traffic_cells(one)
    counted = f"{rate} requests/s, {errors} failed, latency p50 {p50}, p95 {p95}, p99 {p99}"
    parts = [counted if rate != "-" else "no requests in the last minute"]
    if (percent := one.get("NewPercent")) is not None:
        parts.append(f"new tasks get {percent}% of new connections")
    if expires := one.get("CertificateExpires"):
        parts.append(f"certificate until {minute(expires)}")
    return f"  route {one['Route']}: {'; '.join(parts)}"


def _autoscaling(found: Mapping[str, Any], now: float) -> Iterator[str]:
    """Yield lines about a service's autoscaling: targets, present measures and the last change."""
    if not found:
        return
    metrics = ", ".join(map(_metric, found.get("Metrics") or ()))
    whose = " by its schedule" if found.get("IsScheduled") else ""
    yield f"  autoscaling, {found['Min']} to {found['Max']} tasks{whose}: {metrics}"
    yield f"    now: {found['Summary']}"
    if last := found.get("LastChange"):
        before, after = last.get("Before", 0), last.get("After", 0)
        yield f"    last: {before} → {after}, {age(last['At'], now)} ago: {last['Reason']}"


def _metric(one: Mapping[str, Any]) -> str:
    if one["Name"] in ("cpu", "memory"):
        average = one.get("Average")
        figure = f"{average:.0f}%" if average is not None else "not known"
        return f"{one['Name']} {figure}, target {one['Target']:g}%"
    total = one.get("Total")
    figure = f"{total:.4g}" if total is not None else "not known"
    return f"{one['Name']} {figure}, target {one['Target']:g} for each task"


def about_task(name: str, explanation: Mapping[str, Any], now: float) -> Iterator[str]:
    """Return a task's explanation as text, without control characters, with a table of nodes if it waits for one."""
    return map(printable, _task_lines(name, explanation, now))


def _task_lines(name: str, explanation: Mapping[str, Any], now: float) -> Iterator[str]:
    yield f"{name}: {explanation['Summary']}"
    if record := explanation.get("Placement"):
        yield f"  placed: {record}"
    state, wanted = explanation["State"], explanation["DesiredState"]
    yield f"  {state} for {age(explanation['Since'], now)}" + (
        f", desired: {wanted}" if wanted != state else ""
    )
    yield from (f"  {line}" for line in _end(explanation.get("End") or {}))
    if change := explanation.get("SmallestChange"):
        yield f"  smallest change: {change}"
    rows = sorted(_row(node) for node in explanation.get("Nodes") or ())
    reasons = {reason for _, reason in rows}
    if len(rows) > 1 and len(reasons) == 1:
        yield f"  all {len(rows)} nodes: {reasons.pop()}"
    else:
        yield from (f"  {line}" for line in _table(rows))


def _end(end: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reason of a task's end."""
    if cause := end.get("Cause"):
        is_named = end.get("Signal") and cause not in _KILLED_BY_SKEP
        yield f"cause: {cause}" + (f" ({end['Signal']})" if is_named else "")
    yield from _output(end)


def _output(end: Mapping[str, Any]) -> Iterator[str]:
    """Yield the last output of a task and of its health check."""
    if output := end.get("HealthOutput", "").strip():
        yield "last failed health check:"
        yield from (f"  | {line}" for line in output.splitlines())
    if lines := end.get("Lines"):
        yield "last lines of output:"
        yield from (f"  | {line['Text']}" for line in lines)


def _row(node: Mapping[str, Any]) -> tuple[str, str]:
    return node["Hostname"] or node["NodeID"], "; ".join(node["Reasons"]) or "suitable"


def _table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    if not rows:
        return
    width = max(len(title) for title, _ in (*rows, ("NODE", "")))
    for title, text in (("NODE", "REASON"), *rows):
        yield f"{title.ljust(width)}  {text}"

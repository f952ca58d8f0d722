"""``skep run``: a one-off command with the image, environment, networks, secrets and mounts of a service.

It runs as a separate job.  The scheduler chooses its node, and managers remove the job if this command cannot do so.
"""

import asyncio
import copy
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any
from urllib.parse import quote

import click

from skep.api.client.raw import RawClient, json
from skep.api.client.waiting import persistently
from skep.cli.apps import terminal
from skep.cli.apps.registry_logins import RegistryLogins
from skep.cli.apps.targets import OrDocker, to_docker
from skep.cli.endpoint import HostOptions
from skep.cli.running import run_requests, say
from skep.errors import FailedPrecondition, InvalidArgument, NotFound, SkepError, Unavailable
from skep.model.options.labels import JOB_TTL
from skep.stack.progress import FAILURES_MAX, UNPLACED, ServiceProblem, explanation_of, why_hopeless
from skep.stack.waiting import HeldTimes

_LOOK_S = 0.1
"""A run may end at once.  The pauses grow to ``_LOOK_S_MAX``, because a long run need not be noticed sooner."""
_LOOK_S_MAX = 1.0
"""The longest pause in seconds between two looks at a run."""
_TTL = "60s"
"""Time after its end when a run is removed, if this command was killed."""
_ENDED = frozenset({"complete", "failed", "rejected", "shutdown", "orphaned", "remove"})
_OWN_EXIT = re.compile(r"task: non-zero exit \([0-9]+\)")
"""Error of a task whose command ended by itself."""
_BEGUN = frozenset({"running", *_ENDED})


def run_spec(
    service: Mapping[str, Any],
    command: Sequence[str],
    *,
    name: str,
    env: Sequence[str] = (),
    tty: bool = False,
) -> dict[str, Any]:
    """Return the spec of a job with one task that runs ``command`` with the settings of the spec ``service``.

    It publishes no ports, has no health check, and is not restarted.  It has no aliases and no host name, because other
    services would connect to it by these.
    """
    task = copy.deepcopy(dict(service["TaskTemplate"]))
    container = task.get("ContainerSpec")
    if container is None:
        raise FailedPrecondition(f"service {service['Name']} runs no containers. Choose another service.")
    container["Args"] = list(command)
    container["Env"] = [*(container.get("Env") or ()), *env]
    container["Healthcheck"] = {"Test": ["NONE"]}
    container["TTY"] = container["OpenStdin"] = tty
    task["RestartPolicy"] = {"Condition": "none"}
    task.pop("ForceUpdate", None)
    container.pop("Hostname", None)
    if task.get("Networks"):
        task["Networks"] = _without_aliases(task["Networks"])
    return {
        "Name": name,
        "Labels": {JOB_TTL: _TTL},
        "TaskTemplate": task,
        "Mode": {"ReplicatedJob": {"MaxConcurrent": 1, "TotalCompletions": 1}},
        "Networks": _without_aliases(service.get("Networks") or ()),
    }


def _without_aliases(networks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in one.items() if key != "Aliases"} for one in networks]


@click.command(cls=OrDocker, context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Keep STDIN open. Needs --tty.")
@click.option("-t", "--tty", is_flag=True, help="Allocate a pseudo-TTY, and attach to it.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Set environment variables.")
@click.argument("service")
@click.argument("command", metavar="COMMAND [ARG]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(
    ctx: click.Context,
    /,
    service: str,
    command: Sequence[str],
    interactive: bool,
    tty: bool,
    env: Sequence[str],
) -> None:
    """Run a one-off command with a service's settings.

    COMMAND runs with the image, environment, networks, secrets, configs and mounts of SERVICE, in a new task on any
    node. The task publishes no ports and is removed afterwards. The exit code is COMMAND's.

    Any other name is an image, as in docker run.

    \b
    Examples:
      skep run web ./manage.py migrate
      skep run -it db psql -h db
    """
    host: HostOptions = ctx.obj
    if interactive and not tty:
        raise click.UsageError("--interactive needs --tty. Use -it.")
    code = run_requests(_run(host, service, command, env, tty=tty))
    if code is None:
        to_docker(ctx)
    raise SystemExit(code)


async def _run(
    host: HostOptions, service: str, command: Sequence[str], env: Sequence[str], *, tty: bool
) -> int | None:
    """Run the command and return its exit code, or None without such a service."""
    async with host.raw_client() as client:
        try:
            found = await client.get(f"/services/{quote(service, safe='')}")
        except NotFound:
            return None
        name = f"{found['Spec']['Name'][:50]}-run-{secrets.token_hex(3)}"
        spec = run_spec(found["Spec"], command, name=name, env=env, tty=tty)
        created = await create(client, spec, RegistryLogins(host.docker_folder))
        try:
            task = await wait_task(client, created["ID"], _BEGUN)
            await _show(client, created["ID"], task, tty=tty)
            return await exit_code_of(client, await wait_task(client, created["ID"], _ENDED))
        finally:
            with suppress(SkepError):
                await client.request("DELETE", f"/services/{created['ID']}")


async def create(client: RawClient, spec: Mapping[str, Any], logins: RegistryLogins) -> dict[str, Any]:
    """Create the service of a run, and let its node use the user's registry login, as ``docker run`` does."""
    auth = ""
    with suppress(InvalidArgument):  # an unreadable login matters only if the registry asks for one
        auth = logins.of(spec["TaskTemplate"]["ContainerSpec"]["Image"])
    headers = {"X-Registry-Auth": auth} if auth else {}
    created: dict[str, Any] = await client.request("POST", "/services/create", spec, headers=headers)
    return created


async def wait_task(client: RawClient, service_id: str, states: frozenset[str]) -> dict[str, Any]:
    """Wait until the task of a run is in one of ``states``, show its progress, and return the task.

    Raises:
        FailedPrecondition: The run was removed.
        Unavailable: The task cannot get a node, an address or a port, so that waiting cannot help.
    """
    shown, pause_s, waited_s, held = "", _LOOK_S, 0.0, HeldTimes()
    task = await _task_of(client, service_id)
    while True:
        status = task.get("Status") or {}
        if status.get("State") in states:
            return task
        words = f"{status.get('State', 'new')}: {status.get('Err') or status.get('Message') or 'waiting'}"
        if waited_s > 1 and status.get("State") != "running":
            await _require_hope(client, service_id, held)
            if words != shown:
                click.echo(words, err=True)
                shown = words
        await asyncio.sleep(pause_s)
        waited_s += pause_s
        pause_s = min(pause_s * 1.5, _LOOK_S_MAX)
        # The command keeps running without managers, so a change of leader must not end it.
        task = await persistently(partial(_task_of, client, service_id), partial(click.echo, err=True))


async def _task_of(client: RawClient, service_id: str) -> dict[str, Any]:
    """Return the task of a run, or an empty document before it is created.

    The run of a drained or lost node starts again elsewhere, in a younger task.

    Raises: FailedPrecondition: the run was removed.
    """
    filters = json({"service": [service_id]}).decode()
    found: list[dict[str, Any]] = await client.get("/tasks", {"filters": filters})
    if not found:
        try:
            await client.get(f"/services/{service_id}")
        except NotFound as error:
            raise FailedPrecondition("the run was removed before its command ended. Run it again.") from error
    return max(found, key=lambda one: str(one.get("CreatedAt", "")).rstrip("Z"), default={})


async def _require_hope(client: RawClient, service_id: str, held: HeldTimes) -> None:
    """Check that waiting for the start of a task can help.  Raises: Unavailable."""
    try:
        explanation = explanation_of(await client.get(f"/skep/services/{service_id}/explain"))
    except SkepError:  # the managers have an earlier version, or no leader
        return
    problem, now = explanation.problem or ServiceProblem(), asyncio.get_running_loop().time()
    unplaced_s = max(held.held_s(kind, now, holds=problem.kind == kind) for kind in UNPLACED)
    if why := why_hopeless(problem, FAILURES_MAX, unplaced_s):
        raise Unavailable(f"{why}: {explanation.reason}" if explanation.reason else why)


async def _show(client: RawClient, service_id: str, task: Mapping[str, Any], *, tty: bool) -> None:
    """Print the task's whole output, and with a terminal also pass on its input."""
    path = f"/skep/tasks/{task['ID']}/container"
    query = {"stdout": "1", "stderr": "1"}
    async with AsyncExitStack() as stack:
        try:
            if tty:
                attached = {**query, "stdin": "1", "stream": "1", "logs": "1"}
                opening = client.exchange("POST", f"{path}/attach", query=attached, upgrade=True)
            else:
                opening = client.exchange("GET", f"{path}/logs", query={**query, "follow": "1"})
            stream = await stack.enter_async_context(opening)
        except SkepError:  # The task has ended, or its node is unreachable. Managers have its output.
            await wait_task(client, service_id, _ENDED)
            stream = await stack.enter_async_context(
                client.exchange("GET", f"/tasks/{task['ID']}/logs", query=query)
            )
            await (terminal.print_pieces if tty else terminal.print_frames)(stream.pieces())
            return
        if not tty:
            await terminal.print_frames(stream.pieces())
            return
        await stack.enter_async_context(terminal.controlling(partial(_resize, client, path)))
        await terminal.join(stream, takes_input=True, is_tty=True)


async def _resize(client: RawClient, path: str, rows: int, columns: int) -> None:
    await client.post(f"{path}/resize", query={"h": str(rows), "w": str(columns)})


async def exit_code_of(client: RawClient, task: Mapping[str, Any]) -> int:
    """Return the command's exit code, and show why it could not start or was killed, which its output does not have.

    Raises: FailedPrecondition: the task never ran.
    """
    code = _exit_code(task)
    if code and not _OWN_EXIT.fullmatch(task["Status"].get("Err") or ""):
        with suppress(SkepError):  # the exit code is known, so a lost leader does not matter
            explained = await client.get(f"/skep/tasks/{task['ID']}/explain")
            say(f"Error: {explained['Summary']}")
    return code


def _exit_code(task: Mapping[str, Any]) -> int:
    """Return the command's exit code.  Raises: FailedPrecondition: the task never ran."""
    status = task["Status"]
    container = status.get("ContainerStatus") or {}
    code = int(container.get("ExitCode") or 0)
    if status["State"] == "complete" or code:
        return code
    raise FailedPrecondition(f"the task is {status['State']}: {status.get('Err') or status.get('Message')}")

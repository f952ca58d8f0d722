"""``skep secret`` and ``skep config``: docker's commands, and rotate and prune.

Secrets and configs are immutable.  A rotation creates the next version, an object ``NAME-v2`` with the labels of the
first version, and updates every service that uses an older version, each by its own update policy.  In the containers
the file keeps its name.
"""

import asyncio
import base64
import copy
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

import click
import msgspec
from msgspec.structs import replace

from skep.api.client.client import ApiClient
from skep.api.client.updates import update
from skep.api.client.waiting import persistently
from skep.cli import options, passthrough
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.running import run_requests, say
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable
from skep.model.door.routes import tls_secrets, with_tls_secret
from skep.model.options.labels import ROTATION_OF, is_stopped
from skep.model.options.schedules import CRON
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.unknown import leniently
from skep.stack.progress import FAILURES_MAX, ServiceProblem, ServiceProgress, progress_of
from skep.stack.waiting import Reasons, Steadiness, look_at, unfinished

_LOOK_S = 0.5
"""Seconds between two looks at the services, as in the other commands that wait: an update takes seconds or more."""
_FILE_BYTES_MAX = 1 << 20
"""Larger than any secret or config that a manager accepts, so that the command need not read a large file."""
_STUCK = ("paused", "rollback_started", "rollback_paused", "rollback_completed")


class FileKind(msgspec.Struct, frozen=True):
    """Secrets or configs, as the API spells them."""

    noun: str
    example: str
    """A name for the examples in the help."""

    @property
    def path(self) -> str:
        """Return their path in the API."""
        return f"/{self.noun}s"

    @property
    def field(self) -> str:
        """Return the field of a container's spec with the references."""
        return f"{self.noun.title()}s"

    @property
    def id_key(self) -> str:
        """Return the key of the id in a reference."""
        return f"{self.noun.title()}ID"

    @property
    def name_key(self) -> str:
        """Return the key of the name in a reference."""
        return f"{self.noun.title()}Name"


def root_of(found: Mapping[str, Any]) -> str:
    """Return the name of an object's first version.

    The label counts only if the object's name is a version's name.  Every user who may create secrets in a stack can
    set the label, but only on names that begin with the stack's name.
    """
    spec = found["Spec"]
    root = str(_labels(found).get(ROTATION_OF) or "")
    return root if root and re.fullmatch(_version_pattern(root), spec["Name"]) else str(spec["Name"])


def versions(objects: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """Return all versions of the object ``name``, which may be any of them, oldest first.

    Objects of other stacks with such a name are ignored.

    Raises: NotFound.
    """
    named = next((one for one in objects if one["Spec"]["Name"] == name), None)
    if named is None:
        if made := next((one for one in objects if _is_of_a_file(one, name)), None):
            raise NotFound(
                f"{name} is in the file of stack {_labels(made)[STACK_LABEL]}, which has made {made['Spec']['Name']} "
                f"of it. Change its content and deploy the file with skep stack deploy."
            )
        raise NotFound(f"{name} does not exist. Create it with skep secret create or skep config create.")
    root, stack = root_of(named), _labels(named).get(STACK_LABEL)
    found = [one for one in objects if root_of(one) == root and _labels(one).get(STACK_LABEL) == stack]
    return sorted(found, key=lambda one: _number(one, root))


def _labels(found: Mapping[str, Any]) -> Mapping[str, str]:
    labels: Mapping[str, str] = found["Spec"].get("Labels") or {}
    return labels


def _is_of_a_file(found: Mapping[str, Any], name: str) -> bool:
    """Return whether a stack's file has made the object, whose name has a digest of its content."""
    made = str(found["Spec"]["Name"])
    return (
        STACK_LABEL in _labels(found) and re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{10}}", made) is not None
    )


def _version_pattern(root: str) -> str:
    return re.escape(root) + r"-v([0-9]{1,9})"


def _number(found: Mapping[str, Any], root: str) -> int:
    match = re.fullmatch(_version_pattern(root), found["Spec"]["Name"])
    return int(match[1]) if match else 1


def next_name(objects: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> str:
    """Return an unused name for the version after ``known``."""
    root = root_of(known[-1])
    taken = {one["Spec"]["Name"] for one in objects}
    number = max(_number(one, root) for one in known) + 1
    while f"{root}-v{number}" in taken:
        number += 1
    return f"{root}-v{number}"


def moved(
    kind: FileKind,
    spec: Mapping[str, Any],
    old: Collection[str],
    new: Mapping[str, Any],
    names: Collection[str] = (),
) -> Any:
    """Return a service's spec with references to ``old`` replaced by ``new``, or None without such references.

    Args:
        names: The names of the old versions, for labels that name a secret with a certificate.
    """
    made = copy.deepcopy(dict(spec))
    touched = False
    if kind is SECRET and (labels := made.get("Labels")):
        made["Labels"] = with_tls_secret(labels, names, new["Spec"]["Name"])
        touched = made["Labels"] != labels
    for reference in _references(kind, made):
        if reference[kind.id_key] in old:
            reference[kind.id_key], reference[kind.name_key] = new["ID"], new["Spec"]["Name"]
            touched = True
    return made if touched else None


def _references(kind: FileKind, spec: Mapping[str, Any] | None) -> Sequence[dict[str, Any]]:
    container = ((spec or {}).get("TaskTemplate") or {}).get("ContainerSpec") or {}
    return container.get(kind.field) or ()


def stack_hint(kind: FileKind, service: Mapping[str, Any], old: Collection[str], new: str) -> str:
    """Return the change that the file of the service's stack needs, or an empty string for a service without a stack.

    Args:
        service: the service before the rotation.
        old: the ids of the previous versions.
        new: the name of the new version.
    """
    stack = _labels(service).get(STACK_LABEL)
    names = [one[kind.name_key] for one in _references(kind, service["Spec"]) if one[kind.id_key] in old]
    if not stack or not names:
        return ""
    return f"name {new} in the file of stack {stack}, whose next deploy otherwise returns to {names[0]}"


class VersionProgress(msgspec.Struct, frozen=True):
    """A service's progress: the number of its tasks with the new version, the number of all its tasks, and the reason
    why it is ``stuck``, or empty.
    """

    done: int
    wanted: int
    is_complete: bool = False
    stuck: str = ""
    cause: str = ""
    """Reason why tasks with the new version do not run.  Empty if unknown."""
    problem: ServiceProblem = ServiceProblem()


def version_progress(
    kind: FileKind,
    service: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    new: str,
    old: Collection[str] = (),
) -> VersionProgress:
    """Return a service's progress.  A job with a schedule is done at once, because its next run will use the new
    version.  A service that no longer uses any version is done as well.

    Args:
        tasks: the service's tasks that are desired to run.
        new: the id of the version.
        old: the ids of the previous versions.
    """
    if _is_scheduled(service) and not _uses(kind, service, old):
        return VersionProgress(0, 0, is_complete=True)
    on_it = [task for task in tasks if any(r[kind.id_key] == new for r in _references_of(kind, task))]
    done = sum(task["Status"]["State"] == "running" for task in on_it)
    replicated = service["Spec"]["Mode"].get("Replicated")
    has_number = replicated is not None and not is_stopped(_labels(service))
    wanted = max(len(tasks), replicated.get("Replicas", 1) if has_number else 0)
    update = service.get("UpdateStatus") or {}
    state = update.get("State", "")
    if state in _STUCK:
        return VersionProgress(done, wanted, stuck=update.get("Message") or state)
    if _uses(kind, service, old):  # the status of a rollback is lost if the service is updated once more
        return VersionProgress(done, wanted, stuck=_moved_back(kind))
    if not _uses(kind, service, [new]):
        return VersionProgress(done, wanted, is_complete=True)
    return VersionProgress(done, wanted, is_complete=done == wanted == len(tasks) and state != "updating")


def _uses(kind: FileKind, service: Mapping[str, Any], versions: Collection[str]) -> bool:
    """Return whether the service's spec refers to one of the versions with these ids."""
    return any(one[kind.id_key] in versions for one in _references(kind, service["Spec"]))


def _moved_back(kind: FileKind) -> str:
    return (
        f"it uses the previous {kind.noun} again, because its update was rolled back or its spec was changed"
    )


def _is_scheduled(service: Mapping[str, Any]) -> bool:
    """Return whether it is a job with a schedule.  An update does not run such a job."""
    return CRON in _labels(service)


def _references_of(kind: FileKind, task: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    return _references(kind, {"TaskTemplate": task["Spec"]})


def unused(
    kind: FileKind, objects: Sequence[Mapping[str, Any]], services: Sequence[Mapping[str, Any]], *, all: bool
) -> list[Mapping[str, Any]]:
    """Return objects that neither a service's spec nor its previous spec uses.  Without ``all``, return only old
    versions.
    """
    used = {
        reference[kind.id_key]
        for service in services
        for spec in (service["Spec"], service.get("PreviousSpec"))
        for reference in _references(kind, spec)
    }
    specs = [spec for one in services for spec in (one["Spec"], one.get("PreviousSpec") or {})]
    if kind is SECRET:
        named = {name for spec in specs for name in tls_secrets(spec.get("Labels") or {})}
        used |= {one["ID"] for one in objects if one["Spec"]["Name"] in named}
    return [
        one
        for one in sorted(objects, key=lambda one: str(one["Spec"]["Name"]))
        if one["ID"] not in used and (all or one is not versions(objects, one["Spec"]["Name"])[-1])
    ]


class _Rotation:
    """A running rotation."""

    def __init__(self, kind: FileKind, client: ApiClient) -> None:
        self._kind = kind
        self._client = client
        self._shown: dict[str, str] = {}
        self._old: Collection[str] = ()
        """Ids of the previous versions."""
        self._open: set[str] = set()
        """Names of services that are not done."""
        self.problems: list[str] = []
        """A line for each service that cannot be updated or is stuck."""
        self._is_kept = False
        """Whether a service got the new version, or its user is to update it."""
        self._reasons = Reasons(client, FAILURES_MAX)
        self._steadiness = Steadiness()

    async def next_version(
        self, name: str, data: bytes | None
    ) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        """Return the target version, and the names of older ones by id.

        Without ``data``, the latest version is the target.
        """
        objects = await self._client.get(self._kind.path, timeout_s=RESPONSE_TIMEOUT_S)
        try:
            known = versions(objects, name)
        except NotFound:
            await self._refuse_other_kind(name)
            raise
        if data is None:
            return known[-1], {one["ID"]: one["Spec"]["Name"] for one in known[:-1]}
        first = known[0]["Spec"]
        spec = {key: value for key, value in first.items() if key != "Data"} | {
            "Name": next_name(objects, known),
            "Labels": {**_labels(known[0]), ROTATION_OF: root_of(known[-1])},
            "Data": base64.b64encode(data).decode(),
        }
        made = await self._client.post(f"{self._kind.path}/create", spec, timeout_s=RESPONSE_TIMEOUT_S)
        click.echo(f"{spec['Name']} created", err=True)
        return {"ID": made["ID"], "Spec": spec}, {one["ID"]: one["Spec"]["Name"] for one in known}

    async def _refuse_other_kind(self, name: str) -> None:
        """Raise NotFound with the right command if ``name`` is a config instead of a secret, or the reverse."""
        other = CONFIG if self._kind is SECRET else SECRET
        found = await self._client.get(other.path, filters={"name": [name]}, timeout_s=RESPONSE_TIMEOUT_S)
        if any(one["Spec"]["Name"] == name for one in found):  # the filter compares prefixes
            raise NotFound(f"{name} is a {other.noun}. Run skep {other.noun} rotate {name}.")

    async def move(self, old: Mapping[str, str], new: Mapping[str, Any]) -> list[str]:
        """Update the services that use an older version, and return the ids of the services to wait for.

        A service that cannot be updated becomes a problem and does not stop the others.
        """
        using, self._old = list[str](), old
        for service in await self._client.get("/services", timeout_s=RESPONSE_TIMEOUT_S):
            name, mode = service["Spec"]["Name"], service["Spec"]["Mode"]
            is_job = "ReplicatedJob" in mode or "GlobalJob" in mode
            try:
                if is_job and not _is_scheduled(service):
                    if moved(self._kind, service["Spec"], old, new, old.values()) is not None:
                        self._is_kept = True
                        await self._leave(service, new["Spec"]["Name"])
                    continue
                await self._move_one(service["ID"], old, new)
                current = await self._client.get(f"/services/{service['ID']}", timeout_s=RESPONSE_TIMEOUT_S)
            except SkepError as error:
                if not (isinstance(error, NotFound) and await self._is_gone(service["ID"])):
                    self.problems.append(f"{name}: {error}")
                continue
            if _uses(self._kind, current, [new["ID"], *old]):
                using.append(service["ID"])
            if _uses(self._kind, current, [new["ID"]]):
                self._is_kept = True
                if hint := stack_hint(self._kind, service, old, new["Spec"]["Name"]):
                    click.echo(f"{name}: {hint}", err=True)
        return using

    async def drop_refused(self, new: Mapping[str, Any]) -> None:
        """Remove the new version if every service that should use it was refused."""
        if not self.problems or self._is_kept:
            return
        with suppress(SkepError):  # for example, a service uses it, and only the response was lost
            await self._client.delete(f"{self._kind.path}/{new['ID']}", timeout_s=RESPONSE_TIMEOUT_S)
            click.echo(f"{new['Spec']['Name']} removed again, because no service uses it", err=True)

    async def _leave(self, service: Mapping[str, Any], new: str) -> None:
        """Report a job that is not updated because that would run it again.  For a job that has not completed, this is
        an error.
        """
        name = service["Spec"]["Name"]
        tasks = await self._client.get(
            "/tasks", filters={"service": [service["ID"]]}, timeout_s=RESPONSE_TIMEOUT_S
        )
        job = leniently(msgspec.json.encode(service), Service)
        found = [leniently(msgspec.json.encode(one), Task) for one in tasks]
        if progress_of(job, found).is_done:
            click.echo(f"{name}: completed job, keeps the previous {self._kind.noun}", err=True)
            return
        self.problems.append(
            f"{name}: this job is not complete, and an update would run it again, so it keeps the previous "
            f"{self._kind.noun}. Update it to {new} yourself."
        )

    async def _is_gone(self, id: str) -> bool:
        """Return whether the service was removed meanwhile; otherwise its update misses another object."""
        try:
            await self._client.get(f"/services/{id}", timeout_s=RESPONSE_TIMEOUT_S)
        except NotFound:
            return True
        except SkepError:
            pass
        return False

    async def _move_one(self, id: str, old: Mapping[str, str], new: Mapping[str, Any]) -> None:
        await update(
            self._client,
            "services",
            id,
            lambda service: moved(self._kind, service["Spec"], old, new, old.values()),
            timeout_s=RESPONSE_TIMEOUT_S,
        )

    async def wait(self, ids: Sequence[str], new: Mapping[str, Any]) -> None:
        """Show progress until every task has ``new``.  Services that are stuck become problems."""
        waiting = list(ids)
        while waiting:
            for id in tuple(waiting):
                service, found = await persistently(partial(self._look, id, new), say)
                if found is None:
                    waiting.remove(id)
                    continue
                name, version = service["Spec"]["Name"], new["Spec"]["Name"]
                text = f"{found.done} of {found.wanted} tasks have {version}"
                text += f": {found.cause}" if found.cause and not found.stuck else ""
                self._show(name, f"its next run has {version}" if _is_scheduled(service) else text)
                if found.stuck:
                    self.problems.append(f"{name}: {found.stuck}. Run skep explain {name}.")
                if found.stuck or self._is_steady(id, found):
                    waiting.remove(id)
                    self._open.discard(name)
            if waiting:
                await asyncio.sleep(_LOOK_S)

    def _is_steady(self, id: str, found: VersionProgress) -> bool:
        """Return whether a service needs no further look.  After a failure, its tasks have to run for some seconds."""
        progress = ServiceProgress("", is_done=found.is_complete, problem=found.problem)
        return self._steadiness.is_steady(id, progress, asyncio.get_running_loop().time())

    async def _look(
        self, id: str, new: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], VersionProgress | None]:
        """Return the service and its progress, or None as progress if it was removed meanwhile."""
        try:
            service = await self._client.get(f"/services/{id}", timeout_s=RESPONSE_TIMEOUT_S)
            filters = {"service": [id], "desired-state": ["running"]}
            tasks = await self._client.get("/tasks", filters=filters, timeout_s=RESPONSE_TIMEOUT_S)
            found = version_progress(self._kind, service, tasks, new["ID"], self._old)
            look = None if found.is_complete or found.stuck else await look_at(self._client, id)
        except NotFound:
            return {}, None
        if look is not None:
            explained = (await self._reasons.explain({id: look}))[id]
            stuck = explained.text if explained.is_stuck else ""
            found = replace(
                found,
                is_complete=explained.is_resting or explained.is_final,
                stuck=stuck,
                cause=explained.cause,
                problem=explained.problem,
            )
        return service, found

    def _show(self, name: str, text: str) -> None:
        self._open.add(name)
        if self._shown.get(name) != text:
            self._shown[name] = text
            say(f"{name}: {text}")

    def unfinished(self) -> dict[str, str]:
        """Return the last shown progress of each service that is not done, by name."""
        return {name: self._shown[name] for name in sorted(self._open)}


def _sentences(problems: Sequence[str]) -> str:
    return " ".join(f"{one.rstrip('.')}." for one in problems)


async def _rotate(host: HostOptions, kind: FileKind, name: str, data: bytes | None, timeout_s: float) -> str:
    async with host.client() as client:
        rotation = _Rotation(kind, client)
        new, old = await rotation.next_version(name, data)
        ids = await rotation.move(old, new)
        if data is not None:
            await rotation.drop_refused(new)
        try:
            async with asyncio.timeout(timeout_s):
                await rotation.wait(ids, new)
        except TimeoutError:
            text = _sentences([unfinished(rotation.unfinished(), timeout_s), *rotation.problems])
            raise Unavailable(text) from None
        if rotation.problems:
            raise Unavailable(_sentences(rotation.problems))
        return str(new["Spec"]["Name"])


async def _prune(host: HostOptions, kind: FileKind, *, all: bool) -> None:
    async with host.client() as client:
        objects = await client.get(kind.path, timeout_s=RESPONSE_TIMEOUT_S)
        services = await client.get("/services", timeout_s=RESPONSE_TIMEOUT_S)
        for one in unused(kind, objects, services, all=all):
            try:
                await client.delete(f"{kind.path}/{one['ID']}", timeout_s=RESPONSE_TIMEOUT_S)
            except SkepError as error:  # a service has just started to use it
                click.echo(f"{one['Spec']['Name']}: {error}", err=True)
            else:
                click.echo(one["Spec"]["Name"])


_ROTATE_HELP = """Replace the content of a {noun} in every service.

Creates a new version from FILE (- for standard input) and updates the services by their update policies. The command
returns when all tasks have the new version. Previous versions stay for rollbacks until you prune them.

Without FILE, resumes an interrupted rotation.

\b
Examples:
  skep {noun} rotate {example} new.txt
  skep {noun} rotate {example}
"""


def _commands(kind: FileKind) -> click.Group:
    """Return docker's commands of ``kind``, with rotate and prune."""

    @click.group(
        kind.noun,
        cls=passthrough.WithDockers,
        help=f"""Manage {kind.noun}s.

        \b
        Examples:
          skep {kind.noun} ls
          skep {kind.noun} rotate {kind.example} new.txt
        """,
    )
    def group() -> None:
        pass

    @group.command(help=_ROTATE_HELP.format(noun=kind.noun, example=kind.example))
    @options.timeout()
    @click.argument("name", metavar=kind.noun.upper())
    @click.argument("file", type=click.File("rb"), required=False)
    @click.pass_obj
    def rotate(host: HostOptions, name: str, file: BinaryIO | None, timeout: float) -> None:
        data = file.read(_FILE_BYTES_MAX + 1) if file is not None else None
        if data is not None and len(data) > _FILE_BYTES_MAX:
            raise click.ClickException(
                str(
                    InvalidArgument(
                        f"the file is larger than {_FILE_BYTES_MAX >> 20} MiB. Use a smaller one."
                    )
                )
            )
        click.echo(run_requests(_rotate(host, kind, name, data, timeout)))

    @group.command(
        cls=options.accepting({"--force": "--yes", "-f": "--yes"}),
        help=f"""Remove unused {kind.noun}s.

        A {kind.noun} is unused if neither the current nor the previous spec of a service uses it. Without --all, only
        previous versions of rotated {kind.noun}s are removed.

        \b
        Example:
          skep {kind.noun} prune
        """,
    )
    @click.option(
        "--all", "-a", "is_all", is_flag=True, help=f"Also remove {kind.noun}s that were never rotated."
    )
    @options.yes
    @click.pass_obj
    def prune(host: HostOptions, is_all: bool, yes: bool) -> None:
        if not yes:
            which = "all unused" if is_all else "all unused previous versions of"
            click.confirm(f"Remove {which} {kind.noun}s?", abort=True, err=True)
        run_requests(_prune(host, kind, all=is_all))

    return group


SECRET, CONFIG = FileKind("secret", "password"), FileKind("config", "nginx.conf")
secret = _commands(SECRET)
config = _commands(CONFIG)

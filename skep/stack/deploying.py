"""Carrying a plan out: what is new is made, services are updated in the order of their dependencies, then watched.

Repeating a deploy completes one that was interrupted: each step asks for what is to be, not for what is to be done.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.api.requests import Requests
from skep.api.updates import ATTEMPTS, is_race, update
from skep.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    SkepError,
    Unavailable,
    reason_of,
)
from skep.model.autoscaling import with_present_number
from skep.model.encoding import to_json
from skep.model.schedules import CRON
from skep.model.service import Service, ServiceSpec
from skep.model.task import Task
from skep.model.unknown import leniently
from skep.stack.document import Problem, Problems
from skep.stack.planning import (
    Action,
    Change,
    Existing,
    Placement,
    Plan,
    differences,
    is_still,
    merged,
    other_content,
    superseded,
    waves,
    with_network_names,
)
from skep.stack.progress import UP_TO_DATE, ServiceProgress, progress_of
from skep.stack.project import IMAGE, NAMESPACE, Stack, StackFile
from skep.stack.waiting import wait_done

RESPONSE_TIMEOUT_S: Final = 30.0
_AT_ONCE: Final = 8
"""Requests in flight."""
_TOGETHER: Final = 200
"""Services in one request: a few megabytes at most, and no longer than a fraction of a second."""
_OTHER_CONTENT: Final = "only updates to Labels are allowed"
"""SwarmKit's refusal of other content for a secret or a config."""
_LAST_WORDS_S: Final = 5.0
"""To ask for the state of a deploy that is interrupted."""

NO_LOGINS: Final[Mapping[str, str]] = MappingProxyType({})

Show = Callable[[str, str], None]
"""Takes the name of an object, and what to say of it."""


class Made(msgspec.Struct):
    """What a deploy has created so far: its undo removes this and nothing else."""

    services: list[Service] = []
    """With networks by name."""
    files: list[tuple[str, str, str]] = []
    """Networks, secrets and configs: kind, name and id."""
    revision: str = ""
    """The id of the config that records the deploy."""
    known: frozenset[str] = frozenset()
    """The ids of the revisions that there were before."""


async def existing_of(client: Requests, stack: str, configs: Iterable[str] = ()) -> Existing:
    """Return the stack's services, and everything that they may refer to: of configs those with these names.

    Configs come with their content, and those of the whole cluster can be hundreds of megabytes.
    """
    label = {"label": [f"{NAMESPACE}={stack}"]}
    services, networks, secrets, found = await asyncio.gather(
        client.get("/services", filters=label, timeout_s=RESPONSE_TIMEOUT_S),
        client.get("/networks", timeout_s=RESPONSE_TIMEOUT_S),
        client.get("/secrets", timeout_s=RESPONSE_TIMEOUT_S),
        configs_named(client, configs),
    )
    return Existing(
        services=_services(services), networks=tuple(networks), secrets=tuple(secrets), configs=tuple(found)
    )


async def configs_named(client: Requests, names: Iterable[str]) -> list[Any]:
    """Return the configs with these names, and perhaps others: the filter takes prefixes."""
    wanted = sorted(set(names))
    if not wanted:
        return []
    return list(await client.get("/configs", filters={"name": wanted}, timeout_s=RESPONSE_TIMEOUT_S))


def _services(objects: Iterable[Any]) -> tuple[Service, ...]:
    return tuple(leniently(msgspec.json.encode(one), Service) for one in objects)


async def with_placements(client: Requests, plan: Plan, warn: Callable[[str], None]) -> Plan:
    """The plan, and where the cluster would run its services; a cluster that cannot say so is not an error."""
    changes = [one for one in plan.of("service", Action.CREATE, Action.UPDATE) if one.spec is not None]
    if not changes:
        return plan
    body = msgspec.Raw(to_json([one.spec for one in changes]))
    try:
        found = await client.post("/skep/services/placement", body, timeout_s=RESPONSE_TIMEOUT_S)
        placements = msgspec.convert(found, tuple[Placement, ...])
    except NotFound:  # an earlier version
        return plan
    except (SkepError, msgspec.ValidationError) as error:
        warn(f"the cluster does not say where services would run: {error}")
        return plan
    return replace(plan, placements={one.name: one for one in placements})


async def pinned_images(
    client: Requests,
    names: Iterable[str],
    warn: Callable[[str], None],
    logins: Mapping[str, str] = NO_LOGINS,
) -> dict[str, str]:
    """Of image names, the names with the digests that their registries give; those that none gives are left out.

    ``logins``: by image name.
    """
    limit = asyncio.Semaphore(_AT_ONCE)

    async def pinned(name: str) -> tuple[str, str]:
        if "@" in name:
            return name, ""
        async with limit:
            try:
                found = await client.get(
                    f"/distribution/{name}/json",
                    headers=_auth(logins.get(name)),
                    timeout_s=RESPONSE_TIMEOUT_S,
                )
                return name, f"{name}@{found['Descriptor']['digest']}"
            except (SkepError, KeyError, TypeError) as error:
                warn(
                    f"image {name} could not be accessed on a registry to record its digest ({error}): "
                    "nodes take the version that they find"
                )
                return name, ""

    found = await asyncio.gather(*(pinned(name) for name in sorted(set(names))))
    return {name: image for name, image in found if image}


class Deployment:
    """One deploy on its way."""

    def __init__(
        self,
        client: Requests,
        stack: Stack,
        plan: Plan,
        show: Show,
        logins: Mapping[str, str] = NO_LOGINS,
        made: Made | None = None,
    ) -> None:
        """
        Args:
            logins: ``X-Registry-Auth`` by the names of images as the files have them.
            made: gets what the deploy creates.
        """
        self._made = made if made is not None else Made()
        self._client = client
        self._logins = logins
        self._stack = stack
        self._plan = plan
        self._show = show
        self._limit = asyncio.Semaphore(_AT_ONCE)
        self._ids: dict[tuple[str, str], str] = {}
        """Of secrets and configs, by kind and name."""

    async def apply(self, wait_s: float | None) -> None:
        """Make the changes; then wait at most ``wait_s`` until they are true (None: do not).

        Raises:
            Problems: a secret is there with other content; no service was changed.
            SkepError: a change was refused; those before it stay, and a repetition goes on behind them.
            Unavailable: it did not become true in time, with the cause.
        """
        try:
            await self._apply(wait_s)
        except asyncio.CancelledError:
            self._show("interrupted", f"{await self._state()}; the same command again completes it")
            raise

    async def _apply(self, wait_s: float | None) -> None:
        await self._update_files()
        await self._create("network", self._bodies("network"))
        await self._create("secret", self._bodies("secret"))
        await self._create("config", self._bodies("config"))
        await self._learn_ids()
        try:
            async with asyncio.timeout(wait_s):
                await self._services()
                for one in self._plan.of("service", Action.REMOVE):
                    await self._remove(one)
                if wait_s is not None:
                    await self._wait(self._plan.of("service", Action.CREATE, Action.UPDATE, Action.KEEP))
        except TimeoutError:
            raise Unavailable(
                f"not done within {wait_s:g} s: {await self._unfinished()} (skep explain SERVICE)"
            ) from None

    async def prune(self, former: Collection[str] = (), kept: Collection[str] = ()) -> None:
        """Remove the secrets and configs that nothing uses, of those that earlier deploys had (``former``).

        Others with the stack's label stay: a deploy beside this one has just created them, or a person has.
        """
        existing = await existing_of(self._client, self._stack.name, former)
        for kind, objects in (("secret", existing.secrets), ("config", existing.configs)):
            candidates = [one for one in objects if one["Spec"]["Name"] in former]
            for one in superseded(self._stack, kind, candidates, existing.services, kept):
                try:
                    await self._client.delete(f"/{kind}s/{one['ID']}", timeout_s=RESPONSE_TIMEOUT_S)
                except SkepError:  # something uses it since a moment ago
                    continue
                self._show(one["Spec"]["Name"], f"superseded {kind} removed")

    # --- steps

    async def _update_files(self) -> None:
        """Change labels, and have the cluster compare what nothing shows: the content of secrets with own names.

        Source: docker/cli, cli/command/stack/deploy_composefile.go (createSecrets, createConfigs).
        """
        problems: list[Problem] = []

        async def write(kind: str, file: StackFile) -> None:
            path, is_changed = f"{kind}s", (kind, file.name) in changed

            def spec(present: Mapping[str, Any]) -> Mapping[str, Any]:
                # What is kept has its own labels: it may be of another stack, or of none.
                return (
                    file.body if is_changed else {**file.body, "Labels": present["Spec"].get("Labels") or {}}
                )

            try:
                async with self._limit:
                    await update(self._client, path, file.name, spec, timeout_s=RESPONSE_TIMEOUT_S)
            except PermissionDenied:
                if is_changed:
                    raise  # else it is used as it is, without the comparison
            except InvalidArgument as error:
                if _OTHER_CONTENT not in str(error):
                    raise
                problems.append(other_content(kind, file))
            else:
                if is_changed:
                    self._show(file.name, f"{kind} updated")

        changed = {(one.kind, one.name) for one in self._plan.changes if one.action is Action.UPDATE}
        kept = {one.name for one in self._plan.of("secret", Action.KEEP)}
        await all_of(
            write(kind, one)
            for kind, files in (("secret", self._stack.secrets), ("config", self._stack.configs))
            for one in files.values()
            if (kind, one.name) in changed
            or (kind == "secret" and one.name in kept and one.content is not None and not one.is_versioned)
        )
        if problems:
            raise Problems(problems)

    def _bodies(self, kind: str) -> dict[str, Mapping[str, Any]]:
        wanted = {one.name for one in self._plan.of(kind, Action.CREATE)}
        if kind == "network":
            return {one.name: one.body for one in self._stack.networks.values() if one.name in wanted}
        files = self._stack.secrets if kind == "secret" else self._stack.configs
        return {one.name: one.body for one in files.values() if one.name in wanted}

    async def _create(self, kind: str, bodies: Mapping[str, Mapping[str, Any]]) -> None:
        async def create(name: str, body: Mapping[str, Any]) -> None:
            async with self._limit:
                try:
                    found = await self._client.post(f"/{kind}s/create", body, timeout_s=RESPONSE_TIMEOUT_S)
                except AlreadyExists:  # by a deploy beside this one
                    return
            if found:
                self._made.files.append((kind, name, str(found.get("ID") or found.get("Id"))))
            self._show(name, f"{kind} created")

        await all_of(create(name, body) for name, body in bodies.items())

    async def _learn_ids(self) -> None:
        """Of what services refer to."""
        containers = [
            one.spec.task_template.container_spec
            for one in self._plan.of("service", Action.CREATE, Action.UPDATE)
            if one.spec is not None
        ]
        needed = {
            "secret": any(one is not None and one.secrets for one in containers),
            "config": any(one is not None and one.configs for one in containers),
        }
        found: dict[str, list[Any]] = {"secret": [], "config": []}
        if needed["secret"]:
            found["secret"] = await self._client.get("/secrets", timeout_s=RESPONSE_TIMEOUT_S)
        if needed["config"]:
            found["config"] = await configs_named(self._client, config_names(self._stack))
        for kind, objects in found.items():
            for one in objects:
                self._ids[kind, one["Spec"]["Name"]] = one["ID"]

    async def _services(self) -> None:
        found = {one.name: one for one in self._plan.of("service", Action.CREATE, Action.UPDATE)}
        chosen = {name: one for name, one in self._stack.services.items() if one.spec.name in found}
        changes = {name: found[one.spec.name] for name, one in chosen.items()}
        # In the order of their dependencies, without waiting: the cluster does that (``model/dependencies.py``), and a
        # service that is updated must not find the earlier run of a job that is to run again.
        for wave in waves(chosen):
            left = [changes[name] for name in wave]
            for at in range(0, len(left), _TOGETHER):
                await self._services_changed(left[at : at + _TOGETHER])

    async def _services_changed(self, changes: Sequence[Change]) -> None:
        """In one request; those for which that fails, and all if the cluster has none such, each by its own."""
        body = [self._wanted(one) for one in changes if one.spec is not None]
        try:
            results = await self._client.post("/skep/services/changes", body, timeout_s=RESPONSE_TIMEOUT_S)
            done = [not one.get("Error") for one in results]
        except SkepError:
            results, done = [{}] * len(changes), [False] * len(changes)
        for change, is_done, result in zip(changes, done, results, strict=True):
            if is_done and change.action is Action.CREATE:
                self._created(change, result)
            elif is_done:
                self._show(change.name, "updated")
            for warning in result.get("Warnings") or ():
                self._show(change.name, f"warning: {warning}")
        await all_of(
            self._service_changed(one) for one, is_done in zip(changes, done, strict=True) if not is_done
        )

    def _created(self, change: Change, response: Mapping[str, Any]) -> None:
        assert change.spec is not None
        if response.get("ID"):
            self._made.services.append(Service(id=response["ID"], spec=change.spec))
        self._show(change.name, "created")

    def _wanted(self, change: Change) -> dict[str, Any]:
        assert change.spec is not None
        made: dict[str, Any] = {"Spec": msgspec.Raw(to_json(self._with_ids(change.spec)))}
        made["RegistryAuth"] = self._login(change)
        return made | ({"ID": change.id, "Version": change.version} if change.id else {})

    def _login(self, change: Change) -> str:
        assert change.spec is not None
        return self._logins.get(change.spec.labels.get(IMAGE, ""), "")

    async def _service_changed(self, change: Change) -> None:
        async with self._limit:
            await (
                self._create_service(change)
                if change.action is Action.CREATE
                else self._update_service(change)
            )

    def _with_ids(self, spec: ServiceSpec) -> ServiceSpec:
        template = spec.task_template
        container = template.container_spec
        assert container is not None
        made = replace(
            container,
            secrets=tuple(
                replace(one, secret_id=self._id("secret", one.secret_name)) for one in container.secrets
            ),
            configs=tuple(
                replace(one, config_id=self._id("config", one.config_name)) for one in container.configs
            ),
        )
        return replace(spec, task_template=replace(template, container_spec=made))

    def _id(self, kind: str, name: str) -> Any:
        if (kind, name) not in self._ids:
            raise NotFound(f"{kind} {name} was removed meanwhile: deploy again")
        return self._ids[kind, name]

    async def _create_service(self, change: Change) -> None:
        assert change.spec is not None
        body = msgspec.Raw(to_json(self._with_ids(change.spec)))
        try:
            found = await self._client.post(
                "/services/create", body, headers=_auth(self._login(change)), timeout_s=RESPONSE_TIMEOUT_S
            )
        except AlreadyExists:
            await self._update_service(change)
            return
        self._created(change, found or {})

    async def _update_service(self, change: Change) -> None:
        wanted = change.spec
        assert wanted is not None
        networks = await self._client.get("/networks", timeout_s=RESPONSE_TIMEOUT_S)
        names = {str(one["Id"]): str(one["Name"]) for one in networks}

        def changed(current: Mapping[str, Any]) -> msgspec.Raw | None:
            (found,) = _services([current])
            present = with_network_names(found, names).spec
            if present.labels.get(NAMESPACE) != self._stack.name:
                raise AlreadyExists(
                    f"service {change.name} exists and is not of the stack {self._stack.name}: remove or rename it"
                )
            spec = _now_wanted(change, wanted, present)
            # A request without a response may have done it.  Done twice, a job would run twice, and the way back of
            # the update would lead to the same spec.
            is_done = present.task_template.container_spec is not None and not any(differences(present, spec))
            return None if is_done else msgspec.Raw(to_json(self._with_ids(spec)))

        await update(
            self._client,
            "services",
            change.name,
            changed,
            headers=_auth(self._login(change)),
            timeout_s=RESPONSE_TIMEOUT_S,
        )
        self._show(change.name, "updated")

    async def _remove(self, change: Change) -> None:
        if await remove_unchanged(self._client, change):
            self._show(change.name, "removed")

    # --- waiting

    async def _wait(self, changes: Sequence[Change]) -> None:
        await wait_done({one.name for one in changes}, lambda _: self._progress(), self._show)

    async def _progress(self) -> dict[str, ServiceProgress]:
        label = {"label": [f"{NAMESPACE}={self._stack.name}"]}
        services, tasks, up_to_date = await asyncio.gather(
            self._client.get("/services", filters=label, timeout_s=RESPONSE_TIMEOUT_S),
            self._client.get("/tasks", filters=label, timeout_s=RESPONSE_TIMEOUT_S),
            self._client.get("/tasks", filters={**label, **UP_TO_DATE}, timeout_s=RESPONSE_TIMEOUT_S),
        )
        current = {str(one["ID"]) for one in up_to_date}
        by_service: dict[str, list[Task]] = {}
        for one in _tasks(tasks):
            by_service.setdefault(one.service_id, []).append(one)
        return {
            one.spec.name: _progress_of(one, by_service.get(one.id, ()), current)
            for one in _services(services)
        }

    async def _state(self) -> str:
        """How far it came, for people."""
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                return await self._unfinished() or "all services are as wanted"
        except (SkepError, OSError, TimeoutError) as error:
            return f"its state is not known ({reason_of(error)})"

    async def _unfinished(self) -> str:
        progress = await self._progress()
        wanted = [
            one.name
            for one in self._plan.changes
            if one.kind == "service" and one.action is not Action.REMOVE
        ]
        open_ = [
            f"{name}: {progress[name].text if name in progress else 'not created'}"
            for name in wanted
            if name not in progress or not progress[name].is_done
        ]
        return "; ".join(open_)


def _now_wanted(change: Change, wanted: ServiceSpec, present: ServiceSpec) -> ServiceSpec:
    """Return the spec to write where others may have changed the service since the plan was made."""
    if change.before is not None:
        return merged(change.before, wanted, present)
    force = present.task_template.force_update
    spec = replace(wanted, task_template=replace(wanted.task_template, force_update=force))
    return with_present_number(spec, present)


async def remove_unchanged(client: Requests, change: Change) -> bool:
    """Remove a service if its spec is still ``change.before``.

    Returns: False: it was removed already.
    Raises: FailedPrecondition: somebody has changed it meanwhile.
    """
    assert change.before is not None
    for attempt in range(ATTEMPTS):
        networks = await client.get("/networks", timeout_s=RESPONSE_TIMEOUT_S)
        names = {str(one["Id"]): str(one["Name"]) for one in networks}
        try:
            (found,) = _services([await client.get(f"/services/{change.id}", timeout_s=RESPONSE_TIMEOUT_S)])
            if not is_still(change.before, with_network_names(found, names).spec):
                raise FailedPrecondition(
                    f"service {change.name} was changed by someone else and was not removed.  "
                    "Plan again: skep stack plan"
                )
            version = str(found.version.index)
            await client.delete(f"/services/{change.id}", version=version, timeout_s=RESPONSE_TIMEOUT_S)
        except NotFound:
            return False
        except SkepError as error:
            if not is_race(error) or attempt == ATTEMPTS - 1:
                raise
        else:
            return True
    raise AssertionError("the last attempt returns or raises")


def config_names(stack: Stack) -> set[str]:
    """The names of the configs that the stack's services may refer to."""
    return {one.name for one in stack.configs.values()}


def _auth(login: str | None) -> dict[str, str]:
    return {"X-Registry-Auth": login} if login else {}


def _tasks(objects: Iterable[Any]) -> list[Task]:
    return [leniently(msgspec.json.encode(one), Task) for one in objects]


async def all_of(work: Iterable[Any]) -> None:
    """All of them, whatever becomes of each.  Raises: the error of one; Unavailable: with those of several."""
    results = await asyncio.gather(*work, return_exceptions=True)
    failed = [one for one in results if isinstance(one, BaseException)]
    if len(failed) > 1 and all(isinstance(one, SkepError) for one in failed):
        raise Unavailable("; ".join(dict.fromkeys(map(str, failed))))
    for one in failed:
        raise one


def _progress_of(service: Service, tasks: Sequence[Task], current: Collection[str]) -> ServiceProgress:
    """A job with a schedule is deployed at once: whenever its runs come, they have the new spec."""
    if CRON in service.spec.labels:
        return ServiceProgress("it has a schedule", is_done=True)
    return progress_of(service, tasks, current)

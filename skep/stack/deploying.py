"""Deploys a plan: creates new objects, changes services in the order of their dependencies, then waits for them.

To complete an interrupted deploy, repeat it.  Each request states the desired state and not a change of it.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.api.client.requests import Requests
from skep.api.client.updates import ATTEMPTS, is_race, update
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
from skep.model.options.autoscaling import with_present_number
from skep.model.service import Service, ServiceSpec
from skep.model.staging.updates import rollback_target
from skep.model.task import Task
from skep.model.values.encoding import to_json
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.unknown import leniently
from skep.stack.claims import Replaced
from skep.stack.cluster_state import (
    AT_ONCE,
    NO_LOGINS,
    RESPONSE_TIMEOUT_S,
    config_names,
    configs_named,
    existing_of,
    registry_auth,
    services_of,
)
from skep.stack.compose.document import FileProblem, FileProblems
from skep.stack.created import CreatedObjects
from skep.stack.differences import differences
from skep.stack.planning import (
    Existing,
    PlanAction,
    PlannedChange,
    StackPlan,
    freeing,
    is_rolled_back,
    is_still,
    merged,
    other_content,
    planned_again,
    superseded,
    waves,
    with_network_names,
)
from skep.stack.progress import (
    FAILURES_MAX,
    UP_TO_DATE,
    ServiceProgress,
    progress_after_deploy,
    progress_without,
)
from skep.stack.project import IMAGE, Stack, StackFile
from skep.stack.revisions import DEPLOYED
from skep.stack.waiting import Look, Reasons, unfinished, wait_done

_TOGETHER: Final = 200
"""Largest number of services in one request, which then has a few megabytes at most and takes a fraction of a
second.
"""
_OTHER_CONTENT: Final = "only updates to Labels are allowed"
"""SwarmKit's error for a change of a secret's or config's content."""
_LEFT: Final = {
    PlanAction.CREATE: "not created",
    PlanAction.UPDATE: "not updated",
    PlanAction.REMOVE: "not removed",
}
"""Changes that a deploy which ended early has not made, by their action."""
_LAST_WORDS_S: Final = 5.0
"""Timeout in seconds for reading the state of an interrupted deploy before the command ends."""

Show = Callable[[str, str], None]
"""Called with the name of an object and a progress text."""


class Deployment:
    """A running deploy."""

    def __init__(
        self,
        client: Requests,
        stack: Stack,
        plan: StackPlan,
        show: Show,
        logins: Mapping[str, str] = NO_LOGINS,
        created: CreatedObjects | None = None,
    ) -> None:
        """
        Args:
            logins: ``X-Registry-Auth`` by image name as written in the files.
            created: filled with the objects that the deploy creates.
        """
        self._created = created if created is not None else CreatedObjects()
        self._client = client
        self._logins = logins
        self._stack = stack
        self._plan = plan
        self._show = show
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._ids: dict[tuple[str, str], str] = {}
        """Ids of secrets and configs, by kind and name."""
        self._networks: Mapping[str, str] = {}
        """Names of all networks by id, read with each plan.  Specs to which services may roll back have names."""
        self._reasons = Reasons(client, FAILURES_MAX)
        self._is_overtaken = False
        """Whether a newer deploy of the same content has replaced this one since the services were last changed."""
        self._rollbacks: dict[str, tuple[ServiceSpec | None, ServiceSpec | None]] = {}
        """The spec that an automatic rollback restores, and the desired spec, of each service that has the latter."""

    async def apply(self, wait_s: float | None, failures_max: int = FAILURES_MAX) -> None:
        """Apply the changes, then wait until the services run with their new spec.

        Args:
            wait_s: longest wait in seconds, or None to return without waiting.
            failures_max: consecutive failures of a task that end the wait, or 0 to wait in spite of failures.

        Raises:
            FileProblems: a secret exists with other content.  No service was changed.
            Replaced: a newer deploy of the stack has replaced this one.
            FailedPrecondition: someone else has removed a service that this deploy waits for.
            SkepError: a change was refused.  Earlier changes stay, and a repeated deploy continues after them.
            Unavailable: the services did not converge in time, or waiting cannot help.  The error names the cause.
        """
        try:
            await self._apply(wait_s, failures_max)
        except asyncio.CancelledError:
            self._show("interrupted", await self._state())
            raise

    async def _apply(self, wait_s: float | None, failures_max: int) -> None:
        await self._update_files()
        await self._create("network", self._bodies("network"))
        await self._create("secret", self._bodies("secret"))
        await self._create("config", self._bodies("config"))
        await self._learn()
        self._reasons = Reasons(self._client, failures_max)
        try:
            async with asyncio.timeout(wait_s):
                await self._services_as_wanted()
                if wait_s is not None:
                    await self._wait(
                        self._plan.of("service", PlanAction.CREATE, PlanAction.UPDATE, PlanAction.KEEP)
                    )
        except TimeoutError:
            assert wait_s is not None
            raise Unavailable(unfinished(await self.find_unfinished(), wait_s)) from None

    async def _services_as_wanted(self) -> None:
        """Create, update and remove services.  Raises the same errors as ``apply``.

        If a newer deploy of the same content replaces this one, both complete the newer revision, because the newer
        deploy may be killed before its first change.
        """
        for attempt in range(ATTEMPTS):
            try:
                await self._change_services()
                self._is_overtaken = False
                return
            except SkepError as error:
                claim = self._created.claim
                # If the newer deploy has ended, the new plan usually has no change that the managers could refuse.
                is_same = claim is not None and (await claim.follow() or claim.state == DEPLOYED)
                if not is_same or attempt == ATTEMPTS - 1:
                    raise
                self._show(self._stack.name, f"another deploy has the same content ({error})")
            await self._plan_again()

    async def _plan_again(self) -> None:
        """Plan the changes that are left."""
        existing = await existing_of(self._client, self._stack.name, config_names(self._stack))
        self._plan = planned_again(self._stack, self._plan, existing)
        await self._learn()

    async def _change_services(self) -> None:
        first = freeing(self._plan)
        for one in first:
            await self._remove(one)
        await self._services()
        for one in self._plan.of("service", PlanAction.REMOVE):
            if one not in first:
                await self._remove(one)

    async def find_unfinished(self) -> dict[str, str]:
        """Return the progress of the services that do not run with their new spec yet, by name."""
        existing = await existing_of(self._client, self._stack.name, config_names(self._stack))
        left = planned_again(self._stack, self._plan, existing).of("service", *_LEFT)
        texts = {one.name: _LEFT[one.action] for one in left}
        progress = await self._reasons.explain(await self._looks())
        for one in self._plan.of("service", PlanAction.CREATE, PlanAction.UPDATE, PlanAction.KEEP):
            if one.name not in texts and one.name in progress and not progress[one.name].is_done:
                texts[one.name] = progress[one.name].text
        return texts

    async def prune(self, former: Collection[str] = (), kept: Collection[str] = ()) -> None:
        """Remove the secrets and configs named in ``former``, unless they are still used or named in ``kept``.

        A deploy without a wait names what only removed revisions need, because tasks may still run with former specs.
        Other secrets and configs with the stack's label stay, because a concurrent deploy or a user may have just
        created them.
        """
        existing = await existing_of(self._client, self._stack.name, former) if former else Existing()
        for kind, objects in (("secret", existing.secrets), ("config", existing.configs)):
            candidates = [one for one in objects if one["Spec"]["Name"] in former]
            for one in superseded(self._stack, kind, candidates, existing.services, kept):
                try:
                    await self._client.delete(f"/{kind}s/{one['ID']}", timeout_s=RESPONSE_TIMEOUT_S)
                except SkepError:  # a service has just started to use it
                    continue
                self._show(one["Spec"]["Name"], f"superseded {kind} removed")

    # --- steps

    async def _update_files(self) -> None:
        """Change labels, and let the cluster compare the content of unversioned secrets, which the API never shows.

        Source: docker/cli, cli/command/stack/deploy_composefile.go (createSecrets, createConfigs).
        """
        problems: list[FileProblem] = []

        async def write(kind: str, file: StackFile) -> None:
            path, is_changed = f"{kind}s", (kind, file.name) in changed

            def spec(present: Mapping[str, Any]) -> Mapping[str, Any]:
                # An object that the plan keeps retains its own labels, because it may belong to another stack or to
                # none.
                return (
                    file.body if is_changed else {**file.body, "Labels": present["Spec"].get("Labels") or {}}
                )

            try:
                async with self._limit:
                    await update(self._client, path, file.name, spec, timeout_s=RESPONSE_TIMEOUT_S)
            except PermissionDenied:
                if is_changed:
                    raise  # a secret that the plan does not change is used without the comparison
            except InvalidArgument as error:
                if _OTHER_CONTENT not in str(error):
                    raise
                problems.append(other_content(kind, file))
            else:
                if is_changed:
                    self._show(file.name, f"{kind} updated")

        changed = {(one.kind, one.name) for one in self._plan.changes if one.action is PlanAction.UPDATE}
        kept = {one.name for one in self._plan.of("secret", PlanAction.KEEP)}
        await all_of(
            write(kind, one)
            for kind, files in (("secret", self._stack.secrets), ("config", self._stack.configs))
            for one in files.values()
            if (kind, one.name) in changed
            or (kind == "secret" and one.name in kept and one.content is not None and not one.is_versioned)
        )
        if problems:
            raise FileProblems(problems)

    def _bodies(self, kind: str) -> dict[str, Mapping[str, Any]]:
        wanted = {one.name for one in self._plan.of(kind, PlanAction.CREATE)}
        if kind == "network":
            return {one.name: one.body for one in self._stack.networks.values() if one.name in wanted}
        files = self._stack.secrets if kind == "secret" else self._stack.configs
        return {one.name: one.body for one in files.values() if one.name in wanted}

    async def _create(self, kind: str, bodies: Mapping[str, Mapping[str, Any]]) -> None:
        async def create(name: str, body: Mapping[str, Any]) -> None:
            async with self._limit:
                try:
                    found = await self._client.post(f"/{kind}s/create", body, timeout_s=RESPONSE_TIMEOUT_S)
                except AlreadyExists:  # a concurrent deploy created it
                    return
            if found:
                self._created.files.append((kind, name, str(found.get("ID") or found.get("Id"))))
            self._show(name, f"{kind} created")

        await all_of(create(name, body) for name, body in bodies.items())

    async def _learn(self) -> None:
        """Read the networks, and the ids of the secrets and configs that the services refer to.  Note which services
        stay.
        """
        self._networks = await self._network_names()
        for one in self._plan.of("service", PlanAction.KEEP):
            self._rollbacks.setdefault(one.name, (one.rolls_back_to, one.spec))
        containers = [
            one.spec.task_template.container_spec
            for one in self._plan.of("service", PlanAction.CREATE, PlanAction.UPDATE)
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
        found = {one.name: one for one in self._plan.of("service", PlanAction.CREATE, PlanAction.UPDATE)}
        chosen = {name: one for name, one in self._stack.services.items() if one.spec.name in found}
        changes = {name: found[one.spec.name] for name, one in chosen.items()}
        # Services change in the order of their dependencies, but without a wait in between, because the cluster itself
        # delays their tasks (``model/options/dependencies.py``). The order matters because an updated service must not
        # take the earlier run of a job that will run again for the new one.
        for wave in waves(chosen):
            left = [changes[name] for name in wave]
            for at in range(0, len(left), _TOGETHER):
                await self._services_changed(left[at : at + _TOGETHER])

    async def _services_changed(self, changes: Sequence[PlannedChange]) -> None:
        """Change services in one request.  Services that failed get a request of their own, and so do all on an older
        cluster.
        """
        body = [self._wanted(one) for one in changes if one.spec is not None]
        try:
            results = await self._client.post(
                "/skep/services/changes", body, headers=self._headers(), timeout_s=RESPONSE_TIMEOUT_S
            )
            done = [not one.get("Error") for one in results]
        except SkepError:
            results, done = [{}] * len(changes), [False] * len(changes)
        for change, is_done, result in zip(changes, done, results, strict=True):
            if is_done and change.action is PlanAction.CREATE:
                self._note_created(change, result)
            elif is_done:
                self._note_updated(change)
            for warning in result.get("Warnings") or ():
                self._show(change.name, f"Warning: {warning}")
        await all_of(
            self._service_changed(one) for one, is_done in zip(changes, done, strict=True) if not is_done
        )

    def _note_created(self, change: PlannedChange, response: Mapping[str, Any]) -> None:
        assert change.spec is not None
        if response.get("ID"):
            self._created.services.append(Service(id=response["ID"], spec=change.spec))
        self._show(change.name, "created")

    def _note_updated(self, change: PlannedChange) -> None:
        self._rollbacks[change.name] = change.rolls_back_to, change.spec
        self._created.note_updated(change)
        self._show(change.name, "updated")

    def _wanted(self, change: PlannedChange) -> dict[str, Any]:
        assert change.spec is not None
        made: dict[str, Any] = {"Spec": msgspec.Raw(to_json(self._with_ids(change.spec)))}
        made["RegistryAuth"] = self._login(change)
        return made | ({"ID": change.id, "Version": change.version} if change.id else {})

    def _headers(self, change: PlannedChange | None = None) -> dict[str, str]:
        """Return the headers of a request for several services, or for the service of ``change`` only."""
        made = registry_auth(self._login(change)) if change is not None else {}
        return made | dict(self._created.claim.headers) if self._created.claim is not None else made

    def _login(self, change: PlannedChange) -> str:
        assert change.spec is not None
        return self._logins.get(change.spec.labels.get(IMAGE, ""), "")

    async def _service_changed(self, change: PlannedChange) -> None:
        async with self._limit:
            await (
                self._create_service(change)
                if change.action is PlanAction.CREATE
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
            raise NotFound(f"{kind} {name} was removed meanwhile. Deploy again.")
        return self._ids[kind, name]

    async def _create_service(self, change: PlannedChange) -> None:
        assert change.spec is not None
        body = msgspec.Raw(to_json(self._with_ids(change.spec)))
        try:
            found = await self._client.post(
                "/services/create", body, headers=self._headers(change), timeout_s=RESPONSE_TIMEOUT_S
            )
        except AlreadyExists:
            await self._update_service(change)
            return
        self._note_created(change, found or {})

    async def _update_service(self, change: PlannedChange) -> None:
        wanted = change.spec
        assert wanted is not None
        names, rolls_back_to = await self._network_names(), change.rolls_back_to

        def changed(current: Mapping[str, Any]) -> msgspec.Raw | None:
            nonlocal rolls_back_to
            (read,) = services_of([current])
            found = with_network_names(read, names)
            present = found.spec
            if present.labels.get(STACK_LABEL) != self._stack.name:
                raise AlreadyExists(
                    f"service {change.name} exists outside of the stack {self._stack.name}. Remove or rename it."
                )
            spec = _now_wanted(change, wanted, present)
            # An earlier request without a response may have been applied. If it were applied twice, a job would run
            # twice, and the service would have the same spec to roll back to.
            is_done = present.task_template.container_spec is not None and not any(differences(present, spec))
            if is_done:
                return None
            rolls_back_to = rollback_target(found)
            return msgspec.Raw(to_json(self._with_ids(spec)))

        await update(
            self._client,
            "services",
            change.name,
            changed,
            headers=self._headers(change),
            timeout_s=RESPONSE_TIMEOUT_S,
        )
        self._note_updated(replace(change, rolls_back_to=rolls_back_to))

    async def _network_names(self) -> dict[str, str]:
        """Return the names of all networks, by id."""
        networks = await self._client.get("/networks", timeout_s=RESPONSE_TIMEOUT_S)
        return {str(one["Id"]): str(one["Name"]) for one in networks}

    async def _remove(self, change: PlannedChange) -> None:
        if await remove_unchanged(self._client, change, self._headers()):
            self._show(change.name, "removed")

    # --- waiting

    async def _wait(self, changes: Sequence[PlannedChange]) -> None:
        specs = {one.name: one.spec for one in changes}

        async def look(waiting: set[str]) -> dict[str, ServiceProgress]:
            claim = self._created.claim
            self._is_overtaken = self._is_overtaken or (claim is not None and await claim.follow())
            if self._is_overtaken:
                await self._plan_again()
                await self._services_as_wanted()
            looks = await self._looks()
            found = await self._reasons.explain({name: one for name, one in looks.items() if name in waiting})
            return found | {name: progress_without(name, specs[name]) for name in waiting - looks.keys()}

        await wait_done(specs, look, self._show)

    async def _looks(self) -> dict[str, Look]:
        label = {"label": [f"{STACK_LABEL}={self._stack.name}"]}
        services, tasks, up_to_date = await asyncio.gather(
            self._client.get("/services", filters=label, timeout_s=RESPONSE_TIMEOUT_S),
            self._client.get("/tasks", filters=label, timeout_s=RESPONSE_TIMEOUT_S),
            self._client.get("/tasks", filters={**label, **UP_TO_DATE}, timeout_s=RESPONSE_TIMEOUT_S),
        )
        current = frozenset(str(one["ID"]) for one in up_to_date)
        by_service: dict[str, list[Task]] = {}
        for one in _tasks(tasks):
            by_service.setdefault(one.service_id, []).append(one)
        kept = {one.name for one in self._plan.of("service", PlanAction.KEEP)}
        looks: dict[str, Look] = {}
        for service in services_of(services):
            name, found = service.spec.name, by_service.get(service.id, ())
            progress = self._progress_of(service, found, current, is_kept=name in kept)
            looks[name] = Look.of(service.id, progress, found, current)
        return looks

    def _progress_of(
        self,
        service: Service,
        tasks: Sequence[Task],
        current: Collection[str],
        *,
        is_kept: bool,
    ) -> ServiceProgress:
        """Return the progress of a service.

        The status of a rollback is lost if the service is updated once more, so the specs are compared as well.
        """
        found = progress_after_deploy(service, tasks, current, is_kept=is_kept)
        to, wanted = self._rollbacks.get(service.spec.name, (None, None))
        if not found.is_stuck and is_rolled_back(
            to, wanted, with_network_names(service, self._networks).spec
        ):
            return ServiceProgress("its update was rolled back", is_stuck=True)
        return found

    async def _state(self) -> str:
        """Return the state of the deploy and the next step, for the message after an interrupt."""
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                if self._created.claim is not None:
                    await self._created.claim.follow()
                texts = await self.find_unfinished()
        except Replaced as error:
            return str(error)
        except (SkepError, OSError, TimeoutError) as error:
            named = f"the state of the deploy is unknown ({reason_of(error)})"
        else:
            named = "; ".join(f"{name}: {text}" for name, text in texts.items())
        return f"{named or 'all services run with their new spec'}. Rerun the command to complete the deploy."


def _now_wanted(change: PlannedChange, wanted: ServiceSpec, present: ServiceSpec) -> ServiceSpec:
    """Return the spec to write, because others may have changed the service since the plan was made."""
    if change.before is not None:
        return merged(change.before, wanted, present)
    force = present.task_template.force_update
    spec = replace(wanted, task_template=replace(wanted.task_template, force_update=force))
    return with_present_number(spec, present)


async def remove_unchanged(
    client: Requests, change: PlannedChange, headers: Mapping[str, str] | None = None
) -> bool:
    """Remove a service if its spec is still ``change.before``.

    Args:
        headers: headers of the removal request.

    Returns:
        Whether this call removed it.  False if it had been removed already.

    Raises:
        FailedPrecondition: the service was changed meanwhile.
    """
    assert change.before is not None
    for attempt in range(ATTEMPTS):
        networks = await client.get("/networks", timeout_s=RESPONSE_TIMEOUT_S)
        names = {str(one["Id"]): str(one["Name"]) for one in networks}
        try:
            (found,) = services_of([await client.get(f"/services/{change.id}", timeout_s=RESPONSE_TIMEOUT_S)])
            if not is_still(change.before, with_network_names(found, names).spec):
                raise FailedPrecondition(
                    f"service {change.name} was changed by someone else and was not removed. "
                    "Run skep stack plan again."
                )
            query = {"version": str(found.version.index)}
            path = f"/services/{change.id}"
            await client.request("DELETE", path, query=query, headers=headers, timeout_s=RESPONSE_TIMEOUT_S)
        except NotFound:
            return False
        except SkepError as error:
            if not is_race(error) or attempt == ATTEMPTS - 1:
                raise
        else:
            return True
    raise AssertionError("the last attempt returns or raises")


def _tasks(objects: Iterable[Any]) -> list[Task]:
    return [leniently(msgspec.json.encode(one), Task) for one in objects]


async def all_of(work: Iterable[Any]) -> None:
    """Await all, even if some fail.  Raises a single error unchanged, and several errors together as Unavailable."""
    results = await asyncio.gather(*work, return_exceptions=True)
    failed = [one for one in results if isinstance(one, BaseException)]
    if len(failed) > 1 and all(isinstance(one, SkepError) for one in failed):
        raise Unavailable("; ".join(dict.fromkeys(map(str, failed))))
    for one in failed:
        raise one

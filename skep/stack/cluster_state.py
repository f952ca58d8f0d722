"""Reads the cluster's objects and has the managers check a plan before anything is changed."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.api.client.requests import Requests
from skep.api.errors import Untranslated
from skep.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, SkepError
from skep.model.options.labels import STACK_REVISION
from skep.model.service import Service, ServiceSpec
from skep.model.values.encoding import to_json
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.unknown import leniently
from skep.stack.compose.document import FilePosition, FileProblem, FileProblems
from skep.stack.planning import (
    Existing,
    PlanAction,
    PlannedChange,
    PredictedPlacement,
    StackPlan,
    freeing,
    tagged,
)
from skep.stack.project import Stack, StackFile
from skep.stack.revisions import StackRevision, revisions_of

RESPONSE_TIMEOUT_S: Final = 30.0
"""Timeout in seconds for one list of objects."""
AT_ONCE: Final = 8
"""Largest number of requests in flight."""
NO_LOGINS: Final[Mapping[str, str]] = MappingProxyType({})
_UNKNOWN_PATH: Final = ": only administrators may do this"
"""Managers end the refusal of an unknown path with these words if the user is not an administrator."""
_WHOLE: Final = "stack"
"""Kind of a refusal that is about all objects together, because the store is full."""
_TOO_MUCH: Final = "too much at once"
_NAMED_MAX: Final = 5
"""Largest number of images that one warning names."""


async def existing_of(client: Requests, stack: str, configs: Iterable[str] = ()) -> Existing:
    """Return the stack's services, all networks and secrets, and the configs with the names ``configs``.

    Not all configs are read, because a response contains their content, which can be hundreds of megabytes.
    """
    label = {"label": [f"{STACK_LABEL}={stack}"]}
    services, networks, secrets, found = await asyncio.gather(
        client.get("/services", filters=label, timeout_s=RESPONSE_TIMEOUT_S),
        client.get("/networks", timeout_s=RESPONSE_TIMEOUT_S),
        client.get("/secrets", timeout_s=RESPONSE_TIMEOUT_S),
        configs_named(client, configs),
    )
    return Existing(
        services=services_of(services), networks=tuple(networks), secrets=tuple(secrets), configs=tuple(found)
    )


async def configs_named(client: Requests, names: Iterable[str]) -> list[Any]:
    """Return the configs with these names, and perhaps others that begin with them, because the filter compares
    prefixes.
    """
    wanted = sorted(set(names))
    if not wanted:
        return []
    return list(await client.get("/configs", filters={"name": wanted}, timeout_s=RESPONSE_TIMEOUT_S))


def services_of(objects: Iterable[Any]) -> tuple[Service, ...]:
    """Return the services in an API response."""
    return tuple(leniently(msgspec.json.encode(one), Service) for one in objects)


async def with_placements(client: Requests, plan: StackPlan, warn: Callable[[str], None]) -> StackPlan:
    """Return the plan with the placement that the cluster predicts, or unchanged if the cluster cannot predict it."""
    changes = [
        one for one in plan.of("service", PlanAction.CREATE, PlanAction.UPDATE) if one.spec is not None
    ]
    if not changes:
        return plan
    body = msgspec.Raw(to_json([one.spec for one in changes]))
    try:
        found = await client.post("/skep/services/placement", body, timeout_s=RESPONSE_TIMEOUT_S)
        placements = msgspec.convert(found, tuple[PredictedPlacement, ...])
    except NotFound:  # an earlier version
        return plan
    except (SkepError, msgspec.ValidationError) as error:
        warn(f"the placement of the services is unknown: {error}")
        return plan
    return replace(plan, placements={one.name: one for one in placements})


async def pinned_images(
    client: Requests,
    names: Iterable[str],
    warn: Callable[[str], None],
    logins: Mapping[str, str] = NO_LOGINS,
    kept: Collection[str] = (),
) -> dict[str, str]:
    """Return image names with the digests of their registries, by image name.  Images without a digest are left out.

    ``logins``: by image name.  ``kept``: images that cause no warning (``kept_images``).
    """
    limit, failed = asyncio.Semaphore(AT_ONCE), dict[str, str]()

    async def pin(name: str) -> tuple[str, str]:
        if "@" in name:
            return name, ""
        async with limit:
            try:
                found = await client.get(
                    f"/distribution/{name}/json",
                    headers=registry_auth(logins.get(name)),
                    timeout_s=RESPONSE_TIMEOUT_S,
                )
                return name, f"{name}@{found['Descriptor']['digest']}"
            except PermissionDenied:  # the managers will refuse the deploy too, and say why
                return name, ""
            except (SkepError, KeyError, TypeError) as error:
                failed[name] = str(error)
                return name, ""

    found = await asyncio.gather(*(pin(name) for name in sorted(set(names))))
    if unknown := {name: error for name, error in failed.items() if name not in kept}:
        warn(_unpinned(unknown))
    return {name: image for name, image in found if image}


def kept_images(services: Iterable[ServiceSpec], existing: Iterable[Service]) -> set[str]:
    """Return the images that all of ``services`` with them run already without a digest, such as local images.

    An earlier deploy has already warned about them.  Images with a digest are not among them.  Their registry has
    responded before, and a user who deploys again may want the newest version.
    """
    present = {one.spec.name: _image_of(one.spec) for one in existing}
    wanted = {one.name: _image_of(one) for one in services}
    changed = {image for name, image in wanted.items() if tagged(present.get(name, "")) != tagged(image)}
    return {*wanted.values()} - changed


def _image_of(spec: ServiceSpec) -> str:
    container = spec.task_template.container_spec
    return container.image if container is not None else ""


async def known_revisions(client: Requests, stack: str) -> list[StackRevision]:
    """Return the revisions of a stack, the oldest first."""
    label = {"label": [f"{STACK_LABEL}={stack}", STACK_REVISION]}
    return revisions_of(stack, await client.get("/configs", filters=label, timeout_s=RESPONSE_TIMEOUT_S))


def _unpinned(failed: Mapping[str, str]) -> str:
    """Return one warning for all images without a digest.  ``failed``: the errors by image name."""
    (first, error), *others = sorted(failed.items())
    if not others:
        return (
            f"image {first} could not be accessed on a registry to record its digest ({error}): "
            "each node uses the version that it finds"
        )
    names = [first, *(name for name, _ in others)]
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return (
        f"images {', '.join(names[:_NAMED_MAX])}{more} could not be accessed on a registry to record their digests "
        f"({first}: {error}): each node uses the versions that it finds"
    )


def config_names(stack: Stack) -> set[str]:
    """Return the names of the configs that the stack's services may refer to."""
    return {one.name for one in stack.configs.values()}


def registry_auth(login: str | None) -> dict[str, str]:
    """Return the header that carries the registry credentials, if there are any."""
    return {"X-Registry-Auth": login} if login else {}


async def check(client: Requests, stack: Stack, plan: StackPlan, warn: Callable[[str], None]) -> None:
    """Let the managers check the whole plan without writing anything.

    Raises:
        FileProblems: the managers would refuse parts of the plan, all of which the error lists.
        PermissionDenied: the user may not deploy this.
    """
    if not plan.effective:
        return
    try:
        found = await client.post(
            "/skep/stacks/check", _check_body(stack, plan), timeout_s=RESPONSE_TIMEOUT_S
        )
    except NotFound:  # an earlier version
        return
    except PermissionDenied as error:
        if str(error).endswith(_UNKNOWN_PATH):  # an earlier version; each change is checked when it is made
            return
        raise
    except (InvalidArgument, ResourceExhausted, Untranslated) as error:
        if isinstance(error, InvalidArgument) and _TOO_MUCH not in str(error):
            raise
        warn(f"the managers did not check the plan: {error}")
        return
    places = {
        ("service", one.spec.name): (one.place, f"services.{name}") for name, one in stack.services.items()
    }
    places |= {("network", one.name): (one.place, f"networks.{name}") for name, one in stack.networks.items()}
    places |= {("secret", one.name): (one.place, f"secrets.{name}") for name, one in stack.secrets.items()}
    places |= {("config", one.name): (one.place, f"configs.{name}") for name, one in stack.configs.items()}
    problems: list[FileProblem] = []
    for one in found:
        if one["Kind"] == _WHOLE:
            raise ResourceExhausted(one["Error"])
        place, path = places.get((one["Kind"], one["Name"]), (FilePosition(stack.name, 1, 1), one["Name"]))
        text = one["Error"]
        if one["Kind"] == "service" and text.endswith("already exists"):
            text = f"service {one['Name']} exists outside of the stack {stack.name}. Remove or rename it."
        problems.append(FileProblem(place, path, text))
    if problems:
        raise FileProblems(problems)


def _check_body(stack: Stack, plan: StackPlan) -> dict[str, Any]:
    created = {(one.kind, one.name) for one in plan.changes if one.action is PlanAction.CREATE}
    return {
        "Networks": [one.body for one in stack.networks.values() if ("network", one.name) in created],
        "Secrets": [_sized(one) for one in stack.secrets.values() if ("secret", one.name) in created],
        "Configs": [_sized(one) for one in stack.configs.values() if ("config", one.name) in created],
        "Removed": [one.id for one in freeing(plan)],
        "Services": [_changed(one) for one in plan.of("service", PlanAction.CREATE, PlanAction.UPDATE)],
    }


def _sized(file: StackFile) -> dict[str, Any]:
    """Return the body of a secret or config with the size of its content instead of the content."""
    body = {key: value for key, value in file.body.items() if key != "Data"}
    return body | {"DataBytes": len(file.content or b"")}


def _changed(change: PlannedChange) -> dict[str, Any]:
    made: dict[str, Any] = {"Spec": msgspec.Raw(to_json(change.spec))}
    return made | ({"ID": change.id, "Version": change.version} if change.id else {})

"""Makes plans by comparing a stack's files with the cluster's objects.  Pure."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.api.formats.service_form import settled
from skep.errors import SkepError
from skep.model.door.routes import tls_secrets
from skep.model.needs import needs_of
from skep.model.options.autoscaling import with_number_kept, with_present_number
from skep.model.options.labels import STACK_REVISION
from skep.model.service import Service, ServiceSpec
from skep.model.staging.updates import replaced_spec, rollback_target
from skep.model.values.encoding import to_json
from skep.model.values.ids import ConfigId, SecretId
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.unknown import leniently
from skep.stack.compose.document import FileProblem, FileProblems
from skep.stack.differences import Difference, differences
from skep.stack.project import IMAGE, NODES_NETWORKS, Stack, StackFile, StackNetwork, StackService

_UNSET: Final = object()
_IMAGE_ID: Final = re.compile("[0-9a-f]{64}")


class Existing(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster's networks, secrets and configs, and the services of the stack."""

    services: tuple[Service, ...] = ()
    networks: tuple[Mapping[str, Any], ...] = ()
    secrets: tuple[Mapping[str, Any], ...] = ()
    configs: tuple[Mapping[str, Any], ...] = ()


class PlanAction(Enum):
    """The action on an object.  The value is the sign that a printed plan shows for it."""

    CREATE = "+"
    UPDATE = "~"
    REMOVE = "-"
    KEEP = " "


class PlannedChange(msgspec.Struct, frozen=True, kw_only=True):
    """One object of a plan.  ``kind``: service, network, secret or config."""

    action: PlanAction
    kind: str
    name: str
    differences: tuple[Difference, ...] = ()
    spec: ServiceSpec | None = None
    """Desired spec of a service, without the ids of objects that the same plan creates."""
    id: str = ""
    """Id of an existing service."""
    version: int = 0
    """Version of an existing service when it was read."""
    before: ServiceSpec | None = None
    """Spec of an existing service, with names of networks instead of ids."""
    rolls_back_to: ServiceSpec | None = None
    """Spec that an automatic rollback of the service would restore, with names of networks instead of ids."""
    keeps_old: bool = False
    """Whether it ends a staged update in progress whose old tasks, as far as they still run, match the desired spec."""

    @property
    def restarts(self) -> bool:
        """Return whether the change replaces all tasks."""
        return self.action is PlanAction.UPDATE and any(one.restarts for one in self.differences)


class NodeShare(msgspec.Struct, frozen=True, rename="pascal"):
    """Number of tasks that a node would have."""

    hostname: str
    tasks: int


class PlacementRefusal(msgspec.Struct, frozen=True, rename="pascal"):
    """Reason why a node accepts no further task."""

    hostname: str
    reasons: tuple[str, ...]


class Preempted(msgspec.Struct, frozen=True, rename="pascal"):
    """Number of tasks of a lower-priority service that would be preempted."""

    name: str
    tasks: int


class PredictedPlacement(msgspec.Struct, frozen=True, rename="pascal"):
    """The scheduler's prediction of a service's placement.  ``error`` is set if not all fit, next to ``old`` tasks."""

    name: str
    desired: int
    nodes: tuple[NodeShare, ...] = ()
    error: str = ""
    old: int = 0
    verdicts: tuple[PlacementRefusal, ...] = ()
    preempted: tuple[Preempted, ...] = ()


class StackPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The changes of all objects of a stack, in the order in which they are created, with removals last."""

    stack: str
    changes: tuple[PlannedChange, ...]
    is_new: bool = False
    """Whether the cluster has no service of the stack."""
    former: frozenset[str] = frozenset()
    """Names of secrets and configs that the stack's services used when the plan was made."""
    placements: Mapping[str, PredictedPlacement] = {}
    """Predicted placements of created and updated services, by name.  Empty without a prediction."""
    images: Mapping[str, str] = {}
    """Image names with their registries' digests, by image name."""
    prune: bool = False
    only: tuple[str, ...] = ()
    """Services that the plan is limited to, by their names in the files.  Empty for all."""
    removable: frozenset[str] | None = None
    """Ids of the services that ``prune`` may remove, or None for all."""

    @property
    def effective(self) -> tuple[PlannedChange, ...]:
        """Return the changes, without objects that stay as they are."""
        return tuple(one for one in self.changes if one.action is not PlanAction.KEEP)

    def of(self, kind: str, *actions: PlanAction) -> tuple[PlannedChange, ...]:
        """Return the changes of objects of one kind with one of these actions."""
        return tuple(one for one in self.changes if one.kind == kind and one.action in actions)


def plan_of(
    stack: Stack,
    existing: Existing,
    *,
    images: Mapping[str, str],
    prune: bool,
    only: Collection[str] = (),
    removable: Collection[str] | None = None,
) -> StackPlan:
    """Return the plan for a deploy.

    Args:
        images: image names with their registries' digests, by image name.
        prune: whether to remove services that the files no longer contain.
        only: limit the plan to these services, by their names in the files, or empty for all.
        removable: ids of the services that ``prune`` may remove, or None for all.

    Raises:
        FileProblems: an external object does not exist, or the cluster has a different object with the same name.
    """
    chosen = {name: one for name, one in stack.services.items() if not only or name in only}
    problems: list[FileProblem] = []
    changes = [
        *_networks(stack, chosen.values(), existing, problems),
        *_files("secret", stack.secrets.values(), existing.secrets, problems),
        *_files("config", stack.configs.values(), existing.configs, problems),
    ]
    names = {str(one["Id"]): str(one["Name"]) for one in existing.networks}
    current = {service.spec.name: with_network_names(service, names) for service in existing.services}
    changes += [_service(one, current.get(one.spec.name), images, problems) for one in chosen.values()]
    if problems:
        raise FileProblems(problems)
    if prune and not only:
        wanted = {one.spec.name for one in stack.services.values()}
        gone = sorted(current.keys() - wanted)
        may_go = (current[name] for name in gone if removable is None or current[name].id in removable)
        changes += map(removal_of, may_go)
    former = frozenset(
        name
        for service in existing.services
        for spec in (service.spec, service.previous_spec)
        for kind in ("secret", "config")
        for name in _names_in(spec, kind)
    )
    return StackPlan(
        stack=stack.name,
        changes=tuple(changes),
        is_new=not existing.services,
        former=former,
        images=images,
        prune=prune,
        only=tuple(only),
        removable=None if removable is None else frozenset(removable),
    )


def planned_again(stack: Stack, plan: StackPlan, existing: Existing) -> StackPlan:
    """Return a new plan of the same deploy for the present objects of the cluster.  Raises: FileProblems."""
    return plan_of(
        stack, existing, images=plan.images, prune=plan.prune, only=plan.only, removable=plan.removable
    )


def freeing(plan: StackPlan) -> tuple[PlannedChange, ...]:
    """Return the removals that must come first because they free a published port for another service."""
    wanted = {
        port
        for one in plan.of("service", PlanAction.CREATE, PlanAction.UPDATE)
        for port in _published(one.spec)
    }
    return tuple(
        one for one in plan.of("service", PlanAction.REMOVE) if not wanted.isdisjoint(_published(one.before))
    )


def _published(spec: ServiceSpec | None) -> set[tuple[str, int]]:
    endpoint = spec.endpoint_spec if spec is not None else None
    ports = endpoint.ports if endpoint is not None else ()
    return {(port.protocol, port.published_port) for port in ports if port.published_port}


def removal_of(service: Service) -> PlannedChange:
    """Return the removal of ``service``, whose spec has names of networks instead of ids."""
    return PlannedChange(
        action=PlanAction.REMOVE,
        kind="service",
        name=service.spec.name,
        id=service.id,
        version=service.version.index,
        before=service.spec,
    )


def with_network_names(service: Service, names: Mapping[str, str]) -> Service:
    """Return the service with names of networks in place of ids, also in its previous spec."""

    def named(spec: ServiceSpec) -> ServiceSpec:
        template = spec.task_template
        networks = tuple(replace(one, target=names.get(one.target, one.target)) for one in template.networks)
        return replace(spec, task_template=replace(template, networks=networks))

    previous = service.previous_spec
    return replace(
        service,
        spec=named(service.spec),
        previous_spec=named(previous) if previous is not None else None,
    )


def _networks(
    stack: Stack, services: Iterable[StackService], existing: Existing, problems: list[FileProblem]
) -> Iterator[PlannedChange]:
    used = {one.target for service in services for one in service.spec.task_template.networks}
    for network in sorted(stack.networks.values(), key=lambda one: one.name):
        if network.name not in used:
            continue
        found = [one for one in existing.networks if one["Name"] == network.name]
        swarm = next((one for one in found if one.get("Scope") == "swarm"), None)
        if network.is_external:
            _check_external(network, found, problems)
        elif swarm is None:
            yield PlannedChange(action=PlanAction.CREATE, kind="network", name=network.name)
        else:
            _check_same(network, swarm, problems)
            yield PlannedChange(action=PlanAction.KEEP, kind="network", name=network.name)


def _check_external(
    network: StackNetwork, found: Sequence[Mapping[str, Any]], problems: list[FileProblem]
) -> None:
    if network.name in NODES_NETWORKS:
        return
    path = f"networks.{network.name}"
    if not found:
        text = (
            f'network "{network.name}" is declared as external, but could not be found. '
            "You need to create a swarm-scoped network before the stack is deployed"
        )
        problems.append(FileProblem(network.place, path, text))
    elif all(one.get("Scope") != "swarm" for one in found):
        text = (
            f'network "{network.name}" is declared as external, but it is not in the right scope: '
            f'"{found[0].get("Scope", "")}" instead of "swarm"'
        )
        problems.append(FileProblem(network.place, path, text))


def _subnets(network: Mapping[str, Any]) -> set[IPv4Network | IPv6Network]:
    """Return the subnets of a network, as the files or the API show it.  Invalid ones are left out."""
    found = set()
    for one in (network.get("IPAM") or {}).get("Config") or ():
        with suppress(ValueError):
            found.add(ip_network(one.get("Subnet", ""), strict=False))
    return found


def _named(subnets: Iterable[IPv4Network | IPv6Network]) -> str:
    return ", ".join(sorted(map(str, subnets)))


def _check_same(network: StackNetwork, found: Mapping[str, Any], problems: list[FileProblem]) -> None:
    """Report how an existing network differs from the files, because networks cannot be changed."""
    body = network.body
    wanted: dict[str, Any] = {
        "Driver": body["Driver"],
        "Internal": body.get("Internal", False),
        "Attachable": body.get("Attachable", False),
        "EnableIPv6": body.get("EnableIPv6", False),
    }
    given = _subnets(body)
    # The managers choose the subnet of a version that the files do not name.
    now = {one for one in _subnets(found) if one.version in {own.version for own in given}}
    differing = [
        f"{key} is {found.get(key) or False}, not {value}"
        for key, value in wanted.items()
        if (found.get(key) or False) != value
    ]
    if given != now:
        differing.append(f"its subnet is {_named(now) or 'of another IP version'}, not {_named(given)}")
    options = found.get("Options") or {}
    differing += [
        f"the option {key} is {options.get(key)!r}, not {value!r}"
        for key, value in body.get("Options", {}).items()
        if options.get(key) != value
    ]
    if differing:
        text = (
            f"the network exists and cannot be changed ({'; '.join(differing)}): "
            "remove it first, or give it another name"
        )
        problems.append(FileProblem(network.place, f"networks.{network.name}", text))


def _files(
    kind: str, files: Iterable[StackFile], existing: Sequence[Mapping[str, Any]], problems: list[FileProblem]
) -> Iterator[PlannedChange]:
    found = {one["Spec"]["Name"]: one for one in existing}
    for file in sorted(files, key=lambda one: one.name):
        if file.is_external:
            if file.name not in found:
                text = f"external {kind} {file.name} does not exist: create it first"
                problems.append(FileProblem(file.place, f"{kind}s.{file.name}", text))
            continue
        now = found.get(file.name)
        if now is None:
            yield PlannedChange(action=PlanAction.CREATE, kind=kind, name=file.name)
            continue
        if kind == "config" and now["Spec"].get("Data", "") != file.body.get("Data", ""):
            problems.append(other_content(kind, file))
        labels = now["Spec"].get("Labels") or {}
        # objects of other stacks are used but not changed
        is_ours = labels.get(STACK_LABEL) == file.labels.get(STACK_LABEL)
        if file.is_versioned and not is_ours:
            # Its name contains the hash of this stack's content, but nothing has compared the content itself.
            text = f"the {kind} {file.name} exists and belongs to another stack or none: remove it, then deploy again"
            problems.append(FileProblem(file.place, f"{kind}s.{file.name}", text))
        differing = tuple(_label_differences(labels, file.labels)) if is_ours else ()
        action = PlanAction.UPDATE if differing else PlanAction.KEEP
        yield PlannedChange(action=action, kind=kind, name=file.name, differences=differing)


def other_content(kind: str, file: StackFile) -> FileProblem:
    """Return the error about an existing secret or config with the same name and other content."""
    text = (
        f"the {kind} exists with other content, which cannot be changed: leave out its name, "
        "and each content has a name of its own"
    )
    return FileProblem(file.place, f"{kind}s.{file.name}", text)


def _label_differences(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Difference]:
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            yield Difference(f"Labels.{name}", before.get(name, ""), after.get(name, ""))


def _service(
    one: StackService, current: Service | None, images: Mapping[str, str], problems: list[FileProblem]
) -> PlannedChange:
    wanted = one.spec
    try:
        wanted = settled(_with_image(wanted, current, images))
    except SkepError as error:
        problems.append(FileProblem(one.place, f"services.{wanted.name}", str(error)))
        return PlannedChange(action=PlanAction.KEEP, kind="service", name=wanted.name)
    if current is None:
        wanted = with_number_kept(wanted, None)
        return PlannedChange(action=PlanAction.CREATE, kind="service", name=wanted.name, spec=wanted)
    template = replace(wanted.task_template, force_update=current.spec.task_template.force_update)
    wanted = with_present_number(replace(wanted, task_template=template), current.spec)
    found = tuple(differences(current.spec, wanted))
    action = PlanAction.UPDATE if found else PlanAction.KEEP
    old = replaced_spec(current)
    return PlannedChange(
        action=action,
        kind="service",
        name=wanted.name,
        differences=found,
        spec=wanted,
        id=current.id,
        version=current.version.index,
        before=current.spec,
        rolls_back_to=rollback_target(current) if found else current.previous_spec,
        keeps_old=old is not None and not any(one.restarts for one in differences(old, wanted)),
    )


def _with_image(spec: ServiceSpec, current: Service | None, images: Mapping[str, str]) -> ServiceSpec:
    """Return the spec with the image's digest.

    If the registry did not respond, the service keeps its present digest, provided that the image name is the same.
    """
    template = spec.task_template
    container = template.container_spec
    assert container is not None
    image = images.get(container.image, "")
    if not image and current is not None and current.spec.labels.get(IMAGE) == container.image:
        now = current.spec.task_template.container_spec
        # The label alone proves nothing, because the last update of the service could have set it to anything.
        is_same = now is not None and (
            now.image == container.image or now.image.startswith(f"{container.image}@")
        )
        image = now.image if now is not None and is_same else ""
    image = image or tagged(container.image)
    return replace(spec, task_template=replace(template, container_spec=replace(container, image=image)))


def tagged(image: str) -> str:
    """Return the image's name with a tag, as every docker client writes it.

    Without one, a ``docker service scale`` would change the name and so replace all tasks.
    Source: docker/docker, client/service_create.go (imageWithTagString).
    """
    has_tag = "@" in image or ":" in image.rpartition("/")[2] or _IMAGE_ID.fullmatch(image)
    return image if has_tag or not image else f"{image}:latest"


def merged(before: ServiceSpec, wanted: ServiceSpec, present: ServiceSpec) -> ServiceSpec:
    """Return ``present`` with the differences between ``before`` and ``wanted`` applied, field by field.

    Since ``before`` was read, the autoscaler may have changed the number of tasks, and a user any other field.  A list
    counts as one field.
    """
    # Managers add the ids of secrets and configs that files only name. Such ids do not count as a difference.
    unread = [_without_ids(one) for one in (before, wanted)]
    specs = (msgspec.json.decode(to_json(one)) for one in (*unread, present))
    spec = leniently(msgspec.json.encode(_merged(*specs)), ServiceSpec)
    return with_present_number(spec, present)


def _without_ids(spec: ServiceSpec) -> ServiceSpec:
    container = spec.task_template.container_spec
    if container is None:
        return spec
    container = replace(
        container,
        secrets=tuple(replace(one, secret_id=SecretId("")) for one in container.secrets),
        configs=tuple(replace(one, config_id=ConfigId("")) for one in container.configs),
    )
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


def _merged(before: Any, wanted: Any, present: Any) -> Any:
    if before == wanted:
        return present
    if not (isinstance(wanted, dict) and isinstance(present, dict)):
        return wanted
    was = before if isinstance(before, dict) else {}
    found = {
        key: _merged(was.get(key, _UNSET), wanted.get(key, _UNSET), present.get(key, _UNSET))
        for key in {**present, **wanted}
    }
    return {key: value for key, value in found.items() if value is not _UNSET}


def is_still(before: ServiceSpec, present: ServiceSpec) -> bool:
    """Return whether the spec is still ``before``, apart from the number of tasks and forced restarts."""
    force = present.task_template.force_update
    same = replace(before, task_template=replace(before.task_template, force_update=force))
    return not any(differences(with_present_number(same, present), present))


def is_rolled_back(to: ServiceSpec | None, wanted: ServiceSpec | None, present: ServiceSpec) -> bool:
    """Return whether a service that should have the spec ``wanted`` has the spec ``to`` of a rollback instead.

    Other changes of the service by users do not count.
    """
    return to is not None and wanted is not None and is_still(to, present) and not is_still(to, wanted)


def superseded(
    stack: Stack,
    kind: str,
    objects: Sequence[Mapping[str, Any]],
    services: Sequence[Service],
    kept: Collection[str] = (),
) -> list[Mapping[str, Any]]:
    """Return the stack's secrets or configs that neither its files nor a service's present or previous spec names.

    ``kept``: names that earlier revisions need.  They are not returned.
    """
    wanted = {one.name for one in (stack.secrets if kind == "secret" else stack.configs).values()}
    used = {
        name
        for service in services
        for spec in (service.spec, service.previous_spec)
        for name in _names_in(spec, kind)
    }
    return [
        one
        for one in sorted(objects, key=lambda one: str(one["Spec"]["Name"]))
        if (one["Spec"].get("Labels") or {}).get(STACK_LABEL) == stack.name
        and STACK_REVISION not in one["Spec"]["Labels"]
        and one["Spec"]["Name"] not in wanted | used | set(kept)
    ]


def _names_in(spec: ServiceSpec | None, kind: str) -> Iterator[str]:
    if spec is None:
        return
    needs = needs_of(spec)
    if kind == "secret":
        yield from (one.secret_name for one in needs.secrets)
        yield from tls_secrets(spec.labels)
    else:
        yield from (one.config_name for one in needs.configs)


def waves(services: Mapping[str, StackService]) -> list[list[str]]:
    """Return names of services in the order of their dependencies.  Each wave depends only on earlier waves."""
    left = {
        name: {one.service for one in service.depends_on if one.service in services}
        for name, service in services.items()
    }
    made: list[list[str]] = []
    while left:
        ready = [name for name, needed in left.items() if not needed & left.keys()]
        assert ready, "a circle of dependencies was refused before"
        made.append(ready)
        for name in ready:
            del left[name]
    return made

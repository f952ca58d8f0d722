"""Converts ``docker service inspect`` or ``GET /services`` to a stack file."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.imports.composing import ObjectKeys, names_volume, service_entry
from skep.imports.document import Imported, Note, read_back
from skep.model.container import ContainerSpec
from skep.model.options.affinity import AFFINITY_LABELS
from skep.model.options.dependencies import dependencies_of, label_of
from skep.model.service import EndpointSpec, NetworkAttachmentConfig, ServiceSpec
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.unknown import NOTHING, Unknown, UnknownOfItems, divided
from skep.stack.differences import differences
from skep.stack.project import IMAGE, NODES_NETWORKS

_STACK_LABELS: Final = (f"Labels.{STACK_LABEL}", f"Labels.{IMAGE}")
"""Labels that a stack sets on its objects."""


def specs_in(text: str) -> list[tuple[ServiceSpec, Unknown]]:
    """Return the specs in the output of ``docker service inspect``, and the unknown keys of each.  Raises:
    InvalidArgument.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"this is not what docker service inspect prints: {error}") from None
    if not isinstance(found, list):
        found = [found]
    return [spec_in(one) for one in found]


def spec_in(service: Any) -> tuple[ServiceSpec, Unknown]:
    """Return the spec of a service in the API's form, and its unknown keys.  Raises: InvalidArgument."""
    spec = service.get("Spec") if isinstance(service, dict) else None
    if not isinstance(spec, dict) or not isinstance(spec.get("TaskTemplate"), dict):
        raise InvalidArgument("this is not what docker service inspect prints: expected services with a Spec")
    try:
        known, unknown = divided(json.dumps(spec).encode(), ServiceSpec)
        return msgspec.json.decode(known, type=ServiceSpec), unknown
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"service {spec.get('Name')!r} cannot be read: {error}") from None


def networks_in(text: str) -> dict[str, Mapping[str, Any]]:
    """Return the networks in the output of ``docker network inspect``, by id.  Raises: InvalidArgument."""
    try:
        found = json.loads(text)
        return {str(one["Id"]): one for one in found if isinstance(one["Name"], str)}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InvalidArgument("this is not what docker network inspect prints") from None


def stack_name_of(specs: Iterable[ServiceSpec]) -> str:
    """Return the stack that all services belong to, or an empty text if they do not share a stack."""
    names = {spec.labels.get(STACK_LABEL, "") for spec in specs}
    return names.pop() if len(names) == 1 else ""


def imported(
    found: Sequence[tuple[ServiceSpec, Unknown]],
    stack: str,
    networks: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, str] = MappingProxyType({}),
) -> Imported:
    """Convert services to a stack file.

    Args:
        stack: the stack's name.  A deploy renames services of other stacks, or of none, to STACK_NAME.
        networks: networks from ``GET /networks``, by id; may be empty.
        others: new names of services of other files, by their old names in lower case.
    """
    names_of = {id: str(one["Name"]) for id, one in networks.items()}
    specs = [_named(spec, names_of) for spec, _ in found]
    names = _names(specs, stack, networks)
    renamed = {**others} | {name.lower(): f"{stack}_{key}" for name, key in names.services.items()}
    specs = [replace(spec, labels=_relabeled(spec.labels, renamed)) for spec in specs]
    document: dict[str, Any] = {
        "name": stack,
        "services": {names.services[spec.name]: service_entry(spec, names) for spec in specs},
    }
    notes = list(_sections(document, specs, names, stack, networks))
    made, report = read_back(document)
    notes += [Note(one.path, f"fix by hand: {one.text}") for one in report.problems]
    for spec, (_, unknown) in zip(specs, found, strict=True):
        key = names.services[spec.name]
        notes += [Note(f"services.{key}", f"{path}: not known, dropped") for path in _paths(unknown)]
        if not _is_plugin(spec):
            read = made.services[key].spec
            notes += [Note(f"services.{key}", text) for text in _losses(_expected(spec, key, stack), read)]
        else:
            notes.append(Note(f"services.{key}", "dropped: it installs a plug-in, which a stack cannot do"))
            del document["services"][key]
    return Imported(document=document, notes=tuple(dict.fromkeys(notes)))


def _is_plugin(spec: ServiceSpec) -> bool:
    return spec.task_template.container_spec is None


def _named(spec: ServiceSpec, names_of: Mapping[str, str]) -> ServiceSpec:
    """Return the spec with networks by name, and with networks of old clients in their present field."""
    template = spec.task_template
    attached = tuple(
        replace(one, target=names_of.get(one.target, one.target))
        for one in template.networks or spec.networks
    )
    return replace(spec, networks=(), task_template=replace(template, networks=attached))


def _relabeled(labels: Mapping[str, str], renamed: Mapping[str, str]) -> dict[str, str]:
    """Return the labels with the new names of the services that they name.  ``renamed``: by the old name in lower
    case.
    """
    made = {**labels}
    if found := dependencies_of(labels):
        made |= label_of(replace(one, service=renamed.get(one.key, one.service)) for one in found)
    for label in AFFINITY_LABELS:
        terms = [one.strip().partition("@") for one in labels.get(label, "").split(",")]
        if label in labels:
            made[label] = ",".join(renamed.get(name.lower(), name) + at + rest for name, at, rest in terms)
    return made


def _names(specs: Sequence[ServiceSpec], stack: str, networks: Mapping[str, Mapping[str, Any]]) -> ObjectKeys:
    containers = [spec.task_template.container_spec or ContainerSpec() for spec in specs]
    attached = {one.target for spec in specs for one in spec.task_template.networks}
    return ObjectKeys(
        services=_keys((spec.name for spec in specs), stack),
        networks=_keys((one for one in sorted(attached) if one not in NODES_NETWORKS), stack),
        secrets=_keys(sorted({one.secret_name for each in containers for one in each.secrets}), stack),
        configs=_keys(sorted({one.config_name for each in containers for one in each.configs}), stack),
        volumes=_keys(
            sorted({one.source for each in containers for one in each.mounts if names_volume(one)}),
            stack,
        ),
    )


def _keys(names: Iterable[str], stack: str) -> dict[str, str]:
    """Return the keys of names: the names without the stack's prefix, unless two keys would then be equal."""
    present = tuple(names)
    keys = {name: name.removeprefix(f"{stack}_") or name for name in present}
    return {name: name if key != name and key in present else key for name, key in keys.items()}


# --- the other sections --------------------------------------------------------------------------------------------


def _sections(
    document: dict[str, Any],
    specs: Sequence[ServiceSpec],
    names: ObjectKeys,
    stack: str,
    networks: Mapping[str, Mapping[str, Any]],
) -> Iterator[Note]:
    by_name = {str(one["Name"]): one for one in networks.values()}
    made: dict[str, Any] = {}
    for name, key in names.networks.items():
        found = by_name.get(name)
        if found is not None and (found.get("Labels") or {}).get(STACK_LABEL) == stack:
            made[key] = _network(found, name, f"{stack}_{key}")
        else:
            made[key] = {"external": True, "name": name}
            if found is None:
                yield Note(f"networks.{key}", f"{name} is the id of a network: write its name")
    sections = {
        "networks": made,
        "volumes": dict(_volumes(specs, names, stack)),
        "secrets": {key: {"external": True, "name": name} for name, key in names.secrets.items()},
        "configs": {key: {"external": True, "name": name} for name, key in names.configs.items()},
    }
    document |= {section: entries for section, entries in sections.items() if entries}


def _network(found: Mapping[str, Any], name: str, usual: str) -> dict[str, Any] | None:
    ipam = found.get("IPAM") or {}
    pools = [
        {
            word: pool[field]
            for word, field in (
                ("subnet", "Subnet"),
                ("gateway", "Gateway"),
                ("ip_range", "IPRange"),
                ("aux_addresses", "AuxiliaryAddresses"),
            )
            if pool.get(field)
        }
        for pool in ipam.get("Config") or ()
    ]
    labels = {key: one for key, one in sorted((found.get("Labels") or {}).items()) if key != STACK_LABEL}
    options = {
        key: one
        for key, one in sorted((found.get("Options") or {}).items())
        if key != "com.docker.network.driver.overlay.vxlanid_list"
    }
    driver = ipam.get("Driver") if ipam.get("Driver") != "default" else None
    addresses = {"driver": driver, "config": pools, "options": ipam.get("Options")}
    made = {
        "name": name if name != usual else None,
        "driver": found.get("Driver") if found.get("Driver") != "overlay" else None,
        "driver_opts": options,
        "labels": labels,
        "attachable": bool(found.get("Attachable")) or None,
        "internal": bool(found.get("Internal")) or None,
        "enable_ipv6": bool(found.get("EnableIPv6")) or None,
        "enable_ipv4": False if found.get("EnableIPv4") is False else None,
        "ipam": {key: one for key, one in addresses.items() if one},
    }
    return {key: one for key, one in made.items() if one or one is False} or None


def _volumes(specs: Sequence[ServiceSpec], names: ObjectKeys, stack: str) -> Iterator[tuple[str, Any]]:
    for spec in specs:
        for mount in (spec.task_template.container_spec or ContainerSpec()).mounts:
            if not names_volume(mount):
                continue
            key, options = names.volumes[mount.source], mount.volume_options
            labels = dict(options.labels) if options is not None else {}
            driver = options.driver_config if options is not None else None
            if labels.pop(STACK_LABEL, "") != stack and not labels and driver is None:
                yield key, {"external": True, "name": mount.source}
                continue
            made: dict[str, Any] = {} if mount.source == f"{stack}_{key}" else {"name": mount.source}
            if driver is not None:
                made |= {"driver": driver.name} if driver.name else {}
                made |= {"driver_opts": dict(driver.options)} if driver.options else {}
            yield key, made | ({"labels": labels} if labels else {}) or None


# --- lost settings -------------------------------------------------------------------------------------------------


def _expected(spec: ServiceSpec, key: str, stack: str) -> ServiceSpec:
    """Return the spec as a stack would create it: with its name, reachable by its key, and without explicit
    defaults.
    """
    template = spec.task_template
    attached = tuple(
        one if one.target in NODES_NETWORKS else replace(one, aliases=_aliases(one, key))
        for one in template.networks
    )
    endpoint, container = spec.endpoint_spec or EndpointSpec(), template.container_spec
    if container is not None and container.isolation == "default":
        container = replace(container, isolation="")
    runtime = "" if template.runtime == "container" else template.runtime
    return replace(
        spec,
        name=f"{stack}_{key}",
        task_template=replace(template, networks=attached, container_spec=container, runtime=runtime),
        endpoint_spec=replace(endpoint, mode=endpoint.mode or "vip"),
    )


def _aliases(one: NetworkAttachmentConfig, key: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*(alias for alias in one.aliases if alias != key), key)))


def _losses(before: ServiceSpec, after: ServiceSpec) -> Iterator[str]:
    attached = before.task_template.networks
    if not attached:
        yield "it had no network, and joins the stack's default network"
        after = replace(after, task_template=replace(after.task_template, networks=()))
    for one in differences(before, after):
        if one.path.endswith(_STACK_LABELS) or one.path.endswith(".Image"):
            continue
        if not one.after:
            yield f"{one.path}: {one.before!r} is dropped"
        elif not one.before:
            yield f"{one.path}: {one.after!r} is added"
        else:
            yield f"{one.path}: {one.before!r} becomes {one.after!r}"


def _paths(unknown: Unknown | UnknownOfItems, path: str = "") -> Iterator[str]:
    if unknown is NOTHING:
        return
    if isinstance(unknown, UnknownOfItems):
        for _, _, one in unknown.items:
            yield from _paths(one, path)
        return
    for name, value in unknown.fields.items():
        if value not in (b"null", b'""', b"[]", b"{}", b"false", b"0"):
            yield f"{path}.{name}" if path else name
    for name, inside in unknown.inside.items():
        yield from _paths(inside, f"{path}.{name}" if path else name)

"""Conversion of a merged document into a stack."""

import re
from collections.abc import Mapping
from typing import Any, Final

from msgspec.structs import replace

from skep.model.options.affinity import named_services
from skep.model.options.dependencies import dependencies_of, label_of
from skep.model.service import PublishMode
from skep.model.values.encoding import to_json
from skep.model.values.meta import Driver
from skep.model.values.stacks import STACK_LABEL
from skep.stack.compose.containers import StackVolumes
from skep.stack.compose.document import FilePosition, FileProblem, YamlNode
from skep.stack.compose.reading import MappingReader, ProblemReport, meant_by
from skep.stack.compose.services import StackObjects, service_of
from skep.stack.project import Stack, StackFile, StackNetwork, StackService, versioned_name

_NAME: Final = re.compile(r"[a-zA-Z0-9._-]+")
_STACK_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
_FILE_BYTES_MAX: Final = {"secrets": 500 * 1024, "configs": 1000 * 1024}


def stack_of(
    document: YamlNode, name: str, contents: Mapping[tuple[str, str], bytes], report: ProblemReport
) -> Stack:
    """Return the stack ``name``.

    Args:
        document: the merged files, with absolute paths and without the services of unused profiles.
        contents: contents of secrets and configs from files or the environment, by ``("secrets", NAME)``.
        report: collects errors and warnings.
    """
    top = MappingReader(document, "", report)
    if not _STACK_NAME.fullmatch(name):
        from skep.gotemplate import quoted  # Importing this takes longer than converting most files.

        top.problem(
            "name",
            f"invalid stack name {quoted(name)}: expected letters, digits, dots, dashes and underscores",
        )
    top.skip("version", "name", "include")
    top.refuse("models", "a cluster does not run language models itself: run the model as a service")
    services = top.named("services")
    if not services:
        version_1 = "" if "services" in top else _version_1(document)
        top.problem("services", f"there are no services{version_1}")
        if version_1:
            top.names()
    networks = _networks(top, name, services)
    objects = StackObjects(
        stack=name,
        volumes=StackVolumes(_volumes(top, name)),
        networks=networks,
        secrets=_files(top, "secrets", name, contents),
        configs=_files(top, "configs", name, contents),
    )
    made: dict[str, StackService] = {}
    for service, node in services.items():
        if not _NAME.fullmatch(service):
            report.problems.append(_bad_name(node.place, service))
        made[service] = service_of(service, node, objects, report)
    top.close()
    used = {one.target for service in made.values() for one in service.spec.task_template.networks}
    stack = Stack(
        name=name,
        services=made,
        networks={key: one for key, one in networks.items() if one.name in used},
        secrets=objects.secrets,
        configs=objects.configs,
    )
    _check_dependencies(stack, report)
    _check_affinities(stack, report)
    _check_names(stack, report)
    _check_ports(stack, report)
    return replace(stack, services={key: _with_dependencies(one, stack) for key, one in made.items()})


def _version_1(document: YamlNode) -> str:
    entries = document.entries or {}
    is_old = any(
        one.entries is not None and ("image" in one.entries or "build" in one.entries)
        for one in entries.values()
    )
    return ": this is a file of version 1; put everything below services:" if is_old else ""


def _bad_name(place: FilePosition, name: str) -> FileProblem:
    return FileProblem(
        place, f"services.{name}", "a service's name has letters, digits, dots, dashes and underscores only"
    )


def _check_dependencies(stack: Stack, report: ProblemReport) -> None:
    def problem(name: str, text: str) -> None:
        report.problems.append(FileProblem(stack.services[name].place, f"services.{name}.depends_on", text))

    for name, service in stack.services.items():
        for one in service.depends_on:
            target = stack.services.get(one.service)
            if target is None and one.is_required:
                meant = meant_by(one.service, stack.services)
                problem(name, f"{name} depends on {one.service}, which is not there{meant}")
    if cycle := find_cycle(
        {name: [one.service for one in service.depends_on] for name, service in stack.services.items()}
    ):
        problem(cycle[0], f"services depend on each other in a circle: {' -> '.join(cycle)}")


def _check_affinities(stack: Stack, report: ProblemReport) -> None:
    """Report affinities to services of this stack that are not in the file."""
    names = {service.spec.name.lower() for service in stack.services.values()}
    prefix = f"{stack.name}_"
    for key, service in stack.services.items():
        for name in named_services(service.spec.labels):
            if name.lower().startswith(prefix.lower()) and name.lower() not in names:
                short = name[len(prefix) :]
                text = f"its affinity names {short}, which is not there{meant_by(short, stack.services)}"
                report.problems.append(FileProblem(service.place, f"services.{key}", text))


def _check_names(stack: Stack, report: ProblemReport) -> None:
    """Report two objects with the same name in the cluster.  External objects may be named twice."""
    for kind in ("networks", "secrets", "configs"):
        keys: dict[str, str] = {}
        objects: Mapping[str, StackNetwork | StackFile] = getattr(stack, kind)
        for key, one in objects.items():
            if one.is_external:
                continue
            first = keys.setdefault(one.name, key)
            if first != key:
                text = (
                    f"its name in the cluster is {one.name}, which {first} already uses: give it another name"
                )
                report.problems.append(FileProblem(one.place, f"{kind}.{key}", text))


def _check_ports(stack: Stack, report: ProblemReport) -> None:
    """Report ports that two services publish on all nodes."""
    owners: dict[tuple[int, str], str] = {}
    for key, service in stack.services.items():
        endpoint = service.spec.endpoint_spec
        for port in endpoint.ports if endpoint is not None else ():
            if not port.published_port or port.publish_mode is PublishMode.HOST:
                continue
            owner = owners.setdefault((port.published_port, port.protocol), key)
            if owner != key:
                text = (
                    f"port {port.published_port}/{port.protocol} is published by {owner} already: "
                    "publish another one, or in mode host on nodes of their own"
                )
                report.problems.append(FileProblem(service.place, f"services.{key}.ports", text))


def _with_dependencies(service: StackService, stack: Stack) -> StackService:
    """Return the service with the dependency label, by which the cluster orders starts.

    Dependencies in a label of the file stay, because only a label can name services of other stacks.
    """
    found = [
        replace(one, service=stack.services[one.service].spec.name)
        for one in service.depends_on
        if one.service in stack.services
    ]
    spec = service.spec
    if found:
        keys = {one.key for one in found}
        found += [one for one in dependencies_of(spec.labels) if one.key not in keys]
    return replace(service, spec=replace(spec, labels={**spec.labels, **label_of(found)}))


def find_cycle(edges: Mapping[str, list[str]]) -> list[str]:
    """Return a cycle of names, with the first name again at its end, or an empty list without a cycle."""
    done: set[str] = set()
    for start in edges:
        path: list[str] = []
        pending = [(start, iter(edges.get(start, ())))] if start not in done else []
        path += [start] if pending else []
        while pending:
            name, following = pending[-1]
            after = next(following, None)
            if after is None:
                done.add(name)
                pending.pop()
                path.pop()
            elif after in path:
                return [*path[path.index(after) :], after]
            elif after not in done:
                pending.append((after, iter(edges.get(after, ()))))
                path.append(after)
    return []


# --- the other sections --------------------------------------------------------------------------------------------


def _external(one: MappingReader) -> tuple[bool, str]:
    """Return whether the object is external, and its name or "".  ``external: {name: X}`` is the old form."""
    found, name = one.node("external"), one.text("name")
    if found is None:
        return False, name
    if found.entries is None:
        return bool(one.boolean("external")), name
    old = one.reader("external")
    assert old is not None
    given = old.text("name")
    old.close()
    if name and given:
        one.problem("external", "the name is given twice: write external: true, and name")
    return True, name or given


def _refuse_beside_external(one: MappingReader, *keys: str) -> None:
    for key in keys:
        if one.node(key) is not None:
            one.problem(key, f'conflicting parameters "external" and "{key}"')


def _networks(top: MappingReader, stack: str, services: Mapping[str, YamlNode]) -> dict[str, StackNetwork]:
    made: dict[str, StackNetwork] = {}
    for key, node in top.named("networks").items():
        one = MappingReader(node, f"networks.{key}", top.report)
        is_external, name = _external(one)
        if is_external:
            _refuse_beside_external(
                one, "driver", "driver_opts", "ipam", "labels", "internal", "attachable", "enable_ipv6"
            )
            one.close()
            made[key] = StackNetwork(place=node.place, name=name or key, is_external=True)
            continue
        name = name or f"{stack}_{key}"
        made[key] = StackNetwork(place=node.place, name=name, body=_network_body(one, name, stack))
        one.close()
    made.setdefault("host", StackNetwork(place=top.place, name="host", is_external=True))
    default = f"{stack}_default"
    body = {"Name": default, "Driver": "overlay", "Labels": {STACK_LABEL: stack}, "CheckDuplicate": True}
    made.setdefault("default", StackNetwork(place=top.place, name=default, body=body))
    return made


def _network_body(one: MappingReader, name: str, stack: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "Name": name,
        "CheckDuplicate": True,
        "Driver": one.text("driver") or "overlay",
        "Labels": one.labels("labels") | {STACK_LABEL: stack},
        "Internal": one.boolean("internal") or False,
        "Attachable": one.boolean("attachable") or False,
    }
    if options := one.labels("driver_opts"):
        body["Options"] = options
    if (ipv6 := one.boolean("enable_ipv6")) is not None:
        body["EnableIPv6"] = ipv6
    if one.boolean("enable_ipv4") is False:
        one.problem("enable_ipv4", "cluster networks always have IPv4")
    ipam = one.reader("ipam")
    if ipam is not None:
        configs = []
        for node, path in ipam.each("config"):
            config = MappingReader(node, path, one.report)
            parts = {
                "Subnet": config.text("subnet"),
                "IPRange": config.text("ip_range"),
                "Gateway": config.text("gateway"),
                "AuxiliaryAddresses": config.labels("aux_addresses"),
            }
            configs.append({field: value for field, value in parts.items() if value})
            config.close()
        body["IPAM"] = {
            "Driver": ipam.text("driver") or "default",
            "Config": configs,
            "Options": ipam.labels("options"),
        }
        ipam.close()
    return body


def _volumes(top: MappingReader, stack: str) -> dict[str, tuple[str, dict[str, str], Driver | None]]:
    made: dict[str, tuple[str, dict[str, str], Driver | None]] = {}
    for key, node in top.named("volumes").items():
        one = MappingReader(node, f"volumes.{key}", top.report)
        is_external, name = _external(one)
        if is_external:
            _refuse_beside_external(one, "driver", "driver_opts", "labels")
            made[key] = name or key, {}, None
        else:
            driver = Driver(name=one.text("driver"), options=one.labels("driver_opts"))
            labels = one.labels("labels") | {STACK_LABEL: stack}
            made[key] = name or f"{stack}_{key}", labels, driver if driver != Driver() else None
        one.refuse(
            "x-cluster-spec",
            "a file cannot create cluster volumes: run docker volume create, and declare it with external: true",
        )
        one.close()
    return made


def _files(
    top: MappingReader, key: str, stack: str, contents: Mapping[tuple[str, str], bytes]
) -> dict[str, StackFile]:
    made: dict[str, StackFile] = {}
    for name, node in top.named(key).items():
        one = MappingReader(node, f"{key}.{name}", top.report)
        is_external, given = _external(one)
        if is_external:
            _refuse_beside_external(
                one, "file", "content", "environment", "driver", "driver_opts", "labels", "template_driver"
            )
            made[name] = StackFile(place=node.place, name=given or name, is_external=True)
        else:
            made[name] = _file(one, key, name, given, stack, contents.get((key, name)))
        one.close()
    return made


def _file(
    one: MappingReader, key: str, name: str, given: str, stack: str, content: bytes | None
) -> StackFile:
    sources = [source for source in ("file", "content", "environment") if one.node(source) is not None]
    if key == "secrets":
        one.refuse("content", "a secret's value does not belong in the file: use file or environment")
    for option in ("driver", "driver_opts"):
        one.refuse(option, "the data cannot come from a driver: use file or environment")
    if len(sources) != 1 and one.node("driver") is None:
        one.problem(
            sources[-1] if sources else "file",
            f"expected one of file, content and environment, not {' and '.join(sources) or 'none'}",
        )
    text = one.text("content")
    content = text.encode() if "content" in sources else content
    if content is not None and len(content) > _FILE_BYTES_MAX[key]:
        one.problem(sources[0] if sources else "file", f"it is larger than {_FILE_BYTES_MAX[key] >> 10} KiB")
    template = one.text("template_driver")
    labels = one.labels("labels") | {STACK_LABEL: stack}
    templating = {"Name": template} if template else None
    base = f"{stack}_{name}"
    is_versioned = not given and content is not None
    if content is not None and is_versioned:
        settings = to_json([labels, template])
        base = versioned_name(base, content, is_secret=key == "secrets", settings=settings)
    return StackFile(
        place=one.place,
        name=given or base,
        content=content,
        is_versioned=is_versioned,
        labels=labels,
        templating=templating,
    )

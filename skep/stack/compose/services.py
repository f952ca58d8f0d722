"""Conversion of a service's keys into its spec."""

import re
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.container import ConfigReference, FileTarget, SecretReference
from skep.model.door.routes import (
    HEADER_OPTIONS,
    HTTP,
    OPTIONS,
    parsed_routes,
    tls_secrets,
    with_tls_secret,
)
from skep.model.networks.publishing import PREFIX
from skep.model.options import labels as known_labels
from skep.model.options.affinity import AFFINITY_LABELS, MAX_SKEW, check_affinities
from skep.model.options.autoscaling import (
    AUTOSCALE,
    AUTOSCALE_LABELS,
    check_autoscaling,
    parsed_autoscaling,
)
from skep.model.options.dependencies import Dependency, DependencyCondition
from skep.model.options.label_suggestions import PREFIX as LABEL_PREFIX
from skep.model.options.label_suggestions import suggested_label
from skep.model.options.schedules import CRON, SCHEDULE_LABELS, check_schedule
from skep.model.permissions.field_rights import SERVICE_LABELS
from skep.model.permissions.rights import rights_of
from skep.model.service import (
    REPLICAS_MAX,
    EndpointSpec,
    NetworkAttachmentConfig,
    PortConfig,
    PublishMode,
    ServiceSpec,
    TaskSpec,
)
from skep.model.staging.updates import UPDATE_LABELS
from skep.model.values.meta import Driver
from skep.model.values.stacks import STACK_LABEL
from skep.stack.compose.containers import StackVolumes, container_of, hosts_of
from skep.stack.compose.deploy_section import (
    mode_name,
    mode_of,
    placement_of,
    resources_of,
    restart_of,
    update_of,
)
from skep.stack.compose.document import YamlNode
from skep.stack.compose.node_rights import rights_labels
from skep.stack.compose.reading import MappingReader, ProblemReport
from skep.stack.project import IMAGE, NODES_NETWORKS, BuildSpec, StackFile, StackNetwork, StackService

_X_SKEP: Final = {
    "drain": known_labels.DRAIN,
    "on-disconnect": known_labels.ON_DISCONNECT,
    "on-disconnect-delay": known_labels.ON_DISCONNECT_DELAY,
    "progress-deadline": known_labels.PROGRESS_DEADLINE,
    "min-available": known_labels.MIN_AVAILABLE,
    "job-ttl": known_labels.JOB_TTL,
    "last-lines": known_labels.LAST_LINES,
    "volume-affinity": known_labels.VOLUME_AFFINITY,
    "near": known_labels.NEAR,
    "publish-not-ready": known_labels.PUBLISH_NOT_READY,
    "stopped": known_labels.STOPPED,
    "max-skew": MAX_SKEW,
    **{label.removeprefix(LABEL_PREFIX).replace(".", "-"): label for label in UPDATE_LABELS},
}
_PUBLISH: Final = ("host-ip", "affinity", "local", "proxy-protocol")
_ROUTE_HOST: Final = "host"
_PORT: Final = re.compile(
    r"(?:(?P<ip>[0-9]+\.[0-9.]+|\[[0-9a-fA-F:.]+\]):)?(?:(?P<published>[0-9]*(?:-[0-9]+)?):)?"
    r"(?P<target>[0-9]+(?:-[0-9]+)?)(?:/(?P<protocol>[A-Za-z]+))?"
)
_PROTOCOLS: Final = ("tcp", "udp", "sctp")


class StackObjects(msgspec.Struct, frozen=True, kw_only=True):
    """The objects that services of a stack may refer to, by their names in the files."""

    stack: str
    volumes: StackVolumes
    networks: Mapping[str, StackNetwork]
    secrets: Mapping[str, StackFile]
    configs: Mapping[str, StackFile]


def service_of(name: str, node: YamlNode, objects: StackObjects, report: ProblemReport) -> StackService:
    """Return the service ``name``, and add its errors and warnings to ``report``."""
    service = MappingReader(node, f"services.{name}", report)
    deploy = service.reader("deploy") or MappingReader(YamlNode({}, node.place), service.at("deploy"), report)
    image, build = service.text("image"), _build(service)
    if service.node("image") is None and build is None:
        service.problem("image", "the service has neither image nor build")
    image = image or f"{objects.stack}-{name}:latest"
    container = replace(
        container_of(service, objects.volumes),
        image=image,
        labels=service.labels("labels") | {STACK_LABEL: objects.stack} | rights_labels(service, deploy),
        secrets=_secrets(service, objects.secrets),
        configs=_configs(service, objects.configs),
    )
    ports, labels = _ports(service)
    declared = deploy.labels("labels")
    named = mode_name(deploy)
    labels |= declared | _x_skep(service, named, objects) | {STACK_LABEL: objects.stack, IMAGE: image}
    mode = mode_of(named, service, deploy, leaves_number=AUTOSCALE in labels)
    is_job = mode.replicated_job is not None or mode.global_job is not None
    spec = ServiceSpec(
        name=f"{objects.stack}_{name}",
        labels=labels,
        task_template=TaskSpec(
            container_spec=container,
            resources=resources_of(service, deploy),
            restart_policy=restart_of(service, deploy),
            placement=placement_of(service, deploy),
            networks=_networks(name, service, objects),
            log_driver=_logging(service.reader("logging")),
        ),
        mode=mode,
        update_config=update_of(deploy, "update_config", is_job),
        rollback_config=update_of(deploy, "rollback_config", is_job),
        endpoint_spec=_endpoint(deploy, ports),
    )
    depends_on = _dependencies(service)
    for problem, key in _refused_by_labels(spec, declared, "x-skep" if service.node("x-skep") else "deploy"):
        service.problem(key, problem)
    made = StackService(
        place=node.place,
        spec=spec,
        depends_on=depends_on,
        build=build,
        binds=tuple(one.source for one in container.mounts if one.type == "bind"),
    )
    service.skip("profiles", "env_file", "label_file", "extends")
    deploy.close()
    service.close(hint_of=_HINTS.get)
    return made


_HINTS: Final = {
    "volume_driver": ": give the volume a driver, in the volumes at the top of the file",
    "net": ": it is network_mode now",
    "log_driver": ": it is logging.driver now",
    "log_opt": ": it is logging.options now",
    "cpu_set": ": did you mean cpuset?",
    "dockerfile": ": it stands below build",
}


def _refused_by_labels(spec: ServiceSpec, declared: Mapping[str, str], own: str) -> list[tuple[str, str]]:
    """Return errors about labels, each with the key at which it is reported.  ``own``: the key of ``skep.*`` labels.

    ``declared``: the labels below ``deploy``.  A schedule below ``x-skep`` is checked where it is read.
    """
    found: list[tuple[str, str]] = []
    for check, key in (
        (lambda: known_labels.check_service_labels(spec.labels), own),
        (lambda: check_autoscaling(spec), own),
        (
            lambda: check_affinities(spec.labels, spec.name, is_global=spec.mode.name.startswith("global")),
            own,
        ),
        (lambda: check_schedule(declared, spec.mode.name), "deploy"),
        (lambda: rights_of(spec.task_template.container_spec), "labels"),
    ):
        try:
            check()
        except InvalidArgument as error:
            found.append((str(error), key))
    return found


def _dependencies(service: MappingReader) -> tuple[Dependency, ...]:
    made: list[Dependency] = []
    found = service.node("depends_on")
    if found is None:
        return ()
    if found.entries is None:
        return tuple(Dependency(name) for name in service.texts("depends_on"))
    group = service.reader("depends_on")
    assert group is not None
    for name, node in group.names().items():
        one = MappingReader(node, group.at(name), service.report)
        made.append(
            Dependency(
                name,
                DependencyCondition(
                    one.choice("condition", *(each.value for each in DependencyCondition))
                    or DependencyCondition.STARTED
                ),
                one.boolean("required") is not False,
                one.boolean("restart") or False,
            )
        )
        one.close()
    return tuple(made)


def _build(service: MappingReader) -> BuildSpec | None:
    found = service.node("build")
    if found is None:
        return None
    if found.entries is None:
        return BuildSpec(context=service.text("build"))
    build = service.reader("build")
    assert build is not None
    arguments: list[str] = []
    for key, option in (
        ("dockerfile", "--file"),
        ("target", "--target"),
        ("network", "--network"),
        ("shm_size", "--shm-size"),
    ):
        if text := build.text(key):
            arguments += [option, text]
    for key, option in (
        ("args", "--build-arg"),
        ("ssh", "--ssh"),
        ("labels", "--label"),
        ("additional_contexts", "--build-context"),
    ):
        for name, value in build.pairs(key).items():
            arguments += [option, name if value is None else f"{name}={value}"]
    for key, option in (
        ("cache_from", "--cache-from"),
        ("cache_to", "--cache-to"),
        ("tags", "--tag"),
        ("platforms", "--platform"),
    ):
        for text in build.texts(key):
            arguments += [option, text]
    for line in hosts_of(build):
        address, _, name = line.partition(" ")
        arguments += ["--add-host", f"{name}:{address}"]
    for key, option in (("no_cache", "--no-cache"), ("pull", "--pull")):
        if build.boolean(key):
            arguments.append(option)
    for key in (
        "dockerfile_inline",
        "secrets",
        "entitlements",
        "isolation",
        "privileged",
        "ulimits",
        "provenance",
        "sbom",
    ):
        build.refuse(key, "build the image with `docker buildx build`, and name it in image")
    context = build.text("context") or "."
    build.close()
    return BuildSpec(context=context, arguments=tuple(arguments))


# --- networks and ports --------------------------------------------------------------------------------------------


def _networks(
    name: str, service: MappingReader, objects: StackObjects
) -> tuple[NetworkAttachmentConfig, ...]:
    mode, attached = service.text("network_mode"), service.named("networks")
    alias = [one for one in (service.text("container_name"),) if one]
    if mode:
        if attached:
            service.problem("network_mode", "network_mode and networks can't be set at the same time")
        if mode not in NODES_NETWORKS:
            service.problem("network_mode", f"{mode!r} is not supported: expected host or none")
        return (NetworkAttachmentConfig(target=mode),)
    made: list[NetworkAttachmentConfig] = []
    for key, node in (attached or {"default": YamlNode(None, service.place)}).items():
        one = MappingReader(node, f"{service.at('networks')}.{key}", service.report)
        network = objects.networks.get(key)
        if network is None:
            service.problem(
                "networks", f"there is no network {key}: declare it in the networks at the top of the file"
            )
            continue
        for address in ("ipv4_address", "ipv6_address", "link_local_ips", "mac_address"):
            one.refuse(address, "the addresses of tasks come from the cluster")
        for word in ("priority", "gw_priority", "interface_name"):
            one.ignore(word, "the order and names of a task's interfaces come from the cluster")
        aliases = tuple(dict.fromkeys((*one.texts("aliases"), *alias, name)))
        options = one.labels("driver_opts")
        made.append(NetworkAttachmentConfig(target=network.name, aliases=aliases, driver_opts=options))
        one.close()
    return tuple(sorted(made, key=lambda one: one.target))


def _endpoint(deploy: MappingReader, ports: tuple[PortConfig, ...]) -> EndpointSpec | None:
    mode = deploy.choice("endpoint_mode", "vip", "dnsrr")
    return EndpointSpec(mode=mode or "vip", ports=ports)


def _ports(service: MappingReader) -> tuple[tuple[PortConfig, ...], dict[str, str]]:
    """Return the published ports, and labels with the node addresses that they listen on."""
    made, addresses = dict[PortConfig, None](), dict[str, str]()
    for node, path in service.each("ports"):
        before = len(service.report.problems)
        for port, given in (
            _long_port(MappingReader(node, path, service.report))
            if node.entries is not None
            else _short_ports(node, path, service)
        ):
            made[port] = None
            address = "" if given in ("0.0.0.0", "::") else given
            if not port.published_port:
                if address and len(service.report.problems) == before:
                    service.problem_at(node, path, "an address of the node needs a published port")
                continue
            label = f"{PREFIX}{port.published_port}/{port.protocol}.host-ip"
            if (other := addresses.setdefault(label, address)) != address:
                text = f"the port answers on {other or 'all addresses'} already: it has one address"
                service.problem_at(node, path, text)
    labels = {label: address for label, address in addresses.items() if address}
    return tuple(sorted(made, key=lambda one: (one.published_port, one.target_port, one.protocol))), labels


def _long_port(port: MappingReader) -> list[tuple[PortConfig, str]]:
    target = port.integer("target", 1, 65535)
    if target is None and port.node("target") is None:
        port.problem("target", "a published port needs its target, the port in the container")
    mode = port.choice("mode", "ingress", "host")
    published, address = port.text("published"), port.text("host_ip")
    protocol = port.choice("protocol", *_PROTOCOLS)
    name = port.text("name")
    port.ignore("app_protocol", "it changes nothing in the cluster")
    port.close()
    low, high = _range(published or "0")
    if not 0 <= low <= high <= 65535 or (published and not low) or high - low > 0:
        port.problem("published", f"expected one port from 1 to 65535, not {published!r}")
        return []
    return [
        (
            PortConfig(
                name=name,
                protocol=protocol or "tcp",
                target_port=target or 0,
                published_port=low,
                publish_mode=PublishMode.HOST if mode == "host" else PublishMode.INGRESS,
            ),
            address,
        )
    ]


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (re.fullmatch(r"[0-9]{1,5}", low) and re.fullmatch(r"[0-9]{0,5}", high)):
        return -1, -1
    return int(low), int(high or low)


def _short_ports(node: YamlNode, path: str, service: MappingReader) -> list[tuple[PortConfig, str]]:
    match = _PORT.fullmatch(node.text) if isinstance(node.value, str | int | float) else None
    if match is None:
        service.problem_at(node, path, f"expected [ADDRESS:][PUBLISHED:]TARGET[/PROTOCOL], not {node.kind}")
        return []
    protocol = (match["protocol"] or "tcp").lower()
    low, high = _range(match["target"])
    first, last = _range(match["published"] or "0")
    if protocol not in _PROTOCOLS or not 0 < low <= high <= 65535 or not 0 <= first <= last <= 65535:
        service.problem_at(
            node, path, f"{node.text!r} has no valid ports: expected 1 to 65535, and {', '.join(_PROTOCOLS)}"
        )
        return []
    if first and last - first != high - low:
        service.problem_at(node, path, f"{node.text!r} has ranges of different lengths")
        return []
    address = (match["ip"] or "").strip("[]")
    return [
        (
            PortConfig(protocol=protocol, target_port=target, published_port=first + at if first else 0),
            address,
        )
        for at, target in enumerate(range(low, high + 1))
    ]


# --- secrets and configs -------------------------------------------------------------------------------------------


def _references(
    service: MappingReader, key: str, known: Mapping[str, StackFile]
) -> list[tuple[StackFile, str, FileTarget]]:
    made: list[tuple[StackFile, str, FileTarget]] = []
    for node, path in service.each(key):
        is_long = node.entries is not None
        one = MappingReader(node if is_long else YamlNode({}, node.place), path, service.report)
        source = one.text("source") if is_long else node.text
        found = known.get(source)
        if found is None:
            noun = key.removesuffix("s")
            service.problem_at(
                node,
                path,
                f"there is no {noun} {source}: declare it in the {key} at the top of the file",
            )
            continue
        default = f"/{source}" if key == "configs" else source
        mode = one.mode("mode")
        target = FileTarget(
            name=one.text("target") or default,
            uid=one.text("uid") or "0",
            gid=one.text("gid") or "0",
            mode=0o444 if mode is None else mode,
        )
        one.close()
        made.append((found, source, target))
    return sorted(made, key=lambda one: (one[0].name, one[2].name))


def _secrets(service: MappingReader, known: Mapping[str, StackFile]) -> tuple[SecretReference, ...]:
    return tuple(
        SecretReference(file=target, secret_name=found.name)
        for found, _, target in _references(service, "secrets", known)
    )


def _configs(service: MappingReader, known: Mapping[str, StackFile]) -> tuple[ConfigReference, ...]:
    return tuple(
        ConfigReference(file=target, config_name=found.name)
        for found, _, target in _references(service, "configs", known)
    )


def _logging(logging: MappingReader | None) -> Driver | None:
    if logging is None:
        return None
    made = Driver(name=logging.text("driver"), options=logging.labels("options"))
    logging.close()
    return made if made != Driver() else None


def _autoscaling(settings: MappingReader) -> dict[str, str]:
    """Return the labels for ``autoscale``: ``2..10``, or a mapping with ``min``, ``max`` and the targets.

    An invalid setting adds no labels.
    """
    node = settings.node("autoscale")
    if node is None:
        return {}
    if node.entries is None:
        return _checked_labels(settings, {"autoscale": AUTOSCALE}, {})
    one, before = (
        MappingReader(node, settings.at("autoscale"), settings.report),
        len(settings.report.problems),
    )
    least, most = one.integer("min", 0, REPLICAS_MAX), one.integer("max", 1, REPLICAS_MAX)
    if "max" not in one:
        one.problem("max", "expected the most tasks that the service may have")
    if least is not None and most is not None and least > most:
        one.problem("min", f"{least} is more than max, which is {most}")
    made = {AUTOSCALE: f"{1 if least is None else least}..{most or REPLICAS_MAX}"}
    keys = {name.removeprefix(f"{AUTOSCALE}."): name for name in AUTOSCALE_LABELS if name != AUTOSCALE}
    made |= _checked_labels(one, keys, made)
    one.close()
    return made if len(settings.report.problems) == before else {}


def _checked_labels(
    settings: MappingReader, keys: Mapping[str, str], beside: Mapping[str, str]
) -> dict[str, str]:
    """Return labels with the values of these keys.  Errors are reported at the place of the key in the file."""
    made = {label: text for key, label in keys.items() if (text := settings.text(key))}
    if not made:
        return {}
    try:
        parsed_autoscaling({**beside, **made})
    except InvalidArgument as error:
        named = [
            key for key, label in keys.items() if re.search(rf"label {re.escape(label)}[ =:]", str(error))
        ]
        settings.problem(next(iter(named), next(iter(keys))), str(error))
        return {}
    return made


def _x_skep(service: MappingReader, mode: str, objects: StackObjects) -> dict[str, str]:
    """Return service labels for the settings below ``x-skep``.  Affinities name services of the file."""
    settings = service.reader("x-skep")
    if settings is None:
        return {}
    made = {label: text for key, label in _X_SKEP.items() if (text := settings.text(key))}
    for label in AFFINITY_LABELS:
        key = label.removeprefix(LABEL_PREFIX).replace(".", "-")
        if text := settings.text(key):
            made[label] = ",".join(f"{objects.stack}_{part.strip()}" for part in text.split(","))
    made |= _autoscaling(settings)
    priority = settings.integer("priority", -known_labels.PRIORITY_MAX, known_labels.PRIORITY_MAX)
    if priority is not None:
        made |= {known_labels.PRIORITY: str(priority)}
    made |= _cron(settings, mode, made)
    made |= _with_secrets_of_file(_http(settings), objects.secrets)
    publish = settings.reader("publish")
    if publish is not None:
        for key, node in publish.names().items():
            if node.entries is None:
                made |= {f"{PREFIX}{key}": publish.text(key)}
                if key not in _PUBLISH:
                    publish.problem(key, f"unknown key: expected {', '.join(_PUBLISH)}, or a port above them")
                continue
            port = MappingReader(node, publish.at(key), service.report)
            made |= {f"{PREFIX}{key}.{option}": text for option in _PUBLISH if (text := port.text(option))}
            port.close()
    settings.close(hint_of=_x_skep_hint)
    return made


def _http(settings: MappingReader) -> dict[str, str]:
    """Return the labels of the routes below ``http``: a host, a list of hosts, or a mapping.

    A mapping has the key ``host``, options, and further routes by name, each a host, a list or a mapping.  Errors are
    reported at the place of the key in the file.
    """
    node = settings.node("http")
    if node is None:
        return {}
    before = len(settings.report.problems)
    if node.entries is None:
        made = {HTTP: ",".join(settings.texts("http"))}
    else:
        reader = MappingReader(node, settings.at("http"), settings.report)
        made = dict(_route_labels(reader, HTTP))
        for name, entry in reader.names().items():
            if name in (_ROUTE_HOST, *OPTIONS, *HEADER_OPTIONS):
                continue
            if entry.entries is None:
                made[f"{HTTP}.{name}"] = ",".join(reader.texts(name))
                continue
            named = MappingReader(entry, reader.at(name), settings.report)
            made |= dict(_route_labels(named, f"{HTTP}.{name}"))
            named.close()
    if len(settings.report.problems) == before:
        try:
            parsed_routes(made)
        except InvalidArgument as error:
            settings.problem("http", str(error))
    return made


def _with_secrets_of_file(labels: Mapping[str, str], known: Mapping[str, StackFile]) -> dict[str, str]:
    """Return labels of routes whose certificates are in secrets of the file, with the full names of these secrets."""
    for name in tls_secrets(labels) & known.keys():
        labels = with_tls_secret(labels, [name], known[name].name)
    return dict(labels)


def _route_labels(reader: MappingReader, prefix: str) -> Iterator[tuple[str, str]]:
    if _ROUTE_HOST in reader:
        yield prefix, ",".join(reader.texts(_ROUTE_HOST))
    for option in OPTIONS:
        if option in reader:
            yield f"{prefix}.{option}", reader.text(option)
    for direction in HEADER_OPTIONS:
        for name, value in reader.labels(direction).items():
            yield f"{prefix}.{direction}.{name}", value


def _x_skep_hint(key: str) -> str | None:
    """Return a hint for a key below ``x-skep`` that means a label by another word."""
    label = suggested_label(f"{LABEL_PREFIX}{key}", SERVICE_LABELS)
    return f": did you mean {label.removeprefix(LABEL_PREFIX)}?" if label else None


def _cron(settings: MappingReader, mode: str, others: Mapping[str, str]) -> dict[str, str]:
    """Return the labels of a schedule: ``cron`` is an expression, a list of them, or a mapping with more settings.

    ``others``: labels that conflict with a schedule.
    """
    node = settings.node("cron")
    if node is None:
        return {}
    if node.entries is None:
        made = {CRON: "; ".join(settings.texts("cron"))}
    else:
        cron = MappingReader(node, settings.at("cron"), settings.report)
        texts = {
            label: cron.text(label.removeprefix(f"{CRON}.")) for label in SCHEDULE_LABELS if label != CRON
        }
        made = {CRON: "; ".join(cron.texts("schedule"))} | {label: one for label, one in texts.items() if one}
        cron.close()
    try:
        check_schedule({**others, **made}, mode)
    except InvalidArgument as error:
        settings.problem("cron", str(error))
    return made

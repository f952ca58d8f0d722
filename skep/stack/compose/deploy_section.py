"""Conversion of the keys below ``deploy``, and of a service's older keys with the same meaning."""

from typing import Any, Final

from skep.model.service import (
    DiscreteResource,
    GenericResource,
    GlobalJob,
    GlobalService,
    Limits,
    Placement,
    PlacementPreference,
    Platform,
    ReplicatedJob,
    ReplicatedService,
    ResourceRequirements,
    Resources,
    RestartCondition,
    RestartPolicy,
    ServiceMode,
    SpreadOver,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
)
from skep.stack.compose.reading import MappingReader

_MODES: Final = ("replicated", "global", "replicated-job", "global-job")


def mode_name(deploy: MappingReader) -> str:
    return deploy.choice("mode", *_MODES) or "replicated"


def mode_of(
    name: str, service: MappingReader, deploy: MappingReader, *, leaves_number: bool = False
) -> ServiceMode:
    """Return the service's mode.  ``leaves_number``: leave the number of replicas unset if the file does not set it."""
    replicas, scale = deploy.integer("replicas", 0, 100_000), service.integer("scale", 0, 100_000)
    if replicas is not None and scale is not None and replicas != scale:
        service.problem("scale", f"deploy.replicas says {replicas}")
    replicas = scale if replicas is None else replicas
    if replicas is not None and name.startswith("global"):
        deploy.problem("replicas", "replicas can only be used with replicated or replicated-job mode")
    match name:
        case "global":
            return ServiceMode(global_=GlobalService())
        case "global-job":
            return ServiceMode(global_job=GlobalJob())
        case "replicated-job":
            count = 1 if replicas is None else replicas
            return ServiceMode(replicated_job=ReplicatedJob(max_concurrent=count, total_completions=count))
        case _:
            if replicas is None and not leaves_number:
                replicas = 1
            return ServiceMode(replicated=ReplicatedService(replicas=replicas))


def update_of(deploy: MappingReader, key: str, is_job: bool) -> UpdateConfig | None:
    config = deploy.reader(key)
    if config is None:
        return None
    if is_job:
        deploy.problem(key, "a job has no updates: its tasks end")
    parallelism, ratio = config.integer("parallelism"), config.number("max_failure_ratio")
    actions = ("pause", "continue", "rollback") if key == "update_config" else ("pause", "continue")
    action = config.choice("failure_action", *actions)
    order = config.choice("order", "stop-first", "start-first")
    made = UpdateConfig(
        parallelism=1 if parallelism is None else parallelism,
        delay=config.duration("delay") or 0,
        failure_action=UpdateFailureAction(action) if action else None,
        monitor=config.duration("monitor") or 0,
        max_failure_ratio=ratio or 0.0,
        order=UpdateOrder(order) if order else None,
    )
    config.close()
    return made


def restart_of(service: MappingReader, deploy: MappingReader) -> RestartPolicy | None:
    policy, word = deploy.reader("restart_policy"), service.text("restart")
    name, _, count = word.partition(":")
    if word and (
        name not in ("no", "false", "always", "unless-stopped", "on-failure")
        or (count and not (count.isascii() and count.isdigit()))
    ):
        service.problem(
            "restart", f"{word!r} is unknown: expected no, always, unless-stopped, on-failure or on-failure:N"
        )
        return None
    if policy is not None:
        condition = policy.choice("condition", "none", "on-failure", "any")
        made = RestartPolicy(
            condition=RestartCondition(condition) if condition else None,
            delay=policy.duration("delay"),
            max_attempts=policy.integer("max_attempts"),
            window=policy.duration("window"),
        )
        policy.close()
        return made
    match name:
        case "":
            return None
        case "no" | "false":
            return RestartPolicy(condition=RestartCondition.NONE)
        case "on-failure":
            return RestartPolicy(
                condition=RestartCondition.ON_FAILURE, max_attempts=int(count) if count else None
            )
        case _:
            return RestartPolicy(condition=RestartCondition.ANY)


def placement_of(service: MappingReader, deploy: MappingReader) -> Placement | None:
    made: dict[str, Any] = {}
    placement = deploy.reader("placement")
    if placement is not None:
        preferences = []
        for node, path in placement.each("preferences"):
            one = MappingReader(node, path, service.report)
            preferences.append(PlacementPreference(spread=SpreadOver(spread_descriptor=one.text("spread"))))
            one.close()
        made = {
            "constraints": placement.texts("constraints"),
            "preferences": tuple(preferences),
            "max_replicas": placement.integer("max_replicas_per_node") or 0,
        }
        placement.close()
    if platform := service.text("platform"):
        system, _, architecture = platform.partition("/")
        made["platforms"] = (Platform(os=system, architecture=architecture),)
    return Placement(**made) if made else None


def resources_of(service: MappingReader, deploy: MappingReader) -> ResourceRequirements | None:
    resources = deploy.reader("resources")
    limits = resources.reader("limits") if resources is not None else None
    reserved = resources.reader("reservations") if resources is not None else None
    made_limits = Limits(
        nano_cpus=_first(_nano_cpus(limits, "cpus"), _nano_cpus(service, "cpus"), _quota(service)),
        memory_bytes=_first(limits.size("memory") if limits is not None else None, service.size("mem_limit")),
        pids=_first(
            limits.integer("pids", -1) if limits is not None else None, service.integer("pids_limit", -1)
        ),
    )
    made_reserved = Resources(
        nano_cpus=_first(_nano_cpus(reserved, "cpus")),
        memory_bytes=_first(
            reserved.size("memory") if reserved is not None else None, service.size("mem_reservation")
        ),
        generic_resources=_generic(reserved),
    )
    for part in (limits, reserved):
        if part is not None:
            part.skip("devices")
            part.close()
    if resources is not None:
        resources.close()
    made = ResourceRequirements(
        limits=made_limits if made_limits != Limits() else None,
        reservations=made_reserved if made_reserved != Resources() else None,
    )
    return made if made != ResourceRequirements() else None


def _first(*given: int | None) -> int:
    """Return the first value that is set, or 0.  A value of 0 (unlimited) counts as set."""
    return next((one for one in given if one is not None), 0)


def _nano_cpus(reader: MappingReader | None, key: str) -> int | None:
    number = reader.number(key) if reader is not None else None
    return None if number is None else round(number * 1e9)


def _quota(service: MappingReader) -> int:
    """Return nano-CPUs for ``cpu_quota`` in each ``cpu_period``, both in microseconds."""
    quota, period = service.integer("cpu_quota", -1), service.integer("cpu_period")
    if period and quota is None:
        service.warn("cpu_period", "without cpu_quota it changes nothing")
    return round(quota / (period or 100_000) * 1e9) if quota is not None and quota > 0 else 0


def _generic(reserved: MappingReader | None) -> tuple[GenericResource, ...]:
    if reserved is None:
        return ()
    made: list[GenericResource] = []
    for node, path in reserved.each("generic_resources"):
        one = MappingReader(node, path, reserved.report)
        discrete = one.reader("discrete_resource_spec")
        if discrete is None:
            one.problem("discrete_resource_spec", "it is missing: expected kind and value")
            continue
        kind, value = discrete.text("kind"), discrete.integer("value")
        made.append(GenericResource(discrete_resource_spec=DiscreteResource(kind=kind, value=value or 0)))
        discrete.close()
        one.close()
    return tuple(made)

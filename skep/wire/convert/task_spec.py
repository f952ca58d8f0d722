"""Task specs: the desired tasks of a service."""

from google.protobuf.message import DecodeError

from skep.errors import InvalidArgument
from skep.model.service import (
    NetworkAttachmentSpec,
    PluginPrivilege,
    PluginSpec,
    RestartCondition,
    RestartPolicy,
    TaskSpec,
)
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.container import container_from_pb, container_to_pb
from skep.wire.convert.network import attachment_config_from_pb, attachment_config_to_pb
from skep.wire.convert.resources import (
    placement_from_pb,
    placement_to_pb,
    requirements_from_pb,
    requirements_to_pb,
)
from skep.wire.convert.values import (
    EnumTable,
    driver_from_pb,
    driver_to_pb,
    duration_from_pb,
    duration_to_pb,
)

RESTART_CONDITIONS = EnumTable("restart condition", {"none": 0, "on-failure": 1, "any": 2})

_PLUGIN_KIND = "plugin"
_PLUGIN_TYPE_URL = "types.docker.com/RuntimePlugin"


def task_spec_to_pb(spec: TaskSpec) -> pb.TaskSpec:
    """Convert a spec.  Raises InvalidArgument if SwarmKit has no equivalent for a part of it."""
    message = pb.TaskSpec(
        networks=[attachment_config_to_pb(network) for network in spec.networks],
        force_update=spec.force_update,
    )
    if spec.container_spec is not None:
        message.container.CopyFrom(container_to_pb(spec.container_spec))
    elif spec.network_attachment_spec is not None:
        message.attachment.SetInParent()
        message.attachment.container_id = spec.network_attachment_spec.container_id
    elif spec.plugin_spec is not None:
        message.generic.kind = _PLUGIN_KIND
        message.generic.payload.type_url = _PLUGIN_TYPE_URL
        message.generic.payload.value = _plugin_to_pb(spec.plugin_spec).SerializeToString()
    if spec.resources is not None:
        message.resources.CopyFrom(requirements_to_pb(spec.resources))
        if spec.resources.limits is not None and spec.resources.limits.pids:
            message.container.pidsLimit = spec.resources.limits.pids
    if spec.restart_policy is not None:
        message.restart.CopyFrom(_restart_to_pb(spec.restart_policy))
    if spec.placement is not None:
        message.placement.CopyFrom(placement_to_pb(spec.placement))
    if spec.log_driver is not None:
        message.log_driver.CopyFrom(driver_to_pb(spec.log_driver))
    return message


def task_spec_from_pb(message: pb.TaskSpec) -> TaskSpec:
    """Convert a message.  Raises InvalidArgument for an unknown runtime or undefined numbers."""
    runtime = message.WhichOneof("runtime")
    pids = message.container.pidsLimit if runtime == "container" else 0
    return TaskSpec(
        plugin_spec=_plugin_from_pb(message.generic) if runtime == "generic" else None,
        container_spec=container_from_pb(message.container) if runtime == "container" else None,
        network_attachment_spec=(
            NetworkAttachmentSpec(container_id=message.attachment.container_id)
            if runtime == "attachment"
            else None
        ),
        resources=(
            requirements_from_pb(message.resources, pids) if message.HasField("resources") or pids else None
        ),
        restart_policy=_restart_from_pb(message.restart) if message.HasField("restart") else None,
        placement=placement_from_pb(message.placement) if message.HasField("placement") else None,
        force_update=message.force_update,
        runtime={"container": "container", "attachment": "attachment", "generic": "plugin"}.get(
            runtime or "", ""
        ),
        networks=tuple(attachment_config_from_pb(network) for network in message.networks),
        log_driver=driver_from_pb(message.log_driver) if message.HasField("log_driver") else None,
    )


def _restart_to_pb(policy: RestartPolicy) -> pb.RestartPolicy:
    condition = policy.condition or RestartCondition.ANY  # Docker's default
    message = pb.RestartPolicy(
        condition=pb.RestartPolicy.RestartCondition.ValueType(RESTART_CONDITIONS.number(condition.value)),
        max_attempts=policy.max_attempts or 0,
    )
    if policy.delay is not None:
        message.delay.CopyFrom(duration_to_pb(policy.delay))
    if policy.window is not None:
        message.window.CopyFrom(duration_to_pb(policy.window))
    return message


def _restart_from_pb(message: pb.RestartPolicy) -> RestartPolicy:
    return RestartPolicy(
        condition=RestartCondition(RESTART_CONDITIONS.word(message.condition)),
        delay=duration_from_pb(message.delay) if message.HasField("delay") else None,
        max_attempts=message.max_attempts,
        window=duration_from_pb(message.window) if message.HasField("window") else None,
    )


def _plugin_to_pb(plugin: PluginSpec) -> pb.PluginSpec:
    return pb.PluginSpec(
        name=plugin.name,
        remote=plugin.remote,
        privileges=[
            pb.PluginSpec.Privilege(
                name=privilege.name, description=privilege.description, value=privilege.value
            )
            for privilege in plugin.privileges
        ],
        disabled=plugin.disabled,
        env=plugin.env,
    )


def _plugin_from_pb(message: pb.GenericRuntimeSpec) -> PluginSpec:
    if message.kind != _PLUGIN_KIND:
        raise InvalidArgument(f"unknown runtime {message.kind!r}")
    try:
        plugin = pb.PluginSpec.FromString(message.payload.value)
    except DecodeError as error:
        raise InvalidArgument("the plugin's spec cannot be decoded") from error
    return PluginSpec(
        name=plugin.name,
        remote=plugin.remote,
        privileges=tuple(
            PluginPrivilege(
                name=privilege.name, description=privilege.description, value=tuple(privilege.value)
            )
            for privilege in plugin.privileges
        ),
        disabled=plugin.disabled,
        env=tuple(plugin.env),
    )

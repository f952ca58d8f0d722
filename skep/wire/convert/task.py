"""Tasks and their statuses."""

from skep.errors import InvalidArgument
from skep.model.networks.addresses import PORT_MAX
from skep.model.service import EndpointVirtualIP
from skep.model.task import (
    AssignedTask,
    ContainerStatus,
    PortStatus,
    Task,
    TaskState,
    TaskStatus,
    VolumeAttachment,
)
from skep.model.task_end import LAST_LINES_MAX, KeptLine, TaskEnd
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.model.values.times import ZERO_TIME, timestamp, unix_ns
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.network import attachment_from_pb, attachment_to_pb, port_from_pb, port_to_pb
from skep.wire.convert.resources import generic_from_pb, generic_to_pb
from skep.wire.convert.task_spec import task_spec_from_pb, task_spec_to_pb
from skep.wire.convert.values import (
    meta_to_pb,
    stamp_of,
    timestamp_from_pb,
    timestamp_to_pb,
    version_from_pb,
    version_to_pb,
)

_TEXT_CHARACTERS_MAX = 4096
"""Longest text that is read from a node, because nodes are not trusted."""
_PORTS_MAX = 1024
"""Largest number of ports that are read from a task's status."""
_NS_MAX = 2**63 - 1
"""The largest time that the store's format can hold."""


def task_to_pb(assigned: AssignedTask, registry_auth: str = "") -> pb.Task:
    """Convert a task.

    Args:
        registry_auth: Credentials for pulling the image (base64 of JSON), which no stored object holds.

    Raises:
        InvalidArgument: SwarmKit has no equivalent for a part of the task.
    """
    task = assigned.task
    message = pb.Task(
        id=task.id,
        meta=meta_to_pb(task.version, task.created_at, task.updated_at),
        spec=task_spec_to_pb(task.spec),
        service_id=task.service_id,
        slot=task.slot,
        node_id=task.node_id,
        annotations=pb.Annotations(labels=task.labels),
        service_annotations=pb.Annotations(name=assigned.service_name, labels=assigned.service_labels),
        status=status_to_pb(task.status),
        desired_state=_state_to_pb(task.desired_state),
        networks=_networks_to_pb(task),
        assigned_generic_resources=[generic_to_pb(generic) for generic in task.generic_resources],
        volumes=[
            pb.VolumeAttachment(id=volume.id, source=volume.source, target=volume.target)
            for volume in task.volumes
        ],
    )
    if assigned.ports:
        message.endpoint.ports.extend(port_to_pb(port) for port in assigned.ports)
    for virtual_ip in assigned.virtual_ips:
        message.endpoint.virtual_ips.add(network_id=virtual_ip.network_id, addr=virtual_ip.addr)
    if task.spec_version is not None:
        message.spec_version.CopyFrom(version_to_pb(task.spec_version))
    if task.job_iteration is not None:
        message.job_iteration.CopyFrom(version_to_pb(task.job_iteration))
    if registry_auth and message.spec.HasField("container"):
        message.spec.container.pull_options.registry_auth = registry_auth
    return message


def _networks_to_pb(task: Task) -> list[pb.NetworkAttachment]:
    """Return the task's attachments, each with the driver options that its spec has for that network."""
    options = {network.target: network.driver_opts for network in task.spec.networks}
    messages = [attachment_to_pb(attachment) for attachment in task.networks_attachments]
    for message in messages:
        message.driver_attachment_opts.update(options.get(message.network.id, {}))
    return messages


def task_from_pb(message: pb.Task) -> AssignedTask:
    """Convert a message.  Raises InvalidArgument for undefined numbers."""
    task = Task(
        id=TaskId(message.id),
        version=version_from_pb(message.meta.version),
        created_at=stamp_of(message.meta, "created_at"),
        updated_at=stamp_of(message.meta, "updated_at"),
        labels=dict(message.annotations.labels),
        spec=task_spec_from_pb(message.spec),
        service_id=ServiceId(message.service_id),
        slot=message.slot,
        node_id=NodeId(message.node_id),
        status=status_from_pb(message.status),
        desired_state=_state_from_pb(message.desired_state),
        networks_attachments=tuple(attachment_from_pb(network) for network in message.networks),
        generic_resources=tuple(generic_from_pb(generic) for generic in message.assigned_generic_resources),
        job_iteration=version_from_pb(message.job_iteration) if message.HasField("job_iteration") else None,
        volumes=tuple(
            VolumeAttachment(id=volume.id, source=volume.source, target=volume.target)
            for volume in message.volumes
        ),
        spec_version=version_from_pb(message.spec_version) if message.HasField("spec_version") else None,
    )
    return AssignedTask(
        task=task,
        service_name=message.service_annotations.name,
        service_labels=dict(message.service_annotations.labels),
        ports=tuple(port_from_pb(port) for port in message.endpoint.ports),
        virtual_ips=tuple(
            EndpointVirtualIP(network_id=NetworkId(one.network_id), addr=one.addr)
            for one in message.endpoint.virtual_ips
        ),
    )


def registry_auth_of(message: pb.Task) -> str:
    """Return the credentials for pulling the task's image, or an empty string."""
    return message.spec.container.pull_options.registry_auth


def status_to_pb(status: TaskStatus) -> pb.TaskStatus:
    """Encode a status with the container's id and exit code and the open host-mode ports."""
    message = pb.TaskStatus(
        timestamp=timestamp_to_pb(status.timestamp),
        state=_state_to_pb(status.state),
        message=status.message,
        err=status.err,
    )
    if (container := status.container_status) is not None:
        message.container.CopyFrom(
            pb.ContainerStatus(
                container_id=container.container_id, pid=container.pid, exit_code=container.exit_code
            )
        )
    if status.port_status.ports:
        message.port_status.ports.extend(port_to_pb(port) for port in status.port_status.ports)
    return message


def status_from_pb(message: pb.TaskStatus) -> TaskStatus:
    """Convert a task's status as reported by its node.  Texts are cut, because the store keeps them for every task.

    Impossible ports are left out, so that they reach no reader of addresses, and do not stop the node's other reports.

    Raises:
        InvalidArgument: A number is undefined.
    """
    container = message.container
    return TaskStatus(
        timestamp=timestamp_from_pb(message.timestamp) if message.HasField("timestamp") else ZERO_TIME,
        state=_state_from_pb(message.state),
        message=message.message[:_TEXT_CHARACTERS_MAX],
        err=message.err[:_TEXT_CHARACTERS_MAX],
        container_status=(
            ContainerStatus(
                container_id=container.container_id[:_TEXT_CHARACTERS_MAX],
                pid=container.pid,
                exit_code=container.exit_code,
            )
            if message.HasField("container")
            else None
        ),
        port_status=PortStatus(
            ports=tuple(
                port_from_pb(port)
                for port in message.port_status.ports[:_PORTS_MAX]
                if max(port.target_port, port.published_port) <= PORT_MAX
            )
        ),
    )


def end_to_pb(end: TaskEnd) -> skep.TaskEnd:
    """Encode the reason why a task ended, for which SwarmKit has no message."""
    return skep.TaskEnd(
        cause=end.cause,
        signal=end.signal,
        grace=end.grace,
        health_output=end.health_output,
        health_command=end.health_command,
        health_failures=max(end.health_failures, 0),
        health_exit_code=end.health_exit_code,
        lines=[
            skep.TaskEnd.Line(
                timestamp=max(unix_ns(line.timestamp), 0),
                stream=pb.LOG_STREAM_STDERR if line.stream == "stderr" else pb.LOG_STREAM_STDOUT,
                text=line.text,
            )
            for line in end.lines
        ],
    )


def end_from_pb(message: skep.TaskEnd) -> TaskEnd:
    """Decode the reason without limiting its size (see ``bounded_end``).  An unknown stream counts as stdout."""
    return TaskEnd(
        cause=message.cause,
        signal=message.signal,
        grace=message.grace,
        health_output=message.health_output,
        health_command=message.health_command,
        health_failures=message.health_failures,
        health_exit_code=message.health_exit_code if message.HasField("health_exit_code") else None,
        lines=tuple(
            KeptLine(
                timestamp=timestamp(min(max(line.timestamp, 0), _NS_MAX)),
                stream="stderr" if line.stream == pb.LOG_STREAM_STDERR else "stdout",
                text=line.text,
            )
            for line in message.lines[-LAST_LINES_MAX:]
        ),
    )


def _state_to_pb(state: TaskState) -> pb.TaskState.ValueType:
    return pb.TaskState.ValueType(state.number)


def _state_from_pb(number: int) -> TaskState:
    try:
        return TaskState.from_number(number)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error

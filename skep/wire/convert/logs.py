"""Log subscriptions and log lines."""

from skep.model.logs import LogLine, LogQuery, LogStream
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import SECOND_NS
from skep.wire import swarm_pb2 as pb
from skep.wire.descriptors import Timestamp


def query_to_pb(query: LogQuery) -> tuple[pb.LogSelector, pb.LogSubscriptionOptions]:
    """Return SwarmKit's selector and options.  Their ``tail`` has another meaning, see ``_tail_to_pb``."""
    selector = pb.LogSelector(service_ids=query.services, node_ids=query.nodes, task_ids=query.tasks)
    options = pb.LogSubscriptionOptions(
        streams=[pb.LogStream.ValueType(stream.value) for stream in query.streams],
        follow=query.follow,
        tail=_tail_to_pb(query.tail),
    )
    if query.since_ns:
        seconds, nanos = divmod(query.since_ns, SECOND_NS)
        options.since.CopyFrom(Timestamp(seconds=seconds, nanos=nanos))
    return selector, options


def query_from_pb(message: pb.SubscriptionMessage) -> LogQuery:
    """Convert a query.  Unknown streams are ignored."""
    selector, options = message.selector, message.options
    known = {stream.value: stream for stream in LogStream}
    return LogQuery(
        services=tuple(ServiceId(id) for id in selector.service_ids),
        tasks=tuple(TaskId(id) for id in selector.task_ids),
        nodes=tuple(NodeId(id) for id in selector.node_ids),
        follow=options.follow,
        tail=_tail_from_pb(options.tail),
        since_ns=(
            options.since.seconds * SECOND_NS + options.since.nanos if options.HasField("since") else 0
        ),
        streams=tuple(known[number] for number in options.streams if number in known),
    )


def line_to_pb(line: LogLine) -> pb.LogMessage:
    """Convert a line.  Attributes are sorted by key, so equal lines have equal bytes."""
    seconds, nanos = divmod(line.timestamp_ns, SECOND_NS)
    return pb.LogMessage(
        context=pb.LogContext(service_id=line.service_id, node_id=line.node_id, task_id=line.task_id),
        timestamp=Timestamp(seconds=seconds, nanos=nanos),
        stream=pb.LogStream.ValueType(line.stream.value),
        data=line.data,
        attrs=[pb.LogAttr(key=key, value=value) for key, value in sorted(line.attrs.items())],
    )


def line_from_pb(message: pb.LogMessage) -> LogLine:
    """Convert a line.  An unknown stream counts as standard output."""
    context = message.context
    is_stderr = message.stream == LogStream.STDERR.value
    return LogLine(
        task_id=TaskId(context.task_id),
        service_id=ServiceId(context.service_id),
        node_id=NodeId(context.node_id),
        stream=LogStream.STDERR if is_stderr else LogStream.STDOUT,
        timestamp_ns=message.timestamp.seconds * SECOND_NS + message.timestamp.nanos,
        data=message.data,
        attrs={attr.key: attr.value for attr in message.attrs},
    )


def _tail_to_pb(tail: int | None) -> int:
    # Not Docker's numbers: 0 means everything, -1 nothing, -(n+1) the last n lines
    # (swarmkit, api/logbroker.proto, LogSubscriptionOptions).
    return 0 if tail is None else -(tail + 1)


def _tail_from_pb(tail: int) -> int | None:
    # Positive numbers count lines from the start in SwarmKit's comments; no client sends them.
    return None if tail >= 0 else -tail - 1

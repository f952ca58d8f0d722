"""Targets and their deliveries as the API, warnings and metrics show them, without credentials.  Pure."""

from collections.abc import Iterator
from typing import Literal

from skep.api.telemetry.exposition import MetricFamily, Sample, label_text
from skep.manager.notify.addresses import parsed_address
from skep.manager.notify.records import Delivery, Target, backup_in, delivery_in, targets_in
from skep.model.options.notifications import TargetState, Topic
from skep.model.values.times import Timestamp, minute, timestamp
from skep.store.interface import View


def state_of_target(target: Target, delivery: Delivery | None) -> TargetState:
    """Return a target as it is shown."""
    address, known = parsed_address(target.url), delivery or Delivery(target_id=target.id)
    return TargetState(
        name=target.name,
        kind=address.kind.value,
        to=address.shown,
        on=target.topics or tuple(Topic),
        stacks=target.stacks,
        allow_internal=target.allows_internal,
        has_secret=bool(target.secret),
        sent=known.sent,
        failed=known.failed,
        dropped=known.dropped,
        waiting=known.outstanding,
        last_sent_at=_time(known.sent_ns),
        failing_since=_time(known.failing_since_ns),
        next_attempt_at=_time(known.retry_at_ns),
        error=known.error,
    )


def _time(at_ns: int) -> Timestamp:
    return timestamp(at_ns) if at_ns else Timestamp("")


def delivery_warnings(view: View) -> Iterator[str]:
    """Yield a warning for each target that does not accept its messages."""
    for target in targets_in(view):
        delivery = delivery_in(view, target)
        if delivery is not None and delivery.error:
            since = minute(timestamp(delivery.failing_since_ns))
            yield f"WARNING: notifications to {target.name} fail since {since}: {delivery.error} (skep notify ls)"


def backup_warnings(view: View) -> Iterator[str]:
    """Yield a warning if the last backup failed."""
    last = backup_in(view)
    if last.failed_ns > last.complete_ns:
        yield f"WARNING: the backup at {minute(timestamp(last.failed_ns))} failed: {last.error} (skep backup)"


def delivery_families(view: View) -> list[MetricFamily]:
    """Return the metrics of deliveries, which the leader counts in the store."""
    known = [
        (label_text({"target": one.name}), delivery_in(view, one) or Delivery(target_id=one.id))
        for one in targets_in(view)
    ]

    def family(name: str, kind: Literal["counter", "gauge"], text: str, field: str) -> MetricFamily:
        return MetricFamily(name, kind, text, [Sample(labels, getattr(one, field)) for labels, one in known])

    return [
        family("skep_notify_sent_total", "counter", "Messages that the target accepted.", "sent"),
        family("skep_notify_failures_total", "counter", "Attempts that failed.", "failed"),
        family(
            "skep_notify_dropped_total", "counter", "Notices that were given up or had no space.", "dropped"
        ),
        family("skep_notify_waiting", "gauge", "Notices that are not delivered yet.", "outstanding"),
    ]

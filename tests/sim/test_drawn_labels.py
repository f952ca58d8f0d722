"""Which of Skep's labels the lives draw: a label that decides something in a manager meets all others there."""

from random import Random

from sim.users.random_specs import NAMES, Dependencies, a_spec
from skep.model.permissions.field_rights import SERVICE_LABELS

NOT_DRAWN = {
    "on requests to a service that runs": ("skep.stopped", "skep.cron.suspend"),
    "nodes apply them, and managers pass them on": (
        "skep.drain",
        "skep.last-lines",
        "skep.near",
        "skep.publish-not-ready",
        "skep.publish",
    ),
    "the front door, whose lives are those of a service with a route": ("skep.door", "skep.http"),
    "requests over the front door and containers' usage are not simulated": (
        "skep.autoscale.cpu",
        "skep.autoscale.memory",
        "skep.autoscale.requests",
        "skep.autoscale.rps",
        "skep.update.max-errors",
        "skep.update.max-latency",
    ),
    "another way to get the number that other labels of a queue give": (
        "skep.autoscale.queue-field",
        "skep.autoscale.queue.exec",
        "skep.autoscale.queue.exec-in",
    ),
    "another bound of the value that skep.update.query-max bounds": (
        "skep.update.query-min",
        "skep.update.query-wait",
    ),
    "every minute of a schedule is the same in all zones": (
        "skep.autoscale.time-zone",
        "skep.cron.time-zone",
    ),
    "each step would wait for a person": ("skep.update.promote",),
    "the former name of a label": ("skep.volumes",),
}


def is_below(label: str, name: str) -> bool:
    return label == name or label.startswith((f"{name}.", f"{name}["))


def test_every_label_of_a_service_is_drawn_or_has_a_reason_not_to_be() -> None:
    known = Dependencies(networks=("net",), services=tuple(NAMES), volumes=("volume",))
    drawn = {
        label
        for seed in range(3000)
        for label in a_spec(NAMES[seed % len(NAMES)], Random(seed), known, Random(-seed)).labels
    }
    missing = set(SERVICE_LABELS) - drawn
    reasons = [name for names in NOT_DRAWN.values() for name in names]
    assert [label for label in sorted(missing) if not any(is_below(label, name) for name in reasons)] == []
    assert [name for name in reasons if not any(is_below(label, name) for label in missing)] == []

"""Suggests a known label in place of an unknown ``skep.`` label."""

import re
from collections.abc import Iterable
from typing import Final

from skep.model.options.affinity import AFFINITY, ANTI_AFFINITY, MAX_SKEW
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.labels import (
    DRAIN,
    DRAIN_NOW,
    FORMER_VOLUMES,
    IGNORE_PATHS,
    JOB_TTL,
    LAST_LINES,
    MIN_AVAILABLE,
    NEAR,
    ON_DISCONNECT,
    PRIORITY,
    PROGRESS_DEADLINE,
    PUBLISH_NOT_READY,
    RESERVE_CPUS,
    RESERVE_MEMORY,
    STOPPED,
    VOLUME_AFFINITY,
)
from skep.model.options.schedules import (
    CRON,
    CRON_CONCURRENCY,
    CRON_DEADLINE,
    CRON_MAX_ATTEMPTS,
    CRON_SUSPEND,
    CRON_TIME_ZONE,
)
from skep.model.options.slot_volumes import FORGOTTEN_LABEL
from skep.model.staging.updates import UPDATE

PREFIX: Final = "skep."
NODE_LABELS: Final = (RESERVE_CPUS, RESERVE_MEMORY, DRAIN_NOW, IGNORE_PATHS, FORGOTTEN_LABEL)
"""Labels that have an effect on nodes."""
_SIMILARITY_MIN: Final = 0.7
"""Least similarity of a misspelled label, without the common prefix.  With 0.6, ``device`` would mean ``drain``."""
_SAME_MEANING: Final = {
    CRON: ("schedule", "crontab", "cronjob", "periodic", "interval", "every"),
    CRON_TIME_ZONE: ("tz", "zone", "timezone", "time-zone", "cron.tz", "cron.zone"),
    CRON_CONCURRENCY: ("concurrency", "concurrency-policy", "cron.policy", "overlap", "cron.overlap"),
    CRON_DEADLINE: ("starting-deadline", "cron.starting-deadline"),
    CRON_SUSPEND: ("suspend", "pause", "cron.pause", "cron.paused", "cron.enabled"),
    CRON_MAX_ATTEMPTS: ("backoff-limit", "retries", "max-retries", "max-attempts", "cron.retries"),
    JOB_TTL: ("ttl", "cron.ttl", "cron.history", "ttl-after-finished"),
    AUTOSCALE: ("scale", "scaling", "replicas", "hpa", "min", "max", "min-replicas", "max-replicas"),
    DEPENDS_ON: ("after", "requires", "needs", "wait-for", "start-after"),
    DRAIN: ("grace-period", "drain-timeout", "shutdown-delay", "deregistration-delay"),
    LAST_LINES: ("tail", "logs", "log-lines"),
    MIN_AVAILABLE: ("pdb", "disruption-budget", "budget", "max-unavailable", "minimum-available"),
    ON_DISCONNECT: ("on-partition", "on-node-down", "partition"),
    PRIORITY: ("priority-class", "weight"),
    PROGRESS_DEADLINE: ("timeout", "update-timeout", "deploy-timeout", "update-deadline"),
    NEAR: ("prefer-near", "topology-aware", "prefer-site", "prefer-zone", "locality"),
    PUBLISH_NOT_READY: ("publish-not-ready-addresses", "not-ready"),
    STOPPED: ("stop", "disabled", "paused"),
    UPDATE: ("canary", "strategy", "update-strategy", "rollout", "deployment"),
    VOLUME_AFFINITY: ("sticky-volumes", "data-affinity"),
    AFFINITY: ("pod-affinity", "colocate", "machine-of"),
    ANTI_AFFINITY: ("apart", "pod-anti-affinity", "conflicts", "distinct-hosts"),
    MAX_SKEW: ("skew", "topology-spread", "topology-spread-constraints"),
    "skep.http": (
        "route",
        "host",
        "domain",
        "hostname",
        "virtual-host",
        "ingress",
        "expose",
        "traefik.enable",
    ),
    "skep.publish.affinity": ("client-affinity", "sticky", "sticky-sessions", "session-affinity"),
    "skep.publish.host-ip": ("host-ip", "bind", "listen"),
    "skep.publish.local": ("local", "external-traffic-policy"),
    "skep.publish.proxy-protocol": ("proxy-protocol", "send-proxy"),
}
"""Names for each label that other orchestrators use or that users guess, without the prefix."""
_MEANT: Final = {name: label.removeprefix(PREFIX) for label, names in _SAME_MEANING.items() for name in names}
_PORT: Final = re.compile(r"\[.*\]|\.(?:NAME|HEADER)$")
"""Placeholders in the name of a known label: ``skep.publish[.PORT[/PROTOCOL]].local``."""


def suggested_label(name: str, known: Iterable[str]) -> str | None:
    """Return the known label with the meaning of ``name``, else the label with the most similar spelling, else None.

    ``known`` are the labels that are valid at this place.  Former labels are never suggested.
    """
    rest = name.removeprefix(PREFIX).replace("_", "-").lower()
    labels = {_PORT.sub("", label).removeprefix(PREFIX) for label in known if label != FORMER_VOLUMES}
    if (meant := _MEANT.get(rest, "")) in labels:
        return PREFIX + meant
    from difflib import get_close_matches  # rarely needed, and 0.15 MB in every manager

    near = get_close_matches(rest, sorted(labels), n=1, cutoff=_SIMILARITY_MIN)
    return PREFIX + near[0] if near else None

"""All ``skep.*`` labels: settings that Docker's API does not have, and reports of nodes.

``docs/reference/label_table.py`` lists all of them.  The API refuses an invalid label.  An invalid label that is in the
store nevertheless counts as absent.
"""

import re
from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

import msgspec

from skep.errors import InvalidArgument
from skep.model.door.routes import parsed_routes
from skep.model.door.settings import parsed_settings
from skep.model.options.affinity import parsed_affinities
from skep.model.options.dependencies import parsed_dependencies
from skep.model.permissions.rights import ALLOW_LABEL, allowed_rights
from skep.model.task_end import LAST_LINES_MAX
from skep.model.values.times import SECOND_NS, duration_ns

E = TypeVar("E", bound=Enum)

HEARTBEAT_GRACE = "skep.heartbeat-grace"
"""On the cluster: how long a silent skep node counts as alive (``5s``).  Default: three heartbeat periods."""
GRACE_S_MAX = 3600.0
"""Longest grace that can be configured."""

FORGET_NODES = "skep.forget-nodes"
MAINTENANCE = "skep.maintenance"
"""On the cluster: how long a failed worker is kept before it is removed (``24h``).  Unset: forever."""
FORGET_S_MIN, FORGET_S_MAX = 60.0, 90 * 24 * 3600.0
"""Smallest and largest value of ``skep.forget-nodes``."""

ON_DISCONNECT = "skep.on-disconnect"
ON_DISCONNECT_DELAY = "skep.on-disconnect-delay"
PROGRESS_DEADLINE = "skep.progress-deadline"
"""On services: time that an update grants each new task until it runs, or until it has ended if it is a job's."""
DEFAULT_PROGRESS_S = 600.0
"""Default progress deadline in seconds, long enough to pull large images over slow links."""

MIN_AVAILABLE = "skep.min-available"
"""On replicated services: number (``2``) or percentage (``80%``) of the replicas that drains, updates and preemption
leave available."""
_PERCENT = "%"

JOB_TTL = "skep.job-ttl"
"""On jobs: how long a finished job is kept before it is removed with its tasks.  Unset: forever."""

STACK_REVISION = "skep.stack.revision"
STACK_STATE = "skep.stack.state"
STACK_CHANGES = "skep.stack.changes"
"""On configs that record a stack's revision: the changes that the revision made."""
DEPLOYING = "deploying"
"""State of a revision while its deploy is in progress."""
REPLACED = "replaced by revision "
"""Start of a revision's state when a newer deploy has overtaken it.  The newer revision's number follows."""
STACK_FILES = "skep.stack.files"
"""On containers: files of the stack's folder that they mount, with the digest of their content."""

ROTATION_OF = "skep.rotation.of"
"""On every version of a secret or config except the first: the name of the first."""

DRAIN = "skep.drain"
"""On services: how long a stopping task waits until no new connections arrive, and the same time again for its last
connections to end."""
DEFAULT_DRAIN_S = 1.0
"""Default drain time in seconds."""

LAST_LINES = "skep.last-lines"
"""On services and on the cluster: number of an ended task's last output lines that are kept."""
HISTORY = "skep.history"
"""On the cluster: number of history entries that are kept.  ``0`` keeps none."""
HISTORY_DEFAULT, HISTORY_MAX = 10_000, 100_000
"""Default and largest number of history entries."""
WORKER_READS = "skep.worker-reads"
"""On the cluster: ``true`` lets workers' APIs show its services, tasks, nodes, networks and events."""
PUBLISH_NOT_READY = "skep.publish-not-ready"
"""On services: ``true`` lets task names resolve before the tasks are healthy.  Virtual addresses and published ports
still lead to healthy tasks only.
"""

NEAR = "skep.near"
"""On services: with ``true``, a node's connections go to tasks at its own site while any of them serves."""
SITE_LABELS = ("site", "zone")
"""Labels of nodes that name their site.  The first with a value counts."""

STOPPED = "skep.stopped"
"""On services: ``true`` stops all tasks and keeps the spec with its number of replicas.  ``skep service stop`` sets it.
A rollback does not change it."""

VOLUME_AFFINITY = "skep.volume-affinity"
"""On services: whether a task returns to the node with the local volumes of its slot."""
FORMER_VOLUMES = "skep.volumes"
_FORMER_VALUES = {"return": "preferred", "keep": "required", "spread": "none"}
"""Values of the label's former name in specs of earlier versions.  If a spec has both labels, the present one wins."""

PRIORITY = "skep.priority"
"""On services: tasks of a higher priority are placed first if resources are short.  Default 0."""
PRIORITY_MAX = 1000
"""Largest priority.  The smallest is its negative."""
SHARE_IMAGES = "skep.share-images"
"""On the cluster: ``true`` lets every node read the images of every other node."""
PREEMPTION = "skep.preemption"
"""On the cluster: ``true`` stops tasks if a task of a higher priority cannot be placed."""
ALLOW_MACHINE_LOGS = "skep.allow-machine-logs"
"""On the cluster: ``true`` lets users below administrator send their tasks' logs to machines of the cluster."""
ALLOW_CREDENTIAL_HELPERS = "skep.allow-credential-helpers"
"""On the cluster: ``STACK=REPOSITORY,...`` lists the images that services of users below administrator may pull with
the nodes' credential helpers.
"""
_FORMER_ALLOW_HELPERS = "skep.allow-helpers"
"""The label in clusters of earlier versions.  If both exist, the present one wins."""

RELABEL = "skep.relabel"
"""On containers: mounts whose files SELinux labels on the node, ``TARGET=z`` or ``TARGET=Z``, separated by commas."""
EXEC = "skep.exec"
"""On containers: whether users below administrator may run commands in them and copy files (``ExecPolicy``)."""

DRAIN_NOW = "skep.drain-now"
"""On nodes: ``true`` lets a drain stop tasks before their replacements run, as in Docker.  Managers remove the label
when the node is no longer drained."""
ZONE = "skep.zone"
"""On nodes: the zone of a node without the label ``zone``, for ``skep survive``."""
RESERVE_CPUS = "skep.reserve.cpus"
RESERVE_MEMORY = "skep.reserve.memory"
"""On nodes: processors (``0.5``) and memory (``512MiB``) that tasks cannot reserve, because the system needs them."""
_MEMORY_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
IGNORE_PATHS = "skep.ignore-paths"
"""On nodes: ``true`` places tasks on overlay networks on the node even if other nodes do not reach it."""

LABEL_TASK_ID = "com.docker.swarm.task.id"
"""Docker's label of a task's container, by which the container is identified."""
LABEL_SERVICE_ID = "com.docker.swarm.service.id"
LABEL_SERVICE_NAME = "com.docker.swarm.service.name"
LABEL_NODE_ID = "com.docker.swarm.node.id"
"""Other labels of a task's container, as in Docker."""

DELAY_S_MAX = 365 * 24 * 3600.0
"""Longest delay that a label accepts.  More than a year is a mistake."""

DISCONNECT_LABELS = (ON_DISCONNECT, ON_DISCONNECT_DELAY)
_SENT = (*DISCONNECT_LABELS, DRAIN, LAST_LINES)


class OnDisconnect(Enum):
    """Treatment of a service's tasks on a node that has lost contact with all managers."""

    REPLACE = "replace"
    """Managers replace them after the delay.  If they still run when the node reconnects, they are removed."""
    KEEP = "keep"
    """They are not replaced as long as the node exists."""
    STOP = "stop"
    """The node itself stops them after the delay, and only then are they replaced."""


class VolumeAffinity(Enum):
    """Placement of a task whose slot has data in local volumes of a node."""

    PREFERRED = "preferred"
    """The task runs on that node if the node can run it, otherwise on another one."""
    REQUIRED = "required"
    """The task runs on that node only, as long as the node is part of the cluster."""
    NONE = "none"
    """The task runs on any node, as in Docker."""


class ExecPolicy(Enum):
    """Rights of users below administrator in a container."""

    ANY = "any"
    """Commands run as any user of the container. Files are copied in and out."""
    USER = "user"
    """Commands run as the container's user only. No files are copied in."""
    NONE = "none"
    """No commands run, no streams are attached and no files are copied."""


DEFAULT_STOP_DELAY_S = 30.0
"""Default delay of ``STOP``.  It is longer than managers take to restart or a node to connect to another manager, so
that neither stops tasks.
"""


class DisconnectPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A service's parsed ``on-disconnect`` labels.

    ``delay_s`` counts from the moment when the node is marked down (REPLACE) or from its last heartbeat (STOP).  KEEP
    has no delay.
    """

    action: OnDisconnect = OnDisconnect.REPLACE
    delay_s: float = 0.0


def disconnect_policy(labels: Mapping[str, str]) -> DisconnectPolicy:
    """Return the disconnect policy in the labels of a service."""
    try:
        return _disconnect_policy(labels)
    except InvalidArgument:
        return DisconnectPolicy()


def disconnect_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels of a service that determine its ``disconnect_policy``."""
    return {name: labels[name] for name in DISCONNECT_LABELS if name in labels}


def sent_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the service labels that nodes apply to running tasks, without replacing them."""
    return {name: labels[name] for name in _SENT if name in labels}


def progress_deadline_s(labels: Mapping[str, str]) -> float:
    """Return the progress deadline in the labels of a service, in seconds."""
    try:
        return _progress_deadline_s(labels)
    except InvalidArgument:
        return DEFAULT_PROGRESS_S


def job_ttl_s(labels: Mapping[str, str]) -> float | None:
    """Return the time to keep a finished job, from its labels, in seconds, or None if unset."""
    try:
        return _job_ttl_s(labels)
    except InvalidArgument:
        return None


def drain_s(labels: Mapping[str, str]) -> float:
    """Return the drain time in the labels of a service, in seconds."""
    try:
        return _drain_s(labels)
    except InvalidArgument:
        return DEFAULT_DRAIN_S


def min_available(labels: Mapping[str, str], replicas: int) -> int | None:
    """Return how many of a service's ``replicas`` its labels keep available, or None if unset.

    A percentage is rounded up, and a number larger than ``replicas`` means all of them.
    """
    try:
        value = _min_available(labels)
    except InvalidArgument:
        return None
    if value is None:
        return None
    number, is_percentage = value
    return min(-(-number * replicas // 100) if is_percentage else number, replicas)


def drains_now(node_labels: Mapping[str, str]) -> bool:
    """Return whether a drain of the node does not wait for replacements."""
    return node_labels.get(DRAIN_NOW, "").lower() == "true"


def heartbeat_grace_s(labels: Mapping[str, str]) -> float | None:
    """Return the heartbeat grace in the labels of the cluster, in seconds, or None if unset."""
    try:
        return _heartbeat_grace_s(labels)
    except InvalidArgument:
        return None


def forget_nodes_s(labels: Mapping[str, str]) -> float | None:
    """Return the time to keep failed workers, from the labels of the cluster, in seconds, or None if unset."""
    try:
        return _forget_nodes_s(labels)
    except InvalidArgument:
        return None


def system_reserve(node_labels: Mapping[str, str]) -> tuple[int, int]:
    """Return the nano CPUs and bytes of memory that tasks cannot reserve on the node."""
    try:
        return _reserved_nano_cpus(node_labels), _reserved_bytes(node_labels)
    except InvalidArgument:
        return 0, 0


def ignores_paths(node_labels: Mapping[str, str]) -> bool:
    """Return whether the node gets tasks on overlay networks even if other nodes do not reach it."""
    return node_labels.get(IGNORE_PATHS, "").lower() == "true"


def prefers_near(labels: Mapping[str, str]) -> bool:
    """Return whether a service prefers tasks at the site of the node that connects."""
    return labels.get(NEAR, "").lower() == "true"


def site_of(labels: Mapping[str, str]) -> str:
    """Return the site that the labels of a node name, or an empty text without one."""
    return next((labels[one] for one in SITE_LABELS if labels.get(one)), "")


def publishes_not_ready(labels: Mapping[str, str]) -> bool:
    """Return whether names of a service's tasks resolve before the tasks are healthy."""
    return labels.get(PUBLISH_NOT_READY, "").lower() == "true"


def is_stopped(labels: Mapping[str, str]) -> bool:
    """Return whether a service is stopped, by its labels."""
    return labels.get(STOPPED, "").lower() == "true"


def last_lines(labels: Mapping[str, str]) -> int:
    """Return the number of output lines kept with an ended task, by the labels of its service or of the cluster."""
    try:
        return _last_lines(labels)
    except InvalidArgument:
        return 0


def history_entries(labels: Mapping[str, str]) -> int:
    """Return the number of history entries that are kept, by the labels of the cluster."""
    try:
        return _history_entries(labels)
    except InvalidArgument:
        return HISTORY_DEFAULT


def volume_affinity(labels: Mapping[str, str]) -> VolumeAffinity:
    """Return the volume affinity in the labels of a service."""
    try:
        return _volume_affinity(labels)
    except InvalidArgument:
        return VolumeAffinity.PREFERRED


def exec_policy(labels: Mapping[str, str]) -> ExecPolicy:
    """Return the exec policy in the labels of a container.  An unknown word of a newer version means the strictest
    policy."""
    try:
        return _exec_policy(labels)
    except InvalidArgument:
        return ExecPolicy.NONE


def priority_of(labels: Mapping[str, str]) -> int:
    """Return the priority of a service's tasks, by its labels."""
    if PRIORITY not in labels:
        return 0  # A queue calls this for each of its keys, so the common case is fast.
    try:
        return _priority(labels)
    except InvalidArgument:
        return 0


def allows_machine_logs(labels: Mapping[str, str]) -> bool:
    """Return whether the cluster's labels let every user send logs to the cluster's machines and their system logs."""
    return labels.get(ALLOW_MACHINE_LOGS, "").lower() == "true"


def allowed_repositories(labels: Mapping[str, str]) -> Mapping[str, tuple[str, ...]]:
    """Return, by stack, the repositories that it may pull with the nodes' credentials.  A repository includes all below
    it.

    The key ``*`` means every stack.  Raises: InvalidArgument.
    """
    found: dict[str, tuple[str, ...]] = {}
    text = labels.get(ALLOW_CREDENTIAL_HELPERS, labels.get(_FORMER_ALLOW_HELPERS, ""))
    for part in filter(None, map(str.strip, text.split(","))):
        stack, sign, repository = part.partition("=")
        if not sign or not stack or not repository.strip("/") or any(char in repository for char in "@*= "):
            raise InvalidArgument(
                f"invalid label {ALLOW_CREDENTIAL_HELPERS}: {part!r}: "
                "expected STACK=REGISTRY/REPOSITORY, separated by commas"
            )
        found[stack] = (*found.get(stack, ()), repository.strip("/"))
    return found


def allows_preemption(labels: Mapping[str, str]) -> bool:
    """Return whether tasks are stopped for tasks of a higher priority, by the labels of the cluster."""
    return labels.get(PREEMPTION, "").lower() == "true"


def shares_images(labels: Mapping[str, str]) -> bool:
    """Return whether nodes may read images that none of their tasks uses, by the labels of the cluster."""
    return labels.get(SHARE_IMAGES, "").lower() == "true"


def allows_worker_reads(labels: Mapping[str, str]) -> bool:
    """Return whether the cluster's labels let the APIs of workers show the cluster's objects."""
    return labels.get(WORKER_READS, "").lower() == "true"


def relabeled(labels: Mapping[str, str]) -> Mapping[str, str]:
    """Return the modes ``z`` and ``Z`` of a container's mounts by target.  Raises: InvalidArgument."""
    text = labels.get(RELABEL, "")
    pairs = [word.strip().rpartition("=") for word in text.split(",")] if text else []
    if not all(target.startswith("/") and mode in ("z", "Z") for target, _, mode in pairs):
        raise InvalidArgument(
            f"invalid label {RELABEL}={text}: expected TARGET=z or TARGET=Z, separated by commas"
        )
    return {target: mode for target, _, mode in pairs}


def check_service_labels(labels: Mapping[str, str]) -> None:
    """Check the ``skep.*`` labels of a service.  Raises: InvalidArgument."""
    _check_former(labels, FORMER_VOLUMES, VOLUME_AFFINITY, _FORMER_VALUES)
    for name in (EXEC, RELABEL):
        if name in labels:
            raise InvalidArgument(
                f"the label {name} works on containers only: set it with --container-label, not with --label"
            )
    _disconnect_policy(labels)
    _progress_deadline_s(labels)
    _min_available(labels)
    _job_ttl_s(labels)
    _drain_s(labels)
    _last_lines(labels)
    _volume_affinity(labels)
    _priority(labels)
    parsed_dependencies(labels)
    parsed_routes(labels)
    parsed_settings(labels)
    parsed_affinities(labels)
    _check_switch(labels, PUBLISH_NOT_READY)
    _check_switch(labels, NEAR)
    _check_switch(labels, STOPPED)


def check_node_labels(labels: Mapping[str, str]) -> None:
    """Check the ``skep.reserve.*`` labels of a node.  Raises: InvalidArgument."""
    _reserved_nano_cpus(labels)
    _reserved_bytes(labels)


def check_container_labels(labels: Mapping[str, str]) -> None:
    """Check the ``skep.*`` labels of a service's containers.  Raises: InvalidArgument."""
    _exec_policy(labels)
    relabeled(labels)


def check_swarm_labels(labels: Mapping[str, str]) -> None:
    """Check the ``skep.*`` labels of the cluster.  Raises: InvalidArgument."""
    _heartbeat_grace_s(labels)
    _forget_nodes_s(labels)
    _last_lines(labels)
    _history_entries(labels)
    _check_switch(labels, WORKER_READS)
    _check_switch(labels, PREEMPTION)
    _check_switch(labels, SHARE_IMAGES)
    _check_switch(labels, ALLOW_MACHINE_LOGS)
    _check_former(labels, _FORMER_ALLOW_HELPERS, ALLOW_CREDENTIAL_HELPERS)
    allowed_repositories(labels)
    allowed_rights(labels.get(ALLOW_LABEL, ""))


def _check_former(
    labels: Mapping[str, str], former: str, present: str, values: Mapping[str, str] | None = None
) -> None:
    """Check that the former and the present name of a label have the same value if both are set.

    Args:
        values: Present values by former value.

    Raises: InvalidArgument.
    """
    if former not in labels or present not in labels:
        return
    old, new = labels[former], labels[present]
    if (values or {}).get(old, old) != new:
        raise InvalidArgument(
            f"the labels {former}={old} and {present}={new} contradict each other: {former} is the former name of "
            f"{present}. Remove {former}"
        )


def _disconnect_policy(labels: Mapping[str, str]) -> DisconnectPolicy:
    action = _choice(labels, ON_DISCONNECT, OnDisconnect.REPLACE)
    delay_s = _seconds(labels, ON_DISCONNECT_DELAY, DELAY_S_MAX)
    if delay_s is None:
        delay_s = DEFAULT_STOP_DELAY_S if action is OnDisconnect.STOP else 0.0
    return DisconnectPolicy(action=action, delay_s=delay_s)


def _volume_affinity(labels: Mapping[str, str]) -> VolumeAffinity:
    if VOLUME_AFFINITY not in labels and (former := labels.get(FORMER_VOLUMES)) is not None:
        labels = {VOLUME_AFFINITY: _FORMER_VALUES.get(former, former)}
    return _choice(labels, VOLUME_AFFINITY, VolumeAffinity.PREFERRED)


def _exec_policy(labels: Mapping[str, str]) -> ExecPolicy:
    return _choice(labels, EXEC, ExecPolicy.ANY)


def _choice(labels: Mapping[str, str], name: str, default: E) -> E:
    """Return the value of a label of an enumeration.  Raises: InvalidArgument."""
    value, kind = labels.get(name, default.value), type(default)
    try:
        return kind(value)
    except ValueError:
        wanted = ", ".join(one.value for one in kind)
        raise InvalidArgument(f"invalid label {name}={value}: expected one of {wanted}") from None


def _priority(labels: Mapping[str, str]) -> int:
    text = labels.get(PRIORITY, "0")
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 4 and int(digits) <= PRIORITY_MAX):
        raise InvalidArgument(
            f"invalid label {PRIORITY}={text}: expected a whole number from -{PRIORITY_MAX} to {PRIORITY_MAX}"
        )
    return int(text)


def _check_switch(labels: Mapping[str, str], name: str) -> None:
    if (word := labels.get(name, "false")).lower() not in {"true", "false"}:
        raise InvalidArgument(f"invalid label {name}={word}: expected true or false")


def _progress_deadline_s(labels: Mapping[str, str]) -> float:
    seconds = _seconds(labels, PROGRESS_DEADLINE, DELAY_S_MAX)
    return DEFAULT_PROGRESS_S if seconds is None else seconds


def _min_available(labels: Mapping[str, str]) -> tuple[int, bool] | None:
    """Return the number, and whether it is a percentage."""
    if (text := labels.get(MIN_AVAILABLE)) is None:
        return None
    digits, is_percentage = text.removesuffix(_PERCENT), text.endswith(_PERCENT)
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= 6
    if not is_number or (is_percentage and int(digits) > 100):
        raise InvalidArgument(
            f"invalid label {MIN_AVAILABLE}={text}: expected a number of tasks, or a percentage from 0% to 100%"
        )
    return int(digits), is_percentage


def _job_ttl_s(labels: Mapping[str, str]) -> float | None:
    return _seconds(labels, JOB_TTL, DELAY_S_MAX)


def _drain_s(labels: Mapping[str, str]) -> float:
    seconds = _seconds(labels, DRAIN, DELAY_S_MAX)
    return DEFAULT_DRAIN_S if seconds is None else seconds


def _heartbeat_grace_s(labels: Mapping[str, str]) -> float | None:
    return _seconds(labels, HEARTBEAT_GRACE, GRACE_S_MAX)


def _forget_nodes_s(labels: Mapping[str, str]) -> float | None:
    seconds = _seconds(labels, FORGET_NODES, FORGET_S_MAX)
    if seconds is not None and seconds < FORGET_S_MIN:
        raise InvalidArgument(
            f"invalid label {FORGET_NODES}={labels[FORGET_NODES]}: expected at least {FORGET_S_MIN:g}s"
        )
    return seconds


def _last_lines(labels: Mapping[str, str]) -> int:
    text = labels.get(LAST_LINES, str(LAST_LINES_MAX))
    if not (text.isascii() and text.isdigit() and len(text) <= 2 and int(text) <= LAST_LINES_MAX):
        raise InvalidArgument(
            f"invalid label {LAST_LINES}={text}: expected a number from 0 to {LAST_LINES_MAX}"
        )
    return int(text)


def _history_entries(labels: Mapping[str, str]) -> int:
    text = labels.get(HISTORY, str(HISTORY_DEFAULT))
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and int(text) <= HISTORY_MAX):
        raise InvalidArgument(
            f"invalid label {HISTORY}={text}: expected a number of entries from 0 to {HISTORY_MAX}"
        )
    return int(text)


def _reserved_nano_cpus(labels: Mapping[str, str]) -> int:
    text = labels.get(RESERVE_CPUS, "0")
    if re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", text, re.ASCII) is None:
        raise InvalidArgument(
            f"invalid label {RESERVE_CPUS}={text}: expected a number of processors like 0.5"
        )
    return round(float(text) * 1_000_000_000)


def _reserved_bytes(labels: Mapping[str, str]) -> int:
    text = labels.get(RESERVE_MEMORY, "0")
    found = re.fullmatch(r"([0-9]{1,15})([KMG]iB)?", text, re.ASCII)
    if found is None:
        raise InvalidArgument(f"invalid label {RESERVE_MEMORY}={text}: expected bytes, or a size like 512MiB")
    return int(found[1]) * _MEMORY_UNITS[found[2] or ""]


def _seconds(labels: Mapping[str, str], name: str, largest_s: float) -> float | None:
    text = labels.get(name)
    if text is None:
        return None
    duration = duration_ns(text)
    if duration is None or not 0 <= duration <= largest_s * SECOND_NS:
        raise InvalidArgument(
            f"invalid label {name}={text}: expected a duration like 30s or 5m, at most {largest_s / 3600:g} h"
        )
    return duration / SECOND_NS

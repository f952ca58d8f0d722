"""All ``skep.*`` labels: settings that Docker's API does not have, and reports of nodes.

``LABELS`` lists every one of them.  A label that cannot be read is refused when it is written; should one be there all
the same, it counts as absent.
"""

from collections.abc import Mapping
from enum import Enum

import msgspec

from skep.errors import InvalidArgument
from skep.model.rights import ALLOW_LABEL, CDI_LABEL, DEVICES_LABEL, allowed_rights
from skep.model.times import SECOND_NS, duration_ns

HEARTBEAT_GRACE = "skep.heartbeat-grace"
"""On the cluster: how long a silent skep node counts as alive (``5s``); default three heartbeat periods."""
GRACE_S_MAX = 3600.0

ON_DISCONNECT = "skep.on-disconnect"
ON_DISCONNECT_DELAY = "skep.on-disconnect-delay"
PROGRESS_DEADLINE = "skep.progress-deadline"
"""On services: timeout of an update for one task to run or to end."""
DEFAULT_PROGRESS_S = 600.0
"""Long enough for large images over slow links."""

JOB_TTL = "skep.job-ttl"
ROTATION_OF = "skep.rotation.of"
"""On every version of a secret or config but the first: the name of the first."""
"""On jobs: how long a finished job is kept before it is removed with its tasks; unset: forever."""

DRAIN = "skep.drain"
"""On services: how long a stopping task waits until no new connections arrive, and again for its last connections to
end."""
DEFAULT_DRAIN_S = 1.0

PUBLISH_NOT_READY = "skep.publish-not-ready"
"""On services: ``true``: names of tasks resolve before they are healthy; virtual addresses and ports stay strict."""

IGNORE_PATHS = "skep.ignore-paths"
"""``true``: the node gets tasks on overlay networks even if other nodes do not reach it."""

LABEL_TASK_ID = "com.docker.swarm.task.id"
"""Docker's label of a task's container, by which the container is identified."""
LABEL_SERVICE_ID = "com.docker.swarm.service.id"
LABEL_SERVICE_NAME = "com.docker.swarm.service.name"
LABEL_NODE_ID = "com.docker.swarm.node.id"
"""Further labels of a task's container, as Docker's."""

DELAY_S_MAX = 365 * 24 * 3600.0


class OnDisconnect(Enum):
    """What happens to a service's tasks on a node that has lost all managers."""

    REPLACE = "replace"
    """They are replaced after the delay; those that still run are removed when the node returns."""
    KEEP = "keep"
    """They are not replaced as long as the node exists."""
    STOP = "stop"
    """The node itself stops them after the delay, and only then they are replaced."""


DEFAULT_STOP_DELAY_S = 30.0
"""Longer than a restart of managers or a change of manager takes, so that neither stops tasks."""


class DisconnectPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A service's parsed ``on-disconnect`` labels.

    ``delay_s``: since the node is down (REPLACE), since its last heartbeat (STOP); KEEP has none.
    """

    action: OnDisconnect = OnDisconnect.REPLACE
    delay_s: float = 0.0


def disconnect_policy(labels: Mapping[str, str]) -> DisconnectPolicy:
    """The policy in the labels of a service."""
    try:
        return _disconnect_policy(labels)
    except InvalidArgument:
        return DisconnectPolicy()


def progress_deadline_s(labels: Mapping[str, str]) -> float:
    """The value in the labels of a service, in seconds."""
    try:
        return _progress_deadline_s(labels)
    except InvalidArgument:
        return DEFAULT_PROGRESS_S


def job_ttl_s(labels: Mapping[str, str]) -> float | None:
    """The value in the labels of a job, in seconds; None: unset."""
    try:
        return _job_ttl_s(labels)
    except InvalidArgument:
        return None


def drain_s(labels: Mapping[str, str]) -> float:
    """The value in the labels of a service, in seconds."""
    try:
        return _drain_s(labels)
    except InvalidArgument:
        return DEFAULT_DRAIN_S


def heartbeat_grace_s(labels: Mapping[str, str]) -> float | None:
    """The value in the labels of the cluster; None: unset."""
    try:
        return _heartbeat_grace_s(labels)
    except InvalidArgument:
        return None


def ignores_paths(node_labels: Mapping[str, str]) -> bool:
    """Whether the node gets tasks on overlay networks even if other nodes do not reach it."""
    return node_labels.get(IGNORE_PATHS, "").lower() == "true"


def publishes_not_ready(labels: Mapping[str, str]) -> bool:
    """Whether names of a service's tasks resolve before the tasks are healthy."""
    return labels.get(PUBLISH_NOT_READY, "").lower() == "true"


def check_service_labels(labels: Mapping[str, str]) -> None:
    """Raises: InvalidArgument: a ``skep.*`` label is invalid."""
    _disconnect_policy(labels)
    _progress_deadline_s(labels)
    _job_ttl_s(labels)
    _drain_s(labels)
    early = labels.get(PUBLISH_NOT_READY, "false")
    if early.lower() not in {"true", "false"}:
        raise InvalidArgument(f"invalid label {PUBLISH_NOT_READY}={early}: want true or false")


def check_swarm_labels(labels: Mapping[str, str]) -> None:
    """Raises: InvalidArgument: a ``skep.*`` label is invalid."""
    _heartbeat_grace_s(labels)
    allowed_rights(labels.get(ALLOW_LABEL, ""))


def _disconnect_policy(labels: Mapping[str, str]) -> DisconnectPolicy:
    value = labels.get(ON_DISCONNECT, OnDisconnect.REPLACE.value)
    try:
        action = OnDisconnect(value)
    except ValueError:
        wanted = ", ".join(action.value for action in OnDisconnect)
        raise InvalidArgument(f"invalid label {ON_DISCONNECT}={value}: want one of {wanted}") from None
    delay_s = _seconds(labels, ON_DISCONNECT_DELAY, DELAY_S_MAX)
    if delay_s is None:
        delay_s = DEFAULT_STOP_DELAY_S if action is OnDisconnect.STOP else 0.0
    return DisconnectPolicy(action=action, delay_s=delay_s)


def _progress_deadline_s(labels: Mapping[str, str]) -> float:
    seconds = _seconds(labels, PROGRESS_DEADLINE, DELAY_S_MAX)
    return DEFAULT_PROGRESS_S if seconds is None else seconds


def _job_ttl_s(labels: Mapping[str, str]) -> float | None:
    return _seconds(labels, JOB_TTL, DELAY_S_MAX)


def _drain_s(labels: Mapping[str, str]) -> float:
    seconds = _seconds(labels, DRAIN, DELAY_S_MAX)
    return DEFAULT_DRAIN_S if seconds is None else seconds


def _heartbeat_grace_s(labels: Mapping[str, str]) -> float | None:
    return _seconds(labels, HEARTBEAT_GRACE, GRACE_S_MAX)


def _seconds(labels: Mapping[str, str], name: str, largest_s: float) -> float | None:
    text = labels.get(name)
    if text is None:
        return None
    duration = duration_ns(text)
    if duration is None or not 0 <= duration <= largest_s * SECOND_NS:
        raise InvalidArgument(
            f"invalid label {name}={text}: want a duration like 30s or 5m, at most {largest_s / 3600:g} h"
        )
    return duration / SECOND_NS


class LabelTarget(Enum):
    """The kind of object with a label; the value is a sentence on how to set or read it."""

    SERVICE = "`docker service create --label NAME=VALUE`, `docker service update --label-add`."
    CONTAINER = (
        "`docker service create --container-label NAME=VALUE`, `docker service update --container-label-add`: what the "
        "containers of a service are given of their nodes, as far as the cluster allows it (`skep.allow`)."
    )
    NETWORK = "`docker network create --label NAME=VALUE`."
    SECRET = "Written by `skep secret rotate`; by `skep config rotate` likewise for configs."
    NODE = "`docker node update --label-add NAME=VALUE NODE`."
    CLUSTER = "`Spec.Labels` of `POST /swarm/update`; docker has no flag for it."
    ENGINE = (
        "Read-only, in `Description.Engine.EngineLabels` of `docker node inspect`; "
        "placement constraints see them as `engine.labels.NAME`."
    )


class Label(msgspec.Struct, frozen=True):
    """One ``skep.*`` label, for the reference.  Upper-case words in ``name`` are placeholders."""

    target: LabelTarget
    name: str
    values: str
    default: str
    effect: str


_PUBLISH = "skep.publish[.PORT[/PROTOCOL]]"

LABELS = (
    Label(
        LabelTarget.SERVICE,
        ON_DISCONNECT,
        "`replace`, `keep`, `stop`",
        "`replace`",
        "what becomes of tasks on a node that lost all managers: others replace them; they keep their slots for as "
        "long as the node exists; the node stops them, and only then others replace them",
    ),
    Label(
        LabelTarget.SERVICE,
        ON_DISCONNECT_DELAY,
        "duration",
        "`0s`; with `stop` `30s`",
        "time before that: with `replace` since the node is down, with `stop` since a manager last heard it",
    ),
    Label(
        LabelTarget.SERVICE,
        PROGRESS_DEADLINE,
        "duration",
        "`10m`",
        "how long an update waits for one task to run or to end before it has failed",
    ),
    Label(
        LabelTarget.SERVICE,
        JOB_TTL,
        "duration",
        "kept",
        "how long a job that has ended is kept before it is removed with its tasks",
    ),
    Label(
        LabelTarget.SERVICE,
        DRAIN,
        "duration",
        "`1s`",
        "how long a task that is to stop waits for nodes that may still send it connections, and then again for its "
        "last connection to end",
    ),
    Label(
        LabelTarget.SERVICE,
        PUBLISH_NOT_READY,
        "`true`, `false`",
        "`false`",
        "`true`: the names of tasks (`tasks.SERVICE`, `SLOT.SERVICE`, and `SERVICE` with `--endpoint-mode dnsrr`) "
        "resolve before the tasks are healthy, for software that needs its peers to become so; virtual addresses and "
        "published ports reach healthy tasks only",
    ),
    Label(
        LabelTarget.SERVICE,
        f"{_PUBLISH}.host-ip",
        "IP address",
        "all",
        "the only address of a node that the port answers on",
    ),
    Label(
        LabelTarget.SERVICE,
        f"{_PUBLISH}.affinity",
        "`none`, `client-ip`",
        "`none`",
        "`client-ip`: one client always reaches the same task, as long as that is healthy",
    ),
    Label(
        LabelTarget.SERVICE,
        f"{_PUBLISH}.local",
        "`true`, `false`",
        "`false`",
        "`true`: a node with healthy tasks of its own sends connections to those only",
    ),
    Label(
        LabelTarget.SERVICE,
        f"{_PUBLISH}.proxy-protocol",
        "`none`, `v1`, `v2`",
        "`none`",
        "each TCP connection begins with a PROXY protocol header that names its client",
    ),
    *(
        Label(LabelTarget.CONTAINER, name, values, default, effect)
        for name, values, default, effect in (
            (
                "skep.privileged",
                "`true`, `false`",
                "`false`",
                "as `docker run --privileged` (right `privileged`)",
            ),
            (
                "skep.devices",
                "`/dev/a`, `/dev/a:/dev/b:rwm`, `vendor.com/class=name`, separated by commas",
                "none",
                "devices, directories, and what vendors describe (CDI), on nodes that have it (right `devices`)",
            ),
            (
                "skep.device-rules",
                "`c 188:* rwm`, separated by commas",
                "none",
                "as `--device-cgroup-rule` (right `devices`)",
            ),
            (
                "skep.gpus",
                "`all`, a number, `device=NAME,...`",
                "none",
                "GPUs by CDI, not counted (right `gpus`)",
            ),
            ("skep.pid", "`host`", "its own", "the node's processes (right `namespaces`)"),
            ("skep.ipc", "`host`", "its own", "the node's shared memory (right `namespaces`)"),
            ("skep.uts", "`host`", "its own", "the node's host name (right `namespaces`)"),
            (
                "skep.shm-size",
                "size: `256m`",
                "`64m`",
                "size of /dev/shm (right `resources`, as all that follow)",
            ),
            (
                "skep.cpu-shares",
                "`2` to `262144`",
                "`1024`",
                "share of the processors beside other containers",
            ),
            ("skep.cpuset-cpus", "`0-3,5`", "all", "processors that it runs on"),
            ("skep.cpuset-mems", "`0,1`", "all", "memory nodes that it uses"),
            ("skep.memory-swap", "size; `-1`: no limit", "twice the limit", "memory and swap together"),
            ("skep.memory-swappiness", "`0` to `100`", "the kernel's", "on cgroups v1"),
            ("skep.blkio-weight", "`10` to `1000`", "the kernel's", "share of block devices"),
            (
                "skep.device-read-bps",
                "`/dev/sda:1m`, separated by commas",
                "none",
                "bytes read in a second at most",
            ),
            ("skep.device-write-bps", "likewise", "none", "bytes written in a second at most"),
            (
                "skep.device-read-iops",
                "`/dev/sda:1000`, separated by commas",
                "none",
                "reads in a second at most",
            ),
            ("skep.device-write-iops", "likewise", "none", "writes in a second at most"),
        )
    ),
    Label(
        LabelTarget.NETWORK,
        "skep.attach",
        "constraints, separated by commas",
        "any node",
        "nodes whose plain containers may join an attachable network: `node.labels.*`, `node.role` and `node.id` only",
    ),
    Label(
        LabelTarget.NETWORK,
        "skep.data-plane",
        "`skep`, `docker`",
        "by its first task",
        "the kind of nodes that the overlay is for; as a driver option (`--opt`) too",
    ),
    Label(
        LabelTarget.NETWORK,
        "skep.allow-overlap",
        "`true`",
        "refused",
        "take a subnet that some node already reaches by itself; as a driver option (`--opt`) too",
    ),
    Label(
        LabelTarget.SECRET,
        ROTATION_OF,
        "a name",
        "",
        "the first version of a secret or config, on every later version",
    ),
    Label(
        LabelTarget.NODE,
        IGNORE_PATHS,
        "`true`",
        "`false`",
        "the node gets tasks on overlay networks although other nodes do not reach it",
    ),
    Label(
        LabelTarget.CLUSTER,
        HEARTBEAT_GRACE,
        "duration, at most `1h`",
        "three heartbeats",
        "how long a silent skep node counts as alive (`skep cluster grace`)",
    ),
    Label(
        LabelTarget.CLUSTER,
        "skep.renew-window",
        "duration; `0`: never",
        "`720h`",
        "how long after its expiry the certificate of a node can be renewed",
    ),
    Label(
        LabelTarget.CLUSTER,
        ALLOW_LABEL,
        "`none`, `all`, or some of `privileged`, `devices`, `gpus`, `namespaces`, `resources`, separated by commas",
        "`none`",
        "rights over their nodes that services may ask for by labels of their containers (`skep cluster allow`)",
    ),
    Label(LabelTarget.ENGINE, "skep.node", "`true`", "", "this is a skep node, not a Docker Engine"),
    Label(
        LabelTarget.ENGINE,
        "skep.condition.NAME",
        "a sentence",
        "",
        "something is wrong with the node: `apparmor`, `disk`, `disk-full`, `images`, `manager`, `neighbours`, "
        "`networks`, `no-manager`, `restore`, `swarm`",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.without.NAME",
        "`true`",
        "",
        "the kernel lacks something: `bridge`, `ipv6-egress`, `nftables`, `overlayfs`, `route-localnet`, `seccomp`, "
        "`tun`, `veth`, `vxlan`, `wireguard` and others",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.encryption",
        "`kernel` or `wireguard-go`",
        "",
        "what encrypts overlay networks on the node, WireGuard both; absent: it refuses tasks on encrypted networks",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.wireguard",
        "`KEY@PORT`, at most two, separated by commas",
        "",
        "the node's public WireGuard keys in base64, the oldest first, each with its UDP port",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.data-path-addr",
        "IP address",
        "",
        "the address that VXLAN leaves from and arrives at",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.data-path-addr.refused",
        "IP address",
        "",
        "the same, where a manager refused it: it belongs to another node",
    ),
    Label(
        LabelTarget.ENGINE,
        ALLOW_LABEL,
        "rights, separated by commas",
        "",
        "rights over itself that the node gives tasks (its setting `allow`)",
    ),
    Label(
        LabelTarget.ENGINE,
        DEVICES_LABEL,
        "paths, separated by commas",
        "",
        "the node's devices, without terminals, loop devices and disks by name; `...` at the end: there are more",
    ),
    Label(
        LabelTarget.ENGINE,
        CDI_LABEL,
        "`vendor.com/class=name`, separated by commas",
        "",
        "the devices that descriptions on the node name (CDI)",
    ),
    Label(
        LabelTarget.ENGINE, "skep.paths", "`1`", "", "the node probes other nodes and answers their probes"
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.images-port",
        "port number",
        "",
        "the TCP port at which the node serves its images to other nodes of the cluster",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.ports",
        "`tcp=22,80 udp=53`",
        "",
        "ports that plain containers and other programs of the machine use; host-mode ports are published elsewhere",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.routes",
        "`SUBNET=INTERFACE ...`",
        "",
        "networks that the machine reaches by itself; new overlays avoid them",
    ),
)
"""In the order of the reference page."""

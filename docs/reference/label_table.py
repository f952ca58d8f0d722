"""Every ``skep.*`` label, as the page of labels shows them."""

from enum import Enum

import msgspec

from skep.model.autoscaling import AUTOSCALE, AUTOSCALE_CPU, AUTOSCALE_DOWN_AFTER, AUTOSCALE_MEMORY
from skep.model.dependencies import DEPENDS_ON
from skep.model.labels import (
    ALLOW_CREDENTIAL_HELPERS,
    ALLOW_MACHINE_LOGS,
    DRAIN,
    EXEC,
    FORGET_NODES,
    HEARTBEAT_GRACE,
    HISTORY,
    HISTORY_DEFAULT,
    HISTORY_MAX,
    IGNORE_PATHS,
    JOB_TTL,
    LAST_LINES,
    MAINTENANCE,
    ON_DISCONNECT,
    ON_DISCONNECT_DELAY,
    PREEMPTION,
    PRIORITY,
    PRIORITY_MAX,
    PROGRESS_DEADLINE,
    PUBLISH_NOT_READY,
    ROTATION_OF,
    SHARE_IMAGES,
    STACK_CHANGES,
    STACK_FILES,
    STACK_REVISION,
    STACK_STATE,
    VOLUME_AFFINITY,
    WORKER_READS,
)
from skep.model.rights import ALLOW_LABEL, API_LABEL, CDI_LABEL, DEVICES_LABEL
from skep.model.schedules import (
    CRON,
    CRON_CONCURRENCY,
    CRON_DEADLINE,
    CRON_MAX_ATTEMPTS,
    CRON_SUSPEND,
    CRON_TIME_ZONE,
    MAX_ATTEMPTS_DEFAULT,
    MAX_ATTEMPTS_MAX,
)
from skep.model.secret_env import SECRET_ENV_LABEL
from skep.model.slot_volumes import FORGOTTEN_LABEL, SLOT_VOLUMES_LABEL


class LabelTarget(Enum):
    """The kind of object with a label; the value is a sentence on how to set or read it."""

    SERVICE = "`docker service create --label NAME=VALUE`, `docker service update --label-add`."
    CONTAINER = (
        "`docker service create --container-label NAME=VALUE`, `docker service update --container-label-add`: what the "
        "containers of a service are given of their nodes, as far as the cluster allows it (`skep.allow`)."
    )
    NETWORK = "`docker network create --label NAME=VALUE`."
    SECRET = "Written by `skep secret rotate`; by `skep config rotate` likewise for configs."
    REVISION = "Written by `skep stack deploy` on the configs that are the revisions of a stack."
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
        LabelTarget.CONTAINER,
        STACK_FILES,
        "`FILE=HASH,...`",
        "none",
        "written by `skep stack deploy`: the files beside the Compose file that the service mounts, so that changed "
        "content updates it",
    ),
    Label(
        LabelTarget.CONTAINER,
        EXEC,
        "`any`, `user`, `none`",
        "`any`",
        "limits `skep exec`, `attach`, `cp` and `kill` for users below administrator: `user` runs commands as the "
        "container's user only and copies no files in, `none` refuses all four",
    ),
    Label(
        LabelTarget.SERVICE,
        ON_DISCONNECT,
        "`replace`, `keep`, `stop`",
        "`replace`",
        "what becomes of tasks on a node that lost all managers: others replace them; they keep their slots for as "
        "long as the node exists; the node stops them, and only then others replace them. A node that was removed "
        "counts as gone: its tasks are replaced at once",
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
        "how long an update waits for one task to run or to end before it has failed; the "
        "time in which it waits for other services (`skep.depends-on`), or for the task before it to stop, does not "
        "count, and it has the deadline once more when it is then started; a wait for a service that does not exist, "
        "or for a job that has failed, counts",
    ),
    Label(
        LabelTarget.SERVICE,
        JOB_TTL,
        "duration",
        "kept",
        "how long a job that has ended is kept before it is removed with its tasks; it stays as long as a service "
        "requires it (`skep.depends-on`); not for one with a schedule",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON,
        "five fields of cron, `@hourly`, `@daily` and others; several separated by `;`",
        "none",
        "when the job runs, in its time zone ([tutorial](../tutorials/periodic.md)); it does not run when it is "
        "created, and an update is for the next run",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_TIME_ZONE,
        "IANA name: `Europe/Berlin`",
        "`UTC`",
        "what the fields of `skep.cron` mean",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_CONCURRENCY,
        "`forbid`, `replace`",
        "`forbid`",
        "what becomes of a run that is due while the one before is still going: it is skipped, or the one before is "
        "stopped first",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_DEADLINE,
        "duration, at least `1s`",
        "none",
        "how late a run may begin that was due while no manager led; with `global-job` it holds for each node: a task "
        "that has no room until then is given up",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_SUSPEND,
        "`true`, `false`",
        "`false`",
        "`true`: the schedule is paused; what is due meanwhile is not caught up",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_MAX_ATTEMPTS,
        f"`0` to `{MAX_ATTEMPTS_MAX}`",
        f"`{MAX_ATTEMPTS_DEFAULT}`",
        "how often a failed task of a run is started again before the run fails, if the restart policy has no "
        "`max_attempts`; `0`: no limit",
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
        LAST_LINES,
        "`0` to `20`",
        "`20`",
        "how many last lines of output are kept with a task that ended; `0` for output that holds secrets",
    ),
    Label(
        LabelTarget.SERVICE,
        PRIORITY,
        f"`-{PRIORITY_MAX}` to `{PRIORITY_MAX}`",
        "`0`",
        "where room is short, tasks of services with a higher one are placed first; above 0 not by operators of single "
        "stacks",
    ),
    Label(
        LabelTarget.SERVICE,
        VOLUME_AFFINITY,
        "`preferred`, `required`, `none`",
        "`preferred`",
        "where a task goes whose slot has data in a local volume of a node: to that node if it can run the task, else "
        "to another one; to that node only, for which it waits; to any node, as in Docker",
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
        DEPENDS_ON,
        "`NAME=CONDITION[+restart][+optional],...`",
        "none",
        "the services that this one waits for before its first task starts, with Compose's conditions: "
        "`service_started`, `service_healthy`, `service_completed_successfully`; `+restart`: an update of that service "
        "restarts this one, `+optional`: it is not waited for if it is not there or fails "
        "([Compose files](../guide/compose.md#start-services-in-order))",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE,
        "`2..10`",
        "off",
        "the fewest and the most tasks of a replicated service, between which their number follows what they use "
        "([autoscaling](../guide/autoscaling.md))",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_CPU,
        "`1` to `1000`, percent",
        "`70`; without, if there is a target of memory",
        "target: processor time of a task, of its limit, else of its reservation, else of one processor",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_MEMORY,
        "`1` to `100`, percent",
        "none",
        "target: memory of a task, of its limit, which it needs",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_DOWN_AFTER,
        "duration, `15s` to `24h`",
        "`5m`",
        "how long fewer tasks have to suffice before there are fewer",
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
                SECRET_ENV_LABEL,
                "`VARIABLE=TARGET`, separated by commas",
                "",
                "secrets of the service, by their targets, that are variables, too; not in inspect output nor execs",
            ),
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
            (
                API_LABEL,
                "`read`, `inspect`, `full`",
                "`read`",
                "what it may call on the API's socket, if it mounts that: [API access](../guide/api-access.md)",
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
        LabelTarget.REVISION,
        STACK_REVISION,
        "a number",
        "",
        "the config is this revision of its stack, and no service's",
    ),
    Label(
        LabelTarget.REVISION,
        STACK_STATE,
        "`deploying`, `deployed`, `interrupted`, `failed: CAUSE`, `rolling back`, `replaced by revision N`",
        "",
        "how its deploy ended",
    ),
    Label(LabelTarget.REVISION, STACK_CHANGES, "`2 created, 1 updated`", "", "what its deploy changed"),
    Label(
        LabelTarget.NODE,
        IGNORE_PATHS,
        "`true`",
        "`false`",
        "the node gets tasks on overlay networks although other nodes do not reach it",
    ),
    Label(
        LabelTarget.NODE,
        FORGOTTEN_LABEL,
        "`VOLUME@TIME ...`",
        "none",
        "local volumes of the node that were given up (`skep volume forget`): use up to then attracts no task",
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
        FORGET_NODES,
        "duration, `1m` to `2160h`",
        "never",
        "how long a worker that is down is kept, unless something would be lost with it (`skep cluster forget-nodes`)",
    ),
    Label(
        LabelTarget.CLUSTER,
        LAST_LINES,
        "`0` to `20`",
        "`20`",
        "how many last lines of output managers keep with a task that ended, of any service",
    ),
    Label(
        LabelTarget.CLUSTER,
        MAINTENANCE,
        "JSON",
        "",
        "which nodes are away on purpose; written by `skep reboot-lock` and `skep upgrade`",
    ),
    Label(
        LabelTarget.CLUSTER,
        HISTORY,
        f"`0` to `{HISTORY_MAX}`",
        f"`{HISTORY_DEFAULT}`",
        "how many entries of `skep history` are kept, half of them for requests; `0`: none, and those there are go",
    ),
    Label(
        LabelTarget.CLUSTER,
        WORKER_READS,
        "`true`, `false`",
        "`false`",
        "`true`: clients of a worker's API may read services, tasks, nodes, networks and events, the environment of "
        "services among them (`skep cluster worker-reads`)",
    ),
    Label(
        LabelTarget.CLUSTER,
        SHARE_IMAGES,
        "`true`, `false`",
        "`false`",
        "`true`: every node may read the images of every other node, also for `docker pull` on a worker; otherwise "
        "a worker reads the images of its own tasks only (`skep cluster share-images`)",
    ),
    Label(
        LabelTarget.CLUSTER,
        PREEMPTION,
        "`true`, `false`",
        "`false`",
        "`true`: where a task of a higher priority finds no room, tasks of lower ones are stopped for it "
        "(`skep cluster preemption`)",
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
        "`none`, `all`, or some of `privileged`, `devices`, `gpus`, `namespaces`, `resources`, `api`, `api-inspect`, "
        "separated by commas",
        "`none`",
        "rights over their nodes that services may ask for by labels of their containers (`skep cluster allow`)",
    ),
    Label(
        LabelTarget.CLUSTER,
        ALLOW_MACHINE_LOGS,
        "`true`, `false`",
        "`false`",
        "`true`: services of users below the administrator may log to loopback, link-local and node addresses, and by "
        "the log drivers `journald` and `syslog` to the machine's own log",
    ),
    Label(
        LabelTarget.CLUSTER,
        ALLOW_CREDENTIAL_HELPERS,
        "`STACK=REPOSITORY`, separated by commas; `*`: every stack",
        "none",
        "images that nodes may pull with their own credentials (`credential-helpers`) for services of users below the "
        "administrator: these repositories and those below them",
    ),
    Label(LabelTarget.ENGINE, "skep.node", "`true`", "", "this is a skep node, not a Docker Engine"),
    Label(
        LabelTarget.ENGINE,
        "skep.condition.NAME",
        "a sentence",
        "",
        "something is wrong with the node: `apparmor`, `description-size`, `disk`, `disk-pressure`, "
        "`disk-space`, `encrypted-networks`, "
        "`images`, `manager`, `manager-unreachable`, `neighbor-table`, `networks`, `restore`, `store-full`, `swarm`",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.missing.NAME",
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
        "skep.reserved-ports",
        "`tcp=2376,2377 udp=4789`",
        "",
        "ports that the node's daemon uses; in the whole cluster, only administrators publish on those of managers",
    ),
    Label(
        LabelTarget.ENGINE,
        SLOT_VOLUMES_LABEL,
        "`VOLUME=SERVICE.SLOT@TIME ...`",
        "",
        "which slots of services have used the node's local volumes, the latest first (milliseconds, when the task was "
        "created)",
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

"""Every ``skep.*`` label, as the page of labels shows them."""

from enum import Enum

import msgspec

from skep.model.door.routes import HTTP, PORT_DEFAULT
from skep.model.door.settings import (
    ACCESS_LOG,
    AUTOSCALE_REQUESTS,
    AUTOSCALE_RPS,
    DOOR,
    PROXY_PROTOCOL,
    TRUSTED,
)
from skep.model.measures.queries import (
    AUTOSCALE_PROMETHEUS,
    AUTOSCALE_QUERY,
    AUTOSCALE_QUEUE,
    AUTOSCALE_QUEUE_EXEC,
    AUTOSCALE_QUEUE_EXEC_IN,
    AUTOSCALE_QUEUE_FIELD,
    UPDATE_PROMETHEUS,
    UPDATE_QUERY,
)
from skep.model.networks.data_planes import (
    LOCAL_ADDRESSES_LABEL,
    NAT_LABEL,
    REFUSED_TUNNEL_LABEL,
    RELAY_LABEL,
    SEEN_NAT_LABEL,
    TUNNEL_LABEL,
)
from skep.model.node_reports.conditions import BOOT_LABEL, ConditionName
from skep.model.options.affinity import (
    AFFINITY,
    AFFINITY_PREFERRED,
    ANTI_AFFINITY,
    ANTI_AFFINITY_PREFERRED,
    MAX_SKEW,
    SKEW_MAX,
    TERMS_MAX,
)
from skep.model.options.autoscaling import (
    AUTOSCALE,
    AUTOSCALE_CPU,
    AUTOSCALE_DOWN_AFTER,
    AUTOSCALE_IDLE_AFTER,
    AUTOSCALE_MEMORY,
    AUTOSCALE_QUERY_TARGET,
    AUTOSCALE_QUEUE_TARGET,
    AUTOSCALE_SCHEDULE,
    AUTOSCALE_TIME_ZONE,
)
from skep.model.options.constraints import FACT_LABEL
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.labels import (
    ALLOW_CREDENTIAL_HELPERS,
    ALLOW_MACHINE_LOGS,
    DRAIN,
    DRAIN_NOW,
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
    MIN_AVAILABLE,
    NEAR,
    ON_DISCONNECT,
    ON_DISCONNECT_DELAY,
    PREEMPTION,
    PRIORITY,
    PRIORITY_MAX,
    PROGRESS_DEADLINE,
    PUBLISH_NOT_READY,
    RELABEL,
    RESERVE_CPUS,
    RESERVE_MEMORY,
    ROTATION_OF,
    SHARE_IMAGES,
    STACK_CHANGES,
    STACK_FILES,
    STACK_REVISION,
    STACK_STATE,
    STOPPED,
    VOLUME_AFFINITY,
    WORKER_READS,
    ZONE,
)
from skep.model.options.schedules import (
    CRON,
    CRON_CONCURRENCY,
    CRON_DEADLINE,
    CRON_MAX_ATTEMPTS,
    CRON_SUSPEND,
    CRON_TIME_ZONE,
    MAX_ATTEMPTS_DEFAULT,
)
from skep.model.options.secret_env import SECRET_ENV_LABEL
from skep.model.options.slot_volumes import FORGOTTEN_LABEL, SLOT_VOLUMES_LABEL
from skep.model.permissions.rights import ALLOW_LABEL, API_LABEL, CDI_LABEL, DEVICES_LABEL, EXECUTOR_LABEL
from skep.model.service import MAX_ATTEMPTS_MAX
from skep.model.staging.updates import (
    AUTO,
    BLUE_GREEN,
    CANARY,
    DEFAULT_STEP_S,
    MANUAL,
    MAX_ERRORS,
    MAX_LATENCY,
    QUERY_MAX,
    QUERY_MIN,
    QUERY_WAIT,
    REQUESTS_MIN,
    STEP_S_MAX,
    STEPS_MAX,
    UPDATE,
    UPDATE_KEEP,
    UPDATE_PROMOTE,
    UPDATE_STEP_TIME,
    UPDATE_STEPS,
)
from skep.model.values.user_map import MAPPED, USERS_LABEL

_CONDITIONS = ", ".join(f"`{name}`" for name in ConditionName)


class LabelTarget(Enum):
    """The kind of object with a label; the value is a sentence on how to set or read it."""

    SERVICE = (
        "Set them with `docker service create --label NAME=VALUE` or `docker service update --label-add`."
    )
    CONTAINER = (
        "Set them with `docker service create --container-label NAME=VALUE` or `docker service update "
        "--container-label-add`. Labels with a right take effect if the cluster allows that right (`skep.allow`)."
    )
    NETWORK = "Set them with `docker network create --label NAME=VALUE`."
    SECRET = "`skep secret rotate` writes it, and `skep config rotate` for configs."
    REVISION = "`skep stack deploy` writes them on the configs that are the revisions of a stack."
    NODE = "Set them with `docker node update --label-add NAME=VALUE NODE`."
    CLUSTER = (
        "Set them with the named command, or in `Spec.Labels` of `POST /swarm/update`. docker has no flag."
    )
    ENGINE = (
        "You cannot set them. Read them in `Description.Engine.EngineLabels` of `docker node inspect`, and use them in "
        "placement constraints as `engine.labels.NAME`."
    )


class Label(msgspec.Struct, frozen=True):
    """One ``skep.*`` label, for the reference.  Upper-case words in ``name`` are placeholders."""

    target: LabelTarget
    name: str
    values: str
    default: str
    effect: str


_PUBLISH = "skep.publish[.PORT[/PROTOCOL]]"
_HTTP = f"{HTTP}[.NAME]"

LABELS = (
    Label(
        LabelTarget.CONTAINER,
        STACK_FILES,
        "`FILE=HASH,...`",
        "none",
        "Files next to the Compose file that the service mounts. Changed content updates the service. `skep stack "
        "deploy` writes it.",
    ),
    Label(
        LabelTarget.CONTAINER,
        EXEC,
        "`any`, `user`, `none`",
        "`any`",
        "Limits `skep exec`, `attach`, `cp` and `kill` for users below administrator. With `user`, commands run as the "
        "container's user only, and no files are copied in. `none` refuses all four.",
    ),
    Label(
        LabelTarget.SERVICE,
        ON_DISCONNECT,
        "`replace`, `keep`, `stop`",
        "`replace`",
        "Tasks on a node that lost all managers. `replace`: other tasks replace them. `keep`: they keep their slots as "
        "long as the node exists. `stop`: the node stops them, and other tasks replace them after that. The tasks of a "
        "removed node are replaced at once.",
    ),
    Label(
        LabelTarget.SERVICE,
        ON_DISCONNECT_DELAY,
        "duration",
        "`0s`, with `stop` `30s`",
        "Time before that. It starts when the node is down (`replace`), or with the last heartbeat that a manager got "
        "(`stop`).",
    ),
    Label(
        LabelTarget.SERVICE,
        PROGRESS_DEADLINE,
        "duration",
        "`10m`",
        "How long an update waits for a task to run or to end. Then the update has failed. Time in which the task "
        "waits for other services (`skep.depends-on`), or for the previous task to stop, does not count, and the "
        "deadline starts again afterwards. Time in which it waits for a missing service or a failed job counts. "
        "Without this label, an update also fails after 10 s if no node can ever take the task.",
    ),
    Label(
        LabelTarget.SERVICE,
        MIN_AVAILABLE,
        "number of tasks, or percentage such as `80%`",
        "see text",
        "How many tasks of a replicated service drains, updates, preemption and changed nodes leave available ([guide]"
        "(../guide/nodes.md#limit-how-many-tasks-are-away-at-once)). A percentage is rounded up. If it is all tasks, "
        "updates start new tasks first where they can. By default, drains that have to stop tasks first "
        "stop as many at a time as updates do.",
    ),
    Label(
        LabelTarget.SERVICE,
        UPDATE,
        f"`{CANARY}`, `{BLUE_GREEN}`",
        "none",
        "`canary` moves new connections to the new tasks in steps, `blue-green` at once. The old tasks stay meanwhile "
        "([guide](../guide/updates.md#try-an-update-with-a-share-of-the-connections)).",
    ),
    Label(
        LabelTarget.SERVICE,
        UPDATE_STEPS,
        f"up to {STEPS_MAX} rising percentages like `1%,50%`",
        "`5%,25%,100%`",
        "Share of new connections for the new tasks in each step of a canary. At 100 %, the old tasks are replaced.",
    ),
    Label(
        LabelTarget.SERVICE,
        UPDATE_STEP_TIME,
        "duration",
        f"`{DEFAULT_STEP_S:g}s`",
        f"Least time of each step after its new tasks run, at most {STEP_S_MAX / 3600:g} h.",
    ),
    Label(
        LabelTarget.SERVICE,
        UPDATE_KEEP,
        "duration",
        "`10m`",
        "How long `blue-green` keeps the old tasks after the switch.",
    ),
    Label(
        LabelTarget.SERVICE,
        UPDATE_PROMOTE,
        f"`{AUTO}`, `{MANUAL}`",
        f"`{AUTO}`",
        "With `manual`, each step of a canary and the switch of `blue-green` wait for `skep update promote`.",
    ),
    Label(
        LabelTarget.SERVICE,
        MAX_ERRORS,
        "percentage like `1%`",
        "none",
        "A staged update rolls back if more HTTP requests to new tasks fail within a minute. Counts responses with a "
        f"status from 500 on and failed connections over the front door, from {REQUESTS_MIN} requests on.",
    ),
    Label(
        LabelTarget.SERVICE,
        MAX_LATENCY,
        "duration",
        "none",
        "A staged update rolls back if responses of new tasks take longer on average, counted in the same way.",
    ),
    Label(
        LabelTarget.SERVICE,
        UPDATE_PROMETHEUS,
        "URL",
        "none",
        "The Prometheus that the leader asks during a staged update. Rights as for `skep.autoscale.prometheus`.",
    ),
    Label(
        LabelTarget.SERVICE,
        UPDATE_QUERY,
        "PromQL with one sample",
        "none",
        "A step ends only while the value is within its bounds.",
    ),
    Label(
        LabelTarget.SERVICE,
        QUERY_MAX,
        "number",
        "none",
        "Largest value. The query needs this bound or the next one.",
    ),
    Label(
        LabelTarget.SERVICE,
        QUERY_MIN,
        "number",
        "none",
        "Smallest value.",
    ),
    Label(
        LabelTarget.SERVICE,
        QUERY_WAIT,
        "duration",
        "`1m`",
        "How long the value may be out of bounds or unknown before the update rolls back.",
    ),
    Label(
        LabelTarget.SERVICE,
        JOB_TTL,
        "duration",
        "kept",
        "How long Skep keeps an ended job before it removes the job with its tasks. A job that a service requires "
        "(`skep.depends-on`) stays. Not for jobs with a schedule.",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON,
        "five fields of cron, `@hourly`, `@daily` and others, several separated by `;`",
        "none",
        "When the job runs, in its time zone ([tutorial](../tutorials/periodic.md)). It does not run when you create "
        "it, and an update applies to the next run.",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_TIME_ZONE,
        "IANA name: `Europe/Berlin`",
        "`UTC`",
        "Time zone of `skep.cron`.",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_CONCURRENCY,
        "`forbid`, `replace`",
        "`forbid`",
        "A run that is due while the previous one still runs. `forbid` skips it. `replace` stops the previous run "
        "first.",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_DEADLINE,
        "duration, at least `1s`",
        "none",
        "How late a run may start if no manager led when it was due. With `global-job`, also how long each node's task "
        "may wait for space before it is given up.",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_SUSPEND,
        "`true`, `false`",
        "`false`",
        "`true` pauses the schedule. Runs that are due meanwhile do not start later.",
    ),
    Label(
        LabelTarget.SERVICE,
        CRON_MAX_ATTEMPTS,
        f"`0` to `{MAX_ATTEMPTS_MAX}`",
        f"`{MAX_ATTEMPTS_DEFAULT}`",
        "How often a failed task of a run is started again before the run fails, if the restart policy has no "
        "`max_attempts`. `0` means no limit.",
    ),
    Label(
        LabelTarget.SERVICE,
        DRAIN,
        "duration",
        "`1s`",
        "How long a stopping task waits for nodes that may still send it connections, then again for its last "
        "connection to end.",
    ),
    Label(
        LabelTarget.SERVICE,
        LAST_LINES,
        "`0` to `20`",
        "`20`",
        "How many of its last lines of output Skep keeps with an ended task. Use `0` if the output has secrets.",
    ),
    Label(
        LabelTarget.SERVICE,
        PRIORITY,
        f"`-{PRIORITY_MAX}` to `{PRIORITY_MAX}`",
        "`0`",
        "When nodes have too little space, tasks with a higher priority are placed first. Operators of single stacks "
        "cannot set it above 0.",
    ),
    Label(
        LabelTarget.SERVICE,
        VOLUME_AFFINITY,
        "`preferred`, `required`, `none`",
        "`preferred`",
        "Node of a task whose slot has data in a local volume. `preferred`: the node with the data if it can run the "
        "task, else another one. `required`: only that node, for which the task waits. `none`: any node, as in "
        "Docker.",
    ),
    Label(
        LabelTarget.SERVICE,
        AFFINITY,
        f"`SERVICE[@TOPOLOGY]`, at most {TERMS_MAX}, separated by commas",
        "none",
        "Services near which tasks must run: on a node with one of their tasks, or in the same domain of a topology "
        "such as `node.labels.zone` ([guide](../guide/placement.md)). Tasks wait until the service runs.",
    ),
    Label(
        LabelTarget.SERVICE,
        ANTI_AFFINITY,
        f"`SERVICE[@TOPOLOGY]`, at most {TERMS_MAX}, separated by commas",
        "none",
        "Services that tasks must not share a node or a domain with. Tasks of those services keep away from this one's "
        "as well.",
    ),
    Label(
        LabelTarget.SERVICE,
        AFFINITY_PREFERRED,
        f"as `{AFFINITY}`",
        "none",
        "The same, if a node there can run the task.",
    ),
    Label(
        LabelTarget.SERVICE,
        ANTI_AFFINITY_PREFERRED,
        f"as `{ANTI_AFFINITY}`",
        "none",
        "The same, if another node can run the task. The other service's tasks do not keep away.",
    ),
    Label(
        LabelTarget.SERVICE,
        MAX_SKEW,
        f"`NUMBER@TOPOLOGY`, at most {TERMS_MAX}, separated by commas, NUMBER up to {SKEW_MAX:,}",
        "none",
        "Largest difference in the number of the service's tasks between two domains of the topology, such as "
        "`1@node.labels.zone`. Tasks go to the domain with the fewest first. Not for global services.",
    ),
    Label(
        LabelTarget.SERVICE,
        PUBLISH_NOT_READY,
        "`true`, `false`",
        "`false`",
        "With `true`, the names of tasks (`tasks.SERVICE`, `SLOT.SERVICE`, and `SERVICE` with `--endpoint-mode dnsrr`) "
        "resolve before the tasks are healthy, for software that needs its peers to become healthy. Virtual addresses "
        "and published ports still reach healthy tasks only.",
    ),
    Label(
        LabelTarget.SERVICE,
        NEAR,
        "`true`, `false`",
        "`false`",
        "With `true`, the service's name, virtual address, published ports and routes lead to tasks at the site of the "
        "node that connects, by the node label `site`, or else `zone`. If none of them serves, they lead to all.",
    ),
    Label(
        LabelTarget.SERVICE,
        STOPPED,
        "`true`, `false`",
        "`false`",
        "With `true`, all tasks stop and the spec stays, with its number of replicas. `skep service stop` and `skep "
        "service start` change it. Rollbacks keep it.",
    ),
    Label(
        LabelTarget.SERVICE,
        DEPENDS_ON,
        "`NAME=CONDITION[+restart][+optional],...`",
        "none",
        "Services that this one waits for before its first task starts, with Compose's conditions: `service_started`, "
        "`service_healthy`, `service_completed_successfully`. With `+restart`, an update of that service restarts this "
        "one. With `+optional`, this one does not wait if that service is missing or fails "
        "([Compose files](../guide/compose.md#start-services-in-order)).",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE,
        "`2..10`",
        "off",
        "The least and the most tasks of a replicated service. Within this range, their number follows their load "
        "([autoscaling](../guide/autoscaling.md)). The least may be 0 for a service with a route.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_CPU,
        "`1` to `1000`, percent",
        "`70`, or no target if you set one for memory",
        "Target CPU use of a task, in percent of its limit, else of its reservation, else of one CPU.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_MEMORY,
        "`1` to `100`, percent",
        "none",
        "Target memory use of a task, in percent of its limit. The service needs a memory limit.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_DOWN_AFTER,
        "duration, `15s` to `24h`",
        "`5m`",
        "How long fewer tasks must suffice before Skep removes tasks.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_REQUESTS,
        "number above 0",
        "none",
        "Target of HTTP requests in flight of a task, over the front door. The service needs an HTTP route.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_RPS,
        "number above 0",
        "none",
        "Target of HTTP requests per second of a task, over the front door.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_PROMETHEUS,
        "URL",
        "none",
        "The Prometheus that the leader asks. Only an administrator may name an address of a node, or one on loopback.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_QUERY,
        "PromQL with one sample",
        "none",
        "The value is divided among the tasks.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_QUERY_TARGET,
        "number above 0",
        "none",
        "Part of that value for one task.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_QUEUE,
        "URL",
        "none",
        "A page with the length of a queue, which the leader asks. Rights as for `skep.autoscale.prometheus`.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_QUEUE_FIELD,
        "path like `queue.length`",
        "none",
        "Field of the JSON object on the page. Without it, the page is only a number.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_QUEUE_EXEC,
        "command",
        "none",
        "Runs in a container of the service instead of a request for a page. Its output begins with the length.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_QUEUE_EXEC_IN,
        "service",
        "this service",
        "Service of the same stack in whose container that command runs.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_QUEUE_TARGET,
        "number above 0",
        "none",
        "Length of the queue for one task.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_SCHEDULE,
        "`CRON RANGE; ...`",
        "none",
        "Ranges within `skep.autoscale`. The entry that was due last applies, for example "
        "`0 8 * * 1-5 4..10; 0 20 * * * 1..3`.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_TIME_ZONE,
        "name of a time zone",
        "`UTC`",
        "Time zone of that schedule.",
    ),
    Label(
        LabelTarget.SERVICE,
        AUTOSCALE_IDLE_AFTER,
        "duration, `15s` to `24h`",
        "`5m`",
        "How long a service without requests keeps its last task, if the range starts at 0 "
        "([scale to zero](../guide/autoscaling.md#scale-to-zero)).",
    ),
    Label(
        LabelTarget.SERVICE,
        f"{_PUBLISH}.host-ip",
        "IP address",
        "all",
        "The only address on each node that the port answers on.",
    ),
    Label(
        LabelTarget.SERVICE,
        f"{_PUBLISH}.affinity",
        "`none`, `client-ip`",
        "`none`",
        "With `client-ip`, a client always reaches the same task while that task is healthy.",
    ),
    Label(
        LabelTarget.SERVICE,
        f"{_PUBLISH}.local",
        "`true`, `false`",
        "`false`",
        "With `true`, a node that has healthy tasks of the service sends connections only to those.",
    ),
    Label(
        LabelTarget.SERVICE,
        f"{_PUBLISH}.proxy-protocol",
        "`none`, `v1`, `v2`",
        "`none`",
        "Each TCP connection begins with a PROXY protocol header that names its client.",
    ),
    *(
        Label(LabelTarget.SERVICE, name, values, default, effect)
        for name, values, default, effect in (
            (
                HTTP,
                "`HOST[/PATH]`, separated by commas",
                "none",
                "HTTP routes: the front door sends their requests to the service (`skep service expose`).",
            ),
            (f"{HTTP}.NAME", "as `skep.http`", "none", "More routes, which can have options of their own."),
            (f"{_HTTP}.port", "a port", f"`{PORT_DEFAULT}`", "The containers' port."),
            (f"{_HTTP}.tls", "`auto`, `off`, a secret", "the cluster's", "Certificate of the host."),
            (
                f"{_HTTP}.redirect",
                "`https`, an address",
                "none",
                "Redirects (308) to HTTPS or to another site.",
            ),
            (
                f"{_HTTP}.strip-prefix",
                "`true`, `false`",
                "`false`",
                "Removes the route's path from requests.",
            ),
            (f"{_HTTP}.sticky", "`true`, `false`", "`false`", "A cookie leads a client back to its task."),
            (f"{_HTTP}.compress", "`true`, `false`", "`false`", "Compresses text with gzip."),
            (f"{_HTTP}.share", "`true`, `false`", "`false`", "Lets other stacks add paths to the host."),
            (f"{_HTTP}.max-body", "a size (`10MiB`)", "none", "Refuses larger requests (413)."),
            (
                f"{_HTTP}.max-failures",
                "1 to 999",
                "none",
                "After so many failures in a row, a task gets no requests for ten seconds.",
            ),
            (f"{_HTTP}.timeout", "a duration", "`60s`", "Time limit for a response (504)."),
            (
                f"{_HTTP}.rate",
                "`100/s`, `10/m`, `5/h`",
                "none",
                "Limits a client's requests at each node (429).",
            ),
            (
                f"{_HTTP}.protocol",
                "`http1`, `h2c`",
                "`http1`",
                "Protocol between the front door and the tasks.",
            ),
            (f"{_HTTP}.allow", "networks", "all", "Refuses other clients (403)."),
            (
                f"{_HTTP}.request-header.HEADER",
                "a value",
                "none",
                "Sets a header for tasks. Empty removes it.",
            ),
            (
                f"{_HTTP}.response-header.HEADER",
                "a value",
                "none",
                "Sets a header for clients. Empty removes it.",
            ),
            (
                DOOR,
                "`true`, `false`",
                "`false`",
                "Makes the service's tasks proxies. `skep door up` sets it.",
            ),
            (TRUSTED, "networks", "none", "Proxies whose `X-Forwarded-For` the front door keeps."),
            (PROXY_PROTOCOL, "`true`, `false`", "`false`", "Clients speak the PROXY protocol."),
            (ACCESS_LOG, "`true`, `false`", "`true`", "Logs each request as a line of JSON."),
        )
    ),
    *(
        Label(LabelTarget.CONTAINER, name, values, default, effect)
        for name, values, default, effect in (
            (
                SECRET_ENV_LABEL,
                "`VARIABLE=TARGET`, separated by commas",
                "",
                "Secrets that are also environment variables, by their targets. Not in inspect output or execs.",
            ),
            (
                RELABEL,
                "`/data=z`, `/cache=Z`, separated by commas",
                "`z` for volumes",
                "Labels a mount's files for all containers, or for this one ([SELinux](../guide/security.md#selinux)).",
            ),
            (
                EXECUTOR_LABEL,
                "`process`",
                "the image",
                "Runs a [program of the node](../guide/processes.md), with the image `scratch` (right `processes`).",
            ),
            (
                "skep.privileged",
                "`true`, `false`",
                "`false`",
                "As `docker run --privileged` (right `privileged`).",
            ),
            (
                "skep.devices",
                "`/dev/a`, `/dev/a:/dev/b:rwm`, `vendor.com/class=name`, separated by commas",
                "none",
                "Devices, directories of them, CDI devices, or [`reserved`](../guide/devices.md) (right `devices`).",
            ),
            (
                "skep.device-rules",
                "`c 188:* rwm`, separated by commas",
                "none",
                "As `docker run --device-cgroup-rule` (right `devices`).",
            ),
            (
                "skep.gpus",
                "`all`, a number, `device=NAME,...`, `reserved`",
                "none",
                "GPUs by CDI (right `gpus`). Only `reserved` GPUs are counted ([guide](../guide/devices.md)).",
            ),
            (
                API_LABEL,
                "`read`, `inspect`, `full`",
                "`read`",
                "Access to the API, if the container mounts its socket ([API access](../guide/api-access.md)).",
            ),
            ("skep.pid", "`host`", "separate", "Uses the node's processes (right `namespaces`)."),
            ("skep.ipc", "`host`", "separate", "Uses the node's shared memory (right `namespaces`)."),
            ("skep.uts", "`host`", "separate", "Uses the node's host name (right `namespaces`)."),
            (
                "skep.shm-size",
                "size: `256m`",
                "`64m`",
                "Size of `/dev/shm` (right `resources`, as for all further labels).",
            ),
            (
                "skep.cpu-shares",
                "`2` to `262144`",
                "`1024`",
                "CPU weight relative to other containers.",
            ),
            ("skep.cpuset-cpus", "`0-3,5`", "all", "CPUs that the container may use."),
            ("skep.cpuset-mems", "`0,1`", "all", "Memory nodes that the container may use."),
            (
                "skep.memory-swap",
                "size, or `-1` for no limit",
                "twice the limit",
                "Memory and swap together.",
            ),
            ("skep.memory-swappiness", "`0` to `100`", "the kernel's", "Swappiness, on cgroups v1 only."),
            ("skep.blkio-weight", "`10` to `1000`", "the kernel's", "Weight of block I/O."),
            (
                "skep.device-read-bps",
                "`/dev/sda:1m`, separated by commas",
                "none",
                "Bytes read in a second at most.",
            ),
            ("skep.device-write-bps", "as above", "none", "Bytes written in a second at most."),
            (
                "skep.device-read-iops",
                "`/dev/sda:1000`, separated by commas",
                "none",
                "Reads in a second at most.",
            ),
            ("skep.device-write-iops", "as above", "none", "Writes in a second at most."),
        )
    ),
    Label(
        LabelTarget.NETWORK,
        DOOR,
        "`true`, `false`",
        "`false`",
        "HTTP routes lead over this network. `skep door up` sets it. Only administrators may set it.",
    ),
    Label(
        LabelTarget.NETWORK,
        "skep.attach",
        "constraints, separated by commas",
        "any node",
        "Nodes whose plain containers may join an attachable network. You can use `node.labels.*`, `node.role` and "
        "`node.id`.",
    ),
    Label(
        LabelTarget.NETWORK,
        "skep.data-plane",
        "`skep`, `docker`",
        "by its first task",
        "Kind of nodes that the overlay is for. Also a driver option (`--opt`).",
    ),
    Label(
        LabelTarget.NETWORK,
        "skep.allow-overlap",
        "`true`",
        "refused",
        "Allows a subnet that a node already reaches outside of the cluster. Also a driver option (`--opt`).",
    ),
    Label(
        LabelTarget.SECRET,
        ROTATION_OF,
        "a name",
        "",
        "Name of the first version of a secret or config, on every later version.",
    ),
    Label(
        LabelTarget.REVISION,
        STACK_REVISION,
        "a number",
        "",
        "Number of the revision that the config holds. No service uses the config.",
    ),
    Label(
        LabelTarget.REVISION,
        STACK_STATE,
        "`deploying`, `deployed`, `interrupted`, `failed: CAUSE`, `rolling back`, `replaced by revision N`",
        "",
        "How its deploy ended.",
    ),
    Label(
        LabelTarget.REVISION, STACK_CHANGES, "`2 created, 1 updated`", "", "Objects that its deploy changed."
    ),
    Label(
        LabelTarget.NODE,
        RESERVE_CPUS,
        "number of processors, such as `0.5`",
        "`0`",
        "Processors that tasks cannot reserve on the node, because the system needs them.",
    ),
    Label(
        LabelTarget.NODE,
        RESERVE_MEMORY,
        "bytes, or `512MiB`, `2GiB`",
        "`0`",
        "Memory that tasks cannot reserve on the node. Tasks without a reservation are not limited by it.",
    ),
    Label(
        LabelTarget.NODE,
        DRAIN_NOW,
        "`true`",
        "`false`",
        "A drain stops the node's tasks before their replacements run, as in Docker. The command `skep node drain "
        "--now` sets this label. Skep removes the label when the drain ends.",
    ),
    Label(
        LabelTarget.NODE,
        IGNORE_PATHS,
        "`true`",
        "`false`",
        "The node gets tasks on overlay networks although other nodes do not reach it.",
    ),
    Label(
        LabelTarget.NODE,
        RELAY_LABEL,
        "`true` or `false`",
        "",
        "Whether the node relays between nodes behind different NATs. With `true` on some nodes, only these relay "
        "while one of them is up. With `false`, a node never does.",
    ),
    Label(
        LabelTarget.NODE,
        FORGOTTEN_LABEL,
        "`VOLUME@TIME ...`",
        "none",
        "Local volumes of the node that you gave up with `skep volume forget`. Use before that time attracts no task.",
    ),
    Label(
        LabelTarget.NODE,
        ZONE,
        "text",
        "the label `zone`",
        "The node's zone for `skep survive`, which tries the loss of each zone. The label `zone` comes first.",
    ),
    Label(
        LabelTarget.CLUSTER,
        HEARTBEAT_GRACE,
        "duration, at most `1h`",
        "three heartbeats",
        "How long a silent skep node counts as alive (`skep cluster grace`).",
    ),
    Label(
        LabelTarget.CLUSTER,
        FORGET_NODES,
        "duration, `1m` to `2160h`",
        "never",
        "How long Skep keeps a worker that is down. It stays longer if its removal would lose something (`skep cluster "
        "forget-nodes`).",
    ),
    Label(
        LabelTarget.CLUSTER,
        LAST_LINES,
        "`0` to `20`",
        "`20`",
        "How many of its last lines of output managers keep with an ended task of any service.",
    ),
    Label(
        LabelTarget.CLUSTER,
        MAINTENANCE,
        "JSON",
        "",
        "Nodes that are down for maintenance. `skep reboot-lock` and `skep upgrade` write it.",
    ),
    Label(
        LabelTarget.CLUSTER,
        HISTORY,
        f"`0` to `{HISTORY_MAX}`",
        f"`{HISTORY_DEFAULT}`",
        "How many entries `skep history` keeps, half of them for requests. `0` keeps none and removes the current "
        "ones.",
    ),
    Label(
        LabelTarget.CLUSTER,
        WORKER_READS,
        "`true`, `false`",
        "`false`",
        "With `true`, clients of a worker's API may read services with their environment, tasks, nodes, networks and "
        "events (`skep cluster worker-reads`).",
    ),
    Label(
        LabelTarget.CLUSTER,
        SHARE_IMAGES,
        "`true`, `false`",
        "`false`",
        "With `true`, every node may read the images of every other node, also for `docker pull` on a worker. "
        "Otherwise a worker reads only the images that its tasks need (`skep cluster share-images`).",
    ),
    Label(
        LabelTarget.CLUSTER,
        PREEMPTION,
        "`true`, `false`",
        "`false`",
        "With `true`, Skep stops tasks of lower priority if a task of higher priority finds no space (`skep cluster "
        "preemption`).",
    ),
    Label(
        LabelTarget.CLUSTER,
        "skep.renew-window",
        "duration, or `0` for never",
        "`720h`",
        "How long after its expiry a node can renew its certificate.",
    ),
    Label(
        LabelTarget.CLUSTER,
        ALLOW_LABEL,
        "`none`, `all`, or some of `privileged`, `devices`, `gpus`, `namespaces`, `resources`, `api`, `api-inspect`, "
        "`processes`, separated by commas",
        "`none`",
        "Rights over their nodes that services get by labels of their containers (`skep cluster allow`).",
    ),
    Label(
        LabelTarget.CLUSTER,
        ALLOW_MACHINE_LOGS,
        "`true`, `false`",
        "`false`",
        "With `true`, services of users below administrator may log to loopback, link-local and node addresses, and "
        "with the log drivers `journald` and `syslog` to the machine's log. After you remove it, a running task keeps "
        "its log until it changes or is replaced.",
    ),
    Label(
        LabelTarget.CLUSTER,
        ALLOW_CREDENTIAL_HELPERS,
        "`STACK=REPOSITORY`, separated by commas, `*` for every stack",
        "none",
        "Repositories, with those below them, whose images nodes may pull with the node's credentials "
        "(`credential-helpers`) for services of users below administrator.",
    ),
    Label(LabelTarget.ENGINE, "skep.node", "`true`", "", "The node is a skep node, not a Docker Engine."),
    Label(
        LabelTarget.ENGINE,
        "skep.condition.NAME",
        "a sentence",
        "",
        f"Something is wrong with the node. NAME is one of {_CONDITIONS}. See "
        "[troubleshooting](../guide/troubleshooting.md#node-conditions).",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.missing.NAME",
        "`true`",
        "",
        "The kernel lacks a feature: `bridge`, `ipv6-egress`, `nftables`, `overlayfs`, `route-localnet`, `seccomp`, "
        "`tun`, `veth`, `vxlan`, `wireguard` and others.",
    ),
    Label(
        LabelTarget.ENGINE,
        f"{FACT_LABEL}NAME",
        "a text",
        "",
        "A fact about the machine, which constraints read as `node.facts.NAME`: `kernel`, `cgroup` (1 or 2), "
        "`distribution`, `distribution-version`, `rootless` (`true`) and `userns` (`remap`).",
    ),
    Label(
        LabelTarget.ENGINE,
        BOOT_LABEL,
        "a boot id",
        "",
        "Id of the present boot of the machine's kernel. `skep upgrade --system` waits until it is another one.",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.encryption",
        "`kernel` or `wireguard-go`",
        "",
        "WireGuard implementation that encrypts overlay networks on the node. Without the label, the node refuses "
        "tasks on encrypted networks.",
    ),
    Label(
        LabelTarget.ENGINE,
        USERS_LABEL,
        f"`{MAPPED}`",
        "",
        "The node maps the users of containers (`userns-remap`). It gets no tasks that are privileged, or need the "
        "machine's network or processes.",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.wireguard",
        "`KEY@PORT`, at most two, separated by commas",
        "",
        "The node's public WireGuard keys in base64, the oldest first, each with its UDP port.",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.data-path-addr",
        "IP address",
        "",
        "Address that the node sends and receives VXLAN on.",
    ),
    Label(
        LabelTarget.ENGINE,
        LOCAL_ADDRESSES_LABEL,
        "IP addresses with prefix lengths, separated by commas",
        "",
        "The addresses from which the node connects to managers, as it sees them itself. A worker that managers see "
        "under another address is behind NAT.",
    ),
    Label(
        LabelTarget.ENGINE,
        NAT_LABEL,
        "a name, or `no`",
        "",
        "The NAT that the node is behind, if its setting `behind-nat` says so.",
    ),
    Label(
        LabelTarget.ENGINE,
        TUNNEL_LABEL,
        "`KEY@PORT`",
        "",
        "The node's public WireGuard key for tunnels through NAT, with its UDP port. Without the label, it can have "
        "no such tunnels.",
    ),
    Label(
        LabelTarget.ENGINE,
        REFUSED_TUNNEL_LABEL,
        "`KEY@PORT`",
        "",
        "The same key, if a manager refused it because it belongs to another node.",
    ),
    Label(
        LabelTarget.ENGINE,
        SEEN_NAT_LABEL,
        "IP address",
        "",
        "Managers set it. The address of a NAT from which they have seen the node since its machine started.",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.data-path-addr.refused",
        "IP address",
        "",
        "The same address, if a manager refused it because it belongs to another node.",
    ),
    Label(
        LabelTarget.ENGINE,
        ALLOW_LABEL,
        "rights, separated by commas",
        "",
        "Rights over the node that tasks can get there (its setting `allow`).",
    ),
    Label(
        LabelTarget.ENGINE,
        DEVICES_LABEL,
        "paths, separated by commas",
        "",
        "The node's devices, without terminals, loop devices and disks by name. It ends with `...` if the list is cut.",
    ),
    Label(
        LabelTarget.ENGINE,
        CDI_LABEL,
        "`vendor.com/class=name`, separated by commas",
        "",
        "CDI devices that the node has specs for.",
    ),
    Label(
        LabelTarget.ENGINE, "skep.paths", "`1`", "", "The node probes other nodes and answers their probes."
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.rootless",
        "`ports-from=1024 limits=cpu,memory`",
        "",
        "An ordinary user runs the node: its lowest port for host-mode ports, and the limits that it can set.",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.images-port",
        "port number",
        "",
        "TCP port at which the node serves its images to other nodes of the cluster.",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.ports",
        "`tcp=22,80 udp=53`",
        "",
        "Ports that plain containers and other programs of the machine use. Host-mode ports of services avoid it.",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.reserved-ports",
        "`tcp=2376,2377 udp=4789`",
        "",
        "Ports that the node's daemon uses. Only administrators publish on a manager's, in the whole cluster.",
    ),
    Label(
        LabelTarget.ENGINE,
        SLOT_VOLUMES_LABEL,
        "`VOLUME=SERVICE.SLOT@TIME ...`",
        "",
        "Slots of services that have used the node's local volumes, the latest first. TIME is when the task was "
        "created, in milliseconds.",
    ),
    Label(
        LabelTarget.ENGINE,
        "skep.routes",
        "`SUBNET=INTERFACE ...`",
        "",
        "Networks that the machine reaches outside of the cluster. New overlays avoid them.",
    ),
)
"""In the order of the reference page."""

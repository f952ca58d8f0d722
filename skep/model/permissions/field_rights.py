"""Decides which fields of specs and which ``skep.*`` labels only administrators may set.

The table lists the reach of each field and label: the container, the node, or the cluster.  Everybody may set what
reaches no further than the container.  A field or label that is missing in the table is reserved for administrators, so
a new one stays restricted until it is classified here.  For a few fields, a function decides by value.
``api.access.permissions`` checks the rights to other objects (the networks, secrets and volumes of a stack).
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

import msgspec

from skep.model.container import (
    AppArmorOpts,
    BindOptions,
    ClusterOptions,
    ConfigReference,
    ContainerSpec,
    CredentialSpec,
    DNSConfig,
    FileTarget,
    HealthConfig,
    ImageMountOptions,
    Mount,
    Privileges,
    RuntimeTarget,
    SeccompOpts,
    SecretReference,
    SELinuxContext,
    TmpfsOptions,
    Ulimit,
    VolumeOptions,
)
from skep.model.door.routes import HTTP_LABELS, label_class
from skep.model.door.settings import DOOR, DOOR_LABELS
from skep.model.measures.queries import QUERY_LABELS
from skep.model.network import (
    OVERLAP_LABEL,
    IPAMConfig,
    IPAMOptions,
    NetworkSpec,
)
from skep.model.network import ConfigReference as NetworkConfigReference
from skep.model.networks.attaching import ATTACH_LABEL
from skep.model.networks.data_planes import PLANE_OPTION
from skep.model.options.affinity import AFFINITY_LABELS, MAX_SKEW
from skep.model.options.autoscaling import AUTOSCALE_LABELS
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.labels import (
    DRAIN,
    EXEC,
    FORMER_VOLUMES,
    JOB_TTL,
    LAST_LINES,
    MIN_AVAILABLE,
    NEAR,
    ON_DISCONNECT,
    ON_DISCONNECT_DELAY,
    PRIORITY,
    PROGRESS_DEADLINE,
    PUBLISH_NOT_READY,
    RELABEL,
    ROTATION_OF,
    STACK_CHANGES,
    STACK_FILES,
    STACK_REVISION,
    STACK_STATE,
    STOPPED,
    VOLUME_AFFINITY,
)
from skep.model.options.schedules import SCHEDULE_LABELS
from skep.model.options.secret_env import SECRET_ENV_LABEL
from skep.model.permissions import value_rights
from skep.model.permissions.rights import RIGHT_LABELS
from skep.model.permissions.value_rights import Reach, Why
from skep.model.secret import ConfigSpec, SecretSpec
from skep.model.service import (
    DiscreteResource,
    EndpointSpec,
    GenericResource,
    GlobalJob,
    GlobalService,
    Limits,
    NamedResource,
    NetworkAttachmentConfig,
    NetworkAttachmentSpec,
    Placement,
    PlacementPreference,
    Platform,
    PluginPrivilege,
    PluginSpec,
    PortConfig,
    ReplicatedJob,
    ReplicatedService,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    SpreadOver,
    TaskSpec,
    UpdateConfig,
)
from skep.model.staging.updates import UPDATE_LABELS
from skep.model.values.encoding import ApiObject
from skep.model.values.meta import Driver


class Field(msgspec.Struct, frozen=True):
    """The class of a field or label.

    Args:
        why: Rule that finds the values reserved for administrators.  None reserves all values, or no value if the reach
            is the container.
    """

    reach: Reach
    why: Why | None = None


def admin_rights(spec: ApiObject) -> Iterator[str]:
    """Yield descriptions of the parts of a spec that only an administrator may set."""
    yield from _walk(spec, spec)


def _walk(value: ApiObject, root: ApiObject) -> Iterator[str]:
    fields = FIELDS.get(type(value), {})
    for name, encoded in _names(type(value)):
        given = getattr(value, name)
        if not given and not isinstance(given, msgspec.Struct):
            continue  # An absent field, or its default, needs no right.
        field = fields.get(name)
        if field is not None and field.why is not None:
            yield from field.why(given, root)
        elif field is None or field.reach is not Reach.CONTAINER:
            if field is None or given != _default(type(given)):  # type: ignore[arg-type]  # every class is hashable
                yield f"the field {encoded}"
            continue
        for nested in given if isinstance(given, tuple) else (given,):
            if isinstance(nested, ApiObject):
                yield from _walk(nested, root)


@cache
def _default(type_: type[Any]) -> Any:
    return type_()


@cache
def _names(type_: type[ApiObject]) -> tuple[tuple[str, str], ...]:
    return tuple((one.name, one.encode_name) for one in msgspec.structs.fields(type_))


def _labels(classes: Mapping[str, Field]) -> Why:
    def why(labels: Mapping[str, str], root: ApiObject) -> Iterator[str]:
        """Some `skep.*` labels, see below."""
        for name, value in labels.items():
            if not name.startswith("skep."):
                continue
            field = (
                classes.get(name)
                or classes.get(_PUBLISH.sub(PUBLISH_LABEL, name))
                or classes.get(label_class(name))
            )
            if field is None or (field.why is None and field.reach is not Reach.CONTAINER):
                yield f"the label {name}"
            elif field.why is not None:
                yield from field.why(value, root)

    return why


# --- the table ---------------------------------------------------------------------------------------------------

_PUBLISH = re.compile(r"skep\.publish\.(?:[^.]+\.)?")
PUBLISH_LABEL: Final = "skep.publish[.PORT[/PROTOCOL]]."

_IN_CONTAINER: Final = Field(Reach.CONTAINER)


def _in_container(*names: str) -> dict[str, Field]:
    return dict.fromkeys(names, _IN_CONTAINER)


def _of_node(*names: str) -> dict[str, Field]:
    return dict.fromkeys(names, Field(Reach.NODE))


SERVICE_LABELS: Final[Mapping[str, Field]] = {
    **_in_container(
        # A command of a queue runs in the stack, whose operators may run any command there.
        *AUTOSCALE_LABELS,
        *SCHEDULE_LABELS,
        *(
            DRAIN,
            JOB_TTL,
            LAST_LINES,
            MAX_SKEW,
            MIN_AVAILABLE,
            ON_DISCONNECT,
            ON_DISCONNECT_DELAY,
            PROGRESS_DEADLINE,
        ),
        *UPDATE_LABELS,
        *(NEAR, PUBLISH_NOT_READY, STOPPED, VOLUME_AFFINITY, FORMER_VOLUMES),
        *(f"{PUBLISH_LABEL}{option}" for option in ("affinity", "local", "proxy-protocol")),
    ),
    # The leader asks these queries, with the rights of whoever wrote them (``manager.nodes.trust``).
    **dict.fromkeys(QUERY_LABELS, Field(Reach.CLUSTER, value_rights.anyone)),
    # The other service has to belong to the stack.
    **dict.fromkeys((DEPENDS_ON, *AFFINITY_LABELS), Field(Reach.CLUSTER, value_rights.anyone)),
    # Above 0 for users with a role in the whole cluster.
    PRIORITY: Field(Reach.CLUSTER, value_rights.anyone),
    # A host belongs to the stack of the first service that has it.
    **dict.fromkeys(HTTP_LABELS, Field(Reach.CLUSTER, value_rights.anyone)),
    **dict.fromkeys(DOOR_LABELS, Field(Reach.CLUSTER)),
    # A port of a node belongs to the first service that publishes it.
    f"{PUBLISH_LABEL}host-ip": Field(Reach.NODE, value_rights.anyone),
}
CONTAINER_LABELS: Final[Mapping[str, Field]] = {
    **_in_container(EXEC, RELABEL, SECRET_ENV_LABEL, STACK_FILES),
    **dict.fromkeys(sorted(RIGHT_LABELS), Field(Reach.NODE, value_rights.machine_rights)),
}
NETWORK_LABELS: Final[Mapping[str, Field]] = {
    **_in_container(ATTACH_LABEL, PLANE_OPTION),
    OVERLAP_LABEL: Field(Reach.CLUSTER),
    DOOR: Field(Reach.CLUSTER),
}
SECRET_LABELS: Final[Mapping[str, Field]] = _in_container(ROTATION_OF)
CONFIG_LABELS: Final[Mapping[str, Field]] = _in_container(
    ROTATION_OF, STACK_CHANGES, STACK_REVISION, STACK_STATE
)

FIELDS: Final[Mapping[type[ApiObject], Mapping[str, Field]]] = {
    ServiceSpec: {
        **_in_container("name", "task_template", "mode", "update_config", "rollback_config", "endpoint_spec"),
        "labels": Field(Reach.CONTAINER, _labels(SERVICE_LABELS)),
        "networks": Field(Reach.NODE, value_rights.machine_networks),
    },
    ServiceMode: _in_container("replicated", "global_", "replicated_job", "global_job"),
    ReplicatedService: _in_container("replicas"),
    GlobalService: {},
    ReplicatedJob: _in_container("max_concurrent", "total_completions"),
    GlobalJob: {},
    UpdateConfig: _in_container(
        "parallelism", "delay", "failure_action", "monitor", "max_failure_ratio", "order"
    ),
    EndpointSpec: _in_container("mode", "ports"),
    PortConfig: {
        **_in_container("name", "protocol", "target_port"),
        # A port belongs to the first service that publishes it, and counts in the quota.
        "published_port": Field(Reach.CLUSTER, value_rights.anyone),
        "publish_mode": Field(Reach.NODE, value_rights.anyone),
    },
    TaskSpec: {
        **_in_container("container_spec", "resources", "restart_policy", "placement", "force_update"),
        **_in_container("runtime"),
        "plugin_spec": Field(Reach.NODE, value_rights.other_task),
        "network_attachment_spec": Field(Reach.NODE, value_rights.other_task),
        "networks": Field(Reach.NODE, value_rights.machine_networks),
        "log_driver": Field(Reach.NODE, value_rights.log_driver),
    },
    PluginSpec: _of_node("name", "remote", "privileges", "disabled", "env"),
    PluginPrivilege: _of_node("name", "description", "value"),
    NetworkAttachmentSpec: _of_node("container_id"),
    NetworkAttachmentConfig: {
        # The network has to belong to the stack.
        **_in_container("target", "aliases"),
        "driver_opts": Field(Reach.NODE),
    },
    ResourceRequirements: {
        **_in_container("limits", "reservations"),
        # The labels ``skep.memory-swap`` and ``skep.memory-swappiness`` have the same class, because swap belongs to
        # the whole node.
        **_of_node("swap_bytes", "memory_swappiness"),
    },
    Limits: _in_container("nano_cpus", "memory_bytes", "pids"),
    Resources: _in_container("nano_cpus", "memory_bytes", "generic_resources"),
    GenericResource: _in_container("named_resource_spec", "discrete_resource_spec"),
    NamedResource: _in_container("kind", "value"),
    DiscreteResource: _in_container("kind", "value"),
    RestartPolicy: _in_container("condition", "delay", "max_attempts", "window"),
    Placement: _in_container("constraints", "preferences", "max_replicas", "platforms"),
    PlacementPreference: _in_container("spread"),
    SpreadOver: _in_container("spread_descriptor"),
    Platform: _in_container("architecture", "os"),
    ContainerSpec: {
        **_in_container("command", "args", "hostname", "env", "dir", "user", "groups", "privileges", "init"),
        **_in_container("stop_signal", "tty", "open_stdin", "read_only", "stop_grace_period"),
        # The runtime refuses sysctls that are not of the container's own namespaces.
        **_in_container("healthcheck", "hosts", "dns_config", "isolation", "sysctls", "capability_drop"),
        # They have to belong to the stack.
        **_in_container("secrets", "configs"),
        "image": Field(Reach.NODE, value_rights.image_registry),
        "labels": Field(Reach.CONTAINER, _labels(CONTAINER_LABELS)),
        "mounts": Field(Reach.NODE, value_rights.mounts),
        "capability_add": Field(Reach.NODE, value_rights.capabilities),
        "ulimits": Field(Reach.NODE, value_rights.ulimits),
        "oom_score_adj": Field(Reach.NODE, value_rights.oom_score),
    },
    Privileges: {
        **_in_container("no_new_privileges"),
        "credential_spec": Field(Reach.NODE, value_rights.security_options),
        "selinux_context": Field(Reach.NODE, value_rights.security_options),
        "seccomp": Field(Reach.NODE, value_rights.security_profile),
        "app_armor": Field(Reach.NODE, value_rights.security_profile),
    },
    CredentialSpec: _of_node("config", "file", "registry"),
    SELinuxContext: _of_node("disable", "user", "role", "type", "level"),
    SeccompOpts: {
        "mode": Field(Reach.NODE, value_rights.anyone),
        "profile": Field(Reach.NODE, value_rights.security_options),
    },
    AppArmorOpts: {"mode": Field(Reach.NODE, value_rights.anyone)},
    HealthConfig: {
        **_in_container("test", "timeout", "start_period", "retries"),
        "interval": Field(Reach.NODE, value_rights.health_interval),
        "start_interval": Field(Reach.NODE, value_rights.health_interval),
    },
    DNSConfig: {
        **_in_container("search", "options"),
        "nameservers": Field(Reach.NODE, value_rights.name_servers),
    },
    SecretReference: _in_container("file", "secret_id", "secret_name"),
    ConfigReference: {
        **_in_container("file", "config_id", "config_name"),
        "runtime": Field(Reach.NODE, value_rights.security_options),
    },
    FileTarget: _in_container("name", "uid", "gid", "mode"),
    RuntimeTarget: {},
    Ulimit: _in_container("name", "soft", "hard"),
    Mount: {
        **_in_container("target", "read_only", "consistency", "tmpfs_options", "cluster_options"),
        # See ``value_rights.mounts``.
        "type": Field(Reach.NODE, value_rights.anyone),
        # The volume has to belong to the stack.
        "source": Field(Reach.NODE, value_rights.anyone),
        "volume_options": _IN_CONTAINER,
        "bind_options": Field(Reach.NODE),
        "image_options": Field(Reach.NODE),
    },
    BindOptions: _of_node(
        *("propagation", "non_recursive", "create_mountpoint"),
        *("read_only_non_recursive", "read_only_force_recursive"),
    ),
    VolumeOptions: {
        **_in_container("no_copy", "subpath"),
        "labels": Field(Reach.CONTAINER, _labels({})),
        "driver_config": Field(Reach.NODE, value_rights.anyone),
    },
    ImageMountOptions: _of_node("subpath"),
    TmpfsOptions: {
        **_in_container("size_bytes", "mode"),
        "options": Field(Reach.NODE, value_rights.tmpfs_options),
    },
    ClusterOptions: {},
    NetworkSpec: {
        **_in_container("name", "ipv6_enabled", "internal", "attachable", "ipam_options", "scope"),
        "labels": Field(Reach.CONTAINER, _labels(NETWORK_LABELS)),
        "driver_configuration": Field(Reach.CLUSTER, value_rights.network_driver),
        "ingress": Field(Reach.CLUSTER, value_rights.ingress),
        "config_from": Field(Reach.NODE),
    },
    IPAMOptions: {
        "driver": Field(Reach.CLUSTER, value_rights.address_driver),
        "configs": Field(Reach.CLUSTER, value_rights.subnets),
    },
    IPAMConfig: _in_container("subnet", "range", "gateway", "auxiliary_addresses"),
    NetworkConfigReference: _of_node("network"),
    SecretSpec: {
        **_in_container("name", "templating"),
        "labels": Field(Reach.CONTAINER, _labels(SECRET_LABELS)),
        "driver": Field(Reach.NODE),
    },
    ConfigSpec: {
        **_in_container("name", "data", "templating"),
        "labels": Field(Reach.CONTAINER, _labels(CONFIG_LABELS)),
    },
    Driver: _in_container("name", "options"),
}
"""Each type of a spec, with each of its fields."""

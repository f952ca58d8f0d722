"""Every option of the Engine API that says how a container runs has an effect here, or is refused by name.

Each row sets one field to a value that means something, in what a service or ``docker run`` sends. The walk goes the
whole way: the manager's checks, the wire, the agent's request, the engine's configuration, the runtime's specification.
What differs from the same request without the field is honored; an error that names the option refuses it; what does
neither is irrelevant for the reason here.
"""

import asyncio
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from skep.agent.executor.adapter import NodeFacts, create_request, task_options
from skep.agent.executor.payloads import Payloads
from skep.api.formats.bodies import from_builtins
from skep.api.formats.service_form import UNRECOGNIZED, settled
from skep.engine.confinement.devices import look_up
from skep.engine.confinement.users import ProcessUser
from skep.engine.containers import create
from skep.engine.containers.container import Container
from skep.engine.containers.request import CreateRequest, TaskOptions, read_create
from skep.engine.images.image import ContainerDefaults
from skep.engine.runtime.runtime_spec import build
from skep.engine.volumes.volumes import Volumes
from skep.errors import SkepError
from skep.manager.control.validation.service_rules import check_service_spec
from skep.model.container import ContainerSpec
from skep.model.service import ServiceSpec
from skep.model.task import AssignedTask, Task
from skep.model.values.ids import ContainerId, NodeId, ServiceId, TaskId
from skep.model.values.meta import Driver
from skep.wire.convert.task_spec import task_spec_from_pb, task_spec_to_pb
from tests.unit.engine.test_specification import ALL_CAPACITY

CAPACITY = msgspec.structs.replace(ALL_CAPACITY, has_recursive_read_only=True, has_io_weight=True)
BIND = {"Type": "bind", "Source": "/usr", "Target": "/t", "BindOptions": {"Propagation": "rprivate"}}
VOLUME = {"Type": "volume", "Source": "vol", "Target": "/t"}
TMPFS = {"Type": "tmpfs", "Target": "/t"}
SECRET = {"SecretID": "s1", "SecretName": "s", "File": {"Name": "s", "UID": "0", "GID": "0", "Mode": 0o444}}
CONFIG = {"ConfigID": "c1", "ConfigName": "c", "File": {"Name": "c", "UID": "0", "GID": "0", "Mode": 0o444}}
HEALTH = {"Test": ["CMD", "true"]}

CONTAINER: dict[str, tuple[Any, dict[str, Any]]] = {
    "Image": ("other:1", {}),
    "Labels": ({"a": "b"}, {}),
    "Command": (["x"], {}),
    "Args": (["x"], {}),
    "Hostname": ("h", {}),
    "Env": (["A=b"], {}),
    "Dir": ("/d", {}),
    "User": ("7", {}),
    "Groups": (["8"], {}),
    "Privileges.CredentialSpec.Config": (
        "x",
        {"Configs": [{"ConfigID": "x", "ConfigName": "x", "Runtime": {}}]},
    ),
    "Privileges.CredentialSpec.File": ("x", {}),
    "Privileges.CredentialSpec.Registry": ("x", {}),
    "Privileges.SELinuxContext.Disable": (True, {}),
    "Privileges.SELinuxContext.User": ("x", {}),
    "Privileges.SELinuxContext.Role": ("x", {}),
    "Privileges.SELinuxContext.Type": ("x", {}),
    "Privileges.SELinuxContext.Level": ("x", {}),
    "Privileges.Seccomp.Mode": ("unconfined", {}),
    "Privileges.Seccomp.Profile": (
        "eyJkZWZhdWx0QWN0aW9uIjoiU0NNUF9BQ1RfQUxMT1cifQ==",
        {"Privileges": {"Seccomp": {"Mode": "custom"}}},
    ),
    "Privileges.AppArmor.Mode": ("disabled", {}),
    "Privileges.NoNewPrivileges": (True, {}),
    "TTY": (True, {}),
    "OpenStdin": (True, {}),
    "ReadOnly": (True, {}),
    "Mounts.0.Target": ("/other", {"Mounts": [BIND]}),
    "Mounts.0.Source": ("/etc", {"Mounts": [BIND]}),
    "Mounts.0.Type": ("tmpfs", {"Mounts": [{"Type": "volume", "Target": "/t"}]}),
    "Mounts.0.ReadOnly": (True, {"Mounts": [BIND]}),
    "Mounts.0.Consistency": ("cached", {"Mounts": [BIND]}),
    "Mounts.0.BindOptions.Propagation": ("rshared", {"Mounts": [BIND]}),
    "Mounts.0.BindOptions.NonRecursive": (True, {"Mounts": [BIND]}),
    "Mounts.0.BindOptions.CreateMountpoint": (True, {"Mounts": [{**BIND, "Source": "{missing}"}]}),
    "Mounts.0.BindOptions.ReadOnlyNonRecursive": (True, {"Mounts": [{**BIND, "ReadOnly": True}]}),
    "Mounts.0.BindOptions.ReadOnlyForceRecursive": (True, {"Mounts": [{**BIND, "ReadOnly": True}]}),
    "Mounts.0.VolumeOptions.NoCopy": (True, {"Mounts": [VOLUME]}),
    "Mounts.0.VolumeOptions.Labels": ({"a": "b"}, {"Mounts": [VOLUME]}),
    "Mounts.0.VolumeOptions.DriverConfig.Name": ("nfs", {"Mounts": [VOLUME]}),
    "Mounts.0.VolumeOptions.DriverConfig.Options": (
        {"type": "nfs", "device": ":/x"},
        {"Mounts": [VOLUME]},
    ),
    "Mounts.0.VolumeOptions.Subpath": ("sub", {"Mounts": [VOLUME]}),
    "Mounts.0.ImageOptions.Subpath": ("sub", {"Mounts": [{"Type": "image", "Source": "i", "Target": "/t"}]}),
    "Mounts.0.TmpfsOptions.SizeBytes": (1024, {"Mounts": [TMPFS]}),
    "Mounts.0.TmpfsOptions.Mode": (0o700, {"Mounts": [TMPFS]}),
    "Mounts.0.TmpfsOptions.Options": ([["exec"]], {"Mounts": [TMPFS]}),
    "StopSignal": ("SIGINT", {}),
    "StopGracePeriod": (3_000_000_000, {}),
    "HealthCheck.Test": (["CMD", "false"], {"Healthcheck": HEALTH}),
    "HealthCheck.Interval": (7_000_000_000, {"Healthcheck": HEALTH}),
    "HealthCheck.Timeout": (7_000_000_000, {"Healthcheck": HEALTH}),
    "HealthCheck.Retries": (7, {"Healthcheck": HEALTH}),
    "HealthCheck.StartPeriod": (7_000_000_000, {"Healthcheck": HEALTH}),
    "HealthCheck.StartInterval": (7_000_000_000, {"Healthcheck": HEALTH}),
    "Hosts": (["10.0.0.1 one"], {}),
    "DNSConfig.Nameservers": (["10.0.0.2"], {}),
    "DNSConfig.Search": (["example.com"], {}),
    "DNSConfig.Options": (["ndots:2"], {}),
    "Secrets.0.File.Name": ("other", {"Secrets": [SECRET]}),
    "Secrets.0.File.UID": ("7", {"Secrets": [SECRET]}),
    "Secrets.0.File.GID": ("7", {"Secrets": [SECRET]}),
    "Secrets.0.File.Mode": (0o400, {"Secrets": [SECRET]}),
    "Secrets.0.SecretID": ("s2", {"Secrets": [SECRET]}),
    "Secrets.0.SecretName": ("t", {"Secrets": [SECRET]}),
    "OomScoreAdj": (5, {}),
    "Configs.0.File.Name": ("other", {"Configs": [CONFIG]}),
    "Configs.0.File.UID": ("7", {"Configs": [CONFIG]}),
    "Configs.0.File.GID": ("7", {"Configs": [CONFIG]}),
    "Configs.0.File.Mode": (0o400, {"Configs": [CONFIG]}),
    "Configs.0.Runtime": ({}, {"Configs": [{"ConfigID": "c1", "ConfigName": "c"}]}),
    "Configs.0.ConfigID": ("c2", {"Configs": [CONFIG]}),
    "Configs.0.ConfigName": ("t", {"Configs": [CONFIG]}),
    "Isolation": ("hyperv", {}),
    "Init": (True, {}),
    "Sysctls": ({"net.ipv4.ip_forward": "1"}, {}),
    "CapabilityAdd": (["CAP_NET_ADMIN"], {}),
    "CapabilityDrop": (["CAP_CHOWN"], {}),
    "Ulimits.0.Name": ("nproc", {"Ulimits": [{"Name": "nofile", "Soft": 10, "Hard": 20}]}),
    "Ulimits.0.Soft": (5, {"Ulimits": [{"Name": "nofile", "Soft": 10, "Hard": 20}]}),
    "Ulimits.0.Hard": (25, {"Ulimits": [{"Name": "nofile", "Soft": 10, "Hard": 20}]}),
}
"""Of a service's ``ContainerSpec``: a value, and what has to be there for the field to mean anything."""


DEVICE = {"Path": "/dev/null", "Rate": 1}

HOST: dict[str, tuple[Any, dict[str, Any]]] = {
    "CpuShares": (512, {}),
    "Memory": (64 << 20, {}),
    "CgroupParent": ("x", {}),
    "BlkioWeight": (100, {}),
    "BlkioWeightDevice": ([{"Path": "/dev/null", "Weight": 10}], {}),
    "BlkioDeviceReadBps": ([DEVICE], {}),
    "BlkioDeviceWriteBps": ([DEVICE], {}),
    "BlkioDeviceReadIOps": ([DEVICE], {}),
    "BlkioDeviceWriteIOps": ([DEVICE], {}),
    "CpuPeriod": (50_000, {"CpuQuota": 50_000}),
    "CpuQuota": (50_000, {}),
    "CpuRealtimePeriod": (1, {}),
    "CpuRealtimeRuntime": (1, {}),
    "CpusetCpus": ("0", {}),
    "CpusetMems": ("0", {}),
    "Devices": ([{"PathOnHost": "/dev/null", "PathInContainer": "/dev/x", "CgroupPermissions": "r"}], {}),
    "DeviceCgroupRules": (["c 1:3 r"], {}),
    "DeviceRequests": ([{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}], {}),
    "KernelMemory": (1, {}),
    "KernelMemoryTCP": (1, {}),
    "MemoryReservation": (32 << 20, {}),
    "MemorySwap": (-1, {"Memory": 64 << 20}),
    "MemorySwappiness": (10, {}),
    "NanoCpus": (500_000_000, {}),
    "OomKillDisable": (True, {}),
    "Init": (True, {}),
    "PidsLimit": (10, {}),
    "Ulimits": ([{"Name": "nofile", "Soft": 5, "Hard": 6}], {}),
    "CpuCount": (1, {}),
    "CpuPercent": (1, {}),
    "IOMaximumIOps": (1, {}),
    "IOMaximumBandwidth": (1, {}),
    "Binds": (["/usr:/t:ro"], {}),
    "ContainerIDFile": ("/tmp/x", {}),
    "LogConfig.Type": ("local", {}),
    "LogConfig.Config": ({"max-size": "1m"}, {"LogConfig": {"Type": "json-file"}}),
    "NetworkMode": ("host", {}),
    "PortBindings": ({"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}, {}),
    "RestartPolicy.Name": ("always", {}),
    "RestartPolicy.MaximumRetryCount": (3, {"RestartPolicy": {"Name": "on-failure"}}),
    "AutoRemove": (True, {}),
    "VolumeDriver": ("nfs", {}),
    "VolumesFrom": (["x"], {}),
    "Mounts": ([BIND], {}),
    "ConsoleSize": ([10, 20], {}),
    "Annotations": ({"a": "b"}, {}),
    "CapAdd": (["NET_ADMIN"], {}),
    "CapDrop": (["CHOWN"], {}),
    "CgroupnsMode": ("host", {}),
    "Dns": (["10.0.0.2"], {}),
    "DnsOptions": (["ndots:2"], {}),
    "DnsSearch": (["example.com"], {}),
    "ExtraHosts": (["one:10.0.0.1"], {}),
    "GroupAdd": (["8"], {}),
    "IpcMode": ("host", {}),
    "Cgroup": ("container:x", {}),
    "Links": (["x:y"], {"NetworkMode": "n"}),
    "OomScoreAdj": (5, {}),
    "PidMode": ("host", {}),
    "Privileged": (True, {}),
    "PublishAllPorts": (True, {"PortBindings": {}, "_ExposedPorts": {"80/tcp": {}}}),
    "ReadonlyRootfs": (True, {}),
    "SecurityOpt": (["seccomp=unconfined"], {}),
    "StorageOpt": ({"size": "1G"}, {}),
    "Tmpfs": ({"/t": "size=1m"}, {}),
    "UTSMode": ("host", {}),
    "UsernsMode": ("host", {}),
    "ShmSize": (1 << 20, {}),
    "Sysctls": ({"net.ipv4.ip_forward": "1"}, {}),
    "Runtime": ("kata", {}),
    "Isolation": ("hyperv", {}),
    "MaskedPaths": ([], {}),
    "ReadonlyPaths": ([], {}),
}
"""Of ``HostConfig`` in what ``docker run`` sends."""

BODY: dict[str, tuple[Any, dict[str, Any]]] = {
    "Hostname": ("h", {}),
    "Domainname": ("example.com", {}),
    "User": ("7", {}),
    "AttachStdin": (True, {}),
    "AttachStdout": (True, {}),
    "AttachStderr": (True, {}),
    "ExposedPorts": ({"80/tcp": {}}, {}),
    "Tty": (True, {}),
    "OpenStdin": (True, {}),
    "StdinOnce": (True, {}),
    "Env": (["A=b"], {}),
    "Cmd": (["x"], {}),
    "Healthcheck": (HEALTH, {}),
    "ArgsEscaped": (True, {}),
    "Image": ("other", {}),
    "Volumes": ({"/t": {}}, {}),
    "WorkingDir": ("/d", {}),
    "Entrypoint": (["x"], {}),
    "NetworkDisabled": (True, {}),
    "MacAddress": ("02:42:ac:11:00:02", {}),
    "OnBuild": (["RUN x"], {}),
    "Labels": ({"a": "b"}, {}),
    "StopSignal": ("SIGINT", {}),
    "StopTimeout": (3, {}),
    "Shell": (["x"], {}),
    "NetworkingConfig.EndpointsConfig": ({"n": {}}, {"HostConfig": {"NetworkMode": "m"}}),
    "NetworkingConfig.EndpointsConfig.n.IPAMConfig.IPv4Address": (
        "10.0.0.9",
        {"HostConfig": {"NetworkMode": "n"}},
    ),
    "NetworkingConfig.EndpointsConfig.n.IPAMConfig.IPv6Address": (
        "fd00::9",
        {"HostConfig": {"NetworkMode": "n"}},
    ),
    "NetworkingConfig.EndpointsConfig.n.IPAMConfig.LinkLocalIPs": (
        ["169.254.1.1"],
        {"HostConfig": {"NetworkMode": "n"}},
    ),
    "NetworkingConfig.EndpointsConfig.n.Links": (["x:y"], {"HostConfig": {"NetworkMode": "n"}}),
    "NetworkingConfig.EndpointsConfig.n.MacAddress": (
        "02:42:ac:11:00:02",
        {"HostConfig": {"NetworkMode": "n"}},
    ),
    "NetworkingConfig.EndpointsConfig.n.Aliases": (["a"], {"HostConfig": {"NetworkMode": "n"}}),
    "NetworkingConfig.EndpointsConfig.n.DriverOpts[com.docker.network.endpoint.sysctls]": (
        {"com.docker.network.endpoint.sysctls": "net.ipv4.conf.IFNAME.log_martians=1"},
        {"HostConfig": {"NetworkMode": "n"}},
    ),
    "NetworkingConfig.EndpointsConfig.n.DriverOpts[any other]": (
        {"a": "b"},
        {"HostConfig": {"NetworkMode": "n"}},
    ),
    "NetworkingConfig.EndpointsConfig.n.GwPriority": (1, {"HostConfig": {"NetworkMode": "n"}}),
}
"""Of the rest of what ``docker run`` sends."""


def with_field(body: Mapping[str, Any], path: str, value: Any) -> Any:
    changed: Any = deepcopy(body)
    *parents, last = path.partition("[")[0].split(".")
    at = changed
    for name in parents:
        at = at[int(name)] if name.isdigit() else at.setdefault(name, {})
    at[last] = value
    return changed


def of_service(container: Mapping[str, Any], directory: Path) -> Any:
    """What a container of such a service would run as; a text: why it is refused."""
    body = {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "i", "Command": ["c"], **container}}}
    try:
        spec = settled(from_builtins(body, ServiceSpec, unrecognized=UNRECOGNIZED))
        check_service_spec(spec)
        template = task_spec_from_pb(task_spec_to_pb(spec.task_template))
        task = Task(id=TaskId("t"), slot=1, node_id=NodeId("n"), service_id=ServiceId("s"), spec=template)
        assigned = AssignedTask(task=task, service_name="web")
        node = NodeFacts(hostname="n")
        request = create_request(assigned, node)
        container_spec = template.container_spec
        assert container_spec is not None
        files = Payloads(directory / "files").mounts("t", container_spec.secrets, container_spec.configs)
        payloads = container_spec.secrets, container_spec.configs
        return payloads, of_request(request, task_options(assigned, files), directory)
    except SkepError as error:
        return str(error)


REFUSED = {
    # Of services: the task is rejected with the text, or the service is not created.
    "Privileges.CredentialSpec.Config": "credentialspec=config://x",
    "Privileges.CredentialSpec.File": "credentialspec=file://x",
    "Privileges.CredentialSpec.Registry": "credentialspec=registry://x",
    "Mounts.0.VolumeOptions.DriverConfig.Name": 'plugin "nfs" not found',
    "Mounts.0.ImageOptions.Subpath": 'invalid MountType: "image"',
    "Isolation": "invalid isolation 'hyperv' on linux",
}
"""A part of the error of each field of a service that is refused."""

REFUSED_HOST = {
    "CpuRealtimePeriod": "--cpu-rt-period",
    "CpuRealtimeRuntime": "--cpu-rt-runtime",
    "KernelMemory": "--kernel-memory",
    "KernelMemoryTCP": "kernelmemorytcp",
    "CpuCount": "cpucount",
    "CpuPercent": "cpupercent",
    "IOMaximumIOps": "iomaximumiops",
    "IOMaximumBandwidth": "iomaximumbandwidth",
    "DeviceRequests": "could not select device driver",  # this machine has no GPU
    "VolumeDriver": "--volume-driver",
    "Cgroup": "cgroup",
    "StorageOpt": "--storage-opt",
    "Isolation": "--isolation",
}
REFUSED_BODY = {
    "Domainname": "--domainname",
    "NetworkDisabled": "networkdisabled",
    "NetworkingConfig.EndpointsConfig.n.IPAMConfig.LinkLocalIPs": "--link-local-ip",
    "NetworkingConfig.EndpointsConfig.n.DriverOpts[any other]": "driver-opt",
}

IRRELEVANT = {
    "Mounts.0.Consistency": "for shared folders of Docker Desktop, no engine on Linux acts on it",
    "ContainerIDFile": "the client writes the file",
    "ArgsEscaped": "for Windows",
    "OnBuild": "for images, only a build reads it",
    "Shell": "for images, only a build reads it",
}


def of_request(request: CreateRequest, task: TaskOptions | None, directory: Path) -> Any:
    """What the engine makes of a request: options, labels, configuration, specification, volumes."""
    image = ContainerDefaults()
    plain = create.plain_options(request) if task is None else None
    mounts = create.mounts(request)
    config = create.container_config(
        request, image, task, create.NodeDefaults("n", "172.18.0.1", Driver(name="json-file"))
    )
    config = msgspec.structs.replace(config, binds=(), requested_mounts=None, tmpfs={})  # are only shown
    volumes = Volumes(directory / "volumes")
    asyncio.run(volumes.bind_sources.check(mounts))
    points = volumes.mount_points(mounts, ())
    config = msgspec.structs.replace(config, mounts=(*points, *config.mounts))
    container = Container(id=ContainerId("c"), name="c", image=request.image, image_id="i", config=config)
    devices = look_up(config.machine, ())
    built = build(container, ProcessUser(), CAPACITY, rootfs="/r", cgroup="/c", files=(), devices=devices)
    named = {
        point.name: (volumes.labels(point.name), volumes.options(point.name))
        for point in points
        if point.name
    }
    unfilled = [mount.target for mount in mounts if mount.volume_options and mount.volume_options.no_copy]
    shown = create.labels(request, image, task), request.image, request.host_config.runtime, unfilled, named
    return plain, shown, config, built


def of_body(body: Mapping[str, Any], directory: Path) -> Any:
    """What ``docker run`` with this body would run as; a text: why it is refused."""
    try:
        return of_request(
            read_create(msgspec.json.encode({"Image": "i", "Cmd": ["c"], **body})), None, directory
        )
    except SkepError as error:
        return str(error)


def hosted(body: Mapping[str, Any]) -> dict[str, Any]:
    host = dict(body)
    exposed = host.pop("_ExposedPorts", {})
    return {"HostConfig": host, "ExposedPorts": exposed}


def outcomes(found: Any, path: str, refused: Mapping[str, str]) -> None:
    """``found``: with the field, and without."""
    before, after = found
    if path in refused:
        assert isinstance(after, str), "it is honored: take it out of the table"
        assert refused[path] in after
    elif path in IRRELEVANT:
        assert after == before, "it has an effect: take it out of the table"
    else:
        assert not isinstance(after, str), after
        assert after != before, "dropped silently"


@pytest.fixture
def both(tmp_path: Path) -> Any:
    """What a request gives without a field and with it, each in a directory of its own."""

    def run(give: Any, base: Mapping[str, Any], path: str, value: Any) -> tuple[Any, Any]:
        base = msgspec.json.decode(
            msgspec.json.encode(base).replace(b"{missing}", bytes(tmp_path / "missing"))
        )
        found = []
        for body in (base, with_field(base, path, value)):
            directory = tmp_path / "node"
            shutil.rmtree(directory, ignore_errors=True)
            found.append(give(body, directory))
        return found[0], found[1]

    return run


@pytest.mark.parametrize("path", CONTAINER)
def test_an_option_of_a_services_containers_is_honored_or_refused(path, both):
    value, base = CONTAINER[path]
    outcomes(both(of_service, base, path, value), path, REFUSED)


@pytest.mark.parametrize("path", HOST)
def test_an_option_of_the_host_is_honored_or_refused(path, both):
    value, base = HOST[path]
    outcomes(both(lambda body, at: of_body(hosted(body), at), base, path, value), path, REFUSED_HOST)


@pytest.mark.parametrize("path", BODY)
def test_an_option_of_a_plain_container_is_honored_or_refused(path, both):
    value, base = BODY[path]
    outcomes(both(of_body, base, path, value), path, REFUSED_BODY)


def fields_of(type_: Any) -> set[str]:
    """The names of a struct's fields in JSON, those of structs within with a dot between."""
    found = set()
    for field in msgspec.structs.fields(type_):
        inner = [one for one in _structs(field.type) if one is not type_]
        below = {f"{field.encode_name}.{name}" for one in inner for name in fields_of(one)}
        found |= below or {field.encode_name}
    return found


def _structs(type_: Any) -> list[Any]:
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return [type_]
    return [one for part in get_args(type_) for one in _structs(part)]


def test_every_field_of_a_container_that_is_decoded_has_its_row():
    rows = {path.replace(".0", "").replace("HealthCheck", "Healthcheck") for path in CONTAINER}
    empty = {"Mounts.ClusterOptions", "Configs.Runtime"}
    decoded = fields_of(ContainerSpec) - empty
    assert decoded == rows - empty

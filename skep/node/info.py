"""``/info`` and ``/version`` of this node, with all fields that Docker Engine has.

Fields about features that Skep does not have (for example plugins) have fixed values, because clients print them
without checking that they exist.

Source: moby 20.10, daemon/info.go; recorded responses of a real engine.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from skep import __version__
from skep.api.http.versions import ApiVersion
from skep.configuration.configuration import Configuration
from skep.dataplane.wireguard.methods import choose
from skep.engine.confinement import apparmor, selinux
from skep.engine.confinement.cdi import Described, units
from skep.engine.containers.container import EngineCounts
from skep.engine.log_drivers.drivers import log_drivers
from skep.model.networks.wireguard import ENCRYPTION_LABEL, EncryptionMethod
from skep.model.values.times import Timestamp
from skep.model.values.user_map import UserMap
from skep.node.host.description import generic_resources
from skep.node.host.features import Features
from skep.node.host.machine import Machine
from skep.node.host.runtime_choice import RuntimeChoice

API_VERSION_MIN = "1.24"
_V1_42 = ApiVersion("1.42")
_V1_44 = ApiVersion("1.44")
_V1_48 = ApiVersion("1.48")
_V1_49 = ApiVersion("1.49")
_V1_50 = ApiVersion("1.50")
_V1_52 = ApiVersion("1.52")
_NONDISTRIBUTABLE = ("AllowNondistributableArtifactsCIDRs", "AllowNondistributableArtifactsHostnames")
_INDEX = "https://index.docker.io/v1/"


class NodeProperties(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of the node that change only with a reload of its configuration."""

    id: str
    machine: Machine
    features: Features
    configuration: Configuration
    versions: Mapping[str, str]
    """Versions of the programs that it starts: runc, crun, conmon, nft, etcd."""
    runtimes: RuntimeChoice = RuntimeChoice()
    users: UserMap | None = None
    """Mapping of the users of containers, or None."""
    engine: Mapping[str, str] = {}
    """``Version`` and ``ApiVersion`` of the machine's Docker Engine.  Empty without one."""


def version(node: NodeProperties, api_version: str) -> dict[str, Any]:
    """Return the response to ``GET /version``."""
    machine = node.machine
    ours = {
        "ApiVersion": api_version,
        "Arch": machine.go_architecture,
        "KernelVersion": machine.kernel,
        "MinAPIVersion": API_VERSION_MIN,
        "Os": "linux",
    }
    components = [{"Name": "Engine", "Version": __version__, "Details": {**ours, "Experimental": "false"}}]
    components += [
        {"Name": name, "Version": found, "Details": {}} for name, found in sorted(node.versions.items())
    ]
    if node.engine:
        details = {"ApiVersion": node.engine.get("ApiVersion", "")}
        components.append(
            {"Name": "Docker Engine", "Version": node.engine.get("Version", ""), "Details": details}
        )
    return {
        "Platform": {"Name": "Skep"},
        "Components": components,
        "Version": __version__,
        "ApiVersion": api_version,
        "MinAPIVersion": API_VERSION_MIN,
        "GitCommit": "",
        "GoVersion": "",
        "Os": "linux",
        "Arch": machine.go_architecture,
        "KernelVersion": machine.kernel,
        "BuildTime": "",
    }


def info(
    node: NodeProperties,
    *,
    counts: EngineCounts,
    swarm: Mapping[str, Any],
    warnings: Sequence[str],
    now: Timestamp,
    devices: Mapping[str, Described] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the response to ``GET /info`` in its newest form.  ``devices``: CDI devices by name."""
    machine, features, configuration = node.machine, node.features, node.configuration
    return {
        "ID": node.id,
        "Containers": counts.running + counts.paused + counts.stopped,
        "ContainersRunning": counts.running,
        "ContainersPaused": counts.paused,
        "ContainersStopped": counts.stopped,
        "Images": counts.images,
        "Driver": "overlay2",
        "DriverStatus": _driver_status(features),
        "Plugins": {
            "Volume": ["local"],
            "Network": ["bridge", "host", "null", "overlay"],
            "Authorization": None,
            "Log": list(log_drivers()),
        },
        **_limits(features),
        "IPv4Forwarding": True,
        "Debug": configuration.debug,
        "NFd": 0,
        "OomKillDisable": "memory" in features.controllers and features.cgroup_version == 1,
        "NGoroutines": 0,
        "SystemTime": now,
        "LoggingDriver": configuration.log_driver,
        "CgroupDriver": "cgroupfs" if features.has_cgroups else "none",
        "CgroupVersion": str(features.cgroup_version),
        "NEventsListener": 0,
        "KernelVersion": machine.kernel,
        "OperatingSystem": machine.os_name,
        "OSVersion": machine.os_version,
        "OSType": "linux",
        "Architecture": machine.architecture,
        "IndexServerAddress": _INDEX,
        "RegistryConfig": registry_config(configuration),
        "NCPU": machine.cpus,
        "MemTotal": machine.memory_bytes,
        "GenericResources": list(generic_resources(configuration, units(devices))) or None,
        "DockerRootDir": str(configuration.data_dir),
        "HttpProxy": "",
        "HttpsProxy": "",
        "NoProxy": "",
        "Name": machine.hostname,
        "Labels": [f"{key}={value}" for key, value in sorted(_labels(configuration, features).items())],
        **_runtime(node, swarm, with_selinux=configuration.selinux_enabled),
        "FirewallBackend": {"Driver": "nftables"},
        "CDISpecDirs": [str(path) for path in configuration.cdi_spec_dirs],
        **_discovered(devices),
        "Warnings": list(warnings) or None,
    }


def _driver_status(features: Features) -> list[list[str]]:
    """Return how images are layered.  overlayfs keeps its marks in attributes ``user.*`` on a rootless node."""
    return [["Native Overlay Diff", "true"], *([["userxattr", "true"]] if features.is_rootless else [])]


def _discovered(devices: Iterable[str]) -> dict[str, Any]:
    found = [{"Source": "cdi", "ID": name} for name in sorted(devices)]
    return {"DiscoveredDevices": found} if found else {}


def _limits(features: Features) -> dict[str, bool]:
    """Return which resources this machine's cgroup controllers can limit."""
    controllers = features.controllers
    has_cpu, has_memory = "cpu" in controllers, "memory" in controllers
    return {
        "MemoryLimit": has_memory,
        "SwapLimit": has_memory,
        "CpuCfsPeriod": has_cpu,
        "CpuCfsQuota": has_cpu,
        "CPUShares": has_cpu,
        "CPUSet": "cpuset" in controllers,
        "PidsLimit": "pids" in controllers,
    }


def _runtime(node: NodeProperties, swarm: Mapping[str, Any], *, with_selinux: bool) -> dict[str, Any]:
    """Return the fields about container runtimes, and the ``Swarm`` section at its place in Docker's order."""
    features = node.features
    runc, nothing = {"ID": node.versions.get("runc", "")}, {"ID": ""}
    return {
        "ExperimentalBuild": False,
        "ServerVersion": __version__,
        "Runtimes": {name: {"path": program} for name, program in sorted(node.runtimes.programs.items())},
        "DefaultRuntime": node.runtimes.default,
        "Swarm": swarm,
        "LiveRestoreEnabled": not features.is_rootless,  # its containers end with it
        "Isolation": "",
        "InitBinary": "tini-static",
        "ContainerdCommit": nothing,
        "RuncCommit": runc,
        "InitCommit": nothing,
        "SecurityOptions": [
            *(["name=apparmor"] if apparmor.is_supported() else []),
            *(["name=seccomp,profile=default"] if features.has("seccomp") else []),
            *(["name=userns"] if node.users is not None else []),
            *(["name=rootless"] if features.is_rootless else []),
            *(["name=selinux"] if with_selinux and selinux.is_active() else []),
        ],
    }


def known_to(version: ApiVersion, shown: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``info`` in the form of API ``version``.

    Source: moby, api/docs/CHANGELOG.md, daemon/server/router/system/system_routes.go (getInfo).
    """
    older = dict(shown)
    if version < _V1_49:
        nothing = None if version >= _V1_48 else ()
        older["RegistryConfig"] = {**shown["RegistryConfig"], **dict.fromkeys(_NONDISTRIBUTABLE, nothing)}
        for name in ("ContainerdCommit", "RuncCommit", "InitCommit"):
            older[name] = {**shown[name], "Expected": shown[name]["ID"]}
        del older["FirewallBackend"]
    if version < _V1_50:
        older |= {"BridgeNfIptables": False, "BridgeNfIp6tables": False}
        older.pop("DiscoveredDevices", None)
    if version < _V1_52:
        older["KernelMemoryTCP"] = False
    if version < _V1_42:
        older["KernelMemory"] = False
    if version < _V1_44:
        del older["CDISpecDirs"]
    return older


def registry_config(configuration: Configuration) -> dict[str, Any]:
    """Return ``RegistryConfig``.  The loopback network is always insecure, as in Docker."""
    networks = [registry for registry in configuration.insecure_registries if "/" in registry]
    hosts = [registry for registry in configuration.insecure_registries if "/" not in registry]
    mirrors = list(configuration.registry_mirrors)
    return {
        "InsecureRegistryCIDRs": ["127.0.0.0/8", *networks],
        "IndexConfigs": {
            "docker.io": {"Name": "docker.io", "Mirrors": mirrors, "Secure": True, "Official": True},
            **{host: {"Name": host, "Mirrors": [], "Secure": False, "Official": False} for host in hosts},
        },
        "Mirrors": mirrors,
    }


def _labels(configuration: Configuration, features: Features) -> Mapping[str, str]:
    """Return the user's labels and the label with this node's encryption method."""
    method = choose(features, configuration.encryption)
    own = {ENCRYPTION_LABEL: method.value} if isinstance(method, EncryptionMethod) else {}
    return {**configuration.labels, **own}

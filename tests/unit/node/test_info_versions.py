"""``GET /info`` in the form of each version of the Engine API."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from skep.api.http.versions import ApiVersion
from skep.configuration.configuration import Configuration
from skep.engine.confinement import selinux
from skep.engine.confinement.cdi import Described, Edits
from skep.engine.containers.container import EngineCounts
from skep.model.service import GenericResource, NamedResource
from skep.model.values.times import timestamp
from skep.node.host.features import Features
from skep.node.host.machine import Machine
from skep.node.host.runtime_choice import InstalledRuntime, RuntimeChoice
from skep.node.info import NodeProperties, info, known_to
from skep.node.routes.system import ping_response

NODE = NodeProperties(
    id="n",
    machine=Machine(
        hostname="n",
        architecture="x86_64",
        kernel="6.1",
        os_name="Debian",
        os_version="12",
        cpus=2,
        memory_bytes=1 << 30,
    ),
    features=Features(),
    configuration=Configuration(),
    versions={"runc": "1.1.5"},
    runtimes=RuntimeChoice(usable={"runc": InstalledRuntime(program="/usr/sbin/runc")}),
)


def shown(version: str, *devices: str) -> Any:
    one = Described(edits=Edits(), file=Path("/etc/cdi/a.json"), shared=Edits())
    found = dict.fromkeys(devices, one)
    newest = info(NODE, counts=EngineCounts(), swarm={}, warnings=(), now=timestamp(0), devices=found)
    return known_to(ApiVersion(version), newest)


def test_1_42_the_limit_of_kernel_memory_is_gone() -> None:
    assert set(shown("1.41")) - set(shown("1.42")) == {"KernelMemory"}


@pytest.mark.parametrize("builds", [True, False])
def test_1_42_a_ping_names_the_builder_and_the_state_of_the_swarm(*, builds: bool) -> None:
    system: Any = SimpleNamespace(
        newest_version=ApiVersion("1.55"),
        swarm_header="active/manager",
        builds_images=builds,
        now_s=lambda: 0.0,
    )
    response = ping_response(system, "HEAD", None) or b""
    assert b"\r\nSwarm: active/manager\r\n" in response
    assert (b"\r\nBuilder-Version: 2\r\n" in response) is builds


def test_1_43_no_option_forbids_new_privileges_in_all_containers() -> None:
    assert not [one for one in shown("1.43")["SecurityOptions"] if "no-new-privileges" in one]


def test_selinux_is_named_if_containers_are_labeled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "is_active", lambda: True)
    assert "name=selinux" not in shown("1.43")["SecurityOptions"], "Docker needs the option, too"
    enabled = replace(NODE, configuration=Configuration(selinux_enabled=True))
    assert _security(enabled) == ["name=selinux"]
    monkeypatch.setattr(selinux, "is_active", lambda: False)
    assert _security(enabled) == []


def _security(node: NodeProperties) -> list[str]:
    found: Any = info(node, counts=EngineCounts(), swarm={}, warnings=(), now=timestamp(0))
    return [one for one in found["SecurityOptions"] if "selinux" in one]


def test_1_44_directories_with_descriptions_of_devices_are_named() -> None:
    assert shown("1.44")["CDISpecDirs"] == ["/etc/cdi", "/var/run/cdi"]
    assert "CDISpecDirs" not in shown("1.43")


def test_1_44_runtimes_have_a_path_and_no_status() -> None:
    assert shown("1.44")["Runtimes"] == {"runc": {"path": "/usr/sbin/runc"}}


def test_1_46_no_containerd_is_reported() -> None:
    assert "Containerd" not in shown("1.46")


def test_1_48_nondistributable_artifacts_are_null() -> None:
    for name in ("AllowNondistributableArtifactsCIDRs", "AllowNondistributableArtifactsHostnames"):
        assert list(shown("1.47")["RegistryConfig"][name]) == []
        assert shown("1.48")["RegistryConfig"][name] is None


def test_1_48_the_bridge_netfilter_module_is_not_reported() -> None:
    assert shown("1.48")["BridgeNfIptables"] is shown("1.48")["BridgeNfIp6tables"] is False


def test_1_49_the_firewall_is_named_and_obsolete_fields_are_gone() -> None:
    before, after = shown("1.48"), shown("1.49")
    assert "FirewallBackend" not in before
    assert after["FirewallBackend"] == {"Driver": "nftables"}
    assert before["RuncCommit"] == {"ID": "1.1.5", "Expected": "1.1.5"}
    assert (after["RuncCommit"], after["InitCommit"], after["ContainerdCommit"]) == (
        {"ID": "1.1.5"},
        {"ID": ""},
        {"ID": ""},
    )
    gone = set(before["RegistryConfig"]) - set(after["RegistryConfig"])
    assert gone == {"AllowNondistributableArtifactsCIDRs", "AllowNondistributableArtifactsHostnames"}


def test_1_50_devices_of_cdi_are_listed() -> None:
    assert shown("1.50", "vendor.com/gpu=0")["DiscoveredDevices"] == [
        {"Source": "cdi", "ID": "vendor.com/gpu=0"}
    ]
    assert shown("1.50", "vendor.com/gpu=0")["GenericResources"] == [
        GenericResource(named_resource_spec=NamedResource(kind="vendor.com/gpu", value="0"))
    ]
    assert "DiscoveredDevices" not in shown("1.50")
    assert "DiscoveredDevices" not in shown("1.49", "vendor.com/gpu=0")


def test_1_50_the_bridge_netfilter_module_is_gone() -> None:
    assert set(shown("1.49")) - set(shown("1.50")) == {"BridgeNfIptables", "BridgeNfIp6tables"}


def test_1_52_the_limit_of_tcp_buffers_is_gone() -> None:
    assert set(shown("1.51")) - set(shown("1.52")) == {"KernelMemoryTCP"}


def test_1_53_no_node_resource_interface_is_reported() -> None:
    assert "NRI" not in shown("1.53")

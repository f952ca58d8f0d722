"""``GET /info`` in the form of each version of the Engine API."""

from typing import Any

from skep.api.http.versions import ApiVersion
from skep.configuration.configuration import Configuration
from skep.engine.containers.container import EngineCounts
from skep.model.values.times import timestamp
from skep.node.host.features import Features
from skep.node.host.machine import Machine
from skep.node.info import NodeProperties, info, known_to

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
)


def shown(version: str) -> Any:
    newest = info(NODE, counts=EngineCounts(), swarm={}, warnings=(), now=timestamp(0))
    return known_to(ApiVersion(version), newest)


def test_1_48_nondistributable_artifacts_are_null() -> None:
    for name in ("AllowNondistributableArtifactsCIDRs", "AllowNondistributableArtifactsHostnames"):
        assert list(shown("1.47")["RegistryConfig"][name]) == []
        assert shown("1.48")["RegistryConfig"][name] is None


def test_1_48_the_bridge_netfilter_module_is_not_reported() -> None:
    assert shown("1.48")["BridgeNfIptables"] is shown("1.48")["BridgeNfIp6tables"] is False

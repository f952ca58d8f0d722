"""From a task's attachments to the endpoints of its container."""

import pytest

from skep.agent.executor.adapter import endpoint_configs, network_head
from skep.agent.executor.interface import Rejected
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.networks.tables import Segment
from skep.model.task import NetworkAttachment, Task
from skep.model.values.ids import NetworkId, TaskId
from skep.model.values.meta import Driver

VXLAN = "com.docker.network.driver.overlay.vxlanid_list"
MTU = "com.docker.network.driver.mtu"


def a_network(
    name: str = "web",
    *subnets: str,
    options: dict[str, str] | None = None,
    ingress: bool = False,
    internal: bool = False,
    driver: str = "overlay",
) -> Network:
    configs = [
        IPAMConfig(subnet=one, gateway=one.split("0/")[0] + "1") for one in subnets or ("10.0.1.0/24",)
    ]
    ids = ",".join(str(4097 + number) for number in range(len(configs)))
    return Network(
        id=NetworkId(f"id-{name}"),
        spec=NetworkSpec(name=name, ingress=ingress, internal=internal),
        driver_state=Driver(name=driver, options={VXLAN: ids, **(options or {})}),
        ipam_options=IPAMOptions(configs=tuple(configs)),
    )


def a_task(*attachments: tuple[Network, str]) -> Task:
    return Task(
        id=TaskId("t1"),
        networks_attachments=tuple(
            NetworkAttachment(network=network, addresses=tuple(addresses.split()), aliases=("front",))
            for network, addresses in attachments
        ),
    )


def test_ingress_comes_first_and_the_others_as_attached() -> None:
    found = endpoint_configs(
        a_task(
            (a_network("web"), "10.0.1.5/24"),
            (a_network("db"), "10.0.1.6/24"),
            (a_network("ingress", ingress=True), "10.0.0.5/24"),
        )
    )
    assert [one.head.name for one in found] == ["ingress", "web", "db"]
    assert found[1].addresses == ("10.0.1.5/24",)
    assert found[1].aliases == ("front",)


def test_networks_of_the_node_itself_are_no_endpoints() -> None:
    assert endpoint_configs(a_task((a_network("host", driver="host"), ""))) == ()


def test_the_head_has_the_allocated_values() -> None:
    network = a_network(
        "web", "10.0.1.0/24", "10.0.2.0/24", options={MTU: "1400", "encrypted": ""}, internal=True
    )
    head = network_head(network)
    assert head.segments == (
        Segment("10.0.1.0/24", "10.0.1.1", 4097),
        Segment("10.0.2.0/24", "10.0.2.1", 4098),
    )
    assert (head.mtu, head.is_encrypted, head.is_internal, head.is_ingress) == (1400, True, True, False)


def test_a_subnet_without_a_vxlan_of_its_own_is_carried_by_the_first() -> None:
    network = a_network("web", "fd01::0/64", "10.0.1.0/24", options={VXLAN: "4097"})
    assert [(one.subnet, one.vni) for one in network_head(network).segments] == [
        ("10.0.1.0/24", 4097),
        ("fd01::/64", 4097),
    ]


def test_ipv4_comes_first() -> None:
    (found,) = endpoint_configs(a_task((a_network(), "fd01::5/64 10.0.1.5/24")))
    assert found.addresses == ("10.0.1.5/24", "fd01::5/64")


@pytest.mark.parametrize(
    ("network", "addresses"),
    [
        (a_network(), "nonsense"),
        (a_network(), ""),
        (a_network("web", "10.0.1.0/24", options={MTU: "seven"}), "10.0.1.5/24"),
        (a_network("web", "10.0.1.0/24", options={MTU: "12"}), "10.0.1.5/24"),
        (a_network("web", "10.0.1.0/24", options={VXLAN: "99999999"}), "10.0.1.5/24"),
        (a_network("web", "10.0.1.0/24", options={VXLAN: "x"}), "10.0.1.5/24"),
        (a_network("web", "10.0.1.0/240"), "10.0.1.5/24"),
    ],
)
def test_an_attachment_that_makes_no_sense_is_rejected(network: Network, addresses: str) -> None:
    with pytest.raises(Rejected, match="network web"):
        endpoint_configs(a_task((network, addresses)))
